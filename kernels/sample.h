// Draws the next token of each row of logits on the device and puts it where the next step reads it, so that
// decoding steps follow each other without the host. The same choice, in the same order, as runtime/sampler.h
// makes on the host: penalties, then greedy, or top-k, top-p, min-p and temperature with one number of
// philox.h.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/cuda_stream.h"
#include "kernels/types.h"

#ifdef __CUDACC__
#define Q4S_HOST_DEVICE __host__ __device__
#else
#define Q4S_HOST_DEVICE
#endif

namespace q4s {

struct SampleParams {
  float temperature = 0;  // 0: greedy, ties to the lowest id
  int32_t top_k = 0;      // 0: all
  float top_p = 1;        // 1: all; below 1 only together with top_k (what is kept is sorted)
  float min_p = 0;        // 0: all
  float repeat_penalty = 1;
  float presence_penalty = 0, frequency_penalty = 0;
  int32_t repeat_last_n = 0;  // tokens that the penalties look back on
  uint64_t seed = 0;

  Q4S_HOST_DEVICE bool penalises() const {
    return repeat_last_n != 0 && (repeat_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0);
  }
};

constexpr int32_t kSampleMaxTopK = 1024, kSampleMaxWindow = 4096, kSampleMaxBanned = 64;
// Whether the kernels here can draw with these settings.
constexpr bool sample_supported(const SampleParams& p, int64_t banned) {
  const bool choice = p.temperature == 0 || (p.top_k <= kSampleMaxTopK && (p.top_k > 0 || p.top_p >= 1));
  return choice && banned <= kSampleMaxBanned && p.repeat_last_n >= 0 && p.repeat_last_n <= kSampleMaxWindow;
}

// What a run of draws carries from step to step, in device memory: set by the host before the first.
struct SampleState {
  SampleParams params;
  int32_t banned_count = 0;
  int32_t banned[kSampleMaxBanned] = {};
};
struct SampleRow {
  uint64_t sequence = 0;                  // with the seed: its random stream
  uint64_t drawn = 0;                     // numbers of it that are used up
  uint64_t step = 0;                      // draws of this run
  int32_t filled = 0;                     // tokens in the window
  int32_t next = 0;                       // where the window goes on, modulo repeat_last_n
  int32_t window[kSampleMaxWindow] = {};  // the last tokens
};

struct SampleArgs {
  float* logits;  // (R, V); changed in place by penalties and bans
  int64_t rows, vocab;
  const SampleState* state;
  SampleRow* row;     // (R)
  int32_t* token;     // (R) set to what was drawn; left alone where a logit is not finite
  int32_t* position;  // (R) advanced by one
  int32_t* drawn;     // (ring, R) in memory that the host reads: draw i goes to row i % ring; -1: not finite
  int64_t ring;
  std::byte* scratch;  // sample_scratch_bytes, zeroed before the first draw
  bool adjusts;        // there are penalties or bans
};
size_t sample_scratch_bytes(int64_t rows, int64_t vocab);
void sample_cuda(const SampleArgs&, cudaStream_t);

}  // namespace q4s
