// The common epilogues of the streaming kernel, for outputs whose rows are whole 16-byte pieces: a warpgroup's sums
// become values in registers, pass through shared memory into the order of the output, and leave in 16-byte stores.
//   SiLU(gate) * up -> fp16, rotated q and k and plain v -> fp16, sum (+ residual) -> f32
// What they do not take (other types, odd sizes) goes through Q4SinkBatch.
#pragma once
#include "kernels/linear_q4_gemm_sm90_loop.cuh"

namespace q4s {

constexpr int kQ4DrainBytes = 16 * 1024;  // of one warpgroup: 64 rows x 128 tokens fp16, or x 64 tokens f32

// Host: whether the functions below take this product.
inline bool q4_drain_takes(const Q4GemmSink& s) {
  const auto whole = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  if (!whole(s.y) || s.y_pitch % 8) return false;
  switch (s.output) {
    case Q4GemmOutput::kStore:
      return !s.y_half && s.n % 4 == 0 && (!s.residual || whole(s.residual));
    case Q4GemmOutput::kSwiglu:
      return s.y_half && s.n % 16 == 0;
    case Q4GemmOutput::kRopeKv:
      return s.y_half && s.kv_half && whole(s.k) && whole(s.v);
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
    asm("{\n\t.reg .f32 t;\n\tmin.NaN.f32 t, %1, 0f477fe000;\n\tmax.NaN.f32 %0, t, 0fc77fe000;\n\t}" : "=f"(r) : "f"(v));
    return r;
  };
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(saturate(high)), "f"(saturate(low)));
  return packed;
}

// fp16 values in shared memory: kPieces pieces of 16 bytes a token, shuffled so that 8 tokens meet every bank.
template <int kPieces>
__device__ inline uint32_t q4_piece(uint32_t token, uint32_t piece) {
  return (token * kPieces + (piece ^ (kPieces == 4 ? token / 2 % 4 : token % 8))) * 16;
}

template <class T>
__device__ void q4_drain_swiglu(const Q4GemmSink& s, const Q4DrainPlace& p, const float (&acc)[T::kBlocks][T::kRegs]) {
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

template <class T>
__device__ void q4_drain_rope(const Q4GemmSink& s, const Q4DrainPlace& p, const float (&acc)[T::kBlocks][T::kRegs]) {
  constexpr int kTokens = 128;
  const int half = s.head_dim / 2;
#pragma unroll
  for (int b = 0; b < T::kBlocks; ++b) {
    const int row = p.row0 + b * 64 + int(p.warp) * 16;
    const float2* table = reinterpret_cast<const float2*>(s.table) + row % s.head_dim / 2 + p.lane / 4;
#pragma unroll
    for (int first = 0; first < T::kColumns; first += kTokens) {
      p.sync();  // whoever read the buffer has; `at` is written
#pragma unroll
      for (int j = 0; j < kTokens / 8; j += 4) {
        uint32_t low[4], high[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* c = &acc[b][4 * (first / 8 + j + i)];
          float v[4] = {c[0], c[1], c[2], c[3]};
          if (row < s.rotated) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float2 turn = table[int64_t(p.at[first + (j + i) * 8 + p.lane % 4 * 2 + e].x) * half];
              v[e] = c[e] * turn.x - c[2 + e] * turn.y;
              v[2 + e] = c[e] * turn.y + c[2 + e] * turn.x;
            }
          }
          low[i] = q4_pack_saturated(v[0], v[1]);
          high[i] = q4_pack_saturated(v[2], v[3]);
        }
        hopper::store_matrices_transposed(p.buffer + q4_piece<8>(j * 8 + p.lane, p.warp * 2), low);
        hopper::store_matrices_transposed(p.buffer + q4_piece<8>(j * 8 + p.lane, p.warp * 2 + 1), high);
      }
      p.sync();
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
      for (int i = 0; i < kTokens / 16; ++i) {
        const int local = int(p.thread / 8) + 16 * i, token = p.token0 + first + local;
        const int2 at = p.at[first + local];
        const uint4 v = hopper::load_shared(p.buffer + q4_piece<8>(local, piece));
        if (token < s.tokens)
          *reinterpret_cast<uint4*>(to + (query ? token * s.y_pitch : (at.y * s.ctx + at.x) * width)) = v;
      }
    }
  }
}

template <class T>
__device__ void q4_drain_store(const Q4GemmSink& s, const Q4DrainPlace& p, const float (&acc)[T::kBlocks][T::kRegs]) {
  constexpr int kTokens = 64;  // of 16 pieces of four rows
  constexpr auto piece_at = q4_piece<16>;
  const int piece = int(p.thread % 16);
#pragma unroll
  for (int b = 0; b < T::kBlocks; ++b) {
    const int row = p.row0 + b * 64 + piece * 4;
#pragma unroll
    for (int first = 0; first < T::kColumns; first += kTokens) {
      const int token0 = p.token0 + first + int(p.thread / 16);
      float4 r[kTokens / 8];
#pragma unroll
      for (int i = 0; i < kTokens / 8; ++i) {
        r[i] = make_float4(0, 0, 0, 0);
        if (s.residual && row < s.n && token0 + 8 * i < s.tokens)
          r[i] = *reinterpret_cast<const float4*>(s.residual + int64_t(token0 + 8 * i) * s.n + row);
      }
      p.sync();  // whoever read the buffer has
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t token = j * 8 + p.lane % 4 * 2 + i % 2, g = p.lane / 4;
          hopper::store_shared(p.buffer + piece_at(token, p.warp * 4 + i / 2 * 2 + g / 4) + g % 4 * 4,
                               acc[b][4 * (first / 8 + j) + i]);
        }
      p.sync();
#pragma unroll
      for (int i = 0; i < kTokens / 8; ++i) {
        const uint4 bits = hopper::load_shared(p.buffer + piece_at(p.thread / 16 + 8 * i, piece));
        if (row >= s.n || token0 + 8 * i >= s.tokens) continue;
        *reinterpret_cast<float4*>(static_cast<float*>(s.y) + (token0 + 8 * i) * s.y_pitch + row) =
            make_float4(__uint_as_float(bits.x) + r[i].x, __uint_as_float(bits.y) + r[i].y,
                        __uint_as_float(bits.z) + r[i].z, __uint_as_float(bits.w) + r[i].w);
      }
    }
  }
}

#endif  // Q4S_SM90A

}  // namespace q4s
