// The vocabulary of the kernels: storage formats, a weight matrix as raw pointers, and how work is split over
// threads. Lowest layer: knows no tensors, files, logging or models.
#pragma once
#include <algorithm>
#include <cstdint>

namespace q4s {

enum class Format : uint8_t {
  kF32,
  kF16,
  kBF16,
  kQ8,        // ours: int8 -127..127, one fp16 scale per group
  kQ4,        // ours: two codes a byte, even column in the low nibble, one signed fp16 scale per group
  kGgufQ8_0,  // GGUF blocks of 32: fp16 d, 32 int8;                          w = d*q
  kGgufQ4_0,  // GGUF blocks of 32: fp16 d, 16 bytes (columns i | i+16 << 4);  w = d*(q-8)
  kGgufQ4_1,  // GGUF blocks of 32: fp16 d, fp16 m, 16 bytes as Q4_0;          w = d*q + m
};

// Value of a kQ4 code c in 0..15: kInt  scale*(c-8), kHalf  scale*(c-7.5).
enum class Grid : uint8_t { kInt, kHalf };

// Bytes of one row of k columns. The GGUF formats need k % 32 == 0.
constexpr int64_t row_bytes(Format f, int64_t k) {
  switch (f) {
    case Format::kF32: return 4 * k;
    case Format::kF16:
    case Format::kBF16: return 2 * k;
    case Format::kQ8: return k;
    case Format::kQ4: return (k + 1) / 2;
    case Format::kGgufQ8_0: return k / 32 * 34;
    case Format::kGgufQ4_0: return k / 32 * 18;
    case Format::kGgufQ4_1: return k / 32 * 20;
  }
  return 0;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// One weight matrix: n rows (outputs) of k columns (inputs), host memory, nothing owned.
struct WeightView {
  Format format = Format::kF32;
  Grid grid = Grid::kInt;  // kQ4
  int64_t n = 0, k = 0;
  int64_t group = 0;                     // kQ4, kQ8: columns sharing a scale; the last group may be short
  const uint8_t* data = nullptr;         // (n) rows, row_bytes(format, k) apart; unused when rows is set
  const uint8_t* const* rows = nullptr;  // (n) row pointers: stacked or re-ordered rows of a mapped file
  const uint16_t* scales = nullptr;      // (n, ceil(k/group)) fp16 bits; kQ4, kQ8

  const uint8_t* row(int64_t i) const { return rows ? rows[i] : data + i * row_bytes(format, k); }
  int64_t groups() const { return ceil_div(k, group); }
};

// Share of one thread in an operation. Every kernel's result is the same bits for every count.
struct Part {
  int index = 0, count = 1;
  struct Range {
    int64_t begin, end;
  };
  // The share of n items cut into chunks of `grain`, so that where a chunk starts does not depend on count.
  Range of(int64_t n, int64_t grain = 1) const {
    const int64_t chunks = ceil_div(n, grain);
    return {std::min(n, chunks * index / count * grain), std::min(n, chunks * (index + 1) / count * grain)};
  }
};

}  // namespace q4s
