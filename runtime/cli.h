// What the four mains share: options (cxxopts behind this header), signals, checked standard output, exit
// codes. Knows nothing of models.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace q4s {

// Options of one tool, GNU style. Declared in the order of --help, which names every default. Names are
// "c,ctx-size" or "ctx-size"; values are then asked for by the long name. Every number is range-checked here.
class Cli {
 public:
  // synopsis: "MODEL [-p PROMPT]"; about: one sentence.
  Cli(const std::string& tool, const std::string& synopsis, const std::string& about);
  ~Cli();

  void flag(const std::string& names, const std::string& help);
  // fallback "": no default is shown.
  void text(const std::string& names, const std::string& value, const std::string& fallback,
            const std::string& help);
  void list(const std::string& names, const std::string& value,
            const std::string& help);  // repeatable, whole strings
  void choice(const std::string& names, const std::vector<std::string>& values,
              const std::string& help);  // [0]: default
  void integer(const std::string& names, int64_t fallback, int64_t low, int64_t high,
               const std::string& help);
  void real(const std::string& names, double fallback, double low, double high, const std::string& help);
  void positional(const std::string& name, const std::string& help, bool required = true);
  void device_options();    // --threads, --device, --cpu-level
  void cpu_level_option();  // --cpu-level alone; parse() puts it into effect

  // Adds -q, -v, --help, --version and parses. False: help or version was printed, the tool is done. Starts
  // the log. Throws Error(kUsage).
  bool parse(int argc, char** argv);

  bool given(const std::string& name) const;  // on the command line
  bool on(const std::string& name) const;
  const std::string& get(const std::string& name) const;  // text, choice, positional; "" where absent
  int64_t get_integer(const std::string& name) const;
  double get_real(const std::string& name) const;
  const std::vector<std::string>& get_list(const std::string& name) const;

 private:
  struct Option;
  struct Parser;
  void add(const std::string& names, const std::string& value, Option option, const std::string& help);
  const Option& find(const std::string& name) const;

  std::string tool_;
  std::unique_ptr<Parser> parser_;
  std::map<std::string, Option> options_;
  std::vector<std::string> positionals_;
};

// "1,8,32" as integers in [low, high]. Throws Error(kUsage) naming the option.
std::vector<int64_t> integer_list(const std::string& option, const std::string& text, int64_t low,
                                  int64_t high);

// Standard output: the product. Throws Error where a write fails, so that "> /dev/full" is never a success.
void out(std::string_view text);
void out_flush();

// Runs a tool: installs the signal handlers, calls body(argc, argv), flushes stdout; whatever is thrown
// becomes one line on stderr and an exit code. The only place where exceptions end.
int run_tool(const char* tool, int argc, char** argv, int (*body)(int, char**));

// SIGINT and SIGTERM end the process at once with 130 or 143, unless a Graceful lives: then the first one
// only sets stop_requested(), and the second ends it.
class Graceful {
 public:
  Graceful();
  ~Graceful();
  Graceful(const Graceful&) = delete;
  Graceful& operator=(const Graceful&) = delete;
};
int stop_requested();  // 0, or the exit code to leave with: 130, 143

}  // namespace q4s
