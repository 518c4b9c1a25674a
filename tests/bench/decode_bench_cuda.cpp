// The products of a decoding step on real shapes: microseconds, bytes per second and the share of the read
// speed measured in the same run, in a graph of dependent launches. Weights of eight layers in turn, so that
// none comes from the L2 cache.
//   decode_bench_cuda [SHAPE...]    7b 8b 13b 70b tinyllama; default: 7b 8b
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>

#include "device_buffer.h"
#include "graph_timer.h"
#include "kernels/linear_decode.h"
#include "kernels/read_sweep.h"

using namespace q4s;

namespace {

constexpr int kLayers = 8, kMostTokens = 8, kContext = 16;

struct Shape {
  const char* name;
  int64_t hidden, ffn, heads, kv_heads, head_dim;
};
constexpr Shape kShapes[] = {{"7b", 4096, 11008, 32, 32, 128},
                             {"8b", 4096, 14336, 32, 8, 128},
                             {"13b", 5120, 13824, 40, 40, 128},
                             {"70b", 8192, 28672, 64, 8, 128},
                             {"tinyllama", 2048, 5632, 32, 4, 64}};

struct Linear {
  const char* name;
  Q4Layout layout;
  Epilogue epilogue;
};

// The four products between two attentions with random weights, and what they read and write.
class Layers {
 public:
  Layers(const Shape& s, int64_t group, Grid grid) : shape_(s) {
    const int64_t q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim;
    linears = {{"o", {.n = s.hidden, .k = q, .group = group}, Epilogue::kNone},
               {"gate_up",
                {.n = 2 * s.ffn, .k = s.hidden, .group = group, .map = RowMap::kPairHalves},
                Epilogue::kSwiglu},
               {"down", {.n = s.hidden, .k = s.ffn, .group = group}, Epilogue::kNone},
               {"qkv",
                {.n = q + 2 * kv,
                 .k = s.hidden,
                 .group = group,
                 .map = RowMap::kRope,
                 .head_dim = s.head_dim,
                 .rotated = q + kv},
                Epilogue::kRopeKv}};
    std::mt19937_64 rng(1);
    for (int layer = 0; layer < kLayers; ++layer)
      for (const Linear& l : linears) {
        std::vector<uint8_t> codes(size_t(l.layout.code_bytes()));
        for (size_t i = 0; i + 8 <= codes.size(); i += 8) {
          const uint64_t r = rng();
          std::memcpy(&codes[i], &r, 8);
        }
        std::vector<uint16_t> scales(size_t(l.layout.scale_bytes() / 2));
        for (size_t i = 0; i < scales.size(); ++i) scales[i] = i % 2 ? 0x9800 : 0x1800;  // +- 0.002
        codes_.emplace_back(codes);
        scales_.emplace_back(scales);
        weights_.push_back({l.layout, grid, codes_.back().data(), scales_.back().data()});
      }
    std::normal_distribution<float> normal;
    std::vector<float> values(size_t(kMostTokens * std::max(s.ffn, std::max(s.hidden, q))));
    for (float& v : values) v = normal(rng);
    for (DeviceBuffer<float>* b : {&x_, &q_, &hidden_, &gain_, &table_}) *b = DeviceBuffer<float>(values);
    position_ = DeviceBuffer<int32_t>(std::vector<int32_t>(kMostTokens, 0));
    exchange_ = DeviceBuffer<uint8_t>(std::vector<uint8_t>(kLinearDecodeExchange));
    keys_ = DeviceBuffer<uint16_t>(size_t(kContext * kv));
    values_ = DeviceBuffer<uint16_t>(size_t(kContext * kv));
  }

  // Products [first, last) of a layer, as one chain.
  void launch(int layer, size_t first, size_t last, int64_t tokens, cudaStream_t stream) const {
    std::vector<LinearDecodeArgs> chain;
    for (size_t i = first; i < last; ++i) chain.push_back(product(layer, i, tokens));
    std::byte* exchange = reinterpret_cast<std::byte*>(exchange_.data());
    if (tokens <= linear_decode_chain_tokens(4))
      linear_decode_cuda(chain.data(), chain.size(), exchange, stream, true);
    else
      for (const LinearDecodeArgs& a : chain) linear_decode_cuda(&a, 1, exchange, stream, true);
  }
  // All layers as one chain, attention over a token or two between them.
  void launch_all(int64_t tokens, cudaStream_t stream) const {
    std::vector<LinearDecodeArgs> chain;
    for (int layer = 0; layer < kLayers; ++layer)
      for (size_t i = 0; i < linears.size(); ++i) {
        chain.push_back(product(layer, i, tokens));
        chain.back().attends = i == 0 && layer > 0;
        chain.back().longest = kContext;
      }
    linear_decode_cuda(chain.data(), chain.size(), reinterpret_cast<std::byte*>(exchange_.data()), stream,
                       true);
  }
  LinearDecodeArgs product(int layer, size_t i, int64_t tokens) const {
    LinearDecodeArgs a{.x = i == 0   ? q_.data()
                            : i == 2 ? hidden_.data()
                                     : x_.data(),
                       .w = weights_[size_t(layer) * linears.size() + i],
                       .epilogue = linears[i].epilogue,
                       .y = i == 1   ? hidden_.data()
                            : i == 3 ? q_.data()
                                     : x_.data(),
                       .tokens = tokens};
    if (i % 2 == 1) a.gain = gain_.data(), a.eps = 1e-5f;
    if (i % 2 == 0) a.residual = x_.data();
    if (i == 3) {
      a.table = table_.data();
      a.at = {position_.data(), position_.data()};
      a.kv = {keys_.data(), values_.data(), KvType::kF16, kContext};
      a.heads = shape_.heads, a.kv_heads = shape_.kv_heads;
    }
    return a;
  }

  std::vector<Linear> linears;

 private:
  Shape shape_;
  std::vector<DeviceBuffer<uint8_t>> codes_;
  std::vector<DeviceBuffer<uint16_t>> scales_;
  std::vector<TiledWeight> weights_;
  DeviceBuffer<float> x_, q_, hidden_, gain_, table_;
  DeviceBuffer<int32_t> position_;
  DeviceBuffer<uint8_t> exchange_;
  DeviceBuffer<uint16_t> keys_, values_;
};

double bytes_of(const Linear& l) { return double(l.layout.code_bytes() + l.layout.scale_bytes()); }

void report(const char* what, double us, double bytes, double speed) {
  std::printf("  %-28s %7.2f us  %6.0f GB/s  %.3f of read\n", what, us, bytes / us / 1e3,
              bytes / us * 1e6 / speed);
}

void bench(const Shape& s, int64_t group, Grid grid, bool each, double speed, Timer& timer) {
  constexpr int kRepeats = 15;
  const Layers layers(s, group, grid);
  std::printf("%s, groups of %d, %s grid\n", s.name, int(group),
              grid == Grid::kInt ? "integer" : "half-step");
  double bytes = 0;
  for (const Linear& l : layers.linears) bytes += bytes_of(l);
  for (const int tokens : {1, 2, 4, 8}) {
    const double us = timer.microseconds(
        [&](cudaStream_t stream) {
          for (int layer = 0; layer < kLayers; ++layer)
            layers.launch(layer, 0, layers.linears.size(), tokens, stream);
        },
        kRepeats);
    report(("a layer, " + std::to_string(tokens) + " tokens").c_str(), us / kLayers, bytes, speed);
    if (tokens > linear_decode_chain_tokens(4)) continue;
    const double all =
        timer.microseconds([&](cudaStream_t stream) { layers.launch_all(tokens, stream); }, kRepeats);
    report("  and attention, all in one", all / kLayers, bytes, speed);
  }
  for (size_t i = 0; each && i < layers.linears.size(); ++i) {
    const double us = timer.microseconds(
        [&](cudaStream_t stream) {
          for (int r = 0; r < 4; ++r)
            for (int layer = 0; layer < kLayers; ++layer) layers.launch(layer, i, i + 1, 1, stream);
        },
        kRepeats);
    report(layers.linears[i].name, us / (4 * kLayers), bytes_of(layers.linears[i]), speed);
  }
}

}  // namespace

int main(int argc, char** argv) {
  cudaDeviceProp p;
  if (cudaGetDeviceProperties(&p, 0) != cudaSuccess) {
    std::printf("SKIPPED: no GPU\n");
    return 0;
  }
  Timer timer;
  const double speed = read_sweep_cuda(timer.stream());
  std::printf("%s, read speed %.0f GB/s\n", p.name, speed / 1e9);
  std::vector<std::string> names(argv + 1, argv + argc);
  if (names.empty()) names = {"7b", "8b"};
  for (const Shape& s : kShapes) {
    if (std::find(names.begin(), names.end(), s.name) == names.end()) continue;
    bench(s, 128, Grid::kInt, true, speed, timer);
    if (!getenv("Q4S_ALL")) continue;
    bench(s, 128, Grid::kHalf, false, speed, timer);
    bench(s, 64, Grid::kInt, false, speed, timer);
  }
}
