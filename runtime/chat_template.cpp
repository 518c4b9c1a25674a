// See chat_template.h. Formats as published with SmolLM2 and Qwen (chatml), Llama 2 and Llama 3.
#include "runtime/chat_template.h"

#include <array>

#include "runtime/error.h"

namespace q4s {
namespace {

std::string trimmed(const std::string& text) {  // the templates of the llamas trim what people write
  const size_t begin = text.find_first_not_of(" \t\r\n");
  if (begin == std::string::npos) return "";
  return text.substr(begin, text.find_last_not_of(" \t\r\n") - begin + 1);
}

// A chatml template may open conversations that have no system message with one of its own, spelled out in
// it.
std::string find_default_system(const std::string& jinja) {
  for (const std::string& newline : {std::string("\n"), std::string("\\n")}) {
    const std::string open = "<|im_start|>system" + newline;
    const size_t begin = jinja.find(open);
    if (begin == std::string::npos) continue;
    const size_t end = jinja.find("<|im_end|>", begin);
    const std::string text = jinja.substr(begin + open.size(), end - begin - open.size());
    // A quote means that the literal ends and an expression follows.
    if (end != std::string::npos && text.find_first_of("'\"{") == std::string::npos) return text;
  }
  return "";
}

}  // namespace

ChatTemplate::ChatTemplate(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {
  const std::string& jinja = tokenizer.chat_template();
  auto says = [&](const char* text) { return jinja.find(text) != std::string::npos; };
  auto knows = [&](const char* text) { return jinja.empty() && tokenizer.special_id(text) >= 0; };
  if (says("<|im_start|>") || knows("<|im_start|>")) {
    format_ = Format::kChatml;
    default_system_ = find_default_system(jinja);
    special("<|im_start|>"), special("<|im_end|>");
  } else if (says("<|start_header_id|>") || knows("<|start_header_id|>")) {
    format_ = Format::kLlama3;
    special("<|start_header_id|>"), special("<|end_header_id|>"), special("<|eot_id|>");
  } else if (says("[INST]") && says("<<SYS>>")) {
    format_ = Format::kLlama2;
    special("</s>");
  } else if (jinja.empty()) {
    throw Error(ErrorKind::kInput,
                "the model brings no chat template and no special tokens of a known one "
                "(known: chatml, llama2, llama3)");
  } else {
    throw Error(ErrorKind::kInput,
                "unknown chat template (known: chatml, llama2, llama3): " + jinja.substr(0, 200));
  }
}

const char* ChatTemplate::name() const {
  return std::array{"chatml", "llama2", "llama3"}[static_cast<size_t>(format_)];
}

int32_t ChatTemplate::special(const std::string& text) const {
  const int32_t id = tokenizer_.special_id(text);
  if (id < 0) {
    throw Error(ErrorKind::kInput, std::string("chat template ") + name() + " needs the special token " +
                                       text + ", which the vocabulary lacks");
  }
  return id;
}

std::vector<ChatTemplate::Segment> ChatTemplate::render(std::span<const ChatMessage> messages) const {
  std::vector<Segment> out;
  auto token = [&](int32_t id) { out.push_back({id, ""}); };
  auto text = [&](const std::string& more) {  // neighbours are encoded as one text
    if (out.empty() || out.back().special >= 0) out.push_back({-1, ""});
    out.back().text += more;
  };
  if (format_ == Format::kChatml) {
    const int32_t start = special("<|im_start|>"), end = special("<|im_end|>");
    if (tokenizer_.add_bos()) token(tokenizer_.bos_id());
    auto say = [&](const std::string& role, const std::string& content) {
      token(start), text(role + "\n" + content), token(end), text("\n");
    };
    if (messages[0].role != "system" && !default_system_.empty()) say("system", default_system_);
    for (const ChatMessage& message : messages) say(message.role, message.content);
    token(start), text("assistant\n");
  } else if (format_ == Format::kLlama3) {
    const int32_t start = special("<|start_header_id|>"), end = special("<|end_header_id|>");
    if (tokenizer_.bos_id() >= 0) token(tokenizer_.bos_id());
    auto head = [&](const std::string& role) { token(start), text(role), token(end), text("\n\n"); };
    for (const ChatMessage& message : messages) {
      head(message.role), text(trimmed(message.content)), token(special("<|eot_id|>"));
    }
    head("assistant");
  } else {
    std::string system;  // opens the first question
    for (const ChatMessage& message : messages) {
      if (message.role == "system") {
        system = "<<SYS>>\n" + message.content + "\n<</SYS>>\n\n";
      } else if (message.role == "user") {
        if (tokenizer_.bos_id() >= 0) token(tokenizer_.bos_id());
        text("[INST] " + trimmed(system + message.content) + " [/INST]");
        system.clear();
      } else {
        text(" " + trimmed(message.content) + " "), token(special("</s>"));
      }
    }
  }
  return out;
}

std::vector<int32_t> ChatTemplate::encode(std::span<const ChatMessage> messages) const {
  // system?, then user and assistant in turn, ending with user.
  const size_t first = !messages.empty() && messages[0].role == "system" ? 1 : 0;
  bool good = messages.size() % 2 == (first + 1) % 2 && messages.size() > first;
  for (size_t i = first; i < messages.size(); ++i) {
    good &= messages[i].role == ((i - first) % 2 == 0 ? "user" : "assistant");
  }
  if (!good)
    throw Error(ErrorKind::kUsage, "a chat is: system at most once, then user and assistant in turn");
  std::vector<int32_t> ids;
  for (const Segment& segment : render(messages)) {
    if (segment.special >= 0) {
      ids.push_back(segment.special);
    } else {
      const std::vector<int32_t> more = tokenizer_.encode(segment.text, false);
      ids.insert(ids.end(), more.begin(), more.end());
    }
  }
  return ids;
}

}  // namespace q4s
