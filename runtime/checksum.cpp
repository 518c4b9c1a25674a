#include "runtime/checksum.h"

#include <xxhash.h>

#include <new>

namespace q4s {

uint64_t xxh3(const void* data, size_t bytes) { return XXH3_64bits(data, bytes); }

std::string checksum_text(uint64_t sum) {
  std::string text(16, '0');
  for (int i = 15; i >= 0; --i, sum >>= 4) text[size_t(i)] = "0123456789abcdef"[sum & 15];
  return text;
}

struct Checksum::State {
  XXH3_state_t* xxh = XXH3_createState();  // XXH3 wants 64-byte alignment, which createState sees to
  ~State() { XXH3_freeState(xxh); }
};

Checksum::Checksum() : state_(std::make_unique<State>()) {
  if (!state_->xxh) throw std::bad_alloc();
  XXH3_64bits_reset(state_->xxh);
}
Checksum::~Checksum() = default;

void Checksum::update(const void* data, size_t bytes) { XXH3_64bits_update(state_->xxh, data, bytes); }
uint64_t Checksum::value() const { return XXH3_64bits_digest(state_->xxh); }

}  // namespace q4s
