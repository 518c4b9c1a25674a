// XXH3-64, the one checksum of the project: tensors and headers of .q4s, hashes of inputs in provenance and
// reports. Finds damage, not malice.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace q4s {

uint64_t xxh3(const void* data, size_t bytes);

// 16 lower-case hex digits, most significant first: how a checksum is written in headers and reports.
std::string checksum_text(uint64_t);

// The same sum over bytes that come in pieces.
class Checksum {
 public:
  Checksum();
  ~Checksum();
  Checksum(const Checksum&) = delete;
  Checksum& operator=(const Checksum&) = delete;
  void update(const void* data, size_t bytes);
  uint64_t value() const;  // of all bytes so far

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace q4s
