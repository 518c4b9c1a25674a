// A weight of the model as the engine holds it: a view of host memory (a mapped file, or bytes of its own) and,
// once a backend has loaded it, that backend's copy.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "kernels/types.h"

namespace q4s {

// What a backend keeps of a weight; the CPU backend keeps nothing and reads the view.
struct DeviceWeight {
  virtual ~DeviceWeight() = default;
};

struct Weight {
  std::string name;                       // "blk.3.qkv"
  WeightView view;                        // vectors (norms, tables): n = 1
  std::vector<const uint8_t*> rows;       // storage of view.rows for stacked or re-ordered rows
  std::vector<uint8_t> bytes;             // storage of view.data where nothing is mapped
  std::vector<uint16_t> scale_bits;       // storage of view.scales likewise
  std::unique_ptr<DeviceWeight> device;   // set by Backend::load

  Weight() = default;
  Weight(Weight&&) = default;             // vectors move their heap blocks: the view stays valid
  Weight& operator=(Weight&&) = default;

  const float* f32() const { return reinterpret_cast<const float*>(view.data); }  // format kF32 without rows
  // Bytes that a pass over this weight reads.
  int64_t read_bytes() const {
    return view.n * row_bytes(view.format, view.k) + (view.scales ? 2 * view.n * view.groups() : 0);
  }
};

// An owned f32 vector or matrix.
Weight make_weight_f32(std::string name, int64_t n, int64_t k, std::vector<float> values);

}  // namespace q4s
