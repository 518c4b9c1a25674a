// The CPU backend: one table of kernels, one row an operation; every thread walks all nodes with a barrier after each.
#include <cstring>
#include <new>

#include "kernels/attention.h"
#include "kernels/embed.h"
#include "kernels/linear.h"
#include "kernels/rms_norm.h"
#include "kernels/rotate.h"
#include "kernels/swiglu.h"
#include "runtime/backend.h"
#include "runtime/error.h"

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
  WeightView rows{.format = Format::kF32, .n = s.counts.tokens, .k = t.cols,
                  .data = reinterpret_cast<const uint8_t*>(t.src[0]->data)};
  embed_cpu({rows, t.src[1]->i32(), t.f32(), s.counts.of(t.rows)}, p);
}

void run_rms_norm(Tensor& t, const Step& s, Part p) {
  rms_norm_cpu({t.src[0]->f32(), t.weight->f32(), t.f32(), s.counts.of(t.rows), t.cols, t.eps}, p);
}

void run_linear(Tensor& t, const Step& s, Part p) {
  const LinearArgs args{t.src[0]->f32(), t.weight->view, t.src[1] ? t.src[1]->f32() : nullptr, t.f32(),
                        s.counts.of(t.rows), s.scratch};
  if (t.weight->view.format == Format::kQ4 || t.weight->view.format == Format::kQ8) {
    linear_quantize(args, p);
    s.pool.barrier();
  }
  linear(args, p);
}

void run_rope_kv(Tensor& t, const Step& s, Part p) {
  rope_kv_cpu({t.src[0]->f32(), t.weight->f32(), {t.src[1]->i32(), t.src[2]->i32()}, s.kv.layer(t.head.layer),
               t.f32(), s.counts.of(t.rows), t.head.heads, t.head.kv_heads, t.head.head_dim}, p);
}

void run_attention(Tensor& t, const Step& s, Part p) {
  attention({t.src[0]->f32(), {t.src[1]->i32(), t.src[2]->i32()}, s.kv.layer(t.head.layer), t.f32(),
             s.counts.of(t.rows), t.head.heads, t.head.kv_heads, t.head.head_dim, s.scratch}, p);
}

void run_swiglu(Tensor& t, const Step& s, Part p) {
  swiglu_cpu({t.src[0]->f32(), t.f32(), s.counts.of(t.rows), t.cols}, p);
}

void run_rotate(Tensor& t, const Step& s, Part p) {
  rotate_cpu({t.src[0]->f32(), t.weight->f32(), t.weight2->f32(), t.f32(), s.counts.of(t.rows), t.cols,
              t.weight2->view.n, t.inverse}, p);
}

using Run = void (*)(Tensor&, const Step&, Part);
constexpr Run kTable[] = {[](Tensor&, const Step&, Part) {}, run_embed,   run_gather,    run_rms_norm, run_linear,
                          run_rope_kv,                       run_attention, run_swiglu,  run_rotate};
static_assert(std::size(kTable) == kOpCount, "an operation without a CPU kernel");

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(int threads) : pool_(threads) {}

  std::string name() const override { return "cpu"; }
  std::string describe() const override { return "CPU, " + std::to_string(pool_.threads()) + " threads"; }
  ThreadPool& pool() override { return pool_; }

  std::byte* allocate(size_t bytes, const std::string& purpose) override {
    // Rounded up so that whole vectors may be read at the end.
    void* p = ::operator new(bytes + kSlack, std::align_val_t{4096}, std::nothrow);
    if (!p)
      throw Error(ErrorKind::kResource, "out of memory: " + std::to_string(bytes) + " bytes for " + purpose);
    return static_cast<std::byte*>(p);
  }
  void release(std::byte* p) override { ::operator delete(p, std::align_val_t{4096}); }
  void write(std::byte* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void read(void* to, const std::byte* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void load(Weight&) override {}

  size_t scratch_bytes(const Graph& g) override {
    size_t most = 0;
    for (const auto& n : g.nodes()) {
      if (n->op == Op::kLinear)
        most = std::max(most, linear_scratch_bytes(n->weight->view, g.max().of(n->rows), pool_.threads()));
      if (n->op == Op::kAttention)
        most = std::max(most, attention_scratch_bytes(g.max().of(n->rows), n->head.head_dim, pool_.threads()));
    }
    return most;
  }

  void run(const Graph& g, Counts counts, const KvCache& kv, std::byte* scratch, const Observer* observer) override {
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

 private:
  static constexpr size_t kSlack = 256;
  ThreadPool pool_;
};

}  // namespace

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
