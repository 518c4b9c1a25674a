#include "quant/grid.h"

#include <cassert>

#include "runtime/error.h"

namespace q4s {
namespace {
constexpr const char* kNames[] = {"asym", "sym7", "sym8", "half", "signed", "int8"};
}

Levels grid_levels(GridKind kind) {
  switch (kind) {
    case GridKind::kSym7: return {0.0f, -7, 7, 8, 7.0f, false};
    case GridKind::kSym8: return {0.0f, -8, 7, 8, 7.5f, false};
    case GridKind::kHalf: return {0.5f, -8, 7, 8, 7.5f, false};
    case GridKind::kSigned: return {0.0f, -8, 7, 8, 8.0f, true};
    case GridKind::kInt8: return {0.0f, -127, 127, 128, 127.0f, false};
    case GridKind::kAsym: break;
  }
  assert(!"the asymmetric grid has no scale-only levels");
  return {};
}

int grid_bits(GridKind kind) { return kind == GridKind::kInt8 ? 8 : 4; }

const char* grid_name(GridKind kind) { return kNames[int(kind)]; }

GridKind parse_grid(const std::string& name) {
  for (int i = 0; i < 5; ++i)
    if (name == kNames[i]) return GridKind(i);
  throw Error(ErrorKind::kUsage, "unknown grid '" + name + "': expected signed, sym7, sym8, half or asym");
}

}  // namespace q4s
