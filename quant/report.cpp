#include "quant/report.h"

#include <sys/resource.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>

namespace q4s {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kBins = 64;

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

WeightShape weight_shape(const float* w, int64_t count, const Team& team) {
  WeightShape s;
  s.histogram.assign(kBins, 0);
  if (count == 0) return s;
  struct Sums {
    double low = 0, high = 0, m1 = 0, m2 = 0, m3 = 0, m4 = 0;
    std::array<int64_t, kBins> bins{};
  };
  // Fixed pieces, added up in order: the same sums for every team.
  constexpr int64_t kPiece = 1 << 16;
  std::vector<Sums> pieces(ceil_div(count, kPiece));
  const auto each = [&](const auto& fn) {
    team([&](Part part) {
      const auto [begin, end] = part.of(int64_t(pieces.size()));
      for (int64_t p = begin; p < end; ++p)
        fn(pieces[p], w + p * kPiece, std::min(kPiece, count - p * kPiece));
    });
  };
  each([](Sums& p, const float* x, int64_t n) {
    const auto [low, high] = std::minmax_element(x, x + n);
    p.low = *low;
    p.high = *high;
    for (int64_t i = 0; i < n; ++i) p.m1 += x[i];
  });
  s.low = pieces[0].low;
  s.high = pieces[0].high;
  for (const Sums& p : pieces) {
    s.low = std::min(s.low, p.low);
    s.high = std::max(s.high, p.high);
    s.mean += p.m1;
  }
  s.mean /= double(count);
  each([&](Sums& p, const float* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const double d = x[i] - s.mean, d2 = d * d;
      p.m2 += d2;
      p.m3 += d2 * d;
      p.m4 += d2 * d2;
    }
  });
  double m2 = 0, m3 = 0, m4 = 0;
  for (const Sums& p : pieces) m2 += p.m2, m3 += p.m3, m4 += p.m4;
  m2 /= double(count);
  s.sd = std::sqrt(m2);
  if (s.sd == 0.0) return s;
  s.skew = m3 / double(count) / (m2 * s.sd);
  s.kurtosis = m4 / double(count) / (m2 * m2);
  each([&](Sums& p, const float* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const double bin = ((x[i] - s.mean) / s.sd + 4.0) * kBins / 8.0;
      ++p.bins[int(std::clamp(bin, 0.0, kBins - 1.0))];
    }
  });
  for (const Sums& p : pieces)
    for (int i = 0; i < kBins; ++i) s.histogram[i] += p.bins[i];
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
