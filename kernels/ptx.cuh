// PTX instructions of sm_80 and up that several kernels use: shared memory by address, barriers, asynchronous
// copies, warp products. Those of sm_90a alone: hopper.cuh. Device code only.
#pragma once
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace q4s {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define Q4S_HOPPER 1
#endif

__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
// Shared memory by address. Left to itself the compiler makes an address again for each use, out of a dozen
// instructions; what `held` returns it keeps in a register.
__device__ inline uint32_t held(uint32_t v) {
  asm volatile("" : "+r"(v));
  return v;
}
// The same against ptxas, which may make again even what `held` returns: a shuffle it does not repeat. For
// all lanes of a warp.
__device__ inline uint32_t held_hard(uint32_t v) { return __shfl_xor_sync(0xffffffffu, v, 0); }
__device__ inline float held_float(float v) {
  asm volatile("" : "+f"(v));
  return v;
}
template <class T>
__device__ inline T* held_pointer(T* p) {
  asm volatile("" : "+l"(p));
  return p;
}
__device__ inline uint4 load_shared_16(uint32_t at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at));
  return v;
}
__device__ inline uint2 load_shared_8(uint32_t at) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
  return v;
}
__device__ inline uint32_t load_shared_4(uint32_t at) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
  return v;
}
__device__ inline uint16_t load_shared_2(uint32_t at) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at));
  return v;
}
__device__ inline void store_shared(uint32_t at, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory");
}
__device__ inline void store_shared(uint32_t at, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory");
}
__device__ inline void store_shared_8(uint32_t at, uint32_t low, uint32_t high) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(low), "r"(high) : "memory");
}

// The lane, read again at each use: what follows from it takes no registers in between.
__device__ inline int lane_again() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// 16 bytes, global to shared, past the registers. Groups complete in order.
__device__ inline void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Barriers in shared memory. A full stage takes arrivals of all lanes of the warp that fills it: each lane's
// by its own copies; or, on sm_90, all by one that has announced the copy engine's bytes.
constexpr int kFullArrivals = 32;
__device__ inline void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline void mbarrier_init_done() {
#ifdef Q4S_HOPPER
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ inline void mbarrier_arrive(uint32_t barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}
__device__ inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#ifdef Q4S_HOPPER
#define Q4S_BARRIER_TEST "mbarrier.try_wait"
#else
#define Q4S_BARRIER_TEST "mbarrier.test_wait"
#endif
  asm volatile("{\n.reg .pred done;\nAGAIN:\n" Q4S_BARRIER_TEST
               ".parity.shared.b64 done, [%0], %1;\n"
               "@!done bra AGAIN;\n}" ::"r"(barrier),
               "r"(parity)
               : "memory");
#undef Q4S_BARRIER_TEST
}
// Whether a wait would return at once.
__device__ inline bool mbarrier_done(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done;
}

// Arrives when this lane's asynchronous copies so far have.
__device__ inline void copies_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
// What this thread has read before bulk copies that another thread starts after a barrier write there.
__device__ inline void bulk_fence() {
#ifdef Q4S_HOPPER
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// What a lane copies from global to shared memory: 0 or a multiple of 16 bytes.
struct DecodeCopy {
  uint32_t to;
  const void* from;
  uint32_t bytes;
};
// How L2 is to keep what is read once: no longer than all else.
__device__ inline uint64_t read_once() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// Starts the copies of all lanes of a warp, which complete a phase of `barrier`. policy: read_once().
template <int kCopies>
__device__ inline void decode_copies(const DecodeCopy (&copies)[kCopies], uint32_t barrier, int lane,
                                     [[maybe_unused]] uint64_t policy) {
#ifdef Q4S_HOPPER
  uint32_t bytes = 0;
#pragma unroll
  for (const DecodeCopy& c : copies) bytes += c.bytes;
  bytes = __reduce_add_sync(0xffffffffu, bytes);
  if (lane == 0)
    asm volatile(
        "{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;\n"
        "mbarrier.arrive.shared.b64 state, [%0], %2;\n}" ::"r"(barrier),
        "r"(bytes), "n"(kFullArrivals - 1)
        : "memory");
  __syncwarp();
#pragma unroll
  for (const DecodeCopy& c : copies)
    if (c.bytes)
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
          "[%3], %4;" ::"r"(c.to),
          "l"(c.from), "r"(c.bytes), "r"(barrier), "l"(policy)
          : "memory");
#else
#pragma unroll
  for (const DecodeCopy& c : copies)
    for (uint32_t left = __ballot_sync(0xffffffffu, c.bytes > 0); left; left &= left - 1) {
      const int leader = __ffs(int(left)) - 1;
      const uint32_t to = __shfl_sync(0xffffffffu, c.to, leader);
      const char* from = reinterpret_cast<const char*>(__shfl_sync(0xffffffffu, uint64_t(c.from), leader));
      const uint32_t bytes = __shfl_sync(0xffffffffu, c.bytes, leader);
      for (uint32_t i = lane * 16; i < bytes; i += 512) copy_async(to + i, from + i);
    }
  copies_arrive(barrier);
#endif
}

// 16 bytes to global memory, by a pointer whose kind the compiler does not know.
__device__ inline void store_global_16(void* to, const uint4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
// Brings a line to the L2 cache.
__device__ inline void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
// The same of a multiple of 16 bytes, 16-aligned.
__device__ inline void prefetch_l2(const void* p, uint32_t bytes) {
#ifdef Q4S_HOPPER
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
#else
  for (uint32_t i = 0; i < bytes; i += 128) prefetch_l2(static_cast<const char*>(p) + i);
#endif
}
// A barrier of some warps of a block.
template <int kBarrier, int kThreads>
__device__ inline void warps_sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}
template <int kBarrier, int kThreads>
__device__ inline void warps_arrive() {
  asm volatile("bar.arrive %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

// The larger of |a| and |b|; of what is no number none that has the largest bits.
__device__ inline float max_or_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(fabsf(a)), "f"(fabsf(b)));
  return r;
}
// 1 / v but for an ulp, of normal v below 2^126.
__device__ inline float reciprocal(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
// c (16x8, f32) += a (16x16) b (16x8), fp16 fragments of one warp.
__device__ inline void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// c (16x8, int32) += a (16x32) b (32x8), bytes with or without a sign.
#define Q4S_MMA_16832(A, B)                                        \
  asm("mma.sync.aligned.m16n8k32.row.col.s32." #A "." #B           \
      ".s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <bool kSignedA, bool kSignedB>
__device__ inline void mma_16832(uint32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if (kSignedA && kSignedB) Q4S_MMA_16832(s8, s8);
  if (kSignedA && !kSignedB) Q4S_MMA_16832(s8, u8);
  if (!kSignedA && kSignedB) Q4S_MMA_16832(u8, s8);
  if (!kSignedA && !kSignedB) Q4S_MMA_16832(u8, u8);
}
#undef Q4S_MMA_16832
// Transposes an 8x8 matrix of halves held as (row lane/4, columns 2*(lane%4), +1).
__device__ inline uint32_t transpose_8x8(uint32_t v) {
  uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}
__device__ inline uint32_t pack_half2(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ inline float half_bits_to_float(uint16_t h) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(h));
  return r;
}

}  // namespace q4s
