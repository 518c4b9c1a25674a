// What both kinds of tokenizer share: added tokens are cut out of a text, invalid UTF-8 is encoded byte by
// byte, and ids are turned back into bytes.
#include "runtime/tokenizer.h"

#include <algorithm>

#include "runtime/error.h"
#include "runtime/tokenizer_spec.h"
#include "runtime/utf8.h"

namespace q4s {
namespace {

std::unique_ptr<Tokenizer> make_tokenizer(TokenizerSpec spec) {
  return spec.kind == TokenizerSpec::Kind::kSentencePiece ? make_sentencepiece(std::move(spec))
                                                          : make_bpe(std::move(spec));
}

}  // namespace

std::unique_ptr<Tokenizer> Tokenizer::from_folder(const std::string& folder) {
  return make_tokenizer(spec_from_folder(folder));
}

std::unique_ptr<Tokenizer> Tokenizer::from_gguf(const GgufVocab& vocab) {
  return make_tokenizer(spec_from_gguf(vocab));
}

std::unique_ptr<Tokenizer> Tokenizer::parse(std::string_view bytes) {
  return make_tokenizer(read_spec(bytes));
}

std::string Tokenizer::serialize() const { return write_spec(*spec_); }

Tokenizer::Tokenizer(TokenizerSpec spec) : spec_(std::make_unique<const TokenizerSpec>(std::move(spec))) {
  const int32_t vocab = vocab_size();
  auto check = [&](int32_t id, const char* what) {
    if (id < 0 || id >= vocab) {
      throw Error(ErrorKind::kInput, std::string("tokenizer: ") + what + " " + std::to_string(id) +
                                         " lies outside the vocabulary of " + std::to_string(vocab));
    }
  };
  if (spec_->bos != -1) check(spec_->bos, "BOS id");
  for (int32_t id : spec_->eos) check(id, "end id");
  roles_.resize(vocab, Role::kText);
  for (const AddedToken& token : spec_->added) {
    check(token.id, "added token's id");
    if (token.text.empty()) throw Error(ErrorKind::kInput, "tokenizer: an added token is empty");
    roles_[token.id] = token.control ? Role::kControl : Role::kAdded;
    specials_.push_back({token.text, token.id, token.control});
  }
  std::sort(specials_.begin(), specials_.end(), [](const Special& a, const Special& b) {
    if (a.text[0] != b.text[0]) return static_cast<uint8_t>(a.text[0]) < static_cast<uint8_t>(b.text[0]);
    if (a.text.size() != b.text.size()) return a.text.size() > b.text.size();
    return a.text != b.text ? a.text < b.text : a.id < b.id;
  });
  first_special_.assign(257, 0);
  for (const Special& special : specials_) ++first_special_[static_cast<uint8_t>(special.text[0]) + 1];
  for (int byte = 0; byte < 256; ++byte) first_special_[byte + 1] += first_special_[byte];
}

Tokenizer::~Tokenizer() = default;

int Tokenizer::vocab_size() const { return static_cast<int>(spec_->tokens.size()); }
int32_t Tokenizer::bos_id() const { return spec_->bos; }
bool Tokenizer::add_bos() const { return spec_->add_bos && spec_->bos >= 0; }
const std::vector<int32_t>& Tokenizer::eos_ids() const { return spec_->eos; }
bool Tokenizer::is_eos(int32_t id) const {
  return std::binary_search(spec_->eos.begin(), spec_->eos.end(), id);
}
bool Tokenizer::is_special(int32_t id) const {
  return id >= 0 && id < vocab_size() && roles_[id] == Role::kControl;
}
const std::string& Tokenizer::chat_template() const { return spec_->chat_template; }

int32_t Tokenizer::special_id(std::string_view text) const {
  for (const Special& special : specials_) {
    if (special.control && special.text == text) return special.id;
  }
  return -1;
}

const Tokenizer::Special* Tokenizer::match_special(std::string_view text, bool parse_special) const {
  const auto byte = static_cast<uint8_t>(text[0]);
  for (uint32_t i = first_special_[byte]; i < first_special_[byte + 1]; ++i) {
    const Special& special = specials_[i];
    if ((parse_special || !special.control) && text.starts_with(special.text)) return &special;
  }
  return nullptr;
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool parse_special) const {
  std::vector<int32_t> out;
  size_t begin = 0;  // of the text not yet encoded
  for (size_t at = 0; at < text.size();) {
    const Special* special = match_special(text.substr(at), parse_special);
    if (special == nullptr) {
      ++at;
      continue;
    }
    encode_fragment(text.substr(begin, at - begin), out);
    out.push_back(special->id);
    begin = at += special->text.size();
  }
  encode_fragment(text.substr(begin), out);
  return out;
}

void Tokenizer::encode_fragment(std::string_view text, std::vector<int32_t>& out) const {
  bool at_start = true;
  size_t valid = 0;  // bytes at the front of text known to be whole characters
  while (valid < text.size()) {
    const Utf8Unit unit = utf8_unit(text.substr(valid));
    if (unit.kind == Utf8Unit::kCharacter) {
      valid += unit.size;
      continue;
    }
    if (valid > 0) encode_text(text.substr(0, valid), at_start, out);
    at_start = false;
    for (char byte : text.substr(valid, unit.size)) {
      const int32_t id = byte_id(static_cast<uint8_t>(byte));
      if (id >= 0)
        out.push_back(id);
      else
        encode_text("\uFFFD", false, out);
    }
    text.remove_prefix(valid + unit.size);
    valid = 0;
  }
  if (valid > 0) encode_text(text, at_start, out);
}

std::vector<int32_t> Tokenizer::encode_prompt(std::string_view text, bool parse_special) const {
  std::vector<int32_t> ids = encode(text, parse_special);
  if (add_bos() && (ids.empty() || ids[0] != bos_id())) ids.insert(ids.begin(), bos_id());
  return ids;
}

const std::string& Tokenizer::token_bytes(int32_t id) const {
  static const std::string kNone;
  return id >= 0 && id < vocab_size() ? spec_->tokens[id] : kNone;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool keep_special) const {
  TokenDecoder decoder(*this, false, keep_special);
  std::string out;
  for (int32_t id : ids) out += decoder.next(id);
  return out;
}

std::string_view TokenDecoder::next(int32_t id) {
  std::string_view bytes = tokenizer_.token_bytes(id);
  const bool control = tokenizer_.is_special(id);
  const bool added = !bytes.empty() && tokenizer_.roles_[id] != Tokenizer::Role::kText;
  if (at_start_ && !added && tokenizer_.spec_->space_prefix && bytes.starts_with(' ')) bytes.remove_prefix(1);
  at_start_ = added;  // encode() puts the prefix after every added token
  return control && !keep_special_ ? std::string_view() : bytes;
}

}  // namespace q4s
