#include "runtime/q4s_writer.h"

#include <doctest/doctest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "runtime/error.h"
#include "tests/runtime/q4s_sample.h"
#include "tests/runtime/test_files.h"

namespace q4s {
namespace {

using test::read_file;
using test::Sample;
using test::TempFolder;
using test::write_file;
namespace fs = std::filesystem;

template <class F>
std::string error_of(ErrorKind kind, F&& f) {
  try {
    f();
  } catch (const Error& e) {
    CHECK(e.kind() == kind);
    return e.what();
  }
  FAIL("no error");
  return "";
}

bool has(const std::string& text, const std::string& part) {
  INFO(text);
  CHECK(text.find(part) != std::string::npos);
  return true;
}

size_t files_in(const TempFolder& dir) {
  return size_t(std::distance(fs::directory_iterator(dir.path()), fs::directory_iterator()));
}

// A run of the quantiser in small: a checkpoint after each tensor, going on where there is something to go on
// from. `stop` tensors in, it leaves without finishing.
size_t run(const std::string& path, const std::string& key, size_t stop = 99) {
  const Sample sample;
  Q4sWriter writer(path, {.resume = true, .key = key, .inputs = {}});
  const size_t kept = writer.kept().size();
  CHECK(writer.notes().size() == kept);
  for (const Q4sTensor& t : writer.kept()) {
    CHECK(writer.find_kept(t.name) == &t);
    CHECK(t.view.n * t.view.k > 0);
  }
  for (size_t i = kept; i < Sample::tensors().size(); ++i) {
    if (i == stop) return kept;
    const auto& [name, format] = Sample::tensors()[i];
    writer.add_tensor(name, sample.view(format));
    writer.checkpoint("note\n" + name);
  }
  sample.write_rest(writer);
  return kept;
}

TEST_CASE("q4s writer: the same calls make the same bytes, and leave one file") {
  TempFolder dir;
  Sample().write(dir / "a");
  Sample().write(dir / "b");
  CHECK(read_file(dir / "a") == read_file(dir / "b"));
  CHECK(files_in(dir) == 2);
}

TEST_CASE("q4s writer: refusals before anything is written") {
  TempFolder dir;
  Sample().write(dir / "out");
  const std::string before = read_file(dir / "out");
  has(error_of(ErrorKind::kUsage, [&] { Q4sWriter w(dir / "out"); }), "exists; --force overwrites it");
  has(error_of(ErrorKind::kUsage, [&] { Q4sWriter w(dir / "none/out"); }), "its folder cannot be used");
  has(error_of(ErrorKind::kUsage, [&] { Q4sWriter w(dir.path(), {.force = true, .key = "", .inputs = {}}); }),
      "is a directory");
  fs::create_hard_link(dir / "out", dir / "link");
  has(error_of(ErrorKind::kUsage,
               [&] { Q4sWriter w(dir / "link", {.force = true, .key = "", .inputs = {dir / "out"}}); }),
      "is the input");
  CHECK(read_file(dir / "out") == before);
  CHECK(files_in(dir) == 2);
  Sample().write(dir / "out", {.force = true, .key = "", .inputs = {}});
  CHECK(read_file(dir / "out") == before);
}

TEST_CASE("q4s writer: abandoned without a checkpoint leaves nothing, and the old file as it was") {
  TempFolder dir;
  write_file(dir / "out", "old");
  {
    Q4sWriter writer(dir / "out", {.force = true, .key = "", .inputs = {}});
    writer.add_tensor("t", Sample().view(Format::kF32));
  }
  CHECK(files_in(dir) == 1);
  CHECK(read_file(dir / "out") == "old");
}

TEST_CASE("q4s writer: disk full at any moment: kResource, no temporary, the old file intact") {
  signal(SIGXFSZ, SIG_IGN);
  rlimit before;
  getrlimit(RLIMIT_FSIZE, &before);
  TempFolder dir;
  Sample().write(dir / "whole");
  const auto all = fs::file_size(dir / "whole");
  for (const uint64_t most :
       {uint64_t(0), uint64_t(100), uint64_t(4096), uint64_t(9000), uint64_t(all - 1)}) {
    for (const bool checkpoints : {false, true}) {
      write_file(dir / "out", "old");
      const rlimit limit{most, before.rlim_max};
      std::string text;
      {
        setrlimit(RLIMIT_FSIZE, &limit);
        try {
          Q4sWriter writer(dir / "out", {.force = true, .key = "k", .inputs = {}});
          for (const auto& [name, format] : Sample::tensors()) {
            writer.add_tensor(name, Sample().view(format));
            if (checkpoints) writer.checkpoint("");
          }
          Sample().write_rest(writer);
        } catch (const Error& e) {
          text = e.what();
          CHECK(e.kind() == ErrorKind::kResource);
        }
        setrlimit(RLIMIT_FSIZE, &before);
      }
      CAPTURE(most);
      has(text, "out.partial");
      has(text, "File too large");
      CHECK(read_file(dir / "out") == "old");
      CHECK(files_in(dir) == 2);
    }
  }
  signal(SIGXFSZ, SIG_DFL);
}

TEST_CASE("q4s writer: interrupted after any checkpoint and resumed: the bytes of an unbroken run") {
  TempFolder dir;
  Sample().write(dir / "whole");
  const std::string want = read_file(dir / "whole");
  for (size_t stop = 0; stop < 5; ++stop) {
    const std::string out = dir / ("out" + std::to_string(stop));
    CHECK(run(out, "key", stop) == 0);
    CHECK_FALSE(fs::exists(out));
    CHECK(fs::exists(out + ".partial") == (stop > 0));
    CHECK(run(out, "key") == stop);
    CHECK(read_file(out) == want);
    CHECK_FALSE(fs::exists(out + ".partial"));
    CHECK_FALSE(fs::exists(out + ".partial.journal"));
  }
}

TEST_CASE("q4s writer: killed with SIGKILL and resumed: the bytes of an unbroken run") {
  TempFolder dir;
  Sample().write(dir / "whole");
  const std::string out = dir / "out";
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {  // no doctest in here
    const Sample sample;
    Q4sWriter writer(out, {.key = "key", .inputs = {}});
    for (size_t i = 0; i < 3; ++i) {
      const auto& [name, format] = Sample::tensors()[i];
      writer.add_tensor(name, sample.view(format));
      if (i < 2) writer.checkpoint("note\n" + name);
    }
    kill(getpid(), SIGKILL);
  }
  int status;
  waitpid(child, &status, 0);
  CHECK(WIFSIGNALED(status));
  CHECK_FALSE(fs::exists(out));
  has(error_of(ErrorKind::kUsage, [&] { Q4sWriter w(out); }), "unfinished work of an interrupted run");
  CHECK(run(out, "key") == 2);
  CHECK(read_file(out) == read_file(dir / "whole"));
}

TEST_CASE("q4s writer: journal or data torn at any byte: resumed from what is whole") {
  TempFolder dir;
  Sample().write(dir / "whole");
  const std::string want = read_file(dir / "whole"), out = dir / "out";
  run(out, "key", 3);
  const std::string data = read_file(out + ".partial"), journal = read_file(out + ".partial.journal");
  size_t last = 0;
  const auto resumed = [&](const std::string& d, const std::string& j) {
    write_file(out + ".partial", d);
    write_file(out + ".partial.journal", j);
    const size_t kept = run(out, "key");
    CHECK(read_file(out) == want);
    fs::remove(out);
    return kept;
  };
  for (size_t size = 1; size <= journal.size(); ++size) {
    CAPTURE(size);
    const size_t kept = resumed(data, journal.substr(0, size));
    CHECK(kept >= last);
    last = kept;
  }
  CHECK(last == 3);
  CHECK(resumed(data + "garbage after the checkpoint", journal + "note 5 torn") == 3);
  for (const size_t size : {size_t(1), size_t(4096), size_t(8192), data.size() - 1}) {
    CHECK(resumed(data.substr(0, size), journal) < 3);
  }
  std::string flipped = data;
  flipped[8192] ^= 1;  // in the second tensor
  CHECK(resumed(flipped, journal) == 1);
}

TEST_CASE("q4s writer: work of another key is refused, force starts anew") {
  TempFolder dir;
  const std::string out = dir / "out";
  run(out, "group 128", 3);
  const std::string text = error_of(
      ErrorKind::kUsage, [&] { Q4sWriter w(out, {.resume = true, .key = "group 32", .inputs = {}}); });
  has(text, "then: group 128");
  has(text, "now:  group 32");
  CHECK(fs::exists(out + ".partial"));
  Sample().write(out, {.force = true, .key = "group 32", .inputs = {}});
  Sample().write(dir / "whole");
  CHECK(read_file(out) == read_file(dir / "whole"));
  CHECK(files_in(dir) == 2);
}

TEST_CASE("q4s writer: two writers of one file") {
  TempFolder dir;
  Q4sWriter first(dir / "out");
  has(error_of(ErrorKind::kUsage, [&] { Q4sWriter w(dir / "out"); }), "another process is writing it");
  Sample().write_rest(first);
  CHECK(Q4sFile::open(dir / "out").tensors().empty());
}

}  // namespace
}  // namespace q4s
