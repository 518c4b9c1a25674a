// The Hopper kernel of linear_q4_gemm.h for up to some hundred tokens, where whole tiles of the kernel for
// many leave multiprocessors without work. The blocks of a cluster compute one tile, each a part of K, and
// send their sums to the one that adds them. One block a multiprocessor at a time, of as many rows as give
// every block the same work.
#include "kernels/cuda_check.h"
#include "kernels/linear_q4_gemm_sm90_split_sink.cuh"

namespace q4s {
namespace {

constexpr int kSumBarrierBytes = 128;

// Up to kRows rows, 64 a warpgroup. Where sums are scaled, three of these take registers of a fourth, which
// has the producer.
template <int kRows, int kColumns, bool kScaleSums = false>
using Tile = Q4Tile<kRows, kColumns, 1, kQ4UnitTiles, kSumBarrierBytes + int(sizeof(int2)) * kColumns,
                    kRows / 64, kScaleSums && kRows == 192, kScaleSums>;

struct Params {
  Q4Operands operands;
  int begin[kQ4GemmMostSplits + 1];  // first units of the parts of K
  int column_blocks, n_tiles;
  bool plain, drain;  // as q4_split_plain(); straight from the accumulators
  Q4GemmSink sink;
};

#if Q4S_SM90A

using namespace hopper;

// Of a thread, where some are moved.
constexpr int kConsumerRegisters = 152, kOtherRegisters = 56;

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

// What a block has: a part of K of a tile, and of the tile's columns, taken by eights, every splits-th to
// add.
template <class T>
struct Share {
  int splits = int(cluster_blocks()), rank = int(cluster_rank());
  int begin, units, row_block, token0;
  __device__ void find(const Params& p) {
    begin = p.begin[rank], units = p.begin[rank + 1] - begin;
    const int tile = int(cluster_index());
    row_block = tile, token0 = 0;
    // Blocks of the same rows and other tokens start together: the weights are read once.
    if (p.column_blocks > 1)
      row_block = tile / p.column_blocks, token0 = tile % p.column_blocks * T::kColumns;
  }
  __device__ int eights() const { return (T::kColumns / 8 - rank + splits - 1) / splits; }
};

// Sums of 16 rows x 8 tokens, as they lie in a warp's registers, on their way to the same warp of the block
// that adds them. Those of other blocks come to stages whose activations are used up, one a warpgroup; its
// own wait where the warp had its weights.
template <class T>
class Exchange {
 public:
  static constexpr int kBytes = 512;
  static_assert(T::kStages > T::kConsumers && (T::kConsumers * 4 + 2) * 8 <= kSumBarrierBytes);

  // Barriers: a warp's sums of other blocks are there; all blocks have room for what is sent; places are
  // known.
  static __device__ uint32_t landed(const Q4Shared<T>& sh, int warp) { return sh.x + T::kRest + warp * 8; }
  static __device__ uint32_t open(const Q4Shared<T>& sh) { return landed(sh, T::kConsumers * 4); }
  static __device__ uint32_t known(const Q4Shared<T>& sh) { return landed(sh, T::kConsumers * 4 + 1); }
  // (position, row of the cache) of a column.
  static __device__ uint32_t place(const Q4Shared<T>& sh, int column) {
    return sh.x + T::kRest + kSumBarrierBytes + column * int(sizeof(int2));
  }
  // By one thread of each consumer's warp: an address that differs between lanes would be a loop over them.
  static __device__ void init(const Q4Shared<T>& sh, int warp, int splits) {
    barrier_init(landed(sh, warp), 1);
    if (warp == 0) barrier_init(open(sh), splits);
    if (warp == 1) barrier_init(known(sh), T::kColumns);
  }
  // The stages after the last one that a block uses, in the order of the ring, hold none of its last units.
  static __device__ int stage(int units, int group) { return (units + group) % T::kStages; }
  // By one thread.
  static __device__ void open_all(const Q4Shared<T>& sh, const Share<T>& share) {
    const int last = share.units + T::kConsumers - 1 - T::kStages;  // unit there
    if (last >= 0) barrier_wait(sh.empty + last % T::kStages * 8, last / T::kStages & 1);
    for (int i = 0; i < share.splits; ++i) barrier_arrive_remote(open(sh), i);
  }

  // Before the loop, where nothing waits for it.
  __device__ Exchange(const Q4Shared<T>& sh, const Params& p, const Share<T>& share, int warp, int lane)
      : sh_(sh),
        warp_(warp),
        lane_(lane),
        rank_(share.rank),
        others_(share.splits - 1),
        count_(share.eights()) {
    const int to = min(lane, others_);
    there_ = remote_address(region(p.begin[to + 1] - p.begin[to]) + (rank_ - (rank_ > to)) * kBytes, to);
    landed_ = remote_address(landed(sh, warp), to);
    received_ = region(share.units) + lane * 16;
    own_ = others_ ? sh.w + warp * T::kWRowBytes + lane * 16 : received_;
    if (lane == 0) barrier_arrive_expect(landed(sh, warp), count_ * others_ * kBytes);
    asm volatile("" : "+r"(there_), "+r"(landed_), "+r"(received_), "+r"(own_), "+r"(count_));
  }
  __device__ int count() const { return count_; }
  // First column of an eight.
  __device__ int column(int i) const { return (rank_ + i * (others_ + 1)) * 8; }
  __device__ void send(const float (&acc)[T::kRegs]) const {
    constexpr int kEights = T::kColumns / 8, kAtOnce = 4;
    barrier_wait(open(sh_), 0);
    int owner[2] = {}, i = 0;
    uint32_t further = lane_ * 16;
#pragma unroll
    for (int first = 0; first < kEights; first += kAtOnce) {
      // What differs from one receiver to the next is with the lane of its number.
      uint32_t to[kAtOnce], barrier[kAtOnce];
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        to[e] = __shfl_sync(0xffffffffu, there_, owner[0]) + further;
        barrier[e] = __shfl_sync(0xffffffffu, landed_, owner[0]);
        if (owner[0]++ == others_) owner[0] = 0, further += others_ * kBytes;
      }
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        const float* const c = &acc[4 * (first + e)];
        const float4 v = {c[0], c[1], c[2], c[3]};
        if (owner[1] == rank_)
          store_shared(own(i), v);
        else
          store_async(to[e], v, barrier[e]);
        if (owner[1]++ == others_) owner[1] = 0, ++i;
      }
    }
    barrier_wait(landed(sh_, warp_), 0);
  }
  // Its own sum, then the others' in the order of K.
  __device__ float4 sum(int i) const {
    const uint32_t from = received_ + i * others_ * kBytes;
    float4 sum = values(load_shared(own(i)));
    if (others_ > 0) add(sum, values(load_shared(from)));
    if (others_ > 1) {
      float4 v[kQ4GemmMostSplits - 1];
#pragma unroll
      for (int r = 1; r < kQ4GemmMostSplits - 1; ++r)
        if (r < others_) v[r] = values(load_shared(from + r * kBytes));
#pragma unroll
      for (int r = 1; r < kQ4GemmMostSplits - 1; ++r)
        if (r < others_) add(sum, v[r]);
    }
    return sum;
  }

 private:
  static __device__ float4 values(const uint4& v) {
    return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
  }
  static __device__ void add(float4& sum, const float4& v) {
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  __device__ uint32_t region(int units) const {
    return sh_.x + stage(units, warp_ / 4) * T::kXBytes + warp_ % 4 * (T::kXBytes / 4);
  }
  __device__ uint32_t own(int i) const {
    return own_ + i / 2 * (others_ ? T::kWBytes : 2 * kBytes) + i % 2 * kBytes;
  }
  const Q4Shared<T>& sh_;
  int warp_, lane_, rank_, others_, count_;
  uint32_t there_, landed_;  // of the block of the lane's number: where this one's sums go, and their barrier
  uint32_t received_, own_;
};

// By consumers, before the loop.
template <class T>
__device__ void note_places(const Q4GemmSink& s, const Q4Shared<T>& sh, int token0) {
  if (s.output != Q4GemmOutput::kRopeKv || threadIdx.x >= T::kColumns) return;
  const int token = token0 + int(threadIdx.x);
  int2 place = {0, 0};
  if (token < s.tokens) {
    place.x = s.position[token];
    place.y = int(s.sequence[token] * s.ctx) + place.x;
  }
  store_shared(Exchange<T>::place(sh, int(threadIdx.x)), place);
  barrier_arrive(Exchange<T>::known(sh));  // every lane for what it wrote
}

// A warp's rows of the tokens that its block adds to their place. What comes with the sums is asked for
// before they are exchanged.
template <Q4GemmOutput kOutput, class T>
__device__ void finish(const Q4SplitSink<kOutput>& sink, const Exchange<T>& exchange, const Q4Shared<T>& sh,
                       int token0, const float (&acc)[T::kRegs]) {
  constexpr int kAhead = T::kColumns < 64 ? 2 : 4;
  if (kOutput == Q4GemmOutput::kRopeKv) barrier_wait(Exchange<T>::known(sh), 0);
  const int count = exchange.count();
  const auto places = [&](int i) { return Exchange<T>::place(sh, exchange.column(i)); };
  const auto fetch = [&](int i) { return sink.fetch(token0 + exchange.column(i), places(i)); };
  float4 with[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    if (i < count) with[i] = fetch(i);
  exchange.send(acc);
#pragma unroll 1
  for (int first = 0; first < count; first += kAhead)
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= count) return;
      sink.finish(token0 + exchange.column(first + i), places(first + i), with[i], exchange.sum(first + i));
      if (first + i + kAhead < count) with[i] = fetch(first + i + kAhead);
    }
}

template <class T>
__device__ void consume(const Params& p, const Q4Shared<T>& sh, const Share<T>& share, int warp) {
  Q4Consumer<T> me{sh, p.operands};
  const Exchange<T> exchange(sh, p, share, warp, me.lane);
  const int n_tile = share.row_block * p.operands.row_tiles + warp;
  int pair = p.sink.output == Q4GemmOutput::kRopeKv ? n_tile * kQ4TileRows % p.sink.head_dim / 2 : 0;
  asm volatile("" : "+r"(pair));  // divides here, where nothing waits for it
  pdl_wait();  // as the producer does; what follows reads and writes what an earlier kernel may have used
  note_places<T>(p.sink, sh, share.token0);
  float acc[T::kBlocks][T::kRegs];
  me.multiply(share.units, acc);
  me.finish(acc);
  if (p.drain) {
    const int row0 = share.row_block * p.operands.row_tiles * kQ4TileRows;
    Q4GemmSink s = p.sink;
    s.n = min(s.n, row0 + p.operands.row_tiles * kQ4TileRows);  // what the block has of them
    barrier_wait(Exchange<T>::open(sh), 0);
    q4_drain_swiglu<T>(s,
                       {row0 + me.group * 64, share.token0, me.group, uint32_t(me.thread), uint32_t(me.warp),
                        uint32_t(me.lane), sh.x + Exchange<T>::stage(share.units, me.group) * T::kXBytes, 0},
                       acc);
    return;
  }
  if (warp >= p.operands.row_tiles || n_tile >= p.n_tiles) return;
  const auto plain = [&](auto sink) { finish(sink, exchange, sh, share.token0, acc[0]); };
  if (!p.plain) {
    exchange.send(acc[0]);
#pragma unroll 1
    for (int i = 0; i < exchange.count(); ++i) {
      const float4 v = exchange.sum(i);
      float c[4] = {v.x, v.y, v.z, v.w};
      sink_tile(p.sink, n_tile, share.token0 + exchange.column(i), me.lane, c);
    }
  } else if (p.sink.output == Q4GemmOutput::kStore) {
    plain(Q4SplitSink<Q4GemmOutput::kStore>(p.sink, n_tile, pair, me.lane));
  } else if (p.sink.output == Q4GemmOutput::kSwiglu) {
    plain(Q4SplitSink<Q4GemmOutput::kSwiglu>(p.sink, n_tile, pair, me.lane));
  } else {
    plain(Q4SplitSink<Q4GemmOutput::kRopeKv>(p.sink, n_tile, pair, me.lane));
  }
}

#endif  // Q4S_SM90A

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    q4_gemm_split_kernel(const __grid_constant__ Q4Maps maps, const __grid_constant__ Params p) {
#if Q4S_SM90A
  extern __shared__ __align__(1024) uint8_t raw[];
  pdl_trigger();
  const Q4Shared<T> sh(raw);
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  Share<T> share;
  if (threadIdx.x % 32 == 0) {
    if (warp < T::kConsumers * 4) {
      sh.init(warp, T::kConsumers * 4);
      Exchange<T>::init(sh, warp, share.splits);
      barrier_init_fence();
    } else {
      q4_prefetch_maps(maps);
    }
  }
  __syncthreads();
  cluster_arrive_relaxed();
  share.find(p);
  if (warp < T::kConsumers * 4) {
    if constexpr (T::kMoveRegisters) take_registers<kConsumerRegisters>();
    cluster_wait();  // the other blocks' barriers exist
    return consume<T>(p, sh, share, warp);
  }
  if constexpr (T::kMoveRegisters) give_registers<kOtherRegisters>();
  if (threadIdx.x > T::kConsumers * 128) {
    cluster_wait();
  } else {
    q4_produce<T>({sh, p.operands, maps.x, maps.w, maps.s, 0},
                  Cursor<T>{share.row_block * p.operands.row_tiles, share.token0,
                            share.begin * T::kUnitStages, share.units * T::kUnitStages,
                            int(__umulhi(uint32_t(share.row_block) * 0x9e3779b9u, uint32_t(share.units))) *
                                T::kUnitStages},
                  T::kEarlyStages, [] {
                    cluster_wait();
                    pdl_wait();
                  });
    Exchange<T>::open_all(sh, share);
  }
#endif
}

template <class T>
void start(const Q4GemmArgs& a, const Q4GemmConfig& c, cudaStream_t stream) {
  Params p = {};
  p.sink = q4_gemm_sink(a);
  p.column_blocks = c.column_blocks, p.n_tiles = int(a.w.n_tiles());
  for (int i = 0; i <= c.splits; ++i) p.begin[i] = c.k_blocks * i / c.splits;
  p.plain = q4_split_plain(p.sink);
  p.drain = c.splits == 1 && a.output == Q4GemmOutput::kSwiglu && q4_drain_takes(p.sink);
  const Q4Maps maps = q4_gemm_maps(a, c.rows, T::kColumns, T::kStageTiles, p.operands);
  launch("q4_gemm_split", q4_gemm_split_kernel<T>, dim3(unsigned(c.row_blocks * c.column_blocks * c.splits)),
         T::kThreads, T::kBytes, c.splits, a.pdl, stream, maps, p);
}

template <int kRows, int kColumns>
void start_narrow(const Q4GemmArgs& a, const Q4GemmConfig& c, cudaStream_t stream) {
  if (q4_gemm_one_group(a.w)) return start<Tile<kRows, kColumns, true>>(a, c, stream);
  start<Tile<kRows, kColumns>>(a, c, stream);
}

}  // namespace

void q4_gemm_split_cuda(const Q4GemmArgs& a, const Q4GemmConfig& c, cudaStream_t stream) {
  const auto within = [&](int rows, int columns) { return c.rows <= rows && c.columns == columns; };
  if (within(128, 32)) return start_narrow<128, 32>(a, c, stream);
  if (within(192, 32)) return start_narrow<192, 32>(a, c, stream);
  if (within(128, 64)) return start_narrow<128, 64>(a, c, stream);
  if (within(192, 64)) return start_narrow<192, 64>(a, c, stream);
  if (within(128, 128)) return start<Tile<128, 128>>(a, c, stream);
  if (within(192, 128)) return start<Tile<192, 128>>(a, c, stream);
  throw std::runtime_error("q4_gemm: no split kernel for this tile");
}

}  // namespace q4s
