// llama-quant: from a model to one .q4s file, and what such a file holds. Options, stages and output; the
// work is done in quantize.h.
#include <algorithm>
#include <chrono>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "quant/allocate.h"
#include "quant/background.h"
#include "quant/compare.h"
#include "quant/plan.h"
#include "quant/provenance.h"
#include "quant/quant_options.h"
#include "quant/quantize.h"
#include "quant/self_writing.h"
#include "runtime/atomic_file.h"
#include "runtime/cli.h"
#include "runtime/error.h"
#include "runtime/log.h"
#include "runtime/mapped_file.h"
#include "runtime/progress.h"
#include "runtime/q4s_file.h"
#include "runtime/q4s_writer.h"
#include "runtime/tokenizer.h"

namespace q4s {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

constexpr int64_t kMostHeldAfterWriting = int64_t(8) << 30;

struct Stopped {};  // a signal asked for an end; what is finished is in the journal
void stop_if_requested() {
  if (stop_requested()) throw Stopped{};
}

// Adds a tensor unless an earlier run has.
void add(Q4sWriter& w, const std::string& name, const WeightView& view) {
  if (!w.find_kept(name)) w.add_tensor(name, view);
}
void add(Q4sWriter& w, const std::string& name, int64_t n, int64_t k, const std::vector<float>& values) {
  add(w, name,
      {.format = Format::kF32, .n = n, .k = k, .data = reinterpret_cast<const uint8_t*>(values.data())});
}

struct FinishedBlock {
  int64_t index;
  BlockNorms norms;
  PackedWeight units[4];
  BlockReport report;
};

void write(Q4sWriter& w, const FinishedBlock& b) {
  const std::string name = "blk." + std::to_string(b.index);
  const auto unit = [&](Unit u) { add(w, unit_name(b.index, u), b.units[int(u)].view); };
  add(w, name + ".attn_norm", 1, int64_t(b.norms.attn.size()), b.norms.attn);
  unit(Unit::kQkv);
  unit(Unit::kO);
  add(w, name + ".mlp_norm", 1, int64_t(b.norms.mlp.size()), b.norms.mlp);
  unit(Unit::kGateUp);
  unit(Unit::kDown);
  w.checkpoint(to_json(b.report));
}

// --observe and --bpw: a pass over the model that tries finer formats, and the choice, by tensor name.
Json choose_formats(const Cli& cli, LlamaModel& model, Backend& backend, const QuantizedFrame& frame,
                    const Calibration& calibration, const QuantizeOptions& options) {
  const int64_t units = 4 * model.config.layers;
  std::vector<UnitChoices> choices;
  {
    Progress bar("trying finer formats", units, "linears");
    choices = try_formats(model, backend, frame, calibration, options, [&](int64_t done, int64_t) {
      stop_if_requested();
      bar.update(done);
    });
  }
  if (cli.given("observe")) {
    choose_worst(choices, cli.get_integer("observe"));
  } else {
    Progress bar("measuring effects", units, "linears");
    measure_effects(model, backend, calibration, choices, options.couple && options.corrects(),
                    [&](int64_t done, int64_t) {
                      stop_if_requested();
                      bar.update(done);
                    });
    choose_by_budget(choices, model.config, cli.get_real("bpw"));
  }
  Json formats = Json::object(), effects = Json::object();
  for (const UnitChoices& c : choices) {
    if (c.alone > 0) effects[unit_name(c.block, c.unit)] = {{"kl_alone", c.alone}, {"effect", c.effect}};
    if (c.chosen == 0) continue;
    const Format4& f = c.candidates[c.chosen].format;
    formats[unit_name(c.block, c.unit)] = f.grid == GridKind::kInt8 ? "q8" : "g" + std::to_string(f.group);
  }
  return {{"formats", formats}, {"effects", effects}};
}

// --compare-grids: the table on stdout, everything behind it into --report.
int compare(const Cli& cli) {
  QuantizeOptions options = parse_options(cli);
  if (options.solve.grid == GridKind::kAsym || options.solve.rtn)
    throw Error(ErrorKind::kUsage,
                "--compare-grids compares the default grid with the seed's: no --grid asym, no --rtn");
  if (!cli.given("head")) options.head = Format::kF16;  // what is compared are the blocks
  if (!cli.given("eval"))
    throw Error(ErrorKind::kUsage, "--compare-grids needs --eval TEXT to measure the output on");
  if (cli.given("report")) check_output(cli.get("report"), true, {});
  LlamaModel model = open_llama(cli.get("MODEL"));
  if (model.kind == "q4s")
    throw Error(ErrorKind::kInput, model.path + ": is quantised already; give the model it came from");
  const MappedFile file(cli.get("eval"));
  PplOptions how;
  how.protocol = PplProtocol::kLlamaCpp;
  how.ctx = std::min<int64_t>(512, model.config.context);
  how.chunks = cli.get_integer("chunks");
  const PplText text = cut_text({reinterpret_cast<const char*>(file.data()), file.size()}, *model.tokenizer,
                                model.config.context, how);
  const int64_t samples = cli.get_integer("samples"),
                seq_len = std::min(cli.get_integer("seq-len"), model.config.context);
  Calibration calibration;
  if (cli.given("calib"))
    calibration = calibration_from_text(*model.tokenizer, cli.get("calib"), samples, seq_len, options.seed);
  std::string note;
  const std::unique_ptr<Backend> backend =
      make_backend(cli.get("device"), int(cli.get_integer("threads")), &note);
  if (!note.empty()) log_info("%s", note.c_str());
  std::unique_ptr<Progress> bar;
  std::string showing;
  const auto progress = [&](const std::string& what, int64_t done, int64_t total) {
    stop_if_requested();
    if (what != showing) {
      bar.reset();
      bar = std::make_unique<Progress>(showing = what, total, "steps");
    }
    bar->update(done);
  };
  if (!cli.given("calib"))
    calibration =
        calibration_self_written(model, *backend, samples, seq_len, options.seed,
                                 [&](int64_t d, int64_t t) { progress("writing calibration text", d, t); });
  std::vector<VersionResult> all;
  out(table_head());
  compare_grids(
      model, *backend, calibration, text, options, cli.given("observe") ? cli.get_integer("observe") : 40,
      [&](const VersionResult& v) {
        out(table_row(v));
        out_flush();
        all.push_back(v);
      },
      progress);
  if (cli.given("report")) {
    AtomicFile f(cli.get("report"), true, {});
    f.write(to_json(all));
    f.commit();
  }
  return 0;
}

int inspect(const Cli& cli) {
  const Q4sFile file = Q4sFile::open(cli.get("MODEL"));
  if (cli.on("show")) out(file.show());
  if (cli.on("verify")) {
    file.verify();
    out(file.path() + ": all checksums hold\n");
  }
  return 0;
}

// What can be refused before any work: a pattern that meets no linear, a budget below the coarsest choice.
void check_choices(const Cli& cli, const LlamaConfig& c, const QuantizeOptions& options) {
  std::vector<std::string> names;
  for (int64_t block = 0; block < c.layers; ++block)
    for (const Unit u : kUnits) names.push_back(unit_name(block, u));
  const auto require = [&](const std::string& option, const std::string& text, const std::regex& pattern) {
    for (const std::string& name : names)
      if (std::regex_search(name, pattern)) return;
    throw Error(ErrorKind::kUsage, option + ": \"" + text + "\" meets no linear; they are named " +
                                       names.front() + " to " + names.back());
  };
  if (options.only) require("--only", cli.get("only"), *options.only);
  for (size_t i = 0; i < options.special.size(); ++i)
    require("--tensor", cli.get_list("tensor")[i], options.special[i].first);
  if (!cli.given("bpw") || options.only) return;
  if (const double least = planned_bits(c, options); cli.get_real("bpw") < least)
    throw Error(ErrorKind::kUsage, strprintf("--bpw %.3f: the coarsest choice takes %.3f bits a weight",
                                             cli.get_real("bpw"), least));
}

int quantize(const Cli& cli) {
  const auto start = Clock::now();
  Report report;
  auto lap = [&report, last = start](const char* stage) mutable {
    const auto now = Clock::now();
    report.stages.emplace_back(stage, std::chrono::duration<double>(now - last).count());
    last = now;
  };
  const std::string source = cli.get("MODEL"), target = cli.get("OUT");
  QuantizeOptions options = parse_options(cli);
  if (options.solve.grid == GridKind::kAsym)
    throw Error(ErrorKind::kUsage, "--grid asym: a .q4s file has no zero points; see --compare-grids");
  const bool self_written = !cli.given("calib");
  const int64_t samples = options.solve.rtn ? 0 : cli.get_integer("samples");

  LlamaModel model = open_llama(source);
  if (model.kind == "q4s")
    throw Error(ErrorKind::kInput, source + ": is quantised already; give the model it came from");
  const LlamaConfig& c = model.config;
  const int64_t seq_len = std::min(cli.get_integer("seq-len"), c.context);
  const int64_t widest = std::max({c.dim, c.q_dim(), c.hidden});
  Calibration calibration;
  if (samples && !self_written)
    calibration = calibration_from_text(*model.tokenizer, cli.get("calib"), samples, seq_len, options.seed);
  check_choices(cli, c, options);
  std::vector<std::string> inputs = {source};
  if (!self_written) inputs.push_back(cli.get("calib"));
  if (!cli.on("dry-run")) {
    if (target.empty()) throw Error(ErrorKind::kUsage, "OUT is missing (or --dry-run, --show, --verify)");
    check_output(target, cli.on("force") || cli.on("resume"), inputs);
    if (cli.given("report")) check_output(cli.get("report"), true, inputs);
  }
  show_plan(model, options, samples, seq_len, self_written);
  if (samples && samples * seq_len < 8 * widest)
    log_warn("%lld calibration tokens are few for inputs of width %lld: at least %lld are better",
             (long long)(samples * seq_len), (long long)widest, (long long)(8 * widest));
  if (cli.on("dry-run")) return 0;

  Graceful graceful;
  std::string note;
  const std::unique_ptr<Backend> backend =
      make_backend(cli.get("device"), int(cli.get_integer("threads")), &note);
  if (!note.empty()) log_info("%s", note.c_str());
  const Team team = [&](const std::function<void(Part)>& fn) { backend->pool().run(fn); };
  // The memory that writing its own text took (keys and values of many sequences) is there for the blocks
  // too.
  if (self_written && samples && backend->free_bytes()) {
    QuantizeOptions roomy = options;
    roomy.most_held = kMostHeldAfterWriting;
    if (plan_quantize(c, roomy, samples, seq_len, true).total() < int64_t(*backend->free_bytes()))
      options = roomy;
  }
  require_memory(model, *backend, options, samples, seq_len);

  check_weights(model, team, stop_if_requested);
  const Json sources = source_json(source, backend->pool());
  const Json chosen = Json::parse(options_json(cli, options));
  Json key = {{"version", Q4S_VERSION},
              {"source", sources},
              {"options", chosen},
              {"samples", samples},
              {"seq_len", seq_len}};
  key["calibration"] = !samples ? "none" : self_written ? "self-written" : calibration.hash;
  lap("reading");

  Q4sWriter writer(
      target, {.force = cli.on("force"), .resume = cli.on("resume"), .key = key.dump(), .inputs = inputs});
  if (samples && self_written) {
    if (!writer.notes().empty()) {
      const Json kept = Json::parse(writer.notes()[0]);
      calibration = {"self-written", kept["xxh3"], samples,
                     seq_len,        options.seed, kept["ids"].get<std::vector<int32_t>>()};
    } else {
      Progress bar("writing calibration text", samples * seq_len, "tokens");
      calibration = calibration_self_written(model, *backend, samples, seq_len, options.seed,
                                             [&](int64_t done, int64_t) {
                                               stop_if_requested();
                                               report.peak.note(*backend);
                                               bar.update(done);
                                             });
      unload(model);
    }
  }
  lap("calibration");

  const QuantizedFrame frame = quantize_frame(model, options, team);
  // Formats chosen by measurement count before those of --tensor.
  Json choice = {{"formats", Json::object()}, {"effects", Json::object()}};
  if (!writer.notes().empty())
    choice = Json::parse(writer.notes()[0])["choice"];
  else if (cli.given("observe") || cli.given("bpw"))
    choice = choose_formats(cli, model, *backend, frame, calibration, options);
  unload(model);
  std::vector<std::pair<std::regex, Format4>> chosen_formats;
  for (const auto& [name, format] : choice["formats"].items())
    chosen_formats.emplace_back(exact_pattern(name), parse_format("bpw", format, options.solve.grid));
  options.special.insert(options.special.begin(), chosen_formats.begin(), chosen_formats.end());
  lap("formats");
  Background writing;  // of what is finished while the next block is under way
  writing.submit([&] {
    add(writer, "embed", frame.embed.view);
    if (!c.tied) add(writer, "head", frame.head.view);
    add(writer, "final_norm", 1, c.dim, frame.final_norm);
    if (frame.config.rotated) {
      add(writer, "rotation.signs", 1, c.dim, frame.rotation.signs);
      add(writer, "rotation.factor", frame.rotation.m, frame.rotation.m, frame.rotation.factor);
    }
    if (!writer.notes().empty()) return;
    Json first = samples ? calibration_json(calibration) : Json::object();
    if (samples && self_written) first["ids"] = calibration.tokens;
    first["choice"] = choice;
    writer.checkpoint(first.dump());
  });
  lap("embedding");

  for (size_t i = 1; i < writer.notes().size(); ++i) report.blocks.push_back(block_report(writer.notes()[i]));
  const int64_t kept_blocks = int64_t(report.blocks.size());
  Progress bar("quantising", 4 * c.layers, "linears");
  bar.skip(4 * kept_blocks);
  if (kept_blocks) log_info("going on after block %lld", (long long)kept_blocks - 1);
  auto block = std::make_shared<FinishedBlock>();
  QuantizeSink sink;
  sink.kept = [&](int64_t block, Unit u) -> std::optional<WeightView> {
    const Q4sTensor* t = block < kept_blocks ? writer.find_kept(unit_name(block, u)) : nullptr;
    return t ? std::optional(t->view) : std::nullopt;
  };
  sink.unit = [&](int64_t, Unit u, UnitResult& r) {
    report.peak.note(*backend);
    block->units[int(u)] = std::move(r.packed);
  };
  sink.block_done = [&](int64_t index, const BlockNorms& norms, const BlockReport& b) {
    block->index = index, block->norms = norms, block->report = b;
    writing.submit(
        [&writer, done = std::exchange(block, std::make_shared<FinishedBlock>())] { write(writer, *done); });
    report.blocks.push_back(b);
  };
  sink.stage = [&](const std::string& stage, double seconds) {
    if (seconds > 0) report.stages.emplace_back(stage, seconds);
  };
  sink.progress = [&](int64_t done, int64_t) {
    stop_if_requested();
    bar.update(done);
  };
  quantize_blocks(model, *backend, frame, samples ? &calibration : nullptr, options, sink);
  writing.finish();
  lap("blocks");

  const std::string tokenizer = model.tokenizer->serialize();
  writer.add_blob("tokenizer", {reinterpret_cast<const uint8_t*>(tokenizer.data()), tokenizer.size()});
  writer.set_config(config_to_json(frame.config));
  report.options = chosen.dump();
  report.effects = choice["effects"].dump();
  report.calibration = samples ? calibration_json(calibration).dump() : "{}";
  report.bits_per_weight = planned_bits(c, options);
  writer.set_provenance(Json{{"tool", std::string("llama-quant ") + Q4S_VERSION},
                             {"source", sources},
                             {"options", chosen},
                             {"calibration", Json::parse(report.calibration)},
                             {"losses", losses_json(report.blocks)}}
                            .dump());
  writer.finish();
  lap("finishing");
  report.size_bytes = int64_t(std::filesystem::file_size(target));
  report.peak.note(*backend);
  if (cli.given("report")) {
    AtomicFile f(cli.get("report"), true, inputs);
    f.write(to_json(report));
    f.commit();
  }
  if (cli.on("json")) out(to_json(report));
  std::string stages;
  for (const auto& [name, seconds] : report.stages)
    stages += strprintf("%s%s %.1f", stages.empty() ? "" : " | ", name.c_str(), seconds);
  log_info("seconds: %s", stages.c_str());
  const std::string device =
      report.peak.device ? strprintf(" and %s of the device", bytes_text(double(report.peak.device)).c_str())
                         : "";
  log_info("%s: %s, %.3f bits a weight in the blocks, %s, peak memory %s%s", target.c_str(),
           bytes_text(double(report.size_bytes)).c_str(), report.bits_per_weight,
           duration_text(std::chrono::duration<double>(Clock::now() - start).count()).c_str(),
           bytes_text(double(report.peak.host)).c_str(), device.c_str());
  return 0;
}

int run(int argc, char** argv) {
  Cli cli("llama-quant", "MODEL OUT.q4s [OPTIONS]",
          "Quantises a LLaMA-family model to symmetric int4 with GPTQ.");
  cli.positional("MODEL", "Hugging Face folder or GGUF file; with --show or --verify a .q4s file");
  cli.positional("OUT", ".q4s file to write", false);
  declare_quant_options(cli);
  cli.flag("dry-run", "show sizes and memory, do nothing");
  cli.flag("json", "what --report writes, on stdout");
  cli.flag("resume", "go on where an interrupted run stopped");
  cli.flag("force", "overwrite OUT");
  cli.flag("show", "print header, tensors and sizes of a .q4s file");
  cli.flag("verify", "check every checksum of a .q4s file");
  cli.device_options();
  if (!cli.parse(argc, argv)) return 0;
  if (cli.on("show") || cli.on("verify")) return inspect(cli);
  if (cli.on("compare-grids")) return compare(cli);
  try {
    return quantize(cli);
  } catch (const Stopped&) {
    log_warn("stopped; the same command with --resume goes on");
    return stop_requested();
  }
}

}  // namespace
}  // namespace q4s

int main(int argc, char** argv) { return q4s::run_tool("llama-quant", argc, argv, q4s::run); }
