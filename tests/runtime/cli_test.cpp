// Options of the tools as values; their behaviour as processes (streams, signals, exit codes) is
// tests/tools'.
#include "runtime/cli.h"

#include <doctest/doctest.h>

#include "kernels/cpu_features.h"
#include "runtime/error.h"
#include "runtime/log.h"
#include "runtime/progress.h"

using namespace q4s;

namespace {

struct Parsed {
  Cli cli{"tool", "FILE [OPTIONS]", "A tool."};
  explicit Parsed(std::vector<const char*> arguments) {
    cli.positional("FILE", "a file");
    cli.positional("TEXT", "another", false);
    cli.integer("c,ctx-size", 4096, 0, 1000000, "context");
    cli.real("temp", 0.8, 0, 100, "temperature");
    cli.list("stop", "STR", "stop strings");
    cli.choice("protocol", {"gptq", "llamacpp"}, "which");
    cli.flag("json", "JSON");
    cli.device_options();
    arguments.insert(arguments.begin(), "tool");
    cli.parse(int(arguments.size()), const_cast<char**>(arguments.data()));
  }
};

std::string usage_of(std::vector<const char*> arguments) {
  try {
    Parsed parsed(std::move(arguments));
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::kUsage);
    return e.what();
  }
  return "accepted";
}

}  // namespace

TEST_CASE("defaults and given values") {
  Parsed none({"a.q4s"});
  CHECK(none.cli.get("FILE") == "a.q4s");
  CHECK(none.cli.get("TEXT") == "");
  CHECK_FALSE(none.cli.given("TEXT"));
  CHECK(none.cli.get_integer("ctx-size") == 4096);
  CHECK(none.cli.get_real("temp") == 0.8);
  CHECK(none.cli.get("protocol") == "gptq");
  CHECK(none.cli.get_list("stop").empty());
  CHECK_FALSE(none.cli.on("json"));
  CHECK(none.cli.get("device") == "auto");

  Parsed all({"-c", "12", "x,y", "--temp=0", "--stop", "a,b", "--stop", "\n\n", "--json", "--protocol",
              "llamacpp", "t"});
  CHECK(all.cli.get("FILE") == "x,y");  // commas split nothing
  CHECK(all.cli.get("TEXT") == "t");
  CHECK(all.cli.get_integer("ctx-size") == 12);
  CHECK(all.cli.given("ctx-size"));
  CHECK(all.cli.get_real("temp") == 0);
  CHECK(all.cli.get_list("stop") == std::vector<std::string>{"a,b", "\n\n"});
  CHECK(all.cli.on("json"));
  CHECK(all.cli.get("protocol") == "llamacpp");
}

TEST_CASE("what is out of range or unknown is a usage error that names the option") {
  CHECK(usage_of({"f", "-c", "-5"}) == "--ctx-size: expected an integer from 0 to 1000000, got \"-5\"");
  CHECK(usage_of({"f", "-c", "7x"}).find("ctx-size") != std::string::npos);
  CHECK(usage_of({"f", "-c", ""}).find("ctx-size") != std::string::npos);
  CHECK(usage_of({"f", "-c", "99999999999999999999"}).find("ctx-size") != std::string::npos);
  CHECK(usage_of({"f", "-t", "1e9"}).find("threads") != std::string::npos);
  CHECK(usage_of({"f", "--temp", "nan"}).find("temp") != std::string::npos);
  CHECK(usage_of({"f", "--temp", "inf"}).find("temp") != std::string::npos);
  CHECK(usage_of({"f", "--protocol", "x"}).find("gptq, llamacpp") != std::string::npos);
  CHECK(usage_of({"f", "--nonsense"}).find("nonsense") != std::string::npos);
  CHECK(usage_of({"f", "--temp"}).find("temp") != std::string::npos);
  CHECK(usage_of({"f", "t", "u"}).find("\"u\"") != std::string::npos);
  CHECK(usage_of({}).find("FILE is missing") != std::string::npos);
}

TEST_CASE("--cpu-level takes effect") {
  Parsed narrow({"f", "--cpu-level", "portable"});
  CHECK(cpu_level() == CpuLevel::kPortable);
  set_cpu_level(best_cpu_level());
  Parsed widest({"f"});
  CHECK(cpu_level() == best_cpu_level());
}

TEST_CASE("integer lists") {
  CHECK(integer_list("p", "1,8,32", 0, 100) == std::vector<int64_t>{1, 8, 32});
  CHECK(integer_list("p", "7", 0, 100) == std::vector<int64_t>{7});
  for (const char* bad : {"", "1,", ",1", "1,,2", "101", "-1", "a"})
    CHECK_THROWS_AS(integer_list("p", bad, 0, 100), Error);
}

TEST_CASE("texts for people") {
  CHECK(duration_text(0.85) == "850 ms");
  CHECK(duration_text(12.34) == "12.3 s");
  CHECK(duration_text(80) == "1m20s");
  CHECK(duration_text(7500) == "2h05m");
  CHECK(bytes_text(999) == "999 B");
  CHECK(bytes_text(93.1e6) == "93.1 MB");
  CHECK(printable("a\x1b[31m\n\tb\x7f\xc3\xa9") == "a\\x1b[31m\n\tb\\x7f\xc3\xa9");
  CHECK(strprintf("%s %d", "x", 5) == "x 5");
}
