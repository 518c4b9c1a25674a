// The Hopper kernel of linear_q4_gemm.h. One producer warp fills a ring of stages by TMA (activations, packed
// weights, scales); two warpgroups turn weights into register A fragments and issue wgmma against the activations.
// A warpgroup converts block i+1 while the tensor core works on block i. Persistent: a cluster walks a list of
// (tile, K range) parts. Parts of one tile meet through the workspace, summed in the order of K.
#include <cuda.h>

#include <algorithm>

#include "kernels/cuda_check.h"
#include "kernels/hopper.cuh"
#include "kernels/linear_q4_gemm_epilogue.cuh"
#include "kernels/linear_q4_gemm_schedule.h"
#include "kernels/linear_q4_gemm_sm90.cuh"
#include "kernels/pdl.cuh"

namespace q4s {
namespace {

constexpr int kConsumers = 2;  // warpgroups
constexpr int kThreads = (kConsumers + 1) * 128;
constexpr int kStageTiles = 2;  // 64-column blocks of a stage
constexpr int kFlagBytes = 4096;
constexpr size_t kSharedBytes = 227 * 1024;

struct Params {
  Q4GemmSink sink;
  Q4GemmWork work;
  int group_shift;       // scale row of column c of a stage: c >> group_shift
  int group, box_groups; // columns of a group; scale rows of a stage
  bool half_grid;
  float4* partial;       // (clusters * kCluster, kConsumers, regs/4, 128)
  int* flags;            // (clusters * kCluster, kConsumers)
};

template <int kRows_, int kColumns_, int kCluster_>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kCluster = kCluster_;
  static constexpr int kBlocks = kRows / (64 * kConsumers);  // of 64 rows a warpgroup
  static constexpr int kRegs = kColumns / 2;                 // accumulators of one block a thread
  static constexpr int kXBytes = kColumns * 128;             // one 64-column block of the activations
  static constexpr int kWBytes = kRows / 16 * kStageTiles * kQ4TileBytes;
  static constexpr int kSBytes = kRows / 16 * 2 * kStageTiles * 32;  // at most a scale every 32 columns
  static constexpr int kStageBytes = kStageTiles * kXBytes + kWBytes + kSBytes;
  static constexpr int kFit = int((kSharedBytes - 2048) / kStageBytes);
  static constexpr int kStages = kFit < 12 ? kFit : 12;
  static constexpr int kBytes = kStages * kStageBytes + 256;  // and barriers
};

#if Q4S_SM90A

using namespace hopper;

template <class T>
struct Shared {
  uint32_t x, w, s, full, empty;  // addresses
  const uint8_t* w_data;
  const uint8_t* s_data;

  __device__ explicit Shared(const uint8_t* base) {
    x = smem_address(base);
    w_data = base + T::kStages * kStageTiles * T::kXBytes;
    s_data = w_data + T::kStages * T::kWBytes;
    w = smem_address(w_data);
    s = smem_address(s_data);
    full = s + T::kStages * T::kSBytes;
    empty = full + T::kStages * 8;
  }
};

template <class T>
__device__ void produce(const Params& p, const Shared<T>& sh, const CUtensorMap& map_x, const CUtensorMap& map_w,
                        const CUtensorMap& map_s, int v, int rank) {
  tma_prefetch_map(&map_x);
  tma_prefetch_map(&map_w);
  tma_prefetch_map(&map_s);
  const uint32_t bytes =
      kStageTiles * T::kXBytes + T::kWBytes + T::kRows / 16 * p.box_groups * 32;
  constexpr int kSlice = T::kColumns / T::kCluster;  // columns that this block loads for its cluster
  RingPosition<T::kStages> at;
  Q4GemmSchedule schedule(p.work, v);
  Q4GemmPart part;
  bool waited = false;
  while (schedule.next(part)) {
    const int n_tile = (part.row_block * T::kCluster + rank) * (T::kRows / 16);
    const int token = part.column_block * T::kColumns + rank * kSlice;
    for (int kb = part.begin; kb < part.end; ++kb, at.next()) {
      const uint32_t full = sh.full + at.stage * 8;
      barrier_wait(sh.empty + at.stage * 8, at.parity ^ 1);
      barrier_arrive_expect(full, bytes);
      tma_load(sh.w + at.stage * T::kWBytes, &map_w, kb * kStageTiles * (kQ4TileBytes / 4), n_tile, full);
      tma_load(sh.s + at.stage * T::kSBytes, &map_s, kb * kStageTiles * kQ4TileCols / p.group * 16, n_tile, full);
      // Weights do not depend on the kernel before this one; activations do.
      if (!waited) pdl_wait();
      waited = true;
#pragma unroll
      for (int kk = 0; kk < kStageTiles; ++kk) {
        const uint32_t to = sh.x + (at.stage * kStageTiles + kk) * T::kXBytes + rank * kSlice * 128;
        const int column = (kb * kStageTiles + kk) * kQ4TileCols;
        if constexpr (T::kCluster == 1)
          tma_load(to, &map_x, column, token, full);
        else
          tma_load_multicast(to, &map_x, column, token, full, uint16_t((1 << T::kCluster) - 1));
      }
    }
  }
  if (!waited) pdl_wait();
}

// Adds the parts of a split tile that later clusters computed, in the order of K.
template <class T>
__device__ void gather_parts(const Params& p, const Q4GemmSchedule& schedule, const Q4GemmPart& part, int v, int rank,
                             int group, int thread, float (&acc)[T::kBlocks][T::kRegs]) {
  const int64_t tile_end = int64_t(part.tile + 1) * p.work.k_blocks;
  for (int h = v + 1; schedule.first_unit(h) < tile_end; ++h) {
    const int slot = (h * T::kCluster + rank) * kConsumers + group;
    if (thread == 0) {
      flag_wait(p.flags + slot);
      p.flags[slot] = 0;  // as the next product expects it
    }
    named_barrier(1 + group, 128);
    const float4* from = p.partial + int64_t(slot) * (T::kBlocks * T::kRegs / 4) * 128 + thread;
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
__device__ void publish_part(const Params& p, int v, int rank, int group, int thread,
                             const float (&acc)[T::kBlocks][T::kRegs]) {
  const int slot = (v * T::kCluster + rank) * kConsumers + group;
  float4* to = p.partial + int64_t(slot) * (T::kBlocks * T::kRegs / 4) * 128 + thread;
#pragma unroll
  for (int b = 0; b < T::kBlocks; ++b)
#pragma unroll
    for (int i = 0; i < T::kRegs / 4; ++i)
      __stcg(to + (b * (T::kRegs / 4) + i) * 128,
             make_float4(acc[b][4 * i], acc[b][4 * i + 1], acc[b][4 * i + 2], acc[b][4 * i + 3]));
  __threadfence();
  named_barrier(1 + group, 128);
  if (thread == 0) flag_set(p.flags + slot);
}

template <class T>
__device__ void release_stage(const Shared<T>& sh, int stage, int lane) {
  if constexpr (T::kCluster == 1) {
    if (lane == 0) barrier_arrive(sh.empty + stage * 8);
  } else {  // the peers' producers write here as well
    if (lane < T::kCluster) barrier_arrive_remote(sh.empty + stage * 8, lane);
  }
}

template <class T>
__device__ void consume(const Params& p, const Shared<T>& sh, int v, int rank) {
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128, warp = thread / 32, lane = threadIdx.x % 32;
  RingPosition<T::kStages> at;
  Q4GemmSchedule schedule(p.work, v);
  Q4GemmPart part;
  float acc[T::kBlocks][T::kRegs];
  uint32_t a[2][4][4];  // fragments of one 64 x 64 block, double buffered
  while (schedule.next(part)) {
    int last = 0;  // stage whose last wgmma may still run
    for (int kb = part.begin; kb < part.end; ++kb) {
      barrier_wait(sh.full + at.stage * 8, at.parity);
#pragma unroll
      for (int step = 0; step < kStageTiles * T::kBlocks; ++step) {
        const int kk = step / T::kBlocks, block = step % T::kBlocks, buffer = step % 2;
        const int row_tile = (group * T::kBlocks + block) * 4 + warp;
        const uint4 words = *reinterpret_cast<const uint4*>(
            sh.w_data + at.stage * T::kWBytes + (row_tile * kStageTiles + kk) * kQ4TileBytes + lane * 16);
        const __half* scales = reinterpret_cast<const __half*>(sh.s_data + at.stage * T::kSBytes) +
                               row_tile * p.box_groups * 16 + lane / 4;
        const int g0 = kk * kQ4TileCols >> p.group_shift, g1 = (kk * kQ4TileCols + 32) >> p.group_shift;
        Q4Fragment f;
        f.set(scales + g0 * 16, p.half_grid);
        f.unpack(words.x, a[buffer][0]);
        f.unpack(words.y, a[buffer][1]);
        if (g1 != g0) f.set(scales + g1 * 16, p.half_grid);
        f.unpack(words.z, a[buffer][2]);
        f.unpack(words.w, a[buffer][3]);
        wgmma_fence();
        const uint32_t x = sh.x + (at.stage * kStageTiles + kk) * T::kXBytes;
#pragma unroll
        for (int j = 0; j < 4; ++j)
          WgmmaRs<T::kColumns, 0>::mma(acc[block], a[buffer][j], wgmma_k_major(x + 32 * j), kb > part.begin || kk > 0 || j > 0);
        wgmma_commit();
        wgmma_wait<1>();  // the block before is done: its fragments are free, and its stage if it was the last
        if (step == 0 && kb > part.begin) release_stage<T>(sh, last, lane);
      }
      last = at.stage;
      at.next();
    }
    wgmma_wait<0>();
    release_stage<T>(sh, last, lane);
#pragma unroll
    for (int b = 0; b < T::kBlocks; ++b) wgmma_pin(acc[b]);

    if (part.begin > 0) {
      publish_part<T>(p, v, rank, group, thread, acc);
      continue;
    }
    if (part.end < p.work.k_blocks) gather_parts<T>(p, schedule, part, v, rank, group, thread, acc);
#pragma unroll
    for (int b = 0; b < T::kBlocks; ++b) {
      const int n_tile =
          (part.row_block * T::kCluster + rank) * (T::kRows / 16) + (group * T::kBlocks + b) * 4 + warp;
      sink_tile(p.sink, n_tile, part.column_block * T::kColumns, lane, acc[b]);
    }
  }
}

#endif  // Q4S_SM90A

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    q4_gemm_sm90_kernel(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_w,
                        const __grid_constant__ CUtensorMap map_s, const __grid_constant__ Params p) {
#if Q4S_SM90A
  extern __shared__ __align__(1024) uint8_t raw[];
  pdl_trigger();
  const Shared<T> sh(raw);
  // Blocks start in the order of their index: reversed, so that a part is computed no later than its sum.
  const int v = p.work.clusters - 1 - int(blockIdx.x) / T::kCluster;
  const int rank = T::kCluster == 1 ? 0 : int(cluster_rank());
  if (threadIdx.x == 0) {
    for (int i = 0; i < T::kStages; ++i) {
      barrier_init(sh.full + i * 8, 1);
      barrier_init(sh.empty + i * 8, kConsumers * 4 * T::kCluster);
    }
    barrier_init_fence();
  }
  if constexpr (T::kCluster > 1)
    cluster_sync();
  else
    __syncthreads();
  if (__shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0) == kConsumers) {
    give_registers<40>();
    if (threadIdx.x == kConsumers * 128) produce<T>(p, sh, map_x, map_w, map_s, v, rank);
    __syncwarp();
  } else {
    take_registers<232>();
    pdl_wait();  // the sums below read and write what it may still use
    consume<T>(p, sh, v, rank);
  }
  if constexpr (T::kCluster > 1) cluster_sync();  // peers still multicast to and arrive at a block's memory
#endif
}

// ---- host ------------------------------------------------------------------------------------------------------

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found;
    cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found),
               "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<EncodeTiled>(f);
  }();
  return function;
}

// Rows of `width` elements `pitch_bytes` apart; boxes of box_width x box_rows. Beyond the matrix a box reads zero.
CUtensorMap matrix_map(CUtensorMapDataType type, const void* data, int64_t width, int64_t rows, int64_t pitch_bytes,
                       int box_width, int box_rows, CUtensorMapSwizzle swizzle) {
  CUtensorMap map;
  const cuuint64_t size[2] = {cuuint64_t(width), cuuint64_t(rows)}, pitch[1] = {cuuint64_t(pitch_bytes)};
  const cuuint32_t box[2] = {cuuint32_t(box_width), cuuint32_t(box_rows)}, step[2] = {1, 1};
  const CUresult r = encode_tiled()(&map, type, 2, const_cast<void*>(data), size, pitch, box, step,
                                    CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                    CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (r != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(int(r)));
  return map;
}

template <class T>
void start(const Q4GemmArgs& a, const Q4GemmConfig& c, cudaStream_t stream) {
  static_assert(T::kStages >= 2 && T::kBytes <= int(kSharedBytes) && T::kBlocks * T::kRegs <= 128);
  const int64_t groups = a.w.groups();
  Params p = {};
  p.sink = q4_gemm_sink(a);
  p.work = {c.k_blocks, c.row_blocks, c.column_blocks, c.band, c.streamed, c.streamed + c.whole, c.clusters};
  p.half_grid = a.grid == Grid::kHalf;
  p.group = int(groups == 1 ? round_up(a.w.k, kStageTiles * kQ4TileCols) : a.w.group);
  p.group_shift = p.group == 32 ? 5 : p.group == 64 ? 6 : 30;
  p.box_groups = p.group == 32 ? 4 : p.group == 64 ? 2 : 1;
  p.flags = reinterpret_cast<int*>(a.workspace);
  p.partial = reinterpret_cast<float4*>(a.workspace + kFlagBytes);

  const int64_t pitch = q4_gemm_pitch(a.w.k), n_tiles = a.w.n_tiles();
  const CUtensorMap map_x =
      matrix_map(CU_TENSOR_MAP_DATA_TYPE_FLOAT16, a.x, pitch, a.tokens, pitch * 2, kQ4TileCols,
                 T::kColumns / T::kCluster, CU_TENSOR_MAP_SWIZZLE_128B);
  const int64_t row_words = a.w.k_tiles() * (kQ4TileBytes / 4);
  const CUtensorMap map_w =
      matrix_map(CU_TENSOR_MAP_DATA_TYPE_UINT32, a.codes, row_words, n_tiles, row_words * 4,
                 kStageTiles * (kQ4TileBytes / 4), T::kRows / 16, CU_TENSOR_MAP_SWIZZLE_NONE);
  const CUtensorMap map_s = matrix_map(CU_TENSOR_MAP_DATA_TYPE_UINT16, a.scales, groups * 16, n_tiles, groups * 32,
                                       p.box_groups * 16, T::kRows / 16, CU_TENSOR_MAP_SWIZZLE_NONE);

  launch("q4_gemm_sm90", q4_gemm_sm90_kernel<T>, dim3(unsigned(c.clusters * T::kCluster)), kThreads, T::kBytes,
         T::kCluster, a.pdl, stream, map_x, map_w, map_s, p);
}

}  // namespace

void q4_gemm_sm90_cuda(const Q4GemmArgs& a, const Q4GemmConfig& c, cudaStream_t stream) {
  const auto is = [&](int rows, int columns, int cluster) {
    return c.rows == rows && c.columns == columns && c.cluster == cluster;
  };
  if (is(128, 16, 1)) return start<Tile<128, 16, 1>>(a, c, stream);
  if (is(128, 32, 1)) return start<Tile<128, 32, 1>>(a, c, stream);
  if (is(128, 64, 1)) return start<Tile<128, 64, 1>>(a, c, stream);
  if (is(128, 64, 2)) return start<Tile<128, 64, 2>>(a, c, stream);
  if (is(256, 64, 1)) return start<Tile<256, 64, 1>>(a, c, stream);
  if (is(128, 128, 1)) return start<Tile<128, 128, 1>>(a, c, stream);
  if (is(128, 128, 2)) return start<Tile<128, 128, 2>>(a, c, stream);
  if (is(256, 128, 1)) return start<Tile<256, 128, 1>>(a, c, stream);
  if (is(128, 256, 1)) return start<Tile<128, 256, 1>>(a, c, stream);
  if (is(128, 256, 2)) return start<Tile<128, 256, 2>>(a, c, stream);
  throw std::runtime_error("q4_gemm: no kernel for this tile");
}

}  // namespace q4s
