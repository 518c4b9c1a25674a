// Every operation of the CUDA backend against its definition (x_cpu) over odd shapes: each buffer lies
// between guard words, rows beyond the step's count must stay untouched, a replayed step must give the bits
// of the first. Without a GPU every case prints SKIPPED. Environment Q4S_QUICK=1: few shapes, for the
// sanitizers.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>

#include "doctest/doctest.h"
#include "kernels/attention.h"
#include "kernels/embed.h"
#include "kernels/half.h"
#include "kernels/linear.h"
#include "kernels/rms_norm.h"
#include "kernels/rotate.h"
#include "kernels/swiglu.h"
#include "runtime/backend.h"
#include "runtime/error.h"

using namespace q4s;

namespace {

Backend* cuda() {
  static const std::unique_ptr<Backend> backend = []() -> std::unique_ptr<Backend> {
    try {
      auto b = make_cuda_backend(0);
      std::printf("GPU: %s\n", b->describe().c_str());
      return b;
    } catch (const Error& e) {
      std::printf("SKIPPED: %s\n", e.what());
      return nullptr;
    }
  }();
  if (!backend) MESSAGE("SKIPPED: no GPU");
  return backend.get();
}

bool quick() { return std::getenv("Q4S_QUICK") != nullptr; }

// The first few of a list where time is short.
template <typename T>
std::vector<T> some(std::vector<T> all, size_t few = 2) {
  if (quick() && all.size() > few) all.resize(few);
  return all;
}

// ---- the definition of every node, on host memory ----

void reference(const Tensor& t, Counts c, const KvCache& kv) {
  Tensor& y = const_cast<Tensor&>(t);
  const int64_t rows = c.of(t.rows);
  const auto rope = [&](const float* qkv, const Weight& table) {
    rope_kv_cpu({qkv,
                 table.f32(),
                 {t.src[1]->i32(), t.src[2]->i32()},
                 kv.layer(t.head.layer),
                 y.f32(),
                 rows,
                 t.head.heads,
                 t.head.kv_heads,
                 t.head.head_dim});
  };
  switch (t.op) {
    case Op::kInput: break;
    case Op::kEmbed: embed_cpu({t.weight->view, t.src[0]->i32(), y.f32(), rows}); break;
    case Op::kGather:
      for (int64_t i = 0; i < rows; ++i)
        std::memcpy(y.f32() + i * t.cols, t.src[0]->f32() + t.src[1]->i32()[i] * t.cols, size_t(t.cols) * 4);
      break;
    case Op::kRmsNorm: rms_norm_cpu({t.src[0]->f32(), t.weight->f32(), y.f32(), rows, t.cols, t.eps}); break;
    case Op::kSwiglu: swiglu_cpu({t.src[0]->f32(), y.f32(), rows, t.cols}); break;
    case Op::kRotate:
      rotate_cpu({t.src[0]->f32(), t.weight->f32(), t.weight2->f32(), y.f32(), rows, t.cols,
                  t.weight2->view.n, t.inverse});
      break;
    case Op::kRopeKv: rope(t.src[0]->f32(), *t.weight); break;
    case Op::kAttention:
      attention_cpu({t.src[0]->f32(),
                     {t.src[1]->i32(), t.src[2]->i32()},
                     kv.layer(t.head.layer),
                     y.f32(),
                     rows,
                     t.head.heads,
                     t.head.kv_heads,
                     t.head.head_dim,
                     nullptr});
      break;
    case Op::kLinear: {
      const int64_t k = t.weight->view.k, n = t.weight->view.n;
      std::vector<float> norm(size_t(rows * k)), product(size_t(rows * n));
      const float* x = t.src[0]->f32();
      if (t.gain) {
        rms_norm_cpu({x, t.gain->f32(), norm.data(), rows, k, t.eps});
        x = norm.data();
      }
      const bool plain = t.epilogue == Epilogue::kNone;
      linear_cpu({x, t.weight->view, plain && t.src[1] ? t.src[1]->f32() : nullptr,
                  plain ? y.f32() : product.data(), rows, nullptr});
      if (t.epilogue == Epilogue::kSwiglu) swiglu_cpu({product.data(), y.f32(), rows, t.cols});
      if (t.epilogue == Epilogue::kRopeKv) rope(product.data(), *t.weight2);
    }
  }
}

// ---- one graph on both sides ----

constexpr size_t kGuard = 256;
constexpr uint8_t kFill = 0xa5;  // as a float: -2.9e-16, as a half -0.022: harmless if read, seen if written

struct Region {
  size_t begin, bytes;
};

class Bench {
 public:
  Bench(Backend& b, Graph& g, Counts counts, KvCache kv) : b_(b), g_(g), counts_(counts), kv_(kv) {
    size_t at = kGuard;
    const auto place = [&](size_t bytes) {
      regions_.push_back({at, bytes});
      at += (bytes + kGuard - 1) / kGuard * kGuard + kGuard;
    };
    for (const auto& n : g.nodes()) place(size_t(g.max().of(n->rows) * n->cols * 4));
    place(kv.bytes());
    initial_.assign(at, kFill);
  }

  template <typename T>
  void input(const Tensor& t, const std::vector<T>& values) {
    for (size_t i = 0; i < g_.nodes().size(); ++i)
      if (g_.nodes()[i].get() == &t)
        std::memcpy(initial_.data() + regions_[i].begin, values.data(), values.size() * sizeof(T));
  }
  void fill_cache(uint64_t seed) {
    std::mt19937_64 rng(seed);
    std::normal_distribution<float> normal;
    const Region& r = regions_.back();
    for (size_t i = 0; i < r.bytes / size_t(kv_type_bytes(kv_.type)); ++i) {
      const float v = normal(rng);
      const uint16_t h = float_to_half(v);
      if (kv_.type == KvType::kF32)
        std::memcpy(initial_.data() + r.begin + 4 * i, &v, 4);
      else
        std::memcpy(initial_.data() + r.begin + 2 * i, &h, 2);
    }
  }

  // `bound`: of the mean square error over the mean square of each result.
  void check(double bound) {
    std::vector<uint8_t> want = initial_;
    bind(reinterpret_cast<std::byte*>(want.data()));
    for (const auto& n : g_.nodes()) reference(*n, counts_, kv_);

    std::byte* device = b_.allocate(initial_.size(), "test");
    std::byte* scratch = b_.allocate(b_.scratch_bytes(g_), "test");
    bind(device);
    const Observer eager = nullptr;
    const std::vector<uint8_t> first = run(device, scratch, &eager), second = run(device, scratch, nullptr),
                               third = run(device, scratch, nullptr);
    b_.release(device);
    b_.release(scratch);
    CHECK_MESSAGE(first == second, "a captured step differs from an eager one");
    CHECK_MESSAGE(second == third, "two replays differ");

    std::vector<uint8_t> mine(initial_.size(), 0);  // bytes that some node may write
    for (size_t i = 0; i < g_.nodes().size(); ++i) {
      const Tensor& t = *g_.nodes()[i];
      const size_t bytes = size_t(counts_.of(t.rows) * t.cols * 4);
      std::fill_n(mine.begin() + ptrdiff_t(regions_[i].begin), bytes, 1);
      // What only a product reads may be kept as fp16.
      const bool between = (t.epilogue == Epilogue::kSwiglu || t.op == Op::kAttention) && t.readers > 0;
      if (t.type == Type::kF32 && !between)
        compare(t.name, first, want, regions_[i].begin, bytes / 4, false, bound);
    }
    const Region& cache = regions_.back();
    const bool half = kv_.type == KvType::kF16;
    std::fill_n(mine.begin() + ptrdiff_t(cache.begin), cache.bytes, 1);
    compare("cache", first, want, cache.begin, cache.bytes / (half ? 2 : 4), half, bound);
    size_t spilled = 0;
    for (size_t i = 0; i < first.size(); ++i) spilled += !mine[i] && first[i] != initial_[i];
    CHECK_MESSAGE(spilled == 0, spilled << " bytes outside the results were written");
  }

 private:
  void bind(std::byte* base) {
    for (size_t i = 0; i < g_.nodes().size(); ++i) g_.nodes()[i]->data = base + regions_[i].begin;
    kv_.base = base + regions_.back().begin;
  }
  std::vector<uint8_t> run(std::byte* device, std::byte* scratch, const Observer* observer) {
    std::vector<uint8_t> result(initial_.size());
    b_.write(device, initial_.data(), initial_.size());
    b_.run(g_, counts_, kv_, scratch, observer);
    b_.read(result.data(), device, result.size());
    return result;
  }
  void compare(const std::string& name, const std::vector<uint8_t>& got, const std::vector<uint8_t>& want,
               size_t at, size_t count, bool half, double bound) {
    double error = 0, size = 1e-30;
    bool finite = true;
    const auto value = [&](const std::vector<uint8_t>& v, size_t i) {
      float f;
      uint16_t h;
      std::memcpy(&h, v.data() + at + 2 * i, 2);
      if (half) return half_to_float(h);
      std::memcpy(&f, v.data() + at + 4 * i, 4);
      return f;
    };
    for (size_t i = 0; i < count; ++i) {
      const double a = value(got, i), b = value(want, i);
      finite &= std::isfinite(a) == std::isfinite(b);
      if (std::isfinite(b)) error += (a - b) * (a - b), size += b * b;
    }
    worst_ = std::max(worst_, error / size);
    CHECK_MESSAGE((finite && error <= bound * size),
                  name << ": nmse " << error / size << ", bound " << bound);
  }

  Backend& b_;
  Graph& g_;
  Counts counts_;
  KvCache kv_;
  std::vector<Region> regions_;
  std::vector<uint8_t> initial_;
  double worst_ = 0;
};

std::vector<float> normal(int64_t n, uint64_t seed, float sd = 1) {
  std::mt19937_64 rng(seed);
  std::normal_distribution<float> d(0, sd);
  std::vector<float> v(static_cast<size_t>(n));
  for (float& x : v) x = d(rng);
  return v;
}

Weight f32_weight(const std::string& name, int64_t n, int64_t k, uint64_t seed) {
  std::vector<float> v = normal(n * k, seed, 0.3f);
  for (float& x : v) x += n == 1 ? 1.f : 0.f;  // a gain
  return make_weight_f32(name, n, k, std::move(v));
}

// A weight with values on both sides: made from its seed by each, or made on the host and uploaded.
Weight loaded(Format f, int64_t n, int64_t k, int64_t group, Grid grid, bool upload, RowRoles roles = {},
              bool head = false) {
  Weight w;
  w.name = "w";
  w.roles = roles;
  w.head = head;
  if (f == Format::kGgufQ8_0 || f == Format::kGgufQ4_0 || f == Format::kGgufQ4_1) {
    std::mt19937_64 rng{uint64_t(n * k)};
    w.bytes.resize(size_t(n * row_bytes(f, k)));
    for (uint8_t& b : w.bytes) b = uint8_t(rng());
    const int64_t block = row_bytes(f, 32);
    for (size_t at = 0; at < w.bytes.size(); at += size_t(block)) {
      const uint16_t d = float_to_half(0.01f);
      std::memcpy(&w.bytes[at], &d, 2);
      if (f == Format::kGgufQ4_1) std::memcpy(&w.bytes[at + 2], &d, 2);
    }
    w.view = {.format = f, .n = n, .k = k, .data = w.bytes.data()};
  } else {
    static const std::unique_ptr<Backend> host = make_cpu_backend(1);
    w.view = {.format = f,
              .grid = grid,
              .n = n,
              .k = k,
              .group = f == Format::kQ4 || f == Format::kQ8 ? std::min(group, k) : 0};
    w.random = uint64_t(n * 1000 + k);
    host->load(w);
    w.device.reset();
    if (upload) w.random.reset();
  }
  cuda()->load(w);
  return w;
}

void load_all(std::initializer_list<Weight*> weights) {
  for (Weight* w : weights) cuda()->load(*w);
}

std::vector<int32_t> numbers(int64_t n, int64_t below, uint64_t seed) {
  std::mt19937_64 rng(seed);
  std::vector<int32_t> v(static_cast<size_t>(n));
  for (int32_t& x : v) x = int32_t(rng() % uint64_t(below));
  return v;
}

// Distinct (sequence, position) for T tokens.
struct Where {
  std::vector<int32_t> position, sequence;
  Where(int64_t tokens, int64_t sequences, int64_t ctx) {
    for (int64_t t = 0; t < tokens; ++t) {
      sequence.push_back(int32_t(t % sequences));
      // Gaps where there is room: no two tokens at one place.
      const int64_t step = ceil_div(tokens, sequences) * 3 <= ctx ? 3 : 1;
      position.push_back(int32_t(ctx - 1 - t / sequences * step % ctx));
    }
  }
};

}  // namespace

TEST_CASE("cuda: embed and gather") {
  if (!cuda()) return;
  for (Format f : {Format::kQ4, Format::kQ8, Format::kF32, Format::kF16, Format::kBF16, Format::kGgufQ8_0})
    for (int64_t k : some<int64_t>({96, 64, 172, 576, 33, 1}))
      for (bool upload : {true, false}) {
        if (f == Format::kGgufQ8_0 && k % 32) continue;
        CAPTURE(int(f));
        CAPTURE(k);
        Weight table = loaded(f, 37, k, 64, Grid::kInt, upload, {}, k == 64 || k == 33);
        Graph g({5, 3});
        Tensor& ids = g.input("ids", Rows::kTokens, 1, Type::kI32);
        Tensor& wanted = g.input("wanted", Rows::kOutputs, 1, Type::kI32);
        g.gather(g.embed(ids, table), wanted);
        Bench b(*cuda(), g, {4, 2}, {});
        b.input(ids, numbers(5, 37, 1));
        b.input(wanted, std::vector<int32_t>{3, 0, 0});
        b.check(f == Format::kGgufQ8_0 ? 1e-7 : 0);  // GGUF blocks become fp16
      }
}

TEST_CASE("cuda: rms_norm, swiglu, rotate") {
  if (!cuda()) return;
  for (int64_t dim : some<int64_t>({576, 64, 172, 4096, 1, 7}))
    for (int64_t tokens : some<int64_t>({1, 5, 130})) {
      CAPTURE(dim);
      CAPTURE(tokens);
      Weight gain = f32_weight("gain", 1, dim, 3);
      load_all({&gain});
      Graph g({tokens + 1, 1});
      Tensor& x = g.input("x", Rows::kTokens, dim, Type::kF32);
      g.rms_norm(x, gain, 1e-5f);
      Tensor& y = g.input("y", Rows::kTokens, 2 * dim, Type::kF32);
      g.swiglu(y);
      Bench b(*cuda(), g, {tokens, 1}, {});
      b.input(x, normal(tokens * dim, 1));
      b.input(y, normal(tokens * 2 * dim, 2, 3));
      b.check(1e-12);
    }
  for (auto [dim, m] :
       some<std::pair<int64_t, int64_t>>({{576, 9}, {64, 1}, {172, 43}, {4096, 1}, {5, 5}, {14336, 7}}))
    for (bool inverse : {false, true}) {
      CAPTURE(dim);
      Weight signs = make_weight_f32("signs", 1, dim, normal(dim, 5)), factor = f32_weight("factor", m, m, 6);
      load_all({&signs, &factor});
      Graph g({3, 1});
      Tensor& x = g.input("x", Rows::kTokens, dim, Type::kF32);
      g.rotate(x, signs, factor, inverse);
      Bench b(*cuda(), g, {2, 1}, {});
      b.input(x, normal(2 * dim, 1));
      b.check(1e-11);
    }
}

TEST_CASE("cuda: rope_kv and attention") {
  if (!cuda()) return;
  struct Shape {
    int64_t heads, kv_heads, head_dim;
  };
  for (const Shape s : some<Shape>({{9, 3, 64},
                                    {8, 4, 8},
                                    {4, 4, 128},
                                    {8, 1, 128},
                                    {2, 1, 256},
                                    {6, 2, 48},
                                    {3, 3, 80},
                                    {32, 8, 128}},
                                   3))
    for (KvType type : {KvType::kF16, KvType::kF32})
      for (int64_t tokens : some<int64_t>({1, 3, 70, 8, 17, 300}, 3))
        for (auto [ctx, sequences] : some<std::pair<int64_t, int64_t>>({{77, 3}, {600, 3}, {600, 1}}, 1)) {
          if (tokens > ctx) continue;
          CAPTURE(s.heads);
          CAPTURE(s.kv_heads);
          CAPTURE(s.head_dim);
          CAPTURE(tokens);
          CAPTURE(ctx);
          const HeadShape head{1, s.heads, s.kv_heads, s.head_dim};
          Weight table = make_weight_f32("rope", ctx, s.head_dim, normal(ctx * s.head_dim, 9));
          load_all({&table});
          Graph g({tokens + 2, 1});
          Tensor& position = g.input("position", Rows::kTokens, 1, Type::kI32);
          Tensor& sequence = g.input("sequence", Rows::kTokens, 1, Type::kI32);
          Tensor& qkv = g.input("qkv", Rows::kTokens, (s.heads + 2 * s.kv_heads) * s.head_dim, Type::kF32);
          g.attention(g.rope_kv(qkv, table, position, sequence, head), position, sequence, head);
          Bench b(*cuda(), g, {tokens, 1}, {nullptr, type, 2, sequences, ctx, s.kv_heads * s.head_dim});
          const Where where(tokens, sequences, ctx);
          b.input(position, where.position);
          b.input(sequence, where.sequence);
          b.input(qkv, normal(tokens * qkv.cols, 4, 0.7f));
          b.fill_cache(5);
          // fp16: a cache entry may round the other way; fast attention rounds q and the weights to fp16.
          b.check(type == KvType::kF16 ? 2e-6 : 2e-10);
        }
}

TEST_CASE("cuda: linear in every format") {
  if (!cuda()) return;
  struct Case {
    Format format;
    double bound;
  };
  // Operands of fp16 products are rounded to 2^-11; bf16 ones are split in two; f32 is exact up to summation.
  for (const Case c : {Case{Format::kQ4, 1e-6},
                       {Format::kQ8, 1e-6},
                       {Format::kF16, 1e-6},
                       {Format::kBF16, 1e-8},
                       {Format::kF32, 1e-10},
                       {Format::kGgufQ4_0, 1e-6},
                       {Format::kGgufQ4_1, 1e-6},
                       {Format::kGgufQ8_0, 1e-6}})
    for (auto [n, k] : some<std::pair<int64_t, int64_t>>(
             {{192, 576}, {48, 64}, {344, 64}, {64, 172}, {17, 33}, {1, 1}, {2050, 1024}}, 3))
      for (int64_t tokens : some<int64_t>({1, 2, 8, 9, 16, 17, 33, 130}, 3))
        for (int64_t group : some<int64_t>({128, 64, 32, 1 << 20})) {
          const bool grouped = c.format == Format::kQ4 || c.format == Format::kQ8;
          if (!grouped && group != 128) continue;
          if (int(c.format) >= int(Format::kGgufQ8_0) && k % 32) continue;
          for (Grid grid : {Grid::kInt, Grid::kHalf}) {
            if (grid == Grid::kHalf && c.format != Format::kQ4) continue;
            CAPTURE(int(c.format));
            CAPTURE(n);
            CAPTURE(k);
            CAPTURE(tokens);
            CAPTURE(group);
            CAPTURE(int(grid));
            // A head is stored for the decode kernels alone; it must serve any number of tokens all the same.
            Weight w = loaded(c.format, n, k, group, grid, tokens % 2, {}, n == 17 || n == 192);
            Graph g({tokens + 1, 1});
            Tensor& x = g.input("x", Rows::kTokens, k, Type::kF32);
            Tensor& r = g.input("r", Rows::kTokens, n, Type::kF32);
            g.linear(x, w);
            g.linear(x, w, &r);
            Bench b(*cuda(), g, {tokens, 1}, {});
            b.input(x, normal(tokens * k, 1));
            b.input(r, normal(tokens * n, 2));
            b.check(c.bound);
          }
        }
}

TEST_CASE("cuda: fused linears") {
  if (!cuda()) return;
  struct Shape {
    int64_t dim, hidden, heads, kv_heads, head_dim;
  };
  for (const Shape s : some<Shape>({{576, 1536, 9, 3, 64},
                                    {64, 172, 8, 4, 8},
                                    {256, 688, 2, 2, 128},
                                    {320, 97, 5, 1, 48},
                                    {1024, 2816, 8, 2, 128}}))
    for (Format f : {Format::kQ4, Format::kF16})
      for (int64_t tokens : some<int64_t>({1, 2, 8, 16, 17, 70}, 3))
        for (int64_t group : {int64_t(128), int64_t(32)}) {
          if (f == Format::kF16 && group != 128) continue;
          CAPTURE(s.dim);
          CAPTURE(tokens);
          CAPTURE(group);
          CAPTURE(int(f));
          const int64_t ctx = 90;
          const HeadShape head{0, s.heads, s.kv_heads, s.head_dim};
          Weight gain = f32_weight("gain", 1, s.dim, 3);
          Weight table = make_weight_f32("rope", ctx, s.head_dim, normal(ctx * s.head_dim, 9));
          Weight qkv = loaded(f, (s.heads + 2 * s.kv_heads) * s.head_dim, s.dim, group, Grid::kInt, true,
                              {RowRoles::Kind::kQkv, s.heads, s.kv_heads, s.head_dim});
          Weight gate_up =
              loaded(f, 2 * s.hidden, s.dim, group, Grid::kInt, false, {RowRoles::Kind::kGateUp});
          Weight down = loaded(f, s.dim, s.hidden, group, Grid::kHalf, true);
          Weight head_w = loaded(f, 50, s.dim, group, Grid::kInt, true);
          load_all({&gain, &table});
          Graph g({tokens + 1, 1});
          Tensor& position = g.input("position", Rows::kTokens, 1, Type::kI32);
          Tensor& sequence = g.input("sequence", Rows::kTokens, 1, Type::kI32);
          Tensor& x = g.input("x", Rows::kTokens, s.dim, Type::kF32);
          g.norm_linear_rope_kv(x, gain, 1e-5f, qkv, table, position, sequence, head);
          g.norm_linear_swiglu(x, gain, 1e-5f, gate_up);
          g.linear(g.norm_linear_swiglu(x, gain, 1e-5f, gate_up), down, &x);
          g.norm_linear(x, gain, 1e-5f, head_w);
          g.linear(x, gate_up);  // stored rows may be permuted: results never are
          g.linear(x, qkv);
          Bench b(*cuda(), g, {tokens, 1}, {nullptr, KvType::kF16, 1, 2, ctx, s.kv_heads * s.head_dim});
          const Where where(tokens, 2, ctx);
          b.input(position, where.position);
          b.input(sequence, where.sequence);
          b.input(x, normal(tokens * s.dim, 1, 2));
          b.fill_cache(5);
          b.check(2e-6);
        }
}

TEST_CASE("cuda: errors say what they are") {
  if (!cuda()) return;
  const auto kind_of = [](const auto& fn) {
    try {
      fn();
    } catch (const Error& e) {
      std::printf("%s\n", e.what());
      return e.kind();
    }
    return ErrorKind::kUsage;  // none was thrown
  };
  CHECK(kind_of([] { make_cuda_backend(99); }) == ErrorKind::kNoDevice);
  CHECK(kind_of([] { cuda()->allocate(size_t(1) << 50, "a test"); }) == ErrorKind::kResource);
  CHECK(cuda()->free_bytes().value() > 0);
  std::byte* p = cuda()->allocate(16, "a test");  // the failed one left nothing behind
  uint32_t word = 1;
  cuda()->read(&word, p, 4);
  CHECK(word == 0);
  cuda()->release(p);
}
