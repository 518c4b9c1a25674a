#include "runtime/safetensors.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "runtime/error.h"
#include "runtime/file_kind.h"
#include "runtime/json_check.h"

namespace q4s {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr uint64_t kMaxHeader = 100'000'000;  // the format's own limit

[[noreturn]] void refuse(const std::string& where, const std::string& why) {
  throw Error(ErrorKind::kInput, where + ": " + why);
}

Json parse(std::string_view text, const std::string& where) {
  check_json(text, where);
  Json json = Json::parse(text);
  if (!json.is_object()) refuse(where, "is not a JSON object");
  return json;
}

std::string dump(const Json& json) { return json.dump(-1, ' ', true).substr(0, 100); }

uint64_t unsigned_at(const Json& json, const std::string& where) {
  if (!json.is_number_unsigned()) refuse(where, dump(json) + " is not an unsigned integer");
  return json.get<uint64_t>();
}

struct Entry {
  FileTensor tensor;
  uint64_t begin, end;  // in the data area
};

// One header entry, all but its place among the others. Leaves the dtype to the caller when it is not ours.
Entry read_entry(const std::string& path, const std::string& name, const Json& json, uint64_t data_bytes,
                 std::map<std::string, std::vector<std::string>>& unsupported) {
  const std::string where = path + ": tensor " + in_quotes(name);
  for (const char* field : {"dtype", "shape", "data_offsets"}) {
    if (!json.is_object() || !json.contains(field)) refuse(where, std::string("has no ") + field);
  }
  const Json& dtype = json["dtype"];
  const Json& shape = json["shape"];
  const Json& offsets = json["data_offsets"];
  if (!dtype.is_string()) refuse(where, "dtype is " + dump(dtype) + ", not a text");
  if (!shape.is_array()) refuse(where, "shape is " + dump(shape) + ", not a list");
  if (!offsets.is_array() || offsets.size() != 2) {
    refuse(where, "data_offsets is " + dump(offsets) + ", not a list of two");
  }

  Entry e;
  e.tensor.name = name;
  e.begin = unsigned_at(offsets[0], where + " data_offsets[0]");
  e.end = unsigned_at(offsets[1], where + " data_offsets[1]");
  if (e.begin > e.end) refuse(where, "data_offsets " + dump(offsets) + " run backwards");
  if (e.end > data_bytes) {
    refuse(where, "data_offsets " + dump(offsets) +
                      " end past the data: truncated, or the header lies; the data " + "area has " +
                      std::to_string(data_bytes) + " bytes");
  }
  int64_t count = 1;
  for (size_t i = 0; i < shape.size(); ++i) {
    const uint64_t dim = unsigned_at(shape[i], where + " shape[" + std::to_string(i) + "]");
    if (dim == 0 || dim > kMaxDim) refuse(where, "shape " + dump(shape) + " has a dimension out of range");
    if (__builtin_mul_overflow(count, int64_t(dim), &count)) {
      refuse(where, "shape " + dump(shape) + " overflows");
    }
    e.tensor.shape.push_back(int64_t(dim));
  }
  const auto& type = dtype.get_ref<const std::string&>();
  if (type == "F32") {
    e.tensor.format = Format::kF32;
  } else if (type == "F16") {
    e.tensor.format = Format::kF16;
  } else if (type == "BF16") {
    e.tensor.format = Format::kBF16;
  } else {
    unsupported[type].push_back(name);
    return e;
  }
  const int64_t bytes = tensor_bytes(e.tensor.format, e.tensor.rows(), e.tensor.columns());
  if (bytes < 0 || uint64_t(bytes) != e.end - e.begin) {
    refuse(where, "data_offsets " + dump(offsets) + " hold " + std::to_string(e.end - e.begin) +
                      " bytes, shape " + dump(shape) + " of " + type + " needs " +
                      (bytes < 0 ? "too many" : std::to_string(bytes)));
  }
  e.tensor.bytes = size_t(bytes);
  return e;
}

}  // namespace

const FileTensor* Safetensors::find(std::string_view name) const {
  const auto it = index_.find(std::string(name));
  return it == index_.end() ? nullptr : &tensors_[it->second];
}

void Safetensors::add_file(const std::string& path) {
  MappedFile map(path);
  if (file_kind(map.bytes()) != FileKind::kSafetensors) {
    if (map.size() < 10) {
      refuse(path, "not a safetensors file, or truncated: it has " + std::to_string(map.size()) + " bytes");
    }
    refuse_kind(path, map.bytes(), "a safetensors file");
  }
  uint64_t header_bytes;
  std::memcpy(&header_bytes, map.data(), 8);
  if (header_bytes > map.size() - 8) {
    refuse(path, "truncated: file has " + std::to_string(map.size()) + " bytes, header says it has " +
                     std::to_string(header_bytes) + " bytes after the first 8");
  }
  if (header_bytes > kMaxHeader) {
    refuse(path,
           "header of " + std::to_string(header_bytes) + " bytes; at most " + std::to_string(kMaxHeader));
  }
  const uint64_t data_bytes = map.size() - 8 - header_bytes;
  const uint8_t* const data = map.data() + 8 + header_bytes;
  const std::string_view text(reinterpret_cast<const char*>(map.data()) + 8, header_bytes);
  const Json header = parse(text, path + ": header");

  std::vector<Entry> entries;
  std::map<std::string, std::vector<std::string>> unsupported;  // dtype -> tensors
  for (const auto& [name, json] : header.items()) {
    if (name != "__metadata__") entries.push_back(read_entry(path, name, json, data_bytes, unsupported));
  }
  if (!unsupported.empty()) {
    std::string list;
    for (const auto& [type, names] : unsupported) {
      for (const std::string& name : names) list += "\n  " + in_quotes(name) + ": " + in_quotes(type);
    }
    refuse(path, "tensors of types that are not supported (F32, F16 and BF16 are):" + list);
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.begin < b.begin; });
  uint64_t end = 0;
  for (const Entry& e : entries) {
    if (e.begin != end) {
      refuse(path, "tensor " + in_quotes(e.tensor.name) + " begins at data offset " +
                       std::to_string(e.begin) +
                       (e.begin < end ? ", inside the one before it, which ends at "
                                      : ", leaving a hole after the one before it, which ends at ") +
                       std::to_string(end));
    }
    end = e.end;
  }
  if (end != data_bytes) {
    refuse(path, "file has " + std::to_string(map.size()) + " bytes, header says " +
                     std::to_string(8 + header_bytes + end));
  }

  for (Entry& e : entries) {
    FileTensor& t = e.tensor;
    t.data = data + e.begin;
    const size_t unit = size_t(row_bytes(t.format, 1));
    if (reinterpret_cast<uintptr_t>(t.data) % unit != 0) {
      std::vector<uint64_t>& copy = aligned_.emplace_back((t.bytes + 7) / 8);
      std::memcpy(copy.data(), t.data, t.bytes);
      t.data = reinterpret_cast<const uint8_t*>(copy.data());
    }
    if (!index_.emplace(t.name, tensors_.size()).second) {
      refuse(path, "tensor " + in_quotes(t.name) + " is in another shard, too");
    }
    tensors_.push_back(std::move(t));
  }
  files_.push_back(path);
  maps_.push_back(std::move(map));
}

Safetensors Safetensors::open(const std::string& file_or_folder) {
  Safetensors out;
  const fs::path folder(file_or_folder);
  std::error_code ignored;
  if (!fs::is_directory(folder, ignored)) {
    out.add_file(file_or_folder);
    return out;
  }
  const fs::path single = folder / "model.safetensors", index = folder / "model.safetensors.index.json";
  if (fs::exists(single, ignored)) {
    out.add_file(single.string());
    return out;
  }
  if (!fs::exists(index, ignored)) {
    for (const char* name : {"pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"}) {
      if (fs::exists(folder / name, ignored)) {
        refuse(file_or_folder, std::string("has ") + name + " but no safetensors; " + kPickleAdvice);
      }
    }
    refuse(file_or_folder, "has neither model.safetensors nor model.safetensors.index.json");
  }

  const MappedFile map(index.string());
  const std::string where = index.string();
  const Json json = parse({reinterpret_cast<const char*>(map.data()), map.size()}, where);
  if (!json.contains("weight_map") || !json["weight_map"].is_object()) refuse(where, "has no weight_map");
  std::map<std::string, std::vector<std::string>> shards;  // file -> tensors it should hold
  for (const auto& [tensor, file] : json["weight_map"].items()) {
    if (!file.is_string()) {
      refuse(where, "weight_map of " + in_quotes(tensor) + " is " + dump(file) + ", not a text");
    }
    shards[file.get<std::string>()].push_back(tensor);
  }
  size_t listed = 0;  // tensors of the shards before
  for (const auto& [file, names] : shards) {
    const bool inside = !file.empty() && file != "." && file != ".." && file.find('/') == std::string::npos &&
                        file.find('\0') == std::string::npos;
    if (!inside) {
      refuse(where, "names the shard " + in_quotes(file) + ", which is not a plain file name in this folder");
    }
    if (!fs::exists(folder / file, ignored)) {
      refuse(where, "names the shard " + in_quotes(file) + ", which is missing");
    }
    out.add_file((folder / file).string());
    for (const std::string& name : names) {
      const auto it = out.index_.find(name);
      if (it == out.index_.end() || it->second < listed) {
        refuse(where,
               "lists tensor " + in_quotes(name) + " in " + in_quotes(file) + ", which does not hold it");
      }
    }
    listed = out.tensors_.size();
  }
  return out;
}

}  // namespace q4s
