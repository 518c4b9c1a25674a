#include "runtime/weights_cuda.h"

#include <cuda_runtime_api.h>

#include <cassert>
#include <cstring>

#include "kernels/cuda_check.h"
#include "kernels/half.h"
#include "kernels/linear.h"
#include "kernels/random_weight.h"
#include "runtime/error.h"
#include "runtime/plan.h"

namespace q4s {
namespace {

constexpr int64_t kPiece = int64_t(32) << 20;

size_t aligned(int64_t bytes) { return size_t(round_up(bytes, int64_t(kArenaAlign))); }

bool gguf(Format f) { return f == Format::kGgufQ8_0 || f == Format::kGgufQ4_0 || f == Format::kGgufQ4_1; }

int64_t data_bytes(const DeviceMatrix& m) {
  return m.tiled ? m.tiles.layout.code_bytes() : m.view.n * row_bytes(m.view.format, m.view.k);
}
int64_t scale_bytes(const DeviceMatrix& m) { return m.tiled ? m.tiles.layout.scale_bytes() : 0; }

// What is packed into tiles passes through the file's order on the device.
size_t plain_bytes(const WeightView& v) { return aligned(v.n * row_bytes(v.format, v.k)); }
size_t staging_bytes(const DeviceMatrix& m) {
  return m.tiled ? plain_bytes(m.view) + (m.view.group ? aligned(m.view.n * m.view.groups() * 2) : 0) : 0;
}

struct Freed {
  void operator()(void* p) const { (void)cudaFree(p); }
};

}  // namespace

DeviceMatrix device_matrix_of(const Weight& w) {
  DeviceMatrix m;
  m.view = {.format = gguf(w.view.format) ? Format::kF16 : w.view.format,
            .grid = w.view.grid,
            .n = w.view.n,
            .k = w.view.k,
            .group = w.view.group};
  m.tiled = m.view.format == Format::kQ4 || m.view.format == Format::kQ8 ||
            (m.view.format == Format::kF16 && w.head);
  if (!m.tiled) return m;
  Q4Layout& l = m.tiles.layout;
  l.n = m.view.n;
  l.k = m.view.k;
  l.group = m.view.group;
  l.bits = m.view.format == Format::kQ4 ? 4 : m.view.format == Format::kQ8 ? 8 : 16;
  m.tiles.grid = m.view.grid;
  const RowRoles& r = w.roles;
  if (r.kind == RowRoles::Kind::kGateUp) l.map = RowMap::kPairHalves;
  if (r.kind == RowRoles::Kind::kQkv && r.head_dim % 16 == 0) {
    l.map = RowMap::kRope;
    l.head_dim = r.head_dim;
    l.rotated = (r.heads + r.kv_heads) * r.head_dim;
  }
  return m;
}

size_t device_bytes(const DeviceMatrix& m) { return aligned(data_bytes(m)) + aligned(scale_bytes(m)); }

void* cuda_take(size_t bytes, const std::string& purpose) {
  void* p = nullptr;
  if (const cudaError_t e = cudaMalloc(&p, std::max<size_t>(bytes, 1)); e != cudaSuccess) {
    (void)cudaGetLastError();
    size_t free = 0, total = 0;
    (void)cudaMemGetInfo(&free, &total);
    if (e != cudaErrorMemoryAllocation) throw CudaError(e, "memory for " + purpose);
    throw Error(ErrorKind::kResource, "out of GPU memory: " + std::to_string(bytes >> 20) + " MiB for " +
                                          purpose + ", " + std::to_string(free >> 20) + " of " +
                                          std::to_string(total >> 20) + " MiB are free");
  }
  return p;
}

CudaLoader::~CudaLoader() {
  for (Piece& p : pieces_) {
    if (p.copied) (void)cudaEventDestroy(static_cast<cudaEvent_t>(p.copied));
    if (p.bytes) (void)cudaFreeHost(p.bytes);
  }
}

void CudaLoader::upload(int64_t rows, int64_t row_bytes, const Fill& fill, uint8_t* to) {
  if (!pieces_[0].bytes)
    for (Piece& p : pieces_) {
      cudaEvent_t event;
      cuda_check(cudaMallocHost(reinterpret_cast<void**>(&p.bytes), size_t(kPiece)),
                 "pinned memory for loading");
      cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "event");
      p.copied = event;
    }
  const int64_t step = kPiece / row_bytes;
  if (step == 0)
    throw Error(ErrorKind::kInput, "a row of " + std::to_string(row_bytes) + " bytes is too long");
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t count = std::min(step, rows - begin);
    Piece& p = pieces_[next_];
    next_ ^= 1;
    cuda_check(cudaEventSynchronize(static_cast<cudaEvent_t>(p.copied)), "loading weights");
    pool_.parallel_for(count, std::max<int64_t>(1, (1 << 18) / row_bytes), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) fill(begin + i, p.bytes + i * row_bytes);
    });
    cuda_check(cudaMemcpyAsync(to + begin * row_bytes, p.bytes, size_t(count * row_bytes),
                               cudaMemcpyHostToDevice, stream_),
               "loading weights");
    cuda_check(cudaEventRecord(static_cast<cudaEvent_t>(p.copied), stream_), "loading weights");
  }
}

void CudaLoader::load_one(const Weight& w, DeviceMatrix& m, uint8_t* staging) {
  const WeightView& v = w.view;
  // Where the file's order goes: into the staging memory if it is packed afterwards, else in place.
  uint8_t* plain = m.tiled ? staging : const_cast<uint8_t*>(m.view.data);
  uint16_t* scales = reinterpret_cast<uint16_t*>(staging + plain_bytes(m.view));
  if (w.random) {
    random_weight_cuda(*w.random, v, plain, scales, stream_);
  } else if (gguf(v.format)) {
    upload(
        v.n, 2 * v.k,
        [&](int64_t i, uint8_t* to) {
          thread_local std::vector<float> row;
          row.resize(size_t(v.k));
          dequantize_rows(v, i, i + 1, row.data());
          for (int64_t j = 0; j < v.k; ++j) {
            const uint16_t h = float_to_half(row[size_t(j)]);
            std::memcpy(to + 2 * j, &h, 2);
          }
        },
        plain);
  } else {
    const int64_t bytes = row_bytes(v.format, v.k);
    upload(
        v.n, bytes, [&](int64_t i, uint8_t* to) { std::memcpy(to, v.row(i), size_t(bytes)); }, plain);
    if (v.group) {
      const int64_t groups = v.groups();
      upload(
          v.n, 2 * groups,
          [&](int64_t i, uint8_t* to) { std::memcpy(to, v.scales + i * groups, size_t(2 * groups)); },
          reinterpret_cast<uint8_t*>(scales));
    }
  }
  if (m.tiled)
    q4_pack_cuda(m.tiles.layout, {plain, scales}, const_cast<uint8_t*>(m.tiles.codes),
                 const_cast<uint16_t*>(m.tiles.scales), stream_);
}

void CudaLoader::load(std::span<Weight* const> all, const LoadProgress& progress) {
  std::vector<Weight*> weights;
  std::copy_if(all.begin(), all.end(), std::back_inserter(weights),
               [](const Weight* w) { return !w->device; });
  if (weights.empty()) return;
  size_t total = 0, staging_total = 0, source = 0;
  std::vector<std::unique_ptr<CudaWeight>> loaded;
  for (const Weight* w : weights) {
    loaded.push_back(std::make_unique<CudaWeight>());
    loaded.back()->matrix = device_matrix_of(*w);
    total += device_bytes(loaded.back()->matrix);
    staging_total = std::max(staging_total, staging_bytes(loaded.back()->matrix));
    source += size_t(w->read_bytes());
  }
  const std::shared_ptr<void> memory(cuda_take(total, "the weights"), Freed{});
  const std::unique_ptr<void, Freed> staging(
      staging_total ? cuda_take(staging_total, "loading packed weights") : nullptr);
  uint8_t* at = static_cast<uint8_t*>(memory.get());
  size_t done = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    DeviceMatrix& m = loaded[i]->matrix;
    if (m.tiled) {
      m.tiles.codes = at;
      m.tiles.scales = reinterpret_cast<uint16_t*>(at + aligned(data_bytes(m)));
    } else {
      m.view.data = at;
    }
    at += device_bytes(m);
    load_one(*weights[i], m, static_cast<uint8_t*>(staging.get()));
    loaded[i]->memory = memory;
    done += size_t(weights[i]->read_bytes());
    if (progress) progress(done, source);
  }
  cuda_check(cudaStreamSynchronize(stream_), "loading weights");
  for (size_t i = 0; i < weights.size(); ++i) weights[i]->device = std::move(loaded[i]);
}

}  // namespace q4s
