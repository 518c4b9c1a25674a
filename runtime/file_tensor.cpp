#include "runtime/file_tensor.h"

namespace q4s {

const char* format_name(Format f) {
  switch (f) {
    case Format::kF32: return "f32";
    case Format::kF16: return "f16";
    case Format::kBF16: return "bf16";
    case Format::kQ8: return "q8";
    case Format::kQ4: return "q4";
    case Format::kGgufQ8_0: return "Q8_0";
    case Format::kGgufQ4_0: return "Q4_0";
    case Format::kGgufQ4_1: return "Q4_1";
  }
  return "?";
}

std::string in_quotes(std::string_view text) {
  constexpr size_t kMost = 100;
  std::string out = "\"";
  for (const char c : text.substr(0, kMost)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f || c == '"' || c == '\\') {
      out += "\\x";
      out += "0123456789abcdef"[byte >> 4];
      out += "0123456789abcdef"[byte & 15];
    } else {
      out += c;
    }
  }
  out += '"';
  if (text.size() > kMost) out += "... (" + std::to_string(text.size()) + " bytes)";
  return out;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

int64_t tensor_bytes(Format format, int64_t n, int64_t k) {
  const bool blocks =
      format == Format::kGgufQ8_0 || format == Format::kGgufQ4_0 || format == Format::kGgufQ4_1;
  if (blocks && k % 32 != 0) return -1;
  int64_t bytes;
  return __builtin_mul_overflow(n, row_bytes(format, k), &bytes) ? -1 : bytes;
}

}  // namespace q4s
