// Text to token ids and back, for the two families that LLaMA models use: sentencepiece and byte-level BPE.
// Made from a Hugging Face folder, from a GGUF vocabulary or from the bytes kept in a .q4s file; the same
// vocabulary gives the same ids whichever way it came. Knows no file formats but its own; models decide
// nothing here.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace q4s {

class Gguf;

// The tokenizer keys of a GGUF file, as found there.
struct GgufVocab {
  std::string model;                // tokenizer.ggml.model: "llama" or "gpt2"
  std::string pre;                  // tokenizer.ggml.pre: how byte-level BPE splits text
  std::vector<std::string> tokens;  // (vocab)
  std::vector<float> scores;        // (vocab), "llama" only
  std::vector<int32_t> types;       // (vocab) 1 normal 2 unknown 3 control 4 user defined 5 unused 6 byte
  std::vector<std::string> merges;  // "left right", best first, "gpt2" only
  std::optional<int32_t> bos, eos, unk, eot;
  std::optional<bool> add_bos, add_space_prefix;
  std::string chat_template;  // tokenizer.chat_template, empty: none
};
GgufVocab gguf_vocab(const Gguf& file);  // throws Error(kInput) on missing keys and wrong types

struct TokenizerSpec;  // what a tokenizer is made of and what a .q4s file keeps (tokenizer_spec.h)

// Immutable after construction and free of shared state: every const member may be called from several
// threads.
class Tokenizer {
 public:
  // All three throw Error(kInput), naming what is missing, corrupt or unsupported.
  static std::unique_ptr<Tokenizer> from_folder(const std::string& folder);  // a Hugging Face folder
  static std::unique_ptr<Tokenizer> from_gguf(const GgufVocab& vocab);
  static std::unique_ptr<Tokenizer> parse(std::string_view bytes);  // what serialize() wrote
  std::string serialize() const;  // self-contained, the same bytes for the same vocabulary

  virtual ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  int vocab_size() const;  // ids are 0 .. vocab_size()-1; a model may have padding rows beyond
  int32_t bos_id() const;  // -1: the model has none
  bool add_bos() const;    // the model wants BOS before a prompt
  const std::vector<int32_t>& eos_ids() const;  // union of all that the model's files call an end, ascending
  bool is_eos(int32_t id) const;
  bool is_special(int32_t id) const;                // a control token: never comes out of plain text
  int32_t special_id(std::string_view text) const;  // id of the special token spelled so, -1: none
  const std::string& chat_template() const;         // Jinja text as the model brought it, empty: none

  // Ids of a text, without BOS. parse_special: control tokens spelled out in the text become their ids; user
  // text must never be encoded so. Byte-exact: decode() gives the text back, invalid UTF-8 and NUL included,
  // but for two cases the formats cannot express: sentencepiece writes a space as U+2581, so that U+2581
  // itself comes back as a space, and a byte-level vocabulary may lack tokens for rare bytes (SmolLM2 lacks
  // 21): such a character is dropped, as every implementation does, and such an invalid byte becomes U+FFFD.
  // A model's NFC normalizer is left out for the same reason: text that is not composed stays as it is.
  std::vector<int32_t> encode(std::string_view text, bool parse_special) const;
  // encode(), with one BOS in front if the model adds it and the text has not brought its own.
  std::vector<int32_t> encode_prompt(std::string_view text, bool parse_special) const;

  // The bytes of one token, perhaps part of a character; the spelling of a special token; empty beyond the
  // vocabulary. sentencepiece puts a space before a text, which only TokenDecoder knows how to take off
  // again.
  const std::string& token_bytes(int32_t id) const;
  // The inverse of encode(). Special tokens are left out, or spelled out with keep_special.
  std::string decode(std::span<const int32_t> ids, bool keep_special = false) const;

 protected:
  // spec.tokens (bytes of each token) must be filled by the derived class's factory.
  explicit Tokenizer(TokenizerSpec spec);
  // Appends the ids of a stretch of valid UTF-8 without added tokens. at_start: the stretch opens the text or
  // follows an added token.
  virtual void encode_text(std::string_view text, bool at_start, std::vector<int32_t>& out) const = 0;
  // The id that stands for a byte alone, -1: the vocabulary has none.
  virtual int32_t byte_id(uint8_t byte) const = 0;
  const TokenizerSpec& spec() const { return *spec_; }

 private:
  struct Special {
    std::string text;
    int32_t id;
    bool control;  // found in a text only on request
  };
  void encode_fragment(std::string_view text, std::vector<int32_t>& out) const;
  const Special* match_special(std::string_view text, bool parse_special) const;

  std::unique_ptr<const TokenizerSpec> spec_;
  std::vector<Special> specials_;        // by first byte, then longest first
  std::vector<uint32_t> first_special_;  // (257): where a first byte's specials begin in specials_
  enum class Role : uint8_t { kText, kAdded, kControl };
  std::vector<Role> roles_;  // (vocab)
  friend class TokenDecoder;
};

// Decodes ids one at a time; the pieces put together are exactly decode()'s bytes.
class TokenDecoder {
 public:
  // continues: the first id follows other text (a generation after its prompt), so that its leading space is
  // text.
  TokenDecoder(const Tokenizer& tokenizer, bool continues, bool keep_special = false)
      : tokenizer_(tokenizer), at_start_(!continues), keep_special_(keep_special) {}
  std::string_view next(int32_t id);  // lives as long as the tokenizer

 private:
  const Tokenizer& tokenizer_;
  bool at_start_, keep_special_;
};

}  // namespace q4s
