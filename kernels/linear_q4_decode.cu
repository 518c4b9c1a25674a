// linear_decode.h: what it takes, how a chain is cut, and the int4 kernels.
#include <algorithm>
#include <cassert>
#include <stdexcept>

#include "kernels/linear_decode.cuh"

namespace q4s {
namespace {

// Of a block: all there is, for the ring. With 32 KB less of it a step takes 2.5 % longer.
int shared_bytes() { return device_facts().shared_bytes; }

// Tokens up to which blocks work alone where they could work in pairs, since what the two hand each other
// takes longer than what they save.
constexpr int kAlone = 4;
// Whether pairs of blocks can have all multiprocessors at once, which a chain needs.
bool pairs_fit() {
  static const bool fit = [] {
    if (!device_facts().hopper || device_facts().multiprocessors % kDecodePair != 0) return false;
    const auto kernel = linear_decode_pair_kernel<Int4Tile, kLinearDecodeChainTokens, kLinearDecodeChain>;
    return clusters_fit("linear_decode", kernel, (kDecodeWarps + kDecodeReducers + 1) * 32,
                        size_t(shared_bytes()), kDecodePair) >= device_facts().multiprocessors / kDecodePair;
  }();
  return fit;
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

constexpr size_t kCounterBytes = 4096;  // of the exchange: products done, before the packets
constexpr int64_t kPlace =
    kLinearDecodeChainTokens * kLinearDecodeChainColumns / kPacketValues;  // of a product

// Those of attention: its result, then what the blocks that share it hand each other.
Packet* attention_packets(std::byte* exchange) {
  return reinterpret_cast<Packet*>(exchange + kCounterBytes) + 4 * kPlace;
}

// Who reads whose packets: x of the products of a chain. What a product makes is read by the next two, and no
// block writes to the place of those before it has all of theirs, so four places do, and one for attention.
void connect(const LinearDecodeArgs* chain, std::vector<LinearDecodeProduct>& products, std::byte* exchange) {
  Packet* packets = reinterpret_cast<Packet*>(exchange + kCounterBytes);
  const auto place = [&](size_t i) { return packets + int64_t(i % 4) * kPlace; };
  const auto maker = [&](const float* of, size_t before) {  // the last product that made it, or -1
    int i = int(before) - 1;
    while (i >= 0 && (chain[i].y != of || chain[i].epilogue == Epilogue::kRopeKv)) --i;
    return i;
  };
  for (size_t i = 0; i < products.size(); ++i) {
    LinearDecodeProduct& a = products[i];
    if (i + 1 < products.size()) a.y_packets = place(i);
    a.x_from = chain[i].attends ? int(i) : maker(chain[i].x, i);
    if (a.x_from >= 0 && int(i) - a.x_from > 2)
      throw std::logic_error("a chain of products: one reads what is longer ago than two");
    // The thread that adds it must be the one that made it: LinearDecodeRows of both agree.
    const int from = chain[i].residual ? maker(chain[i].residual, i) : -1;
    if (from >= 0 && ((int(i) - from) % 2 != 0 || products[size_t(from)].n != a.n))
      throw std::logic_error("a chain of products: a residual not made by the thread that adds it");
    a.attends = chain[i].attends;
    if (a.attends)
      a.x_packets = attention_packets(exchange);
    else if (a.x_from >= 0)
      a.x_packets = place(size_t(a.x_from));
    if (a.x_packets) a.x = nullptr;
  }
}

// The first block of those with fewer rows of product i, which are done with it first: see LinearDecodeRows.
int first_with_fewer_rows(const LinearDecodeCut& cut, size_t i) {
  return i % 2 ? 0 : cut.part[i].more_rows * (cut.config.pair ? kDecodePair : 1);
}

}  // namespace

int64_t linear_decode_most_tokens(int bits) {
  if (bits == 16) return 32;
  return bits == 4 && device_facts().hopper ? linear_decode_chain_tokens(bits) : kLinearDecodeTokens;
}

int64_t linear_decode_chain_tokens(int bits) {
  return bits == 4 && pairs_fit() ? kLinearDecodeChainTokens : kAlone;
}

bool linear_decode_follows(const LinearDecodeArgs& next, const LinearDecodeArgs& last) {
  const Q4Layout &l = next.w.layout, &from = last.w.layout;
  if (next.tokens != last.tokens || next.tokens > linear_decode_chain_tokens(l.bits) || l.bits != from.bits ||
      l.k % 4 != 0 || from.n > (last.epilogue == Epilogue::kSwiglu ? 2 : 1) * kLinearDecodeChainColumns ||
      size_t(device_facts().multiprocessors) * sizeof(uint32_t) > kCounterBytes)
    return false;
  if (!next.attends) return last.epilogue != Epilogue::kRopeKv;
  return last.epilogue == Epilogue::kRopeKv && last.kv.type == KvType::kF16 && from.head_dim % 16 == 0 &&
         from.head_dim <= 128 && last.heads <= kDecodeQueries * last.kv_heads &&
         last.kv_heads * last.tokens <= kDecodeRounds * device_facts().multiprocessors;
}

bool linear_decode_supported(const Q4Layout& l) {
  const LinearDecodeShape shape{l, l.k <= 8192};
  if (linear_decode_cut(&shape, 1, 1, device_facts().multiprocessors, shared_bytes()).config.shared >
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
  constexpr int kAhead = 80 * 1024, kAheadNext = 32 * 1024;
  assert(count > 0 && count <= kLinearDecodeChain);
  const int tokens = int(chain[0].tokens), bits = chain[0].w.layout.bits;
  std::vector<LinearDecodeProduct> products;
  std::vector<LinearDecodeShape> shapes;
  for (size_t i = 0; i < count; ++i) {
    assert(i == 0 || linear_decode_follows(chain[i], chain[i - 1]));
    products.push_back(product_of(chain[i]));
    LinearDecodeShape& shape = shapes.emplace_back();
    shape.layout = chain[i].w.layout, shape.norm = chain[i].gain != nullptr;
    if (!chain[i].attends) continue;
    shape.head_dim = int(chain[i - 1].w.layout.head_dim);
    shape.queries = int(chain[i - 1].heads / chain[i - 1].kv_heads);
  }
  connect(chain, products, exchange);
  const bool pair = tokens > kAlone && tokens <= linear_decode_chain_tokens(bits);
  const LinearDecodeCut cut =
      linear_decode_cut(shapes.data(), count, tokens, device_facts().multiprocessors, shared_bytes(), pair);
  for (size_t i = 0; i < count; ++i) products[i].part = cut.part[i];
  LinearDecodeLaunch l;
  l.config = cut.config;
  l.ahead = std::clamp(kAhead / l.config.stage_scales, 1, l.config.stages);
  l.ahead_next = std::clamp(kAheadNext / l.config.stage_scales, 1, l.config.stages);
  l.done = count > 1 ? reinterpret_cast<uint32_t*>(exchange) : nullptr;
  l.attention = {};
  bool alone = !pair;
  for (size_t i = 1; i < count; ++i) {
    if (!chain[i].attends) continue;
    const LinearDecodeArgs& qkv = chain[i - 1];
    LinearDecodeAttention& a = l.attention;
    if (a.pairs && (a.kv_heads != qkv.kv_heads || a.queries != shapes[i].queries ||
                    a.head_dim != shapes[i].head_dim || a.position != qkv.at.position))
      throw std::logic_error("a chain of products: layers with different heads");
    a.position = qkv.at.position, a.sequence = qkv.at.sequence;
    a.kv_heads = int(qkv.kv_heads), a.queries = shapes[i].queries, a.head_dim = shapes[i].head_dim;
    a.box = LinearDecodeBox(a.head_dim), a.meeting = LinearDecodeMeeting(a.queries, a.head_dim);
    a.pairs = a.kv_heads * tokens;
    a.sharers = std::clamp(std::min(l.config.blocks, int(kLinearDecodeAttend)) / a.pairs, 1, kDecodeSharers);
    a.rounds = int(ceil_div(a.pairs, l.config.blocks));
    a.first_block = first_with_fewer_rows(cut, i - 1);
    a.parts = attention_packets(exchange) + kPlace;
    alone = alone && chain[i].longest <= kLinearDecodeShort && a.pairs * a.queries <= l.config.blocks;
  }
  if (alone) l.attention.sharers = 0, l.attention.rounds = 1;
  if (count > 1 && l.config.tokens < tokens)
    throw std::logic_error("a chain of products: its rows do not fit");
  for (int t = 0; t < tokens; t += l.config.tokens) {
    l.tokens = std::min(l.config.tokens, tokens - t);
    bits == 4 ? launch_linear_decode<Int4Tile>(l, products, stream, pdl)
              : launch_linear_decode_wide(bits, l, products, stream, pdl);
    for (LinearDecodeProduct& a : products) {
      const int64_t done = l.tokens;
      a.x += done * a.k, a.y += done * y_columns(a);
      if (a.residual) a.residual += done * a.n;
      if (a.position) a.position += done, a.sequence += done;
    }
  }
}

}  // namespace q4s
