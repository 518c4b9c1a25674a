// Chat formats: a list of messages becomes token ids that end where the assistant's reply begins. Three
// formats are known and recognised from what the model brings; Jinja is not interpreted (of Llama 3.1's
// template this leaves out the date that it puts into a system message).
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "runtime/tokenizer.h"

namespace q4s {

struct ChatMessage {
  std::string role;  // "system" (only first), "user", "assistant"
  std::string content;
};

class ChatTemplate {
 public:
  enum class Format { kChatml, kLlama2, kLlama3 };

  // From the tokenizer's chat template or, where it brings none, from its special tokens. Throws
  // Error(kInput) quoting an unknown template or naming the special tokens that are missing. Keeps a
  // reference.
  explicit ChatTemplate(const Tokenizer& tokenizer);

  Format format() const { return format_; }
  const char* name() const;  // "chatml", "llama2", "llama3"
  // What the model's template says where the messages have no system message of their own; empty: nothing.
  const std::string& default_system() const { return default_system_; }

  // The whole conversation, with BOS where the format has it. Messages never have special tokens parsed in
  // them: a user who types <|im_end|> gets its letters. Throws Error(kUsage) on an order of roles the format
  // cannot say.
  std::vector<int32_t> encode(std::span<const ChatMessage> messages) const;

 private:
  struct Segment {
    int32_t special;  // id, -1: text
    std::string text;
  };
  std::vector<Segment> render(std::span<const ChatMessage> messages) const;
  int32_t special(const std::string& text) const;

  const Tokenizer& tokenizer_;
  Format format_;
  std::string default_system_;
};

}  // namespace q4s
