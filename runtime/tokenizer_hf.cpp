// A tokenizer's parts from a Hugging Face folder: tokenizer.model where there is one, else tokenizer.json,
// and the smaller files around them that name BOS, the ends of a text and the chat template.
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "runtime/error.h"
#include "runtime/json_check.h"
#include "runtime/mapped_file.h"
#include "runtime/tokenizer_spec.h"

namespace q4s {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

[[noreturn]] void fail(const fs::path& file, const std::string& what) {
  throw Error(ErrorKind::kInput, file.string() + ": " + what);
}

std::string read_text(const fs::path& path) {
  const MappedFile file(path.string());
  return {reinterpret_cast<const char*>(file.data()), file.size()};
}

// An empty object where there is no such file.
json read_json(const fs::path& path) {
  if (!fs::exists(path)) return json::object();
  const std::string text = read_text(path);
  check_json(text, path.string());
  json document = json::parse(text);
  if (!document.is_object()) fail(path, "is not a JSON object");
  return document;
}

// Spelling of a token in a config: a string, or an object with "content".
std::string spelling(const json& config, const char* key) {
  const auto found = config.find(key);
  if (found == config.end()) return "";
  if (found->is_string()) return *found;
  return found->is_object() ? found->value("content", "") : "";
}

bool flag(const json& object, const char* key, bool otherwise) {
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? otherwise : found->get<bool>();
}

// Appends the id, or the list of ids, under a key.
void add_ids(const json& config, const char* key, std::vector<int32_t>& ids) {
  const auto found = config.find(key);
  if (found == config.end() || found->is_null()) return;
  if (found->is_array()) {
    for (const json& id : *found) ids.push_back(id.get<int32_t>());
  } else {
    ids.push_back(found->get<int32_t>());
  }
}

int32_t find_token(const TokenizerSpec& spec, const std::string& text) {
  for (const AddedToken& token : spec.added) {
    if (token.text == text) return token.id;
  }
  return -1;
}

// A later mention of an id replaces an earlier one.
void add_token(TokenizerSpec& spec, AddedToken token) {
  for (AddedToken& known : spec.added) {
    if (known.id == token.id) {
      known = std::move(token);
      return;
    }
  }
  spec.added.push_back(std::move(token));
}

// One element of a pre-tokenizer: its regex joins spec.splits.
void add_split(TokenizerSpec& spec, const json& pre, const fs::path& file) {
  const std::string type = pre.value("type", "");
  if (type == "Sequence") {
    for (const json& part : pre.at("pretokenizers")) add_split(spec, part, file);
  } else if (type == "ByteLevel") {
    if (flag(pre, "add_prefix_space", true)) fail(file, "ByteLevel with add_prefix_space is not supported");
    if (flag(pre, "use_regex", true)) spec.splits.push_back(kGpt2Split);
  } else if (type == "Digits") {
    spec.splits.push_back(kDigitSplit + std::string(flag(pre, "individual_digits", false) ? "" : "+"));
  } else if (type == "Split") {
    const json& pattern = pre.at("pattern");
    const std::string behavior = pre.value("behavior", "");
    // "Removed" with "invert" keeps what matches, and the patterns written so match everything.
    const bool invert = flag(pre, "invert", false);
    if (!pattern.contains("Regex") || !(behavior == "Isolated" || (behavior == "Removed" && invert))) {
      fail(file, "Split of another kind than an isolating Regex is not supported");
    }
    spec.splits.push_back(pattern.at("Regex"));
  } else {
    fail(file,
         "pre-tokenizer \"" + type + "\" is not supported (supported: Sequence, ByteLevel, Digits, Split)");
  }
}

bool has_byte_level(const json& pre) {
  if (pre.value("type", "") == "ByteLevel") return true;
  if (pre.value("type", "") != "Sequence") return false;
  for (const json& part : pre.at("pretokenizers")) {
    if (has_byte_level(part)) return true;
  }
  return false;
}

// The special token that a post-processor puts first, or nothing.
std::string leading_token(const json& post) {
  if (!post.is_object()) return "";
  if (post.value("type", "") == "Sequence") {
    for (const json& part : post.at("processors")) {
      if (std::string token = leading_token(part); !token.empty()) return token;
    }
  }
  if (post.value("type", "") != "TemplateProcessing") return "";
  const json& single = post.at("single");
  return single.empty() || !single[0].contains("SpecialToken") ? ""
                                                               : single[0]["SpecialToken"].value("id", "");
}

void describe_json(TokenizerSpec& spec, const json& document, const fs::path& file) {
  const json& model = document.at("model");
  const json pre = document.value("pre_tokenizer", json());
  if (model.value("type", "BPE") != "BPE" || !pre.is_object() || !has_byte_level(pre)) {
    fail(file, "is not byte-level BPE; other kinds need a tokenizer.model beside it");
  }
  // NFC changes only text that is not composed, and the round trip must be exact: it is left out.
  const json normalizer = document.value("normalizer", json());
  if (normalizer.is_object() && normalizer.value("type", "") != "NFC") {
    fail(file, "normalizer \"" + normalizer.value("type", "") + "\" is not supported (supported: none, NFC)");
  }
  add_split(spec, pre, file);
  spec.ignore_merges = flag(model, "ignore_merges", false);

  std::map<int64_t, std::string> by_id;  // JSON keeps no order
  for (const auto& [text, id] : model.at("vocab").items()) by_id[id.get<int64_t>()] = text;
  std::map<int64_t, bool> added;
  const json added_tokens = document.value("added_tokens", json::array());
  for (const json& token : added_tokens) {
    const int64_t id = token.at("id");
    by_id[id] = token.at("content");
    added[id] = flag(token, "special", false);
  }
  const auto vocab = static_cast<int64_t>(by_id.size());
  if (vocab == 0 || by_id.begin()->first != 0 || by_id.rbegin()->first != vocab - 1) {
    fail(file, "token ids are not 0 to " + std::to_string(vocab - 1));
  }
  std::vector<std::string> spellings;
  std::vector<bool> literal;
  for (const auto& [id, text] : by_id) {
    spellings.push_back(text);
    literal.push_back(added.contains(id));
    if (added.contains(id)) spec.added.push_back({static_cast<int32_t>(id), text, added[id]});
  }
  std::vector<std::pair<std::string, std::string>> merges;
  for (const json& merge : model.at("merges")) {
    if (merge.is_array()) {
      merges.emplace_back(merge.at(0), merge.at(1));
      continue;
    }
    const std::string text = merge;
    const size_t space = text.find(' ', 1);
    if (space == std::string::npos) fail(file, "merge \"" + text + "\" is no pair");
    merges.emplace_back(text.substr(0, space), text.substr(space + 1));
  }
  describe_bpe(spec, spellings, literal, merges);
  const std::string first = leading_token(document.value("post_processor", json()));
  spec.add_bos = !first.empty();
  spec.bos = find_token(spec, first);
}

// chat_template: one text, or a list of named ones of which "default" is meant; newer folders keep it in a
// file.
std::string read_chat_template(const fs::path& folder, const json& config) {
  if (const fs::path file = folder / "chat_template.jinja"; fs::exists(file)) return read_text(file);
  const json found = config.value("chat_template", json());
  if (found.is_string()) return found;
  if (!found.is_array()) return "";
  for (const json& named : found) {
    if (named.value("name", "") == "default") return named.value("template", "");
  }
  return "";
}

TokenizerSpec read_folder(const fs::path& folder) {
  const json config = read_json(folder / "tokenizer_config.json");
  const json special_map = read_json(folder / "special_tokens_map.json");
  TokenizerSpec spec;
  if (const fs::path model = folder / "tokenizer.model"; fs::exists(model)) {
    spec.sentencepiece = read_text(model);
    describe_sentencepiece(spec);
    spec.add_bos = true;  // LlamaTokenizer's default
    const json added = read_json(folder / "added_tokens.json");
    for (const auto& [text, id] : added.items()) {
      add_token(spec, {id.get<int32_t>(), text, true});
    }
    const json decoder = config.value("added_tokens_decoder", json::object());
    for (const auto& [id, token] : decoder.items()) {
      add_token(spec, {std::stoi(id), token.at("content"), flag(token, "special", false)});
    }
  } else if (const fs::path file = folder / "tokenizer.json"; fs::exists(file)) {
    describe_json(spec, read_json(file), file);
  } else {
    fail(folder, "holds neither tokenizer.model nor tokenizer.json");
  }
  spec.add_bos = flag(config, "add_bos_token", spec.add_bos);

  std::vector<int32_t> bos, eos;
  for (const char* name : {"config.json", "generation_config.json"}) {
    const json ids = read_json(folder / name);
    add_ids(ids, "bos_token_id", bos);
    add_ids(ids, "eos_token_id", eos);
  }
  for (const json* names : {&config, &special_map}) {
    if (const int32_t id = find_token(spec, spelling(*names, "bos_token")); id >= 0)
      bos.insert(bos.begin(), id);
    if (const int32_t id = find_token(spec, spelling(*names, "eos_token")); id >= 0) eos.push_back(id);
  }
  if (spec.bos < 0 && !bos.empty()) spec.bos = bos[0];
  spec.eos.insert(spec.eos.end(), eos.begin(), eos.end());
  spec.chat_template = read_chat_template(folder, config);
  add_known_ends(spec);
  return spec;
}

}  // namespace

TokenizerSpec spec_from_folder(const std::string& folder) {
  try {
    return read_folder(folder);
  } catch (const json::exception& error) {
    throw Error(ErrorKind::kInput, folder + ": tokenizer files: " + error.what());
  } catch (const std::logic_error& error) {  // a number that is none, in added_tokens_decoder
    throw Error(ErrorKind::kInput, folder + ": tokenizer files: " + std::string(error.what()));
  }
}

}  // namespace q4s
