// Where the time of a quantisation goes. On the GPU the host runs ahead, so stages are told apart by marks in
// the device's own stream; what it waits for the host counts with the stage in progress.
#pragma once
#include <array>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "runtime/backend.h"

namespace q4s {

enum class Stage {
  kLoad,
  kForward,
  kSums,
  kFactor,
  kCouple,
  kTarget,
  kSearch,
  kSolve,
  kRefine,
  kLosses,
  kStore
};
constexpr int kStages = 11;
const char* stage_name(Stage);

class StageClock {
 public:
  virtual ~StageClock() = default;
  virtual void enter(Stage) = 0;  // ends the one before
  // Seconds of each stage so far, in order. Waits for the device.
  virtual std::array<double, kStages> seconds() = 0;
};

std::unique_ptr<StageClock> make_stage_clock(Backend&);  // by the backend's name
std::unique_ptr<StageClock> make_cuda_stage_clock(Backend&);

}  // namespace q4s
