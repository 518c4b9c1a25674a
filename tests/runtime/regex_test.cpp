#include "runtime/regex.h"

#include <doctest/doctest.h>

#include <vector>

#include "runtime/error.h"

using namespace q4s;
using Pieces = std::vector<std::string>;

namespace {

Pieces split(const std::string& pattern, std::string_view text) {
  Pieces pieces;
  Regex(pattern).split(text, [&](std::string_view piece) { pieces.emplace_back(piece); });
  return pieces;
}

}  // namespace

TEST_CASE("split keeps matches and what lies between") {
  CHECK(split("[0-9]+", "ab12c345") == Pieces{"ab", "12", "c", "345"});
  CHECK(split("[0-9]+", "12") == Pieces{"12"});
  CHECK(split("[0-9]+", "x") == Pieces{"x"});
  CHECK(split("[0-9]+", "") == Pieces{});
}

TEST_CASE("empty matches cut nothing and end") {
  CHECK(split("x*", "\u00e9\u00e9xx\u00e9") == Pieces{"\u00e9\u00e9", "xx", "\u00e9"});
  CHECK(split("", "abc") == Pieces{"abc"});
  CHECK(split("$", "abc") == Pieces{"abc"});
}

TEST_CASE("classes are Unicode's, lookahead sees the rest of the text") {
  CHECK(split("\\p{N}", "a\u00b2\u2163b") == Pieces{"a", "\u00b2", "\u2163", "b"});
  CHECK(split("\\s+(?!\\S)|\\s+", "a\u3000\u3000b") == Pieces{"a", "\u3000", "\u3000", "b"});
  CHECK(split("(?i:'s)", "it'S") == Pieces{"it", "'S"});
}

TEST_CASE("a megabyte of one kind is matched in one go") {
  const std::string spaces(1 << 20, ' ');
  CHECK(split("\\s+(?!\\S)|\\s+", spaces + "x") == Pieces{spaces.substr(1), " ", "x"});
  const std::string letters(1 << 20, 'a');
  CHECK(split("(?:a|b)+", letters) == Pieces{letters});  // too deep for the compiled code's stack
}

TEST_CASE("search") {
  CHECK(Regex("layers\\.[0-9]+\\.").search("model.layers.12.mlp"));
  CHECK_FALSE(Regex("^layers").search("model.layers.12.mlp"));
}

TEST_CASE("a wrong pattern is named with the place of the mistake") {
  CHECK_THROWS_WITH_AS(Regex("a(b"), doctest::Contains("/a(b/, offset 3"), Error);
  CHECK_THROWS_WITH_AS(split("(a+)+$", std::string(40, 'a') + "b"), doctest::Contains("limit"), Error);
}
