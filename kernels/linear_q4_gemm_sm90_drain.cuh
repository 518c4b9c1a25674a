// The common epilogues of the streaming kernel, for outputs whose rows are whole 16-byte pieces: a
// warpgroup's sums become values in registers, pass through shared memory into the order of the output, and
// leave in 16-byte stores.
//   SiLU(gate) * up -> fp16, rotated q and k and plain v -> fp16, sum (+ residual) -> f32
// What they do not take (other types, odd sizes) goes through Q4SinkBatch.
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

// Where a warpgroup's part of a tile stands, and what it drains through.
struct Q4DrainPlace {
  int row0, token0, group;
  uint32_t thread, warp, lane;
  uint32_t buffer;  // kQ4DrainBytes of shared memory
  const int2* at;   // kRopeKv: (position, sequence) of each token, in shared memory
  __device__ void sync() const { hopper::named_barrier(1 + group, 128); }
  // Keeps what is computed from these out of the loop over tiles, whose registers are spoken for.
  __device__ void pin() { asm volatile("" : "+r"(thread), "+r"(warp), "+r"(lane), "+r"(buffer)); }
};

// Two values to the finite range of fp16; what is not a number stays so.
__device__ inline uint32_t q4_pack_saturated(float low, float high) {
  const auto saturate = [](float v) {
    float r;
    asm("{\n\t.reg .f32 t;\n\tmin.NaN.f32 t, %1, 0f477fe000;\n\tmax.NaN.f32 %0, t, 0fc77fe000;\n\t}"
        : "=f"(r)
        : "f"(v));
    return r;
  };
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(saturate(high)), "f"(saturate(low)));
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
#pragma unroll
  for (int b = 0; b < T::kBlocks; ++b) {
    p.sync();  // whoever read the buffer has
#pragma unroll
    for (int j = 0; j < T::kColumns / 8; j += 4) {
      uint32_t v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* c = &acc[b][4 * (j + i)];
        v[i] = q4_pack_saturated(silu(c[0]) * c[2], silu(c[1]) * c[3]);
      }
      hopper::store_matrices_transposed(p.buffer + q4_piece<4>(j * 8 + p.lane, p.warp), v);
    }
    p.sync();
    const int piece = int(p.thread % 4), column = (p.row0 + b * 64) / 2 + piece * 8;
    if (column >= s.n / 2) continue;
    __half* y = static_cast<__half*>(s.y) + column;
#pragma unroll
    for (int i = 0; i < T::kColumns / 32; ++i) {
      const int token = int(p.thread / 4) + 32 * i;
      const uint4 v = hopper::load_shared(p.buffer + q4_piece<4>(token, piece));
      if (p.token0 + token < s.tokens) *reinterpret_cast<uint4*>(y + (p.token0 + token) * s.y_pitch) = v;
    }
  }
}

// What the next two take from memory is copied to shared memory some steps ahead, the first steps' before the
// sums are there: through registers it would wait, a few loads at a time, for as long as the product of a
// short tile takes. A step: some tokens of 64 rows.
template <class T>
struct Q4RopeSteps {
  static constexpr int kTokens = 32, kOfBlock = T::kColumns / kTokens, kSteps = T::kBlocks * kOfBlock,
                       kAhead = 2;
  static constexpr int kBytes = kTokens * 256;  // 32 rotations a token
  static_assert(kTokens * 128 <= kQ4DrainAhead && kQ4DrainAhead + kAhead * kBytes <= kQ4DrainBytes);

  // 16 pieces of two rotations a token, four of each 16 rows; shuffled so that a half warp's reads meet every
  // bank.
  static __device__ uint32_t piece(uint32_t token, uint32_t i) {
    return token * 256 + (i ^ (token / 2 % 4 * 2)) * 16;
  }
  static __device__ uint32_t ahead(const Q4DrainPlace& p, int step) {
    return p.buffer + kQ4DrainAhead + step % kAhead * kBytes;
  }
  static __device__ void fetch(const Q4GemmSink& s, const Q4DrainPlace& p, int step) {
    const int i = int(p.thread % 16), row = p.row0 + step / kOfBlock * 64 + i / 4 * 16;
    if (step < kSteps && row < s.rotated) {
      const float* table = s.table + row % s.head_dim + i % 4 * 4;
#pragma unroll
      for (int t = int(p.thread / 16); t < kTokens; t += 8)
        copy_async(ahead(p, step) + piece(t, i),
                   table + int64_t(p.at[step % kOfBlock * kTokens + t].x) * s.head_dim);
    }
    copy_commit();
  }
};

template <class T>
__device__ void q4_drain_rope(const Q4GemmSink& s, const Q4DrainPlace& p,
                              const float (&acc)[T::kBlocks][T::kRegs]) {
  using Steps = Q4RopeSteps<T>;
  const int half = s.head_dim / 2;
#pragma unroll
  for (int step = 0; step < Steps::kSteps; ++step) {
    const int b = step / Steps::kOfBlock, first = step % Steps::kOfBlock * Steps::kTokens;
    const bool turned = p.row0 + b * 64 + int(p.warp) * 16 < s.rotated;
    copy_wait<Steps::kAhead - 1>();
    p.sync();  // all have their rotations, and whoever read the buffer has
    uint32_t low[4], high[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* c = &acc[b][4 * (first / 8 + j)];
      float v[4] = {c[0], c[1], c[2], c[3]};
      if (turned) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float2 turn = hopper::load_shared_pair(
              Steps::ahead(p, step) + Steps::piece(j * 8 + p.lane % 4 * 2 + e, p.warp * 4 + p.lane / 8) +
              p.lane / 4 % 2 * 8);
          v[e] = c[e] * turn.x - c[2 + e] * turn.y;
          v[2 + e] = c[e] * turn.y + c[2 + e] * turn.x;
        }
      }
      low[j] = q4_pack_saturated(v[0], v[1]);
      high[j] = q4_pack_saturated(v[2], v[3]);
    }
    hopper::store_matrices_transposed(p.buffer + q4_piece<8>(p.lane, p.warp * 2), low);
    hopper::store_matrices_transposed(p.buffer + q4_piece<8>(p.lane, p.warp * 2 + 1), high);
    p.sync();
    Steps::fetch(s, p, step + Steps::kAhead);
    const int piece = int(p.thread % 8), from = p.row0 + b * 64 + piece / 2 * 16;
    if (from >= s.n) continue;
    const int head = from / s.head_dim;
    const bool rotated = from < s.rotated, query = rotated && head < s.heads;
    const int64_t column =
        rotated ? (query ? head : head - s.heads) * s.head_dim + from % s.head_dim / 2 + piece % 2 * half
                : from - s.rotated + piece % 2 * 8;
    __half* to = static_cast<__half*>(query ? s.y : rotated ? s.k : s.v) + column;
    const int64_t width = s.kv_heads * s.head_dim;
#pragma unroll
    for (int i = 0; i < Steps::kTokens / 16; ++i) {
      const int local = int(p.thread / 8) + 16 * i, token = p.token0 + first + local;
      const int2 at = p.at[first + local];
      const uint4 v = hopper::load_shared(p.buffer + q4_piece<8>(local, piece));
      if (token < s.tokens)
        *reinterpret_cast<uint4*>(to + (query ? token * s.y_pitch : (at.y * s.ctx + at.x) * width)) = v;
    }
  }
}

template <class T>
struct Q4StoreSteps {
  static constexpr int kTokens = 16, kOfBlock = T::kColumns / kTokens, kSteps = T::kBlocks * kOfBlock,
                       kAhead = 4;
  static constexpr int kBytes = kTokens * 256;  // 64 rows a token
  static_assert(kBytes <= kQ4DrainAhead && kQ4DrainAhead + kAhead * kBytes <= kQ4DrainBytes);

  // A thread takes four rows of two tokens, and fetches their residual itself.
  static __device__ uint32_t ahead(const Q4DrainPlace& p, int step, int i) {
    return p.buffer + kQ4DrainAhead + step % kAhead * kBytes + i * (kBytes / 2) + p.thread * 16;
  }
  static __device__ void fetch(const Q4GemmSink& s, const Q4DrainPlace& p, int step) {
    const int row = p.row0 + step / kOfBlock * 64 + int(p.thread % 16) * 4;
    const int token = p.token0 + step % kOfBlock * kTokens + int(p.thread / 16);
    if (step < kSteps && s.residual && row < s.n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (token + 8 * i < s.tokens)
          copy_async(ahead(p, step, i), s.residual + int64_t(token + 8 * i) * s.n + row);
    copy_commit();
  }
};

template <class T>
__device__ void q4_drain_store(const Q4GemmSink& s, const Q4DrainPlace& p,
                               const float (&acc)[T::kBlocks][T::kRegs]) {
  using Steps = Q4StoreSteps<T>;
  constexpr auto piece_at = q4_piece<16>;
  const int piece = int(p.thread % 16), local = int(p.thread / 16);
#pragma unroll
  for (int step = 0; step < Steps::kSteps; ++step) {
    const int b = step / Steps::kOfBlock, first = step % Steps::kOfBlock * Steps::kTokens;
    p.sync();  // whoever read the buffer has
#pragma unroll
    for (int j = 0; j < Steps::kTokens / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t token = j * 8 + p.lane % 4 * 2 + i % 2, g = p.lane / 4;
        hopper::store_shared(p.buffer + piece_at(token, p.warp * 4 + i / 2 * 2 + g / 4) + g % 4 * 4,
                             acc[b][4 * (first / 8 + j) + i]);
      }
    copy_wait<Steps::kAhead - 1>();
    p.sync();
    const int row = p.row0 + b * 64 + piece * 4, token = p.token0 + first + local;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint4 v = hopper::load_shared(p.buffer + piece_at(local + 8 * i, piece));
      if (row >= s.n || token + 8 * i >= s.tokens) continue;
      if (s.residual) {
        const uint4 r = hopper::load_shared(Steps::ahead(p, step, i));
        v.x = __float_as_uint(__uint_as_float(v.x) + __uint_as_float(r.x));
        v.y = __float_as_uint(__uint_as_float(v.y) + __uint_as_float(r.y));
        v.z = __float_as_uint(__uint_as_float(v.z) + __uint_as_float(r.z));
        v.w = __float_as_uint(__uint_as_float(v.w) + __uint_as_float(r.w));
      }
      *reinterpret_cast<uint4*>(static_cast<float*>(s.y) + (token + 8 * i) * s.y_pitch + row) = v;
    }
    Steps::fetch(s, p, step + Steps::kAhead);
  }
}

// Before the sums are there: the first steps' reads. `at` is written and seen.
template <class T>
__device__ void q4_drain_begin(const Q4GemmSink& s, const Q4DrainPlace& p) {
  if (s.output == Q4GemmOutput::kRopeKv)
#pragma unroll 1
    for (int step = 0; step < Q4RopeSteps<T>::kAhead; ++step) Q4RopeSteps<T>::fetch(s, p, step);
  if (s.output == Q4GemmOutput::kStore)
#pragma unroll 1
    for (int step = 0; step < Q4StoreSteps<T>::kAhead; ++step) Q4StoreSteps<T>::fetch(s, p, step);
}

#endif  // Q4S_SM90A

}  // namespace q4s
