#include "quant/quant_options.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

#include "runtime/error.h"

namespace q4s {
namespace {

std::regex parse_regex(const std::string& option, const std::string& text) {
  try {
    return std::regex(text, std::regex::extended | std::regex::optimize);
  } catch (const std::regex_error& e) {
    throw Error(ErrorKind::kUsage,
                "--" + option + ": \"" + text + "\" is no regular expression: " + e.what());
  }
}

// The parts of the stack that --off can leave out.
void switch_off(const std::string& text, QuantizeOptions& o) {
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find(',', at), text.size());
    const std::string part = text.substr(at, end - at);
    at = end + 1;
    if (part == "rotation")
      o.rotate = false;
    else if (part == "order")
      o.order_hidden = false;
    else if (part == "target")
      o.solve.alpha = 0;
    else if (part == "residual")
      o.solve.beta = 0;
    else if (part == "coupling")
      o.couple = false;
    else if (part == "search")
      o.solve.search = false;
    else if (part == "refine")
      o.solve.refine = false;
    else if (part == "dither")
      o.solve.dither = false;
    else if (part == "act-order")
      o.act_order = false;
    else
      throw Error(ErrorKind::kUsage, "--off: \"" + part +
                                         "\": expected rotation, order, target, residual, coupling, search, "
                                         "refine, dither or act-order");
  }
}

}  // namespace

void declare_quant_options(Cli& cli) {
  cli.text("calib", "FILE", "", "calibration text, .txt or .jsonl; without it the model writes its own");
  cli.integer("samples", 512, 1, 1 << 20, "calibration sequences");
  cli.integer("seq-len", 512, 1, 1 << 20, "tokens of a sequence, at most the model's context");
  cli.choice("group", {"128", "64", "32", "row"}, "columns that share a scale");
  cli.choice("grid", {"signed", "sym8", "sym7", "half", "asym"},
             "levels of a group; asym only with --compare-grids");
  cli.real("damp", 0.05, 0.0, 1.0, "damping, as a fraction of the Hessian's mean diagonal");
  cli.choice("head", {"q8", "f16", "q4"}, "format of embedding and head");
  cli.flag("rtn", "round to nearest: no calibration, no GPTQ");
  cli.text("off", "PARTS", "",
           "leave out rotation, order, target, residual, coupling, search, refine, dither, act-order (comma "
           "list)");
  cli.text("only", "REGEX", "", "quantise only matching linears (blk.3.gate_up); the rest stays fp16");
  cli.list("tensor", "REGEX=FORMAT",
           "g32, g64, g128, row or q8 for matching linears; the first match counts");
  cli.integer("observe", 0, 0, 1 << 20, "give the K linears of largest loss a finer format");
  cli.real("bpw", 0, 0, 16, "spend up to so many bits a weight where they help most");
  cli.flag("compare-grids", "no OUT: measure the seed's versions and this one on --eval, table on stdout");
  cli.text("eval", "TEXT", "", "text for --compare-grids, windows of 512, second half scored");
  cli.integer("chunks", 60, 0, 1 << 30, "windows of --eval at most; 0: all");
  cli.integer("seed", 0, 0, INT64_MAX, "of calibration and rotation");
  cli.text("report", "FILE", "", "JSON with losses, weights and times of every linear");
}

Format4 parse_format(const std::string& option, const std::string& text, GridKind grid) {
  const std::map<std::string, Format4> known = {{"g32", {grid, 32}},
                                                {"g64", {grid, 64}},
                                                {"g128", {grid, 128}},
                                                {"row", {grid, 0}},
                                                {"q8", {GridKind::kInt8, 64}}};
  const auto found = known.find(text);
  if (found == known.end())
    throw Error(ErrorKind::kUsage, "--" + option + ": \"" + text + "\": expected g32, g64, g128, row or q8");
  return found->second;
}

std::regex exact_pattern(const std::string& name) {
  return std::regex("^" + std::regex_replace(name, std::regex("\\."), "\\.") + "$");
}

QuantizeOptions parse_options(const Cli& cli) {
  QuantizeOptions o;
  o.solve.grid = parse_grid(cli.get("grid"));
  const std::string& group = cli.get("group");
  o.solve.group = group == "row" ? 0 : std::stoll(group);
  o.solve.rtn = cli.on("rtn");
  o.damp = cli.get_real("damp");
  o.seed = uint64_t(cli.get_integer("seed"));
  switch_off(cli.get("off"), o);
  if (o.solve.rtn) {
    o.rotate = o.order_hidden = false;  // plain: rotation before it hurts
    o.solve.search = false;
  }
  const std::string& head = cli.get("head");
  o.head = head == "f16" ? Format::kF16 : head == "q4" ? Format::kQ4 : Format::kQ8;
  if (cli.given("only")) o.only = parse_regex("only", cli.get("only"));
  for (const std::string& t : cli.get_list("tensor")) {
    const size_t at = t.rfind('=');
    if (at == std::string::npos)
      throw Error(ErrorKind::kUsage, "--tensor: \"" + t + "\": expected REGEX=FORMAT");
    o.special.emplace_back(parse_regex("tensor", t.substr(0, at)),
                           parse_format("tensor", t.substr(at + 1), o.solve.grid));
  }
  return o;
}

std::string options_json(const Cli& cli, const QuantizeOptions& o) {
  const nlohmann::ordered_json j = {{"grid", grid_name(o.solve.grid)},
                                    {"group", cli.get("group")},
                                    {"rtn", o.solve.rtn},
                                    {"damp", o.damp},
                                    {"act_order", o.act_order},
                                    {"search", o.solve.search},
                                    {"refine", o.solve.refine},
                                    {"dither", o.solve.dither},
                                    {"alpha", o.solve.alpha},
                                    {"beta", o.solve.beta},
                                    {"rotation", o.rotate},
                                    {"order", o.order_hidden},
                                    {"coupling", o.couple},
                                    {"head", cli.get("head")},
                                    {"seed", o.seed},
                                    {"only", cli.get("only")},
                                    {"tensor", cli.get_list("tensor")},
                                    {"observe", cli.get_integer("observe")},
                                    {"bpw", cli.get_real("bpw")}};
  return j.dump();
}

}  // namespace q4s
