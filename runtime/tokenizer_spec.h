// The parts a tokenizer is built from, between the loaders (folder, GGUF, .q4s bytes) and the two
// implementations. Internal to runtime's tokenizer files.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "runtime/tokenizer.h"

namespace q4s {

struct AddedToken {
  int32_t id;
  std::string text;
  bool control;  // found in a text only where special tokens are parsed
};

struct TokenizerSpec {
  enum class Kind : uint8_t { kSentencePiece = 1, kByteBpe = 2 };
  Kind kind = Kind::kSentencePiece;
  int32_t bos = -1;
  bool add_bos = false;
  std::vector<int32_t> eos;       // ascending
  std::vector<AddedToken> added;  // taken out of a text before the rest is encoded
  std::string chat_template;
  std::vector<std::string> tokens;  // (vocab) bytes of each token; kept in the file for byte-level BPE only

  std::string sentencepiece;  // kSentencePiece: a serialised ModelProto
  bool space_prefix = false;  // kSentencePiece: a text begins with one more space

  std::vector<std::pair<int32_t, int32_t>> merges;  // kByteBpe: ids of left and right, best first
  std::vector<std::string> splits;  // kByteBpe: regexes, each cutting the pieces of the one before
  bool ignore_merges = false;       // kByteBpe: a word that is a token needs no merging
};

std::string write_spec(const TokenizerSpec& spec);
TokenizerSpec read_spec(std::string_view bytes);  // throws Error(kInput)

TokenizerSpec spec_from_folder(const std::string& folder);
TokenizerSpec spec_from_gguf(const GgufVocab& vocab);

// sentencepiece's side (tokenizer_spm.cpp): the model proto written by hand from a GGUF vocabulary, and the
// parts of a proto that the spec holds besides: added control tokens, BOS, EOS, the prefix.
std::string write_sentencepiece(const GgufVocab& vocab);
void describe_sentencepiece(TokenizerSpec& spec);

// Byte-level BPE's side (tokenizer_bpe.cpp): token and merge spellings in GPT-2's alphabet of visible
// characters become bytes and ids. spellings: (vocab), literal where `literal` says so.
void describe_bpe(TokenizerSpec& spec, const std::vector<std::string>& spellings,
                  const std::vector<bool>& literal,
                  const std::vector<std::pair<std::string, std::string>>& merges);
extern const char* const kGpt2Split;
extern const char* const kDigitSplit;

std::unique_ptr<Tokenizer> make_sentencepiece(TokenizerSpec spec);
std::unique_ptr<Tokenizer> make_bpe(TokenizerSpec spec);

// The words of one text and where in the output their ids lie: text repeats its words, and a copy is cheaper
// than a merge. Lives for one call; words are views into the text.
class WordCache {
 public:
  // Appends the ids of word: copied from where it was met before, else by encode().
  template <class Encode>
  void append(std::string_view word, std::vector<int32_t>& out, const Encode& encode) {
    const auto [place, is_new] = seen_.try_emplace(word, out.size(), 0);
    if (is_new) {
      encode();
      place->second.second = out.size() - place->second.first;
      return;
    }
    const auto [begin, count] = place->second;
    for (size_t i = begin; i < begin + count; ++i) out.push_back(out[i]);
  }

 private:
  std::unordered_map<std::string_view, std::pair<size_t, size_t>> seen_;  // begin, count
};

// Ids of control tokens whose name says that a text ends there, joined to spec.eos, which is then sorted.
void add_known_ends(TokenizerSpec& spec);

}  // namespace q4s
