// UTF-8 for streaming: which bytes of a text form valid characters, and a decoder for output that arrives in
// pieces. Knows nothing of tokens.
#pragma once
#include <cstddef>
#include <string>
#include <string_view>

namespace q4s {

// What stands at the beginning of a non-empty text (Unicode 15, table 3-7).
struct Utf8Unit {
  enum Kind { kCharacter, kInvalid, kIncomplete } kind;
  size_t size;  // bytes: of the character; of the invalid unit (the longest prefix of a character, at least
                // 1); of the whole text if that may still become a character
};
Utf8Unit utf8_unit(std::string_view text);

// Bytes in, valid UTF-8 out: characters cut by a token boundary are held until they are complete, each
// invalid unit becomes one U+FFFD. The output does not depend on where the input was cut.
class Utf8Stream {
 public:
  std::string push(std::string_view bytes);
  std::string flush();  // end of input: what is still held becomes one U+FFFD

 private:
  std::string held_;  // < 4 bytes
};

}  // namespace q4s
