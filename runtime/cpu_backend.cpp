// The CPU backend: one table of kernels, one row an operation; every thread walks all nodes with a barrier
// after each.
#include <cassert>
#include <chrono>
#include <cstring>
#include <new>
#include <numeric>

#include "kernels/attention.h"
#include "kernels/embed.h"
#include "kernels/linear.h"
#include "kernels/random_weight.h"
#include "kernels/rms_norm.h"
#include "kernels/rotate.h"
#include "kernels/swiglu.h"
#include "runtime/backend.h"
#include "runtime/error.h"
#include "runtime/huge_pages.h"

namespace q4s {
namespace {

struct Step {
  Counts counts;
  const KvCache& kv;
  std::byte* scratch;
  ThreadPool& pool;
};

void run_embed(Tensor& t, const Step& s, Part p) {
  embed_cpu({t.weight->view, t.src[0]->i32(), t.f32(), s.counts.of(t.rows)}, p);
}

void run_gather(Tensor& t, const Step& s, Part p) {
  WeightView rows{.format = Format::kF32,
                  .n = s.counts.tokens,
                  .k = t.cols,
                  .data = reinterpret_cast<const uint8_t*>(t.src[0]->data)};
  embed_cpu({rows, t.src[1]->i32(), t.f32(), s.counts.of(t.rows)}, p);
}

void run_rms_norm(Tensor& t, const Step& s, Part p) {
  rms_norm({t.src[0]->f32(), t.weight->f32(), t.f32(), s.counts.of(t.rows), t.cols, t.eps}, p);
}

void run_linear(Tensor& t, const Step& s, Part p) {
  assert(!t.gain && t.epilogue == Epilogue::kNone);  // this backend asks for no fused graphs
  const LinearArgs args{t.src[0]->f32(), t.weight->view,      t.src[1] ? t.src[1]->f32() : nullptr,
                        t.f32(),         s.counts.of(t.rows), s.scratch};
  linear_prepare(args, p);
  s.pool.barrier();
  linear(args, p);
}

void run_rope_kv(Tensor& t, const Step& s, Part p) {
  rope_kv({t.src[0]->f32(),
           t.weight->f32(),
           {t.src[1]->i32(), t.src[2]->i32()},
           s.kv.layer(t.head.layer),
           t.f32(),
           s.counts.of(t.rows),
           t.head.heads,
           t.head.kv_heads,
           t.head.head_dim},
          p);
}

void run_attention(Tensor& t, const Step& s, Part p) {
  attention({t.src[0]->f32(),
             {t.src[1]->i32(), t.src[2]->i32()},
             s.kv.layer(t.head.layer),
             t.f32(),
             s.counts.of(t.rows),
             t.head.heads,
             t.head.kv_heads,
             t.head.head_dim,
             s.scratch},
            p);
}

void run_swiglu(Tensor& t, const Step& s, Part p) {
  swiglu({t.src[0]->f32(), t.f32(), s.counts.of(t.rows), t.cols}, p);
}

void run_rotate(Tensor& t, const Step& s, Part p) {
  rotate({t.src[0]->f32(), t.weight->f32(), t.weight2->f32(), t.f32(), s.counts.of(t.rows), t.cols,
          t.weight2->view.n, t.inverse},
         p);
}

using Run = void (*)(Tensor&, const Step&, Part);
constexpr Run kTable[] = {[](Tensor&, const Step&, Part) {},
                          run_embed,
                          run_gather,
                          run_rms_norm,
                          run_linear,
                          run_rope_kv,
                          run_attention,
                          run_swiglu,
                          run_rotate};
static_assert(std::size(kTable) == kOpCount, "an operation without a CPU kernel");

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(int threads) : pool_(threads) {}

  std::string name() const override { return "cpu"; }
  std::string describe() const override { return "CPU, " + std::to_string(pool_.threads()) + " threads"; }
  ThreadPool& pool() override { return pool_; }

  std::byte* allocate(size_t bytes, const std::string& purpose) override {
    // Rounded up so that whole vectors may be read at the end.
    void* p = ::operator new (bytes + kSlack, std::align_val_t{4096}, std::nothrow);
    if (!p)
      throw Error(ErrorKind::kResource, "out of memory: " + std::to_string(bytes) + " bytes for " + purpose);
    return static_cast<std::byte*>(p);
  }
  void release(std::byte* p) override { ::operator delete (p, std::align_val_t{4096}); }
  void write(std::byte* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void read(void* to, const std::byte* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  size_t weight_bytes(const Weight& w) const override { return w.random ? size_t(w.read_bytes()) : 0; }

  // Views are used in place; random weights get storage.
  void load(std::span<Weight* const> weights, const LoadProgress&) override {
    for (Weight* w : weights) {
      WeightView& v = w->view;
      if (!w->random || v.data) continue;
      const int64_t stride = row_bytes(v.format, v.k);
      w->bytes.resize(size_t(v.n * stride));
      if (v.group) w->scale_bits.resize(size_t(v.n * v.groups()));
      pool_.parallel_for(v.n, 64, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n)
          random_row(*w->random, v, n, w->bytes.data() + n * stride,
                     v.group ? w->scale_bits.data() + n * v.groups() : nullptr);
      });
      v.data = w->bytes.data();
      if (v.group) v.scales = w->scale_bits.data();
    }
  }

  // Best of a few passes of all threads over a buffer that no cache holds.
  double read_bandwidth() override {
    constexpr int64_t kWords = int64_t(512) << 20 >> 3;
    const HugeVector<uint64_t> words(kWords, 1);
    std::vector<uint64_t> sums(size_t(pool_.threads()) * 8);  // a cache line each
    double best = 0;
    for (int pass = 0; pass < 4; ++pass) {
      const auto start = std::chrono::steady_clock::now();
      pool_.run([&](Part p) {
        const auto [begin, end] = p.of(kWords, 64);
        uint64_t lane[8] = {};
        for (int64_t i = begin; i < end; i += 8)
          for (int l = 0; l < 8; ++l) lane[l] += words[size_t(i + l)];
        for (uint64_t v : lane) sums[size_t(p.index) * 8] += v;
      });
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      best = std::max(best, double(kWords) * 8 / seconds.count());
    }
    return std::accumulate(sums.begin(), sums.end(), uint64_t(0)) ? best : 0;  // the sums are used
  }

  size_t scratch_bytes(const Graph& g) override {
    size_t most = 0;
    for (const auto& n : g.nodes()) {
      if (n->op == Op::kLinear)
        most = std::max(most, linear_scratch_bytes(n->weight->view, g.max().of(n->rows), pool_.threads()));
      if (n->op == Op::kAttention)
        most =
            std::max(most, attention_scratch_bytes(g.max().of(n->rows), n->head.head_dim, pool_.threads()));
    }
    return most;
  }

  void run(const Graph& g, Counts counts, const KvCache& kv, std::byte* scratch,
           const Observer* observer) override {
    const Step step{counts, kv, scratch, pool_};
    if (observer) {
      for (const auto& n : g.nodes()) {
        if (*observer) (*observer)(*n);
        pool_.run([&](Part p) { kTable[int(n->op)](*n, step, p); });
      }
      return;
    }
    pool_.run([&](Part p) {
      for (const auto& n : g.nodes()) {
        if (n->op == Op::kInput) continue;
        kTable[int(n->op)](*n, step, p);
        pool_.barrier();
      }
    });
  }

  void score(const ScoreLogitsArgs& a) override {
    pool_.run([&](Part p) { score_logits(a, p); });
  }

 private:
  static constexpr size_t kSlack = 256;
  ThreadPool pool_;
};

}  // namespace

void Backend::decode(const DecodeLoop&, const KvCache&, std::byte*, const OnStep&) {
  assert(!"decode() of a backend that does not");
}

std::unique_ptr<Backend> make_cpu_backend(int threads) { return std::make_unique<CpuBackend>(threads); }

#ifndef Q4S_CUDA
std::unique_ptr<Backend> make_cuda_backend(int) {
  throw Error(ErrorKind::kNoDevice, "this program was built without CUDA");
}
#endif

std::unique_ptr<Backend> make_backend(const std::string& device, int threads, std::string* note) {
  if (device == "cpu") return make_cpu_backend(threads);
  if (device == "auto") {
    try {
      return make_cuda_backend(0);
    } catch (const Error& e) {
      if (e.kind() != ErrorKind::kNoDevice) throw;
      if (note) *note = std::string(e.what()) + ": running on the CPU";
      return make_cpu_backend(threads);
    }
  }
  if (device == "cuda") return make_cuda_backend(0);
  if (device.starts_with("cuda:") && device.size() > 5 && device.size() < 9 &&
      device.find_first_not_of("0123456789", 5) == std::string::npos)
    return make_cuda_backend(std::stoi(device.substr(5)));
  throw Error(ErrorKind::kUsage, "device '" + device + "': expected auto, cpu, cuda or cuda:N");
}

}  // namespace q4s
