// llama-bench: speed of prompts and of decoding, beside the read speed of the same machine in the same run.
// Takes a file or random weights of a known shape. Computes nothing itself.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>
#include <random>

#include "models/session.h"
#include "runtime/cli.h"
#include "runtime/error.h"
#include "runtime/log.h"
#include "runtime/progress.h"
#include "runtime/sampler.h"

namespace q4s {
namespace {

using Json = nlohmann::ordered_json;

struct Test {
  int64_t prompt, gen, depth, batch;  // one of prompt and gen is 0
  int64_t tokens() const { return batch * (prompt + gen); }
  std::string name() const {
    std::string text = prompt ? strprintf("pp%lld", (long long)prompt) : strprintf("tg%lld", (long long)gen);
    if (batch > 1) text += strprintf(" x%lld", (long long)batch);
    if (depth) text += strprintf(" @ d%lld", (long long)depth);
    return text;
  }
};

struct Measured {
  double rate = 0, sd = 0;  // tokens/s
  double bytes = 0;         // that a decoding step reads; 0: a prompt, limited by arithmetic
  // Decoding: medians over the timed runs of the memory's read speed just before and after, GB/s, and of the
  // speed of a run over that. Other programs share a CPU's memory, so that one sweep at the start says
  // little.
  double read_gb = 0, share = 0;
};

double median(std::vector<double> v) {
  if (v.empty()) return 0;
  std::sort(v.begin(), v.end());
  return (v[(v.size() - 1) / 2] + v[v.size() / 2]) / 2;
}

std::vector<int32_t> random_ids(int64_t n, int64_t vocab) {
  std::mt19937 random(1);
  std::vector<int32_t> ids(size_t(n), 0);
  for (int32_t& id : ids) id = int32_t(random() % uint64_t(vocab));
  return ids;
}

// Sequences hold `depth` tokens and get the test's tokens on top, again and again.
class Bench {
 public:
  Bench(LlamaModel& model, Backend& backend, Session& session)
      : model_(model),
        backend_(backend),
        session_(session),
        ids_(random_ids(session.ctx(), model.config.vocab)) {}

  Measured measure(const Test& t, int64_t repeat) {
    Measured m;
    if (t.gen) {
      const KvCache one{nullptr, default_kv(model_, backend_), model_.config.layers, 1,
                        1,       model_.config.kv_dim()};
      m.bytes = double(model_.weights.read_bytes_per_token()) +
                double(t.batch) * double(one.bytes()) * (double(t.depth) + double(t.gen + 1) / 2);
    }
    for (int s = 0; s < int(t.batch); ++s) {
      session_.truncate(s, t.depth);
      const int64_t have = session_.length(s);
      if (have < t.depth) session_.feed(std::span(ids_).subspan(size_t(have), size_t(t.depth - have)), s);
    }
    run(t);  // warm
    std::vector<double> rates, reads, shares;
    double before = t.gen ? backend_.read_bandwidth() / 1e9 : 0;
    for (int64_t r = 0; r < repeat; ++r) {
      const auto start = std::chrono::steady_clock::now();
      run(t);
      rates.push_back(double(t.tokens()) /
                      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
      if (!t.gen) continue;
      const double after = backend_.read_bandwidth() / 1e9;
      reads.push_back((before + after) / 2);
      shares.push_back(m.bytes * rates.back() / double(t.batch) / 1e9 / reads.back());
      before = after;
    }
    m.read_gb = median(reads), m.share = median(shares);
    for (double rate : rates) m.rate += rate / double(rates.size());
    for (double rate : rates) m.sd += (rate - m.rate) * (rate - m.rate);
    m.sd = rates.size() > 1 ? std::sqrt(m.sd / double(rates.size() - 1)) : 0;
    return m;
  }

 private:
  void run(const Test& t) {
    for (int s = 0; s < int(t.batch); ++s) session_.truncate(s, t.depth);
    if (t.prompt) {
      for (int s = 0; s < int(t.batch); ++s)
        session_.feed(std::span(ids_).subspan(size_t(t.depth), size_t(t.prompt)), s);
      return;
    }
    SamplerOptions greedy;
    greedy.temperature = 0;
    std::vector<Sampler> samplers(size_t(t.batch), Sampler(greedy));
    std::vector<Session::Next> next;
    for (int s = 0; s < int(t.batch); ++s) next.push_back({s, ids_[size_t(t.depth)], &samplers[size_t(s)]});
    session_.decode(next, t.gen, [](int64_t, std::span<const int32_t>) { return true; });
  }

  LlamaModel& model_;
  Backend& backend_;
  Session& session_;
  std::vector<int32_t> ids_;  // (ctx)
};

std::string base_name(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path.substr(path.rfind('/') + 1);
}

int run(int argc, char** argv) {
  Cli cli("llama-bench", "MODEL | --shape NAME [OPTIONS]", "Speed of prompts (pp) and of decoding (tg).");
  cli.positional("MODEL", ".q4s or GGUF file, or Hugging Face folder", false);
  cli.text("shape", "NAME", "",
           "random weights: llama-2-7b, llama-3-8b, llama-2-13b, llama-2-70b, tinyllama");
  cli.choice("weights", {"q4", "f16"}, "of a shape: int4 with an 8-bit head and embedding, or all f16");
  cli.integer("group", 128, 1, 1 << 20, "of a shape: columns that share a scale");
  cli.text("p,n-prompt", "LIST", "512", "prompt lengths; 0: none");
  cli.text("n,n-gen", "LIST", "128", "tokens decoded; 0: none");
  cli.text("d,depth", "LIST", "0", "tokens in the context before");
  cli.text("b,batch", "LIST", "1", "sequences at a time");
  cli.text("t,threads", "LIST", "0", "CPU threads, 0: all usable cores");
  cli.integer("r,repeat", 5, 1, 10000, "timed runs of each test");
  cli.text("device", "auto|cpu|cuda|cuda:N", "auto", "where to run; auto takes a GPU where one is usable");
  cli.cpu_level_option();
  cli.flag("json", "one JSON document on stdout");
  if (!cli.parse(argc, argv)) return 0;
  if (cli.given("shape") == cli.given("MODEL"))
    throw Error(ErrorKind::kUsage, "give either a MODEL or a --shape");

  std::vector<Test> tests;
  int64_t ctx = 0, sequences = 1;
  const auto list = [&](const char* name, int64_t low, int64_t high) {
    return integer_list(name, cli.get(name), low, high);
  };
  for (int64_t batch : list("batch", 1, 4096))
    for (int64_t depth : list("depth", 0, 1 << 30)) {
      for (int64_t n : list("n-prompt", 0, 1 << 30))
        if (n) tests.push_back({n, 0, depth, batch});
      for (int64_t n : list("n-gen", 0, 1 << 30))
        if (n) tests.push_back({0, n, depth, batch});
    }
  if (tests.empty()) throw Error(ErrorKind::kUsage, "no test: both -p and -n are 0");
  for (const Test& t : tests) {
    ctx = std::max(ctx, t.depth + t.prompt + t.gen);
    sequences = std::max(sequences, t.batch);
  }

  const std::vector<int64_t> thread_counts = list("threads", 0, 1024);  // refused before the model is opened

  LlamaModel model;
  if (cli.given("shape")) {
    const bool q4 = cli.get("weights") == "q4";
    model = random_llama(config_of_shape(cli.get("shape")), 1, q4 ? Format::kQ4 : Format::kF16,
                         cli.get_integer("group"), q4 ? Format::kQ8 : Format::kF16);
  } else {
    model = open_llama(cli.get("MODEL"));
  }
  model.config.context = std::max(model.config.context, ctx);  // speed does not ask what lengths were trained
  const std::string name =
      cli.given("shape") ? cli.get("shape") + " " + cli.get("weights") : base_name(model.path);

  Json rows = Json::array();
  if (!cli.on("json"))
    out("| model | size | backend | test | t/s | GB/s | % of read |\n|---|---|---|---|---|---|---|\n");
  for (int64_t threads : thread_counts) {
    std::string note;
    const std::unique_ptr<Backend> backend = make_backend(cli.get("device"), int(threads), &note);
    if (!note.empty()) log_info("%s", note.c_str());
    SessionOptions options{.ctx = ctx,
                           .sequences = int(sequences),
                           .kv = default_kv(model, *backend),
                           .progress = bytes_bar("loading")};
    Session session(model, *backend, options);
    log_info("%s", backend->describe().c_str());
    Bench bench(model, *backend, session);
    for (const Test& t : tests) {
      const Measured m = bench.measure(t, cli.get_integer("repeat"));
      const double gb = m.bytes * m.rate / double(t.batch) / 1e9;
      if (cli.on("json")) {
        const bool reads = m.bytes > 0;
        rows.push_back({{"schema", 1},
                        {"model", name},
                        {"size_bytes", model.weight_bytes()},
                        {"backend", backend->name()},
                        {"device", backend->describe()},
                        {"threads", backend->pool().threads()},
                        {"test", t.name()},
                        {"n_prompt", t.prompt},
                        {"n_gen", t.gen},
                        {"depth", t.depth},
                        {"batch", t.batch},
                        {"tok_per_s", m.rate},
                        {"tok_per_s_sd", m.sd},
                        {"gb_per_s", reads ? Json(gb) : Json()},
                        {"read_gb_per_s", reads ? Json(m.read_gb) : Json()},
                        {"share", reads ? Json(m.share) : Json()}});
        continue;
      }
      const std::string where = backend->name() == "cpu"
                                    ? strprintf("cpu, %d threads", backend->pool().threads())
                                    : backend->name();
      const std::string speed = m.bytes > 0 ? strprintf("%.1f | %.1f", gb, 100 * m.share) : "- | -";
      out(strprintf("| %s | %s | %s | %s | %.2f ± %.2f | %s |\n", name.c_str(),
                    bytes_text(double(model.weight_bytes())).c_str(), where.c_str(), t.name().c_str(), m.rate,
                    m.sd, speed.c_str()));
      out_flush();
    }
  }
  if (cli.on("json")) out(rows.dump(2) + "\n");
  return 0;
}

}  // namespace
}  // namespace q4s

int main(int argc, char** argv) { return q4s::run_tool("llama-bench", argc, argv, q4s::run); }
