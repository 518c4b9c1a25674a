// Decode attention on the device against the definition: head sizes, shared heads, lengths, both cache types.
#include <cmath>

#include "kernels/attention_decode.h"
#include "kernels/half.h"
#include "tests/kernels/device_guarded.h"
#include "tests/kernels/guarded.h"

using namespace q4s;

namespace {

struct Case {
  int64_t heads, kv_heads, head_dim, ctx;
  std::vector<int32_t> position, sequence;
  KvType type = KvType::kF16;
};

void check(const Case& c) {
  CAPTURE(c.heads);
  CAPTURE(c.kv_heads);
  CAPTURE(c.head_dim);
  CAPTURE(c.ctx);
  CAPTURE(int(c.type));
  const int64_t tokens = int64_t(c.position.size()), width = c.kv_heads * c.head_dim, sequences = 2;
  std::vector<float> q(size_t(tokens * c.heads * c.head_dim)), values(size_t(2 * sequences * c.ctx * width));
  fill_normal(q, 1);
  fill_normal(values, 2);
  std::vector<uint8_t> cache(values.size() * size_t(kv_type_bytes(c.type)));
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t h = float_to_half(values[i]);
    c.type == KvType::kF32 ? std::memcpy(&cache[4 * i], &values[i], 4) : std::memcpy(&cache[2 * i], &h, 2);
  }
  // Rows never written hold anything: NaN here.
  for (int64_t s = 0; s < sequences; ++s) {
    int32_t last = -1;
    for (int64_t t = 0; t < tokens; ++t)
      if (c.sequence[t] == s) last = std::max(last, c.position[t]);
    const int64_t bytes = width * kv_type_bytes(c.type);
    for (int64_t plane = 0; plane < 2; ++plane)
      for (int64_t r = last + 1; r < c.ctx; ++r)
        std::memset(&cache[((plane * sequences + s) * c.ctx + r) * bytes], 0xff, size_t(bytes));
  }
  std::vector<float> want(q.size());
  const size_t half = cache.size() / 2;
  attention_cpu({.q = q.data(),
                 .at = {c.position.data(), c.sequence.data()},
                 .kv = {cache.data(), cache.data() + half, c.type, c.ctx},
                 .y = want.data(),
                 .tokens = tokens,
                 .heads = c.heads,
                 .kv_heads = c.kv_heads,
                 .head_dim = c.head_dim,
                 .scratch = nullptr});

  DeviceGuarded<float> dq{std::span<const float>(q)}, dy(int64_t(q.size()));
  DeviceGuarded<uint8_t> dk{std::span<const uint8_t>(cache).first(half)},
      dv{std::span<const uint8_t>(cache).last(half)};
  DeviceGuarded<int32_t> dposition{std::span<const int32_t>(c.position)},
      dsequence{std::span<const int32_t>(c.sequence)};
  AttentionDecodeArgs a{.q = dq.data(),
                        .at = {dposition.data(), dsequence.data()},
                        .kv = {dk.data(), dv.data(), c.type, c.ctx},
                        .y = dy.data(),
                        .tokens = tokens,
                        .heads = c.heads,
                        .kv_heads = c.kv_heads,
                        .head_dim = c.head_dim,
                        .longest = c.ctx};
  std::vector<float> first;
  for (int again = 0; again < 3; ++again) {
    attention_decode_cuda(a, nullptr, again == 2);
    cuda_check(cudaDeviceSynchronize(), "attention_decode");
    const std::vector<float> y = dy.get();
    if (again) {
      REQUIRE(y == first);
      continue;
    }
    first = y;
    double error = 0, size = 0;
    for (size_t i = 0; i < y.size(); ++i) {
      error += (double(y[i]) - want[i]) * (double(y[i]) - want[i]);
      size += double(want[i]) * want[i];
      // q is rounded to fp16 (logits of these normal values by less than 2e-3 in all), weights to fp16: a
      // mean of values of size ~1..4 moves by less than this.
      REQUIRE(std::abs(double(y[i]) - want[i]) <= (c.type == KvType::kF32 ? 2e-5 : 8e-3));
    }
    REQUIRE(error <= size * (c.type == KvType::kF32 ? 1e-11 : 1e-6));
  }
}

}  // namespace

TEST_CASE("attention_decode on the device") {
  if (no_device()) return;
  for (int64_t hd : {8, 16, 40, 48, 64, 80, 96, 128, 160, 192, 256})
    for (auto [heads, kv_heads] : {std::pair<int64_t, int64_t>{2, 2}, {6, 2}, {8, 1}, {22, 2}})
      check({heads, kv_heads, hd, 70, {0, 15, 16, 69, 33}, {0, 1, 0, 1, 0}});
  for (int64_t hd : {3, 20, 64, 130})
    for (KvType type : {KvType::kF16, KvType::kF32}) check({6, 2, hd, 40, {0, 7, 39}, {0, 1, 1}, type});
}

TEST_CASE("attention_decode on the device: split over a cluster") {
  if (no_device()) return;
  for (int32_t length : {1, 100, 128, 129, 700, 1531})
    for (auto [heads, kv_heads] : {std::pair<int64_t, int64_t>{8, 2}, {32, 32}, {64, 8}})
      check({heads, kv_heads, 64, 1600, {length - 1}, {0}});
  check({32, 8, 128, 3000, {2999, 5, 1400}, {0, 0, 1}});
}
