// Runs the real binaries as a user's shell would, and what the tests of the tools share.
#pragma once
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace q4s::test {

struct Finished {
  int code = -1;  // exit code, or -signal
  std::string out, err;
};

struct Launch {
  std::string input = {};      // stdin
  std::string stdout_to = {};  // a path instead of a pipe
  bool close_stdout = false;
  std::vector<std::string> env = {};  // "NAME=value"
  // Called now and then with what came on stdout so far.
  std::function<void(pid_t, const std::string&)> watch = {};
};

inline std::string tool(const std::string& name) { return std::string(Q4S_BINARY_DIR) + "/" + name; }

inline Finished run(const std::vector<std::string>& command, const Launch& launch = {}) {
  int in[2], out[2], err[2];
  if (pipe(in) || pipe(out) || pipe(err)) throw std::runtime_error("pipe");
  const pid_t pid = fork();
  if (pid == 0) {
    dup2(in[0], 0), dup2(out[1], 1), dup2(err[1], 2);
    for (int* p : {in, out, err}) close(p[0]), close(p[1]);
    if (!launch.stdout_to.empty())
      dup2(open(launch.stdout_to.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644), 1);
    if (launch.close_stdout) close(1);
    for (const std::string& e : launch.env) putenv(const_cast<char*>(e.c_str()));
    std::vector<char*> argv;
    for (const std::string& a : command) argv.push_back(const_cast<char*>(a.c_str()));
    argv.push_back(nullptr);
    execv(argv[0], argv.data());
    _exit(127);
  }
  close(in[0]), close(out[1]), close(err[1]);
  signal(SIGPIPE, SIG_IGN);  // a tool may not read its stdin
  for (size_t at = 0; at < launch.input.size();) {
    const ssize_t n = write(in[1], launch.input.data() + at, launch.input.size() - at);
    if (n <= 0) break;
    at += size_t(n);
  }
  close(in[1]);
  Finished f;
  pollfd fds[2] = {{out[0], POLLIN, 0}, {err[0], POLLIN, 0}};
  std::string* texts[2] = {&f.out, &f.err};
  for (int open_fds = 2; open_fds > 0;) {
    poll(fds, 2, 20);
    for (int i = 0; i < 2; ++i) {
      if (fds[i].fd < 0 || !(fds[i].revents & (POLLIN | POLLHUP))) continue;
      char buffer[4096];
      const ssize_t n = read(fds[i].fd, buffer, sizeof buffer);
      if (n > 0) {
        texts[i]->append(buffer, size_t(n));
      } else {
        close(fds[i].fd);
        fds[i].fd = -1;
        --open_fds;
      }
    }
    if (launch.watch) launch.watch(pid, f.out);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  f.code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  return f;
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace q4s::test
