// What reader and writer of .q4s share: preamble and header as structures, to and from bytes. The format
// itself is described in q4s_file.h. Not for use outside these two.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/types.h"
#include "runtime/q4s_file.h"

namespace q4s {

constexpr uint16_t kQ4sMajor = 1, kQ4sMinor = 0;
constexpr uint64_t kQ4sAlign = 4096;
constexpr uint64_t kQ4sMaxHeader = 16u << 20;
constexpr std::string_view kQ4sFeatures[] = {"rotation"};  // those that this reader knows

struct Q4sPart {
  uint64_t offset = 0, bytes = 0;
  uint64_t end() const { return offset + bytes; }
};

struct Q4sEntry {  // of a tensor
  std::string name;
  Format format = Format::kF32;
  Grid grid = Grid::kInt;
  int64_t n = 0, k = 0, group = 0;
  Q4sPart data, scales;  // scales.bytes == 0: none
  uint64_t checksum = 0;
};

struct Q4sBlobEntry {
  std::string name;
  Q4sPart data;
  uint64_t checksum = 0;
};

struct Q4sHeader {
  std::vector<std::string> features;
  std::vector<Q4sEntry> tensors;
  std::vector<Q4sBlobEntry> blobs;
};

struct Q4sPreamble {
  uint16_t major = kQ4sMajor, minor = kQ4sMinor;
  uint64_t header_offset = 0, header_bytes = 0, file_bytes = 0, header_checksum = 0;
};

constexpr bool has_scales(Format f) { return f == Format::kQ4 || f == Format::kQ8; }
// Sizes of the parts of a tensor; false when they overflow.
bool part_bytes(const Q4sEntry&, uint64_t* data, uint64_t* scales);
constexpr uint64_t next_part(uint64_t end) { return (end + kQ4sAlign - 1) / kQ4sAlign * kQ4sAlign; }

std::array<uint8_t, kQ4sAlign> preamble_bytes(const Q4sPreamble&);
Q4sPreamble parse_preamble(std::span<const uint8_t> file, const std::string& path);

std::string header_text(const Q4sHeader&);
// Checks syntax, types, names, features and that sizes fit shapes. `where` starts the text of errors.
Q4sHeader parse_header(std::string_view text, const std::string& where);
// Checks that parts lie where they must, from `at` on; returns where the last one ends.
uint64_t check_layout(const Q4sHeader&, uint64_t at, const std::string& where);

// A view of the tensor inside `file`, whose layout has been checked.
WeightView entry_view(const Q4sEntry&, const uint8_t* file);
uint64_t view_checksum(const WeightView&);  // of contiguous data (view.rows unused), then scales

}  // namespace q4s
