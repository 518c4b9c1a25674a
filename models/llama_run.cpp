// llama-run: writes text with a .q4s file or an unquantised model, from a raw prompt or in a chat. Computes
// nothing itself: options, prompts, output.
#include <unistd.h>

#include <chrono>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <random>

#include "models/generate.h"
#include "runtime/chat_template.h"
#include "runtime/cli.h"
#include "runtime/error.h"
#include "runtime/log.h"
#include "runtime/mapped_file.h"
#include "runtime/progress.h"
#include "runtime/stop_strings.h"
#include "runtime/tokenizer.h"
#include "runtime/utf8.h"

namespace q4s {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); }

void declare(Cli& cli) {
  cli.positional("MODEL", ".q4s or GGUF file, or Hugging Face folder");
  cli.text("p,prompt", "TEXT", "", "prompt as it is: no template, special tokens in it are parsed");
  cli.text("f,file", "FILE", "",
           "prompt from a file, as plain text; without -p and -f it is read from stdin");
  cli.flag("chat", "talk: the model's chat template, with history; answers once with -p or -f");
  cli.text("system", "TEXT", "", "system message of the chat");
  cli.integer("n,predict", -1, -1, INT32_MAX, "tokens to write; -1: until the end token or a full context");
  cli.integer("c,ctx-size", 4096, 0, INT32_MAX,
              "context, by default no more than the model's; 0: the model's");
  cli.integer("s,seed", -1, -1, INT64_MAX, "seed of the sampler; -1: random");
  cli.real("temp", 0.8, 0, 100, "temperature; 0: greedy");
  cli.integer("top-k", 40, 0, INT32_MAX, "only the k likeliest tokens; 0: all");
  cli.real("top-p", 0.95, 0, 1, "only the likeliest tokens that together reach p; 1: all");
  cli.real("min-p", 0.05, 0, 1, "only tokens at least so likely, relative to the likeliest; 0: all");
  cli.real("repeat-penalty", 1, 0.01, 100, "weakens tokens among the last ones; 1: off");
  cli.integer("repeat-last-n", 64, -1, INT32_MAX, "how many last tokens the penalties look at; -1: all");
  cli.real("presence-penalty", 0, -100, 100, "taken off the logit of a token among the last ones");
  cli.real("frequency-penalty", 0, -100, 100, "the same, times its count");
  cli.list("stop", "STR", "end the text before this string; may be repeated");
  cli.flag("ignore-eos", "never choose an end token");
  cli.flag("no-display-prompt", "print only what is written, not the prompt before it");
  cli.flag("tokens", "show the ids of prompt and text on stderr");
  cli.flag("json", "one JSON object a token on stdout, and one at the end");
  cli.device_options();
}

SamplerOptions sampler_options(const Cli& cli, const Tokenizer& tokenizer) {
  SamplerOptions o;
  o.temperature = float(cli.get_real("temp"));
  o.top_k = int(cli.get_integer("top-k"));
  o.top_p = float(cli.get_real("top-p"));
  o.min_p = float(cli.get_real("min-p"));
  o.repeat_penalty = float(cli.get_real("repeat-penalty"));
  o.repeat_last_n = int(cli.get_integer("repeat-last-n"));
  o.presence_penalty = float(cli.get_real("presence-penalty"));
  o.frequency_penalty = float(cli.get_real("frequency-penalty"));
  if (cli.on("ignore-eos")) o.banned = tokenizer.eos_ids();
  const int64_t seed = cli.get_integer("seed");
  o.seed = seed >= 0 ? uint64_t(seed) : std::random_device()();
  return o;
}

std::string ids_text(std::span<const int32_t> ids) {
  std::string text;
  for (int32_t id : ids) text += strprintf(" %d", id);
  return text;
}

// One conversation or one text with a model: the session, what it holds, and how replies are shown.
class Writer {
 public:
  Writer(const Cli& cli, LlamaModel& model, Backend& backend, Session& session, double load_seconds)
      : cli_(cli),
        tokenizer_(*model.tokenizer),
        backend_(backend),
        session_(session),
        load_seconds_(load_seconds),
        options_{cli.get_integer("predict"), cli.get_list("stop")},
        sampling_(sampler_options(cli, tokenizer_)),
        sampler_(sampling_),
        weight_bytes_(model.weights.read_bytes_per_token()) {
    log_info("seed %llu, context %lld", (unsigned long long)sampling_.seed, (long long)session.ctx());
  }

  // Brings the session to `ids` and writes on from there. What it holds already of them is kept.
  Generated write(const std::vector<int32_t>& ids) {
    if (int64_t(ids.size()) > session_.ctx())
      throw Error(ErrorKind::kUsage, strprintf("the prompt has %zu tokens, the context holds %lld",
                                               ids.size(), (long long)session_.ctx()));
    // The last id is always fed anew: its logits are needed.
    size_t same = 0;
    while (same + 1 < ids.size() && same < held_.size() && held_[same] == ids[same]) ++same;
    session_.truncate(0, int64_t(same));
    for (size_t i = accepted_; i < ids.size(); ++i) sampler_.accept(ids[i]);
    if (cli_.on("tokens")) log_info("prompt tokens:%s", ids_text(ids).c_str());

    const Graceful graceful;
    Generated g = generate(
        session_, tokenizer_, sampler_, std::span(ids).subspan(same), options_,
        [&](int32_t token, std::string_view text) { show(token, text); },
        [] { return stop_requested() != 0; });
    held_ = ids;
    held_.insert(held_.end(), g.tokens.begin(), g.tokens.end());
    held_.resize(size_t(session_.length()));  // the last token written was not fed
    accepted_ = ids.size() + g.tokens.size();
    finish(g);
    return g;
  }

 private:
  void show(int32_t token, std::string_view text) {
    if (!cli_.on("json")) {
      out(text);
      return out_flush();
    }
    if (token >= 0) {
      flush_json();
      pending_ = {{"token", token}, {"text", text}};
    } else if (!pending_.is_null()) {  // held back: belongs to the last token
      pending_["text"] = pending_["text"].get<std::string>() + std::string(text);
    }
  }
  void flush_json() {
    if (pending_.is_null()) return;
    out(pending_.dump() + "\n");
    out_flush();
    pending_ = nullptr;
  }

  void finish(const Generated& g) {
    const double kv_bytes = double(session_.memory().kv) / double(session_.ctx());
    const double bytes = double(weight_bytes_) + kv_bytes * (double(session_.length()) - double(g.steps) / 2);
    const double rate = g.steps ? double(g.steps) / g.eval_seconds : 0, gb = bytes * rate / 1e9;
    const bool wanted = cli_.on("json") || log_level() != LogLevel::kQuiet;
    if (wanted && g.steps && read_gb_ == 0) read_gb_ = backend_.read_bandwidth() / 1e9;
    const double read_gb = wanted && g.steps ? read_gb_ : 0;
    if (cli_.on("json")) {
      flush_json();
      Json timings = {{"load_s", load_seconds_},
                      {"prompt_s", g.prompt_seconds},
                      {"prompt_tok_per_s", double(g.prompt_tokens) / g.prompt_seconds},
                      {"eval_s", g.eval_seconds},
                      {"eval_tokens", g.steps},
                      {"eval_tok_per_s", rate},
                      {"gb_per_s", gb},
                      {"read_gb_per_s", read_gb},
                      {"share", read_gb > 0 ? gb / read_gb : 0}};
      out(Json{{"done", true},
               {"schema", 1},
               {"reason", reason_text(g.reason)},
               {"prompt_tokens", g.prompt_tokens},
               {"tokens", g.tokens.size()},
               {"seed", sampling_.seed},
               {"timings", timings}}
              .dump() +
          "\n");
    } else {
      out("\n");
    }
    out_flush();
    if (cli_.on("tokens")) log_info("tokens:%s", ids_text(g.tokens).c_str());
    log_info("load    %s", duration_text(load_seconds_).c_str());
    log_info("prompt  %lld tokens, %s, %.2f ms/token, %.1f tokens/s", (long long)g.prompt_tokens,
             duration_text(g.prompt_seconds).c_str(), 1e3 * g.prompt_seconds / double(g.prompt_tokens),
             double(g.prompt_tokens) / g.prompt_seconds);
    if (g.steps)
      log_info(
          "eval    %lld tokens, %s, %.2f ms/token, %.1f tokens/s, %.1f GB/s = %.0f %% of the read speed "
          "(%.1f)",
          (long long)g.steps, duration_text(g.eval_seconds).c_str(), 1e3 / rate, rate, gb, 100 * gb / read_gb,
          read_gb);
    log_info("ended   %s", reason_text(g.reason));
    load_seconds_ = 0;
  }

  const Cli& cli_;
  const Tokenizer& tokenizer_;
  Backend& backend_;
  Session& session_;
  double load_seconds_;
  double read_gb_ = 0;  // GB/s of the memory, once measured
  GenerateOptions options_;
  SamplerOptions sampling_;
  Sampler sampler_;
  int64_t weight_bytes_;
  std::vector<int32_t> held_;  // ids in the session
  size_t accepted_ = 0;        // ids that the sampler knows
  Json pending_;               // the token not yet printed
};

std::string read_all_of_stdin() {
  const std::string text((std::istreambuf_iterator<char>(std::cin)), {});
  if (std::cin.bad()) throw Error(ErrorKind::kRuntime, "cannot read standard input");
  return text;
}

std::string read_file(const std::string& path) {
  const MappedFile file(path);
  return {reinterpret_cast<const char*>(file.data()), file.size()};
}

int chat(const Cli& cli, const ChatTemplate& format, Writer& writer, const std::string* once) {
  std::vector<ChatMessage> messages;
  if (cli.given("system")) messages.push_back({"system", cli.get("system")});
  const bool prompt_shown = !once && isatty(STDIN_FILENO) && log_level() != LogLevel::kQuiet;
  for (;;) {
    std::string line;
    if (once) {
      line = *once;
    } else {
      if (prompt_shown) std::cerr << "> " << std::flush;
      if (!std::getline(std::cin, line)) return 0;
      if (line.empty()) continue;
    }
    messages.push_back({"user", line});
    const Generated reply = writer.write(format.encode(messages));
    if (reply.reason == StopReason::kInterrupted) return stop_requested();
    if (once) return 0;
    messages.push_back({"assistant", reply.text});
  }
}

int run(int argc, char** argv) {
  Cli cli("llama-run", "MODEL [-p PROMPT | -f FILE] [OPTIONS]", "Writes text with a LLaMA model.");
  declare(cli);
  if (!cli.parse(argc, argv)) return 0;
  const bool chatting = cli.on("chat");
  if (cli.given("prompt") && cli.given("file"))
    throw Error(ErrorKind::kUsage, "-p and -f exclude each other");
  if (cli.given("system") && !chatting) throw Error(ErrorKind::kUsage, "--system needs --chat");
  StopStrings(cli.get_list("stop"));  // refuses an empty one before any work

  const auto start = Clock::now();
  LlamaModel model = open_llama(cli.get("MODEL"));
  const Tokenizer& tokenizer = *model.tokenizer;
  std::unique_ptr<ChatTemplate> format;
  if (chatting) {
    format = std::make_unique<ChatTemplate>(tokenizer);
    log_info("chat template %s", format->name());
  }

  // -p is ours to trust; a file, a pipe and what a user types in a chat are text.
  std::string text;
  const bool from_prompt = cli.given("prompt"), one_shot = from_prompt || cli.given("file");
  if (from_prompt) {
    text = cli.get("prompt");
  } else if (cli.given("file")) {
    text = read_file(cli.get("file"));
  } else if (!chatting) {
    if (isatty(STDIN_FILENO)) throw Error(ErrorKind::kUsage, "no prompt: give -p, -f, --chat or a pipe");
    text = read_all_of_stdin();
  }
  std::vector<int32_t> ids;
  if (!chatting) {
    ids = tokenizer.encode_prompt(text, from_prompt);
    if (ids.empty() && tokenizer.bos_id() >= 0) ids = {tokenizer.bos_id()};
    if (ids.empty())
      throw Error(ErrorKind::kUsage, "the prompt is empty and the model has no BOS token to begin with");
  }

  SessionOptions options;
  options.ctx = cli.get_integer("ctx-size");
  if (options.ctx == 0) options.ctx = model.config.context;
  if (!cli.given("ctx-size")) options.ctx = std::min(options.ctx, model.config.context);
  if (int64_t(ids.size()) > options.ctx)  // before the weights are loaded
    throw Error(ErrorKind::kUsage, strprintf("the prompt has %zu tokens, the context holds %lld", ids.size(),
                                             (long long)options.ctx));
  std::string note;
  const std::unique_ptr<Backend> backend =
      make_backend(cli.get("device"), int(cli.get_integer("threads")), &note);
  if (!note.empty()) log_info("%s", note.c_str());
  log_info("%s, %s", model.path.c_str(), backend->describe().c_str());
  options.kv = default_kv(model, *backend);
  options.progress = bytes_bar("loading");
  Session session(model, *backend, options);
  const MemoryPlan& memory = session.memory();
  log_info("memory: weights %s%s, KV cache %s, activations %s",
           bytes_text(double(model.weight_bytes())).c_str(), memory.weights ? "" : " mapped",
           bytes_text(double(memory.kv)).c_str(), bytes_text(double(memory.arena + memory.scratch)).c_str());
  Writer writer(cli, model, *backend, session, seconds_since(start));

  if (chatting) return chat(cli, *format, writer, one_shot ? &text : nullptr);
  if (!cli.on("json") && !cli.on("no-display-prompt")) {
    Utf8Stream utf8;
    out(utf8.push(text) + utf8.flush());
    out_flush();
  }
  return writer.write(ids).reason == StopReason::kInterrupted ? stop_requested() : 0;
}

}  // namespace
}  // namespace q4s

int main(int argc, char** argv) { return q4s::run_tool("llama-run", argc, argv, q4s::run); }
