// What the tests of the CUDA backend run its operations on: the definition of every node on host memory
// (x_cpu), and a bench that runs a node on the device with every buffer between guard words, rows beyond the
// step's count untouched, and the same bits from a replayed step. Without a GPU cuda() says SKIPPED.
#pragma once
#include <cmath>
#include <cstdio>
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
#include "tests/quick.h"

namespace q4s {

inline Backend* cuda() {
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

// The first few of a list where time is short.
template <typename T>
std::vector<T> some(std::vector<T> all, size_t few = 2) {
  if (quick() && all.size() > few) all.resize(few);
  return all;
}

// ---- the definition of every node, on host memory ----

inline void reference(const Tensor& t, Counts c, const KvCache& kv) {
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

inline std::vector<float> normal(int64_t n, uint64_t seed, float sd = 1) {
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

inline void load_all(std::initializer_list<Weight*> weights) {
  for (Weight* w : weights) cuda()->load(*w);
}

inline std::vector<int32_t> numbers(int64_t n, int64_t below, uint64_t seed) {
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

}  // namespace q4s
