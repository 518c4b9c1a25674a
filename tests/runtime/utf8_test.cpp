#include "runtime/utf8.h"

#include <doctest/doctest.h>

#include <random>

using namespace q4s;
using namespace std::string_literals;

namespace {

std::string stream(std::string_view bytes, const std::vector<size_t>& cuts) {
  Utf8Stream decoder;
  std::string out;
  size_t begin = 0;
  for (size_t cut : cuts) {
    out += decoder.push(bytes.substr(begin, cut - begin));
    begin = cut;
  }
  out += decoder.push(bytes.substr(begin));
  out += decoder.flush();
  return out;
}

bool is_valid(std::string_view text) {
  while (!text.empty()) {
    const Utf8Unit unit = utf8_unit(text);
    if (unit.kind != Utf8Unit::kCharacter) return false;
    text.remove_prefix(unit.size);
  }
  return true;
}

}  // namespace

TEST_CASE("valid text passes unchanged, cut anywhere") {
  const std::string text = "a\u00e9\u20ac\U0001F642\u0000z\U0010FFFF\uD7FF\uE000"s;
  for (size_t i = 0; i <= text.size(); ++i) {
    for (size_t j = i; j <= text.size(); ++j) CHECK(stream(text, {i, j}) == text);
  }
}

TEST_CASE("a character is held until it is complete, and nothing else is") {
  Utf8Stream decoder;
  CHECK(decoder.push("a\xF0\x9F") == "a");
  CHECK(decoder.push("\x99") == "");
  CHECK(decoder.push("\x82z") == "\U0001F642z");
  CHECK(decoder.flush() == "");
  CHECK(decoder.push("\xE2\x82") == "");
  CHECK(decoder.flush() == "\uFFFD");
  CHECK(decoder.flush() == "");
}

TEST_CASE("each invalid unit becomes one U+FFFD") {
  const std::pair<std::string, std::string> cases[] = {
      {"\x80", "\uFFFD"},                                // a continuation alone
      {"a\xC3z", "a\uFFFDz"},                            // cut short by another character
      {"\xE2\x82z", "\uFFFDz"},                          // the two bytes are one unit
      {"\xF0\x9F\x99\xE2\x82\xAC", "\uFFFD\u20ac"},      // cut short by a good one
      {"\xC0\xAF", "\uFFFD\uFFFD"},                      // overlong: neither byte can begin anything
      {"\xE0\x80\x80", "\uFFFD\uFFFD\uFFFD"},            // overlong
      {"\xED\xA0\x80", "\uFFFD\uFFFD\uFFFD"},            // a surrogate
      {"\xF4\x90\x80\x80", "\uFFFD\uFFFD\uFFFD\uFFFD"},  // beyond U+10FFFF
      {"\xFF\xFE", "\uFFFD\uFFFD"},
  };
  for (const auto& [bytes, text] : cases) {
    for (size_t cut = 0; cut <= bytes.size(); ++cut) CHECK(stream(bytes, {cut}) == text);
  }
}

TEST_CASE("random bytes: valid output, independent of the cuts") {
  std::mt19937 random(1);
  const std::string alphabet = "az\x80\x82\x99\x9F\xA0\xBF\xC2\xC3\xE0\xE2\xED\xF0\xF4\xF5\xFF";
  for (int round = 0; round < 2000; ++round) {
    std::string bytes;
    for (int i = 0; i < 12; ++i) bytes += alphabet[random() % alphabet.size()];
    const std::string whole = stream(bytes, {});
    CHECK(is_valid(whole));
    std::vector<size_t> cuts;
    for (size_t i = 1; i < bytes.size(); ++i) {
      if (random() % 2) cuts.push_back(i);
    }
    CHECK(stream(bytes, cuts) == whole);
  }
}
