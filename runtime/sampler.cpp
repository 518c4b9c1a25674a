// See sampler.h.
#include "runtime/sampler.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>

#include "kernels/philox.h"
#include "runtime/error.h"

namespace q4s {
namespace {

void check_range(const char* option, double value, double low, double high, const char* range) {
  if (value >= low && value <= high) return;  // false for NaN
  throw Error(ErrorKind::kUsage, std::string(option) + " " + std::to_string(value) + ": must be " + range);
}

// In lanes, so that the compiler may vectorise: a single running maximum it has to leave alone.
float highest(std::span<const float> values) {
  constexpr size_t kLanes = 16;
  std::array<float, kLanes> lanes;
  lanes.fill(-INFINITY);
  size_t i = 0;
  for (; i + kLanes <= values.size(); i += kLanes) {
    for (size_t j = 0; j < kLanes; ++j) lanes[j] = values[i + j] > lanes[j] ? values[i + j] : lanes[j];
  }
  for (; i < values.size(); ++i) lanes[0] = std::max(lanes[0], values[i]);
  return *std::max_element(lanes.begin(), lanes.end());
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
  int infinite = 0;  // a sum over all, so that the loop has no branch
  for (float logit : logits) infinite += !(std::abs(logit) <= std::numeric_limits<float>::max());
  if (infinite > 0) {
    const size_t id =
        std::find_if_not(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); }) -
        logits.begin();
    throw Error(ErrorKind::kRuntime, "the model gave a logit of " + std::to_string(logits[id]) +
                                         " for token " + std::to_string(id));
  }
  logits_.assign(logits.begin(), logits.end());
  for (auto [id, count] : counts_) {
    if (id < 0 || static_cast<size_t>(id) >= logits.size()) continue;
    float& logit = logits_[id];
    logit = logit > 0 ? logit / options_.repeat_penalty : logit * options_.repeat_penalty;
    logit -= options_.presence_penalty + options_.frequency_penalty * static_cast<float>(count);
  }
  for (int32_t id : options_.banned) {
    if (id >= 0 && static_cast<size_t>(id) < logits.size()) logits_[id] = -INFINITY;
  }
  const float top = highest(logits_);
  if (top == -INFINITY) throw Error(ErrorKind::kRuntime, "no token is left to sample from");
  const auto likeliest =
      static_cast<int32_t>(std::find(logits_.begin(), logits_.end(), top) - logits_.begin());
  if (options_.temperature == 0) return likeliest;

  candidates_.clear();
  for (size_t id = 0; id < logits_.size(); ++id) {
    if (logits_[id] > -INFINITY) candidates_.push_back({logits_[id], static_cast<int32_t>(id)});
  }
  // Puts the best into order up to `end`; those before `sorted` are in order already.
  size_t sorted = 0;
  auto sort_to = [&](size_t end) {
    std::partial_sort(candidates_.begin() + sorted, candidates_.begin() + end, candidates_.end(),
                      [](const Candidate& a, const Candidate& b) {
                        return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
                      });
    sorted = end;
  };
  if (const auto k = static_cast<size_t>(options_.top_k); k > 0 && k < candidates_.size()) {
    sort_to(k);
    candidates_.resize(k);
  }
  if (options_.top_p < 1) {
    const double enough = options_.top_p * weigh(top, 1.0f);
    size_t kept = 0;
    for (double sum = 0; kept < candidates_.size() && (kept == 0 || sum < enough); ++kept) {
      if (kept == sorted) sort_to(std::min(candidates_.size(), 4 * sorted + 64));
      sum += std::exp(candidates_[kept].logit - top);
    }
    candidates_.resize(kept);
  }
  if (options_.min_p > 0) {
    const float least = top + std::log(options_.min_p);
    std::erase_if(candidates_, [&](const Candidate& candidate) { return candidate.logit < least; });
  }

  const double target = philox_uniform(options_.seed, sequence_, step_++) * weigh(top, options_.temperature);
  double sum = 0;
  for (size_t i = 0; i < candidates_.size(); ++i) {
    sum += weights_[i];
    if (sum > target) return candidates_[i].id;
  }
  return likeliest;  // only if every other weight vanished in rounding
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
