// Both families on tiny vocabularies: round trips, special tokens, the prefix, the stored form and what it
// refuses.
#include "runtime/tokenizer.h"

#include <doctest/doctest.h>

#include <nlohmann/json.hpp>
#include <random>

#include "runtime/checksum.h"
#include "runtime/error.h"
#include "tests/runtime/test_files.h"
#include "tests/runtime/tiny_vocab.h"

using namespace q4s;
using namespace q4s::test;
using nlohmann::json;
using Ids = std::vector<int32_t>;

namespace {

template <class F>
void check_refused(F&& action, const std::string& words) {
  try {
    action();
    FAIL("accepted, expected: " << words);
  } catch (const Error& error) {
    CHECK(error.kind() == ErrorKind::kInput);
    CHECK_MESSAGE(std::string(error.what()).find(words) != std::string::npos, error.what());
  }
}

std::string texts_of(const Tokenizer& tokenizer, const Ids& ids) {  // tokens with bars between
  std::string out;
  for (int32_t id : ids) out += (out.empty() ? "" : "|") + tokenizer.token_bytes(id);
  return out;
}

// Bytes that make trouble: parts of characters, spaces, NUL, halves of special tokens.
std::string random_bytes(std::mt19937& random) {
  static const std::vector<std::string> kParts = {"hello", " ",    "  ",       "\n",     std::string(1, '\0'),
                                                  "\xC3",  "\xA9", "\xE2\x96", "\xFF",   "\xF0\x9F\x99\x82",
                                                  "<s>",   "</s",  "<|x|>",    "<0x41>", "\u00e9",
                                                  "12",    "w"};
  std::string text;
  const int length = static_cast<int>(random() % 12);
  for (int i = 0; i < length; ++i) {
    text +=
        random() % 3 ? kParts[random() % kParts.size()] : std::string(1, static_cast<char>(random() % 256));
  }
  return text;
}

// Written by hand rather than through serialize(): the body with a right checksum.
std::string sealed(std::string body) {
  const uint64_t sum = xxh3(body.data(), body.size());
  return body + raw(sum);
}

}  // namespace

TEST_CASE("any bytes come back, whole and one token at a time, special tokens parsed or not") {
  std::mt19937 random(3);
  for (const GgufVocab& vocab : {tiny_bpe({"<|x|>", "<s>"}), tiny_bpe({"<|x|>"}, "llama-bpe"),
                                 tiny_bpe({"<|x|>"}, "smollm"), tiny_spm({"<|x|>"})}) {
    const auto tokenizer = Tokenizer::from_gguf(vocab);
    for (int round = 0; round < 3000; ++round) {
      const std::string text = random_bytes(random);
      if (text.find("\u2581") != std::string::npos) continue;  // sentencepiece's own way to write a space
      CAPTURE(vocab.model);
      for (bool parse_special : {false, true}) {
        const Ids ids = tokenizer->encode(text, parse_special);
        CHECK(tokenizer->decode(ids, true) == text);
        TokenDecoder decoder(*tokenizer, false, true);
        std::string pieces;
        for (int32_t id : ids) pieces += decoder.next(id);
        CHECK(pieces == text);
        if (!parse_special) {
          CHECK(std::none_of(ids.begin(), ids.end(), [&](int32_t id) { return tokenizer->is_special(id); }));
        }
      }
    }
  }
}

TEST_CASE("byte-level BPE merges by rank, inside words") {
  const auto tokenizer = Tokenizer::from_gguf(tiny_bpe({"<|x|>"}));
  auto cut = [&](const std::string& text) { return texts_of(*tokenizer, tokenizer->encode(text, true)); };
  CHECK(cut("hello") == "hello");
  CHECK(cut("helllo") == "hell|l|o");  // leftmost of equal ranks first
  CHECK(cut("hhe w") == "h|he| w");
  CHECK(cut("   w") == "  | w");  // the last space belongs to the word
  CHECK(cut("1212") == "12|12");
  CHECK(cut("a<|x|>he") == "a|<|x|>|he");
  CHECK(tokenizer->encode("", true).empty());
  const auto digits = Tokenizer::from_gguf(tiny_bpe({}, "smollm"));
  CHECK(texts_of(*digits, digits->encode("1212", true)) == "1|2|1|2");
}

TEST_CASE("a word of a hundred thousand bytes is merged in reasonable time") {
  const auto tokenizer = Tokenizer::from_gguf(tiny_bpe({}));
  std::string text;
  for (int i = 0; i < 20000; ++i) text += "hello";
  CHECK(tokenizer->encode(text, false).size() == 20000);
}

TEST_CASE("bytes that the vocabulary lacks") {
  const auto tokenizer = Tokenizer::from_gguf(tiny_bpe({}, "gpt-2", std::string("\x01\xFE")));
  CHECK(tokenizer->decode(tokenizer->encode("a\x01z", false)) == "az");        // as others do
  CHECK(tokenizer->decode(tokenizer->encode("a\xFEz", false)) == "a\uFFFDz");  // no text: shown
}

TEST_CASE("sentencepiece: the leading space is added and taken off at every start, and only there") {
  const auto tokenizer = Tokenizer::from_gguf(tiny_spm());
  const Ids hello = tokenizer->encode("hello", false);
  CHECK(texts_of(*tokenizer, hello) == " hello");
  CHECK(texts_of(*tokenizer, tokenizer->encode(" hello", false)) == " | hello");
  CHECK(texts_of(*tokenizer, tokenizer->encode("<s>hello</s>hello", true)) == "<s>| hello|</s>| hello");
  CHECK(tokenizer->encode("", false).empty());
  CHECK(tokenizer->decode(hello) == "hello");
  TokenDecoder continued(*tokenizer, true);
  CHECK(continued.next(hello[0]) == " hello");
  CHECK(continued.next(tokenizer->special_id("</s>")) == "");
  CHECK(continued.next(hello[0]) == "hello");

  GgufVocab vocab = tiny_spm();
  vocab.add_space_prefix = false;
  const auto bare = Tokenizer::from_gguf(vocab);
  CHECK(texts_of(*bare, bare->encode("hello", false)) == "h|el|lo");
  CHECK(bare->decode(bare->encode(" hello", false)) == " hello");
}

TEST_CASE("BOS: once, where the model wants it") {
  const auto spm = Tokenizer::from_gguf(tiny_spm());
  CHECK(spm->encode_prompt("", true) == Ids{1});
  CHECK(spm->encode_prompt("<s>", true) == Ids{1});
  CHECK(spm->encode_prompt("<s><s>", true) == Ids{1, 1});  // the text asks for it
  CHECK(spm->encode_prompt("h", true)[0] == 1);
  CHECK(spm->encode("h", true)[0] != 1);
  GgufVocab vocab = tiny_bpe({"<|x|>"});
  vocab.bos = 0;
  CHECK(Tokenizer::from_gguf(vocab)->encode_prompt("", true).empty());
  vocab.add_bos = true;
  CHECK(Tokenizer::from_gguf(vocab)->encode_prompt("", true) == Ids{0});
  vocab.bos.reset();
  CHECK_FALSE(Tokenizer::from_gguf(vocab)->add_bos());
}

TEST_CASE("ends are the union of what the model names and what control tokens are called") {
  GgufVocab vocab = tiny_bpe({"<|a|>", "<|eot_id|>", "<|b|>", "<|im_end|>"});
  vocab.eos = 2;
  vocab.eot = 0;
  const auto tokenizer = Tokenizer::from_gguf(vocab);
  CHECK(tokenizer->eos_ids() == Ids{0, 1, 2, 3});
  CHECK(tokenizer->is_eos(3));
  CHECK_FALSE(tokenizer->is_eos(4));
  CHECK_FALSE(tokenizer->is_eos(-1));
}

TEST_CASE("overlapping special tokens: leftmost, then longest") {
  GgufVocab vocab = tiny_bpe({"<a", "<a><b>", "<a>"});
  vocab.types[2] = 4;  // user defined: found in every text
  const auto tokenizer = Tokenizer::from_gguf(vocab);
  CHECK(tokenizer->encode("<a><b>", true) == Ids{1});
  CHECK(tokenizer->encode("<a>", true) == Ids{2});
  CHECK(tokenizer->encode("<a>", false) == Ids{2});
  CHECK(texts_of(*tokenizer, tokenizer->encode("<a><b>", false)) == "<a>|<|b|>");
}

TEST_CASE("ids beyond the vocabulary decode to nothing") {
  const auto tokenizer = Tokenizer::from_gguf(tiny_spm());
  CHECK(tokenizer->decode(Ids{-1, 1 << 20, INT32_MAX}) == "");
  CHECK_FALSE(tokenizer->is_special(-1));
}

TEST_CASE("a folder with tokenizer.json gives the same tokenizer as the same vocabulary in a GGUF") {
  GgufVocab vocab = tiny_bpe({"<|x|>", "<|im_start|>", "<|im_end|>"}, "smollm");
  vocab.bos = 1, vocab.eos = 2, vocab.add_bos = false, vocab.chat_template = "{{ '<|im_start|>' }}";
  json document = {{"model", {{"type", "BPE"}, {"vocab", json::object()}, {"merges", json::array()}}},
                   {"pre_tokenizer",
                    {{"type", "Sequence"},
                     {"pretokenizers",
                      {{{"type", "Digits"}, {"individual_digits", true}},
                       {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}}}}},
                   {"normalizer", nullptr},
                   {"post_processor", {{"type", "ByteLevel"}}},
                   {"added_tokens", json::array()}};
  for (size_t id = 0; id < vocab.tokens.size(); ++id) {
    if (vocab.types[id] == 1)
      document["model"]["vocab"][vocab.tokens[id]] = id;
    else
      document["added_tokens"].push_back({{"id", id}, {"content", vocab.tokens[id]}, {"special", true}});
  }
  const TempFolder folder;
  const std::string path = folder / "tokenizer.json";
  const json config = {{"bos_token", {{"content", "<|im_start|>"}}},
                       {"eos_token", "<|im_end|>"},
                       {"chat_template", vocab.chat_template},
                       {"add_bos_token", nullptr}};
  write_file(folder / "tokenizer_config.json", config.dump());
  const std::string expected = Tokenizer::from_gguf(vocab)->serialize();
  for (bool pairs : {false, true}) {
    json merges = json::array();
    for (const std::string& merge : vocab.merges) {
      const size_t space = merge.find(' ');
      if (pairs)
        merges.push_back({merge.substr(0, space), merge.substr(space + 1)});
      else
        merges.push_back(merge);
    }
    document["model"]["merges"] = merges;
    write_file(path, document.dump());
    CHECK(Tokenizer::from_folder(folder.path())->serialize() == expected);
  }

  SUBCASE("BOS by the post-processor, ends by the other configs, the template from its own file") {
    document["post_processor"] = {{"type", "Sequence"},
                                  {"processors",
                                   {{{"type", "TemplateProcessing"},
                                     {"single",
                                      {{{"SpecialToken", {{"id", "<|x|>"}, {"type_id", 0}}}},
                                       {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}}}}}}};
    write_file(path, document.dump());
    write_file(folder / "config.json", R"({"eos_token_id": 5})");
    write_file(folder / "generation_config.json", R"({"eos_token_id": [6, 5]})");
    write_file(folder / "chat_template.jinja", "other");
    const auto tokenizer = Tokenizer::from_folder(folder.path());
    CHECK(tokenizer->encode_prompt("", true) == Ids{0});
    CHECK(tokenizer->eos_ids() == Ids{2, 5, 6});
    CHECK(tokenizer->chat_template() == "other");
  }
  SUBCASE("what is not supported is refused by name") {
    auto refused = [&](const char* where, json value, const std::string& words) {
      json other = document;
      other[json::json_pointer(where)] = std::move(value);
      write_file(path, other.dump());
      check_refused([&] { Tokenizer::from_folder(folder.path()); }, words);
    };
    refused("/model/type", "Unigram", "not byte-level BPE");
    refused("/pre_tokenizer", {{"type", "Metaspace"}}, "not byte-level BPE");
    refused("/pre_tokenizer/pretokenizers/0/type", "Whitespace", "\"Whitespace\"");
    refused("/pre_tokenizer/pretokenizers/1/add_prefix_space", true, "add_prefix_space");
    refused("/normalizer", {{"type", "Lowercase"}}, "\"Lowercase\"");
    refused("/model/merges/0", "lonely", "is no pair");
    refused("/model/merges/0", "q qq", "what is no token");
    refused("/model/vocab/h", 9999, "token ids are not 0 to");
    refused("/model/vocab/h", "x", "tokenizer files");
    refused("/model", json::array(), "tokenizer files");
    write_file(path, document.dump().substr(0, 200));
    check_refused([&] { Tokenizer::from_folder(folder.path()); }, "tokenizer.json");
    std::filesystem::remove(path);
    check_refused([&] { Tokenizer::from_folder(folder.path()); },
                  "neither tokenizer.model nor tokenizer.json");
    write_file(folder / "tokenizer.model", "no model");
    check_refused([&] { Tokenizer::from_folder(folder.path()); }, "sentencepiece model");
  }
}

TEST_CASE("GGUF vocabularies that cannot be used are refused with the reason") {
  auto refused = [](GgufVocab vocab, auto change, const std::string& words) {
    change(vocab);
    check_refused([&] { Tokenizer::from_gguf(vocab); }, words);
  };
  refused(
      tiny_bpe({}), [](GgufVocab& v) { v.pre = "qwen2"; }, "\"qwen2\"");
  refused(
      tiny_bpe({}), [](GgufVocab& v) { v.model = "t5"; }, "\"t5\"");
  refused(
      tiny_bpe({}), [](GgufVocab& v) { v.types.pop_back(); }, "types");
  refused(
      tiny_bpe({}), [](GgufVocab& v) { v.merges.push_back("x"); }, "is no pair");
  refused(
      tiny_bpe({}), [](GgufVocab& v) { v.merges.push_back("h h"); }, "makes no token");
  refused(
      tiny_bpe({}), [](GgufVocab& v) { v.bos = 100000; }, "BOS id 100000");
  refused(
      tiny_bpe({}), [](GgufVocab& v) { v.eos = -2; }, "end id -2");
  refused(
      tiny_bpe({}), [](GgufVocab& v) { v.tokens.clear(); }, "no tokens");
  refused(
      tiny_spm(), [](GgufVocab& v) { v.scores.clear(); }, "0 scores");
  refused(
      tiny_spm(), [](GgufVocab& v) { v.types[5] = 9; }, "type 9");
  refused(
      tiny_spm(), [](GgufVocab& v) { v.tokens[5] = "<0xZZ>"; }, "sentencepiece model");
  refused(
      tiny_spm(), [](GgufVocab& v) { v.tokens[300 - 40] = v.tokens[261]; }, "sentencepiece model");
  refused(
      tiny_spm(), [](GgufVocab& v) { v.types[0] = 1; }, "sentencepiece model");
}

TEST_CASE("the stored form: equal, and damage is always noticed") {
  for (GgufVocab vocab : {tiny_bpe({"<|x|>", "<|im_end|>"}, "smollm"), tiny_spm({"<|x|>"})}) {
    vocab.chat_template = "template \xFF";
    vocab.eos = 1;
    const auto tokenizer = Tokenizer::from_gguf(vocab);
    const std::string bytes = tokenizer->serialize();
    CHECK(Tokenizer::from_gguf(vocab)->serialize() == bytes);
    const auto copy = Tokenizer::parse(bytes);
    CHECK(copy->serialize() == bytes);
    CHECK(copy->chat_template() == vocab.chat_template);
    CHECK(copy->eos_ids() == tokenizer->eos_ids());
    CHECK(copy->add_bos() == tokenizer->add_bos());
    CHECK(copy->vocab_size() == tokenizer->vocab_size());
    const std::string text = "hello <|x|> h\xFF\u00e9";
    CHECK(copy->encode(text, true) == tokenizer->encode(text, true));

    for (size_t size = 0; size < bytes.size(); ++size) {
      CHECK_THROWS_AS(Tokenizer::parse(std::string_view(bytes).substr(0, size)), Error);
    }
    for (size_t at = 0; at < bytes.size(); ++at) {
      std::string damaged = bytes;
      damaged[at] ^= 0x10;
      CHECK_THROWS_AS(Tokenizer::parse(damaged), Error);
    }
    CHECK_THROWS_AS(Tokenizer::parse(bytes + "x"), Error);
  }
}

TEST_CASE("the stored form with a right checksum and wrong content: refused or usable, never a crash") {
  for (const GgufVocab& vocab : {tiny_bpe({"<|x|>"}), tiny_spm({"<|x|>"})}) {
    const std::string bytes = Tokenizer::from_gguf(vocab)->serialize();
    const std::string body = bytes.substr(0, bytes.size() - 8);
    for (size_t size = 0; size < body.size(); ++size) {
      check_refused([&] { Tokenizer::parse(sealed(body.substr(0, size))); }, "");
    }
    check_refused([&] { Tokenizer::parse(sealed(body + "x")); }, "goes on");
    for (size_t at = 0; at < body.size(); ++at) {
      for (char value : {'\x00', '\x7F', '\xFF'}) {
        std::string damaged = body;
        damaged[at] = value;
        try {
          const auto tokenizer = Tokenizer::parse(sealed(damaged));
          tokenizer->decode(tokenizer->encode("hello <|x|> \xFF 12", true), true);
        } catch (const Error&) {
        }
      }
    }
  }
}
