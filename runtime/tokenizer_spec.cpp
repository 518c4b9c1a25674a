// The bytes of a tokenizer in a .q4s file: little-endian integers, strings and lists with their counts in
// front, and XXH3-64 over everything at the end, so that the parsers behind it only ever see intact bytes.
#include "runtime/tokenizer_spec.h"

#include <algorithm>
#include <array>

#include "runtime/checksum.h"
#include "runtime/error.h"

namespace q4s {
namespace {

constexpr uint32_t kVersion = 1;
constexpr size_t kHashBytes = 8;

class Writer {
 public:
  void u32(uint32_t value) {
    for (int shift = 0; shift < 32; shift += 8) out_ += static_cast<char>(value >> shift);
  }
  void u64(uint64_t value) {
    u32(static_cast<uint32_t>(value));
    u32(static_cast<uint32_t>(value >> 32));
  }
  void string(std::string_view text) {
    u32(static_cast<uint32_t>(text.size()));
    out_ += text;
  }
  std::string finish() {
    u64(xxh3(out_.data(), out_.size()));
    return std::move(out_);
  }

 private:
  std::string out_;
};

class Reader {
 public:
  explicit Reader(std::string_view bytes) : rest_(bytes), size_(bytes.size()) {
    if (bytes.size() < kHashBytes) fail("is too short");
    const std::string_view body = bytes.substr(0, bytes.size() - kHashBytes);
    rest_.remove_prefix(body.size());
    const uint64_t hash = u64();
    if (hash != xxh3(body.data(), body.size())) fail("has a wrong checksum: it is truncated or damaged");
    rest_ = body;
    size_ = body.size();
  }
  uint32_t u32() {
    const std::string_view raw = take(4);
    uint32_t value = 0;
    for (int i = 3; i >= 0; --i) value = value << 8 | static_cast<uint8_t>(raw[i]);
    return value;
  }
  uint64_t u64() {
    const uint64_t low = u32();
    return low | static_cast<uint64_t>(u32()) << 32;
  }
  std::string string() { return std::string(take(u32())); }
  // A list's length; each element takes at least element_bytes, so that no count can ask for more than there
  // is.
  size_t count(size_t element_bytes) {
    const size_t n = u32();
    if (n > rest_.size() / element_bytes) fail("has a list longer than itself" + where());
    return n;
  }
  void finish() {
    if (!rest_.empty()) fail("goes on after its end" + where());
  }
  [[noreturn]] void fail(const std::string& what) {
    throw Error(ErrorKind::kInput, "stored tokenizer " + what);
  }

 private:
  std::string_view take(size_t n) {
    if (n > rest_.size()) fail("ends early" + where());
    const std::string_view taken = rest_.substr(0, n);
    rest_.remove_prefix(n);
    return taken;
  }
  std::string where() const { return ", at byte " + std::to_string(size_ - rest_.size()); }
  std::string_view rest_;
  size_t size_;
};

constexpr uint32_t kAddBos = 1, kSpacePrefix = 2, kIgnoreMerges = 4;

}  // namespace

std::string write_spec(const TokenizerSpec& spec) {
  Writer out;
  out.u32(kVersion);
  out.u32(static_cast<uint32_t>(spec.kind));
  out.u32((spec.add_bos ? kAddBos : 0) | (spec.space_prefix ? kSpacePrefix : 0) |
          (spec.ignore_merges ? kIgnoreMerges : 0));
  out.u32(static_cast<uint32_t>(spec.bos));
  out.u32(static_cast<uint32_t>(spec.eos.size()));
  for (int32_t id : spec.eos) out.u32(static_cast<uint32_t>(id));
  out.u32(static_cast<uint32_t>(spec.added.size()));
  for (const AddedToken& token : spec.added) {
    out.u32(static_cast<uint32_t>(token.id));
    out.u32(token.control);
    out.string(token.text);
  }
  out.string(spec.chat_template);
  if (spec.kind == TokenizerSpec::Kind::kSentencePiece) {
    out.string(spec.sentencepiece);
    return out.finish();
  }
  out.u32(static_cast<uint32_t>(spec.tokens.size()));
  for (const std::string& token : spec.tokens) out.string(token);
  out.u32(static_cast<uint32_t>(spec.merges.size()));
  for (auto [left, right] : spec.merges) {
    out.u32(static_cast<uint32_t>(left));
    out.u32(static_cast<uint32_t>(right));
  }
  out.u32(static_cast<uint32_t>(spec.splits.size()));
  for (const std::string& split : spec.splits) out.string(split);
  return out.finish();
}

TokenizerSpec read_spec(std::string_view bytes) {
  Reader in(bytes);
  TokenizerSpec spec;
  if (const uint32_t version = in.u32(); version != kVersion) {
    in.fail("has version " + std::to_string(version) + ", this program reads " + std::to_string(kVersion));
  }
  const uint32_t kind = in.u32();
  if (kind != 1 && kind != 2) in.fail("has the unknown kind " + std::to_string(kind));
  spec.kind = static_cast<TokenizerSpec::Kind>(kind);
  const uint32_t flags = in.u32();
  if (flags > (kAddBos | kSpacePrefix | kIgnoreMerges)) in.fail("has unknown flags " + std::to_string(flags));
  spec.add_bos = flags & kAddBos;
  spec.space_prefix = flags & kSpacePrefix;
  spec.ignore_merges = flags & kIgnoreMerges;
  spec.bos = static_cast<int32_t>(in.u32());
  spec.eos.resize(in.count(4));
  for (int32_t& id : spec.eos) id = static_cast<int32_t>(in.u32());
  spec.added.resize(in.count(12));
  for (AddedToken& token : spec.added) {
    token.id = static_cast<int32_t>(in.u32());
    token.control = in.u32() != 0;
    token.text = in.string();
  }
  spec.chat_template = in.string();
  if (spec.kind == TokenizerSpec::Kind::kSentencePiece) {
    spec.sentencepiece = in.string();
  } else {
    spec.tokens.resize(in.count(4));
    for (std::string& token : spec.tokens) token = in.string();
    spec.merges.resize(in.count(8));
    for (auto& [left, right] : spec.merges) {
      left = static_cast<int32_t>(in.u32());
      right = static_cast<int32_t>(in.u32());
    }
    spec.splits.resize(in.count(4));
    for (std::string& split : spec.splits) split = in.string();
  }
  in.finish();
  return spec;
}

void add_known_ends(TokenizerSpec& spec) {
  constexpr std::array kEnds = {"<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>"};
  for (const AddedToken& token : spec.added) {
    if (token.control && std::find(kEnds.begin(), kEnds.end(), token.text) != kEnds.end()) {
      spec.eos.push_back(token.id);
    }
  }
  std::sort(spec.eos.begin(), spec.eos.end());
  spec.eos.erase(std::unique(spec.eos.begin(), spec.eos.end()), spec.eos.end());
}

}  // namespace q4s
