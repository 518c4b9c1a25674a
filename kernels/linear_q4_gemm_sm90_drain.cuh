// The common epilogues of the streaming kernel, for outputs whose rows are whole 16-byte pieces: a
// warpgroup's sums become values in registers, pass through shared memory into the order of the output, and
// leave in 16-byte stores.
//   SiLU(gate) * up -> fp16, rotated q and k and plain v -> fp16, sum (+ residual) -> f32
// What they do not take (other types, odd sizes) goes through sink_tile().
#pragma once
#include "kernels/linear_q4_gemm_sm90_loop.cuh"

namespace q4s {

// Of one warpgroup, beside (position, sequence) of its tokens: sums that move, and what comes from memory for
// them.
constexpr int kQ4DrainBytes = 20 * 1024, kQ4DrainAhead = 4 * 1024;  // the second part begins there

// Host: whether the functions below take this product.
inline bool q4_drain_takes(const Q4GemmSink& s) {
  const auto whole = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  if (!whole(s.y) || s.y_pitch % 8) return false;
  switch (s.output) {
    case Q4GemmOutput::kStore: return !s.y_half && s.n % 4 == 0 && (!s.residual || whole(s.residual));
    case Q4GemmOutput::kSwiglu: return s.y_half && s.n % 16 == 0;
    case Q4GemmOutput::kRopeKv: return s.y_half && s.kv_half && whole(s.k) && whole(s.v) && whole(s.table);
  }
  return false;
}

#if Q4S_SM90A

// Where a warpgroup's part of a tile stands, and what it drains through. What follows from these is found
// once a tile and kept: found again in each of the unrolled steps it makes code that takes longer to arrive
// than to run.
struct Q4DrainPlace {
  int row0, token0, group;
  uint32_t thread, warp, lane;
  uint32_t buffer;  // kQ4DrainBytes of shared memory
  uint32_t at;      // kRopeKv: position and row of the cache of each token, two words in shared memory
  __device__ void sync() const { hopper::named_barrier(1 + group, 128); }
  // Keeps what is computed from these out of the loop over tiles, whose registers are spoken for.
  __device__ void pin() { asm volatile("" : "+r"(thread), "+r"(warp), "+r"(lane), "+r"(buffer)); }
};

// Two values to the finite range of fp16; what is not a number stays so.
__device__ inline uint32_t q4_pack_saturated(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// fp16 values in shared memory: kPieces pieces of 16 bytes a token, shuffled so that 8 tokens meet every
// bank.
template <int kPieces>
__device__ inline uint32_t q4_piece(uint32_t token, uint32_t piece) {
  return (token * kPieces + (piece ^ (kPieces == 4 ? token / 2 % 4 : token % 8))) * 16;
}

template <class T>
__device__ void q4_drain_swiglu(const Q4GemmSink& s, const Q4DrainPlace& p,
                                const float (&acc)[T::kBlocks][T::kRegs]) {
  constexpr int kTokens = 32;  // of a store by all threads
  const int piece = int(p.thread % 4), token = p.token0 + int(p.thread / 4);
  const int column = p.row0 / 2 + piece * 8;
  const bool any = column < s.n / 2;
  __half* y = held_pointer(static_cast<__half*>(s.y) + token * s.y_pitch + column);
  const int64_t further = kTokens * s.y_pitch;
  const uint32_t to = held(p.buffer + q4_piece<4>(p.lane, p.warp)),
                 from = held(p.buffer + q4_piece<4>(p.thread / 4, piece));
  p.sync();  // whoever read the buffer has
#pragma unroll
  for (int j = 0; j < T::kColumns / 8; j += 4) {
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* c = &acc[0][4 * (j + i)];
      v[i] = q4_pack_saturated(silu(c[0]) * c[2], silu(c[1]) * c[3]);
    }
    hopper::store_matrices_transposed(to + j * 8 * 64, v);
  }
  p.sync();
#pragma unroll
  for (int i = 0; i < T::kColumns / kTokens; ++i, y += further) {
    const uint4 v = hopper::load_shared(from + i * kTokens * 64);
    if (any && token + kTokens * i < s.tokens) store_global_16(y, v);
  }
}

// What the next two take from memory is copied to shared memory some steps ahead, the first steps' before the
// sums are there: through registers it would wait, a few loads at a time, for as long as the product of a
// short tile takes. A step: some tokens of 64 rows.
template <class T>
struct Q4RopeSteps {
  static constexpr int kTokens = 32, kSteps = T::kColumns / kTokens, kAhead = 2;
  static constexpr int kBytes = kTokens * 256;  // 32 rotations a token
  static_assert(kTokens * 128 <= kQ4DrainAhead && kQ4DrainAhead + kAhead * kBytes <= kQ4DrainBytes);

  // A thread copies one of a token's 16 pieces of two rotations, four of each 16 rows, of every eighth token;
  // shuffled so that a half warp's reads meet every bank.
  const float* table;  // its piece, or null
  uint32_t to, at;     // of its first token
  int head_dim;
  __device__ Q4RopeSteps(const Q4GemmSink& s, const Q4DrainPlace& p) : head_dim(s.head_dim) {
    const int i = int(p.thread % 16), token = int(p.thread / 16), row = p.row0 + i / 4 * 16;
    table = held_pointer(row < s.rotated ? s.table + row % s.head_dim + i % 4 * 4 : nullptr);
    to = held(p.buffer + kQ4DrainAhead + token * 256 + (i ^ (token / 2 % 4 * 2)) * 16);
    at = held(p.at + token * 8);
  }
  __device__ void fetch(int step) const {
    if (step < kSteps && table)
#pragma unroll
      for (int t = 0; t < kTokens; t += 8)
        copy_async(to + step % kAhead * kBytes + t * 256,
                   table + int64_t(int(load_shared_4(at + (step * kTokens + t) * 8))) * head_dim);
    copy_commit();
  }
};

template <class T>
__device__ void q4_drain_rope(const Q4GemmSink& s, const Q4DrainPlace& p,
                              const float (&acc)[T::kBlocks][T::kRegs]) {
  using Steps = Q4RopeSteps<T>;
  const Steps steps(s, p);
  const bool turned = p.row0 + int(p.warp) * 16 < s.rotated;
  // This lane's rotations of the first two tokens of eight: rows warp * 16 + lane / 4 and 8 further.
  const uint32_t pair = p.lane % 4 * 2;
  const uint32_t turn_at = held(p.buffer + kQ4DrainAhead + pair * 256 +
                                ((p.warp * 4 + p.lane / 8) ^ pair) * 16 + p.lane / 4 % 2 * 8);
  const uint32_t low_to = held(p.buffer + q4_piece<8>(p.lane, p.warp * 2)),
                 high_to = held(p.buffer + q4_piece<8>(p.lane, p.warp * 2 + 1));
  // Pieces of eight values leave; a thread's are of one head.
  const int piece = int(p.thread % 8), local = int(p.thread / 8), row = p.row0 + piece / 2 * 16;
  const uint32_t from = held(p.buffer + q4_piece<8>(local, piece)), at = held(p.at + local * 8 + 4);
  const bool rotated = row < s.rotated;
  const int head = row / s.head_dim, half = s.head_dim / 2;
  const bool query = rotated && head < s.heads;
  const int64_t column =
      rotated ? (query ? head : head - s.heads) * s.head_dim + row % s.head_dim / 2 + piece % 2 * half
              : row - s.rotated + piece % 2 * 8;
  __half* const to = held_pointer(static_cast<__half*>(query ? s.y : rotated ? s.k : s.v) + column);
  const int pitch = int(held(uint32_t(query ? s.y_pitch : s.kv_heads * s.head_dim)));
  const int tokens = row < s.n ? s.tokens - p.token0 - local : 0;  // those that leave
#pragma unroll
  for (int step = 0; step < Steps::kSteps; ++step) {
    const int first = step * Steps::kTokens;
    copy_wait<Steps::kAhead - 1>();
    p.sync();  // all have their rotations, and whoever read the buffer has
    uint32_t low[4], high[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* c = &acc[0][4 * (first / 8 + j)];
      float v[4] = {c[0], c[1], c[2], c[3]};
      if (turned) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float2 turn =
              hopper::load_shared_pair(turn_at + step % Steps::kAhead * Steps::kBytes + (j * 8 + e) * 256);
          v[e] = c[e] * turn.x - c[2 + e] * turn.y;
          v[2 + e] = c[e] * turn.y + c[2 + e] * turn.x;
        }
      }
      low[j] = q4_pack_saturated(v[0], v[1]);
      high[j] = q4_pack_saturated(v[2], v[3]);
    }
    hopper::store_matrices_transposed(low_to, low);
    hopper::store_matrices_transposed(high_to, high);
    p.sync();
    steps.fetch(step + Steps::kAhead);
#pragma unroll
    for (int t = first; t < first + Steps::kTokens; t += 16) {
      const uint4 v = hopper::load_shared(from + (t - first) * 128);
      const int of = query ? p.token0 + local + t : int(load_shared_4(at + t * 8));
      if (t < tokens) store_global_16(to + int64_t(of) * pitch, v);
    }
  }
}

template <class T>
struct Q4StoreSteps {
  static constexpr int kTokens = 16, kSteps = T::kColumns / kTokens, kAhead = 4;
  static constexpr int kBytes = kTokens * 256;  // 64 rows a token
  static_assert(kBytes <= kQ4DrainAhead && kQ4DrainAhead + kAhead * kBytes <= kQ4DrainBytes);

  // A thread takes four rows of two tokens, eight apart, and fetches their residual itself.
  const float* residual;  // of the first token that is to be fetched
  uint32_t to;
  int pitch, tokens;  // tokens from there on
  __device__ Q4StoreSteps(const Q4GemmSink& s, const Q4DrainPlace& p, int step) : pitch(s.n) {
    const int row = p.row0 + int(p.thread % 16) * 4, token = p.token0 + step * kTokens + int(p.thread / 16);
    residual = held_pointer(s.residual ? s.residual + int64_t(token) * s.n + row : nullptr);
    to = held(p.buffer + kQ4DrainAhead + p.thread * 16);
    tokens = residual && row < s.n ? s.tokens - token : 0;
  }
  __device__ void fetch(int step) {
    if (step < kSteps)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (8 * i < tokens)
          copy_async(to + step % kAhead * kBytes + i * (kBytes / 2), residual + int64_t(8 * i) * pitch);
    copy_commit();
    residual += int64_t(kTokens) * pitch, tokens -= kTokens;
  }
};

template <class T>
__device__ void q4_drain_store(const Q4GemmSink& s, const Q4DrainPlace& p,
                               const float (&acc)[T::kBlocks][T::kRegs]) {
  using Steps = Q4StoreSteps<T>;
  constexpr auto piece_at = q4_piece<16>;
  Steps steps(s, p, Steps::kAhead);
  const int piece = int(p.thread % 16), local = int(p.thread / 16), row = p.row0 + piece * 4;
  const bool adds = s.residual;
  const uint32_t from = held(p.buffer + piece_at(local, piece));
  float* y = held_pointer(static_cast<float*>(s.y) + (p.token0 + local) * s.y_pitch + row);
  const int64_t further = 8 * s.y_pitch;
  int tokens = row < s.n ? s.tokens - p.token0 - local : 0;  // those that leave, from this step on
  uint32_t to[4];                                            // of the accumulators of eight tokens
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t token = p.lane % 4 * 2 + i % 2, g = p.lane / 4;
    to[i] = held(p.buffer + piece_at(token, p.warp * 4 + i / 2 * 2 + g / 4) + g % 4 * 4);
  }
#pragma unroll
  for (int step = 0; step < Steps::kSteps; ++step, tokens -= Steps::kTokens) {
    p.sync();  // whoever read the buffer has
#pragma unroll
    for (int j = 0; j < Steps::kTokens / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        hopper::store_shared(to[i] + j * 8 * 256, acc[0][4 * (step * Steps::kTokens / 8 + j) + i]);
    copy_wait<Steps::kAhead - 1>();
    p.sync();
#pragma unroll
    for (int i = 0; i < 2; ++i, y += further) {
      uint4 v = hopper::load_shared(from + i * 8 * 256);
      if (8 * i >= tokens) continue;
      if (adds) {
        const uint4 r =
            hopper::load_shared(steps.to + step % Steps::kAhead * Steps::kBytes + i * (Steps::kBytes / 2));
        v.x = __float_as_uint(__uint_as_float(v.x) + __uint_as_float(r.x));
        v.y = __float_as_uint(__uint_as_float(v.y) + __uint_as_float(r.y));
        v.z = __float_as_uint(__uint_as_float(v.z) + __uint_as_float(r.z));
        v.w = __float_as_uint(__uint_as_float(v.w) + __uint_as_float(r.w));
      }
      store_global_16(y, v);
    }
    steps.fetch(step + Steps::kAhead);
  }
}

// Before the sums are there: the first steps' reads. `at` is written and seen.
template <class T>
__device__ void q4_drain_begin(const Q4GemmSink& s, const Q4DrainPlace& p) {
  static_assert(T::kBlocks == 1);  // a warpgroup's rows are the same in all steps
  if (s.output == Q4GemmOutput::kRopeKv) {
    const Q4RopeSteps<T> steps(s, p);
#pragma unroll 1
    for (int step = 0; step < Q4RopeSteps<T>::kAhead; ++step) steps.fetch(step);
  }
  if (s.output == Q4GemmOutput::kStore) {
    Q4StoreSteps<T> steps(s, p, 0);
#pragma unroll 1
    for (int step = 0; step < Q4StoreSteps<T>::kAhead; ++step) steps.fetch(step);
  }
}

#endif  // Q4S_SM90A

}  // namespace q4s
