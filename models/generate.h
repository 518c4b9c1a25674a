// Writes text: from prompt ids through the sampler to valid UTF-8, one token at a time, until something ends
// it. The loop that llama-run shows; knows neither streams nor options.
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "models/session.h"
#include "runtime/sampler.h"

namespace q4s {

class Tokenizer;

struct GenerateOptions {
  int64_t predict = -1;           // tokens at most; -1: until something else ends the text
  std::vector<std::string> stop;  // the text ends before the first of these
};

enum class StopReason { kEos, kStop, kLength, kContext, kInterrupted };
const char* reason_text(StopReason);  // "eos", "stop", "length", "context", "interrupted"

struct Generated {
  StopReason reason = StopReason::kLength;
  std::vector<int32_t> tokens;  // without the end token
  std::string text;
  int64_t prompt_tokens = 0, steps = 0;  // fed before, and one at a time after the first draw
  double prompt_seconds = 0, eval_seconds = 0;
};

// Feeds `prompt` (at least one id) behind what the session's sequence 0 holds and goes on from there. The
// sampler must have accepted everything before and in the prompt. on_text(token, text) for each token: the
// text it completes, perhaps empty, valid UTF-8; the last call may carry what was held back, with token -1.
// stop() is asked before each step. Throws as Session::feed.
Generated generate(Session& session, const Tokenizer& tokenizer, Sampler& sampler,
                   std::span<const int32_t> prompt, const GenerateOptions& options,
                   const std::function<void(int32_t, std::string_view)>& on_text,
                   const std::function<bool()>& stop);

}  // namespace q4s
