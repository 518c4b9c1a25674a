// A file mapped read-only into memory, and hints to the kernel about parts of it. Everything that reads a
// model goes through here. Whoever takes sizes from a header checks them against size() before touching the
// bytes: reading past the end of a mapping kills the process.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace q4s {

class MappedFile {
 public:
  MappedFile() = default;
  // Throws Error(kInput), naming path and reason: missing, no permission, directory, FIFO or device, empty.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&&) noexcept;
  MappedFile& operator=(MappedFile&&) noexcept;

  const std::string& path() const { return path_; }
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  std::span<const uint8_t> bytes() const { return {data_, size_}; }

 private:
  std::string path_;
  const uint8_t* data_ = nullptr;  // (size_)
  size_t size_ = 0;
};

// Hints for a range of any mapping; whole pages, never an error. will_need starts reading ahead, dont_need
// lets clean pages go (they are read again when touched), sequential asks for aggressive read-ahead.
void advise_will_need(const void* begin, size_t bytes);
void advise_dont_need(const void* begin, size_t bytes);
void advise_sequential(const void* begin, size_t bytes);

}  // namespace q4s
