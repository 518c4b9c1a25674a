#include "runtime/ops_cuda.h"

#include <stdexcept>

#include "kernels/attention_decode.h"
#include "kernels/attention_prefill.h"
#include "kernels/embed.h"
#include "kernels/linear_q4_gemm.h"
#include "kernels/rms_norm.h"
#include "kernels/rotate.h"
#include "kernels/swiglu.h"
#include "runtime/plan.h"
#include "runtime/weights_cuda.h"

namespace q4s {
namespace {

size_t aligned(int64_t bytes) { return size_t(round_up(bytes, int64_t(kArenaAlign))); }

// Of split products: at most one part of the largest tile for each multiprocessor, and the counters. Of split
// attention.
size_t split_bytes(int multiprocessors) {
  return std::max(4096 + size_t(multiprocessors) * 128 * 256 * sizeof(float),
                  size_t(aligned(int64_t(attention_decode_scratch_bytes(multiprocessors)))));
}
// Behind them what chains of either kind exchange.
size_t gemm_exchange_at(int multiprocessors) {
  return split_bytes(multiprocessors) + size_t(aligned(int64_t(kLinearDecodeExchange)));
}
size_t workspace_bytes(int multiprocessors) {
  return gemm_exchange_at(multiprocessors) + aligned(int64_t(kQ4GemmExchange));
}
std::byte* gemm_exchange(const CudaStep& s) { return s.scratch + gemm_exchange_at(s.multiprocessors); }

// Whether the rows of w are packed as a kernel with this epilogue needs them.
bool packed_for(const DeviceMatrix& w, Epilogue epilogue) {
  static constexpr RowMap kMaps[] = {RowMap::kPlain, RowMap::kPairHalves, RowMap::kRope};
  return w.tiled && w.tiles.layout.map == kMaps[int(epilogue)];
}

bool few(const DeviceMatrix& w, Epilogue epilogue, int64_t rows) {
  return packed_for(w, epilogue) && rows <= linear_decode_most_tokens(w.tiles.layout.bits) &&
         linear_decode_supported(w.tiles.layout);
}
bool many(const DeviceMatrix& w, Epilogue epilogue, int64_t rows) {
  return packed_for(w, epilogue) && !few(w, epilogue, rows) &&
         (w.view.format == Format::kQ4 || (w.view.format == Format::kQ8 && rows <= kQ4GemmInt8Tokens));
}

// Working memory of one node beside its inputs and result. The workspace of split products comes first, the
// same for every node of every graph: its head holds counters that each product leaves at zero for the next.
struct Scratch {
  size_t norm = 0, product = 0, rest = 0, bytes = 0;  // offsets and end: f32 (T, K) and (T, N) of a linear
                                                      // that runs as its parts, then what those need

  Scratch(const Tensor& t, int64_t rows, size_t workspace)
      : norm(workspace), product(norm), rest(norm), bytes(norm) {
    if (t.op != Op::kLinear) return;
    const DeviceMatrix w = device_matrix_of(*t.weight);
    const size_t operand = aligned(rows * q4_gemm_pitch(w.view.k) * 2);
    if (few(w, t.epilogue, rows) || many(w, t.epilogue, rows)) {  // and so for any fewer rows
      bytes = rest + operand;
      return;
    }
    product = norm + (t.gain ? aligned(rows * w.view.k * 4) : 0);
    rest = product + (t.epilogue != Epilogue::kNone ? aligned(rows * w.view.n * 4) : 0);
    bytes = rest + std::max(DenseCuda::scratch_bytes(w, rows), operand);
  }
};

const float* vector_of(const Weight& w) { return reinterpret_cast<const float*>(on_device(w).view.data); }

void run_embed(Tensor& t, const CudaStep& s) {
  embed_cuda(on_device(*t.weight), t.src[0]->i32(), t.f32(), s.counts.of(t.rows), s.stream);
}

void run_gather(Tensor& t, const CudaStep& s) {
  DeviceMatrix rows;
  rows.view = {.format = Format::kF32,
               .n = s.counts.tokens,
               .k = t.cols,
               .data = reinterpret_cast<const uint8_t*>(t.src[0]->data)};
  embed_cuda(rows, t.src[1]->i32(), t.f32(), s.counts.of(t.rows), s.stream);
}

void run_rms_norm(Tensor& t, const CudaStep& s) {
  rms_norm_cuda({t.src[0]->f32(), vector_of(*t.weight), t.f32(), s.counts.of(t.rows), t.cols, t.eps},
                s.stream);
}

void rope_kv(const Tensor& t, const float* qkv, const Weight& table, float* q, const CudaStep& s) {
  rope_kv_cuda({qkv,
                vector_of(table),
                {t.src[1]->i32(), t.src[2]->i32()},
                s.kv.layer(t.head.layer),
                q,
                s.counts.of(t.rows),
                t.head.heads,
                t.head.kv_heads,
                t.head.head_dim},
               s.stream);
}

// Whether attention goes by tiles of queries: where many of one sequence share its keys.
bool tiled_attention(const HeadShape& h, const Counts& counts, const KvLayer& kv) {
  return counts.tokens > kLinearDecodeTokens && !counts.apart && attention_prefill_supported(kv, h.head_dim);
}

// Whether it goes token by token, each over its own part of the cache.
bool decode_attention(const HeadShape& h, const Counts& counts) {
  return (counts.tokens <= kLinearDecodeTokens || counts.apart) && h.head_dim <= 256;
}

// Whether this step stores t as fp16, (rows, cols) in the first half of its memory: what the one operation
// that reads it wants. Between gate|up and down, qkv and attention by tiles, attention and o.
bool stored_half(const Tensor& t, const CudaStep& s) {
  if (s.observed || t.keep || t.readers != 1 || t.cols % kQ4TileCols != 0) return false;
  const Tensor& reader = *t.reader;
  if (t.op == Op::kLinear && t.epilogue == Epilogue::kRopeKv)
    return reader.op == Op::kAttention && tiled_attention(reader.head, s.counts, s.kv.layer(0)) &&
           many(on_device(*t.weight), t.epilogue, s.counts.of(t.rows));
  if (reader.op != Op::kLinear || reader.gain || reader.epilogue != Epilogue::kNone || reader.src[0] != &t)
    return false;
  const int64_t rows = s.counts.of(t.rows);
  const DeviceMatrix& w = on_device(*reader.weight);
  if (few(w, Epilogue::kNone, rows) || !(many(w, Epilogue::kNone, rows) || DenseCuda::multiplies_f16(w)))
    return false;
  if (t.op == Op::kLinear)
    return t.epilogue == Epilogue::kSwiglu && !few(on_device(*t.weight), t.epilogue, rows);
  if (t.op != Op::kAttention) return false;
  const KvLayer kv = s.kv.layer(0);
  return tiled_attention(t.head, s.counts, kv) ||
         (decode_attention(t.head, s.counts) && kv.type == KvType::kF16 && t.head.head_dim % 8 == 0);
}

// No position of the step reaches this.
int64_t reach(const CudaStep& s) { return s.counts.reach ? s.counts.reach : s.kv.ctx; }

void run_gemm_chain(const CudaStep& s) {
  std::vector<Q4GemmArgs> products;
  std::swap(products, s.gemm_chain.products);
  if (!products.empty()) q4_gemm_chain_cuda(products.data(), products.size(), gemm_exchange(s), s.stream);
}

// A linear with this epilogue for few tokens, its largest number at a time, joins the chain; false where it
// cannot.
bool linear_few(const Tensor& t, Epilogue epilogue, const float* residual, float* y, const CudaStep& s) {
  const DeviceMatrix& w = on_device(*t.weight);
  const int64_t cols = epilogue == Epilogue::kNone ? w.view.n : t.cols, rows = s.counts.of(t.rows);
  if (!few(w, epilogue, rows)) return false;
  for (int64_t i = 0; i < rows; i += kLinearDecodeTokens) {
    LinearDecodeArgs a;
    a.x = t.src[0]->f32() + i * w.view.k;
    a.gain = t.gain ? vector_of(*t.gain) : nullptr;
    a.eps = t.eps;
    a.w = w.tiles;
    a.epilogue = epilogue;
    a.residual = residual ? residual + i * cols : nullptr;
    a.y = y + i * cols;
    a.tokens = std::min(kLinearDecodeTokens, rows - i);
    if (epilogue == Epilogue::kRopeKv) {
      a.table = vector_of(*t.weight2);
      a.at = {t.src[1]->i32() + i, t.src[2]->i32() + i};
      a.kv = s.kv.layer(t.head.layer);
      a.heads = t.head.heads;
      a.kv_heads = t.head.kv_heads;
    }
    run_gemm_chain(s);
    if (t.gain) s.gemm_chain.normalised = nullptr;
    DecodeChain& chain = s.chain;
    a.attends = chain.attention && chain.attention == t.src[0];
    if (a.attends) a.longest = reach(s);
    if ((chain.attention && !a.attends) || chain.products.size() == kLinearDecodeChain ||
        (!chain.products.empty() && !linear_decode_follows(a, chain.products.back()))) {
      run_chain_cuda(s);
      a.attends = false;
    }
    chain.attention = nullptr;
    chain.products.push_back(a);
  }
  return true;
}

Q4GemmConfig gemm_config(const DeviceMatrix& w, int64_t rows, const CudaStep& s) {
  return q4_gemm_config({rows, w.tiles.layout, s.multiprocessors, s.hopper});
}

// Whether t, as `a`, may be launched with the chain's last product and those before: then its x is what that
// makes.
bool joins(const Tensor& t, const Q4GemmArgs& a, const CudaStep& s) {
  const GemmChain& chain = s.gemm_chain;
  if (chain.products.empty() || chain.products.size() == kQ4GemmChain || chain.last != t.src[0] ||
      s.observed || !q4_gemm_follows(a, chain.products.back()))
    return false;
  // The stream: what its norm's factor was before is known of the stream that the maker added to. Else no one
  // but t may want what the other product makes.
  return t.gain ? chain.last->src[1] && chain.last->src[1] == chain.normalised : stored_half(*t.src[0], s);
}

// The same for many tokens.
bool linear_many(const Tensor& t, Epilogue epilogue, const float* residual, float* y, const CudaStep& s) {
  const DeviceMatrix& w = on_device(*t.weight);
  const int64_t rows = s.counts.of(t.rows);
  if (!many(w, epilogue, rows)) return false;
  const Q4GemmConfig config = gemm_config(w, rows, s);
  if (config.workspace_bytes > split_bytes(s.multiprocessors))
    throw std::logic_error("workspace of a product: " + config.print());
  Q4GemmArgs a{};
  a.w = w.tiles.layout;
  a.grid = w.tiles.grid;
  a.codes = w.tiles.codes;
  a.scales = w.tiles.scales;
  a.tokens = rows;
  a.output = epilogue == Epilogue::kNone     ? Q4GemmOutput::kStore
             : epilogue == Epilogue::kSwiglu ? Q4GemmOutput::kSwiglu
                                             : Q4GemmOutput::kRopeKv;
  a.y = y;
  a.y_half = epilogue == t.epilogue && stored_half(t, s);
  a.y_pitch = epilogue == Epilogue::kNone ? w.view.n : t.cols;
  a.residual = residual;
  if (epilogue == Epilogue::kRopeKv) {
    a.table = vector_of(*t.weight2);
    a.at = {t.src[1]->i32(), t.src[2]->i32()};
    a.kv = s.kv.layer(t.head.layer);
    a.heads = t.head.heads;
    a.kv_heads = t.head.kv_heads;
  }
  a.workspace = s.scratch;
  a.pdl = true;
  a.gain = t.gain ? vector_of(*t.gain) : nullptr, a.eps = t.eps;
  GemmChain& chain = s.gemm_chain;
  const bool few = config.kernel == Q4GemmKernel::kFew;
  if (few && joins(t, a, s)) {
    if (!t.gain) chain.products.back().y = nullptr;
  } else {
    run_chain_cuda(s);
    if (!t.gain && stored_half(*t.src[0], s)) {
      a.x = reinterpret_cast<const uint16_t*>(t.src[0]->data);
    } else {
      const Scratch at(t, rows, workspace_bytes(s.multiprocessors));
      uint16_t* const x = reinterpret_cast<uint16_t*>(s.scratch + at.rest);
      q4_gemm_activations_cuda({t.src[0]->f32(), a.gain, x, rows, w.view.k, t.eps, true,
                                few && t.gain ? q4_gemm_guess(gemm_exchange(s)) : nullptr},
                               s.stream);
      a.x = x;
    }
  }
  if (t.gain) chain.normalised = few ? t.src[0] : nullptr;
  if (!few) {
    q4_gemm_cuda(a, config, s.stream);
    return true;
  }
  chain.last = &t;
  chain.products.push_back(a);
  return true;
}

// A linear of any form: in one kernel where there is one, else as its parts.
void run_linear(Tensor& t, const CudaStep& s) {
  const int64_t rows = s.counts.of(t.rows);
  if (rows == 0) return;
  const float* residual = t.epilogue != Epilogue::kRopeKv && t.src[1] ? t.src[1]->f32() : nullptr;
  if (linear_few(t, t.epilogue, residual, t.f32(), s) || linear_many(t, t.epilogue, residual, t.f32(), s))
    return;

  run_chain_cuda(s);
  const DeviceMatrix& w = on_device(*t.weight);
  const Scratch at(t, rows, workspace_bytes(s.multiprocessors));
  float* norm = reinterpret_cast<float*>(s.scratch + at.norm);
  float* product = t.epilogue == Epilogue::kNone ? t.f32() : reinterpret_cast<float*>(s.scratch + at.product);
  if (!linear_few(t, Epilogue::kNone, residual, product, s) &&
      !linear_many(t, Epilogue::kNone, residual, product, s)) {
    const float* x = t.src[0]->f32();
    if (stored_half(*t.src[0], s)) {
      s.dense.linear_f16(x, w, residual, product, rows, s.scratch + at.rest);
    } else if (t.gain && DenseCuda::multiplies_f16(w)) {
      s.dense.norm_linear(x, vector_of(*t.gain), t.eps, w, residual, product, rows, s.scratch + at.rest);
    } else {
      if (t.gain) rms_norm_cuda({x, vector_of(*t.gain), norm, rows, w.view.k, t.eps}, s.stream);
      s.dense.linear(t.gain ? norm : x, w, residual, product, rows, s.scratch + at.rest);
    }
  }
  run_chain_cuda(s);
  if (t.epilogue == Epilogue::kSwiglu && stored_half(t, s))
    swiglu_f16_cuda({product, nullptr, rows, t.cols}, t.data, s.stream);
  else if (t.epilogue == Epilogue::kSwiglu)
    swiglu_cuda({product, t.f32(), rows, t.cols}, s.stream);
  else if (t.epilogue == Epilogue::kRopeKv)
    rope_kv(t, product, *t.weight2, t.f32(), s);
}

void run_rope_kv(Tensor& t, const CudaStep& s) { rope_kv(t, t.src[0]->f32(), *t.weight, t.f32(), s); }

// Whether attention may wait for the product that alone reads it, to be part of a chain.
bool attention_in_chain(const Tensor& t, const CudaStep& s) {
  const std::vector<LinearDecodeArgs>& made = s.chain.products;
  return !s.observed && !t.keep && t.readers == 1 && t.reader->op == Op::kLinear && !t.reader->gain &&
         t.reader->src[0] == &t && (s.counts.of(t.rows) == 1 || s.counts.apart) && !made.empty() &&
         made.back().epilogue == Epilogue::kRopeKv && made.back().y == t.src[0]->f32();
}

void run_attention(Tensor& t, const CudaStep& s) {
  const HeadShape& h = t.head;
  const int64_t rows = s.counts.of(t.rows);
  const Placement at{t.src[1]->i32(), t.src[2]->i32()};
  const KvLayer kv = s.kv.layer(h.layer);
  if (tiled_attention(h, s.counts, kv))
    attention_prefill_cuda({t.src[0]->data, stored_half(*t.src[0], s), at, kv, t.data, stored_half(t, s),
                            rows, h.heads, h.kv_heads, h.head_dim},
                           s.stream);
  else if (decode_attention(h, s.counts))
    attention_decode_cuda({t.src[0]->f32(), at, kv, t.data, stored_half(t, s), rows, h.heads, h.kv_heads,
                           h.head_dim, reach(s), s.counts.apart ? 1 : rows, s.scratch},
                          s.stream, true);
  else
    attention_reference_cuda(
        {t.src[0]->f32(), at, kv, t.f32(), rows, h.heads, h.kv_heads, h.head_dim, nullptr}, s.stream);
}

void run_swiglu(Tensor& t, const CudaStep& s) {
  swiglu_cuda({t.src[0]->f32(), t.f32(), s.counts.of(t.rows), t.cols}, s.stream);
}

void run_rotate(Tensor& t, const CudaStep& s) {
  rotate_cuda({t.src[0]->f32(), vector_of(*t.weight), vector_of(*t.weight2), t.f32(), s.counts.of(t.rows),
               t.cols, t.weight2->view.n, t.inverse},
              s.stream);
}

using Run = void (*)(Tensor&, const CudaStep&);
constexpr Run kTable[] = {[](Tensor&, const CudaStep&) {},
                          run_embed,
                          run_gather,
                          run_rms_norm,
                          run_linear,
                          run_rope_kv,
                          run_attention,
                          run_swiglu,
                          run_rotate};
static_assert(std::size(kTable) == kOpCount, "an operation without a CUDA kernel");

}  // namespace

size_t node_scratch_cuda(const Graph& g, int multiprocessors) {
  const size_t workspace = workspace_bytes(multiprocessors);
  size_t most = workspace;
  for (const auto& n : g.nodes()) most = std::max(most, Scratch(*n, g.max().of(n->rows), workspace).bytes);
  return aligned(int64_t(most));
}

void run_node_cuda(Tensor& t, const CudaStep& s) {
  if (t.op == Op::kAttention && attention_in_chain(t, s)) {
    s.chain.attention = &t;
    return;
  }
  if (t.op != Op::kLinear && t.op != Op::kInput) run_chain_cuda(s);
  kTable[int(t.op)](t, s);
}

void run_chain_cuda(const CudaStep& s) {
  run_gemm_chain(s);
  DecodeChain chain;
  std::swap(chain, s.chain);
  if (!chain.products.empty())
    linear_decode_cuda(chain.products.data(), chain.products.size(),
                       s.scratch + split_bytes(s.multiprocessors), s.stream, true);
  if (chain.attention) run_attention(*chain.attention, s);
}

}  // namespace q4s
