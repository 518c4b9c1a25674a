// A weight of the model as the engine holds it: a view of host memory (a mapped file, or bytes of its own)
// and, once a backend has loaded it, that backend's copy.
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/types.h"
#include "runtime/huge_pages.h"

namespace q4s {

// What a backend keeps of a weight; the CPU backend keeps nothing and reads the view.
struct DeviceWeight {
  virtual ~DeviceWeight() = default;
};

// What the rows of a stacked weight are. A backend may store rows that meet in one result (gate and up; the
// two halves of a rotated head) side by side; which row is which in results never changes.
struct RowRoles {
  enum class Kind : uint8_t { kPlain, kGateUp, kQkv } kind = Kind::kPlain;
  int64_t heads = 0, kv_heads = 0, head_dim = 0;  // kQkv
};

struct Weight {
  std::string name;                  // "blk.3.qkv"
  WeightView view;                   // vectors (norms, tables): n = 1
  std::vector<const uint8_t*> rows;  // storage of view.rows for stacked or re-ordered rows
  HugeVector<uint8_t> bytes;         // storage of view.data where nothing is mapped
  HugeVector<uint16_t> scale_bits;   // storage of view.scales likewise
  RowRoles roles;
  bool head = false;               // its product is wanted for few tokens of a step, then read whole
  std::optional<uint64_t> random;  // view without data: a backend makes the values of kernels/random_weight.h
  std::unique_ptr<DeviceWeight> device;  // set by Backend::load

  Weight() = default;
  Weight(Weight&&) = default;  // vectors move their heap blocks: the view stays valid
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
