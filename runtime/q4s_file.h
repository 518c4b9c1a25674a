// The .q4s file: its format, version 1.0, and its reader. q4s_writer.h writes it. Neither knows any model.
//
//   | preamble, 4096 bytes | tensors | blobs | header |        little-endian throughout
//
// Preamble. A writer fills it last, so an unfinished file is never taken for one.
//     0 "Q4S\0" | 4 u16 major | 6 u16 minor | 8 u64 header offset | 16 u64 header bytes | 24 u64 file bytes
//    32 u64 XXH3-64 of the header | 40 u64 XXH3-64 of bytes 0..39 | 48 zeros to 4095
//
// Tensors and blobs consist of parts: a tensor of `data`, then (q4, q8) `scales`; a blob of `data`. Parts and
// header lie in the order in which the header lists them, each at the first multiple of 4096 after the one
// before; the bytes between are zero; the header ends the file. So there is one right offset for everything,
// and files of the same content are the same bytes.
//
// Header: JSON, at most 16 MiB.
//   {"features": [names a reader must know], "tensors": [...], "blobs": [...]}
//   tensor {"name", "format": "f32|f16|bf16|q8|q4", "shape": [N, K], "data": [offset, bytes], "xxh3": "16
//   hex"}
//          and for q8 and q4 "bits": 8|4, "group": columns a scale, "grid": "int|half", "scales": [offset,
//          bytes]
//   blob   {"name", "data": [offset, bytes], "xxh3"}
// xxh3 is over data, then scales, without the padding. Vectors have N = 1. Other keys are left to later minor
// versions and ignored. A changed meaning is a feature, a changed layout a major version.
//
// Tensor data: N rows, row-major, no padding between rows.
//   f32 f16 bf16   K values
//   q8             K int8 in -127..127;                     w = scale * q
//   q4             (K+1)/2 bytes, column 2i in bits 0..3 and 2i+1 in bits 4..7 of byte i; K odd: last bits
//   zero;
//                                                           w = scale * (code - 8), grid half: scale * (code
//                                                           - 7.5)
//   scales         (N, ceil(K/group)) fp16, signed; the last group of a row may be short
// Blobs: "config" and "provenance" (JSON texts) are always there; tokenizer files by their names.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "kernels/types.h"
#include "runtime/mapped_file.h"

namespace q4s {

struct Q4sTensor {
  std::string name;
  WeightView view;        // (n, k) into the mapping; vectors: n = 1
  uint64_t checksum = 0;  // of data, then scales
};

struct Q4sBlob {
  std::string name;
  std::span<const uint8_t> bytes;
};

class Q4sFile {
 public:
  // Throws Error(kInput) naming field, offset and value for whatever is not as above. Checks everything but
  // the bytes of tensors and of padding; those are for verify().
  static Q4sFile open(const std::string& path);

  const std::string& path() const { return map_.path(); }
  uint64_t bytes() const { return map_.size(); }
  std::span<const Q4sTensor> tensors() const { return tensors_; }
  const Q4sTensor* find(std::string_view name) const;  // null when absent
  std::span<const Q4sBlob> blobs() const { return blobs_; }
  bool has_blob(std::string_view name) const;
  std::span<const uint8_t> blob(std::string_view name) const;  // Error(kInput) when absent
  std::string config_json() const { return blob_text("config"); }
  std::string provenance_json() const { return blob_text("provenance"); }
  bool has_feature(std::string_view name) const;

  // Reads everything; throws Error(kInput) naming every tensor whose bytes differ from their checksum.
  void verify() const;

  // For people: header, tensors, sizes, bits per weight.
  std::string show() const;

 private:
  std::string blob_text(std::string_view name) const;

  MappedFile map_;
  uint16_t minor_ = 0;
  std::vector<std::string> features_;
  std::vector<Q4sTensor> tensors_;
  std::vector<Q4sBlob> blobs_;
  std::unordered_map<std::string, size_t> index_;  // name -> tensors_
};

}  // namespace q4s
