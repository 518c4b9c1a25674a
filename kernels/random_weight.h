// Seeded random weights of any shape, the same on every backend, so that a benchmark needs no file and no
// host copy. Each value is a function of (seed, row, column) alone. Weights are about normal(0, 1/sqrt(K)) in
// size, so that activations keep theirs from layer to layer.
#pragma once
#include <cmath>
#include <cstdint>

#include "kernels/cuda_stream.h"
#include "kernels/types.h"

#ifdef __CUDACC__
#define Q4S_HOST_DEVICE __host__ __device__
#else
#define Q4S_HOST_DEVICE
#endif

namespace q4s {

// Word i of the stream of `seed`: splitmix64 (Steele, Lea, Flood 2014).
Q4S_HOST_DEVICE inline uint64_t random_bits(uint64_t seed, uint64_t i) {
  uint64_t z = seed + (i + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// kQ4 codes of row n, columns 16 b .. 16 b + 15, column 16 b in the lowest nibble.
Q4S_HOST_DEVICE inline uint64_t random_q4(uint64_t seed, int64_t k, int64_t n, int64_t b) {
  return random_bits(seed, uint64_t(n * ((k + 15) / 16) + b));
}

// kQ8 code of (n, j).
Q4S_HOST_DEVICE inline int8_t random_q8(uint64_t seed, int64_t k, int64_t n, int64_t j) {
  const int8_t c = int8_t(random_bits(seed, uint64_t(n * ((k + 7) / 8) + j / 8)) >> (j % 8 * 8));
  return c == -128 ? int8_t(-127) : c;
}

// Value of an unquantised weight.
Q4S_HOST_DEVICE inline float random_dense(uint64_t seed, int64_t k, int64_t n, int64_t j) {
  const uint64_t bits = random_bits(seed, uint64_t(n * ((k + 3) / 4) + j / 4)) >> (j % 4 * 16);
  return float(int16_t(bits)) / 32768.f * sqrtf(3.f / float(k));
}

// Scale of group g of row n, of either sign; kQ4 and kQ8 codes have standard deviations 4.6 and 73.
Q4S_HOST_DEVICE inline float random_scale(uint64_t seed, Format f, int64_t k, int64_t groups, int64_t n,
                                          int64_t g) {
  const uint64_t bits = random_bits(~seed, uint64_t(n * groups + g));
  const float size = (0.75f + float(bits >> 40) * (0.5f / 16777216.f)) /
                     ((f == Format::kQ4 ? 4.6f : 73.f) * sqrtf(float(k)));
  return bits & 1 ? -size : size;
}

// Row n in its storage format: row_bytes(f, k) bytes, and its scales (groups) for kQ4 and kQ8. Not for GGUF
// formats.
void random_row(uint64_t seed, const WeightView& w, int64_t n, uint8_t* row, uint16_t* scales);
// The whole matrix in device memory, in the same order: data n * row_bytes(f, k) bytes, scales (n, groups).
void random_weight_cuda(uint64_t seed, const WeightView&, uint8_t* data, uint16_t* scales, cudaStream_t);

}  // namespace q4s
