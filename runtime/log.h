// Messages to stderr, and nothing ever to stdout. spdlog lives behind this header; the status line is what a
// progress bar draws on a terminal, and messages move it out of their way.
#pragma once
#include <string>

namespace q4s {

// printf into a string.
[[gnu::format(printf, 1, 2)]] std::string strprintf(const char* format, ...);

enum class LogLevel { kQuiet, kNormal, kVerbose };  // kQuiet: warnings and errors only

// The tool's name opens warnings and errors. Without a call: normal, no name. Colours only on a terminal and
// not under NO_COLOR.
void log_init(const std::string& tool, LogLevel level);
LogLevel log_level();

[[gnu::format(printf, 1, 2)]] void log_debug(const char* format, ...);
[[gnu::format(printf, 1, 2)]] void log_info(const char* format, ...);
[[gnu::format(printf, 1, 2)]] void log_warn(const char* format, ...);
[[gnu::format(printf, 1, 2)]] void log_error(const char* format, ...);

// stderr is a terminal that understands more than plain lines: not NO_COLOR, not TERM=dumb, not quiet.
bool log_to_terminal();
// Shows `line` below the messages and replaces it at the next call; empty removes it. Only if
// log_to_terminal().
void log_status(const std::string& line);

// Text from outside made safe to print: control characters but tab and newline as \xNN.
std::string printable(const std::string& text);

}  // namespace q4s
