// What a device must offer to the engine: memory, weights, and running a planned graph. CPU and CUDA implement it;
// everything above (sessions, the quantiser's forward passes) speaks to this interface only.
#pragma once
#include <functional>
#include <memory>
#include <string>

#include "kernels/rope_kv.h"
#include "runtime/graph.h"
#include "runtime/thread_pool.h"

namespace q4s {

// Keys and values of `layers` layers: per layer k then v, each (sequences * ctx, kv_dim). Backend memory.
struct KvCache {
  std::byte* base = nullptr;
  KvType type = KvType::kF32;
  int64_t layers = 0, sequences = 0, ctx = 0, kv_dim = 0;

  size_t plane_bytes() const { return size_t(sequences * ctx * kv_dim * kv_type_bytes(type)); }
  size_t bytes() const { return 2 * size_t(layers) * plane_bytes(); }
  KvLayer layer(int l) const {
    std::byte* k = base + 2 * size_t(l) * plane_bytes();
    return {k, k + plane_bytes(), type, ctx};
  }
};

// Called before each node on the eager path, with its sources computed. Null in generation.
using Observer = std::function<void(const Tensor&)>;

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string name() const = 0;         // "cpu", "cuda"
  virtual std::string describe() const = 0;     // "CPU, 2 threads, AVX-512 VNNI"
  virtual ThreadPool& pool() = 0;               // host threads

  // Backend memory, kArenaAlign-aligned, not cleared. Throws Error(kResource) naming `purpose` and the bytes.
  virtual std::byte* allocate(size_t bytes, const std::string& purpose) = 0;
  virtual void release(std::byte*) = 0;
  virtual void write(std::byte* to, const void* from_host, size_t bytes) = 0;
  virtual void read(void* to_host, const std::byte* from, size_t bytes) = 0;

  // Makes w usable in graphs of this backend; drops its device copy with the Weight.
  virtual void load(Weight& w) = 0;

  // Bytes of working memory that running g needs beside its arena.
  virtual size_t scratch_bytes(const Graph& g) = 0;
  // Runs the nodes of g for these counts (<= g.max()). Work may still be queued when it returns: read() waits.
  // Throws Error(kRuntime) naming the operation on a device fault.
  virtual void run(const Graph& g, Counts counts, const KvCache& kv, std::byte* scratch,
                   const Observer* observer = nullptr) = 0;
};

std::unique_ptr<Backend> make_cpu_backend(int threads);
// Throws Error(kNoDevice) where no usable GPU is found, with the reason.
std::unique_ptr<Backend> make_cuda_backend(int device);
// "auto", "cpu", "cuda", "cuda:N". auto: CUDA where there is one, else the CPU; `note` then gets the reason in one line.
std::unique_ptr<Backend> make_backend(const std::string& device, int threads, std::string* note = nullptr);

}  // namespace q4s
