// Tiny files for the reader tests, written byte by byte by hand so that they can also be wrong on purpose.
#pragma once
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace q4s::test {

// A folder that goes away with its object; in memory where there is such a place, as tests write many small
// files.
class TempFolder {
 public:
  TempFolder() {
    const bool memory = access("/dev/shm", W_OK) == 0;
    const std::filesystem::path base = memory ? "/dev/shm" : std::filesystem::temp_directory_path();
    std::string name = (base / "q4s_test_XXXXXX").string();
    if (!mkdtemp(name.data())) throw std::runtime_error("no temporary folder in " + base.string());
    path_ = name;
  }
  ~TempFolder() { std::filesystem::remove_all(path_); }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

inline void write_file(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), std::streamsize(bytes.size()));
}

inline std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

template <class T>
std::string raw(T value) {
  return {reinterpret_cast<const char*>(&value), sizeof value};
}

template <class T>
std::string raw(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

// `header` as the JSON text, `data` as what follows it.
inline std::string safetensors_bytes(const std::string& header, const std::string& data) {
  return raw(uint64_t(header.size())) + header + data;
}

// GGUF pieces.
inline std::string gguf_string(const std::string& s) { return raw(uint64_t(s.size())) + s; }
inline std::string gguf_pair(const std::string& key, uint32_t type, const std::string& value) {
  return gguf_string(key) + raw(type) + value;
}
inline std::string gguf_info(const std::string& name, const std::vector<uint64_t>& dims, uint32_t type,
                             uint64_t offset) {
  return gguf_string(name) + raw(uint32_t(dims.size())) + raw(dims) + raw(type) + raw(offset);
}
inline std::string gguf_bytes(const std::vector<std::string>& pairs, const std::vector<std::string>& infos,
                              const std::string& data, uint32_t version = 3, size_t alignment = 32) {
  std::string out = "GGUF" + raw(version) + raw(uint64_t(infos.size())) + raw(uint64_t(pairs.size()));
  for (const auto& p : pairs) out += p;
  for (const auto& i : infos) out += i;
  out.resize((out.size() + alignment - 1) / alignment * alignment);
  return out + data;
}

}  // namespace q4s::test
