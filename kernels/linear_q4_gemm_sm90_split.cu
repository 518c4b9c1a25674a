// The Hopper kernel of linear_q4_gemm.h for few tokens, where each weight is converted for few columns. The
// blocks of a cluster compute one tile, each a part of K; each then sums a share of the tokens over all of
// them, straight from their shared memory and in the order of K. One block a multiprocessor, of as many rows
// as give every block the same work.
#include "kernels/cuda_check.h"
#include "kernels/linear_q4_gemm_sm90_loop.cuh"

namespace q4s {
namespace {

// Up to kRows rows, 64 a warpgroup.
template <int kRows, int kColumns>
using Tile = Q4Tile<kRows, kColumns, 1, kQ4UnitTiles, 0, kRows / 64, false>;

struct Params {
  Q4GemmSink sink;
  Q4Operands operands;
  int units, column_blocks, splits, rows;
  int lanes;         // threads that take one token's rows
  uint32_t inverse;  // of it, in 2^-32, rounded up: exact for the items of a tile
};

#if Q4S_SM90A

using namespace hopper;

// Stages of one part of K of one tile. Blocks start at different places of their part: all at once, they
// would ask the second cache for the same lines of activations.
template <class T>
struct Cursor {
  int n_tile_, token0_, begin, count, turn, done = -1;
  __device__ bool next() { return ++done < count; }
  __device__ int n_tile() const { return n_tile_; }
  __device__ int token0() const { return token0_; }
  __device__ int k_tile() const {
    const int at = done + turn;
    return (begin + (at < count ? at : at - count)) * T::kStageTiles;
  }
};

__device__ float4 load_remote(uint32_t address, uint32_t rank) {
  float4 v;
  asm volatile(
      "{\n\t.reg .b32 remote;\n\t"
      "mapa.shared::cluster.u32 remote, %4, %5;\n\t"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n\t}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(address), "r"(rank)
      : "memory");
  return v;
}

// Four neighbouring floats of every block of the cluster, added in the order of K.
__device__ float4 sum_parts(uint32_t address, int splits) {
  if (splits == 1) {
    const uint4 v = load_shared(address);
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z),
                       __uint_as_float(v.w));
  }
  float4 sum = make_float4(0, 0, 0, 0);
  for (int first = 0; first < splits; first += 4) {
    float4 v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (first + i < splits) v[i] = load_remote(address, first + i);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (first + i < splits) sum.x += v[i].x, sum.y += v[i].y, sum.z += v[i].z, sum.w += v[i].w;
  }
  return sum;
}

// Places of a share of the tokens, dealt over the consumers' threads step by step: rows of a token along
// threads.
template <class T>
class SharePlaces {
 public:
  __device__ SharePlaces(const Params& p, int row0, int token0, int tokens, int rank)
      : p_(p), row0_(row0), first_(tokens * rank / p.splits) {
    count_ = tokens * (rank + 1) / p.splits - first_;
    token0_ = token0 + first_;
  }
  __device__ bool any() const { return step_ * batch() * kThreads < count_ * p_.lanes; }
  __device__ void next() { ++step_; }
  __device__ Q4SinkPlace operator()(int i) const {
    const Spot at = spot(i);
    return {row0_ + at.row, at.token < count_ ? token0_ + at.token : -1};
  }
  // Offset of a place's sums, as q4_stage_sums left them.
  __device__ int sums(int i) const {
    const Spot at = spot(i);
    return (at.row / 64 * T::kColumns + first_ + at.token) * kQ4TokenFloats + q4_row_offset(at.row % 64);
  }

 private:
  struct Spot {
    int token, row;  // of the share, of the tile
  };
  static constexpr int kThreads = T::kConsumers * 128;
  __device__ int batch() const { return p_.sink.output == Q4GemmOutput::kStore ? 4 : 2; }
  __device__ Spot spot(int i) const {
    const int item = (step_ * batch() + i) * kThreads + int(threadIdx.x);
    const int token = int(__umulhi(uint32_t(item), p_.inverse)), lane = item - token * p_.lanes;
    return {token, p_.sink.output == Q4GemmOutput::kStore ? lane * 4 : lane / 2 * 16 + lane % 2 * 4};
  }
  const Params& p_;
  int row0_, first_, count_, token0_, step_ = 0;
};

template <class T>
__device__ void consume(const Params& p, const Q4Shared<T>& sh, float* staged, int rank, int units, int row0,
                        int token0) {
  Q4Consumer<T> me{sh, p.operands};
  float acc[T::kBlocks][T::kRegs];
  me.multiply(units, acc);
  pdl_wait();  // the producer waited; what follows reads and writes what an earlier kernel may have used
  // What comes with the sums is asked for two steps ahead.
  SharePlaces<T> places(p, row0, token0, min(T::kColumns, p.sink.tokens - token0), rank), later = places;
  Q4SinkBatch batch, next;
  batch.fetch(p.sink, places);
  later.next();
  me.finish(acc);
  named_barrier(1, T::kConsumers * 128);  // all are done with the ring: its memory takes the sums
#pragma unroll
  for (int j = 0; j < T::kColumns / 8; ++j)
    q4_stage_sums(staged + (me.group * T::kColumns + j * 8) * kQ4TokenFloats, me.warp, me.lane,
                  &acc[0][j * 4]);
  if (later.any()) next.fetch(p.sink, later);
  cluster_sync();
  const uint32_t base = shared_address(staged);
  while (places.any()) {
    batch.finish(p.sink, places, [&](int i, int upper) {
      return sum_parts(base + 4 * places.sums(i) + 32 * upper, p.splits);
    });
    places.next(), later.next();
    batch = next;
    if (later.any()) next.fetch(p.sink, later);
  }
  cluster_meet();  // others may still read this block's sums
}

#endif  // Q4S_SM90A

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    q4_gemm_split_kernel(const __grid_constant__ Q4Maps maps, const __grid_constant__ Params p) {
#if Q4S_SM90A
  extern __shared__ __align__(1024) uint8_t raw[];
  pdl_trigger();
  const Q4Shared<T> sh(raw);
  if (threadIdx.x == 0) sh.init();
  __syncthreads();
  // Blocks of the same rows and other tokens start together: the weights are read once.
  const int tile = int(blockIdx.x) / p.splits, rank = int(blockIdx.x) % p.splits;
  const int row_block = tile / p.column_blocks, token0 = tile % p.column_blocks * T::kColumns;
  const int begin = p.units * rank / p.splits, end = p.units * (rank + 1) / p.splits;
  if (__shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0) == T::kConsumers) {
    if (threadIdx.x == T::kConsumers * 128)
      q4_produce<T>({sh, p.operands, maps.x, maps.w, maps.s, 0},
                    Cursor<T>{row_block * p.operands.row_tiles, token0, begin * T::kUnitStages,
                              (end - begin) * T::kUnitStages, row_block % (end - begin) * T::kUnitStages});
    return;
  }
  consume<T>(p, sh, reinterpret_cast<float*>(raw), rank, end - begin, row_block * p.rows, token0);
#endif
}

template <class T>
void start(const Q4GemmArgs& a, const Q4GemmConfig& c, cudaStream_t stream) {
  static_assert(T::kRows / 64 * T::kColumns * kQ4TokenBytes <= T::kBarriers);
  Params p = {};
  p.sink = q4_gemm_sink(a);
  p.units = c.k_blocks, p.column_blocks = c.column_blocks, p.splits = c.splits, p.rows = c.rows;
  p.lanes = c.rows / (a.output == Q4GemmOutput::kStore ? 4 : 8);
  p.inverse = uint32_t(((int64_t(1) << 32) + p.lanes - 1) / p.lanes);
  const Q4Maps maps = q4_gemm_maps(a, c.rows, T::kColumns, T::kStageTiles, p.operands);
  launch("q4_gemm_split", q4_gemm_split_kernel<T>, dim3(unsigned(c.row_blocks * c.column_blocks * c.splits)),
         T::kThreads, T::kBytes, c.splits, a.pdl, stream, maps, p);
}

}  // namespace

void q4_gemm_split_cuda(const Q4GemmArgs& a, const Q4GemmConfig& c, cudaStream_t stream) {
  const auto within = [&](int rows, int columns) { return c.rows <= rows && c.columns == columns; };
  if (within(128, 32)) return start<Tile<128, 32>>(a, c, stream);
  if (within(192, 32)) return start<Tile<192, 32>>(a, c, stream);
  if (within(128, 64)) return start<Tile<128, 64>>(a, c, stream);
  if (within(192, 64)) return start<Tile<192, 64>>(a, c, stream);
  if (within(128, 128)) return start<Tile<128, 128>>(a, c, stream);
  if (within(192, 128)) return start<Tile<192, 128>>(a, c, stream);
  throw std::runtime_error("q4_gemm: no split kernel for this tile");
}

}  // namespace q4s
