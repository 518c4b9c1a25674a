// Reader of safetensors: one file, or a Hugging Face folder with model.safetensors or with
// model.safetensors.index.json and its shards. Bytes stay mapped in the file's own type.
//
//   | u64 header bytes | header: JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}} | data |
//
// The data must be covered without overlap or hole, as the format demands.
#pragma once
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "runtime/file_tensor.h"
#include "runtime/mapped_file.h"

namespace q4s {

class Safetensors {
 public:
  // Throws Error(kInput) naming file, tensor, field and value: anything that is not as the format says,
  // shards missing, named outside the folder or sharing a tensor, dtypes other than F32, F16 and BF16 (all
  // listed at once), a folder with pickle only.
  static Safetensors open(const std::string& file_or_folder);

  std::span<const FileTensor> tensors() const { return tensors_; }  // file by file, in order of their offsets
  const FileTensor* find(std::string_view name) const;              // null when absent
  const std::vector<std::string>& files() const {
    return files_;
  }  // the paths read, for hashes in provenance

 private:
  void add_file(const std::string& path);

  std::vector<std::string> files_;
  std::vector<MappedFile> maps_;
  std::vector<std::vector<uint64_t>> aligned_;  // copies of tensors whose offset does not fit their type
  std::vector<FileTensor> tensors_;
  std::unordered_map<std::string, size_t> index_;  // name -> tensors_
};

}  // namespace q4s
