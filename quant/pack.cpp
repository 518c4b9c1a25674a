#include "quant/pack.h"

#include <algorithm>
#include <cassert>
#include <cmath>

#include "kernels/half.h"
#include "runtime/error.h"

namespace q4s {
namespace {
constexpr int64_t kSlab = 64;  // rows of a table unpacked at a time
}

void pack_nibbles(const uint8_t* codes, int64_t k, uint8_t* out) {
  for (int64_t j = 0; j < k; j += 2) *out++ = uint8_t(codes[j] | (j + 1 < k ? codes[j + 1] << 4 : 0));
}

void unpack_nibbles(const uint8_t* packed, int64_t k, uint8_t* codes) {
  for (int64_t j = 0; j < k; ++j) codes[j] = packed[j / 2] >> (j % 2 * 4) & 15;
}

PackedWeight empty_packed(const QuantizedLinear& q) {
  assert(q.grid != GridKind::kAsym);
  const bool wide = grid_bits(q.grid) == 8;
  PackedWeight p;
  p.view = {.format = wide ? Format::kQ8 : Format::kQ4,
            .grid = q.grid == GridKind::kHalf ? Grid::kHalf : Grid::kInt,
            .n = q.n,
            .k = q.k,
            .group = q.group};
  p.data.resize(q.n * row_bytes(p.view.format, q.k));
  p.scales.resize(q.n * q.groups());
  p.view.data = p.data.data();
  p.view.scales = p.scales.data();
  return p;
}

PackedWeight pack(const QuantizedLinear& q) {
  PackedWeight p = empty_packed(q);
  const bool wide = p.view.format == Format::kQ8;
  const int64_t stride = row_bytes(p.view.format, q.k);
  p.scales = q.scales;
  for (int64_t i = 0; i < q.n; ++i) {
    const uint8_t* codes = &q.codes[i * q.k];
    uint8_t* out = &p.data[i * stride];
    if (wide) {
      std::transform(codes, codes + q.k, out, [](uint8_t c) { return uint8_t(c - 128); });  // int8
    } else {
      pack_nibbles(codes, q.k, out);
    }
  }
  p.view.data = p.data.data();
  p.view.scales = p.scales.data();
  return p;
}

PackedWeight pack_table(const Weight& w, Format format, const std::vector<float>* gain,
                        const Rotation* rotation, const Team& team) {
  assert(format == Format::kF16 || format == Format::kQ8 || format == Format::kQ4);
  const int64_t n = w.view.n, k = w.view.k;
  PackedWeight p;
  p.view = {.format = format, .n = n, .k = k};
  if (format != Format::kF16) p.view.group = std::min<int64_t>(k, format == Format::kQ8 ? 64 : 128);
  const int64_t stride = row_bytes(format, k), groups = p.view.group ? p.view.groups() : 0;
  p.data.resize(n * stride);
  p.scales.resize(n * groups);
  SolveOptions o;
  o.rtn = true;
  o.grid = format == Format::kQ8 ? GridKind::kInt8 : GridKind::kSigned;
  o.group = p.view.group;
  const std::vector<float> ones(k, 1.0f);
  team([&](Part part) {
    const auto [begin, end] = part.of(n, kSlab);
    for (int64_t first = begin; first < end; first += kSlab) {
      const int64_t rows = std::min(kSlab, end - first);
      std::vector<float> values = unpack_rows(w, first, first + rows, one_thread_team);
      if (gain) fold_gain(*gain, values.data(), rows);
      if (rotation) rotate_rows(*rotation, values.data(), rows, one_thread_team);
      uint8_t* out = &p.data[first * stride];
      if (format == Format::kF16) {
        uint16_t* half = reinterpret_cast<uint16_t*>(out);
        for (size_t i = 0; i < values.size(); ++i) {
          half[i] = float_to_half(values[i]);
          if ((half[i] & 0x7fffu) == 0x7c00u)
            throw Error(ErrorKind::kInput, w.name + ": " + std::to_string(values[i]) + " is beyond fp16");
        }
        continue;
      }
      const PackedWeight slab =
          pack(round_to_nearest(values.data(), ones.data(), rows, k, o, one_thread_team));
      std::copy(slab.data.begin(), slab.data.end(), out);
      std::copy(slab.scales.begin(), slab.scales.end(), &p.scales[first * groups]);
    }
  });
  p.view.data = p.data.data();
  if (p.view.group) p.view.scales = p.scales.data();
  return p;
}

}  // namespace q4s
