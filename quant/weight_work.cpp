#include "quant/weight_work.h"

#include <algorithm>
#include <cstring>

#include "kernels/linear.h"
#include "runtime/error.h"

namespace q4s {
namespace {

class CpuWeightWork final : public WeightWork {
 public:
  explicit CpuWeightWork(ThreadPool& pool)
      : team_([&pool](const std::function<void(Part)>& fn) { pool.run(fn); }) {}

  void load(const Weight& w, float* to) override { unpack_rows(w, 0, w.view.n, to, team_); }
  Weight make(const std::string& name, int64_t n, int64_t k) override {
    return make_weight_f32(name, n, k, std::vector<float>(n * k));
  }
  void store(const float* from, Weight& to) override { std::memcpy(to.bytes.data(), from, to.bytes.size()); }

  void scale_columns(float* w, int64_t n, const std::vector<float>& gain) override {
    team_([&](Part part) {
      const auto [begin, end] = part.of(n);
      fold_gain(gain, w + begin * int64_t(gain.size()), end - begin);
    });
  }
  void rotate_rows(const Rotation& r, float* w, int64_t rows) override {
    q4s::rotate_rows(r, w, rows, team_);
  }
  void rotate_outputs(const Rotation& r, float* w, int64_t k) override {
    q4s::rotate_outputs(r, w, k, team_);
  }
  void take_rows(float* w, int64_t k, const std::vector<int32_t>& from) override {
    const std::vector<float> old(w, w + int64_t(from.size()) * k);
    team_([&](Part part) {
      const auto [begin, end] = part.of(int64_t(from.size()));
      for (int64_t i = begin; i < end; ++i) std::copy_n(&old[from[i] * k], k, w + i * k);
    });
  }
  void take_columns(float* w, int64_t n, const std::vector<int32_t>& from) override {
    const int64_t k = int64_t(from.size());
    team_([&](Part part) {
      const auto [begin, end] = part.of(n);
      std::vector<float> old(k);
      for (int64_t i = begin; i < end; ++i) {
        std::copy_n(w + i * k, k, old.data());
        for (int64_t j = 0; j < k; ++j) w[i * k + j] = old[from[j]];
      }
    });
  }
  std::vector<double> column_squares(const float* w, int64_t n, int64_t k) override {
    std::vector<double> sums(k);
    team_([&](Part part) {
      const auto [begin, end] = part.of(k, 16);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = begin; j < end; ++j) sums[j] += double(w[i * k + j]) * w[i * k + j];
    });
    return sums;
  }
  WeightShape shape(const float* w, int64_t count) override { return weight_shape(w, count, team_); }

 private:
  const Team team_;
};

}  // namespace

void rotate_unit(WeightWork& work, const LlamaConfig& c, Unit u, float* w, const BlockNorms& norms,
                 const Rotation& r1, const Rotation& r2) {
  const int64_t n = unit_rows(c, u), k = unit_columns(c, u);
  if (writes_residual(u)) {
    work.rotate_outputs(r1, w, k);
    if (u == Unit::kO) work.rotate_rows(r2, w, n * c.heads);  // every head's slice of every row
    return;
  }
  work.scale_columns(w, n, u == Unit::kQkv ? norms.attn : norms.mlp);
  work.rotate_rows(r1, w, n);
  if (u != Unit::kQkv) return;
  float* v = w + (c.q_dim() + c.kv_dim()) * k;
  for (int64_t h = 0; h < c.kv_heads; ++h) work.rotate_outputs(r2, v + h * c.head_dim * k, k);
}

std::unique_ptr<WeightWork> make_weight_work(Backend& b) {
  if (b.name() == "cuda") return make_cuda_weight_work(b);
  return std::make_unique<CpuWeightWork>(b.pool());
}

#ifndef Q4S_CUDA
std::unique_ptr<WeightWork> make_cuda_weight_work(Backend&) {
  throw Error(ErrorKind::kNoDevice, "this program was built without CUDA");
}
#endif

}  // namespace q4s
