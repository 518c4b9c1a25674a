#include <doctest/doctest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <set>

#include "quant/self_writing.h"
#include "runtime/error.h"
#include "runtime/tokenizer.h"
#include "tests/quant/tiny_model.h"
#include "tests/shared_data.h"

using namespace q4s;

namespace {

std::string write_file(const std::string& name, const std::string& text) {
  const std::string path = std::filesystem::temp_directory_path() / (std::to_string(getpid()) + name);
  std::ofstream(path) << text;
  return path;
}

}  // namespace

TEST_CASE("documents: blank lines, else lines, or jsonl") {
  const std::string a = write_file("a.txt", "one\ntwo\n\n \n\nthree\r\nfour");
  CHECK(read_documents(a) == std::vector<std::string>{"one\ntwo", "three\nfour"});
  const std::string b = write_file("b.txt", "one\ntwo\nthree\n");
  CHECK(read_documents(b) == std::vector<std::string>{"one", "two", "three"});
  const std::string c = write_file("c.jsonl", "{\"text\": \"one\\n\"}\n\n{\"id\": 3, \"text\": \"two\"}\n");
  CHECK(read_documents(c) == std::vector<std::string>{"one\n", "two"});
  const std::string d = write_file("d.jsonl", "{\"text\": \"one\"}\n{\"body\": 1}\n");
  CHECK_THROWS_WITH_AS(read_documents(d), (d + ", line 2: expected an object with a \"text\"").c_str(),
                       Error);
  for (const std::string& p : {a, b, c, d}) std::filesystem::remove(p);
}

TEST_CASE("windows: a seeded choice without repeats; too little text says how much there is") {
  const std::string folder = test::shared_data("stories260K"),
                    text = test::shared_data("text/tinystories.txt");
  if (folder.empty() || text.empty()) return;
  const auto tokenizer = Tokenizer::from_folder(folder);
  const Calibration a = calibration_from_text(*tokenizer, text, 20, 64, 1);
  CHECK(a.tokens.size() == 20 * 64);
  CHECK(calibration_from_text(*tokenizer, text, 20, 64, 1).tokens == a.tokens);
  CHECK(calibration_from_text(*tokenizer, text, 20, 64, 2).tokens != a.tokens);
  const Calibration longer = calibration_from_text(*tokenizer, text, 30, 64, 1);
  CHECK(std::equal(a.tokens.begin(), a.tokens.end(), longer.tokens.begin()));
  CHECK(longer.hash != a.hash);
  std::set<std::vector<int32_t>> windows;
  for (int s = 0; s < 20; ++s) windows.emplace(a.tokens.begin() + s * 64, a.tokens.begin() + (s + 1) * 64);
  CHECK(windows.size() == 20);
  try {
    calibration_from_text(*tokenizer, text, 1 << 20, 64, 1);
    FAIL("accepted");
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::kInput);
    CHECK(std::string(e.what()).find("windows of 64, 1048576 are asked for") != std::string::npos);
  }
}

TEST_CASE("self-written text: from BOS, seeded, the same for every number of threads") {
  const std::string folder = test::shared_data("stories260K");
  if (folder.empty()) return;
  LlamaModel m = open_llama(folder);
  const auto write = [&](int threads, uint64_t seed) {
    const auto backend = make_cpu_backend(threads);
    int64_t last = 0;
    const Calibration c =
        calibration_self_written(m, *backend, 6, 24, seed, [&](int64_t done, int64_t total) {
          CHECK(total == 6 * 24);
          last = done;
        });
    CHECK(last == 6 * 24);
    return c;
  };
  const Calibration a = write(1, 5);
  for (int s = 0; s < 6; ++s) CHECK(a.tokens[s * 24] == m.tokenizer->bos_id());
  CHECK(std::set<int32_t>{a.tokens[1], a.tokens[25], a.tokens[49], a.tokens[73], a.tokens[97], a.tokens[121],
                          a.tokens[2], a.tokens[26], a.tokens[50]}
            .size() > 2);
  CHECK(write(3, 5).tokens == a.tokens);
  CHECK(write(1, 6).tokens != a.tokens);
}

TEST_CASE("self-written text: groups that overlap never meet in memory, and write the same") {
  for (const auto& [samples, lanes] : {std::pair<int64_t, int64_t>{7, 3}, {40, 5}, {6, 6}, {9, 1}}) {
    const WritingPlan p = WritingPlan::of(samples, lanes, true);
    CHECK(p.lanes * p.groups >= samples);
    for (int64_t g = 0; g < p.groups; ++g) {  // the units of the old group, both halves, and of the young
      std::set<int64_t> units;
      for (int64_t lane = 0; lane < p.lanes; ++lane) {
        CHECK(units.insert(p.slot(g, lane)).second);
        if (g == 0) continue;
        CHECK(units.insert(p.slot(g - 1, lane)).second);
        CHECK(units.insert(p.slot(g - 1, lane) + 1).second);
      }
      CHECK(*units.rbegin() <= p.slots());
      CHECK(int64_t(units.size()) == (g ? 3 : 1) * p.lanes);
    }
  }
  LlamaConfig seven;
  seven.layers = 32, seven.kv_heads = 32, seven.head_dim = 128;
  const WritingPlan p = writing_plan(seven, 512, 512);
  CHECK(p.overlaps);
  CHECK(p.steps(512) <= 5 * 512);
  seven.kv_heads = 8;
  CHECK(writing_plan(seven, 512, 512).steps(512) == 4 * 512);  // memory for 128 sequences

  const std::string folder = test::shared_data("stories260K");
  if (folder.empty()) return;
  LlamaModel m = open_llama(folder);
  const auto backend = make_cpu_backend(2);
  for (const int64_t length : {int64_t(1), int64_t(2), int64_t(24), int64_t(25)}) {
    const auto write = [&](const WritingPlan& how) {
      int64_t last = 0;
      const auto progress = [&](int64_t done, int64_t) { last = done; };
      const Calibration c = calibration_self_written(m, *backend, 7, length, 5, progress, how);
      CHECK(last == 7 * length);
      return c.tokens;
    };
    const std::vector<int32_t> plain = write(WritingPlan::of(7, 7, false));
    CHECK(write(WritingPlan::of(7, 3, false)) == plain);
    if (length > 2) {
      CHECK(write(WritingPlan::of(7, 3, true)) == plain);
      CHECK(write(WritingPlan::of(7, 2, true)) == plain);
    }
  }
}
