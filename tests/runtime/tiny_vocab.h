// Vocabularies of a few hundred tokens, made in place, for tests that need no particular model.
#pragma once
#include <cstdio>
#include <string>
#include <vector>

#include "runtime/tokenizer.h"

namespace q4s::test {

// GPT-2's spelling of one byte, by another rule than the product's table: visible Latin-1 characters stand
// for themselves, the rest are counted up from U+0100.
inline std::string gpt2_spelling(int byte) {
  auto visible = [](int b) { return (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE; };
  int code = byte;
  if (!visible(byte)) {
    code = 0x100;
    for (int b = 0; b < byte; ++b) code += !visible(b);
  }
  if (code < 0x80) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 0x3F))};
}

inline std::string gpt2_spelling(const std::string& bytes) {
  std::string spelling;
  for (char byte : bytes) spelling += gpt2_spelling(static_cast<uint8_t>(byte));
  return spelling;
}

// All bytes but those in `without`, a few merges, and control tokens first.
inline GgufVocab tiny_bpe(const std::vector<std::string>& special, const std::string& pre = "gpt-2",
                          const std::string& without = "") {
  GgufVocab vocab;
  vocab.model = "gpt2";
  vocab.pre = pre;
  for (const std::string& text : special) {
    vocab.tokens.push_back(text);
    vocab.types.push_back(3);
  }
  auto add = [&](const std::string& spelling) {
    vocab.tokens.push_back(spelling);
    vocab.types.push_back(1);
  };
  for (int byte = 0; byte < 256; ++byte) {
    if (without.find(static_cast<char>(byte)) == std::string::npos) add(gpt2_spelling(byte));
  }
  for (const auto& [left, right] : std::vector<std::pair<std::string, std::string>>{{"h", "e"},
                                                                                    {"l", "l"},
                                                                                    {"he", "ll"},
                                                                                    {"hell", "o"},
                                                                                    {" ", "w"},
                                                                                    {" ", " "},
                                                                                    {"\xC3", "\xA9"},
                                                                                    {"1", "2"}}) {
    vocab.merges.push_back(gpt2_spelling(left) + " " + gpt2_spelling(right));
    add(gpt2_spelling(left + right));
  }
  return vocab;
}

// <unk>, <s>, </s>, all bytes, some pieces; `more` control tokens at the end.
inline GgufVocab tiny_spm(const std::vector<std::string>& more = {}) {
  GgufVocab vocab;
  vocab.model = "llama";
  auto add = [&](const std::string& text, float score, int32_t type) {
    vocab.tokens.push_back(text);
    vocab.scores.push_back(score);
    vocab.types.push_back(type);
  };
  add("<unk>", 0, 2), add("<s>", 0, 3), add("</s>", 0, 3);
  for (int byte = 0; byte < 256; ++byte) {
    char text[8];
    std::snprintf(text, sizeof text, "<0x%02X>", byte);
    add(text, 0, 6);
  }
  float score = 0;
  for (const char* piece : {"\u2581h", "el", "lo", "\u2581hel", "\u2581hello", "\u2581\u2581", "h", "e", "l",
                            "o", "\u2581", "a", "b", "\u00e9"}) {
    add(piece, --score, 1);
  }
  for (const std::string& text : more) add(text, 0, 3);
  return vocab;
}

}  // namespace q4s::test
