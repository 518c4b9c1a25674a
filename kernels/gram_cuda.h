// The quantiser's sums over tokens on the GPU, by the vendor's library in full f32. A stream of its own: whoever
// wrote the inputs elsewhere waits first, and every call is complete when it returns.
#pragma once
#include <memory>

#include "kernels/gptq.h"

namespace q4s {

class GramCuda {
 public:
  GramCuda();  // throws CudaError, std::runtime_error, as the calls do
  ~GramCuda();
  GramCuda(const GramCuda&) = delete;
  GramCuda& operator=(const GramCuda&) = delete;

  void difference(const float* a, const float* b, float* out, int64_t count);  // out = a - b, device memory
  void add(const GptqGramArgs&);                                               // as gptq_gram_cpu; all of c is updated

 private:
  struct Library;
  std::unique_ptr<Library> library_;
};

}  // namespace q4s
