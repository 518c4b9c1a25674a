// A checkpoint through the tools: quantised, looked at, run, measured; interrupted and resumed; spoiled.
#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>
#include <thread>

#include "tests/shared_data.h"
#include "tests/tools/process.h"
#include "tests/tools/tiny_model.h"

using namespace q4s::test;
using nlohmann::json;

namespace {

std::vector<std::string> quantise(const std::string& model, const std::string& out,
                                  std::vector<std::string> more = {}) {
  more.insert(more.begin(), {tool("llama-quant"), model, out, "--samples", "8", "--seq-len", "48", "-q"});
  return more;
}

// A tiny model with enough blocks that a kill falls between two of them.
std::string deep_model(const TempFolder& dir) {
  TinyModel tiny;
  tiny.layers = 12;
  tiny.dim = 64, tiny.hidden = 172;
  tiny.write_gguf(dir / "deep.gguf");
  return dir / "deep.gguf";
}

std::string all_text(const Finished& f) { return f.out + f.err; }

}  // namespace

TEST_CASE("quantise, show, verify, run, measure; the same bytes twice and with any thread count") {
  TempFolder dir;
  TinyModel().write_folder(dir / "model");
  const std::string model = dir / "model", out = dir / "a.q4s";
  const Finished made = run(quantise(model, out));
  CAPTURE(made.err);
  REQUIRE(made.code == 0);
  CHECK(made.out == "");
  CHECK(made.err == "");
  REQUIRE(run(quantise(model, dir / "b.q4s", {"-t", "1"})).code == 0);
  REQUIRE(run(quantise(model, dir / "c.q4s", {"-t", "3"})).code == 0);
  CHECK(read_file(dir / "a.q4s") == read_file(dir / "b.q4s"));
  CHECK(read_file(dir / "a.q4s") == read_file(dir / "c.q4s"));
  REQUIRE(run(quantise(model, dir / "d.q4s", {"--seed", "1"})).code == 0);
  CHECK(read_file(dir / "a.q4s") != read_file(dir / "d.q4s"));

  const Finished shown = run({tool("llama-quant"), "--show", out});
  CHECK(shown.code == 0);
  CHECK(contains(shown.out, "blk.1.down"));
  CHECK(run({tool("llama-quant"), "--verify", out}).code == 0);

  const auto text = [&](const char* threads) {
    const Finished f = run(
        {tool("llama-run"), out, "-p", "hello", "-n", "30", "-s", "1", "-q", "-t", threads, "--ignore-eos"});
    CHECK(f.code == 0);
    return f.out;
  };
  CHECK(text("1") == text("2"));
  std::string words;
  for (int i = 0; i < 200; ++i) words += "hello " + std::to_string(i * i) + "\n";
  write_file(dir / "text", words);
  const Finished ppl = run({tool("llama-ppl"), out, dir / "text", "-c", "32", "--json", "--kl-ref", model});
  REQUIRE(ppl.code == 0);
  CHECK(json::parse(ppl.out)["kl_mean"] > 0);
  CHECK(json::parse(ppl.out)["kl_mean"] < 1);
}

TEST_CASE("stories260K: GPTQ beats rounding, and the packed file writes its story") {
  const std::string model = shared_data("stories260K"), text = shared_data("text/tinystories.txt");
  if (model.empty() || text.empty()) return;
  TempFolder dir;
  REQUIRE(
      run({tool("llama-quant"), model, dir / "gptq.q4s", "--samples", "64", "--seq-len", "128", "-q"}).code ==
      0);
  REQUIRE(run({tool("llama-quant"), model, dir / "rtn.q4s", "--rtn", "-q"}).code == 0);
  const auto measure = [&](const std::string& file) {
    const Finished f = run({tool("llama-ppl"), file, text, "--protocol", "llamacpp", "-c", "128", "--chunks",
                            "100", "--json", "--kl-ref", model});
    REQUIRE(f.code == 0);
    return json::parse(f.out);
  };
  const json gptq = measure(dir / "gptq.q4s"), rtn = measure(dir / "rtn.q4s");
  MESSAGE("KL: GPTQ " << gptq["kl_mean"] << ", rounding " << rtn["kl_mean"] << "; PPL " << gptq["ppl"] << ", "
                      << rtn["ppl"] << ", source " << gptq["ref_ppl"]);
  CHECK(gptq["kl_mean"].get<double>() < rtn["kl_mean"].get<double>());
  const Finished story =
      run({tool("llama-run"), dir / "gptq.q4s", "-p", "Once upon a time", "-n", "40", "-q", "--temp", "0"});
  CHECK(story.code == 0);
  CHECK(contains(story.out, "Once upon a time, there was a little girl named"));
}

TEST_CASE("killed at any moment: the old file or none; resumed, the same bytes as unbroken") {
  TempFolder dir;
  const std::string model = deep_model(dir), out = dir / "out.q4s";
  REQUIRE(run(quantise(model, dir / "unbroken.q4s")).code == 0);
  const std::string unbroken = read_file(dir / "unbroken.q4s");
  int killed = 0;
  bool late = false;  // killed when the file was there already
  for (int attempt = 0; !late; ++attempt) {
    REQUIRE(attempt < 200);
    // Each attempt gets a little further than the one before at least now and then.
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(40 + 30 * attempt);
    const Finished f = run(quantise(model, out, {"--resume"}), {.watch = [&](pid_t pid, const std::string&) {
                             if (std::chrono::steady_clock::now() > deadline) kill(pid, SIGKILL);
                           }});
    if (f.code == 0) break;
    CAPTURE(f.err);
    CHECK(f.code == -SIGKILL);
    late = std::filesystem::exists(out);
    ++killed;
  }
  CHECK(killed > 0);
  CHECK(read_file(out) == unbroken);
  const std::string shown = run({tool("llama-quant"), "--show", out}).out;  // of the whole default stack
  for (const char* part : {"coupling", "dither", "rotation", "order"})
    CHECK(contains(shown, "\"" + std::string(part) + "\":true"));
  CHECK(run({tool("llama-quant"), "--verify", out}).code == 0);
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(dir.path())) files += entry.is_regular_file();
  CHECK((files == 3 || late));  // the model, two results: nothing left over
}

TEST_CASE("Ctrl-C while quantising: 130 and a state to go on from") {
  TempFolder dir;
  const std::string model = deep_model(dir), out = dir / "out.q4s";
  bool sent = false;
  const Finished f = run(quantise(model, out), {.watch = [&](pid_t pid, const std::string&) {
                           if (!sent && std::filesystem::exists(out + ".partial.journal"))
                             sent = kill(pid, SIGINT) == 0;
                         }});
  CAPTURE(f.err);
  CHECK(f.code == 130);
  CHECK_FALSE(std::filesystem::exists(out));
  CHECK(run(quantise(model, out)).code == 2);  // unfinished work is neither dropped nor taken up unasked
  CHECK(run(quantise(model, out, {"--resume"})).code == 0);
  REQUIRE(run(quantise(model, dir / "unbroken.q4s")).code == 0);
  CHECK(read_file(out) == read_file(dir / "unbroken.q4s"));
}

TEST_CASE("outputs: never over a file unasked, never over the input, never half") {
  TempFolder dir;
  TinyModel().write_gguf(dir / "model.gguf");
  const std::string model = dir / "model.gguf", out = dir / "out.q4s", before = read_file(model);
  write_file(out, "precious");
  const Finished exists = run(quantise(model, out));
  CHECK(exists.code == 2);
  CHECK(contains(exists.err, "out.q4s"));
  CHECK(read_file(out) == "precious");
  CHECK(run(quantise(model, out, {"--force"})).code == 0);
  CHECK(run({tool("llama-quant"), "--verify", out}).code == 0);
  std::filesystem::create_hard_link(model, dir / "link.q4s");
  for (const std::string& itself : {model, dir / "link.q4s"}) {
    CHECK(run(quantise(model, itself, {"--force"})).code == 2);
    CHECK(read_file(model) == before);
  }
  const Finished nowhere = run(quantise(model, dir / "no/where/out.q4s"));
  CHECK(nowhere.code != 0);
  CHECK(contains(nowhere.err, "where"));
}

TEST_CASE("a file size limit is like a full disk: 4, the file named, nothing half left") {
  TempFolder dir;
  TinyModel().write_gguf(dir / "model.gguf");
  const Finished f = run({"/bin/sh", "-c",
                          "ulimit -f 8; exec '" + tool("llama-quant") + "' '" + (dir / "model.gguf") + "' '" +
                              (dir / "out.q4s") + "' --samples 2 --seq-len 16 -q"});
  CAPTURE(f.err);
  CHECK(f.code == 4);
  CHECK(contains(f.err, "out.q4s"));
  CHECK(contains(f.err, "File too large"));
  CHECK_FALSE(std::filesystem::exists(dir / "out.q4s"));
}

TEST_CASE("a .q4s file spoiled: cut, a bit flipped, a header that lies") {
  TempFolder dir;
  TinyModel().write_gguf(dir / "model.gguf");
  REQUIRE(run(quantise(dir / "model.gguf", dir / "good.q4s")).code == 0);
  const std::string good = read_file(dir / "good.q4s"), bad = dir / "bad.q4s";
  const auto run_bad = [&] { return run({tool("llama-run"), bad, "-p", "x", "-n", "1"}); };
  for (size_t size = 1; size < good.size(); size += good.size() / 13 + 1) {
    write_file(bad, good.substr(0, size));
    const Finished f = run_bad();
    CAPTURE(size);
    CAPTURE(f.err);
    CHECK(f.code == 3);
    CHECK(contains(f.err, "bad.q4s"));
  }
  for (const size_t at :
       {size_t(0), size_t(5), size_t(9), size_t(20), size_t(28), size_t(35), good.size() - 1}) {
    std::string text = good;
    text[at] ^= 0x10;
    write_file(bad, text);
    CHECK(run_bad().code == 3);
  }
  // A bit of a tensor: found by --verify, which names it.
  std::string text = good;
  text[good.size() - good.size() / 3] ^= 1;
  write_file(bad, text);
  const Finished found = run({tool("llama-quant"), "--verify", bad});
  CHECK(found.code == 3);
  CHECK(contains(all_text(found), "blk."));
}

TEST_CASE("what cannot be quantised is refused before any work") {
  TempFolder dir;
  TinyModel tiny;
  tiny.first_weight = std::nanf("");
  tiny.write_gguf(dir / "nan.gguf");
  const Finished nan = run(quantise(dir / "nan.gguf", dir / "out.q4s"));
  CHECK(nan.code == 3);
  CHECK(contains(nan.err, "embed"));
  TinyModel().write_gguf(dir / "good.gguf");
  write_file(dir / "few.txt", "hello");
  const Finished few = run(quantise(dir / "good.gguf", dir / "out.q4s", {"--calib", dir / "few.txt"}));
  CHECK(few.code == 3);
  CHECK_FALSE(std::filesystem::exists(dir / "out.q4s"));
  for (const std::vector<std::string>& more :
       std::vector<std::vector<std::string>>{{"--group", "48"},
                                             {"--grid", "asym"},
                                             {"--samples", "-1"},
                                             {"--damp", "nan"},
                                             {"--only", "("},
                                             {"--tensor", "x"},
                                             {"--tensor", "x=g5"},
                                             {"--only", "attn"},
                                             {"--tensor", "up_proj=g32"},
                                             {"--bpw", "1"},
                                             {"another"}}) {
    CAPTURE(more[0]);
    const Finished f = run(quantise(dir / "good.gguf", dir / "out.q4s", more));
    CAPTURE(f.err);
    CHECK(f.code == 2);
    CHECK(std::count(f.err.begin(), f.err.end(), '\n') == 1);
  }
  const Finished nowhere = run({tool("llama-quant"), dir / "good.gguf"});
  CHECK(nowhere.code == 2);
  CHECK(std::count(nowhere.err.begin(), nowhere.err.end(), '\n') == 1);
}
