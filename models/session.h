// Runs a model: KV cache of several sequences, prefill in chunks, decoding steps. Two graphs (one token a
// sequence; a chunk of tokens) share one arena; nothing is allocated per token.
#pragma once
#include <functional>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "kernels/score_logits.h"
#include "models/llama.h"
#include "runtime/backend.h"
#include "runtime/sampler.h"

namespace q4s {

struct SessionOptions {
  int64_t ctx = 0;  // positions a sequence can hold; 0: the smaller of 4096 and the model's
  int sequences = 1;
  int64_t chunk = 0;           // tokens of a prefill step; 0: what suits the backend
  KvType kv = KvType::kF16;    // default_kv() unless asked otherwise
  LoadProgress progress = {};  // while weights are brought to the device
  int together = 0;            // sequences of a decoding step at most; 0: all
  // Positions from the first of a sequence to the first of the next; 0: ctx. Fewer lets sequences lie over
  // each other: the caller sees to it that those alive together do not meet, and only decodes.
  int64_t stride = 0;
};

// f32 for unquantised models on the CPU (the reference), else f16.
KvType default_kv(const LlamaModel&, const Backend&);

// Bytes, computed before anything is taken.
struct MemoryPlan {
  size_t weights = 0, kv = 0, arena = 0, scratch = 0;
  size_t total() const { return weights + kv + arena + scratch; }
};

struct TokenAt {
  int32_t token, sequence, position;
};

class Session {
 public:
  // Loads the weights into the backend and takes the memory. model and backend must outlive the session.
  // Throws Error(kUsage) for a context beyond the model's, Error(kResource) with the plan where memory is
  // short.
  Session(LlamaModel& model, Backend& backend, SessionOptions options);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  static MemoryPlan plan(LlamaModel&, Backend&, SessionOptions);

  int64_t ctx() const { return options_.ctx; }
  int64_t length(int sequence = 0) const { return lengths_.at(sequence); }
  void truncate(int sequence, int64_t length);  // forgets what lies beyond
  const MemoryPlan& memory() const { return memory_; }

  // Feeds tokens to the end of a sequence; returns the logits (V) after the last one, valid until the next
  // call. Throws Error(kUsage) with both numbers where they do not fit the context; Error(kRuntime) naming
  // the position where logits are not finite.
  std::span<const float> feed(std::span<const int32_t> tokens, int sequence = 0);

  // The same, with the logits of every token from index `first` on: visit(i, logits after tokens[i]), in
  // order.
  void feed_all(std::span<const int32_t> tokens, int sequence, int64_t first,
                const std::function<void(int64_t, std::span<const float>)>& visit);

  // Feeds tokens and scores (score_logits.h) the logits after the last targets.size() of them against
  // targets, on the backend. `reference`, unless null, is another session on this backend whose model shares
  // the vocabulary: it is fed the same. Throws as feed(), for the logits of either.
  void score(std::span<const int32_t> tokens, int sequence, std::span<const int32_t> targets,
             std::span<LogitScore> scores, Session* reference = nullptr);

  // One token for each of several distinct sequences, appended to each. Returns logits (n, V), row i for item
  // i, valid until the next call.
  std::span<const float> step(std::span<const std::pair<int, int32_t>> sequence_and_token);

  // A sequence that goes on: `token` is fed next, the sampler draws what follows. All samplers have the same
  // options.
  struct Next {
    int sequence;
    int32_t token;
    Sampler* sampler;
  };
  // Up to `steps` steps, each feeding one token to every sequence and drawing the next, on the device where
  // it can. visit(i, tokens drawn in step i) in order; false ends the run after that step. Every fed token
  // then stands in its sequence, the last drawn ones do not. Throws as feed().
  void decode(std::span<const Next>, int64_t steps, const OnStep& visit);

 private:
  struct Plan;
  struct Fed;

  // Leaves the logits of the wanted items of batch in backend memory.
  void run(Plan&, std::span<const TokenAt> batch, std::span<const int32_t> wanted, bool apart = false);
  std::span<const float> read_logits(const Plan&, std::span<const TokenAt> batch,
                                     std::span<const int32_t> wanted);
  // Feeds tokens in steps, with the logits of every token from index `first` on; done(step) comes before the
  // sequence grows.
  void feed_steps(std::span<const int32_t> tokens, int sequence, int64_t first,
                  const std::function<void(const Fed&)>& done);

  LlamaModel& model_;
  Backend& backend_;
  SessionOptions options_;
  MemoryPlan memory_;
  KvCache kv_;
  std::unique_ptr<Plan> decode_, prefill_;
  std::byte* arena_ = nullptr;
  std::byte* scratch_ = nullptr;
  std::vector<int64_t> lengths_;
  std::vector<float> logits_;
};

}  // namespace q4s
