// WeightWork on the GPU, on the stream of the backend.
#include <cmath>

#include "kernels/convert.h"
#include "kernels/device_array.h"
#include "kernels/gptq_steps.h"
#include "kernels/rotate.h"
#include "quant/device_guard.h"
#include "quant/weight_work.h"
#include "runtime/cuda_backend.h"
#include "runtime/weights_cuda.h"

namespace q4s {
namespace {

class CudaWeightWork final : public WeightWork {
 public:
  explicit CudaWeightWork(Backend& b)
      : backend_(b),
        stream_(cuda_stream(b)),
        team_([&b](const std::function<void(Part)>& fn) { b.pool().run(fn); }) {}

  void load(const Weight& w, float* to) override {
    const WeightView& v = w.view;
    if (v.format != Format::kF32 && v.format != Format::kF16 && v.format != Format::kBF16) {
      load_by_host(w, to);
      return;
    }
    Weight raw;  // the same rows, for the backend to bring over
    raw.name = w.name;
    raw.view = v;
    backend_.load(raw);
    device_guarded("weights", [&] {
      const void* data = on_device(raw).view.data;
      const int64_t count = v.n * v.k;
      if (v.format == Format::kF32)
        cuda_check(
            cudaMemcpyAsync(to, data, size_t(count) * sizeof(float), cudaMemcpyDeviceToDevice, stream_),
            "copy");
      else
        widen_cuda(data, v.format, to, count, stream_);
      flag_.clear(1, stream_);
      gptq_finite_cuda(to, count, kLargest, flag_.get(), stream_);
      int bad = 0;
      flag_.download(&bad, 1, stream_);
      if (bad) unpack_rows(w, 0, v.n, nullptr, team_);  // throws with the count
    });
  }

  Weight make(const std::string& name, int64_t n, int64_t k) override {
    Weight w;
    w.name = name;
    w.bytes.resize(size_t(2 * n * k));
    w.view = {.format = Format::kF16, .n = n, .k = k, .data = w.bytes.data()};
    backend_.load(w);
    w.bytes = {};
    return w;
  }
  void store(const float* from, Weight& to) override {
    device_guarded("weights", [&] {
      const DeviceMatrix& m = on_device(to);
      to_f16_cuda(from, m.view.n, m.view.k, const_cast<uint8_t*>(m.view.data), m.view.k, stream_);
    });
  }

  void scale_columns(float* w, int64_t n, const std::vector<float>& gain) override {
    device_guarded("gains", [&] {
      const int64_t k = int64_t(gain.size());
      gain_.upload(gain.data(), k, stream_);
      scale_columns_cuda(w, gain_.get(), n, k, stream_);
    });
  }
  void rotate_rows(const Rotation& r, float* w, int64_t rows) override {
    device_guarded("rotation", [&] {
      signs_.upload(r.signs.data(), r.dim, stream_);
      factor_.upload(r.factor.data(), r.m * r.m, stream_);
      rotate_cuda({w, signs_.get(), factor_.get(), w, rows, r.dim, r.m, false}, stream_);
    });
  }
  void rotate_outputs(const Rotation& r, float* w, int64_t k) override {
    device_guarded("rotation", [&] {
      float* turned = turned_.take(r.dim * k);
      transpose_cuda(w, turned, r.dim, k, stream_);
      rotate_rows(r, turned, k);
      transpose_cuda(turned, w, k, r.dim, stream_);
    });
  }
  void take_rows(float* w, int64_t k, const std::vector<int32_t>& from) override {
    device_guarded("order", [&] {
      const int64_t n = int64_t(from.size());
      from_.upload(from.data(), n, stream_);
      gather_rows_cuda(w, from_.get(), turned_.take(n * k), n, k, stream_);
      copy_back(w, n * k);
    });
  }
  void take_columns(float* w, int64_t n, const std::vector<int32_t>& from) override {
    device_guarded("order", [&] {
      const int64_t k = int64_t(from.size());
      from_.upload(from.data(), k, stream_);
      gptq_gather_columns_cuda(w, from_.get(), turned_.take(n * k), n, k, false, stream_);
      copy_back(w, n * k);
    });
  }

  std::vector<double> column_squares(const float* w, int64_t n, int64_t k) override {
    return device_guarded("weights", [&] {
      std::vector<double> sums(k);
      column_squares_cuda(w, squares_.take(k), n, k, stream_);
      squares_.download(sums.data(), k, stream_);
      return sums;
    });
  }

  WeightShape shape(const float* w, int64_t count) override {
    return device_guarded("weights", [&] {
      return weight_shape(count, [&](int pass, double mean, double sd) {
        std::vector<ShapeSums> pieces(ceil_div(count, kShapePiece));
        shape_cuda(w, count, pass, mean, sd, pieces_.take(int64_t(pieces.size())), stream_);
        pieces_.download(pieces.data(), int64_t(pieces.size()), stream_);
        return pieces;
      });
    });
  }

  bool halves() const override { return true; }
  void put(const float* from, std::byte* to, int64_t count) override {
    device_guarded("activations", [&] { gptq_to_half_cuda(from, nullptr, 1, 1, count, to, count, stream_); });
  }
  void take(const std::byte* from, float* to, int64_t count) override {
    device_guarded("activations", [&] { widen_cuda(from, Format::kF16, to, count, stream_); });
  }

 private:
  static constexpr float kLargest = 65504.0f;
  static constexpr int64_t kSlab = int64_t(64) << 20;  // bytes of f32

  void copy_back(float* w, int64_t count) {
    cuda_check(
        cudaMemcpyAsync(w, turned_.get(), size_t(count) * sizeof(float), cudaMemcpyDeviceToDevice, stream_),
        "copy");
  }

  // Block formats of GGUF and packed linears: unpacked by the host's threads.
  void load_by_host(const Weight& w, float* to) {
    const int64_t n = w.view.n, k = w.view.k, rows = std::max<int64_t>(1, kSlab / (4 * k));
    for (int64_t i = 0; i < n; i += rows) {
      const int64_t end = std::min(n, i + rows);
      host_.resize(std::max(host_.size(), size_t((end - i) * k)));
      unpack_rows(w, i, end, host_.data(), team_);
      backend_.write(reinterpret_cast<std::byte*>(to + i * k), host_.data(),
                     size_t((end - i) * k) * sizeof(float));
      device_guarded("weights",
                     [&] { cuda_check(cudaStreamSynchronize(stream_), "upload"); });  // before the next slab
    }
  }

  Backend& backend_;
  cudaStream_t stream_;
  const Team team_;
  std::vector<float> host_;
  DeviceArray<float> gain_, signs_, factor_, turned_;
  DeviceArray<int32_t> from_;
  DeviceArray<int> flag_;
  DeviceArray<double> squares_;
  DeviceArray<ShapeSums> pieces_;
};

}  // namespace

std::unique_ptr<WeightWork> make_cuda_weight_work(Backend& b) {
  return device_guarded("quantiser", [&] { return std::make_unique<CudaWeightWork>(b); });
}

}  // namespace q4s
