// linear_decode.h: what it takes, how a chain is cut, and the int4 kernels.
#include <algorithm>
#include <cassert>

#include "kernels/linear_decode.cuh"

namespace q4s {
namespace {

// What a block may have beside the attention that runs between two chains.
int shared_bytes() {
  constexpr int kOthers = 32 * 1024;
  return device_facts().shared_bytes - (device_facts().hopper ? kOthers : 0);
}

LinearDecodeProduct product_of(const LinearDecodeArgs& a) {
  const Q4Layout& l = a.w.layout;
  LinearDecodeProduct p{};
  p.codes = a.w.codes, p.scales = a.w.scales, p.x = a.x, p.gain = a.gain, p.residual = a.residual, p.y = a.y;
  p.table = a.table, p.position = a.at.position, p.sequence = a.at.sequence, p.kv = a.kv;
  p.eps = a.eps, p.inverse_k = 1 / float(l.k);
  p.n = int(l.n), p.k = int(l.k), p.k_tiles = int(l.k_tiles()), p.groups = int(l.groups());
  p.unit_groups = linear_decode_unit_groups(l);
  if (l.bits != 16 && l.group >= l.k) p.group_shift = 31;
  if (l.bits != 16 && l.group < l.k)
    for (int64_t g = kUnitColumns; g < l.group; g *= 2) ++p.group_shift;
  const bool half_step = l.bits == 4 && a.w.grid == Grid::kHalf;
  p.factor = half_step ? 2 : 1, p.offset = l.bits != 4 ? 0 : half_step ? 15 : 8;
  p.heads = int(a.heads), p.kv_heads = int(a.kv_heads), p.head_dim = int(l.head_dim), p.epilogue = a.epilogue;
  return p;
}

int64_t y_columns(const LinearDecodeProduct& p) {
  return p.epilogue == Epilogue::kSwiglu   ? p.n / 2
         : p.epilogue == Epilogue::kRopeKv ? p.heads * p.head_dim
                                           : p.n;
}

constexpr size_t kLaunchBytes = 4096;  // of the exchange: numbers of launches, before the packets

}  // namespace

bool linear_decode_follows(const LinearDecodeArgs& next, const LinearDecodeArgs& last) {
  return next.tokens == last.tokens && next.tokens <= kLinearDecodeChainTokens &&
         next.w.layout.bits == last.w.layout.bits && next.w.layout.k % 4 == 0 &&
         last.epilogue != Epilogue::kRopeKv &&
         last.w.layout.n <= (last.epilogue == Epilogue::kSwiglu ? 2 : 1) * kLinearDecodeChainColumns &&
         size_t(device_facts().multiprocessors) * sizeof(uint32_t) <= kLaunchBytes;
}

bool linear_decode_supported(const Q4Layout& l) {
  const LinearDecodeShape shape{l, l.k <= 8192};
  if (linear_decode_config(&shape, 1, 1, device_facts().multiprocessors, shared_bytes()).shared >
      shared_bytes())
    return false;
  if (l.bits == 16 || l.group >= l.k) return true;
  int64_t g = 32;
  while (g < l.group) g *= 2;
  return g == l.group;
}

void linear_decode_cuda(const LinearDecodeArgs* chain, size_t count, std::byte* exchange, cudaStream_t stream,
                        bool pdl) {
  // Bytes on their way: what the memory's latency asks for; less while x is on its way too, which would wait
  // in the memory's queues behind them.
  constexpr int kAhead = 64 * 1024, kAheadNext = 32 * 1024;
  assert(count > 0 && count <= kLinearDecodeChain);
  LinearDecodeParams p{};
  LinearDecodeShape shapes[kLinearDecodeChain];
  const int tokens = int(chain[0].tokens), bits = chain[0].w.layout.bits;
  for (size_t i = 0; i < count; ++i) {
    assert(i == 0 || linear_decode_follows(chain[i], chain[i - 1]));
    p.product[i] = product_of(chain[i]);
    shapes[i] = {chain[i].w.layout, chain[i].gain != nullptr};
  }
  p.count = int(count);
  if (count > 1) {
    p.launches = reinterpret_cast<uint32_t*>(exchange);
    uint64_t* packets = reinterpret_cast<uint64_t*>(exchange + kLaunchBytes);
    for (int i = 0; i + 1 < p.count; ++i) {
      LinearDecodeProduct& from = p.product[i];
      from.y_packets = packets;
      packets += tokens * y_columns(from);
      for (int j = i + 1; j < p.count; ++j) {
        LinearDecodeProduct& to = p.product[j];
        if (chain[j].x == from.y) to.x = nullptr, to.x_packets = from.y_packets;
        if (chain[j].residual == from.y) to.residual = nullptr, to.residual_packets = from.y_packets;
      }
    }
  }
  p.config = linear_decode_config(shapes, count, tokens, device_facts().multiprocessors, shared_bytes());
  p.ahead = std::clamp(kAhead / p.config.stage_scales, 1, p.config.stages);
  p.ahead_next = std::clamp(kAheadNext / p.config.stage_scales, 1, p.config.stages);
  assert(count == 1 || p.config.tokens == tokens);
  for (int t = 0; t < tokens; t += p.config.tokens) {
    p.tokens = std::min(p.config.tokens, tokens - t);
    bits == 4 ? launch_linear_decode<Int4Tile>(p, stream, pdl)
              : launch_linear_decode_wide(p, bits, stream, pdl);
    for (int i = 0; i < p.count; ++i) {
      LinearDecodeProduct& a = p.product[i];
      const int64_t done = p.tokens;
      a.x += done * a.k, a.y += done * y_columns(a);
      if (a.residual) a.residual += done * a.n;
      if (a.position) a.position += done, a.sequence += done;
    }
  }
}

}  // namespace q4s
