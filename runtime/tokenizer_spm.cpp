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

// Field numbers of sentencepiece_model.proto (Apache-2.0), as far as they are needed here.
enum Field : uint32_t {
  kPieces = 1,
  kTrainerSpec = 2,
  kNormalizerSpec = 3,  // ModelProto
  kPieceText = 1,
  kPieceScore = 2,
  kPieceType = 3,  // ModelProto.SentencePiece
  kModelType = 3,
  kVocabSize = 4,
  kByteFallback = 35,
  kUnkId = 40,
  kBosId = 41,
  kEosId = 42,
  kPadId = 43,
  kName = 1,
  kAddDummyPrefix = 3,
  kRemoveExtraWhitespaces = 4,  // NormalizerSpec
};
constexpr uint64_t kModelTypeBpe = 2;
enum PieceType : int32_t {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUserDefined = 4,
  kUnused = 5,
  kByte = 6
};

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
  const ProtoWriter plain = ProtoWriter().number(kAddDummyPrefix, 0).number(kRemoveExtraWhitespaces, 0);
  auto processor = std::make_unique<sentencepiece::SentencePieceProcessor>();
  const auto status =
      processor->LoadFromSerializedProto(proto + ProtoWriter().bytes(kNormalizerSpec, plain.str()).str());
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
  }

 protected:
  void encode_text(std::string_view text, bool at_start, std::vector<int32_t>& out) const override {
    std::vector<int> ids;
    const auto status = processor_->Encode(
        at_start && spec().space_prefix ? std::string(kSpace).append(text) : std::string(text), &ids);
    if (!status.ok()) throw Error(ErrorKind::kRuntime, "sentencepiece: " + std::string(status.message()));
    out.insert(out.end(), ids.begin(), ids.end());
  }
  int32_t byte_id(uint8_t byte) const override { return byte_ids_[byte]; }

 private:
  std::unique_ptr<sentencepiece::SentencePieceProcessor> processor_;
  std::array<int32_t, 256> byte_ids_;
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
    piece.bytes(kPieceText, vocab.tokens[id]).real(kPieceScore, vocab.scores[id]).number(kPieceType, type);
    model.bytes(kPieces, piece.str());
  }
  ProtoWriter trainer;
  trainer.number(kModelType, kModelTypeBpe)
      .number(kVocabSize, vocab.tokens.size())
      .number(kByteFallback, bytes);
  const uint64_t none = ~uint64_t{0};
  trainer.number(kUnkId, unknown).number(kBosId, none).number(kEosId, none).number(kPadId, none);
  ProtoWriter normalizer;
  normalizer.bytes(kName, "identity").number(kAddDummyPrefix, vocab.add_space_prefix.value_or(true));
  return model.bytes(kTrainerSpec, trainer.str()).bytes(kNormalizerSpec, normalizer.str()).str();
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
  const ProtoField normalizer = find_field(spec.sentencepiece, kNormalizerSpec);
  const ProtoField prefix = find_field(normalizer.bytes, kAddDummyPrefix);
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
