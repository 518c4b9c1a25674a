// The Hopper kernel of linear_q4_gemm.h that streams work. Persistent: a cluster walks a list of (tile, K
// range) parts. Parts of one tile meet through the workspace, summed in the order of K.
#include "kernels/cuda_check.h"
#include "kernels/linear_q4_gemm_schedule.h"
#include "kernels/linear_q4_gemm_sm90_drain.cuh"
#include "kernels/linear_q4_gemm_sm90_loop.cuh"

namespace q4s {
namespace {

constexpr int kFlagBytes = 4096;

template <int kRows, int kColumns, int kCluster>
using Tile = Q4Tile<kRows, kColumns, kCluster, 1, kQ4Consumers*(kQ4DrainBytes + kColumns * 8)>;

struct Params {
  Q4GemmSink sink;
  Q4GemmWork work;
  Q4Operands operands;
  bool drain;       // q4_drain_takes
  float4* partial;  // (clusters * kCluster, kQ4Consumers, kBlocks * kRegs / 4, 128)
  int* flags;       // (clusters * kCluster, kQ4Consumers)
};

#if Q4S_SM90A

using namespace hopper;

// Stages of a cluster's parts, in order.
template <class T>
class Cursor {
 public:
  __device__ Cursor(const Q4GemmWork& work, int v, int rank) : schedule_(work, v), rank_(rank) {}
  __device__ bool next() {
    if (++stage_ < end_) return true;
    Q4GemmPart part;
    if (!schedule_.next(part)) return false;
    stage_ = part.begin * T::kUnitStages, end_ = part.end * T::kUnitStages;
    n_tile_ = (part.row_block * T::kCluster + rank_) * (T::kRows / 16);
    token0_ = part.column_block * T::kColumns;
    return true;
  }
  __device__ int n_tile() const { return n_tile_; }
  __device__ int token0() const { return token0_; }
  __device__ int k_tile() const { return stage_ * T::kStageTiles; }

 private:
  Q4GemmSchedule schedule_;
  int rank_, stage_ = 0, end_ = 0, n_tile_ = 0, token0_ = 0;
};

// Adds the parts of a split tile that later clusters computed, in the order of K.
template <class T>
__device__ void gather_parts(const Params& p, const Q4GemmSchedule& schedule, const Q4GemmPart& part, int v,
                             int rank, const Q4Consumer<T>& me, float (&acc)[T::kBlocks][T::kRegs]) {
  const int64_t tile_end = int64_t(part.tile + 1) * p.work.k_blocks;
  for (int h = v + 1; schedule.first_unit(h) < tile_end; ++h) {
    const int slot = (h * T::kCluster + rank) * kQ4Consumers + me.group;
    if (me.thread == 0) {
      flag_wait(p.flags + slot);
      p.flags[slot] = 0;  // as the next product expects it
    }
    named_barrier(1 + me.group, 128);
    const float4* from = p.partial + int64_t(slot) * (T::kBlocks * T::kRegs / 4) * 128 + me.thread;
#pragma unroll
    for (int b = 0; b < T::kBlocks; ++b)
#pragma unroll
      for (int i = 0; i < T::kRegs / 4; ++i) {
        const float4 r = __ldcg(from + (b * (T::kRegs / 4) + i) * 128);
        acc[b][4 * i] += r.x, acc[b][4 * i + 1] += r.y, acc[b][4 * i + 2] += r.z, acc[b][4 * i + 3] += r.w;
      }
  }
}

template <class T>
__device__ void publish_part(const Params& p, int v, int rank, const Q4Consumer<T>& me,
                             const float (&acc)[T::kBlocks][T::kRegs]) {
  const int slot = (v * T::kCluster + rank) * kQ4Consumers + me.group;
  float4* to = p.partial + int64_t(slot) * (T::kBlocks * T::kRegs / 4) * 128 + me.thread;
#pragma unroll
  for (int b = 0; b < T::kBlocks; ++b)
#pragma unroll
    for (int i = 0; i < T::kRegs / 4; ++i)
      __stcg(to + (b * (T::kRegs / 4) + i) * 128,
             make_float4(acc[b][4 * i], acc[b][4 * i + 1], acc[b][4 * i + 2], acc[b][4 * i + 3]));
  __threadfence();
  named_barrier(1 + me.group, 128);
  if (me.thread == 0) flag_set(p.flags + slot);
}

// What q4_drain_*() do not take, eight tokens at a time. Sums pass through shared memory for there to be one
// copy of what follows: accumulators have fixed names.
template <class T>
__device__ void drain(const Q4GemmSink& s, const Q4DrainPlace& at, const float (&acc)[T::kBlocks][T::kRegs]) {
  constexpr int kEights = T::kRegs / 4, kAtOnce = 4, kBytes = 128 * 16;  // of a warpgroup, eight tokens
  static_assert(T::kBlocks == 1 && kAtOnce * kBytes <= kQ4DrainBytes);
  const uint32_t mine = at.buffer + at.thread * 16;  // written and read by the same thread
#pragma unroll 1
  for (int first = 0; first < kEights; first += kAtOnce) {
#pragma unroll
    for (int i = 0; i < kEights; ++i)
      if (i / kAtOnce * kAtOnce == first)
        store_shared(mine + i % kAtOnce * kBytes,
                     make_float4(acc[0][4 * i], acc[0][4 * i + 1], acc[0][4 * i + 2], acc[0][4 * i + 3]));
#pragma unroll 1
    for (int i = 0; i < kAtOnce; ++i) {
      const uint4 v = load_shared(mine + i * kBytes);
      float c[4] = {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
      sink_tile(s, at.row0 / kQ4TileRows + int(at.warp), at.token0 + (first + i) * 8, int(at.lane), c);
    }
  }
}

// A tile's sums to their place.
template <class T>
__device__ void finish_tile(const Params& p, const Q4DrainPlace& at,
                            const float (&acc)[T::kBlocks][T::kRegs]) {
  if (!p.drain) {
    drain<T>(p.sink, at, acc);
  } else if (p.sink.output == Q4GemmOutput::kSwiglu) {
    q4_drain_swiglu<T>(p.sink, at, acc);
  } else if (p.sink.output == Q4GemmOutput::kStore) {
    q4_drain_store<T>(p.sink, at, acc);
  } else {
    q4_drain_rope<T>(p.sink, at, acc);
  }
}

template <class T>
__device__ void consume(const Params& p, const Q4Shared<T>& sh, uint8_t* rest, int v, int rank) {
  Q4Consumer<T> me{sh, p.operands};
  uint8_t* buffer = rest + me.group * kQ4DrainBytes;
  int2* places = reinterpret_cast<int2*>(rest + kQ4Consumers * kQ4DrainBytes) + me.group * T::kColumns;
  Q4GemmSchedule schedule(p.work, v);
  Q4GemmPart part;
  float acc[T::kBlocks][T::kRegs];
  while (schedule.next(part)) {
    const int row0 = (part.row_block * T::kCluster + rank) * T::kRows + me.group * T::kBlocks * 64;
    const int token0 = part.column_block * T::kColumns;
    Q4DrainPlace at{row0,
                    token0,
                    me.group,
                    uint32_t(me.thread),
                    uint32_t(me.warp),
                    uint32_t(me.lane),
                    shared_address(buffer),
                    shared_address(places)};
    at.pin();
    if (part.begin == 0 && p.drain) {
      at.sync();  // the tile before has left
      if (p.sink.output == Q4GemmOutput::kRopeKv) {
#pragma unroll
        for (int i = me.thread; i < T::kColumns; i += 128)
          places[i] =
              token0 + i < p.sink.tokens
                  ? make_int2(p.sink.position[token0 + i],
                              int(p.sink.sequence[token0 + i] * p.sink.ctx) + p.sink.position[token0 + i])
                  : make_int2(0, 0);
        at.sync();
      }
      q4_drain_begin<T>(p.sink, at);
    }
    me.multiply(part.end - part.begin, acc);
    me.finish(acc);
    if (part.begin > 0) {
      publish_part<T>(p, v, rank, me, acc);
      continue;
    }
    if (part.end < p.work.k_blocks) gather_parts<T>(p, schedule, part, v, rank, me, acc);
    finish_tile<T>(p, at, acc);
  }
}

#endif  // Q4S_SM90A

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    q4_gemm_stream_kernel(const __grid_constant__ Q4Maps maps, const __grid_constant__ Params p) {
#if Q4S_SM90A
  extern __shared__ __align__(1024) uint8_t raw[];
  pdl_trigger();
  const Q4Shared<T> sh(raw);
  // Blocks start in the order of their index: reversed, so that a part is computed no later than its sum.
  const int v = p.work.clusters - 1 - int(blockIdx.x) / T::kCluster;
  const int rank = T::kCluster == 1 ? 0 : int(cluster_rank());
  if (threadIdx.x == 0) {
    sh.init(0, 1);
    barrier_init_fence();
    q4_prefetch_maps(maps);
  }
  __syncthreads();
  if constexpr (T::kCluster > 1) cluster_arrive();
  if (__shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0) == kQ4Consumers) {
    if constexpr (T::kMoveRegisters) give_registers<40>();
    if (threadIdx.x == kQ4Consumers * 128)
      q4_produce<T>({sh, p.operands, maps.x, maps.w, maps.s, rank}, Cursor<T>(p.work, v, rank), T::kStages,
                    [] {
                      if constexpr (T::kCluster > 1) cluster_wait();  // peers' barriers exist
                      pdl_wait();
                    });
    else if constexpr (T::kCluster > 1)
      cluster_wait();
    __syncwarp();
  } else {
    if constexpr (T::kMoveRegisters) take_registers<232>();
    if constexpr (T::kCluster > 1) cluster_wait();  // peers' barriers exist
    pdl_wait();                                     // the sums below read and write what it may still use
    consume<T>(p, sh, raw + T::kRest, v, rank);
  }
  if constexpr (T::kCluster > 1) cluster_sync();  // peers still multicast to and arrive at a block's memory
#endif
}

template <class T>
void start(const Q4GemmArgs& a, const Q4GemmConfig& c, cudaStream_t stream) {
  Params p = {};
  p.sink = q4_gemm_sink(a);
  p.work = {c.k_blocks, c.row_blocks, c.column_blocks, c.band, c.streamed, c.streamed + c.whole, c.clusters};
  p.drain = q4_drain_takes(p.sink);
  p.flags = reinterpret_cast<int*>(a.workspace);
  p.partial = reinterpret_cast<float4*>(a.workspace + kFlagBytes);
  const Q4Maps maps = q4_gemm_maps(a, T::kRows, T::kColumns / T::kCluster, T::kStageTiles, p.operands);
  launch("q4_gemm_stream", q4_gemm_stream_kernel<T>, dim3(unsigned(c.clusters * T::kCluster)), T::kThreads,
         T::kBytes, T::kCluster, a.pdl, stream, maps, p);
}

}  // namespace

void q4_gemm_stream_cuda(const Q4GemmArgs& a, const Q4GemmConfig& c, cudaStream_t stream) {
  const auto is = [&](int rows, int columns, int cluster) {
    return c.rows == rows && c.columns == columns && c.cluster == cluster;
  };
  if (is(128, 128, 1)) return start<Tile<128, 128, 1>>(a, c, stream);
  if (is(128, 256, 2)) return start<Tile<128, 256, 2>>(a, c, stream);
  throw std::runtime_error("q4_gemm: no streaming kernel for this tile");
}

}  // namespace q4s
