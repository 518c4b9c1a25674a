// Times of the int4 products of a 7B layer beside cuBLAS. For prefill_bench_cuda only.
#pragma once
#include <cstdio>
#include <cstring>
#include <functional>

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
constexpr int kLayers = 8;  // rotated: 860 MB of weights, of the smallest matrix 71 MB: beyond L2
constexpr int64_t kMaxTokens = 8192;

// Weights and activations of kLayers layers, random.
class LayerBench {
 public:
  explicit LayerBench(int sms)
      : sms_(sms),
        x_(normal_halves(kMaxTokens * 11008, 1, 3)),
        y_(kMaxTokens * 22016),
        residual_(kMaxTokens * 4096),
        workspace_(64 << 20),
        exchange_(kQ4GemmExchange),
        kv_(2 * kMaxTokens * 4096),
        table_(kMaxTokens * 128),
        gain_(std::vector<float>(4096, 1.f)),
        position_(kMaxTokens),
        sequence_(kMaxTokens) {
    const std::vector<float> guess(kQ4GemmFewTokens, kQ4GemmHeadroom);
    std::mt19937_64 r(3);
    residual_.fill_byte(0), table_.fill_byte(0), workspace_.fill_byte(0), exchange_.fill_byte(0);
    cuda_check(
        cudaMemcpy(q4_gemm_guess(exchange_.data()), guess.data(), guess.size() * 4, cudaMemcpyHostToDevice),
        "guesses");
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
          cuda_check(
              cudaMemcpy(codes_.back().data(), codes_[m].data(), w.code_bytes(), cudaMemcpyDeviceToDevice),
              "copy");
          cuda_check(
              cudaMemcpy(scales_.back().data(), scales_[m].data(), w.scale_bytes(), cudaMemcpyDeviceToDevice),
              "copy");
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

  Q4GemmArgs args(int layer, int m, int64_t tokens, bool pdl) {
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
    return a;
  }
  void product(int layer, int m, int64_t tokens, const Q4GemmConfig& c, bool pdl, cudaStream_t stream) {
    if (c.workspace_bytes > workspace_.size()) throw std::runtime_error("workspace of the bench too small");
    q4_gemm_cuda(args(layer, m, tokens, pdl), c, stream);
  }
  // o, gate|up and down of a layer and qkv of the next, as they follow each other between two attentions.
  void chain(int layer, int64_t tokens, bool pdl, cudaStream_t stream) {
    Q4GemmArgs all[] = {args(layer, 1, tokens, pdl), args(layer, 2, tokens, pdl), args(layer, 3, tokens, pdl),
                        args((layer + 1) % kLayers, 0, tokens, pdl)};
    for (int i = 1; i < 4; ++i)
      all[i].x = nullptr, all[i].gain = i == 2 ? nullptr : gain_.data(), all[i].eps = 1e-5f;
    all[1].y = nullptr, all[2].residual = y_.data();
    q4_gemm_chain_cuda(all, 4, exchange_.data(), stream);
  }
  // A matrix in all layers, one after the other; all matrices of all layers.
  std::function<void(cudaStream_t)> one(int m, int64_t tokens, const Q4GemmConfig& c) {
    return [=, this](cudaStream_t s) {
      for (int l = 0; l < kLayers; ++l) product(l, m, tokens, c, true, s);
    };
  }
  std::function<void(cudaStream_t)> layers(int64_t tokens, const std::vector<Q4GemmConfig>& c, bool pdl) {
    return [=, this](cudaStream_t s) {
      const bool few = std::all_of(c.begin(), c.end(),
                                   [](const Q4GemmConfig& i) { return i.kernel == Q4GemmKernel::kFew; });
      for (int l = 0; l < kLayers; ++l)
        if (few)
          chain(l, tokens, pdl, s);
        else
          for (int m = 0; m < 4; ++m) product(l, m, tokens, c[m], pdl, s);
    };
  }
  Timer& timer() { return timer_; }
  const uint16_t* x() const { return x_.data(); }
  float* y() const { return y_.data(); }

 private:
  int sms_;
  Timer timer_;
  DeviceBuffer<uint16_t> x_;
  DeviceBuffer<float> y_, residual_;
  DeviceBuffer<std::byte> workspace_, exchange_;
  DeviceBuffer<uint16_t> kv_;
  DeviceBuffer<float> table_, gain_;
  DeviceBuffer<int32_t> position_, sequence_;
  std::vector<DeviceBuffer<uint8_t>> codes_;
  std::vector<DeviceBuffer<uint16_t>> scales_;
};

inline double tflops(double n, double k, double tokens, double us) { return 2 * n * k * tokens / us * 1e-6; }

// Every tile and way of cutting that is not absurd for this count of tokens.
inline std::vector<Q4GemmConfig> cuts(const Q4GemmShape& shape) {
  std::vector<Q4GemmConfig> all;
  const int64_t tokens = shape.tokens;
  for (const Q4GemmTile& t : kQ4GemmSplitTiles) {
    if (t.columns >= 2 * std::max<int64_t>(tokens, 32) || (t.columns * 2 < tokens && t.columns < 128))
      continue;
    for (int splits = 1; splits <= (tokens > 128 ? 2 : kQ4GemmMostSplits); ++splits) {
      all.push_back(q4_gemm_config_split(shape, t, splits));
      if (all.back().splits < splits) all.pop_back();
    }
  }
  if (tokens <= kQ4GemmFewTokens) all.push_back(q4_gemm_config_few(shape));
  for (const Q4GemmTile& t : kQ4GemmStreamTiles) {
    if (t.columns > 2 * tokens) continue;
    for (bool stream : {false, true}) {
      all.push_back(q4_gemm_config_stream(shape, t, stream));
      if (stream && all.back().streamed == 0) all.pop_back();
    }
  }
  return all;
}

// Returns what cuBLAS makes of 8192^3, the peak that attention is measured against.
inline double time_gemm(int sms, bool sweep, const std::vector<int64_t>& counts) {
  LayerBench bench(sms);
  size_t weights = 0;
  for (const LayerMatrix& m : kLayer) weights += kLayers * size_t(m.n * m.k);
  Dense dense(bench.timer(), bench.x(), bench.y(), weights);
  const double peak = tflops(8192, 8192, 8192, dense.microseconds(8192, 8192, 8192, CUDA_R_16F, 5));
  std::printf("\ncuBLAS 8192^3: %.0f TFLOP/s fp16\n", peak);
  std::printf("us a matrix; 7B layer, g128, weights rotated over %d layers; PDL; ours and cuBLAS in turn\n",
              kLayers);
  for (int64_t t : counts) {
    std::vector<Q4GemmConfig> chosen, best;
    double flops = 0;
    for (int m = 0; m < 4; ++m) {
      flops += 2.0 * kLayer[m].n * kLayer[m].k * t;
      const Q4GemmShape shape = bench.shape(m, t);
      std::vector<Q4GemmConfig> configs = {q4_gemm_config(shape)};
      if (sweep) {
        const std::vector<Q4GemmConfig> more = cuts(shape);
        configs.insert(configs.end(), more.begin(), more.end());
      }
      std::vector<std::function<void(cudaStream_t)>> works = {[&](cudaStream_t) {
        for (int l = 0; l < kLayers; ++l) dense.product(kLayer[m].n, kLayer[m].k, t, CUDA_R_16F);
      }};
      for (const Q4GemmConfig& c : configs) works.push_back(bench.one(m, t, c));
      std::vector<double> us = bench.timer().alternate(works, t >= 2048 ? 6000 : 2000, 5);
      for (double& v : us) v /= kLayers;
      std::printf("M %5lld %-8s cuBLAS %8.1f  ours %8.1f  %s\n", (long long)t, kLayer[m].name, us[0], us[1],
                  configs[0].print().c_str());
      const size_t fastest = size_t(std::min_element(us.begin() + 1, us.end()) - us.begin());
      for (size_t i = 2; i < us.size(); ++i)
        std::printf("  %8.1f%s %s\n", us[i], i == fastest ? " *" : "  ", configs[i - 1].print().c_str());
      chosen.push_back(configs[0]), best.push_back(configs[fastest - 1]);
    }
    std::vector<std::function<void(cudaStream_t)>> works = {bench.layers(t, chosen, true), [&](cudaStream_t) {
                                                              for (int l = 0; l < kLayers; ++l)
                                                                for (const LayerMatrix& m : kLayer)
                                                                  dense.product(m.n, m.k, t, CUDA_R_16F);
                                                            }};
    if (sweep) works.push_back(bench.layers(t, best, true));
    // Without a break a card at its power limit falls to its lasting clock.
    std::vector<double> lasting = bench.timer().alternate(works, 200000, 3);
    // What one prompt or step takes where nothing ran before: a launch of so many layers each time.
    constexpr int kModel = 32;
    std::vector<std::function<void(cudaStream_t)>> models;
    for (const auto& work : works)
      models.push_back([work](cudaStream_t s) {
        for (int l = 0; l < kModel; l += kLayers) work(s);
      });
    std::vector<double> rested = bench.timer().alternate(models, 0, 5, 100000);
    works.push_back(bench.layers(t, chosen, false));
    std::vector<double> us = bench.timer().alternate(works, t >= 2048 ? 20000 : 8000, 7);
    for (double& v : us) v /= kLayers;
    for (double& v : lasting) v /= kLayers;
    for (double& v : rested) v /= kModel;
    std::printf(
        "M %5lld layer: %8.1f us %4.0f TFLOP/s (no PDL %.1f) | cuBLAS fp16 %.1f, ratio %.3f | 0.2 s at a "
        "time: %.1f, cuBLAS "
        "%.1f, ratio %.3f | %d layers after a rest: %.1f, cuBLAS %.1f, ratio %.3f\n",
        (long long)t, us[0], flops / us[0] * 1e-6, us.back(), us[1], us[1] / us[0], lasting[0], lasting[1],
        lasting[1] / lasting[0], kModel, rested[0], rested[1], rested[1] / rested[0]);
    if (sweep)
      std::printf("M %5lld best of sweep: %.1f us, ratio %.3f | 0.2 s at a time: %.1f, ratio %.3f\n",
                  (long long)t, us[2], us[1] / us[2], lasting[2], lasting[1] / lasting[2]);
    std::fflush(stdout);
  }
  return peak;
}

// The four products more than once, alone and as a chain, for a profiler to look at the second.
inline void profile_gemm(int sms, int64_t tokens) {
  LayerBench bench(sms);
  for (int layer = 0; layer < 2; ++layer)
    for (int m = 0; m < 4; ++m)
      bench.product(layer, m, tokens, q4_gemm_config(bench.shape(m, tokens)), false, bench.timer().stream());
  for (int layer = 0; layer < 2 && tokens <= kQ4GemmFewTokens; ++layer)
    bench.chain(layer, tokens, false, bench.timer().stream());
  cuda_check(cudaDeviceSynchronize(), "products");
}

}  // namespace q4s
