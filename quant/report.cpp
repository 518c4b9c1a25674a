#include "quant/report.h"

#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

namespace q4s {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kBins = 64;

Json write(const WeightShape& w) {
  return {{"mean", w.mean}, {"sd", w.sd}, {"skew", w.skew}, {"kurtosis", w.kurtosis},
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
  Json j = {{"block", b.block}, {"output_error", b.output_error}, {"seconds", b.seconds}, {"linears", Json::array()}};
  for (const LinearReport& l : b.linears) j["linears"].push_back(write(l));
  return j;
}

double number(const Json& j, const char* key) { return j[key].is_number() ? j[key].get<double>() : NAN; }

}  // namespace

WeightShape weight_shape(const float* w, int64_t count) {
  WeightShape s;
  s.histogram.assign(kBins, 0);
  if (count == 0) return s;
  const auto [low, high] = std::minmax_element(w, w + count);
  s.low = *low;
  s.high = *high;
  for (int64_t i = 0; i < count; ++i) s.mean += w[i];
  s.mean /= double(count);
  double m2 = 0, m3 = 0, m4 = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double d = w[i] - s.mean;
    m2 += d * d;
    m3 += d * d * d;
    m4 += d * d * d * d;
  }
  m2 /= double(count);
  s.sd = std::sqrt(m2);
  if (s.sd == 0.0) return s;
  s.skew = m3 / double(count) / (m2 * s.sd);
  s.kurtosis = m4 / double(count) / (m2 * m2);
  for (int64_t i = 0; i < count; ++i) {
    const double bin = ((w[i] - s.mean) / s.sd + 4.0) * kBins / 8.0;
    ++s.histogram[int(std::clamp(bin, 0.0, kBins - 1.0))];
  }
  return s;
}

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
    r.loss = {number(l, "loss"), number(l, "relative_loss"), number(l, "rtn_relative_loss"), number(l, "error_max"),
              number(l, "error_mean"), number(l, "target_loss")};
    r.damp = number(l, "damp");
    r.sweeps = l["sweeps"];
    r.seconds = number(l, "seconds");
    r.fallback = l.value("fallback", "");
    const Json& w = l["weights"];
    r.weights = {number(w, "mean"), number(w, "sd"),   number(w, "skew"), number(w, "kurtosis"),
                 number(w, "low"),  number(w, "high"), w["histogram"].get<std::vector<int64_t>>()};
    b.linears.push_back(std::move(r));
  }
  return b;
}

std::string to_json(const Report& r) {
  Json j = {{"schema", 1}, {"bits_per_weight", r.bits_per_weight}, {"size_bytes", r.size_bytes},
            {"options", Json::parse(r.options)}, {"calibration", Json::parse(r.calibration)}};
  j["stages"] = Json::object();
  for (const auto& [name, seconds] : r.stages) j["stages"][name] = seconds;
  j["peak_bytes"] = r.peak_bytes;
  j["blocks"] = Json::array();
  for (const BlockReport& b : r.blocks) j["blocks"].push_back(write(b));
  return j.dump(1) + "\n";
}

int64_t peak_resident_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t(usage.ru_maxrss) * 1024;
}

}  // namespace q4s
