// StageClock on the GPU: events in the backend's stream, read back when enough have gathered.
#include <optional>

#include "kernels/cuda_check.h"
#include "quant/device_guard.h"
#include "quant/stage_clock.h"
#include "runtime/cuda_backend.h"

namespace q4s {
namespace {

class CudaStageClock final : public StageClock {
 public:
  explicit CudaStageClock(Backend& b) : stream_(cuda_stream(b)) {}
  ~CudaStageClock() override {
    for (cudaEvent_t e : events_) (void)cudaEventDestroy(e);
  }

  void enter(Stage s) override {
    if (!stages_.empty() && stages_.back() == s) return;
    device_guarded("stages", [&] {
      if (stages_.size() == kMost) fold();
      mark(s);
    });
  }
  std::array<double, kStages> seconds() override {
    return device_guarded("stages", [&] {
      if (!stages_.empty()) {
        mark(stages_.back());
        fold();
      }
      return sum_;
    });
  }

 private:
  static constexpr size_t kMost = 4096;

  void mark(Stage s) {
    if (events_.size() == stages_.size()) {
      cudaEvent_t e = nullptr;
      cuda_check(cudaEventCreate(&e), "event");
      events_.push_back(e);
    }
    cuda_check(cudaEventRecord(events_[stages_.size()], stream_), "event");
    stages_.push_back(s);
  }
  // Adds up what lies between the marks; the last stays as the first.
  void fold() {
    cuda_check(cudaEventSynchronize(events_[stages_.size() - 1]), "event");
    for (size_t i = 0; i + 1 < stages_.size(); ++i) {
      float ms = 0;
      cuda_check(cudaEventElapsedTime(&ms, events_[i], events_[i + 1]), "event");
      sum_[size_t(stages_[i])] += ms / 1e3;
    }
    std::swap(events_[0], events_[stages_.size() - 1]);
    stages_ = {stages_.back()};
  }

  cudaStream_t stream_;
  std::vector<cudaEvent_t> events_;
  std::vector<Stage> stages_;  // that begin at the events
  std::array<double, kStages> sum_{};
};

}  // namespace

std::unique_ptr<StageClock> make_cuda_stage_clock(Backend& b) { return std::make_unique<CudaStageClock>(b); }

}  // namespace q4s
