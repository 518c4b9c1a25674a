#include "models/generate.h"

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

Generated generate(Session& session, const Tokenizer& tokenizer, Sampler& sampler, std::span<const int32_t> prompt,
                   const GenerateOptions& options, const std::function<void(int32_t, std::string_view)>& on_text,
                   const std::function<bool()>& stop) {
  using Clock = std::chrono::steady_clock;
  const auto since = [](Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); };
  TokenDecoder decoder(tokenizer, true);
  Utf8Stream utf8;
  StopStrings stops(options.stop);
  Generated g;
  const auto emit = [&](int32_t token, const std::string& text) {
    g.text += text;
    on_text(token, text);
  };

  auto start = Clock::now();
  std::span<const float> logits = session.feed(prompt);
  g.prompt_tokens = int64_t(prompt.size());
  g.prompt_seconds = since(start);
  start = Clock::now();
  for (;;) {
    if (stop()) {
      g.reason = StopReason::kInterrupted;
      break;
    }
    if (int64_t(g.tokens.size()) == options.predict) {
      g.reason = StopReason::kLength;
      break;
    }
    const int32_t token = sampler.sample(logits);
    sampler.accept(token);
    if (tokenizer.is_eos(token)) {
      g.reason = StopReason::kEos;
      break;
    }
    g.tokens.push_back(token);
    emit(token, stops.push(utf8.push(decoder.next(token))));
    if (stops.hit()) {
      g.reason = StopReason::kStop;
      break;
    }
    if (session.length() == session.ctx()) {
      g.reason = StopReason::kContext;
      break;
    }
    if (int64_t(g.tokens.size()) == options.predict) continue;
    logits = session.feed({&token, 1});
    ++g.steps;
  }
  g.eval_seconds = since(start);
  const std::string held = stops.push(utf8.flush()) + stops.flush();
  if (!held.empty()) emit(-1, held);
  return g;
}

}  // namespace q4s
