// A tensor as a model file lists it (safetensors, GGUF), and the small things that all readers of untrusted
// headers share: names safe to print, products that notice overflow. Bytes stay in the mapped file.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/types.h"

namespace q4s {

struct FileTensor {
  std::string name;
  Format format = Format::kF32;
  std::vector<int64_t>
      shape;  // row-major, slowest first: (N, K) for a matrix, (N) for a vector, () for a scalar
  const uint8_t* data = nullptr;  // (bytes) rows of the last dimension, row_bytes(format, K) apart
  size_t bytes = 0;

  int64_t rows() const {  // all dimensions but the last
    int64_t n = 1;
    for (size_t i = 0; i + 1 < shape.size(); ++i) n *= shape[i];
    return n;
  }
  int64_t columns() const { return shape.empty() ? 1 : shape.back(); }
  WeightView view() const { return {.format = format, .n = rows(), .k = columns(), .data = data}; }
};

// "f32", "f16", "bf16", "q8", "q4", "Q8_0", "Q4_0", "Q4_1".
const char* format_name(Format);

// Text from a file in quotes, control bytes escaped and long texts cut, fit for a message.
std::string in_quotes(std::string_view);

// "[576, 1536]"
std::string shape_text(const std::vector<int64_t>&);

// The largest dimension accepted in any file; kernels count in 32 bits in places.
constexpr uint64_t kMaxDim = 0x7fffffff;

// Bytes of n rows of k columns, or -1 if k does not fit the format's blocks or the size overflows.
// Wants 1 <= n, 1 <= k <= kMaxDim.
int64_t tensor_bytes(Format, int64_t n, int64_t k);

}  // namespace q4s
