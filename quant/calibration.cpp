#include "quant/calibration.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>

#include "kernels/philox.h"
#include "runtime/checksum.h"
#include "runtime/error.h"
#include "runtime/mapped_file.h"
#include "runtime/tokenizer.h"

namespace q4s {
namespace {

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

void seal(Calibration& c) {
  c.hash = checksum_text(xxh3(c.tokens.data(), c.tokens.size() * sizeof(int32_t)));
}

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

}  // namespace q4s
