// sample.h. Blocks look for the largest logit of each group of neighbours; the last of them to end makes the
// choice. With top-k the k-th largest group maximum is a lower bound of the k-th largest logit, so that only
// the groups that reach it are read again. What is kept is sorted in shared memory by unique keys: no order
// depends on timing.
#include <cuda_runtime.h>

#include "kernels/block_reduce.cuh"
#include "kernels/pdl.cuh"
#include "kernels/philox.h"
#include "kernels/sample.h"

namespace q4s {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kCandidates = 2048;  // sorted in shared memory
constexpr int kMaxima = 2048;      // group maxima that are ranked in shared memory
constexpr int64_t kBlockGroups = kWarps;

// Groups are a multiple of 32 neighbours, few enough to be ranked.
Q4S_HOST_DEVICE int64_t group_size(int64_t vocab) { return (vocab + 32 * kMaxima - 1) / (32 * kMaxima) * 32; }
Q4S_HOST_DEVICE int64_t group_count(int64_t vocab) {
  return (vocab + group_size(vocab) - 1) / group_size(vocab);
}

using Key = unsigned long long;

// Larger logit first, then smaller id: a total order. No key of a finite logit is 0.
__device__ Key key_of(float logit, int64_t id) {
  const uint32_t bits = __float_as_uint(logit);
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return Key(ordered) << 32 | uint32_t(~uint32_t(id));
}
__device__ float logit_of(Key key) {
  const uint32_t ordered = uint32_t(key >> 32);
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}
__device__ int32_t id_of(Key key) { return int32_t(~uint32_t(key)); }

// Penalties of the tokens in the window, each once, and bans. One block a row.
__global__ void __launch_bounds__(kThreads) adjust_kernel(SampleArgs a) {
  pdl_trigger();
  pdl_wait();
  const SampleParams& p = a.state->params;
  const SampleRow& row = a.row[blockIdx.x];
  float* logits = a.logits + blockIdx.x * a.vocab;
  if (p.penalises())
    for (int j = threadIdx.x; j < row.filled; j += kThreads) {
      const int32_t id = row.window[j];
      bool first = id >= 0 && id < a.vocab;
      for (int i = 0; first && i < j; ++i) first = row.window[i] != id;
      if (!first) continue;
      int count = 0;
      for (int i = j; i < row.filled; ++i) count += row.window[i] == id;
      const float logit = logits[id];
      logits[id] = (logit > 0 ? logit / p.repeat_penalty : logit * p.repeat_penalty) -
                   (p.presence_penalty + p.frequency_penalty * float(count));
    }
  __syncthreads();
  for (int j = threadIdx.x; j < a.state->banned_count; j += kThreads) {
    const int32_t id = a.state->banned[j];
    if (id >= 0 && id < a.vocab) logits[id] = -INFINITY;
  }
}

struct Shared {
  Key maxima[kMaxima];
  Key candidates[kCandidates];
  float weights[kCandidates];
  double sums[kMaxima];
  Key reduced[32];
  int counts[32];
  int filled, bad;
  bool last;
};

// Visits every logit of the groups that reach `least`: fn(logit, id). A warp a group.
template <typename Fn>
__device__ void visit_groups(const Shared& s, const float* logits, int64_t vocab, Key least, const Fn& fn) {
  const int64_t size = group_size(vocab), groups = group_count(vocab);
  for (int64_t g = threadIdx.x / 32; g < groups; g += kWarps) {
    if (s.maxima[g] < least) continue;
    for (int64_t id = g * size + threadIdx.x % 32; id < min((g + 1) * size, vocab); id += 32)
      fn(logits[id], id);
  }
}

__device__ int block_count(int v, int* shared) {
  return block_reduce<kThreads>(v, shared, 0, [](int a, int b) { return a + b; });
}

// The k largest keys, sorted, in s.candidates; returns how many there are (fewer than k where others are
// banned).
__device__ int select_top(Shared& s, const float* logits, int64_t vocab, int k) {
  const int groups = int(group_count(vocab));
  Key least = 1;  // leaves out nothing but padding
  if (k < groups) {
    for (int g = threadIdx.x; g < groups; g += kThreads) {
      int rank = 0;
      for (int i = 0; i < groups; ++i) rank += s.maxima[i] > s.maxima[g];
      if (rank == k - 1) s.reduced[0] = s.maxima[g];
    }
    __syncthreads();
    least = s.reduced[0];
    __syncthreads();
  }
  int count = 0;
  visit_groups(s, logits, vocab, least, [&](float v, int64_t id) { count += key_of(v, id) >= least; });
  count = block_count(count, s.counts);
  if (count >
      kCandidates) {  // many near ties: the exact k-th key by bisection, `low` always has k keys at or above
    Key low = least, high = ~Key(0);
    while (high - low > 1) {
      const Key middle = low + (high - low) / 2;
      int above = 0;
      visit_groups(s, logits, vocab, middle, [&](float v, int64_t id) { above += key_of(v, id) >= middle; });
      (block_count(above, s.counts) >= k ? low : high) = middle;
    }
    least = low;
  }
  if (threadIdx.x == 0) s.filled = 0;
  __syncthreads();
  visit_groups(s, logits, vocab, least, [&](float v, int64_t id) {
    const Key key = key_of(v, id);
    if (key >= least && v != -INFINITY) s.candidates[atomicAdd(&s.filled, 1)] = key;
  });
  __syncthreads();
  const int filled = s.filled;
  int padded = 2;
  while (padded < filled) padded *= 2;
  for (int i = filled + threadIdx.x; i < padded; i += kThreads) s.candidates[i] = 0;
  for (int size = 2; size <= padded; size *= 2)  // bitonic, falling
    for (int step = size / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < padded / 2; i += kThreads) {
        const int low = i / step * 2 * step + i % step, high = low + step;
        const Key x = s.candidates[low], y = s.candidates[high];
        if ((low & size) == 0 ? x < y : x > y) s.candidates[low] = y, s.candidates[high] = x;
      }
    }
  __syncthreads();
  return min(filled, k);
}

// From sorted candidates, as Sampler::sample: thread 0's walk is the host's.
__device__ int32_t draw_sorted(Shared& s, const SampleParams& p, int count, double uniform) {
  const float best = logit_of(s.candidates[0]);
  for (int i = threadIdx.x; i < count; i += kThreads) s.weights[i] = expf(logit_of(s.candidates[i]) - best);
  __syncthreads();
  if (threadIdx.x == 0 && p.top_p < 1) {
    double all = 0, sum = 0;
    for (int i = 0; i < count; ++i) all += s.weights[i];
    const double enough = p.top_p * all;
    int kept = 0;
    for (; kept < count && (kept == 0 || sum < enough); ++kept) sum += s.weights[kept];
    s.filled = kept;
  } else if (threadIdx.x == 0) {
    s.filled = count;
  }
  __syncthreads();
  count = s.filled;
  const float least = p.min_p > 0 ? best + logf(p.min_p) : -INFINITY;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const float v = logit_of(s.candidates[i]);
    s.weights[i] = v < least ? 0 : expf((v - best) / p.temperature);
  }
  __syncthreads();
  double all = 0, sum = 0;
  for (int i = 0; i < count; ++i) all += s.weights[i];
  const double target = uniform * all;
  for (int i = 0; i < count; ++i)
    if ((sum += s.weights[i]) > target) return id_of(s.candidates[i]);
  return id_of(s.candidates[0]);
}

// Without sorting, in order of id: group sums, then the group that holds the target, then the logit in it.
__device__ int32_t draw_all(Shared& s, const SampleParams& p, const float* logits, int64_t vocab,
                            Key best_key, double uniform) {
  const float best = logit_of(best_key), least = p.min_p > 0 ? best + logf(p.min_p) : -INFINITY;
  const int64_t size = group_size(vocab), groups = group_count(vocab);
  const auto weight = [&](int64_t id) {
    return logits[id] < least ? 0.f : expf((logits[id] - best) / p.temperature);
  };
  for (int64_t g = threadIdx.x / 32; g < groups; g += kWarps) {
    double sum = 0;
    for (int64_t id = g * size + threadIdx.x % 32; id < min((g + 1) * size, vocab); id += 32)
      sum += weight(id);
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    if (threadIdx.x % 32 == 0) s.sums[g] = sum;
  }
  __syncthreads();
  double all = 0, sum = 0;
  for (int64_t g = 0; g < groups; ++g) all += s.sums[g];
  const double target = uniform * all;
  int64_t g = 0;
  while (g + 1 < groups && sum + s.sums[g] <= target) sum += s.sums[g++];
  for (int64_t id = g * size; id < min((g + 1) * size, vocab); ++id)
    if ((sum += weight(id)) > target) return int32_t(id);
  return id_of(best_key);  // the sums of groups and of their members differ in rounding
}

__global__ void __launch_bounds__(kThreads)
    sample_kernel(SampleArgs a, Key* maxima, unsigned* ended, int* bad) {
  extern __shared__ __align__(16) unsigned char storage[];
  Shared& s = *reinterpret_cast<Shared*>(storage);
  pdl_trigger();
  pdl_wait();
  const int64_t r = blockIdx.y, size = group_size(a.vocab), groups = group_count(a.vocab);
  const float* logits = a.logits + r * a.vocab;
  const int64_t g = blockIdx.x * kBlockGroups + threadIdx.x / 32;
  if (g < groups) {
    Key best = 0;
    bool finite = true;
    for (int64_t id = g * size + threadIdx.x % 32; id < min((g + 1) * size, a.vocab); id += 32) {
      const float v = logits[id];
      finite &= isfinite(v) || (a.adjusts && v == -INFINITY);  // banned
      best = max(best, key_of(v, id));
    }
    for (int d = 16; d > 0; d /= 2) best = max(best, __shfl_xor_sync(~0u, best, d));
    if (!__all_sync(~0u, finite)) bad[r] = 1;
    if (threadIdx.x % 32 == 0) maxima[r * groups + g] = best;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0)
    s.last = atomicInc(&ended[r], gridDim.x - 1) == gridDim.x - 1;  // back to 0 for the next draw
  __syncthreads();
  if (!s.last) return;
  __threadfence();

  for (int64_t i = threadIdx.x; i < groups; i += kThreads) s.maxima[i] = __ldcg(&maxima[r * groups + i]);
  if (threadIdx.x == 0) s.bad = __ldcg(&bad[r]);
  __syncthreads();
  Key best = 0;
  for (int64_t i = threadIdx.x; i < groups; i += kThreads) best = max(best, s.maxima[i]);
  best = block_max<kThreads>(best, s.reduced, Key(0));
  const SampleParams p = a.state->params;
  SampleRow& row = a.row[r];
  int32_t id = s.bad ? -1 : id_of(best);
  if (!s.bad && p.temperature != 0) {
    const double uniform = philox_uniform(p.seed, row.sequence, row.drawn);
    if (p.top_k > 0 && p.top_k < a.vocab)
      id = draw_sorted(s, p, select_top(s, logits, a.vocab, p.top_k), uniform);
    else if (p.top_p < 1)  // every id is kept by top-k: few enough to be sorted (sample_supported)
      id = draw_sorted(s, p, select_top(s, logits, a.vocab, int(a.vocab)), uniform);
    else
      id = draw_all(s, p, logits, a.vocab, best, uniform);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  a.drawn[row.step % uint64_t(a.ring) * a.rows + r] = id;
  ++row.step;
  bad[r] = 0;
  if (id < 0) return;
  a.token[r] = id;
  ++a.position[r];
  if (p.temperature != 0) ++row.drawn;
  if (p.repeat_last_n > 0) {
    row.window[row.next] = id;
    row.next = (row.next + 1) % p.repeat_last_n;
    row.filled = min(row.filled + 1, p.repeat_last_n);
  }
}

}  // namespace

// Group maxima, then a counter and a flag a row.
size_t sample_scratch_bytes(int64_t rows, int64_t vocab) {
  return size_t(rows * (group_count(vocab) * 8 + 8));
}

void sample_cuda(const SampleArgs& a, cudaStream_t stream) {
  if (a.adjusts) launch("sample", adjust_kernel, unsigned(a.rows), kThreads, 0, 1, true, stream, a);
  Key* maxima = reinterpret_cast<Key*>(a.scratch);
  unsigned* ended = reinterpret_cast<unsigned*>(maxima + a.rows * group_count(a.vocab));
  const dim3 grid(unsigned(ceil_div(group_count(a.vocab), kBlockGroups)), unsigned(a.rows));
  launch("sample", sample_kernel, grid, kThreads, sizeof(Shared), 1, true, stream, a, maxima, ended,
         reinterpret_cast<int*>(ended + a.rows));
}

}  // namespace q4s
