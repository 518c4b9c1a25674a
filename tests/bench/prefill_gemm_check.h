// One random int4 product on the device against the exact one, with the bound that the rounding steps allow.
// For prefill_bench_cuda only.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>

#include "device_buffer.h"
#include "kernels/half.h"
#include "kernels/linear_q4_gemm.h"

namespace q4s {

struct GemmCase {
  int64_t tokens, n, k, group;
  Grid grid = Grid::kInt;
  Q4GemmOutput output = Q4GemmOutput::kStore;
  bool residual = false, y_half = false, normalise = false;
  int64_t heads = 0, kv_heads = 0, head_dim = 0;  // kRopeKv: n = (H + 2 Hkv) head_dim
  int bits = 4;

  Q4Layout layout() const {
    Q4Layout w;
    w.n = n, w.k = k, w.group = group, w.bits = bits;
    if (output == Q4GemmOutput::kSwiglu) w.map = RowMap::kPairHalves;
    if (output == Q4GemmOutput::kRopeKv)
      w.map = RowMap::kRope, w.head_dim = head_dim, w.rotated = (heads + kv_heads) * head_dim;
    return w;
  }
  std::string print() const {
    char text[160];
    static const char* const names[] = {"store", "swiglu", "rope"};
    std::snprintf(text, sizeof text, "T %lld N %lld K %lld g %lld %s %s%s%s%s hd %lld", (long long)tokens,
                  (long long)n, (long long)k, (long long)group,
                  bits == 8            ? "int8"
                  : grid == Grid::kInt ? "int"
                                       : "half",
                  names[int(output)], residual ? " +r" : "", y_half ? " f16" : "", normalise ? " norm" : "",
                  (long long)head_dim);
    return text;
  }
};

// Outputs of a case: y, and the caches of kRopeKv.
struct GemmResult {
  std::vector<float> y, k, v;
  bool guards_intact = true;
};

class GemmProblem {
 public:
  GemmProblem(const GemmCase& c, uint64_t seed) : c_(c), w_(c.layout()), random_(seed) {
    const int64_t t = c.tokens, n = c.n, k = c.k, groups = w_.groups();
    std::uniform_real_distribution<float> uniform(-1, 1);
    codes_.resize(n * (c.bits == 8 ? k : (k + 1) / 2));
    for (auto& b : codes_) b = uint8_t(random_());
    scales_.resize(n * groups);
    for (auto& s : scales_) s = float_to_half(uniform(random_) * (c.bits == 8 ? 0.002f : 0.02f));
    x_.resize(t * k);
    for (auto& v : x_) v = uniform(random_) * 2;
    gain_.resize(k);
    for (auto& v : gain_) v = uniform(random_) + 1.5f;
    residual_.resize(t * n);
    for (auto& v : residual_) v = uniform(random_);
    ctx_ = t + 3;
    table_.resize(ctx_ * std::max<int64_t>(c.head_dim, 1));
    for (size_t i = 0; i + 1 < table_.size(); i += 2)
      table_[i] = std::cos(float(i) * 0.37f), table_[i + 1] = std::sin(float(i) * 0.37f);
    position_.resize(t), sequence_.resize(t);
    for (int64_t i = 0; i < t; ++i) sequence_[i] = int32_t(i % 2), position_[i] = int32_t(i / 2 + 1);
    packed_.resize(w_.code_bytes());
    packed_scales_.resize(w_.scale_bytes() / 2);
    q4_pack_cpu(w_, {codes_.data(), scales_.data()}, packed_.data(), packed_scales_.data());
    upload();
  }

  GemmResult run(const Q4GemmConfig& config, bool pdl) {
    const int64_t t = c_.tokens, pitch = y_pitch();
    const size_t y_size = size_t(t * pitch), guard = 64,
                 kv_size = size_t(2 * ctx_ * c_.kv_heads * c_.head_dim);
    DeviceBuffer<float> y(y_size + 2 * guard), k(kv_size + guard), v(kv_size + guard);
    DeviceBuffer<uint16_t> xh(size_t(t * q4_gemm_pitch(c_.k)));
    DeviceBuffer<std::byte> workspace(config.workspace_bytes);
    workspace.fill_byte(0);
    y.fill_byte(0xcd), k.fill_byte(0xcd), v.fill_byte(0xcd), xh.fill_byte(0xff);
    q4_gemm_activations_cuda(
        {d_x_.data(), c_.normalise ? d_gain_.data() : nullptr, xh.data(), t, c_.k, 1e-5f}, nullptr);
    Q4GemmArgs a = {};
    a.x = xh.data(), a.w = w_, a.grid = c_.grid, a.codes = d_packed_.data(), a.scales = d_scales_.data();
    a.tokens = t, a.output = c_.output, a.y = y.data() + guard, a.y_half = c_.y_half, a.y_pitch = pitch;
    a.residual = c_.residual ? d_residual_.data() : nullptr;
    a.table = d_table_.data(), a.at = {d_position_.data(), d_sequence_.data()};
    a.kv = {k.data(), v.data(), KvType::kF16, ctx_}, a.heads = c_.heads, a.kv_heads = c_.kv_heads;
    a.workspace = workspace.data(), a.pdl = pdl;
    q4_gemm_cuda(a, config, nullptr);
    cuda_check(cudaDeviceSynchronize(), "q4_gemm");

    x_bits_ = xh.read();
    GemmResult r;
    const std::vector<float> raw = y.read();
    const auto intact = [&](const float* p, size_t bytes) {
      const auto* b = reinterpret_cast<const unsigned char*>(p);
      for (size_t i = 0; i < bytes; ++i)
        if (b[i] != 0xcd) r.guards_intact = false;
    };
    intact(raw.data(), guard * 4);
    const size_t used = y_size * (c_.y_half ? 2 : 4);
    intact(raw.data() + guard + (used + 3) / 4, (y_size + guard) * 4 - (used + 3) / 4 * 4);
    r.y.resize(y_size);
    for (size_t i = 0; i < y_size; ++i)
      r.y[i] = c_.y_half ? half_to_float(reinterpret_cast<const uint16_t*>(raw.data() + guard)[i])
                         : raw[guard + i];
    if (c_.output == Q4GemmOutput::kRopeKv) {
      const std::vector<float> rk = k.read(), rv = v.read();
      for (size_t i = 0; i < kv_size; ++i) {
        r.k.push_back(half_to_float(reinterpret_cast<const uint16_t*>(rk.data())[i]));
        r.v.push_back(half_to_float(reinterpret_cast<const uint16_t*>(rv.data())[i]));
      }
      intact(rk.data() + kv_size / 2, (kv_size / 2 + guard) * 4);
      intact(rv.data() + kv_size / 2, (kv_size / 2 + guard) * 4);
    }
    for (std::byte b : workspace_flags(workspace)) r.guards_intact &= b == std::byte(0);
    return r;
  }

  // The activations as the device rounded them; to be compared with what they should be.
  double activation_error() const {
    const int64_t pitch = q4_gemm_pitch(c_.k);
    double worst = 0;
    for (int64_t t = 0; t < c_.tokens; ++t) {
      double sum = 0;
      for (int64_t i = 0; i < c_.k; ++i) sum += double(x_[t * c_.k + i]) * x_[t * c_.k + i];
      const double scale = c_.normalise ? 1 / std::sqrt(sum / double(c_.k) + 1e-5) : 1;
      for (int64_t i = 0; i < pitch; ++i) {
        const double want = i < c_.k ? x_[t * c_.k + i] * scale * (c_.normalise ? gain_[i] : 1.f) : 0;
        const double got = half_to_float(x_bits_[t * pitch + i]);
        const double bound = std::abs(want) * (0x1p-11 + 0x1p-18) + (i < c_.k ? 0x1p-25 : 0);
        worst = std::max(worst, bound > 0 ? std::abs(got - want) / bound : got == 0 ? 0 : 1e9);
      }
    }
    return worst;
  }

  // Largest |error| / bound over all outputs, against fp64. Prints what is wrong when it exceeds 1.
  double check(const GemmResult& r, const char* label) {
    reference();
    const int64_t t = c_.tokens, n = c_.n, pitch = y_pitch();
    double worst = 0;
    int64_t wrong = 0, shown = 0;
    int by_row[16] = {}, by_token[8] = {};
    const auto one = [&](int64_t token, int64_t row, double got, double want, double bound) {
      const double ratio = std::isfinite(got) ? std::abs(got - want) / bound : 1e30;
      worst = std::max(worst, ratio);
      if (ratio <= 1) return;
      ++wrong, ++by_row[row % 16], ++by_token[token % 8];
      if (shown++ < 3)
        std::printf("    %s: t %lld row %lld got %.6g want %.6g bound %.3g\n", label, (long long)token,
                    (long long)row, got, want, bound);
    };
    const auto rounded = [&](double want, double bound, bool half) {
      return bound + std::abs(want) * (half ? 0x1p-11 : 0x1p-22) + (half ? 0x1p-25 : 1e-30);
    };
    const double* p = product_.data();
    const double* e = bound_.data();
    for (int64_t i = 0; i < t; ++i) {
      if (c_.output == Q4GemmOutput::kStore)
        for (int64_t j = 0; j < n; ++j) {
          const double want = p[i * n + j] + (c_.residual ? residual_[i * n + j] : 0);
          one(i, j, r.y[i * pitch + j], want,
              rounded(want, e[i * n + j] + std::abs(p[i * n + j]) * 0x1p-23, c_.y_half));
        }
      else if (c_.output == Q4GemmOutput::kSwiglu)
        for (int64_t j = 0, f = n / 2; j < f; ++j) {
          const double gate = p[i * n + j], up = p[i * n + f + j], eg = e[i * n + j], eu = e[i * n + f + j];
          const double silu = gate / (1 + std::exp(-gate)), want = silu * up;
          // |silu'| < 1.1; expf and the division are good to a few ulp, more where exp(-gate) is large.
          const double bound = 1.1 * eg * std::abs(up) + std::abs(silu) * eu + 1.1 * eg * eu +
                               std::abs(want) * (8 + 2 * std::abs(gate)) * 0x1p-23;
          one(i, j, r.y[i * pitch + j], want, rounded(want, bound, c_.y_half));
        }
      else
        check_rope(i, r, one, rounded);
    }
    if (wrong) {
      std::printf("    %s: %lld of %lld wrong; rows%%16:", label, (long long)wrong, (long long)(t * n));
      for (int v : by_row) std::printf(" %d", v);
      std::printf("; tokens%%8:");
      for (int v : by_token) std::printf(" %d", v);
      std::printf("\n");
    }
    return worst;
  }

 private:
  int64_t y_pitch() const {
    return c_.output == Q4GemmOutput::kStore    ? c_.n
           : c_.output == Q4GemmOutput::kSwiglu ? c_.n / 2
                                                : c_.heads * c_.head_dim;
  }
  static std::vector<std::byte> workspace_flags(const DeviceBuffer<std::byte>& w) {
    std::vector<std::byte> flags(std::min<size_t>(w.size(), 4096));
    cuda_check(cudaMemcpy(flags.data(), w.data(), flags.size(), cudaMemcpyDeviceToHost), "flags");
    return flags;
  }
  void upload() {
    d_packed_ = DeviceBuffer<uint8_t>(packed_);
    d_scales_ = DeviceBuffer<uint16_t>(packed_scales_);
    d_x_ = DeviceBuffer<float>(x_), d_gain_ = DeviceBuffer<float>(gain_);
    d_residual_ = DeviceBuffer<float>(residual_), d_table_ = DeviceBuffer<float>(table_);
    d_position_ = DeviceBuffer<int32_t>(position_), d_sequence_ = DeviceBuffer<int32_t>(sequence_);
  }

  // product_ = x W^T of the fp16 activations and exact weights; bound_ = what a kernel may differ by:
  //   weight rounded to fp16: 2^-11 |w| + 2^-24 below the normal range (the scale's half included);
  //   fp32 sums: k/16 steps and a few parts, each truncated within 2^-22 of the sum of magnitudes.
  void reference() {
    if (!product_.empty()) return;
    const int64_t t = c_.tokens, n = c_.n, k = c_.k, pitch = q4_gemm_pitch(k), groups = w_.groups();
    product_.assign(t * n, 0), bound_.assign(t * n, 0);
    std::vector<float> x(t * k);
    for (int64_t i = 0; i < t; ++i)
      for (int64_t j = 0; j < k; ++j) x[i * k + j] = half_to_float(x_bits_[i * pitch + j]);
    const auto rows = [&](int64_t begin, int64_t step) {
      std::vector<float> row(k);  // exact: (code - 8) * fp16 has 15 bits, int8 * fp16 19
      for (int64_t r = begin; r < n; r += step) {
        for (int64_t j = 0; j < k; ++j) {
          const float code = c_.bits == 8 ? float(int8_t(codes_[r * k + j]))
                                          : float(codes_[r * ((k + 1) / 2) + j / 2] >> (j % 2 * 4) & 15) -
                                                (c_.grid == Grid::kInt ? 8.f : 7.5f);
          row[j] = half_to_float(scales_[r * groups + j / c_.group]) * code;
        }
        for (int64_t i = 0; i < t; ++i) {
          double sum = 0, magnitude = 0, ax = 0;
          const float* xi = x.data() + i * k;
          for (int64_t j = 0; j < k; ++j) {
            const double v = double(row[j]) * double(xi[j]);
            sum += v, magnitude += std::abs(v), ax += std::abs(xi[j]);
          }
          product_[i * n + r] = sum;
          bound_[i * n + r] = magnitude * (0x1p-11 + (double(k) / 16 + 32) * 0x1p-22) + ax * 0x1p-24;
        }
      }
    };
    const int64_t count = std::clamp<int64_t>(std::thread::hardware_concurrency(), 1, 16);
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < count; ++i) threads.emplace_back(rows, i, count);
    for (std::thread& thread : threads) thread.join();
  }
  template <class One, class Rounded>
  void check_rope(int64_t i, const GemmResult& r, const One& one, const Rounded& rounded) {
    const int64_t n = c_.n, hd = c_.head_dim, half = hd / 2, kv_dim = c_.kv_heads * hd;
    const int64_t at = (sequence_[i] * ctx_ + position_[i]) * kv_dim;
    for (int64_t row = 0; row < n; ++row) {
      const int64_t head = row / hd, in = row % hd;
      const double p0 = product_[i * n + row], e0 = bound_[i * n + row];
      if (head >= c_.heads + c_.kv_heads) {
        one(i, row, r.v[at + row - w_.rotated], p0, rounded(p0, e0, true));
        continue;
      }
      const bool low = in < half;
      const int64_t other = low ? row + half : row - half, pair = low ? in : in - half;
      const double p1 = product_[i * n + other], e1 = bound_[i * n + other];
      const double cs = table_[(position_[i] * half + pair) * 2],
                   sn = table_[(position_[i] * half + pair) * 2 + 1];
      const double want = low ? p0 * cs - p1 * sn : p1 * sn + p0 * cs;
      const double bound = e0 + e1 + (std::abs(p0) + std::abs(p1)) * 0x1p-22;
      if (head < c_.heads)
        one(i, row, r.y[i * y_pitch() + row], want, rounded(want, bound, c_.y_half));
      else
        one(i, row, r.k[at + row - c_.heads * hd], want, rounded(want, bound, true));
    }
  }

  GemmCase c_;
  Q4Layout w_;
  std::mt19937_64 random_;
  int64_t ctx_ = 0;
  std::vector<uint8_t> codes_, packed_;
  std::vector<uint16_t> scales_, packed_scales_, x_bits_;
  std::vector<float> x_, gain_, residual_, table_;
  std::vector<int32_t> position_, sequence_;
  std::vector<double> product_, bound_;
  DeviceBuffer<uint8_t> d_packed_;
  DeviceBuffer<uint16_t> d_scales_;
  DeviceBuffer<float> d_x_, d_gain_, d_residual_, d_table_;
  DeviceBuffer<int32_t> d_position_, d_sequence_;
};

}  // namespace q4s
