// sentencepiece behind the Tokenizer interface. The library only cuts text into pieces; the leading space,
// control tokens, invalid bytes and decoding are ours, so that both families behave alike. The only file that
// includes it.
#include <sentencepiece_processor.h>

#include <array>
#include <cstring>

#include "runtime/error.h"
#include "runtime/tokenizer_spec.h"

namespace q4s {
namespace {

constexpr std::string_view kSpace = "\u2581";  // how sentencepiece writes a space

[[noreturn]] void fail(const std::string& what) {
  throw Error(ErrorKind::kInput, "sentencepiece model: " + what);
}

// Field numbers of sentencepiece_model.proto (Apache-2.0), message by message, as far as they are needed
// here.
enum ModelField : uint32_t { kPieces = 1, kTrainer = 2, kNormalizer = 3 };
enum PieceField : uint32_t { kText = 1, kScore = 2, kType = 3 };
enum TrainerField : uint32_t {
  kModelType = 3,
  kVocabSize = 4,
  kByteFallback = 35,
  kUnknownId = 40,
  kBosId,
  kEosId,
  kPadId
};
enum NormalizerField : uint32_t { kName = 1, kCharsmap = 2, kDummyPrefix = 3, kRemoveExtraSpaces = 4 };
constexpr uint64_t kModelTypeBpe = 2;
enum PieceType : int32_t { kNormal = 1, kUnknown, kControl, kUserDefined, kUnused, kByte };

class ProtoWriter {
 public:
  ProtoWriter& number(uint32_t field, uint64_t value) {
    varint(field << 3);
    varint(value);
    return *this;
  }
  ProtoWriter& real(uint32_t field, float value) {
    varint(field << 3 | 5);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    for (int shift = 0; shift < 32; shift += 8) out_ += static_cast<char>(bits >> shift);
    return *this;
  }
  ProtoWriter& bytes(uint32_t field, std::string_view value) {
    varint(field << 3 | 2);
    varint(value.size());
    out_ += value;
    return *this;
  }
  const std::string& str() const { return out_; }

 private:
  void varint(uint64_t value) {
    for (; value >= 0x80; value >>= 7) out_ += static_cast<char>(value | 0x80);
    out_ += static_cast<char>(value);
  }
  std::string out_;
};

// Walks the fields of one message; the last value of `field` wins, as in protobuf. Nested messages: as bytes.
struct ProtoField {
  uint64_t number = 0;
  std::string_view bytes;
  bool found = false;
};
ProtoField find_field(std::string_view message, uint32_t field) {
  auto varint = [&] {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      if (message.empty()) fail("truncated");
      const auto byte = static_cast<uint8_t>(message[0]);
      message.remove_prefix(1);
      value |= static_cast<uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) return value;
    }
    fail("bad number");
  };
  ProtoField result;
  while (!message.empty()) {
    const uint64_t key = varint();
    ProtoField value;
    value.found = true;
    const uint64_t wire = key & 7;
    if (wire == 0) {
      value.number = varint();
    } else if (wire == 1 || wire == 2 || wire == 5) {
      const uint64_t size = wire == 1 ? 8 : wire == 5 ? 4 : varint();
      if (size > message.size()) fail("truncated");
      value.bytes = message.substr(0, size);
      message.remove_prefix(size);
    } else {
      fail("not a sentencepiece model");
    }
    if (key >> 3 == field) result = value;
  }
  return result;
}

std::unique_ptr<sentencepiece::SentencePieceProcessor> load(const std::string& proto) {
  // LLaMA's reference tokenizers keep every space and put one in front themselves; a later field of a message
  // overrides an earlier one, so that the model's own normalizer settings need no rewriting.
  const ProtoWriter plain = ProtoWriter().number(kDummyPrefix, 0).number(kRemoveExtraSpaces, 0);
  auto processor = std::make_unique<sentencepiece::SentencePieceProcessor>();
  const auto status =
      processor->LoadFromSerializedProto(proto + ProtoWriter().bytes(kNormalizer, plain.str()).str());
  if (!status.ok()) fail(status.message());
  return processor;
}

std::string piece_bytes(const sentencepiece::SentencePieceProcessor& processor, int id) {
  const std::string& piece = processor.IdToPiece(id);
  if (processor.IsByte(id))
    return std::string(1, static_cast<char>(std::stoi(piece.substr(3, 2), nullptr, 16)));
  std::string bytes;
  for (std::string_view rest = piece; !rest.empty();) {
    const bool space = rest.starts_with(kSpace);
    bytes += space ? ' ' : rest[0];
    rest.remove_prefix(space ? kSpace.size() : 1);
  }
  return bytes;
}

class SentencePieceTokenizer final : public Tokenizer {
 public:
  SentencePieceTokenizer(TokenizerSpec spec, std::unique_ptr<sentencepiece::SentencePieceProcessor> processor)
      : Tokenizer(std::move(spec)), processor_(std::move(processor)) {
    byte_ids_.fill(-1);
    for (int id = 0; id < processor_->GetPieceSize(); ++id) {
      if (processor_->IsByte(id)) byte_ids_[static_cast<uint8_t>(token_bytes(id)[0])] = id;
    }
    // Words can be cut one by one, to the same ids, where no piece goes on beyond the end of a word, text is
    // not rewritten before it is cut, and nothing is unknown (neighbouring unknowns become one).
    const std::string_view normalizer = find_field(this->spec().sentencepiece, kNormalizer).bytes;
    words_apart_ = find_field(normalizer, kCharsmap).bytes.empty() && byte_ids_[0] >= 0;
    for (int id = 0; id < processor_->GetPieceSize() && words_apart_; ++id) {
      const std::string& piece = token_bytes(id);
      words_apart_ = is_special(id) || word_size(piece) == piece.size();
    }
  }

 protected:
  void encode_text(std::string_view text, bool at_start, std::vector<int32_t>& out) const override {
    const std::string whole =
        at_start && spec().space_prefix ? std::string(kSpace).append(text) : std::string(text);
    WordCache words;
    for (std::string_view rest = whole; !rest.empty();) {
      const std::string_view word = rest.substr(0, words_apart_ ? word_size(rest) : rest.size());
      words.append(word, out, [&] {
        std::vector<int> ids;
        const auto status = processor_->Encode(word, &ids);
        if (!status.ok()) throw Error(ErrorKind::kRuntime, std::string("sentencepiece: ") + status.message());
        out.insert(out.end(), ids.begin(), ids.end());
      });
      rest.remove_prefix(word.size());
    }
  }
  int32_t byte_id(uint8_t byte) const override { return byte_ids_[byte]; }

 private:
  // Up to the first space that follows something else.
  static size_t word_size(std::string_view text) {
    for (size_t i = 1; i < text.size(); ++i) {
      if (text[i] == ' ' && text[i - 1] != ' ' && !text.substr(0, i).ends_with(kSpace)) return i;
    }
    return text.size();
  }

  std::unique_ptr<sentencepiece::SentencePieceProcessor> processor_;
  std::array<int32_t, 256> byte_ids_;
  bool words_apart_;
};

}  // namespace

std::string write_sentencepiece(const GgufVocab& vocab) {
  if (vocab.scores.size() != vocab.tokens.size() || vocab.types.size() != vocab.tokens.size()) {
    throw Error(ErrorKind::kInput, "GGUF vocabulary: " + std::to_string(vocab.tokens.size()) +
                                       " tokens, but " + std::to_string(vocab.scores.size()) +
                                       " scores and " + std::to_string(vocab.types.size()) + " types");
  }
  ProtoWriter model;
  uint64_t unknown = 0;
  bool bytes = false;
  for (size_t id = 0; id < vocab.tokens.size(); ++id) {
    const int32_t type = vocab.types[id];
    if (type < kNormal || type > kByte) {
      throw Error(ErrorKind::kInput,
                  "GGUF vocabulary: token " + std::to_string(id) + " has type " + std::to_string(type));
    }
    if (type == kUnknown) unknown = id;
    bytes |= type == kByte;
    ProtoWriter piece;
    piece.bytes(kText, vocab.tokens[id]).real(kScore, vocab.scores[id]).number(kType, type);
    model.bytes(kPieces, piece.str());
  }
  ProtoWriter trainer;
  trainer.number(kModelType, kModelTypeBpe)
      .number(kVocabSize, vocab.tokens.size())
      .number(kByteFallback, bytes);
  const uint64_t none = ~uint64_t{0};
  trainer.number(kUnknownId, unknown).number(kBosId, none).number(kEosId, none).number(kPadId, none);
  ProtoWriter normalizer;
  normalizer.bytes(kName, "identity").number(kDummyPrefix, vocab.add_space_prefix.value_or(true));
  return model.bytes(kTrainer, trainer.str()).bytes(kNormalizer, normalizer.str()).str();
}

void describe_sentencepiece(TokenizerSpec& spec) {
  const auto processor = load(spec.sentencepiece);
  for (int id = 0; id < processor->GetPieceSize(); ++id) {
    if (processor->IsControl(id) || processor->IsUnknown(id)) {
      spec.added.push_back({id, processor->IdToPiece(id), true});
    }
  }
  spec.bos = processor->bos_id();
  if (processor->eos_id() >= 0) spec.eos.push_back(processor->eos_id());
  const ProtoField normalizer = find_field(spec.sentencepiece, kNormalizer);
  const ProtoField prefix = find_field(normalizer.bytes, kDummyPrefix);
  spec.space_prefix = !prefix.found || prefix.number != 0;  // the proto's default is true
}

std::unique_ptr<Tokenizer> make_sentencepiece(TokenizerSpec spec) {
  auto processor = load(spec.sentencepiece);
  const int pieces = processor->GetPieceSize();
  spec.tokens.clear();
  for (int id = 0; id < pieces; ++id) spec.tokens.push_back(piece_bytes(*processor, id));
  // Tokens added to the model after training lie beyond its pieces and leave no gaps.
  std::vector<const AddedToken*> beyond(spec.added.size(), nullptr);
  for (const AddedToken& token : spec.added) {
    if (token.id < pieces) continue;
    const size_t index = static_cast<size_t>(token.id) - pieces;
    if (index >= beyond.size()) fail("added token " + std::to_string(token.id) + " leaves a gap");
    beyond[index] = &token;
  }
  for (const AddedToken* token : beyond) {
    if (token != nullptr) spec.tokens.resize(token->id + 1), spec.tokens[token->id] = token->text;
  }
  return std::make_unique<SentencePieceTokenizer>(std::move(spec), std::move(processor));
}

}  // namespace q4s
