#include "quant/gram.h"

#include "runtime/error.h"

namespace q4s {
namespace {

class CpuGram final : public Gram {
 public:
  explicit CpuGram(ThreadPool& pool) : pool_(pool) {}
  void difference(const float* a, const float* b, float* out, int64_t count) override {
    pool_.run([&](Part part) {
      const auto [begin, end] = part.of(count);
      for (int64_t i = begin; i < end; ++i) out[i] = a[i] - b[i];
    });
  }
  void add(const GptqGramArgs& args) override {
    pool_.run([&](Part part) { gptq_gram_cpu(args, part); });
  }

 private:
  ThreadPool& pool_;
};

}  // namespace

std::unique_ptr<Gram> make_gram(Backend& b) {
  if (b.name() == "cuda") return make_cuda_gram(b);
  return std::make_unique<CpuGram>(b.pool());
}

#ifndef Q4S_CUDA
std::unique_ptr<Gram> make_cuda_gram(Backend&) {
  throw Error(ErrorKind::kNoDevice, "this program was built without CUDA");
}
#endif

}  // namespace q4s
