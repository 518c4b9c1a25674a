// What is done with the weights of a linear beside solving it, where the backend's memory is: brought there
// from the file, rotated, described, handed to the graphs that run the block. Matrices are row-major f32 (N,
// K).
#pragma once
#include <memory>

#include "quant/rotation.h"
#include "quant/weight_shape.h"
#include "runtime/backend.h"

namespace q4s {

class WeightWork {
 public:
  virtual ~WeightWork() = default;
  // The values of w, of any format. Throws Error(kInput) as unpack_rows.
  virtual void load(const Weight& w, float* to) = 0;
  // A weight of the format that the backend's graphs multiply fast (the GPU has no quick product in f32, and
  // fp16 keeps eleven bits of what becomes four), with zeros; and new values for it.
  virtual Weight make(const std::string& name, int64_t n, int64_t k) = 0;
  virtual void store(const float* from, Weight& to) = 0;

  virtual void scale_columns(float* w, int64_t n, const std::vector<float>& gain) = 0;
  virtual void rotate_rows(const Rotation&, float* w, int64_t rows) = 0;  // as in quant/rotation.h
  virtual void rotate_outputs(const Rotation&, float* w, int64_t k) = 0;
  // Row i of w (from.size(), k), or column j of w (n, from.size()), becomes what stood at from[i].
  virtual void take_rows(float* w, int64_t k, const std::vector<int32_t>& from) = 0;
  virtual void take_columns(float* w, int64_t n, const std::vector<int32_t>& from) = 0;
  // Sums of squares of the columns of w (n, k), rows ascending: the same bits everywhere.
  virtual std::vector<double> column_squares(const float* w, int64_t n, int64_t k) = 0;
  virtual WeightShape shape(const float* w, int64_t count) = 0;

  // Whether activations at rest are better kept as fp16, and the way there (a value beyond fp16 becomes its
  // largest) and back.
  virtual bool halves() const { return false; }
  virtual void put(const float* /*from*/, std::byte* /*to*/, int64_t /*count*/) {}
  virtual void take(const std::byte* /*from*/, float* /*to*/, int64_t /*count*/) {}
};

std::unique_ptr<WeightWork> make_weight_work(Backend&);  // by the backend's name
std::unique_ptr<WeightWork> make_cuda_weight_work(Backend&);

// R1 and R2 folded into a unit: w (N, K), the gain of the norm before it where there is one.
void rotate_unit(WeightWork&, const LlamaConfig&, Unit, float* w, const BlockNorms&, const Rotation& r1,
                 const Rotation& r2);

}  // namespace q4s
