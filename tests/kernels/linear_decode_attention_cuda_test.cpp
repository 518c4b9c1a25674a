// Chains of decode products with attention in them: the same as products and attention one by one, the same
// bits when run again. Positions at both ends of what the lanes share out, heads of every width.
#include <cmath>
#include <cstring>
#include <memory>

#include "kernels/attention.h"
#include "kernels/half.h"
#include "kernels/linear_decode.h"
#include "tests/kernels/device_guarded.h"
#include "tests/kernels/guarded.h"

using namespace q4s;

namespace {

struct Sizes {
  int64_t hidden, ffn, head_dim, heads, kv_heads;
};

// A weight of random codes in the order of the tiles, which any bytes are.
struct RandomWeight {
  Q4Layout layout;
  DeviceGuarded<uint8_t> codes;
  DeviceGuarded<uint16_t> scales;

  RandomWeight(const Q4Layout& l, uint64_t seed)
      : layout(l), codes(l.code_bytes()), scales(l.scale_bytes() / 2) {
    std::vector<uint8_t> bytes(size_t(l.code_bytes()));
    fill_bytes(bytes, seed);
    codes.put(bytes);
    std::vector<uint16_t> s(size_t(l.scale_bytes() / 2));
    for (size_t i = 0; i < s.size(); ++i)
      s[i] = float_to_half((i % 3 ? 0.5f : -0.5f) / std::sqrt(float(l.k)));
    scales.put(s);
  }
  TiledWeight tiled() { return {layout, Grid::kHalf, codes.data(), scales.data()}; }
};

// What one decoding step does to a residual stream, from the first layer's qkv to the last one's down.
class Step {
 public:
  // Token t stands at `position` / (t + 1) of sequence t + 1. products: of a layer; with two of them, o is
  // added to nothing.
  Step(const Sizes& s, int layers, int32_t position, int64_t tokens, int products = 4)
      : s_(s),
        tokens_(tokens),
        context_(position + 3),
        layers_(layers),
        products_(products),
        q_(s.heads * s.head_dim),
        kv_(s.kv_heads * s.head_dim),
        gain_(s.hidden),
        table_(context_ * s.head_dim),
        stream_(tokens * s.hidden),
        dq_(tokens * q_),
        attended_(tokens * q_),
        hidden_(tokens * s.ffn),
        position_(tokens),
        sequence_(tokens),
        exchange_(kLinearDecodeExchange) {
    std::vector<float> v(static_cast<size_t>(s.hidden));
    fill_normal(v, 1), gain_.put(v);
    v.resize(size_t(context_ * s.head_dim));
    for (size_t i = 0; i < v.size(); ++i) v[i] = i % 2 ? 0.8f : 0.6f;
    table_.put(v);
    std::vector<int32_t> positions, sequences;
    for (int32_t t = 0; t < tokens; ++t) positions.push_back(position / (t + 1)), sequences.push_back(t + 1);
    position_.put(positions), sequence_.put(sequences);
    exchange_.put(std::vector<uint8_t>(kLinearDecodeExchange));
    for (int l = 0; l < layers; ++l) {
      const auto add = [&](const Q4Layout& layout) {
        weights_.push_back(std::make_unique<RandomWeight>(layout, weights_.size()));
      };
      add({.n = q_ + 2 * kv_,
           .k = s.hidden,
           .group = 128,
           .map = RowMap::kRope,
           .head_dim = s.head_dim,
           .rotated = q_ + kv_});
      add({.n = s.hidden, .k = q_, .group = 64});
      add({.n = 2 * s.ffn, .k = s.hidden, .group = 32, .map = RowMap::kPairHalves});
      add({.n = s.hidden, .k = s.ffn, .group = 128});
      for (auto* cache : {&keys_, &values_})
        cache->push_back(std::make_unique<DeviceGuarded<uint16_t>>((tokens_ + 1) * context_ * kv_));
    }
    reset();
  }

  // Puts back what a step changes.
  void reset(bool caches = true) {
    std::vector<float> x(static_cast<size_t>(tokens_ * s_.hidden));
    fill_normal(x, 2), stream_.put(x);
    for (size_t l = 0; caches && l < size_t(layers_); ++l)
      for (auto* cache : {keys_[l].get(), values_[l].get()}) {
        std::vector<float> some(65521);
        fill_normal(some, 3 + l);
        std::vector<uint16_t> halves(some.size()), all;
        for (size_t i = 0; i < some.size(); ++i) halves[i] = float_to_half(some[i]);
        for (size_t i = 0; i < size_t((tokens_ + 1) * context_ * kv_); ++i)
          all.push_back(halves[i % halves.size()]);
        cache->put(all);
      }
  }
  // longest: what the chain is told, any bound of the positions.
  void run_chain(int64_t longest) {
    longest_ = longest;
    std::vector<LinearDecodeArgs> chain;
    for (int i = 0; i < layers_ * products_; ++i) chain.push_back(product(i / products_ * 4 + i % products_));
    for (size_t i = 1; i < chain.size(); ++i) REQUIRE(linear_decode_follows(chain[i], chain[i - 1]));
    linear_decode_cuda(chain.data(), chain.size(), exchange(), nullptr, true);
    cuda_check(cudaDeviceSynchronize(), "chain");
  }
  void run_parts() {
    for (int i = 0; i < 4 * layers_; ++i) {
      if (i % 4 >= products_) continue;
      LinearDecodeArgs a = product(i);
      if (a.attends) round_queries();
      if (a.attends && products_ == 2)
        attend_exactly(size_t(i / 4));
      else if (a.attends)
        attention_reference_cuda({dq_.data(), a_at(), cache(i / 4), attended_.data(), tokens_, s_.heads,
                                  s_.kv_heads, s_.head_dim, nullptr},
                                 nullptr);
      a.attends = false;
      linear_decode_cuda(&a, 1, exchange(), nullptr, false);
    }
    cuda_check(cudaDeviceSynchronize(), "parts");
  }
  std::vector<float> stream() { return stream_.get(); }
  std::vector<uint16_t> keys(size_t layer) { return keys_[layer]->get(); }
  std::vector<uint16_t> values(size_t layer) { return values_[layer]->get(); }

 private:
  // As a chain hands them on: 16 significant bits.
  void round_queries() {
    std::vector<float> q = dq_.get();
    for (float& v : q) {
      uint32_t bits;
      std::memcpy(&bits, &v, 4);
      bits = (bits + 0x80) & 0xffffff00u;
      std::memcpy(&v, &bits, 4);
    }
    dq_.put(q);
  }
  // Attention in double precision over the cache as it is stored.
  void attend_exactly(size_t layer) {
    const std::vector<float> q = dq_.get();
    const std::vector<uint16_t> k = keys(layer), v = values(layer);
    const std::vector<int32_t> position = position_.get(), sequence = sequence_.get();
    std::vector<float> y(q.size());
    const int64_t dim = s_.head_dim;
    for (int64_t row = 0; row < tokens_ * s_.heads; ++row) {
      const int64_t token = row / s_.heads, head = row % s_.heads / (s_.heads / s_.kv_heads);
      const auto at = [&](int64_t j) {
        return size_t((sequence[size_t(token)] * context_ + j) * kv_ + head * dim);
      };
      std::vector<double> weight(size_t(position[size_t(token)]) + 1), sum(static_cast<size_t>(dim));
      double total = 0;
      for (size_t j = 0; j < weight.size(); ++j) {
        double score = 0;
        for (int64_t d = 0; d < dim; ++d)
          score += double(q[size_t(row * dim + d)]) * double(half_to_float(k[at(int64_t(j)) + size_t(d)]));
        total += weight[j] = std::exp(score / std::sqrt(double(dim)));
        for (int64_t d = 0; d < dim; ++d)
          sum[size_t(d)] += weight[j] * double(half_to_float(v[at(int64_t(j)) + size_t(d)]));
      }
      for (int64_t d = 0; d < dim; ++d) y[size_t(row * dim + d)] = float(sum[size_t(d)] / total);
    }
    attended_.put(y);
  }
  Placement a_at() { return {position_.data(), sequence_.data()}; }
  KvLayer cache(int layer) {
    return {keys_[size_t(layer)]->data(), values_[size_t(layer)]->data(), KvType::kF16, context_};
  }
  std::byte* exchange() { return reinterpret_cast<std::byte*>(exchange_.data()); }
  LinearDecodeArgs product(int i) {
    LinearDecodeArgs a{
        .x = stream_.data(), .w = weights_[size_t(i)]->tiled(), .y = stream_.data(), .tokens = tokens_};
    const int kind = i % 4;
    if (kind == 0 || kind == 2) a.gain = gain_.data(), a.eps = 1e-5f;
    if (products_ == 4 && (kind == 1 || kind == 3)) a.residual = stream_.data();
    if (kind == 0) {
      a.epilogue = Epilogue::kRopeKv, a.y = dq_.data();
      a.table = table_.data(), a.at = a_at(), a.kv = cache(i / 4), a.heads = s_.heads,
      a.kv_heads = s_.kv_heads;
    } else if (kind == 1) {
      a.x = attended_.data(), a.attends = true, a.longest = longest_;
    } else if (kind == 2) {
      a.epilogue = Epilogue::kSwiglu, a.y = hidden_.data();
    } else {
      a.x = hidden_.data();
    }
    return a;
  }

  Sizes s_;
  int64_t tokens_, context_, longest_ = 0;
  int layers_, products_;
  int64_t q_, kv_;
  DeviceGuarded<float> gain_, table_, stream_, dq_, attended_, hidden_;
  DeviceGuarded<int32_t> position_, sequence_;
  DeviceGuarded<uint8_t> exchange_;
  std::vector<std::unique_ptr<RandomWeight>> weights_;
  std::vector<std::unique_ptr<DeviceGuarded<uint16_t>>> keys_, values_;
};

// x is rounded to a step of 1 / 32639 of the largest of its 128 columns. Attention in the chain differs from
// the definition by f32 sums; what that changes are roundings that stood at an edge.
void check(const Sizes& s, int layers, int32_t position, double bound, int64_t tokens = 1, int products = 4) {
  if (quick() > 0 && (s.hidden > (quick() > 1 ? 300 : 600) || (position != 0 && position % 64 != 1))) return;
  const int runs = quick() > 1 ? 1 : products == 2 ? 20 : 5;
  CAPTURE(s.head_dim);
  CAPTURE(layers);
  CAPTURE(position);
  CAPTURE(tokens);
  CAPTURE(products);
  Step step(s, layers, position, tokens, products);
  step.run_parts();
  const std::vector<float> want = step.stream();
  const std::vector<uint16_t> first_keys = step.keys(0), first_values = step.values(0);
  // A block for each head, where that may be, and shared out.
  for (const int64_t longest : {int64_t(position) + 1, int64_t(1) << 20}) {
    CAPTURE(longest);
    std::vector<float> got;
    std::vector<uint16_t> last;
    for (int run = 0; run < runs; ++run) {
      step.reset(run % 5 == 0 || products == 4);  // a step reads nothing that it stores there
      step.run_chain(longest);
      if (run == 0) {
        got = step.stream();
        last = step.keys(size_t(layers - 1));
      }
      REQUIRE(step.stream() == got);
      if (run % 5 != 0 && products == 2) continue;
      REQUIRE(step.keys(size_t(layers - 1)) == last);
      REQUIRE(step.keys(0) == first_keys);
      REQUIRE(step.values(0) == first_values);
    }
    double error = 0, size = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      error += double(got[i] - want[i]) * double(got[i] - want[i]);
      size += double(want[i]) * double(want[i]);
    }
    CHECK(error <= bound * size);
  }
}

}  // namespace

TEST_CASE("linear_decode on the device: attention in a chain") {
  if (no_device()) return;
  for (const Sizes& s : {Sizes{576, 1536, 64, 9, 3}, Sizes{512, 512, 128, 4, 4}, Sizes{640, 512, 80, 8, 2},
                         Sizes{288, 768, 48, 6, 6}, Sizes{768, 256, 96, 8, 1}, Sizes{64, 172, 16, 4, 2}})
    for (int32_t position : {0, 1, 15, 16, 63, 64, 127, 128, 129, 300, 511}) check(s, 1, position, 1e-8);
}

TEST_CASE("linear_decode on the device: attention of several tokens in a chain") {
  if (no_device()) return;
  for (int64_t tokens = 2; tokens <= linear_decode_chain_tokens(4); ++tokens)
    for (int32_t position : {0, 3, 200, 511}) {
      check({288, 768, 48, 6, 6}, 1, position, 1e-8, tokens);
      check({576, 1536, 64, 9, 3}, 1, position, 1e-8, tokens);
      check({1024, 2816, 128, 8, 2}, 3, position, 1e-6, tokens);
    }
}

TEST_CASE("linear_decode on the device: more tokens and kv heads in a chain than multiprocessors") {
  if (no_device()) return;
  for (int64_t tokens : {int64_t(4), linear_decode_chain_tokens(4)})
    for (int32_t position : {0, 65, 511}) check({256, 256, 16, 48, 48}, 2, position, 1e-6, tokens);
}

// Shared out among blocks or not, in all ways that heads share keys.
TEST_CASE("linear_decode on the device: attention in a chain over long caches") {
  if (no_device()) return;
  for (const Sizes& s : {Sizes{256, 256, 64, 4, 4}, Sizes{256, 256, 128, 8, 2}, Sizes{256, 256, 80, 8, 1},
                         Sizes{256, 256, 96, 6, 6}, Sizes{256, 256, 128, 16, 2}, Sizes{64, 172, 16, 4, 2}})
    for (int32_t position : {255, 511, 513, 1000, 5000})
      for (int64_t tokens : {int64_t(1), int64_t(2), int64_t(4), linear_decode_chain_tokens(4)})
        if (quick() < 2 || tokens == 1 || tokens > 4) check(s, 1, position, 1e-8, tokens, 2);
}

TEST_CASE("linear_decode on the device: a whole step as one chain") {
  if (no_device()) return;
  for (int32_t position : {0, 77, 511, 3000}) check({1024, 2816, 128, 8, 2}, 8, position, 1e-6);
}

TEST_CASE("linear_decode on the device: a chain of as many products as there may be") {
  if (no_device()) return;
  check({64, 172, 16, 4, 2}, kLinearDecodeChain / 4, 65, 1e-6);
}

TEST_CASE("linear_decode on the device: what may not follow in a chain") {
  if (no_device()) return;
  const float* none = nullptr;
  LinearDecodeArgs qkv{
      .x = none,
      .w = {.layout = {.n = 96, .k = 32, .group = 32, .map = RowMap::kRope, .head_dim = 16, .rotated = 64}},
      .epilogue = Epilogue::kRopeKv,
      .y = nullptr,
      .tokens = 1};
  qkv.kv = {nullptr, nullptr, KvType::kF16, 8}, qkv.heads = 2, qkv.kv_heads = 2;
  LinearDecodeArgs o{.x = none, .w = {.layout = {.n = 32, .k = 32, .group = 32}}, .y = nullptr, .tokens = 1};
  CHECK(!linear_decode_follows(o, qkv));
  o.attends = true;
  CHECK(linear_decode_follows(o, qkv));
  CHECK(!linear_decode_follows(o, o));
  qkv.kv.type = KvType::kF32;
  CHECK(!linear_decode_follows(o, qkv));
  qkv.kv.type = KvType::kF16, qkv.w.layout.head_dim = 256;
  CHECK(!linear_decode_follows(o, qkv));
  qkv.w.layout.head_dim = 16, qkv.heads = 18;
  CHECK(!linear_decode_follows(o, qkv));
  qkv.heads = qkv.kv_heads = 200;
  CHECK(linear_decode_follows(o, qkv));
  o.tokens = qkv.tokens = 4;
  CHECK(!linear_decode_follows(o, qkv));
}
