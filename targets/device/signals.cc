#include "signals.h"

#include <poll.h>
#include <unistd.h>

#include <algorithm>

namespace device {
namespace {

constexpr int kHandled[] = {SIGTERM, SIGINT, SIGHUP, SIGCHLD};

volatile sig_atomic_t stop_signal = 0;

}  // namespace

Signals::Signals(bool until_eof) : until_eof_(until_eof) {
  sigset_t blocked;
  sigemptyset(&blocked);
  for (int number : kHandled) {
    sigaddset(&blocked, number);
    struct sigaction action {};
    action.sa_handler = [](int received) {
      if (received != SIGCHLD) stop_signal = received;
    };
    sigaction(number, &action, nullptr);
  }
  sigprocmask(SIG_BLOCK, &blocked, &original_);
  signal(SIGPIPE, SIG_IGN);
}

bool Signals::stopped() const { return stop_signal != 0; }

void Signals::Wait(const std::vector<int>& descriptors, std::chrono::steady_clock::duration limit) {
  std::vector<pollfd> polled;
  for (int fd : descriptors) polled.push_back({fd, POLLIN, 0});
  if (until_eof_) polled.push_back({STDIN_FILENO, POLLIN, 0});
  auto rest = std::max<std::chrono::nanoseconds>(limit, std::chrono::nanoseconds(0));
  auto whole = std::chrono::duration_cast<std::chrono::seconds>(rest);
  timespec time{static_cast<time_t>(whole.count()), static_cast<long>((rest - whole).count())};
  readable_.clear();
  if (ppoll(polled.data(), polled.size(), &time, &original_) <= 0) return;
  for (const pollfd& entry : polled) {
    if (entry.revents != 0) readable_.push_back(entry.fd);
  }
  char byte;
  if (until_eof_ && Readable(STDIN_FILENO) && read(STDIN_FILENO, &byte, 1) <= 0) stop_signal = SIGTERM;
}

bool Signals::Readable(int fd) const { return std::count(readable_.begin(), readable_.end(), fd) > 0; }

void Signals::Restore() const {
  for (int number : kHandled) signal(number, SIG_DFL);
  sigprocmask(SIG_SETMASK, &original_, nullptr);
}

}  // namespace device
