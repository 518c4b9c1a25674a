// Times of the int4 products of a 7B layer beside cuBLAS. For prefill_bench_cuda only.
#pragma once
#include <cstdio>
#include <cstring>

#include "kernels/linear_q4_gemm.h"
#include "prefill_dense.h"

namespace q4s {

struct LayerMatrix {
  const char* name;
  int64_t n, k;
  Q4GemmOutput output;
};
// Llama-2-7B: the four matrices of a layer.
constexpr LayerMatrix kLayer[] = {{"qkv", 12288, 4096, Q4GemmOutput::kRopeKv},
                                  {"o", 4096, 4096, Q4GemmOutput::kStore},
                                  {"gate_up", 22016, 4096, Q4GemmOutput::kSwiglu},
                                  {"down", 4096, 11008, Q4GemmOutput::kStore}};
constexpr int kLayers = 4;  // rotated: 430 MB of weights, far beyond L2
constexpr int64_t kMaxTokens = 8192;

// Weights and activations of kLayers layers, random.
class LayerBench {
 public:
  explicit LayerBench(int sms)
      : sms_(sms), x_(normal_halves(kMaxTokens * 11008, 1, 3)), y_(kMaxTokens * 22016), residual_(kMaxTokens * 4096),
        workspace_(64 << 20), kv_(2 * kMaxTokens * 4096), table_(kMaxTokens * 128), position_(kMaxTokens),
        sequence_(kMaxTokens) {
    std::mt19937_64 r(3);
    residual_.fill_byte(0), table_.fill_byte(0), workspace_.fill_byte(0);
    std::vector<int32_t> position(kMaxTokens);
    for (size_t i = 0; i < position.size(); ++i) position[i] = int32_t(i);
    position_.write(position), sequence_.fill_byte(0);
    for (int l = 0; l < kLayers; ++l)
      for (int m = 0; m < 4; ++m) {
        const Q4Layout w = layout(m);
        codes_.emplace_back(w.code_bytes()), scales_.emplace_back(w.scale_bytes() / 2);
        if (l == 0) {
          std::vector<uint8_t> c(w.code_bytes());
          for (size_t i = 0; i + 8 <= c.size(); i += 8) {  // codes as a normal distribution spreads them
            uint64_t bits = 0;
            const uint64_t a = r(), b = r(), d = r();
            for (int j = 0; j < 64; j += 4)
              bits |= ((((a >> j) & 15) + ((b >> j) & 15) + ((d >> j) & 15)) / 3) << j;
            std::memcpy(&c[i], &bits, 8);
          }
          codes_.back().write(c);
          std::vector<uint16_t> s(w.scale_bytes() / 2);
          for (auto& v : s) v = float_to_half(0.004f + 0.000001f * float(r() % 1000));
          scales_.back().write(s);
        } else {
          cuda_check(cudaMemcpy(codes_.back().data(), codes_[m].data(), w.code_bytes(), cudaMemcpyDeviceToDevice), "copy");
          cuda_check(cudaMemcpy(scales_.back().data(), scales_[m].data(), w.scale_bytes(), cudaMemcpyDeviceToDevice), "copy");
        }
      }
  }
  static Q4Layout layout(int m) {
    Q4Layout w;
    w.n = kLayer[m].n, w.k = kLayer[m].k, w.group = 128;
    if (kLayer[m].output == Q4GemmOutput::kSwiglu) w.map = RowMap::kPairHalves;
    if (kLayer[m].output == Q4GemmOutput::kRopeKv) w.map = RowMap::kRope, w.head_dim = 128, w.rotated = 8192;
    return w;
  }
  Q4GemmShape shape(int m, int64_t tokens) const { return {tokens, layout(m), sms_, true}; }

  void product(int layer, int m, int64_t tokens, const Q4GemmConfig& c, bool pdl, cudaStream_t stream) {
    Q4GemmArgs a = {};
    a.x = x_.data(), a.w = layout(m), a.grid = Grid::kInt;
    a.codes = codes_[layer * 4 + m].data(), a.scales = scales_[layer * 4 + m].data();
    a.tokens = tokens, a.output = kLayer[m].output, a.y = y_.data();
    // As a fused prefill would: fp16 towards the next product or attention, f32 for the residual stream.
    a.y_half = a.output != Q4GemmOutput::kStore;
    a.y_pitch = a.output == Q4GemmOutput::kSwiglu ? 11008 : 4096;
    a.residual = a.output == Q4GemmOutput::kStore ? residual_.data() : nullptr;
    a.table = table_.data(), a.at = {position_.data(), sequence_.data()};
    a.kv = {kv_.data(), kv_.data() + kMaxTokens * 4096, KvType::kF16, kMaxTokens};
    a.heads = a.kv_heads = 32;
    a.workspace = workspace_.data(), a.pdl = pdl;
    if (c.workspace_bytes > workspace_.size()) throw std::runtime_error("workspace of the bench too small");
    q4_gemm_cuda(a, c, stream);
  }
  // A matrix in all layers, one after the other.
  double one(int m, int64_t tokens, const Q4GemmConfig& c, int repeats) {
    const auto work = [&](cudaStream_t s) {
      for (int l = 0; l < kLayers; ++l) product(l, m, tokens, c, true, s);
    };
    return timer_.microseconds(work, repeats) / kLayers;
  }
  double layer(int64_t tokens, const Q4GemmConfig (&c)[4], bool pdl, int repeats) {
    const auto work = [&](cudaStream_t s) {
      for (int l = 0; l < kLayers; ++l)
        for (int m = 0; m < 4; ++m) product(l, m, tokens, c[m], pdl, s);
    };
    return timer_.microseconds(work, repeats) / kLayers;
  }
  Timer& timer() { return timer_; }
  const uint16_t* x() const { return x_.data(); }
  float* y() const { return y_.data(); }

 private:
  int sms_;
  Timer timer_;
  DeviceBuffer<uint16_t> x_;
  DeviceBuffer<float> y_, residual_;
  DeviceBuffer<std::byte> workspace_;
  DeviceBuffer<uint16_t> kv_;
  DeviceBuffer<float> table_;
  DeviceBuffer<int32_t> position_, sequence_;
  std::vector<DeviceBuffer<uint8_t>> codes_;
  std::vector<DeviceBuffer<uint16_t>> scales_;
};

inline double tflops(double n, double k, double tokens, double us) { return 2 * n * k * tokens / us * 1e-6; }

// Every tile and way of cutting that is not absurd for this count of tokens; the fastest of each matrix into `best`.
inline void sweep_gemm(LayerBench& bench, int64_t tokens, int repeats, Q4GemmConfig (&best)[4], double (&best_us)[4]) {
  const auto line = [&](const char* label, const std::function<Q4GemmConfig(int)>& config) {
    std::printf("  %-26s", label);
    for (int m = 0; m < 4; ++m) {
      const Q4GemmConfig c = config(m);
      const double us = bench.one(m, tokens, c, repeats);
      std::printf(" %8.1f", us);
      if (us < best_us[m]) best_us[m] = us, best[m] = c;
    }
    std::printf("\n");
  };
  char label[64];
  for (const Q4GemmTile& t : kQ4GemmSplitTiles) {
    if (t.columns >= 2 * std::max<int64_t>(tokens, 32) || (t.columns * 2 < tokens && t.columns < 128) || tokens > 512) continue;
    for (int splits = 1; splits <= kQ4GemmMostSplits; ++splits) {
      std::snprintf(label, sizeof label, "split %dx%d / %d", t.rows, t.columns, splits);
      line(label, [&](int m) { return q4_gemm_config_split(bench.shape(m, tokens), t, splits); });
    }
  }
  for (const Q4GemmTile& t : kQ4GemmStreamTiles) {
    if (t.columns > 2 * tokens) continue;
    for (bool stream : {false, true})
      for (bool staggered : {false, true}) {
        std::snprintf(label, sizeof label, "%dx%dc%d%s%s", t.rows, t.columns, t.cluster, stream ? " streamed" : "",
                      staggered ? " staggered" : "");
        line(label, [&](int m) {
          Q4GemmConfig c = q4_gemm_config_stream(bench.shape(m, tokens), t, stream);
          c.staggered = staggered;
          return c;
        });
      }
  }
}

// Returns what cuBLAS makes of 8192^3, the peak that attention is measured against.
inline double time_gemm(int sms, bool sweep) {
  LayerBench bench(sms);
  Dense dense(bench.timer(), bench.x(), bench.y());
  const double peak = tflops(8192, 8192, 8192, dense.microseconds(8192, 8192, 8192, CUDA_R_16F, 5));
  std::printf("\ncuBLAS 8192^3: %.0f TFLOP/s fp16\n", peak);
  std::printf("us a matrix; 7B layer, g128, weights rotated over %d layers; PDL; sum in one graph\n", kLayers);
  for (int64_t t : {16, 32, 64, 128, 256, 512, 2048, 8192}) {
    const int repeats = t >= 2048 ? 5 : 11;
    Q4GemmConfig chosen[4], best[4];
    double best_us[4], fp16 = 0, bf16 = 0, flops = 0;
    for (int m = 0; m < 4; ++m) {
      const double us = dense.microseconds(kLayer[m].n, kLayer[m].k, t, CUDA_R_16F, repeats);
      if (sweep) bf16 += dense.microseconds(kLayer[m].n, kLayer[m].k, t, CUDA_R_16BF, repeats);
      fp16 += us;
      flops += 2.0 * kLayer[m].n * kLayer[m].k * t;
      chosen[m] = best[m] = q4_gemm_config(bench.shape(m, t));
      best_us[m] = bench.one(m, t, best[m], repeats);
      std::printf("M %5lld %-8s cuBLAS %8.1f  ours %8.1f  %s\n", (long long)t, kLayer[m].name, us, best_us[m],
                  best[m].print().c_str());
    }
    if (sweep) {
      sweep_gemm(bench, t, std::min(repeats, 5), best, best_us);
      for (int m = 0; m < 4; ++m) std::printf("  best %-8s %8.1f  %s\n", kLayer[m].name, best_us[m], best[m].print().c_str());
    }
    const double a = bench.layer(t, chosen, true, repeats), b = bench.layer(t, chosen, false, repeats);
    std::printf("M %5lld layer: %8.1f us %4.0f TFLOP/s (no PDL %.1f", (long long)t, a, flops / a * 1e-6, b);
    if (sweep) std::printf(", best of sweep %.1f", bench.layer(t, best, true, repeats));
    std::printf(") | cuBLAS fp16 %.1f", fp16);
    if (sweep) std::printf(" bf16 %.1f", bf16);
    std::printf(" | ratio %.3f\n", fp16 / a);
    std::fflush(stdout);
  }
  return peak;
}

}  // namespace q4s
