#include "net.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>

namespace device {
namespace {

constexpr int kConnectSeconds = 5;

using AddressList = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

[[noreturn]] void Fail(const std::string& what) { throw NetworkError(what + ": " + std::strerror(errno)); }

AddressList Resolve(const Address& address, int flags) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags;
  addrinfo* found = nullptr;
  int code = getaddrinfo(address.host.c_str(), std::to_string(address.port).c_str(), &hints, &found);
  if (code != 0) throw NetworkError("cannot resolve " + address.host + ": " + gai_strerror(code));
  return {found, freeaddrinfo};
}

void SetOption(int socket, int level, int name, int value) {
  if (setsockopt(socket, level, name, &value, sizeof(value)) != 0) Fail("setsockopt");
}

sockaddr_storage LocalAddress(int socket) {
  sockaddr_storage storage{};
  socklen_t size = sizeof(storage);
  if (getsockname(socket, reinterpret_cast<sockaddr*>(&storage), &size) != 0) Fail("getsockname");
  return storage;
}

}  // namespace

Fd::~Fd() {
  if (fd_ >= 0) close(fd_);
}

std::string ToString(const Address& address) {
  bool ipv6 = address.host.find(':') != std::string::npos;
  return (ipv6 ? "[" + address.host + "]" : address.host) + ":" + std::to_string(address.port);
}

Fd Connect(const Address& address) {
  AddressList found = Resolve(address, 0);
  int error = 0;
  for (addrinfo* option = found.get(); option != nullptr; option = option->ai_next) {
    Fd socket(::socket(option->ai_family, option->ai_socktype | SOCK_CLOEXEC, option->ai_protocol));
    if (socket.get() < 0) Fail("socket");
    LimitTransfers(socket.get(), kConnectSeconds);
    if (connect(socket.get(), option->ai_addr, option->ai_addrlen) == 0) return socket;
    error = errno;
  }
  errno = error;
  Fail("cannot connect to " + ToString(address));
}

Fd Listen(const Address& first, int end) {
  for (Address address = first; address.port < end; ++address.port) {
    AddressList found = Resolve(address, AI_PASSIVE);
    Fd socket(::socket(found->ai_family, found->ai_socktype | SOCK_CLOEXEC, found->ai_protocol));
    if (socket.get() < 0) Fail("socket");
    SetOption(socket.get(), SOL_SOCKET, SO_REUSEADDR, 1);
    if (bind(socket.get(), found->ai_addr, found->ai_addrlen) == 0 && listen(socket.get(), 8) == 0) return socket;
    if (errno != EADDRINUSE) Fail("cannot listen on " + ToString(address));
  }
  throw NetworkError("every port of " + first.host + " from " + std::to_string(first.port) + " to " +
                     std::to_string(end - 1) + " is in use; choose others with --port and --port-end");
}

Fd Accept(int listener) {
  Fd socket(accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
  if (socket.get() < 0) Fail("accept");
  SetOption(socket.get(), IPPROTO_TCP, TCP_NODELAY, 1);
  return socket;
}

int BoundPort(int socket) {
  // the port is at the same place in both families
  sockaddr_storage storage = LocalAddress(socket);
  return ntohs(reinterpret_cast<sockaddr_in*>(&storage)->sin_port);
}

std::string PeerName(int socket) {
  sockaddr_storage storage{};
  socklen_t size = sizeof(storage);
  char host[NI_MAXHOST] = "unknown", port[NI_MAXSERV] = "0";
  auto* peer = reinterpret_cast<sockaddr*>(&storage);
  if (getpeername(socket, peer, &size) == 0) {
    getnameinfo(peer, size, host, sizeof(host), port, sizeof(port), NI_NUMERICHOST | NI_NUMERICSERV);
  }
  return ToString({host, std::atoi(port)});
}

bool IsLoopback(int socket) {
  sockaddr_storage storage = LocalAddress(socket);
  if (storage.ss_family == AF_INET) {
    return ntohl(reinterpret_cast<sockaddr_in*>(&storage)->sin_addr.s_addr) >> 24 == 127;
  }
  return IN6_IS_ADDR_LOOPBACK(&reinterpret_cast<sockaddr_in6*>(&storage)->sin6_addr);
}

void LimitTransfers(int socket, int seconds) {
  timeval limit{seconds, 0};
  if (setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)) != 0 ||
      setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit)) != 0) {
    Fail("setsockopt");
  }
}

void KeepAlive(int socket) {
  SetOption(socket, SOL_SOCKET, SO_KEEPALIVE, 1);
  SetOption(socket, IPPROTO_TCP, TCP_KEEPIDLE, 30);
  SetOption(socket, IPPROTO_TCP, TCP_KEEPINTVL, 10);
  SetOption(socket, IPPROTO_TCP, TCP_KEEPCNT, 3);
}

void Cork(int socket, bool hold) { SetOption(socket, IPPROTO_TCP, TCP_CORK, hold ? 1 : 0); }

void SendAll(int socket, const std::string& data) {
  for (size_t done = 0; done < data.size();) {
    ssize_t sent = send(socket, data.data() + done, data.size() - done, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0) Fail("send");
    done += sent;
  }
}

void SendInt(int socket, int32_t value) {
  SendAll(socket, std::string(reinterpret_cast<char*>(&value), sizeof(value)));
}

std::string ReceiveAll(int socket, size_t size) {
  std::string data(size, '\0');
  for (size_t done = 0; done < size;) {
    ssize_t received = recv(socket, &data[done], size - done, 0);
    if (received < 0 && errno == EINTR) continue;
    if (received < 0) Fail("receive");
    if (received == 0) throw NetworkError("the other side closed the connection");
    done += received;
  }
  return data;
}

int32_t ReceiveInt(int socket) {
  int32_t value;
  std::memcpy(&value, ReceiveAll(socket, sizeof(value)).data(), sizeof(value));
  return value;
}

}  // namespace device
