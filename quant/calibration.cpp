#include "quant/calibration.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>

#include "kernels/philox.h"
#include "models/session.h"
#include "runtime/checksum.h"
#include "runtime/error.h"
#include "runtime/mapped_file.h"
#include "runtime/sampler.h"
#include "runtime/tokenizer.h"

namespace q4s {
namespace {

constexpr int64_t kMostTogether = 128;
constexpr int64_t kMostCacheBytes = int64_t(24) << 30;

void seal(Calibration& c) {
  c.hash = checksum_text(xxh3(c.tokens.data(), c.tokens.size() * sizeof(int32_t)));
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    lines.push_back(text.substr(at, end - at));
    if (!lines.back().empty() && lines.back().back() == '\r') lines.back().pop_back();
    at = end + 1;
  }
  return lines;
}

bool blank(const std::string& line) { return line.find_first_not_of(" \t\f\v") == std::string::npos; }

}  // namespace

std::vector<std::string> read_documents(const std::string& path) {
  const MappedFile file(path);
  const std::vector<std::string> lines = lines_of({reinterpret_cast<const char*>(file.data()), file.size()});
  std::vector<std::string> documents;
  if (path.ends_with(".jsonl")) {
    for (size_t i = 0; i < lines.size(); ++i) {
      if (blank(lines[i])) continue;
      const auto json = nlohmann::json::parse(lines[i], nullptr, false);
      if (!json.is_object() || !json.contains("text") || !json["text"].is_string())
        throw Error(ErrorKind::kInput,
                    path + ", line " + std::to_string(i + 1) + ": expected an object with a \"text\"");
      documents.push_back(json["text"].get<std::string>());
    }
    return documents;
  }
  const bool paragraphs = std::any_of(lines.begin(), lines.end(), blank);
  std::string document;
  const auto finish = [&] {
    if (!blank(document)) documents.push_back(document);
    document.clear();
  };
  for (const std::string& line : lines) {
    if (!paragraphs || blank(line)) finish();
    if (blank(line)) continue;
    document += document.empty() ? line : "\n" + line;
  }
  finish();
  return documents;
}

Calibration calibration_from_text(const Tokenizer& tokenizer, const std::string& path, int64_t samples,
                                  int64_t seq_len, uint64_t seed) {
  std::vector<int32_t> ids;
  for (const std::string& text : read_documents(path)) {
    const std::vector<int32_t> more = tokenizer.encode_prompt(text, false);
    ids.insert(ids.end(), more.begin(), more.end());
  }
  const int64_t windows = int64_t(ids.size()) / seq_len;
  if (windows < samples) {
    throw Error(ErrorKind::kInput, path + ": " + std::to_string(ids.size()) + " tokens make " +
                                       std::to_string(windows) + " windows of " + std::to_string(seq_len) +
                                       ", " + std::to_string(samples) +
                                       " are asked for (--samples, --seq-len)");
  }
  std::vector<int64_t> order(windows);
  std::iota(order.begin(), order.end(), 0);
  for (int64_t i = windows - 1; i > 0; --i)
    std::swap(order[i], order[int64_t(philox_uniform(seed, 0, uint64_t(i)) * double(i + 1))]);
  Calibration c{path, "", samples, seq_len, seed, {}};
  for (int64_t s = 0; s < samples; ++s) {
    const auto window = ids.begin() + order[s] * seq_len;
    c.tokens.insert(c.tokens.end(), window, window + seq_len);
  }
  seal(c);
  return c;
}

int64_t self_writing_batch(const LlamaConfig& c, int64_t samples, int64_t seq_len) {
  const int64_t cache = 4 * c.layers * c.kv_dim() * seq_len;  // keys and values of a sequence in fp16
  const int64_t most = std::clamp<int64_t>(kMostCacheBytes / cache, 1, kMostTogether);
  return ceil_div(samples, ceil_div(samples, most));  // batches of one size
}

Calibration calibration_self_written(LlamaModel& model, Backend& backend, int64_t samples, int64_t seq_len,
                                     uint64_t seed, const std::function<void(int64_t, int64_t)>& progress) {
  Calibration c{"self-written", "", samples, seq_len, seed, std::vector<int32_t>(samples * seq_len)};
  const int64_t vocab = model.config.vocab;
  int64_t batch = self_writing_batch(model.config, samples, seq_len);
  const auto options = [&] {
    return SessionOptions{.ctx = seq_len, .sequences = int(batch), .chunk = 1, .kv = KvType::kF16};
  };
  fill_rope(model, seq_len);
  const std::optional<size_t> free = backend.free_bytes();
  while (batch > 1 && free && Session::plan(model, backend, options()).total() > *free) batch = ceil_div(batch, 2);
  Session session(model, backend, options());
  SamplerOptions whole;
  whole.temperature = 1;
  whole.top_k = 0;
  whole.top_p = 1;
  whole.min_p = 0;
  whole.seed = seed;
  int64_t done = 0;
  for (int64_t first = 0; first < samples; first += batch) {
    const int64_t rows = std::min(batch, samples - first);
    std::vector<Sampler> samplers;
    std::vector<std::pair<int, int32_t>> step(rows);
    for (int64_t r = 0; r < rows; ++r) {
      samplers.emplace_back(whole, uint64_t(first + r));
      const int32_t bos = model.tokenizer->bos_id();
      const double random = philox_uniform(seed ^ 1, uint64_t(first + r), 0);
      step[r] = {int(r), bos >= 0 ? bos : int32_t(random * model.tokenizer->vocab_size())};
      session.truncate(int(r), 0);
    }
    const auto keep = [&](int64_t t) {
      for (int64_t r = 0; r < rows; ++r) c.tokens[(first + r) * seq_len + t] = step[r].second;
      progress(done += rows, samples * seq_len);
    };
    keep(0);
    if (backend.name() == "cuda") {  // drawn on the device: only tokens come back
      std::vector<Session::Next> next;
      for (int64_t r = 0; r < rows; ++r) next.push_back({int(r), step[r].second, &samplers[r]});
      session.decode(next, seq_len - 1, [&](int64_t t, std::span<const int32_t> drawn) {
        for (int64_t r = 0; r < rows; ++r) step[r].second = drawn[r];
        keep(t + 1);
        return true;
      });
      continue;
    }
    for (int64_t t = 1; t < seq_len; ++t) {
      const std::span<const float> logits = session.step(step);
      backend.pool().run([&](Part part) {
        const auto [begin, end] = part.of(rows);
        for (int64_t r = begin; r < end; ++r)
          step[r].second = samplers[r].sample(logits.subspan(r * vocab, vocab));
      });
      keep(t);
    }
  }
  seal(c);
  return c;
}

}  // namespace q4s
