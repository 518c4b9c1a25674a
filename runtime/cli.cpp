#include "runtime/cli.h"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <cxxopts.hpp>
#include <new>

#include "kernels/cpu_features.h"
#include "runtime/error.h"
#include "runtime/log.h"

namespace q4s {
namespace {

[[noreturn]] void usage(const std::string& text) { throw Error(ErrorKind::kUsage, text); }

int64_t to_integer(const std::string& option, const std::string& text, int64_t low, int64_t high) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < low || value > high)
    usage(strprintf("--%s: expected an integer from %lld to %lld, got \"%s\"", option.c_str(), (long long)low,
                    (long long)high, text.c_str()));
  return value;
}

double to_real(const std::string& option, const std::string& text, double low, double high) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !(value >= low && value <= high))
    usage(strprintf("--%s: expected a number from %g to %g, got \"%s\"", option.c_str(), low, high,
                    text.c_str()));
  return value;
}

void choose_cpu_level(const std::string& name) {
  for (const CpuLevel level : {CpuLevel::kPortable, CpuLevel::kAvx2, CpuLevel::kAvx512}) {
    if (name != cpu_level_name(level)) continue;
    if (level > best_cpu_level()) usage("--cpu-level: this machine has no " + name);
    set_cpu_level(level);
  }
}

// Long name of "c,ctx-size".
std::string long_name(const std::string& names) { return names.substr(names.find(',') + 1); }

std::atomic<int> graceful{0}, requested{0};

void on_signal(int signal) {
  const int code = 128 + signal;
  if (graceful.load() == 0 || requested.exchange(code) != 0) _exit(code);
}

void install_signals() {
  // A closed standard stream must not hand its number to the next file opened.
  for (int fd = 0; fd < 3; ++fd)
    if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd == 0 ? O_RDONLY : fd == 1 ? O_RDONLY : O_WRONLY) != fd)
      _exit(1);
  struct sigaction action {};
  action.sa_handler = on_signal;  // no SA_RESTART: a read of a prompt returns
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  signal(SIGPIPE, SIG_DFL);  // the reader is gone: end quietly
  signal(SIGXFSZ, SIG_IGN);  // a file grew past ulimit -f: the write fails with EFBIG, which says which file
}

}  // namespace

struct Cli::Option {
  enum Kind { kFlag, kText, kList, kChoice, kInteger, kReal } kind = kText;
  double real_low = 0, real_high = 0, real = 0;
  int64_t low = 0, high = 0, integer = 0;
  std::vector<std::string> values;  // kChoice: allowed; kList: given
  std::string text;
  bool given = false, required = false;
};

struct Cli::Parser {
  cxxopts::Options options;
  std::vector<std::string> positional_help;
};

Cli::Cli(const std::string& tool, const std::string& synopsis, const std::string& about)
    : tool_(tool), parser_(new Parser{cxxopts::Options(tool, about), {}}) {
  parser_->options.custom_help(synopsis).positional_help("").set_width(120);
}
Cli::~Cli() = default;

void Cli::add(const std::string& names, const std::string& value, Option option, const std::string& help) {
  std::shared_ptr<cxxopts::Value> holder;
  if (option.kind == Option::kFlag) {
    holder = cxxopts::value<bool>();
  } else {
    holder = cxxopts::value<std::string>();
    if (!option.text.empty()) holder->default_value(option.text);
  }
  parser_->options.add_options()(names, help, holder, value);
  options_[long_name(names)] = std::move(option);
}

void Cli::flag(const std::string& names, const std::string& help) {
  Option option;
  option.kind = Option::kFlag;
  add(names, "", option, help);
}
void Cli::text(const std::string& names, const std::string& value, const std::string& fallback,
               const std::string& help) {
  Option option;
  option.text = fallback;
  add(names, value, option, help);
}
void Cli::list(const std::string& names, const std::string& value, const std::string& help) {
  Option option;
  option.kind = Option::kList;
  add(names, value, option, help);
}
void Cli::choice(const std::string& names, const std::vector<std::string>& values, const std::string& help) {
  Option option;
  option.kind = Option::kChoice;
  option.values = values;
  option.text = values.at(0);
  std::string all = values[0];
  for (size_t i = 1; i < values.size(); ++i) all += "|" + values[i];
  add(names, all, option, help);
}
void Cli::integer(const std::string& names, int64_t fallback, int64_t low, int64_t high,
                  const std::string& help) {
  Option option;
  option.kind = Option::kInteger;
  option.low = low;
  option.high = high;
  option.integer = fallback;
  option.text = std::to_string(fallback);
  add(names, "N", option, help);
}
void Cli::real(const std::string& names, double fallback, double low, double high, const std::string& help) {
  Option option;
  option.kind = Option::kReal;
  option.real_low = low;
  option.real_high = high;
  option.real = fallback;
  option.text = strprintf("%g", fallback);
  add(names, "X", option, help);
}
void Cli::positional(const std::string& name, const std::string& help, bool required) {
  Option option;
  option.required = required;
  parser_->positional_help.push_back(strprintf("  %-10s %s\n", name.c_str(), help.c_str()));
  parser_->options.add_options("positional")(name, help, cxxopts::value<std::string>());
  options_[name] = option;
  positionals_.push_back(name);
}

void Cli::device_options() {
  integer("t,threads", 0, 0, 1024, "CPU threads, 0: all usable cores");
  text("device", "auto|cpu|cuda|cuda:N", "auto", "where to run; auto takes a GPU where one is usable");
  cpu_level_option();
}

void Cli::cpu_level_option() {
  choice("cpu-level", {"auto", "avx512", "avx2", "portable"}, "widest CPU instructions to use");
}

bool Cli::parse(int argc, char** argv) {
  flag("q,quiet", "warnings and errors only");
  flag("v,verbose", "say more");
  flag("version", "print the version");
  flag("h,help", "print this");
  parser_->options.parse_positional(positionals_);
  try {
    const cxxopts::ParseResult result = parser_->options.parse(argc, argv);
    if (result.count("help")) {
      std::string help = parser_->options.help({""});
      std::string arguments;
      for (const std::string& line : parser_->positional_help) arguments += line;
      out(help + (arguments.empty() ? "" : "\n" + arguments));
      out_flush();
      return false;
    }
    if (result.count("version")) {
      out(tool_ + " (q4s) " Q4S_VERSION "\n");
      out_flush();
      return false;
    }
    if (!result.unmatched().empty()) usage("unexpected argument \"" + result.unmatched()[0] + "\"");
    for (const cxxopts::KeyValue& argument : result.arguments()) {
      Option& option = options_.at(argument.key());
      option.given = true;
      if (option.kind == Option::kList) option.values.push_back(argument.value());
      option.text = argument.value();
    }
  } catch (const cxxopts::exceptions::exception& e) {
    usage(e.what());
  }
  log_init(tool_, on("quiet") ? LogLevel::kQuiet : on("verbose") ? LogLevel::kVerbose : LogLevel::kNormal);
  for (auto& [name, option] : options_) {
    if (option.kind == Option::kInteger && option.given)
      option.integer = to_integer(name, option.text, option.low, option.high);
    if (option.kind == Option::kReal && option.given)
      option.real = to_real(name, option.text, option.real_low, option.real_high);
    if (option.kind == Option::kChoice &&
        std::find(option.values.begin(), option.values.end(), option.text) == option.values.end()) {
      std::string all;
      for (const std::string& value : option.values) all += (all.empty() ? "" : ", ") + value;
      usage("--" + name + ": expected one of " + all + ", got \"" + option.text + "\"");
    }
  }
  if (options_.count("cpu-level")) choose_cpu_level(get("cpu-level"));
  for (const std::string& name : positionals_)
    if (options_.at(name).required && !given(name)) usage(name + " is missing; see --help");
  return true;
}

const Cli::Option& Cli::find(const std::string& name) const { return options_.at(name); }
bool Cli::given(const std::string& name) const { return find(name).given; }
bool Cli::on(const std::string& name) const { return find(name).given && find(name).text != "false"; }
const std::string& Cli::get(const std::string& name) const { return find(name).text; }
int64_t Cli::get_integer(const std::string& name) const { return find(name).integer; }
double Cli::get_real(const std::string& name) const { return find(name).real; }
const std::vector<std::string>& Cli::get_list(const std::string& name) const { return find(name).values; }

std::vector<int64_t> integer_list(const std::string& option, const std::string& text, int64_t low,
                                  int64_t high) {
  std::vector<int64_t> values;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    values.push_back(to_integer(option, text.substr(begin, end - begin), low, high));
    begin = end + 1;
  }
  return values;
}

namespace {
[[noreturn]] void output_failed() {
  const int error = errno;
  throw Error(error == ENOSPC || error == EFBIG ? ErrorKind::kResource : ErrorKind::kRuntime,
              strprintf("cannot write to standard output: %s", std::strerror(error)));
}
}  // namespace

void out(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size()) output_failed();
}
void out_flush() {
  if (std::fflush(stdout) != 0) output_failed();
}

namespace {
int failed(ErrorKind kind, const char* text) {
  std::fflush(stdout);  // what was said before comes before
  log_status("");
  log_error("%s", text);
  return int(kind);
}
}  // namespace

int run_tool(const char* tool, int argc, char** argv, int (*body)(int, char**)) {
  install_signals();
  log_init(tool, LogLevel::kNormal);
  try {
    const int code = body(argc, argv);
    out_flush();
    return code;
  } catch (const Error& e) {
    return failed(e.kind(), e.what());
  } catch (const std::bad_alloc&) {
    return failed(ErrorKind::kResource, "out of memory");
  } catch (const std::exception& e) {
    return failed(ErrorKind::kRuntime, e.what());
  }
}

Graceful::Graceful() { ++graceful; }
Graceful::~Graceful() { --graceful; }
int stop_requested() { return requested.load(); }

}  // namespace q4s
