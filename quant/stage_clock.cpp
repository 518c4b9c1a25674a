#include "quant/stage_clock.h"

#include <chrono>
#include <optional>

#include "runtime/error.h"

namespace q4s {
namespace {

class HostClock final : public StageClock {
 public:
  void enter(Stage s) override {
    const auto now = std::chrono::steady_clock::now();
    if (in_) sum_[size_t(*in_)] += std::chrono::duration<double>(now - since_).count();
    in_ = s;
    since_ = now;
  }
  std::array<double, kStages> seconds() override {
    if (in_) enter(*in_);
    return sum_;
  }

 private:
  std::optional<Stage> in_;
  std::chrono::steady_clock::time_point since_;
  std::array<double, kStages> sum_{};
};

}  // namespace

const char* stage_name(Stage s) {
  static constexpr const char* kNames[kStages] = {"load",   "forward", "sums",   "factor", "couple", "target",
                                                  "search", "solve",   "refine", "losses", "store"};
  return kNames[int(s)];
}

std::unique_ptr<StageClock> make_stage_clock(Backend& b) {
  if (b.name() == "cuda") return make_cuda_stage_clock(b);
  return std::make_unique<HostClock>();
}

#ifndef Q4S_CUDA
std::unique_ptr<StageClock> make_cuda_stage_clock(Backend&) {
  throw Error(ErrorKind::kNoDevice, "this program was built without CUDA");
}
#endif

}  // namespace q4s
