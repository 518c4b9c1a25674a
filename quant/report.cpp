#include "quant/report.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

namespace q4s {
namespace {

using Json = nlohmann::ordered_json;

Json write(const WeightShape& w) {
  return {{"mean", w.mean}, {"sd", w.sd},     {"skew", w.skew},          {"kurtosis", w.kurtosis},
          {"low", w.low},   {"high", w.high}, {"histogram", w.histogram}};
}

Json write(const LinearReport& l) {
  Json j = {{"name", l.name},
            {"n", l.n},
            {"k", l.k},
            {"group", l.group},
            {"bits", l.bits},
            {"grid", l.grid},
            {"loss", l.loss.loss},
            {"relative_loss", l.loss.relative},
            {"rtn_relative_loss", l.loss.rtn_relative},
            {"target_loss", l.loss.target},
            {"error_max", l.loss.error_max},
            {"error_mean", l.loss.error_mean},
            {"damp", l.damp},
            {"sweeps", l.sweeps},
            {"seconds", l.seconds}};
  if (!l.fallback.empty()) j["fallback"] = l.fallback;
  j["weights"] = write(l.weights);
  return j;
}

Json write(const BlockReport& b) {
  Json j = {{"block", b.block},
            {"output_error", b.output_error},
            {"seconds", b.seconds},
            {"linears", Json::array()}};
  for (const LinearReport& l : b.linears) j["linears"].push_back(write(l));
  return j;
}

double number(const Json& j, const char* key) { return j[key].is_number() ? j[key].get<double>() : NAN; }

}  // namespace

std::string to_json(const BlockReport& b) { return write(b).dump(); }

BlockReport block_report(const std::string& text) {
  const Json j = Json::parse(text);
  BlockReport b;
  b.block = j["block"];
  b.output_error = number(j, "output_error");
  b.seconds = number(j, "seconds");
  for (const Json& l : j["linears"]) {
    LinearReport r;
    r.name = l["name"];
    r.n = l["n"];
    r.k = l["k"];
    r.group = l["group"];
    r.bits = l["bits"];
    r.grid = l["grid"];
    r.loss = {number(l, "loss"),      number(l, "relative_loss"), number(l, "rtn_relative_loss"),
              number(l, "error_max"), number(l, "error_mean"),    number(l, "target_loss")};
    r.damp = number(l, "damp");
    r.sweeps = l["sweeps"];
    r.seconds = number(l, "seconds");
    r.fallback = l.value("fallback", "");
    const Json& w = l["weights"];
    r.weights = {number(w, "mean"),
                 number(w, "sd"),
                 number(w, "skew"),
                 number(w, "kurtosis"),
                 number(w, "low"),
                 number(w, "high"),
                 w["histogram"].get<std::vector<int64_t>>()};
    b.linears.push_back(std::move(r));
  }
  return b;
}

std::string to_json(const Report& r) {
  Json j = {{"schema", 1},
            {"bits_per_weight", r.bits_per_weight},
            {"size_bytes", r.size_bytes},
            {"options", Json::parse(r.options)},
            {"calibration", Json::parse(r.calibration)},
            {"effects", Json::parse(r.effects)}};
  j["stages"] = Json::object();
  for (const auto& [name, seconds] : r.stages) j["stages"][name] = seconds;
  j["peak_bytes"] = r.peak.host;
  j["peak_device_bytes"] = r.peak.device;
  j["blocks"] = Json::array();
  for (const BlockReport& b : r.blocks) j["blocks"].push_back(write(b));
  return j.dump(1) + "\n";
}

void MemoryPeak::note(const Backend& backend) {
  device = std::max(device, int64_t(backend.used_bytes()));
  long pages = 0, resident = 0, shared = 0;  // /proc/self/statm, in pages; shared: mapped files
  if (std::FILE* f = std::fopen("/proc/self/statm", "r")) {
    if (std::fscanf(f, "%ld %ld %ld", &pages, &resident, &shared) == 3)
      host = std::max(host, int64_t(resident - shared) * sysconf(_SC_PAGESIZE));
    std::fclose(f);
  }
}

}  // namespace q4s
