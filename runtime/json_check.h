// A first pass over JSON from outside, before a parser builds anything from it: syntax, UTF-8, depth, and
// duplicate keys, which the JSON library would drop silently.
#pragma once
#include <string>
#include <string_view>

namespace q4s {

// Throws Error(kInput), its text starting with `where` ("model.safetensors: header"), at the first fault.
void check_json(std::string_view text, const std::string& where);

}  // namespace q4s
