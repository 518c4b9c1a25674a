#include "runtime/stop_strings.h"

#include <doctest/doctest.h>

#include "runtime/error.h"

using q4s::StopStrings;

TEST_CASE("however a text is cut, it ends before the stop string complete first") {
  const std::string text = "one two aab aaab three";
  for (const auto& [stops, expected] :
       std::vector<std::pair<std::vector<std::string>, std::string>>{{{}, text},
                                                                     {{"aaab"}, "one two aab "},
                                                                     {{"three", "aab"}, "one two "},
                                                                     {{"eel"}, text},
                                                                     {{"e"}, "on"},
                                                                     {{"three!"}, text},
                                                                     {{"one"}, ""},
                                                                     {{"aab a", "aab"}, "one two "},
                                                                     {{"o aab", "aab"}, "one tw"},
                                                                     {{"ne tw", "e"}, "on"}}) {
    for (size_t piece = 1; piece <= text.size(); ++piece) {
      StopStrings stop(stops);
      std::string got;
      for (size_t at = 0; at < text.size(); at += piece)
        got += stop.push(std::string_view(text).substr(at, piece));
      got += stop.flush();
      CHECK(got == expected);
      CHECK(stop.hit() == (expected != text));
    }
  }
}

TEST_CASE("only what may begin a stop string is held back") {
  StopStrings stop({"END", "EXIT"});
  CHECK(stop.push("abcE") == "abc");
  CHECK(stop.push("N") == "");
  CHECK(stop.push("x") == "ENx");
  CHECK(stop.push("E") == "");
  CHECK(stop.flush() == "E");
  CHECK_THROWS_AS(StopStrings({"a", ""}), q4s::Error);
}
