// The server's side of TVM's tracker protocol: JSON messages, each after its length (tvm/rpc/tracker.py).
#pragma once

#include <string>

#include "net.h"

namespace device {

class Tracker {
 public:
  // Connect and announce a server; throws NetworkError, as all methods do.
  Tracker(const Address& address, const std::string& key, int port);

  // Offer the server to one client; returns the match key that this client will show.
  std::string Offer();
  // Whether an offered match key still waits for a client.
  bool IsPending(const std::string& match_key);

  // Readable when the tracker has gone.
  int fd() const { return socket_.get(); }

 private:
  void Command(const std::string& request);
  std::string Call(const std::string& request);

  Fd socket_;
  std::string key_;
  int port_;
};

}  // namespace device
