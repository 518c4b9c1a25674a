// Weights on the GPU: what each takes, and the way there. Rows are gathered from the mapped file by the
// host's threads into pinned memory, copied while the next piece is gathered, and int4 and int8 are repacked
// into tiles by the device.
#pragma once
#include <span>

#include "kernels/device_matrix.h"
#include "runtime/backend.h"

namespace q4s {

struct CudaWeight final : DeviceWeight {
  DeviceMatrix matrix;
  std::shared_ptr<void> memory;  // the allocation that it is part of
};

inline const DeviceMatrix& on_device(const Weight& w) {
  return static_cast<const CudaWeight&>(*w.device).matrix;
}

// Shape, format and packing that w gets, without addresses: GGUF's block formats become fp16.
DeviceMatrix device_matrix_of(const Weight& w);
size_t device_bytes(const DeviceMatrix&);

// Device memory; Error(kResource) with what is free where it is short.
void* cuda_take(size_t bytes, const std::string& purpose);

class CudaLoader {
 public:
  CudaLoader(ThreadPool& pool, cudaStream_t stream) : pool_(pool), stream_(stream) {}
  ~CudaLoader();
  CudaLoader(const CudaLoader&) = delete;
  CudaLoader& operator=(const CudaLoader&) = delete;

  // Throws Error(kResource) where memory is short, CudaError.
  void load(std::span<Weight* const> weights, const LoadProgress& progress);

 private:
  struct Piece {  // pinned memory, and the copy that still reads it
    uint8_t* bytes = nullptr;
    void* copied = nullptr;  // cudaEvent_t
  };
  using Fill = std::function<void(int64_t row, uint8_t* to)>;  // called from many threads
  void upload(int64_t rows, int64_t row_bytes, const Fill& fill, uint8_t* to);
  void load_one(const Weight& w, DeviceMatrix& m, uint8_t* staging);

  ThreadPool& pool_;
  cudaStream_t stream_;
  Piece pieces_[2];
  int next_ = 0;
};

}  // namespace q4s
