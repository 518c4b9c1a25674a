// llama-ppl: perplexity of a .q4s file or an unquantised model on a text, and its divergence from a
// reference. Computes nothing itself: options, output.
#include <chrono>
#include <nlohmann/json.hpp>

#include "kernels/linear.h"
#include "models/perplexity.h"
#include "runtime/checksum.h"
#include "runtime/cli.h"
#include "runtime/error.h"
#include "runtime/log.h"
#include "runtime/mapped_file.h"
#include "runtime/progress.h"
#include "runtime/tokenizer.h"

namespace q4s {
namespace {

// The same text must be the same ids for both models, or their distributions are about different things.
void check_same_vocabulary(const LlamaModel& a, const LlamaModel& b, std::string_view text,
                           const PplText& cut) {
  if (a.config.vocab != b.config.vocab)
    throw Error(ErrorKind::kInput,
                strprintf("%s has a vocabulary of %lld, %s one of %lld", a.path.c_str(),
                          (long long)a.config.vocab, b.path.c_str(), (long long)b.config.vocab));
  if (b.tokenizer->encode_prompt(text, false) != cut.tokens ||
      b.tokenizer->add_bos() != a.tokenizer->add_bos())
    throw Error(ErrorKind::kInput, a.path + " and " + b.path + " tokenise the text differently");
}

int run(int argc, char** argv) {
  Cli cli("llama-ppl", "MODEL TEXT [OPTIONS]", "Perplexity of a model on a text file.");
  cli.positional("MODEL", ".q4s or GGUF file, or Hugging Face folder");
  cli.positional("TEXT", "text file");
  cli.choice("protocol", {"gptq", "llamacpp"},
             "gptq: windows of 2048, all targets scored; llamacpp: windows of 512, second half scored");
  cli.integer("c,ctx-size", 0, 0, 1 << 30,
              "tokens of a window; 0: the protocol's, or the model's context if smaller");
  cli.integer("chunks", 0, 0, 1 << 30, "windows at most; 0: all");
  cli.text("kl-ref", "MODEL", "", "also KL divergence and top-1 agreement against this model");
  cli.flag("int8",
           "on a CPU: activations in int8, as llama-run has them; not the perplexity that a GPU gives");
  cli.flag("json", "one JSON document on stdout");
  cli.device_options();
  if (!cli.parse(argc, argv)) return 0;

  // A file has one perplexity, whatever the device: llama-run's faster CPU products are no part of it.
  set_exact_activations(!cli.on("int8"));

  const auto start = std::chrono::steady_clock::now();
  LlamaModel model = open_llama(cli.get("MODEL"));
  const MappedFile file(cli.get("TEXT"));
  const std::string_view text(reinterpret_cast<const char*>(file.data()), file.size());
  PplOptions options;
  options.protocol = cli.get("protocol") == "gptq" ? PplProtocol::kGptq : PplProtocol::kLlamaCpp;
  options.ctx = cli.get_integer("ctx-size");
  options.chunks = cli.get_integer("chunks");
  const PplText cut = cut_text(text, *model.tokenizer, model.config.context, options);
  std::unique_ptr<LlamaModel> ref_model;
  if (cli.given("kl-ref")) {
    ref_model = std::make_unique<LlamaModel>(open_llama(cli.get("kl-ref")));
    check_same_vocabulary(model, *ref_model, text, cut);
    if (ref_model->config.context < cut.ctx)
      throw Error(ErrorKind::kUsage, strprintf("windows of %lld tokens: the reference's context is %lld",
                                               (long long)cut.ctx, (long long)ref_model->config.context));
  }

  std::string note;
  const std::unique_ptr<Backend> backend =
      make_backend(cli.get("device"), int(cli.get_integer("threads")), &note);
  if (!note.empty()) log_info("%s", note.c_str());
  log_info("%s, %s", model.path.c_str(), backend->describe().c_str());
  const auto session_of = [&](LlamaModel& m) {
    return std::make_unique<Session>(
        m, *backend,
        SessionOptions{.ctx = cut.ctx, .kv = default_kv(m, *backend), .progress = bytes_bar("loading")});
  };
  const std::unique_ptr<Session> session = session_of(model);
  const std::unique_ptr<Session> reference = ref_model ? session_of(*ref_model) : nullptr;

  const bool json = cli.on("json");
  std::unique_ptr<Progress> progress =
      json ? std::make_unique<Progress>("windows", cut.chunks, "windows") : nullptr;
  const PplResult r = perplexity(cut, *session, reference.get(), [&](int64_t done, double ppl) {
    if (json) return progress->update(done, strprintf("PPL %.4f", ppl));
    out(strprintf("%s[%lld]%.4f", done > 1 ? "," : "", (long long)done, ppl));
    out_flush();
  });
  progress.reset();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();

  if (json) {
    nlohmann::ordered_json j = {{"schema", 1},
                                {"ppl", r.ppl},
                                {"ppl_stderr", r.ppl_stderr},
                                {"protocol", cli.get("protocol")},
                                {"n_ctx", cut.ctx},
                                {"chunks", r.chunks},
                                {"tokens", cut.tokens.size()},
                                {"bos", cut.bos},
                                {"text_xxh3", checksum_text(cut.hash)},
                                {"seconds", seconds}};
    if (reference)
      j.update({{"ref_ppl", r.ref_ppl},
                {"kl_mean", r.kl_mean},
                {"kl_stderr", r.kl_stderr},
                {"kl_p99", r.kl_p99},
                {"kl_max", r.kl_max},
                {"top1", r.top1}});
    out(j.dump(2) + "\n");
    return 0;
  }
  out(strprintf("\nFinal estimate: PPL = %.4f +/- %.4f\n", r.ppl, r.ppl_stderr));
  if (reference) {
    out(strprintf("Reference: PPL = %.4f, PPL ratio = %.5f\n", r.ref_ppl, r.ppl / r.ref_ppl));
    out(strprintf("KL divergence: mean = %.6f +/- %.6f, 99 %% = %.4f, max = %.4f\n", r.kl_mean, r.kl_stderr,
                  r.kl_p99, r.kl_max));
    out(strprintf("Same top token: %.2f %%\n", 100 * r.top1));
  }
  out(strprintf("protocol %s, n_ctx %lld, %lld chunks, %lld scored of %zu tokens, BOS %s, text xxh3 %s, %s\n",
                cli.get("protocol").c_str(), (long long)cut.ctx, (long long)r.chunks, (long long)r.scored,
                cut.tokens.size(), cut.bos.c_str(), checksum_text(cut.hash).c_str(),
                duration_text(seconds).c_str()));
  return 0;
}

}  // namespace
}  // namespace q4s

int main(int argc, char** argv) { return q4s::run_tool("llama-ppl", argc, argv, q4s::run); }
