// Rows of packed weights as fp16 on the device against the definition: formats, orders of rows, odd shapes,
// parts.
#include "kernels/half.h"
#include "kernels/linear.h"
#include "tests/kernels/device_guarded.h"
#include "tests/kernels/guarded.h"

using namespace q4s;

namespace {

void check(const Q4Layout& l, Grid grid, int64_t begin, int64_t end) {
  CAPTURE(l.n);
  CAPTURE(l.k);
  CAPTURE(l.bits);
  CAPTURE(int(l.map));
  CAPTURE(begin);
  std::mt19937_64 rng(uint64_t(l.n * 7 + l.k));
  const Format format = l.bits == 4 ? Format::kQ4 : l.bits == 8 ? Format::kQ8 : Format::kF16;
  std::vector<uint8_t> data(size_t(l.n * row_bytes(format, l.k)));
  for (uint8_t& b : data) b = uint8_t(rng());
  std::normal_distribution<float> normal;
  for (size_t i = 0; l.bits == 16 && i < data.size(); i += 2) {
    const uint16_t h = float_to_half(normal(rng));
    std::memcpy(&data[i], &h, 2);
  }
  std::vector<uint16_t> scales(size_t(l.n * l.groups()));
  for (uint16_t& s : scales) s = float_to_half(normal(rng));
  const WeightView view{.format = format,
                        .grid = grid,
                        .n = l.n,
                        .k = l.k,
                        .group = l.group,
                        .data = data.data(),
                        .scales = scales.data()};
  std::vector<float> rows(size_t((end - begin) * l.k));
  dequantize_rows(view, begin, end, rows.data());
  std::vector<uint16_t> want(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) want[i] = float_to_half(rows[i]);

  std::vector<uint8_t> codes(size_t(l.code_bytes()));
  std::vector<uint16_t> tile_scales(size_t(l.scale_bytes() / 2));
  q4_pack_cpu(l, {data.data(), scales.data()}, codes.data(), tile_scales.data());
  DeviceGuarded<uint8_t> device_codes{std::span<const uint8_t>(codes)};
  DeviceGuarded<uint16_t> device_scales{std::span<const uint16_t>(tile_scales)}, out(int64_t(want.size()));
  DeviceMatrix m;
  m.view = view;
  m.tiled = true;
  m.tiles = {l, grid, device_codes.data(), device_scales.data()};
  dequantize_rows_cuda(m, begin, end, out.data(), nullptr);
  cuda_check(cudaDeviceSynchronize(), "dequantize");
  REQUIRE(out.get() == want);
}

}  // namespace

TEST_CASE("dequantize_rows on the device") {
  if (no_device()) return;
  for (const int bits : {4, 8, 16})
    for (const int64_t k : {64, 72, 100, 1000, 1024})
      for (const int64_t group : {32, 128, 2000}) {
        const Q4Layout l{.n = 50, .k = k, .group = group, .bits = bits};
        check(l, Grid::kInt, 0, 50);
        check(l, bits == 4 ? Grid::kHalf : Grid::kInt, 16, 41);
        check(l, Grid::kInt, 3, 20);
      }
  check({.n = 80, .k = 192, .group = 64, .map = RowMap::kPairHalves}, Grid::kInt, 0, 80);
  check({.n = 96, .k = 192, .group = 64, .map = RowMap::kRope, .head_dim = 32, .rotated = 64}, Grid::kInt, 16,
        96);
}
