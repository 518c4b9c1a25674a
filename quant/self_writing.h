// Calibration text that the model writes itself. Many sequences are written together, so that a step reads
// the weights once for all of them; what limits their number is memory for keys and values. Sequences of one
// length need it only at their end: where it is short, a second group starts when the first is half way, in
// memory that is laid out so that a sequence grows into what an older one left (three half sequences for two
// instead of four).
#pragma once
#include <functional>
#include <optional>

#include "quant/calibration.h"

namespace q4s {

// How sequences are written: in groups of `lanes`, one after the other, or each half way through the one
// before. A rule of the shape, so that results do not depend on the machine unless its memory is short.
struct WritingPlan {
  int64_t lanes, groups;  // lanes * groups >= samples
  bool overlaps;

  static WritingPlan of(int64_t samples, int64_t lanes, bool overlaps);
  int64_t steps(int64_t seq_len) const;  // each reads the weights once
  int64_t together() const { return overlaps && groups > 1 ? 2 * lanes : lanes; }
  // Where the cache of a sequence begins, in units of the distance between two.
  int64_t slot(int64_t group, int64_t lane) const;
  int64_t slots() const;
};
WritingPlan writing_plan(const LlamaConfig&, int64_t samples, int64_t seq_len);

// Text from the model's BOS token (from random tokens where it has none), at temperature 1 from the whole
// distribution, going on after an end token. Each sequence has its own random stream. progress(tokens done,
// tokens in all). Without a plan: writing_plan(), with fewer lanes where the backend's memory asks for it.
Calibration calibration_self_written(LlamaModel&, Backend&, int64_t samples, int64_t seq_len, uint64_t seed,
                                     const std::function<void(int64_t, int64_t)>& progress,
                                     std::optional<WritingPlan> plan = std::nullopt);

}  // namespace q4s
