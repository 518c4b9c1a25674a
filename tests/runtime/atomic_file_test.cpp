#include "runtime/atomic_file.h"

#include <doctest/doctest.h>

#include "runtime/error.h"
#include "tests/runtime/test_files.h"

namespace q4s {
namespace {

namespace fs = std::filesystem;
using test::read_file;
using test::TempFolder;
using test::write_file;

TEST_CASE("atomic file: nothing at the target before commit, nothing left without it") {
  TempFolder dir;
  const std::string path = dir / "report.json";
  {
    AtomicFile file(path, false);
    file.write("half");
  }
  CHECK(fs::is_empty(dir.path()));
  AtomicFile file(path, false);
  file.write("{");
  file.write("}");
  CHECK_FALSE(fs::exists(path));
  file.commit();
  CHECK(read_file(path) == "{}");
  CHECK(std::distance(fs::directory_iterator(dir.path()), fs::directory_iterator()) == 1);
}

TEST_CASE("check output: what may not be written is refused as a usage error") {
  TempFolder dir;
  const auto refused = [](const std::string& path, bool force, const std::vector<std::string>& inputs,
                          const std::string& why) {
    try {
      check_output(path, force, inputs);
      FAIL("taken: " << path);
    } catch (const Error& e) {
      CHECK(e.kind() == ErrorKind::kUsage);
      INFO(e.what());
      CHECK(std::string(e.what()).starts_with(path + ": "));
      CHECK(std::string(e.what()).find(why) != std::string::npos);
    }
  };
  check_output(dir / "new", false);
  write_file(dir / "old", "x");
  refused(dir / "old", false, {}, "exists");
  check_output(dir / "old", true);
  refused(dir / "none/x", true, {}, "its folder cannot be used: No such file or directory");
  refused(dir / "old/x", true, {}, "is not a folder");
  refused(dir.path(), true, {}, "is a directory");
  refused("/dev/null", true, {}, "is not a regular file");
  fs::create_symlink(dir / "old", dir / "link");
  refused(dir / "link", true, {dir / "other", dir / "old"}, "is the input");
  refused("", true, {}, "empty");
}

TEST_CASE("output file: parts larger than the buffer, rewriting and cutting") {
  TempFolder dir;
  std::string big(3 << 20, 'a');
  OutputFile file(dir / "x", false);
  file.write("123", 3);
  file.write(big.data(), big.size());
  file.rewrite(1, "xy", 2);
  CHECK(file.position() == big.size() + 3);
  file.cut(5);
  file.write("end", 3);
  file.sync();
  CHECK(read_file(dir / "x") == "1xyaaend");
  CHECK(file.lock());
  OutputFile second(dir / "x", true);
  CHECK(second.position() == 8);
  CHECK_FALSE(second.lock());
}

}  // namespace
}  // namespace q4s
