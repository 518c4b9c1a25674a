#include "runtime/log.h"

#include <spdlog/sinks/base_sink.h>
#include <spdlog/spdlog.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace q4s {
namespace {

std::string vstrprintf(const char* format, va_list args) {
  va_list again;
  va_copy(again, args);
  std::string text(size_t(std::vsnprintf(nullptr, 0, format, args)), '\0');
  std::vsnprintf(text.data(), text.size() + 1, format, again);
  va_end(again);
  return text;
}

// Writes to stderr; lifts the status line over each message. Losing messages is no reason to fail.
class ConsoleSink : public spdlog::sinks::base_sink<std::mutex> {
 public:
  ConsoleSink() {
    const char *no_color = std::getenv("NO_COLOR"), *term = std::getenv("TERM");
    terminal = isatty(STDERR_FILENO) && !(no_color && *no_color) && term && std::string(term) != "dumb";
  }

  void status(const std::string& line) {
    std::lock_guard<std::mutex> lock(mutex_);
    winsize size{};
    size_t width = ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1 ? size.ws_col - 1 : 79;
    status_ = line.substr(0, width);
    std::fprintf(stderr, "\r\033[K%s", status_.c_str());
    std::fflush(stderr);
  }

  std::string tool;
  bool terminal;

 private:
  void sink_it_(const spdlog::details::log_msg& message) override {
    std::string line;
    const char* color = "";
    if (message.level >= spdlog::level::warn) {
      bool error = message.level >= spdlog::level::err;
      color = error ? "\033[31m" : "\033[33m";
      line = (tool.empty() ? "" : tool + ": ") + (error ? "error: " : "warning: ");
    }
    line += printable(std::string(message.payload.data(), message.payload.size()));
    if (terminal && *color) line = color + line + "\033[0m";
    if (!status_.empty()) line = "\r\033[K" + line;
    line += "\n" + status_;
    std::fwrite(line.data(), 1, line.size(), stderr);
  }
  void flush_() override { std::fflush(stderr); }

  std::string status_;
};

// Diagnostics are the one thing shared by the whole process.
struct Console {
  std::shared_ptr<ConsoleSink> sink = std::make_shared<ConsoleSink>();
  spdlog::logger logger{"q4s", sink};
  LogLevel level = LogLevel::kNormal;
  Console() { logger.flush_on(spdlog::level::trace); }
};
Console& console() {
  static Console instance;
  return instance;
}

void log(spdlog::level::level_enum level, const char* format, va_list args) {
  console().logger.log(level, spdlog::string_view_t(vstrprintf(format, args)));
}

}  // namespace

std::string strprintf(const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::string text = vstrprintf(format, args);
  va_end(args);
  return text;
}

void log_init(const std::string& tool, LogLevel level) {
  console().sink->tool = tool;
  console().level = level;
  console().logger.set_level(level == LogLevel::kQuiet     ? spdlog::level::warn
                             : level == LogLevel::kVerbose ? spdlog::level::debug
                                                           : spdlog::level::info);
}

LogLevel log_level() { return console().level; }

#define Q4S_LOG(name, severity)                 \
  void name(const char* format, ...) {          \
    va_list args;                               \
    va_start(args, format);                     \
    log(spdlog::level::severity, format, args); \
    va_end(args);                               \
  }
Q4S_LOG(log_debug, debug)
Q4S_LOG(log_info, info)
Q4S_LOG(log_warn, warn)
Q4S_LOG(log_error, err)
#undef Q4S_LOG

bool log_to_terminal() { return console().sink->terminal && console().level != LogLevel::kQuiet; }

void log_status(const std::string& line) {
  if (log_to_terminal()) console().sink->status(line);
}

std::string printable(const std::string& text) {
  std::string out;
  for (unsigned char c : text) {
    if ((c < 0x20 && c != '\t' && c != '\n') || c == 0x7f) {
      out += strprintf("\\x%02x", c);
    } else {
      out += char(c);
    }
  }
  return out;
}

}  // namespace q4s
