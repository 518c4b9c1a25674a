// Thin wrappers of the sm_90a instructions that the GEMM and attention kernels are built from: mbarriers,
// TMA, warpgroup mma, clusters. No policy here. Everything compiles to nothing below sm_90a.
#pragma once
#include "kernels/ptx.cuh"

// True where the warpgroup instructions exist: the kernels' bodies are empty elsewhere, and never launched
// there.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define Q4S_SM90A 1
#else
#define Q4S_SM90A 0
#endif

namespace q4s::hopper {

#if Q4S_SM90A

// ---- mbarriers: a phase completes when all arrivals came and all announced bytes landed
// ----------------------
__device__ inline void barrier_init(uint32_t bar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the async proxy and to the cluster; a barrier among threads must
// follow.
__device__ inline void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void barrier_arrive_expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ inline void barrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ inline void barrier_arrive(uint32_t bar, uint32_t count) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
// The same barrier of another block of the cluster. For reads that are over: a release at the scope of the
// cluster would drain all writes of the warp first, at every stage.
__device__ inline void barrier_arrive_remote(uint32_t bar, uint32_t rank) {
  asm volatile(
      "{\n\t.reg .b32 remote;\n\t"
      "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n\t}" ::"r"(bar),
      "r"(rank)
      : "memory");
}
// A wait that outlasts seconds is a bug: stop the kernel rather than hang the device. The loop is one asm
// statement: as C++ control flow it keeps ptxas from using the registers of setmaxnreg.
__device__ inline void barrier_wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred p;\n\t.reg .b32 tries;\n\t"
      "mov.b32 tries, 0;\n"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n\t"
      "@p bra done;\n\t"
      "add.u32 tries, tries, 1;\n\t"
      "setp.lt.u32 p, tries, 0x1000000;\n\t"
      "@p bra again;\n\t"
      "trap;\n"
      "done:\n\t}" ::"r"(bar),
      "r"(parity)
      : "memory");
}

// As barrier_wait() for a flag in global memory that another block sets to 1.
__device__ inline void flag_wait(const int* flag) {
  asm volatile(
      "{\n\t.reg .pred p;\n\t.reg .b32 tries, value;\n\t"
      "mov.b32 tries, 0;\n"
      "again:\n\t"
      "ld.acquire.gpu.global.b32 value, [%0];\n\t"
      "setp.ne.b32 p, value, 0;\n\t"
      "@p bra done;\n\t"
      "nanosleep.u32 20;\n\t"
      "add.u32 tries, tries, 1;\n\t"
      "setp.lt.u32 p, tries, 0x4000000;\n\t"
      "@p bra again;\n\t"
      "trap;\n"
      "done:\n\t}" ::"l"(flag)
      : "memory");
}
__device__ inline void flag_set(int* flag) {
  asm volatile("st.release.gpu.global.b32 [%0], 1;" ::"l"(flag) : "memory");
}

// Position in a ring of kStages buffers; the parity flips at each turn.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// ---- TMA: a box of a 2-D tensor map, coordinates innermost first
// ---------------------------------------------
__device__ inline void tma_load(uint32_t to, const void* map, int c0, int c1, uint32_t bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
      "[%4];" ::"r"(to),
      "l"(map), "r"(c0), "r"(c1), "r"(bar)
      : "memory");
}
// The same, kept in L2 as `policy` says.
__device__ inline void tma_load(uint32_t to, const void* map, int c0, int c1, uint32_t bar, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, "
      "{%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(c0), "r"(c1), "r"(bar), "l"(policy)
      : "memory");
}
// Neighbouring bytes, a multiple of 16.
__device__ inline void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(bar)
      : "memory");
}
// A box of a 3-D tensor map.
__device__ inline void tma_load(uint32_t to, const void* map, int c0, int c1, int c2, uint32_t bar) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(to),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(bar)
      : "memory");
}
// To the same place of every block in `mask`, each counting the bytes on its own barrier.
__device__ inline void tma_load_multicast(uint32_t to, const void* map, int c0, int c1, uint32_t bar,
                                          uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(c0), "r"(c1), "r"(bar), "h"(mask)
      : "memory");
}
// The other way: a box of shared memory to a 2-D tensor map, what lies beyond its edges left out. Reads are
// over after bulk_wait_read() by the thread that committed.
__device__ inline void tma_store(const void* map, uint32_t from, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(from), "r"(c0), "r"(c1)
               : "memory");
}
__device__ inline void tma_store(const void* map, uint32_t from, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
               "r"(from), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}
__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ inline void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ inline void tma_prefetch_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- clusters
// ------------------------------------------------------------------------------------------------
__device__ inline uint32_t cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
// Blocks of a cluster, and its number in the grid; a grid without clusters has them of one block.
__device__ inline uint32_t cluster_blocks() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
  return r;
}
__device__ inline uint32_t cluster_index() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(r));
  return r;
}
// In two halves, and by any threads: what must not wait stands between them.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// For barriers alone, after barrier_init_fence(): says nothing of other writes, which a release would drain.
__device__ inline void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
// All have come this far and hold what they read; says nothing of writes but those of barrier_init_fence().
__device__ inline void cluster_meet() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

// An address of this block's shared memory, as the same place of another block of the cluster.
__device__ inline uint32_t remote_address(uint32_t address, uint32_t rank) {
  uint32_t r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
  return r;
}
// 16 bytes to another block's shared memory, counted there on `bar`, which is one of its barriers.
__device__ inline void store_async(uint32_t to, float4 v, uint32_t bar) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
          to),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(bar)
      : "memory");
}
__device__ inline void store_async(uint32_t to, float v, uint32_t bar) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to),
               "f"(v), "r"(bar)
               : "memory");
}

// ---- registers and named barriers
// ------------------------------------------------------------------------------
template <int kCount>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
__device__ inline void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Counts this warp's threads without waiting.
__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- shared memory by address
// ------------------------------------------------------------------------------------
__device__ inline uint4 load_shared(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}
__device__ inline void store_shared(uint32_t to, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(v) : "memory");
}
__device__ inline void store_shared(uint32_t to, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ inline void store_shared(uint32_t to, float4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}
__device__ inline void store_shared(uint32_t to, int2 v) {
  asm volatile("st.shared.v2.s32 [%0], {%1, %2};" ::"r"(to), "r"(v.x), "r"(v.y) : "memory");
}
__device__ inline float2 load_shared_pair(uint32_t from) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(from) : "memory");
  return v;
}
// Four 8x8 matrices of 16-bit elements, held as accumulators of mma are (row lane/4, columns 2*(lane%4)..),
// stored with columns as rows of 16 bytes: lane l gives the address of column l%8 of matrix l/8.
__device__ inline void store_matrices_transposed(uint32_t to, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v[0]),
               "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}
// The same with rows as rows.
__device__ inline void store_matrices(uint32_t to, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v[0]),
               "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

// ---- warpgroup mma
// -----------------------------------------------------------------------------------------------
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving reads or writes of an accumulator across this point.
template <int kCount>
__device__ inline void wgmma_pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Descriptor of a shared-memory operand with rows of 128 bytes under the 128-byte swizzle (atoms of 8 rows,
// 1024 aligned). K-major: a row holds 64 halves of K; a step of 16 in K is +32 bytes of address. In two
// steps, so that a loop over operands adds their distance / 16 to the low word alone.
__device__ inline uint32_t wgmma_address(uint32_t address) { return 1u << 16 | (address & 0x3ffff) >> 4; }
__device__ inline uint64_t wgmma_k_major_at(uint32_t low) {
  constexpr uint32_t kHigh = 1u << 30 | 1024 >> 4;  // 128-byte swizzle; 8 rows further
  return uint64_t(kHigh) << 32 | low;
}

// N-major: a row holds 64 halves of N at one k; blocks of 64 are `stride` bytes apart, a step of 16 in K is
// +2048.
__device__ inline uint32_t wgmma_n_address(uint32_t address, uint32_t stride) {  // the low word
  return (stride >> 4) << 16 | (address & 0x3ffff) >> 4;
}

// Writes of this thread to shared memory before reads by wgmma or TMA; a barrier among threads must follow.
__device__ inline void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// D (64, N) f32 (+)= A (64, 16) f16 in registers * B (16, N) f16 in shared memory. Per warp: 16 rows; thread
// (g = lane/4, t = lane%4) holds d[4j..] = (g, 8j+2t), (g, 8j+2t+1), (g+8, 8j+2t), (g+8, 8j+2t+1), and
// a = (g, 2t..), (g+8, 2t..), (g, 2t+8..), (g+8, 2t+8..). accumulate == 0 ignores the old D.
#define Q4S_D8(i)                                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define Q4S_D32(i) Q4S_D8(i), Q4S_D8(i + 8), Q4S_D8(i + 16), Q4S_D8(i + 24)
#define Q4S_R8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define Q4S_R16 "%8,%9,%10,%11,%12,%13,%14,%15"
#define Q4S_R32 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define Q4S_R64                                                                                  \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54," \
  "%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define Q4S_R96                                                                                  \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86," \
  "%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define Q4S_R128                                                                                \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114," \
  "%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// kRegs = N/2 accumulators come first in the operand list, then a0..a3, the descriptor and the predicate.
#define Q4S_WGMMA_RS(kN, kRegs, kTransB, regs, a0, a1, a2, a3, b, use, ...)                                  \
  template <>                                                                                                \
  struct WgmmaRs<kN, kTransB> {                                                                              \
    static __device__ void mma(float (&d)[kRegs], const uint32_t (&a)[4], uint64_t desc_b, int accumulate) { \
      asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #use                                             \
                   ", 0;\n\t"                                                                                \
                   "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32.f16.f16 {" regs "}, {%" #a0 ",%" #a1     \
                   ",%" #a2 ",%" #a3 "}, %" #b ", p, 1, 1, " #kTransB ";\n\t}"                               \
                   : __VA_ARGS__                                                                             \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc_b), "r"(accumulate));              \
    }                                                                                                        \
  };

// kTransB: 0 for a K-major B, 1 for an MN-major one.
template <int kN, int kTransB>
struct WgmmaRs;
Q4S_WGMMA_RS(32, 16, 0, Q4S_R8 "," Q4S_R16, 16, 17, 18, 19, 20, 21, Q4S_D8(0), Q4S_D8(8))
Q4S_WGMMA_RS(64, 32, 0, Q4S_R8 "," Q4S_R16 "," Q4S_R32, 32, 33, 34, 35, 36, 37, Q4S_D32(0))
Q4S_WGMMA_RS(64, 32, 1, Q4S_R8 "," Q4S_R16 "," Q4S_R32, 32, 33, 34, 35, 36, 37, Q4S_D32(0))
Q4S_WGMMA_RS(128, 64, 1, Q4S_R8 "," Q4S_R16 "," Q4S_R32 "," Q4S_R64, 64, 65, 66, 67, 68, 69, Q4S_D32(0),
             Q4S_D32(32))
Q4S_WGMMA_RS(128, 64, 0, Q4S_R8 "," Q4S_R16 "," Q4S_R32 "," Q4S_R64, 64, 65, 66, 67, 68, 69, Q4S_D32(0),
             Q4S_D32(32))
Q4S_WGMMA_RS(256, 128, 0, Q4S_R8 "," Q4S_R16 "," Q4S_R32 "," Q4S_R64 "," Q4S_R96 "," Q4S_R128, 128, 129, 130,
             131, 132, 133, Q4S_D32(0), Q4S_D32(32), Q4S_D32(64), Q4S_D32(96))

// A (64, 16) from shared memory too, both K-major.
template <int kN>
struct WgmmaSs;
template <>
struct WgmmaSs<128> {
  static __device__ void mma(float (&d)[64], uint64_t desc_a, uint64_t desc_b, int accumulate) {
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %66, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" Q4S_R8 "," Q4S_R16 "," Q4S_R32 "," Q4S_R64
        "}, %64, %65, p, 1, 1, 0, 0;\n\t}"
        : Q4S_D32(0), Q4S_D32(32)
        : "l"(desc_a), "l"(desc_b), "r"(accumulate));
  }
};

#endif  // Q4S_SM90A

}  // namespace q4s::hopper
