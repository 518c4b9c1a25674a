// From the solver's codes to the bytes of a .q4s tensor, and the embedding's and head's own formats.
#pragma once
#include <vector>

#include "models/llama.h"
#include "quant/rotation.h"
#include "quant/solver.h"

namespace q4s {

// A tensor in one of the file's formats, owned.
struct PackedWeight {
  WeightView view;  // into data and scales
  std::vector<uint8_t> data;
  std::vector<uint16_t> scales;

  PackedWeight() = default;
  PackedWeight(PackedWeight&&) = default;
  PackedWeight& operator=(PackedWeight&&) = default;
};

PackedWeight pack(const QuantizedLinear&);
PackedWeight empty_packed(const QuantizedLinear&);  // its form, with zeros

// Two codes a byte, even column low; rows begin on a byte.
void pack_nibbles(const uint8_t* codes, int64_t k, uint8_t* out);
void unpack_nibbles(const uint8_t* packed, int64_t k, uint8_t* codes);

// An embedding or head (V, D), unpacked in slabs: times gain, times R (both optional), then kF16, kQ8 (groups
// of 64) or kQ4 (groups of 128), rounded to nearest with searched scales. Throws Error(kInput) where a value
// is not finite or beyond fp16.
PackedWeight pack_table(const Weight&, Format, const std::vector<float>* gain, const Rotation*, const Team&);

}  // namespace q4s
