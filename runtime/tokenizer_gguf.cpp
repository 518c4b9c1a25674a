// A tokenizer's parts from the vocabulary of a GGUF file (keys tokenizer.ggml.*, named by llama.cpp's
// converter).
#include <array>

#include "runtime/error.h"
#include "runtime/gguf.h"
#include "runtime/tokenizer_spec.h"

namespace q4s {
namespace {

[[noreturn]] void fail(const std::string& what) {
  throw Error(ErrorKind::kInput, "GGUF vocabulary: " + what);
}

constexpr int32_t kControlType = 3, kUserDefinedType = 4;

// A pre-tokenizer by its GGUF name.
struct Pre {
  std::string_view name;
  std::vector<std::string> splits;
  bool ignore_merges, add_bos;
};
const Pre& pre_by_name(const std::string& name) {
  static const std::string kLlama3Split =  // as in the tokenizer.json of Llama 3
      R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*)"
      R"(|\s*[\r\n]+|\s+(?!\S)|\s+)";
  static const std::array<Pre, 3> kKnown = {Pre{"smollm", {kDigitSplit, kGpt2Split}, false, false},
                                            Pre{"llama-bpe", {kLlama3Split}, true, true},
                                            Pre{"gpt-2", {kGpt2Split}, false, false}};
  for (const Pre& pre : kKnown) {
    if (pre.name == name || (pre.name == "gpt-2" && name == "default")) return pre;
  }
  fail("pre-tokenizer \"" + name + "\" is not supported (supported: smollm, llama-bpe, gpt-2)");
}

void describe_gpt2(TokenizerSpec& spec, const GgufVocab& vocab) {
  if (!vocab.types.empty() && vocab.types.size() != vocab.tokens.size()) {
    fail(std::to_string(vocab.tokens.size()) + " tokens, but " + std::to_string(vocab.types.size()) +
         " types");
  }
  const Pre& pre = pre_by_name(vocab.pre);
  spec.splits = pre.splits;
  spec.ignore_merges = pre.ignore_merges;
  spec.add_bos = vocab.add_bos.value_or(pre.add_bos);
  std::vector<bool> literal(vocab.tokens.size(), false);
  for (size_t id = 0; id < vocab.types.size(); ++id) {
    const bool control = vocab.types[id] == kControlType;
    if (!control && vocab.types[id] != kUserDefinedType) continue;
    literal[id] = true;
    spec.added.push_back({static_cast<int32_t>(id), vocab.tokens[id], control});
  }
  std::vector<std::pair<std::string, std::string>> merges;
  for (const std::string& merge : vocab.merges) {
    const size_t space = merge.find(' ', 1);
    if (space == std::string::npos) fail("merge \"" + merge + "\" is no pair");
    merges.emplace_back(merge.substr(0, space), merge.substr(space + 1));
  }
  describe_bpe(spec, vocab.tokens, literal, merges);
}

}  // namespace

GgufVocab gguf_vocab(const Gguf& file) {
  const std::string prefix = "tokenizer.ggml.";
  auto id = [&](const char* name) -> std::optional<int32_t> {
    const auto value = file.integer(prefix + name);
    if (!value || *value > INT32_MAX) return std::nullopt;  // written as -1: the model has none
    return static_cast<int32_t>(*value);
  };
  GgufVocab vocab;
  vocab.model = file.text(prefix + "model").value_or("");
  vocab.pre = file.text(prefix + "pre").value_or("default");
  const auto tokens = file.texts(prefix + "tokens");
  if (vocab.model.empty() || !tokens) fail(file.path() + " has no tokenizer.ggml.model and .tokens");
  vocab.tokens.assign(tokens->begin(), tokens->end());
  if (auto scores = file.floats(prefix + "scores")) vocab.scores = std::move(*scores);
  if (const auto types = file.integers(prefix + "token_type"))
    vocab.types.assign(types->begin(), types->end());
  if (const auto merges = file.texts(prefix + "merges")) vocab.merges.assign(merges->begin(), merges->end());
  vocab.bos = id("bos_token_id");
  vocab.eos = id("eos_token_id");
  vocab.unk = id("unknown_token_id");
  vocab.eot = id("eot_token_id");
  vocab.add_bos = file.boolean(prefix + "add_bos_token");
  vocab.add_space_prefix = file.boolean(prefix + "add_space_prefix");
  vocab.chat_template = file.text("tokenizer.chat_template").value_or("");
  return vocab;
}

TokenizerSpec spec_from_gguf(const GgufVocab& vocab) {
  TokenizerSpec spec;
  if (vocab.tokens.empty()) fail("no tokens");
  if (vocab.model == "llama") {
    spec.sentencepiece = write_sentencepiece(vocab);
    describe_sentencepiece(spec);
    spec.bos = vocab.bos.value_or(1);  // what llama.cpp takes for granted in this family
    spec.eos = {vocab.eos.value_or(2)};
    spec.add_bos = vocab.add_bos.value_or(true);
  } else if (vocab.model == "gpt2") {
    describe_gpt2(spec, vocab);
    spec.bos = vocab.bos.value_or(-1);
    if (vocab.eos) spec.eos = {*vocab.eos};
  } else {
    fail("tokenizer.ggml.model \"" + vocab.model + "\" is not supported (supported: llama, gpt2)");
  }
  if (vocab.eot) spec.eos.push_back(*vocab.eot);
  spec.chat_template = vocab.chat_template;
  add_known_ends(spec);
  return spec;
}

}  // namespace q4s
