// Byte-level BPE (GPT-2's scheme): regexes cut the text into words, the bytes of a word are merged pair by
// pair, best rank first. Tokens are held as the bytes they stand for, never in GPT-2's alphabet of visible
// characters.
#include <algorithm>
#include <array>
#include <queue>
#include <unordered_map>

#include "runtime/error.h"
#include "runtime/regex.h"
#include "runtime/tokenizer_spec.h"
#include "runtime/utf8.h"

namespace q4s {

// GPT-2's own expression (Radford et al. 2019): contractions, words, numbers and signs, each with one space
// before.
const char* const kGpt2Split =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
const char* const kDigitSplit = R"(\p{N})";

namespace {

using WordMap = std::unordered_map<std::string_view, int32_t>;

[[noreturn]] void fail(const std::string& what) { throw Error(ErrorKind::kInput, "byte-level BPE: " + what); }

constexpr size_t kNone = ~size_t{0};

class BpeTokenizer final : public Tokenizer {
 public:
  explicit BpeTokenizer(TokenizerSpec parts) : Tokenizer(std::move(parts)) {
    const auto vocab = static_cast<int32_t>(spec().tokens.size());
    for (int32_t id = 0; id < vocab; ++id) {
      if (!is_special(id))
        words_.emplace(spec().tokens[id], id);  // no text is ever merged into a control token
    }
    byte_ids_.fill(-1);
    for (int byte = 0; byte < 256; ++byte) {
      const char text = static_cast<char>(byte);
      if (const auto found = words_.find(std::string_view(&text, 1)); found != words_.end()) {
        byte_ids_[byte] = found->second;
      }
    }
    merges_.reserve(spec().merges.size());
    for (size_t rank = 0; rank < spec().merges.size(); ++rank) {
      const auto [left, right] = spec().merges[rank];
      if (left < 0 || left >= vocab || right < 0 || right >= vocab) {
        fail("merge " + std::to_string(rank) + " lies outside the vocabulary");
      }
      const auto merged = words_.find(spec().tokens[left] + spec().tokens[right]);
      if (merged == words_.end()) fail("merge " + std::to_string(rank) + " makes no token");
      merges_.emplace(key(left, right), Merge{static_cast<uint32_t>(rank), merged->second});
    }
    for (const std::string& split : spec().splits) splits_.emplace_back(split);
  }

 protected:
  void encode_text(std::string_view text, bool, std::vector<int32_t>& out) const override {
    WordCache words;
    split(text, 0, words, out);
  }
  int32_t byte_id(uint8_t byte) const override { return byte_ids_[byte]; }

 private:
  struct Merge {
    uint32_t rank;
    int32_t id;
  };
  static uint64_t key(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  }

  void split(std::string_view text, size_t level, WordCache& words, std::vector<int32_t>& out) const {
    if (level < splits_.size()) {
      splits_[level].split(text, [&](std::string_view piece) { split(piece, level + 1, words, out); });
      return;
    }
    words.append(text, out, [&] { merge_word(text, out); });
  }

  void merge_word(std::string_view word, std::vector<int32_t>& out) const {
    if (spec().ignore_merges) {
      if (const auto whole = words_.find(word); whole != words_.end()) {
        out.push_back(whole->second);
        return;
      }
    }
    // A list of symbols linked by index; a merge takes the right one out and the left one changes its id. The
    // heap holds candidates, of which those whose symbols have changed meanwhile are stale.
    struct Symbol {
      int32_t id;
      size_t previous, next;
    };
    struct Candidate {
      uint32_t rank;
      size_t left, right;
      int32_t left_id, right_id, id;
      bool operator<(const Candidate& other) const {  // priority_queue gives the largest first
        return rank != other.rank ? rank > other.rank : left > other.left;
      }
    };
    std::vector<Symbol> symbols;
    symbols.reserve(word.size());
    for (char byte : word) {
      symbols.push_back({byte_ids_[static_cast<uint8_t>(byte)], symbols.size() - 1, symbols.size() + 1});
    }
    symbols.back().next = kNone;
    std::priority_queue<Candidate> heap;
    auto consider = [&](size_t left, size_t right) {
      if (left == kNone || right == kNone) return;
      const int32_t left_id = symbols[left].id, right_id = symbols[right].id;
      const auto merge = merges_.find(key(left_id, right_id));
      if (merge == merges_.end()) return;
      heap.push({merge->second.rank, left, right, left_id, right_id, merge->second.id});
    };
    for (size_t i = 0; i + 1 < symbols.size(); ++i) consider(i, i + 1);
    while (!heap.empty()) {
      const Candidate best = heap.top();
      heap.pop();
      Symbol& left = symbols[best.left];
      Symbol& right = symbols[best.right];
      if (left.next != best.right || left.id != best.left_id || right.id != best.right_id) continue;
      left.id = best.id;
      left.next = right.next;
      right.id = -1;
      if (right.next != kNone) symbols[right.next].previous = best.left;
      consider(left.previous, best.left);
      consider(best.left, left.next);
    }
    for (size_t i = 0; i != kNone; i = symbols[i].next) {
      if (symbols[i].id >= 0) out.push_back(symbols[i].id);  // -1: the vocabulary lacks this byte
    }
  }

  WordMap words_;  // views into spec().tokens
  std::array<int32_t, 256> byte_ids_;
  std::unordered_map<uint64_t, Merge> merges_;
  std::vector<Regex> splits_;
};

// GPT-2 spells a byte as the visible Latin-1 character of the same number, the other 68 as U+0100 and up in
// order.
std::array<int, 0x144> byte_of_character() {
  std::array<int, 0x144> table;
  table.fill(-1);
  int next = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    const bool visible = (byte > 0x20 && byte < 0x7F) || (byte > 0xA0 && byte != 0xAD);
    table[visible ? byte : next++] = byte;
  }
  return table;
}

// The bytes that a spelling stands for; nothing if it is not in the alphabet.
std::optional<std::string> bytes_of_spelling(std::string_view spelling) {
  static const std::array<int, 0x144> kTable = byte_of_character();
  std::string bytes;
  while (!spelling.empty()) {
    const Utf8Unit unit = utf8_unit(spelling);
    if (unit.kind != Utf8Unit::kCharacter || unit.size > 2) return std::nullopt;
    const size_t code = unit.size == 1 ? static_cast<uint8_t>(spelling[0])
                                       : static_cast<size_t>(spelling[0] & 0x1F) << 6 | (spelling[1] & 0x3F);
    if (code >= kTable.size() || kTable[code] < 0) return std::nullopt;
    bytes += static_cast<char>(kTable[code]);
    spelling.remove_prefix(unit.size);
  }
  return bytes;
}

}  // namespace

void describe_bpe(TokenizerSpec& spec, const std::vector<std::string>& spellings,
                  const std::vector<bool>& literal,
                  const std::vector<std::pair<std::string, std::string>>& merges) {
  spec.kind = TokenizerSpec::Kind::kByteBpe;
  WordMap ids;
  for (size_t id = 0; id < spellings.size(); ++id) {
    const auto bytes = literal[id] ? std::nullopt : bytes_of_spelling(spellings[id]);
    spec.tokens.push_back(bytes.value_or(spellings[id]));
    ids.emplace(spellings[id], static_cast<int32_t>(id));
  }
  for (const auto& [left, right] : merges) {
    const auto left_id = ids.find(left), right_id = ids.find(right);
    if (left_id == ids.end() || right_id == ids.end()) {
      fail("merge \"" + left + " " + right + "\" uses what is no token");
    }
    spec.merges.emplace_back(left_id->second, right_id->second);
  }
}

std::unique_ptr<Tokenizer> make_bpe(TokenizerSpec spec) {
  return std::make_unique<BpeTokenizer>(std::move(spec));
}

}  // namespace q4s
