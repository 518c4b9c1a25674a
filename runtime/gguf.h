// Reader of GGUF (versions 2 and 3, little-endian): typed metadata and tensors, mapped. Knows no
// architecture; whether the keys make a LLaMA is for models/.
//
//   | "GGUF" u32 version u64 tensors u64 pairs | pairs: key, u32 type, value | infos | padding | data |
//   info: name, u32 dims, u64 dim[dims] fastest first, u32 type, u64 offset in data
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "runtime/file_tensor.h"
#include "runtime/mapped_file.h"

namespace q4s {

class Gguf {
 public:
  // Throws Error(kInput) naming field, offset and value for whatever is not as the format says, and for
  // tensors of types other than F32, F16, BF16, Q8_0, Q4_0 and Q4_1 (all listed at once).
  static Gguf open(const std::string& path);

  // Metadata: nothing when the key is absent, Error(kInput) when its value has another type.
  bool has(std::string_view key) const { return values_.contains(std::string(key)); }
  std::optional<int64_t> integer(std::string_view key) const;  // of any width; u64 beyond int64 is refused
  std::optional<double> number(std::string_view key) const;    // a float or an integer
  std::optional<bool> boolean(std::string_view key) const;
  std::optional<std::string_view> text(std::string_view key) const;
  std::optional<std::vector<int64_t>> integers(std::string_view key) const;
  std::optional<std::vector<float>> floats(std::string_view key) const;
  std::optional<std::vector<std::string_view>> texts(std::string_view key) const;
  const std::vector<std::string>& keys() const { return keys_; }  // in file order

  std::span<const FileTensor> tensors() const { return tensors_; }  // in file order; shapes slowest first
  const FileTensor* find(std::string_view name) const;              // null when absent
  const std::string& path() const { return map_.path(); }

 private:
  struct Value {
    uint32_t type;  // of the elements, for an array
    bool array;
    uint64_t count;     // 1 unless an array
    const uint8_t* at;  // first element, checked to lie in the file
  };
  friend class GgufParser;
  const Value* value_of(std::string_view key, bool array, bool (*fits)(uint32_t), const char* wanted) const;

  MappedFile map_;
  std::vector<std::string> keys_;
  std::unordered_map<std::string, Value> values_;
  std::vector<FileTensor> tensors_;
  std::unordered_map<std::string, size_t> index_;  // name -> tensors_
};

}  // namespace q4s
