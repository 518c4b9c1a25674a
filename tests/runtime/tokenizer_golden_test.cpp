// Token ids of real vocabularies against those of independent implementations, by every way a vocabulary
// comes in.
#include <doctest/doctest.h>
#include <stdio.h>

#include <array>
#include <iterator>
#include <nlohmann/json.hpp>
#include <sstream>

#include "runtime/gguf.h"
#include "runtime/tokenizer.h"
#include "tests/runtime/test_files.h"
#include "tests/shared_data.h"

using namespace q4s;
using namespace q4s::test;
using nlohmann::json;
using Ids = std::vector<int32_t>;

namespace {

std::string sha256(const Ids& ids) {
  const TempFolder folder;
  write_file(folder / "ids", raw(ids));
  FILE* pipe = popen(("sha256sum < " + (folder / "ids")).c_str(), "r");
  std::array<char, 65> digest{};
  REQUIRE(fread(digest.data(), 1, 64, pipe) == 64);
  pclose(pipe);
  return digest.data();
}

// The tokenizer and its copy by way of the bytes kept in a .q4s file.
std::vector<std::unique_ptr<Tokenizer>> with_copy(std::unique_ptr<Tokenizer> tokenizer) {
  std::vector<std::unique_ptr<Tokenizer>> both;
  const std::string bytes = tokenizer->serialize();
  both.push_back(std::move(tokenizer));
  both.push_back(Tokenizer::parse(bytes));
  CHECK(both[1]->serialize() == bytes);
  return both;
}

// llama.cpp's test files: texts between separators, one line of ids each. Returns how many.
int check_cases(const Tokenizer& tokenizer, const std::string& texts, const std::string& lines) {
  const std::string separator = "\n__ggml_vocab_test__\n";
  std::istringstream out(lines);
  int cases = 0;
  size_t begin = 0;
  for (std::string line; begin != std::string::npos && std::getline(out, line); ++cases) {
    const size_t end = texts.find(separator, begin);
    const std::string text = texts.substr(begin, end == std::string::npos ? end : end - begin);
    std::istringstream numbers(line);
    const Ids expected{std::istream_iterator<int32_t>(numbers), {}};
    CAPTURE(text);
    CHECK(tokenizer.encode(text, false) == expected);
    CHECK(tokenizer.decode(expected) == text);
    begin = end == std::string::npos ? end : end + separator.size();
  }
  return cases;
}

}  // namespace

TEST_CASE("SmolLM2 from its GGUF: ids of 20 strings and of a whole file") {
  const std::string gguf = smollm2_gguf(), golden = shared_data("smollm2/tokens.json"),
                    wiki = shared_data("text/wiki.test.raw");
  if (gguf.empty() || golden.empty() || wiki.empty()) return;
  const json expected = json::parse(read_file(golden));
  for (const auto& tokenizer : with_copy(Tokenizer::from_gguf(gguf_vocab(Gguf::open(gguf))))) {
    CHECK(tokenizer->vocab_size() == 49152);
    CHECK_FALSE(tokenizer->add_bos());
    CHECK(tokenizer->bos_id() == 1);
    CHECK(tokenizer->eos_ids() == Ids{0, 2});
    REQUIRE(expected["cases"].size() == 20);
    for (const json& test : expected["cases"]) {
      const std::string text = test["text"];
      CAPTURE(text);
      CHECK(tokenizer->encode_prompt(text, true) == test["ids"].get<Ids>());
      CHECK(tokenizer->decode(tokenizer->encode(text, true), true) == text);
    }
    const json& file = expected["files"]["text/wiki.test.raw"];
    const std::string text = read_file(wiki);
    const Ids ids = tokenizer->encode(text, false);
    CHECK(ids.size() == file["count"].get<size_t>());
    CHECK(sha256(ids) == file["sha256_of_int32_le"].get<std::string>());
    CHECK(tokenizer->decode(ids) == text);
  }
}

TEST_CASE("stories260K from its folder: ids with BOS") {
  const std::string golden = shared_data("stories260K/golden_tokens.json");
  if (golden.empty()) return;
  const json expected = json::parse(read_file(golden));
  for (const auto& tokenizer : with_copy(Tokenizer::from_folder(golden.substr(0, golden.rfind('/'))))) {
    CHECK(tokenizer->vocab_size() == 512);
    CHECK(tokenizer->add_bos());
    for (const json& test : expected["cases"]) {
      const std::string text = test["text"];
      CAPTURE(text);
      const Ids ids = tokenizer->encode_prompt(text, false);
      CHECK(ids == test["ids"].get<Ids>());
      CHECK(tokenizer->encode_prompt("<s>" + text, true) == ids);  // the text's own BOS is the only one
      CHECK(tokenizer->encode_prompt("<s>" + text, false).size() > ids.size());
      CHECK(tokenizer->decode(ids) == text);
    }
  }
}

TEST_CASE("LLaMA 2 from tokenizer.model and from the same vocabulary as GGUF keys") {
  const std::string model = shared_data("tokenizers/llama2-32k.model");
  if (model.empty()) return;
  const std::string stem = model.substr(0, model.size() - 6);
  const TempFolder folder;
  write_file(folder / "tokenizer.model", read_file(model));
  auto tokenizers = with_copy(Tokenizer::from_folder(folder.path()));

  GgufVocab vocab;  // what llama.cpp's converter would write
  vocab.model = "llama";
  vocab.bos = 1, vocab.eos = 2, vocab.unk = 0;
  for (int32_t id = 0; id < 32000; ++id) {
    std::string piece;
    const std::string& bytes = tokenizers[0]->token_bytes(id);
    for (char byte : bytes) piece += byte == ' ' ? "\u2581" : std::string(1, byte);
    const bool is_byte = id >= 3 && id < 259;
    if (is_byte) {
      char text[8];
      snprintf(text, sizeof text, "<0x%02X>", id - 3);
      piece = text;
    }
    vocab.tokens.push_back(piece);
    vocab.types.push_back(id == 0 ? 2 : id < 3 ? 3 : is_byte ? 6 : 1);
    // As in the model: merges rank by id, but runs of spaces come last of all.
    const bool spaces = bytes.find_first_not_of(' ') == std::string::npos;
    vocab.scores.push_back(id < 259 ? 0.0f : spaces ? -1e9f : static_cast<float>(259 - id));
  }
  for (auto& more : with_copy(Tokenizer::from_gguf(vocab))) tokenizers.push_back(std::move(more));

  // One unused piece that spans words forbids to cut text into words first: the ids must not change.
  vocab.tokens.push_back("q\u2581q");
  vocab.types.push_back(5);
  vocab.scores.push_back(0);
  tokenizers.push_back(Tokenizer::from_gguf(vocab));
  if (const std::string wiki = shared_data("text/wiki.test.raw"); !wiki.empty()) {
    const std::string text = read_file(wiki).substr(0, 200000);
    const Ids ids = tokenizers[0]->encode(text, false);
    for (const auto& tokenizer : tokenizers) CHECK(tokenizer->encode(text, false) == ids);
    CHECK(tokenizers[0]->decode(ids) == text);
  }

  for (const auto& tokenizer : tokenizers) {
    CHECK(check_cases(*tokenizer, read_file(stem + ".inp.txt"), read_file(stem + ".out.txt")) == 46);
    CHECK(tokenizer->eos_ids() == Ids{2});
  }
}

// Files models/ggml-vocab-*.gguf, .gguf.inp and .gguf.out of llama.cpp (MIT), not part of the data folder.
TEST_CASE("llama.cpp's vocabularies of LLaMA 2, Llama 3 and GPT-2") {
  const char* folder = std::getenv("Q4S_GGUF_VOCABS");
  if (folder == nullptr) {
    std::printf("SKIPPED: no llama.cpp vocabularies (set Q4S_GGUF_VOCABS to their folder)\n");
    return;
  }
  for (const char* name : {"llama-spm", "llama-bpe", "gpt-2"}) {
    const std::string path = std::string(folder) + "/ggml-vocab-" + name + ".gguf";
    for (const auto& tokenizer : with_copy(Tokenizer::from_gguf(gguf_vocab(Gguf::open(path))))) {
      CHECK(check_cases(*tokenizer, read_file(path + ".inp"), read_file(path + ".out")) == 46);
    }
  }
}
