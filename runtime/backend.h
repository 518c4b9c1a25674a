// What a device must offer to the engine: memory, weights, and running a planned graph. CPU and CUDA
// implement it; everything above (sessions, the quantiser's forward passes) speaks to this interface only.
#pragma once
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kernels/rope_kv.h"
#include "kernels/sample.h"
#include "kernels/score_logits.h"
#include "runtime/graph.h"
#include "runtime/thread_pool.h"

namespace q4s {

// Keys and values of `layers` layers: per layer k then v, each (rows(), kv_dim). Backend memory.
struct KvCache {
  std::byte* base = nullptr;
  KvType type = KvType::kF32;
  int64_t layers = 0, sequences = 0, ctx = 0, kv_dim = 0;
  int64_t stride = 0;  // rows from one sequence's first to the next one's; 0: ctx

  int64_t apart() const { return stride ? stride : ctx; }
  int64_t rows() const { return (sequences - 1) * apart() + ctx; }
  size_t plane_bytes() const { return size_t(rows() * kv_dim * kv_type_bytes(type)); }
  size_t bytes() const { return 2 * size_t(layers) * plane_bytes(); }
  KvLayer layer(int l) const {
    std::byte* k = base + 2 * size_t(l) * plane_bytes();
    return {k, k + plane_bytes(), type, apart()};
  }
};

// Called before each node on the eager path, with its sources computed. Null in generation. Wants a graph
// built without fused nodes: what lies between those may be stored otherwise than as f32.
using Observer = std::function<void(const Tensor&)>;

// A decoding run that stays on the device: every step draws a token for each row from its logits, puts it
// where the next step reads it, and advances the positions.
struct DecodeLoop {
  struct Row {
    int32_t position = 0;         // of the first step
    uint64_t stream = 0;          // with the seed of params: its random numbers
    uint64_t drawn = 0;           // how many of them are used up
    std::vector<int32_t> window;  // at most params.repeat_last_n tokens before the first draw, oldest first
  };
  const Graph* graph;
  Tensor *token, *position;  // (T) inputs of graph; all inputs are written for the first step
  Tensor* logits;            // (T, V) of graph: row i for token i
  std::vector<Row> rows;     // (T)
  int64_t steps = 0;         // how many to take at most
  SampleParams params;
  std::vector<int32_t> banned;  // ids never to be drawn
};
// Tokens (T) drawn in step i, in order, some steps behind the device. False ends the run.
using OnStep = std::function<bool(int64_t i, std::span<const int32_t> tokens)>;

// Bytes done of all; called now and then while weights are loaded.
using LoadProgress = std::function<void(size_t done, size_t total)>;

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string name() const = 0;      // "cpu", "cuda"
  virtual std::string describe() const = 0;  // "CPU, 2 threads, AVX-512 VNNI"
  virtual ThreadPool& pool() = 0;            // host threads

  // Backend memory, kArenaAlign-aligned, not cleared. Throws Error(kResource) naming `purpose` and the bytes.
  virtual std::byte* allocate(size_t bytes, const std::string& purpose) = 0;
  virtual void release(std::byte*) = 0;
  // Backend memory that is free now, where that is known.
  virtual std::optional<size_t> free_bytes() const { return std::nullopt; }
  // What is taken of the device's memory now, by whomever; 0 where that is the host's.
  virtual size_t used_bytes() const { return 0; }
  virtual void write(std::byte* to, const void* from_host, size_t bytes) = 0;
  virtual void read(void* to_host, const std::byte* from, size_t bytes) = 0;

  // Bytes of backend memory that w will take once loaded; 0 where its view is used in place.
  virtual size_t weight_bytes(const Weight& w) const = 0;
  // Makes weights usable in graphs of this backend, in one allocation that goes with the last of them. Those
  // that are loaded already are left alone: reset w.device where the values changed.
  virtual void load(std::span<Weight* const> weights, const LoadProgress& progress = nullptr) = 0;
  void load(Weight& w) {
    Weight* const one[] = {&w};
    load(one);
  }

  // Bytes per second of the best of a few read-only sweeps over memory: on a CPU measured by every call,
  // since other programs share the memory, on a GPU by the first.
  virtual double read_bandwidth() = 0;
  // Tokens of one step of a long prompt that make good use of it.
  virtual int64_t prompt_step() const { return 512; }
  // Whether generation should build fused graphs.
  virtual bool fuses() const { return false; }

  // Bytes of working memory that running g needs beside its arena.
  virtual size_t scratch_bytes(const Graph& g) = 0;
  // Runs the nodes of g for these counts (<= g.max()). Work may still be queued when it returns: read()
  // waits. Throws Error(kRuntime) naming the operation on a device fault.
  virtual void run(const Graph& g, Counts counts, const KvCache& kv, std::byte* scratch,
                   const Observer* observer = nullptr) = 0;

  // Scores rows of logits that run() left in backend memory; target and score are the host's. Waits.
  virtual void score(const ScoreLogitsArgs&) = 0;

  // Whether decode() can draw tokens with these settings and so many bans; elsewhere the caller runs steps
  // and samples on the host.
  virtual bool decodes(const SampleParams&, int64_t /*banned*/) const { return false; }
  // Throws Error(kRuntime) naming the position where logits are not finite.
  virtual void decode(const DecodeLoop&, const KvCache&, std::byte* scratch, const OnStep&);
};

std::unique_ptr<Backend> make_cpu_backend(int threads);
// Throws Error(kNoDevice) where no usable GPU is found, with the reason.
std::unique_ptr<Backend> make_cuda_backend(int device);
// "auto", "cpu", "cuda", "cuda:N". auto: CUDA where there is one, else the CPU; `note` then gets the reason
// in one line.
std::unique_ptr<Backend> make_backend(const std::string& device, int threads, std::string* note = nullptr);

}  // namespace q4s
