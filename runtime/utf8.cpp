// See utf8.h.
#include "runtime/utf8.h"

#include <cstdint>

namespace q4s {

Utf8Unit utf8_unit(std::string_view text) {
  auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return {Utf8Unit::kCharacter, 1};
  const size_t size = lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
  if (size == 0) return {Utf8Unit::kInvalid, 1};
  for (size_t i = 1; i < size; ++i) {
    if (i == text.size()) return {Utf8Unit::kIncomplete, i};
    // The second byte's range excludes overlong forms, surrogates and what lies beyond U+10FFFF.
    const uint8_t low = i > 1 ? 0x80 : lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    const uint8_t high = i > 1 ? 0xBF : lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    if (byte(i) < low || byte(i) > high) return {Utf8Unit::kInvalid, i};
  }
  return {Utf8Unit::kCharacter, size};
}

std::string Utf8Stream::push(std::string_view bytes) {
  const std::string joined = held_ + std::string(bytes);
  held_.clear();
  std::string out;
  for (std::string_view rest = joined; !rest.empty();) {
    const Utf8Unit unit = utf8_unit(rest);
    if (unit.kind == Utf8Unit::kCharacter) out += rest.substr(0, unit.size);
    if (unit.kind == Utf8Unit::kInvalid) out += "\uFFFD";
    if (unit.kind == Utf8Unit::kIncomplete) held_ = rest;
    rest.remove_prefix(unit.size);
  }
  return out;
}

std::string Utf8Stream::flush() {
  const bool held = !held_.empty();
  held_.clear();
  return held ? "\uFFFD" : "";
}

}  // namespace q4s
