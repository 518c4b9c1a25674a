// Decode attention on the device against the definition: head sizes, shared heads, lengths, both cache types.
#include <cmath>
#include <limits>

#include "kernels/attention_decode.h"
#include "kernels/convert.h"
#include "kernels/half.h"
#include "tests/kernels/device_guarded.h"
#include "tests/kernels/guarded.h"

using namespace q4s;

namespace {

int multiprocessors() {
  int n = 0;
  cuda_check(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, 0), "multiprocessors");
  return n;
}

struct Case {
  int64_t heads, kv_heads, head_dim, ctx;
  std::vector<int32_t> position, sequence;
  KvType type = KvType::kF16;
  int runs = 3;  // that must agree to the bit
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
  DeviceGuarded<std::byte> scratch(int64_t(attention_decode_scratch_bytes(multiprocessors())));
  cuda_check(cudaMemset(scratch.data(), 0, kAttentionDecodeCounters), "cudaMemset");
  AttentionDecodeArgs a{.q = dq.data(),
                        .at = {dposition.data(), dsequence.data()},
                        .kv = {dk.data(), dv.data(), c.type, c.ctx},
                        .y = dy.data(),
                        .y_half = false,
                        .tokens = tokens,
                        .heads = c.heads,
                        .kv_heads = c.kv_heads,
                        .head_dim = c.head_dim,
                        .longest = c.ctx,
                        .fresh = tokens,
                        .scratch = scratch.data()};
  std::vector<float> first;
  const int runs = quick() > 1 ? 1 : c.runs;
  for (int again = 0; again < runs; ++again) {
    attention_decode_cuda(a, nullptr, again % 3 == 2);
    cuda_check(cudaDeviceSynchronize(), "attention_decode");
    const std::vector<float> y = dy.get();
    if (again) {
      REQUIRE(y == first);
      continue;
    }
    first = y;
    // q is rounded to fp16 (logits of these normal values by less than 2e-3 in all), weights to fp16: a mean
    // of values of size ~1..4 moves by less than this.
    const double most = c.type == KvType::kF32 ? 2e-5 : 8e-3;
    double error = 0, size = 0;
    int64_t wrong = 0;
    for (size_t i = 0; i < y.size(); ++i) {
      const double off = double(y[i]) - want[i];
      error += off * off;
      size += double(want[i]) * want[i];
      wrong += !(std::abs(off) <= most);
    }
    REQUIRE(wrong == 0);
    REQUIRE(error <= size * (c.type == KvType::kF32 ? 1e-11 : 1e-6));
  }
  if (c.type == KvType::kF32 || c.head_dim % 8 != 0) return;
  DeviceGuarded<uint16_t> dy_half(int64_t(q.size()));
  a.y = dy_half.data(), a.y_half = true;
  attention_decode_cuda(a, nullptr, true);
  cuda_check(cudaDeviceSynchronize(), "attention_decode");
  std::vector<uint16_t> rounded;
  for (const float v : first) rounded.push_back(float_to_half(v));
  REQUIRE(dy_half.get() == rounded);
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

TEST_CASE("attention_decode on the device: a cache in parts") {
  if (no_device()) return;
  for (int32_t length : {1, 100, 128, 129, 700, 1531})
    for (auto [heads, kv_heads] : {std::pair<int64_t, int64_t>{8, 2}, {32, 32}, {64, 8}})
      check({heads, kv_heads, 64, 1600, {length - 1}, {0}});
  for (int64_t group = 1; group <= 8; ++group)
    for (int64_t hd : {32, 64, 80, 96, 128}) {
      if (quick() > 1 && (hd > 64 || (group & (group - 1)) != 0)) continue;
      check({2 * group, 2, hd, 2600, {2590 - int32_t(group)}, {1}});
    }
  check({32, 8, 128, 3000, {2999, 5, 1400}, {0, 0, 1}, KvType::kF16, 20});
  check({32, 4, 64, 6000, {5999}, {0}, KvType::kF16, 20});
  check({24, 2, 160, 6000, {5000, 5001}, {0, 0}, KvType::kF16, 20});
}

TEST_CASE("attention_decode on the device: a warp for each row") {
  if (no_device()) return;
  Case c{64, 32, 128, 256, {}, {}};
  for (int32_t t = 0; t < 9; ++t) c.position.push_back(t * 37 % 256), c.sequence.push_back(t % 2);
  c.position[3] = 255;
  for (int64_t hd : {8, 40, 64, 80, 128, 256})
    for (int64_t heads : {32, 64}) {
      c.head_dim = hd, c.heads = heads;
      check(c);
    }
  c.head_dim = 64, c.heads = 40, c.kv_heads = 20, c.runs = 20;
  check(c);
}

TEST_CASE("attention_decode on the device: many sequences") {
  if (no_device()) return;
  Case c{32, 32, 128, 70, {}, {}};
  for (int32_t t = 0; t < 86; ++t) c.position.push_back(t * 7 % 70), c.sequence.push_back(t % 2);
  for (int64_t hd : {40, 64, 80, 128, 256})
    for (int64_t kv_heads : {32, 8}) {
      c.head_dim = hd, c.kv_heads = kv_heads;
      check(c);
    }
}

// Dependent launches: what is not fresh is read early, the newest row and the queries are not.
TEST_CASE("attention_decode on the device: behind the work that writes its newest row") {
  if (no_device()) return;
  for (const auto& [position, parts] :
       {std::pair<int32_t, bool>{0, false}, {15, false}, {100, false}, {4000, true}}) {
    const int64_t heads = 8, kv_heads = 8, hd = 128, ctx = 4096, width = kv_heads * hd;
    std::vector<float> q(size_t(heads * hd));
    std::vector<uint16_t> cache(size_t(2 * ctx * width));
    fill_normal(q, 1);
    std::vector<float> values(cache.size());
    fill_normal(values, 2);
    for (size_t i = 0; i < cache.size(); ++i) cache[i] = float_to_half(values[i]);
    const size_t plane = size_t(ctx * width), row = size_t(position) * size_t(width);
    const std::vector<int32_t> at{position}, sequence{0};
    DeviceGuarded<int32_t> dposition{std::span<const int32_t>(at)},
        dsequence{std::span<const int32_t>(sequence)};
    DeviceGuarded<std::byte> scratch(int64_t(attention_decode_scratch_bytes(multiprocessors())));
    cuda_check(cudaMemset(scratch.data(), 0, kAttentionDecodeCounters), "cudaMemset");
    DeviceGuarded<float> all_q{std::span<const float>(q)}, dq(int64_t(q.size())), dy(int64_t(q.size()));
    DeviceGuarded<uint16_t> all{std::span<const uint16_t>(cache)}, there(int64_t(cache.size()));
    std::vector<std::vector<float>> results;
    for (const bool pdl : {false, true}) {
      std::vector<uint16_t> before = cache;
      for (size_t i = row; i < row + size_t(width); ++i) before[i] = before[plane + i] = 0x7e00;
      there.put(before);
      dq.put(std::vector<float>(q.size(), std::numeric_limits<float>::quiet_NaN()));
      copy_cuda(all_q.data(), dq.data(), int64_t(q.size()), nullptr);
      copy_cuda(reinterpret_cast<const float*>(all.data()), reinterpret_cast<float*>(there.data()),
                int64_t(plane), nullptr);
      attention_decode_cuda({.q = dq.data(),
                             .at = {dposition.data(), dsequence.data()},
                             .kv = {there.data(), there.data() + plane, KvType::kF16, ctx},
                             .y = dy.data(),
                             .y_half = false,
                             .tokens = 1,
                             .heads = heads,
                             .kv_heads = kv_heads,
                             .head_dim = hd,
                             .longest = parts ? ctx : 128,
                             .fresh = 1,
                             .scratch = scratch.data()},
                            nullptr, pdl);
      cuda_check(cudaDeviceSynchronize(), "attention_decode");
      results.push_back(dy.get());
    }
    REQUIRE(std::isfinite(results[0][0]));
    REQUIRE(results[0] == results[1]);
  }
}

TEST_CASE("attention_decode: parts fill the device, and fit the scratch") {
  for (int64_t rows : {1, 4, 8, 32, 40, 100, 256, 3000})
    for (int64_t longest : {1, 128, 4096, 131072}) {
      const int parts = attention_decode_parts(rows, longest, 132);
      CHECK(parts >= 1);
      CHECK((parts == 1 || rows * parts <= 264));
    }
  CHECK(attention_decode_parts(32, 100, 132) == 1);
  CHECK(attention_decode_parts(32, 16384, 132) >= 4);
}
