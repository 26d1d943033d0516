// Signals that arrive only while the process waits, so that nothing is ever interrupted half-way.
#pragma once

#include <signal.h>

#include <chrono>
#include <vector>

namespace device {

class Signals {
 public:
  // With until_eof, the end of standard input counts as a signal to stop.
  explicit Signals(bool until_eof);

  // SIGTERM, SIGINT or SIGHUP came.
  bool stopped() const;

  // Wait until a descriptor is readable, a signal came (of a child that ended, too), or the time is over.
  void Wait(const std::vector<int>& descriptors, std::chrono::steady_clock::duration limit);
  // Whether the last wait found this descriptor readable, or closed by the other side.
  bool Readable(int fd) const;

  // In a child: back to what this process was started with.
  void Restore() const;

 private:
  bool until_eof_;
  sigset_t original_;
  std::vector<int> readable_;
};

}  // namespace device
