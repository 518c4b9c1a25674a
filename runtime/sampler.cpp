// See sampler.h.
#include "runtime/sampler.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "kernels/philox.h"
#include "runtime/error.h"

namespace q4s {
namespace {

void check_range(const char* option, double value, double low, double high, const char* range) {
  if (value >= low && value <= high) return;  // false for NaN
  throw Error(ErrorKind::kUsage, std::string(option) + " " + std::to_string(value) + ": must be " + range);
}

}  // namespace

void SamplerOptions::check() const {
  check_range("--temp", temperature, 0, 100, "0 (greedy) to 100");
  check_range("--top-k", top_k, 0, INT32_MAX, "0 (all) or more");
  check_range("--top-p", top_p, 0, 1, "0 to 1");
  check_range("--min-p", min_p, 0, 1, "0 to 1");
  check_range("--repeat-penalty", repeat_penalty, 0.01, 100, "0.01 to 100");
  check_range("--repeat-last-n", repeat_last_n, -1, INT32_MAX, "-1 (all), 0 (none) or more");
  check_range("--presence-penalty", presence_penalty, -100, 100, "-100 to 100");
  check_range("--frequency-penalty", frequency_penalty, -100, 100, "-100 to 100");
}

Sampler::Sampler(SamplerOptions options, uint64_t sequence)
    : options_(std::move(options)), sequence_(sequence) {
  options_.check();
}

void Sampler::accept(int32_t id) {
  if (options_.repeat_last_n == 0) return;
  history_.push_back(id);
  ++counts_[id];
  const auto window = static_cast<size_t>(options_.repeat_last_n);
  if (options_.repeat_last_n < 0 || history_.size() <= window) return;
  const auto gone = counts_.find(history_[history_.size() - window - 1]);
  if (--gone->second == 0) counts_.erase(gone);
}

int32_t Sampler::sample(std::span<const float> logits) {
  candidates_.resize(logits.size());
  for (size_t id = 0; id < logits.size(); ++id) {
    if (!std::isfinite(logits[id])) {
      throw Error(ErrorKind::kRuntime, "the model gave a logit of " + std::to_string(logits[id]) +
                                           " for token " + std::to_string(id));
    }
    candidates_[id] = {logits[id], static_cast<int32_t>(id)};
  }
  for (auto [id, count] : counts_) {
    if (id < 0 || static_cast<size_t>(id) >= logits.size()) continue;
    float& logit = candidates_[id].logit;
    logit = logit > 0 ? logit / options_.repeat_penalty : logit * options_.repeat_penalty;
    logit -= options_.presence_penalty + options_.frequency_penalty * static_cast<float>(count);
  }
  for (int32_t id : options_.banned) {
    if (id >= 0 && static_cast<size_t>(id) < logits.size()) candidates_[id].logit = -INFINITY;
  }
  std::erase_if(candidates_, [](const Candidate& candidate) { return candidate.logit == -INFINITY; });
  if (candidates_.empty()) throw Error(ErrorKind::kRuntime, "no token is left to sample from");

  auto better = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
  };
  const Candidate best = *std::min_element(candidates_.begin(), candidates_.end(), better);
  if (options_.temperature == 0) return best.id;

  const auto k = static_cast<size_t>(options_.top_k);
  const bool cut_k = k > 0 && k < candidates_.size();
  if (cut_k) {
    std::nth_element(candidates_.begin(), candidates_.begin() + options_.top_k, candidates_.end(), better);
    candidates_.resize(k);
  }
  if (cut_k || options_.top_p < 1) std::sort(candidates_.begin(), candidates_.end(), better);
  if (options_.top_p < 1) {
    const double enough = options_.top_p * weigh(best.logit, 1.0f);
    size_t kept = 0;
    for (double sum = 0; kept < candidates_.size() && (kept == 0 || sum < enough); ++kept)
      sum += weights_[kept];
    candidates_.resize(kept);
  }
  if (options_.min_p > 0) {
    const float least = best.logit + std::log(options_.min_p);
    std::erase_if(candidates_, [&](const Candidate& candidate) { return candidate.logit < least; });
  }

  const double target =
      philox_uniform(options_.seed, sequence_, step_++) * weigh(best.logit, options_.temperature);
  double sum = 0;
  for (size_t i = 0; i < candidates_.size(); ++i) {
    sum += weights_[i];
    if (sum > target) return candidates_[i].id;
  }
  return best.id;  // only if every other weight vanished in rounding
}

double Sampler::weigh(float top, float temperature) {
  weights_.resize(candidates_.size());
  double sum = 0;
  for (size_t i = 0; i < candidates_.size(); ++i) {
    sum += weights_[i] = std::exp((candidates_[i].logit - top) / temperature);
  }
  return sum;
}

}  // namespace q4s
