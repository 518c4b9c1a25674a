// Tensor maps for TMA, encoded on the host. The driver's function is looked up at run time: no link to
// libcuda.
#pragma once
#include <cuda.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels/cuda_check.h"

namespace q4s {

inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto function = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found;
    cuda_check(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found),
        "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(f);
  }();
  return function;
}

// `planes` matrices of `rows` rows of `width` elements; rows and planes are pitch and plane_pitch bytes apart
// (multiples of 16). Boxes of box_width x box_rows of box_planes planes. Beyond an edge a box reads zero.
struct TensorMapShape {
  CUtensorMapDataType type;
  const void* data;
  int64_t width, rows, pitch;
  int box_width, box_rows;
  CUtensorMapSwizzle swizzle;
  int64_t planes = 0, plane_pitch = 0;  // 0: a matrix, addressed by two coordinates
  int box_planes = 1;
};
inline CUtensorMap tensor_map(const TensorMapShape& s) {
  CUtensorMap map;
  const cuuint64_t size[3] = {cuuint64_t(s.width), cuuint64_t(s.rows), cuuint64_t(s.planes)};
  const cuuint64_t pitch[2] = {cuuint64_t(s.pitch), cuuint64_t(s.plane_pitch)};
  const cuuint32_t box[3] = {cuuint32_t(s.box_width), cuuint32_t(s.box_rows), cuuint32_t(s.box_planes)},
                   step[3] = {1, 1, 1};
  const CUresult r =
      tensor_map_encoder()(&map, s.type, s.planes ? 3 : 2, const_cast<void*>(s.data), size, pitch, box, step,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, s.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (r != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(int(r)));
  return map;
}

}  // namespace q4s
