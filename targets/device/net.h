// Blocking TCP sockets with time limits; little-endian integers, as TVM's protocols use them.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace device {

class NetworkError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A file descriptor that is closed with its owner.
class Fd {
 public:
  explicit Fd(int fd = -1) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Fd();
  int get() const { return fd_; }

 private:
  int fd_;
};

struct Address {
  std::string host;
  int port = 0;
};

std::string ToString(const Address& address);

// All of these throw NetworkError, whose message has no newline.
Fd Connect(const Address& address);
// Bind the first free port of [first.port, end); port 0 is any free one.
Fd Listen(const Address& first, int end);
Fd Accept(int listener);
int BoundPort(int socket);
std::string PeerName(int socket);
bool IsLoopback(int socket);

// Transfers on this socket fail when they make no progress for so long; 0 waits forever.
void LimitTransfers(int socket, int seconds);
// A peer that lost power is noticed within a minute.
void KeepAlive(int socket);
// Hold back what is sent in pieces, until it is called with false.
void Cork(int socket, bool hold);

void SendAll(int socket, const std::string& data);
void SendInt(int socket, int32_t value);
std::string ReceiveAll(int socket, size_t size);
int32_t ReceiveInt(int socket);

}  // namespace device
