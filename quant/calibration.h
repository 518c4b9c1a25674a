// The token windows that the quantiser looks at: cut from a text, or written by the model itself
// (self_writing.h).
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "models/llama.h"
#include "runtime/backend.h"

namespace q4s {

struct Calibration {
  std::string source;  // "self-written", or the path of the text
  std::string hash;    // checksum of the tokens
  int64_t samples = 0, seq_len = 0;
  uint64_t seed = 0;
  std::vector<int32_t> tokens;  // (samples, seq_len)
};

// Documents of a calibration file. .jsonl: the "text" of every line; else blank lines separate documents
// where there are any, and lines do where there are none. Throws Error(kInput) naming path and line.
std::vector<std::string> read_documents(const std::string& path);

// Tokenises the documents (each with BOS where the model adds one), joins them, cuts windows of seq_len and
// takes the first `samples` of a seeded permutation. Throws Error(kInput) with counts where there are too few
// windows.
Calibration calibration_from_text(const Tokenizer&, const std::string& path, int64_t samples, int64_t seq_len,
                                  uint64_t seed);

void seal(Calibration&);  // sets the hash of its tokens

}  // namespace q4s
