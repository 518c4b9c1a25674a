// Gram on the GPU. The backend computes on a stream of its own: a read of it waits until the inputs are there.
#include "kernels/gram_cuda.h"
#include "quant/gram.h"

namespace q4s {
namespace {

class CudaGram final : public Gram {
 public:
  explicit CudaGram(Backend& b) : backend_(b) {}
  void difference(const float* a, const float* b, float* out, int64_t count) override {
    wait_for(b);
    ops_.difference(a, b, out, count);
  }
  void add(const GptqGramArgs& args) override {
    wait_for(args.b);
    ops_.add(args);
  }

 private:
  void wait_for(const float* p) {
    float unused;
    backend_.read(&unused, reinterpret_cast<const std::byte*>(p), sizeof unused);
  }
  Backend& backend_;
  GramCuda ops_;
};

}  // namespace

std::unique_ptr<Gram> make_cuda_gram(Backend& b) { return std::make_unique<CudaGram>(b); }

}  // namespace q4s
