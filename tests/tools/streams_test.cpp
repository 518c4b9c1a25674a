// The tools as processes: what goes to which stream, exit codes, signals, JSON keys.
#include <doctest/doctest.h>

#include <nlohmann/json.hpp>
#include <set>

#include "tests/tools/process.h"
#include "tests/tools/tiny_model.h"

using namespace q4s::test;
using nlohmann::json;

namespace {

struct Models {
  TempFolder folder;
  std::string gguf = folder / "tiny.gguf", hf = folder / "tiny", text = folder / "text.txt";
  Models() {
    TinyModel().write_gguf(gguf);
    TinyModel().write_folder(hf);
    std::string words;
    for (int i = 0; i < 100; ++i) words += "hello hello " + std::to_string(i) + "\n";
    write_file(text, words);
  }
};
const Models& models() {
  static const Models m;
  return m;
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    lines.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return lines;
}

std::set<std::string> keys(const json& object) {
  std::set<std::string> names;
  for (const auto& [name, value] : object.items()) names.insert(name);
  return names;
}

}  // namespace

TEST_CASE("--version and --help: on stdout, code 0, every option with its default") {
  for (const char* name : {"llama-run", "llama-ppl", "llama-bench", "llama-quant"}) {
    const Finished version = run({tool(name), "--version"});
    CHECK(version.code == 0);
    CHECK(version.out == std::string(name) + " (q4s) " Q4S_VERSION "\n");
    CHECK(version.err == "");
    const Finished help = run({tool(name), "--help"});
    CHECK(help.code == 0);
    CHECK(help.err == "");
    CHECK(contains(help.out, "--threads"));
    CHECK(contains(help.out, "(default: 0)"));
    CHECK(run({tool(name), "--help"}, {.stdout_to = "/dev/full"}).code == 4);
    CHECK(run({tool(name), "--nonsense"}).code == 2);
    CHECK(run({tool(name)}).code == 2);
  }
  const std::string help = run({tool("llama-run"), "--help"}).out;
  for (const char* part : {"default: 0.8", "default: 40", "default: 0.95", "default: 0.05", "default: 64",
                           "default: 4096", "default: auto", "--stop", "--ignore-eos", "--no-display-prompt"})
    CHECK(contains(help, part));
}

TEST_CASE("llama-run: text on stdout, the rest on stderr, silent with -q") {
  const auto& m = models();
  const Finished plain =
      run({tool("llama-run"), m.gguf, "-p", "hello", "-n", "8", "--temp", "0", "--ignore-eos"});
  CHECK(plain.code == 0);
  CHECK(plain.out.substr(0, 5) == "hello");
  CHECK(plain.out.back() == '\n');
  for (const char* part : {"seed ", "context 64", "prompt ", "eval ", "tokens/s", "GB/s", "ended   length"})
    CHECK(contains(plain.err, part));
  CHECK_FALSE(contains(plain.err, "\033"));  // no terminal, no colours
  const Finished quiet =
      run({tool("llama-run"), m.hf, "-p", "hello", "-n", "8", "--temp", "0", "--ignore-eos", "-q"});
  CHECK(quiet.code == 0);
  CHECK(quiet.err == "");
  CHECK(quiet.out == plain.out);  // the same model in the other rope order
  const Finished bare = run({tool("llama-run"), m.gguf, "-p", "hello", "-n", "8", "--temp", "0",
                             "--ignore-eos", "--no-display-prompt", "-q"});
  CHECK("hello" + bare.out == plain.out);
}

TEST_CASE("llama-run: -p parses special tokens, a file and stdin do not; empty prompts; --tokens") {
  const auto& m = models();
  const auto ids = [&](std::vector<std::string> more, const std::string& input = "") {
    more.insert(more.begin(), {tool("llama-run"), m.gguf, "-n", "1", "--tokens"});
    const Finished f = run(more, {.input = input});
    CHECK(f.code == 0);
    const size_t at = f.err.find("prompt tokens:");
    REQUIRE(at != std::string::npos);
    return f.err.substr(at, f.err.find('\n', at) - at);
  };
  CHECK(ids({"-p", ""}) == "prompt tokens: 0");  // BOS alone
  CHECK(ids({"-p", "</s>"}) == "prompt tokens: 0 1");
  const std::string path = m.folder / "special.txt";
  write_file(path, "</s>");
  const std::string as_text = ids({}, "</s>");
  CHECK(as_text != "prompt tokens: 0 1");
  CHECK(ids({"-f", path}) == as_text);
  CHECK(ids({"-p", "<s>a"}) == ids({"-p", "a"}));  // no second BOS

  TinyModel without;
  without.vocab = tiny_bpe({"<x>", "</s>"});
  const std::string no_bos = m.folder / "no_bos.gguf";
  std::string bytes = without.gguf();
  const std::string key = "tokenizer.ggml.bos_token_id";
  bytes.replace(bytes.find(key), key.size(), "tokenizer.ggml.xxx_token_id");
  write_file(no_bos, bytes);
  const Finished f = run({tool("llama-run"), no_bos, "-p", ""});
  CHECK(f.code == 2);
  CHECK(contains(f.err, "the prompt is empty"));
}

TEST_CASE("llama-run: bytes that are no UTF-8, and NUL, pass as text") {
  const auto& m = models();
  const Finished f = run({tool("llama-run"), m.gguf, "-n", "20", "-s", "3", "-q"},
                         {.input = std::string("a\0b\xff\xfe\xc3", 6)});
  CHECK(f.code == 0);
  CHECK(f.out.substr(0, 3) == std::string("a\0b", 3));
  CHECK(json(f.out).dump().size() > 6);  // dump() throws on invalid UTF-8
}

TEST_CASE("llama-run --json: one object a token, then one with the reason") {
  const auto& m = models();
  const auto last_of = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {tool("llama-run"), m.gguf, "--json", "-q", "--ignore-eos", "-s", "5"});
    const Finished f = run(more);
    REQUIRE(f.code == 0);
    std::vector<json> objects;
    for (const std::string& line : lines_of(f.out)) objects.push_back(json::parse(line));
    REQUIRE(!objects.empty());
    for (size_t i = 0; i + 1 < objects.size(); ++i)
      CHECK(keys(objects[i]) == std::set<std::string>{"token", "text"});
    const json last = objects.back();
    CHECK(keys(last) ==
          std::set<std::string>{"done", "schema", "reason", "prompt_tokens", "tokens", "seed", "timings"});
    CHECK(last["done"] == true);
    CHECK(last["tokens"] == objects.size() - 1);
    CHECK(last["seed"] == 5);
    return last;
  };
  const json length = last_of({"-p", "hello", "-n", "7"});
  CHECK(length["reason"] == "length");
  CHECK(length["tokens"] == 7);
  CHECK(length["prompt_tokens"] == 2);
  const json context = last_of({"-p", "hello", "-c", "20"});
  CHECK(context["reason"] == "context");
  CHECK(context["tokens"] == 19);  // the last one is written, not fed
  CHECK(last_of({"-p", "hello", "-n", "0"})["tokens"] == 0);
  // The text of a run without stop strings contains this one; with it, the text ends before.
  const std::string whole = run({tool("llama-run"), m.gguf, "-p", "x", "-q", "--ignore-eos", "-s", "5", "-n",
                                 "40", "--no-display-prompt"})
                                .out;
  const std::string stop = whole.substr(whole.size() / 2, 1);
  const Finished stopped = run({tool("llama-run"), m.gguf, "-p", "x", "-q", "--ignore-eos", "-s", "5", "-n",
                                "40", "--no-display-prompt", "--stop", "never to be seen", "--stop", stop});
  CHECK(stopped.out == whole.substr(0, whole.find(stop)) + "\n");
}

TEST_CASE("llama-run: the same seed gives the same text with 1, 2 and 3 threads; another seed does not") {
  const auto& m = models();
  const auto text = [&](const char* seed, const char* threads) {
    return run({tool("llama-run"), m.gguf, "-p", "hello", "-n", "40", "--ignore-eos", "-q", "-s", seed, "-t",
                threads})
        .out;
  };
  const std::string first = text("7", "1");
  CHECK(text("7", "2") == first);
  CHECK(text("7", "3") == first);
  CHECK(text("8", "1") != first);
}

TEST_CASE("llama-run --chat: template, history, one answer with -p") {
  TinyModel tiny;
  tiny.context = 512;
  const std::string path = models().folder / "chat.gguf";
  tiny.write_gguf(path);
  const std::vector<std::string> common = {tool("llama-run"), path, "--chat", "--temp", "0", "-n", "5",
                                           "--tokens"};
  auto with = [&](std::vector<std::string> more) {
    more.insert(more.begin(), common.begin(), common.end());
    return more;
  };
  const Finished once = run(with({"-p", "hello"}));
  CHECK(once.code == 0);
  CHECK(contains(once.err, "chat template chatml"));
  CHECK_FALSE(contains(once.out, "hello"));  // the reply only
  const Finished two = run(with({}), {.input = "hello\n\nhello\n"});
  CHECK(two.code == 0);
  CHECK(two.out.substr(0, once.out.size()) == once.out);
  CHECK(two.err.find("prompt tokens:", two.err.find("prompt tokens:") + 1) != std::string::npos);
  const Finished system = run(with({"-p", "hello", "--system", "be brief"}));
  CHECK(system.code == 0);
  CHECK(system.err.size() > once.err.size());  // more prompt tokens
  CHECK(run({tool("llama-run"), path, "-p", "x", "--system", "y"}).code == 2);
  TinyModel plain;
  plain.vocab = tiny_bpe({"<s>", "</s>"});
  const std::string no_template = models().folder / "plain.gguf";
  plain.write_gguf(no_template);
  const Finished none = run({tool("llama-run"), no_template, "--chat", "-p", "x"});
  CHECK(none.code == 3);
}

TEST_CASE("Ctrl-C ends the reply with its timings and 130, SIGTERM gives 143") {
  TinyModel tiny;
  tiny.context = 1 << 20;
  const std::string path = models().folder / "long.gguf";
  tiny.write_gguf(path);
  for (const int signal : {SIGINT, SIGTERM}) {
    bool sent = false;
    const Finished f = run({tool("llama-run"), path, "-p", "hello", "--ignore-eos", "-c", "100000"},
                           {.watch = [&](pid_t pid, const std::string& out) {
                             if (!sent && out.size() > 50) sent = kill(pid, signal) == 0;
                           }});
    CHECK(f.code == 128 + signal);
    CHECK(contains(f.err, "ended   interrupted"));
    CHECK(contains(f.err, "tokens/s"));
  }
}

TEST_CASE("a failing stdout is an error, a reader that left is not worth a word") {
  const auto& m = models();
  for (const std::vector<std::string>& command : std::vector<std::vector<std::string>>{
           {tool("llama-run"), m.gguf, "-p", "hello", "-n", "4"},
           {tool("llama-run"), m.gguf, "-p", "hello", "-n", "4", "--json"},
           {tool("llama-ppl"), m.gguf, m.text, "--chunks", "1"},
           {tool("llama-ppl"), m.gguf, m.text, "--chunks", "1", "--json"},
           {tool("llama-bench"), m.gguf, "-p", "4", "-n", "4", "-r", "1"}}) {
    CAPTURE(command[0]);
    const Finished full = run(command, {.stdout_to = "/dev/full"});
    CHECK(full.code == 4);
    CHECK(contains(full.err, "cannot write to standard output"));
    const Finished closed = run(command, {.close_stdout = true});
    CHECK(closed.code == 1);
    CHECK(contains(closed.err, "cannot write to standard output"));
  }
  const Finished left = run(
      {"/bin/sh", "-c", "'" + tool("llama-run") + "' '" + m.gguf + "' -p hello --ignore-eos -q | head -c 1"});
  CHECK(left.code == 0);
  CHECK(left.out == "h");
  CHECK(left.err == "");
}

TEST_CASE("llama-ppl: running output, final estimate, JSON keys, too little text") {
  const auto& m = models();
  const Finished text = run({tool("llama-ppl"), m.gguf, m.text, "-c", "32", "--chunks", "3"});
  CHECK(text.code == 0);
  const auto lines = lines_of(text.out);
  REQUIRE(lines.size() == 3);
  CHECK(lines[0].substr(0, 3) == "[1]");
  CHECK(contains(lines[0], ",[2]"));
  CHECK(contains(lines[0], ",[3]"));
  CHECK(contains(lines[1], "Final estimate: PPL = "));
  CHECK(contains(lines[1], " +/- "));
  for (const char* part : {"protocol gptq", "n_ctx 32", "3 chunks", "BOS text", "xxh3"})
    CHECK(contains(lines[2], part));

  const std::set<std::string> base = {"schema", "ppl",    "ppl_stderr", "protocol",  "n_ctx",
                                      "chunks", "tokens", "bos",        "text_xxh3", "seconds"};
  const Finished j = run({tool("llama-ppl"), m.gguf, m.text, "-c", "32", "--json", "--protocol", "llamacpp"});
  REQUIRE(j.code == 0);
  CHECK(keys(json::parse(j.out)) == base);
  CHECK(json::parse(j.out)["bos"] == "window");
  const Finished kl = run({tool("llama-ppl"), m.gguf, m.text, "-c", "32", "--json", "--kl-ref", m.hf});
  REQUIRE(kl.code == 0);
  std::set<std::string> more = base;
  for (const char* name : {"ref_ppl", "kl_mean", "kl_stderr", "kl_p99", "kl_max", "top1"}) more.insert(name);
  CHECK(keys(json::parse(kl.out)) == more);
  const Finished self = run({tool("llama-ppl"), m.gguf, m.text, "-c", "32", "--json", "--kl-ref", m.gguf});
  CHECK(json::parse(self.out)["kl_max"] == 0);

  const std::string few = m.folder / "few.txt";
  write_file(few, "hello hello");
  const Finished little = run({tool("llama-ppl"), m.gguf, few});
  CHECK(little.code == 3);
  CHECK(contains(little.err, "tokens, one window takes 64"));
}

TEST_CASE("llama-bench: table and JSON") {
  const auto& m = models();
  const Finished table =
      run({tool("llama-bench"), m.gguf, "-p", "8", "-n", "4", "-d", "0,16", "-r", "2", "-t", "1,2"});
  CHECK(table.code == 0);
  const auto lines = lines_of(table.out);
  REQUIRE(lines.size() == 2 + 2 * 4);
  for (const std::string& line : lines) CHECK(std::count(line.begin(), line.end(), '|') == 8);
  CHECK(contains(table.out, "| pp8 |"));
  CHECK(contains(table.out, "| tg4 @ d16 |"));
  const Finished j = run({tool("llama-bench"), m.gguf, "-p", "8", "-n", "4", "-b", "2", "-r", "1", "--json"});
  REQUIRE(j.code == 0);
  const json list = json::parse(j.out);
  REQUIRE(list.size() == 2);
  for (const json& row : list) {
    CHECK(keys(row) == std::set<std::string>{"schema", "model", "size_bytes", "backend", "device", "threads",
                                             "test", "n_prompt", "n_gen", "depth", "batch", "tok_per_s",
                                             "tok_per_s_sd", "gb_per_s", "read_gb_per_s", "share"});
    CHECK(row["batch"] == 2);
    CHECK(row["tok_per_s"] > 0);
  }
}
