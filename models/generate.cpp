#include "models/generate.h"

#include <algorithm>
#include <chrono>

#include "runtime/stop_strings.h"
#include "runtime/tokenizer.h"
#include "runtime/utf8.h"

namespace q4s {

const char* reason_text(StopReason reason) {
  switch (reason) {
    case StopReason::kEos: return "eos";
    case StopReason::kStop: return "stop";
    case StopReason::kLength: return "length";
    case StopReason::kContext: return "context";
    case StopReason::kInterrupted: return "interrupted";
  }
  return "";
}

Generated generate(Session& session, const Tokenizer& tokenizer, Sampler& sampler,
                   std::span<const int32_t> prompt, const GenerateOptions& options,
                   const std::function<void(int32_t, std::string_view)>& on_text,
                   const std::function<bool()>& stop) {
  using Clock = std::chrono::steady_clock;
  const auto since = [](Clock::time_point t) {
    return std::chrono::duration<double>(Clock::now() - t).count();
  };
  TokenDecoder decoder(tokenizer, true);
  Utf8Stream utf8;
  StopStrings stops(options.stop);
  Generated g;
  const auto emit = [&](int32_t token, const std::string& text) {
    g.text += text;
    on_text(token, text);
  };

  // Shows a drawn token, unless it ends the text; false: enough.
  const auto take = [&](int32_t token) {
    const auto end = [&](StopReason reason) {
      g.reason = reason;
      return false;
    };
    if (stop()) return end(StopReason::kInterrupted);
    if (tokenizer.is_eos(token)) return end(StopReason::kEos);
    g.tokens.push_back(token);
    emit(token, stops.push(utf8.push(decoder.next(token))));
    if (stops.hit()) return end(StopReason::kStop);
    if (int64_t(g.tokens.size()) == options.predict) return end(StopReason::kLength);
    return true;
  };

  auto start = Clock::now();
  const std::span<const float> logits = session.feed(prompt);
  g.prompt_tokens = int64_t(prompt.size());
  g.prompt_seconds = since(start);
  if (options.predict == 0) return g;
  start = Clock::now();
  const int32_t first = sampler.sample(logits);
  sampler.accept(first);
  if (take(first)) {
    g.reason = StopReason::kContext;  // unless something ends the text before
    const Session::Next next{0, first, &sampler};
    int64_t steps = session.ctx() - session.length();
    if (options.predict > 0) steps = std::min(steps, options.predict - 1);
    if (steps)
      session.decode({&next, 1}, steps, [&](int64_t, std::span<const int32_t> drawn) {
        ++g.steps;
        return take(drawn[0]);
      });
  }
  g.eval_seconds = since(start);
  const std::string held = stops.push(utf8.flush()) + stops.flush();
  if (!held.empty()) emit(-1, held);
  return g;
}

}  // namespace q4s
