// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): random numbers as a
// pure function of a key and a counter, the same on the CPU and in a kernel. Header only.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define Q4S_HOST_DEVICE __host__ __device__
#else
#define Q4S_HOST_DEVICE
#endif

namespace q4s {

struct Philox4 {
  uint32_t x[4];
};

Q4S_HOST_DEVICE inline Philox4 philox4x32(Philox4 counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter.x[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * counter.x[2];
    counter = {{static_cast<uint32_t>(b >> 32) ^ counter.x[1] ^ key0, static_cast<uint32_t>(b),
                static_cast<uint32_t>(a >> 32) ^ counter.x[3] ^ key1, static_cast<uint32_t>(a)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// The step-th number of a sequence, uniform in [0, 1) on a grid of 2^-53.
Q4S_HOST_DEVICE inline double philox_uniform(uint64_t seed, uint64_t sequence, uint64_t step) {
  const Philox4 counter = {{static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32),
                            static_cast<uint32_t>(sequence), static_cast<uint32_t>(sequence >> 32)}};
  const Philox4 r = philox4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return static_cast<double>((static_cast<uint64_t>(r.x[0]) << 32 | r.x[1]) >> 11) * 0x1p-53;
}

}  // namespace q4s
