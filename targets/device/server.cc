// A TVM RPC server for devices without Python: behaves towards tracker and clients as tvm/rpc/server.py does.
//
// The process stays single-threaded and never runs what clients send: each session is a child process, in a process
// group and a folder of its own, and both are removed when it ends.
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <sstream>

#include "device_info.h"
#include "net.h"
#include "options.h"
#include "session.h"
#include "signals.h"
#include "tracker.h"

namespace device {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::seconds;

// tvm.rpc.base
constexpr int32_t kMagic = 0xff271;
constexpr int32_t kMismatch = kMagic + 2;

constexpr int kMaxKey = 4096;
constexpr int kHandshakeSeconds = 5;
constexpr int kUnlimited = 0;
constexpr auto kRetryPeriod = seconds(1);  // between attempts to reach the tracker
constexpr auto kPingPeriod = seconds(1);   // between questions whether a match key was taken
constexpr int kUnusedPings = 5;            // a client that took the key connects within this many of them

void Log(const std::string& text) { std::fprintf(stderr, "device server: %s\n", text.c_str()); }

class TemporaryFolder {
 public:
  explicit TemporaryFolder(const std::string& parent) : path_(parent + "/tvm_lowrank-XXXXXX") {
    if (mkdtemp(path_.data()) == nullptr) throw NetworkError("cannot make " + path_ + ": " + std::strerror(errno));
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// The handshake of tvm/rpc/server.py: the client's key is "client:MATCHKEY [-timeout=SECONDS]".
// Returns the time limit the client asked for, or a negative number if it was sent away.
double Greet(int connection, const std::string& match_key, const std::string& key) {
  LimitTransfers(connection, kHandshakeSeconds);
  if (ReceiveInt(connection) != kMagic) throw NetworkError("it does not speak TVM's RPC protocol");
  int32_t size = ReceiveInt(connection);
  if (size < 0 || size > kMaxKey) throw NetworkError("it sent a key of impossible size");
  std::istringstream words(ReceiveAll(connection, size));
  std::string word;
  words >> word;
  if (word != "client:" + match_key) {
    SendInt(connection, kMismatch);
    throw NetworkError("it does not have the match key that the tracker gives out");
  }
  double limit = kUnlimited;
  while (words >> word) {
    if (word.rfind("-timeout=", 0) == 0) limit = std::strtod(word.c_str() + std::strlen("-timeout="), nullptr);
  }
  std::string answer = "server:" + key;
  SendInt(connection, kMagic);
  SendInt(connection, static_cast<int32_t>(answer.size()));
  SendAll(connection, answer);
  LimitTransfers(connection, kUnlimited);
  KeepAlive(connection);
  return std::isfinite(limit) ? std::max(limit, 0.0) : kUnlimited;
}

class Server {
 public:
  explicit Server(const Options& options)
      : options_(options), signals_(options.until_eof), listener_(Listen(options.listen, options.port_end)) {}

  void Run() {
    Log(std::string("TVM ") + TvmVersion() + ", listening on " +
        ToString({options_.listen.host, BoundPort(listener_.get())}) + ", key " + options_.key);
    if (!IsLoopback(listener_.get())) {
      Log("warning: RPC runs whatever it is sent: anybody who reaches this port acts as this user; "
          "keep to a trusted network, or to 127.0.0.1 and an SSH tunnel");
    }
    while (!signals_.stopped()) {
      try {
        if (tracker_ == nullptr) Register();
        WaitForClient();
      } catch (const NetworkError& error) {
        if (tracker_ != nullptr || !complained_) Log(std::string(error.what()) + "; trying to reach the tracker again");
        complained_ = true;
        tracker_ = nullptr;
        signals_.Wait({}, kRetryPeriod);
      }
    }
    Log("ended");
  }

 private:
  void Register() {
    tracker_ = std::make_unique<Tracker>(options_.tracker, options_.key, BoundPort(listener_.get()));
    Log("registered with the tracker " + ToString(options_.tracker));
    complained_ = false;
    match_key_.clear();
  }

  // Returns after one session, or after a while without one; throws NetworkError when the tracker has gone.
  void WaitForClient() {
    if (match_key_.empty()) {
      match_key_ = tracker_->Offer();
      unused_pings_ = 0;
    }
    signals_.Wait({listener_.get(), tracker_->fd()}, kPingPeriod);
    if (signals_.stopped()) return;
    if (signals_.Readable(tracker_->fd())) throw NetworkError("the tracker has gone");
    if (signals_.Readable(listener_.get())) {
      Receive();
    } else {
      // a client that took the key and died would make this device unreachable for ever
      unused_pings_ = tracker_->IsPending(match_key_) ? 0 : unused_pings_ + 1;
      if (unused_pings_ > kUnusedPings) match_key_.clear();
    }
  }

  void Receive() {
    std::string peer = "a client";
    try {
      Fd connection = Accept(listener_.get());
      peer = PeerName(connection.get());
      double limit = Greet(connection.get(), match_key_, options_.key);
      if (options_.timeout > 0) limit = limit > 0 ? std::min(limit, options_.timeout) : options_.timeout;
      match_key_.clear();
      Serve(connection.get(), peer, limit);
    } catch (const NetworkError& error) {
      Log(peer + " is sent away: " + error.what());
    }
  }

  void Serve(int connection, const std::string& peer, double limit) {
    TemporaryFolder folder(options_.work_dir);
    pid_t server = getpid(), child = fork();
    if (child < 0) throw NetworkError(std::string("cannot start a process: ") + std::strerror(errno));
    if (child == 0) {
      setpgid(0, 0);
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (getppid() != server) std::_Exit(1);
      signals_.Restore();
      close(listener_.get());
      close(tracker_->fd());
      if (std::freopen("/dev/null", "r", stdin) == nullptr) std::_Exit(1);
      std::_Exit(ServeSession(connection, folder.path(), options_));
    }
    setpgid(child, child);  // whoever is first, parent or child
    Log("session with " + peer);
    std::string end = WaitForChild(child, limit);
    kill(-child, SIGKILL);  // and whatever it started
    if (!end.empty()) {
      LimitTransfers(connection, kHandshakeSeconds);
      SendException(connection, end);
    }
    Log("session with " + peer + " ended" + (end.empty() ? "" : ": " + end));
  }

  // Returns why the session was ended, nothing if the client ended it.
  std::string WaitForChild(pid_t child, double limit) {
    auto start = Clock::now();
    auto end = start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(std::min(limit, 1e9)));
    int status = 0;
    while (waitpid(child, &status, WNOHANG) == 0) {
      auto rest = limit > 0 ? end - Clock::now() : Clock::duration(seconds(3600));
      std::string reason;
      if (signals_.stopped()) reason = "the device's server was stopped";
      if (rest <= Clock::duration::zero()) {
        std::ostringstream text;
        text << "RPCSessionTimeoutError: the session took longer than " << limit
             << " s; raise the session timeout (and --timeout of the device's server, if it is lower)";
        reason = text.str();
      }
      if (!reason.empty()) {
        kill(-child, SIGKILL);
        waitpid(child, &status, 0);
        return reason;
      }
      signals_.Wait({}, rest);
    }
    if (WIFSIGNALED(status)) return std::string("the session crashed: ") + strsignal(WTERMSIG(status));
    return "";
  }

  const Options& options_;
  Signals signals_;
  Fd listener_;
  std::unique_ptr<Tracker> tracker_;
  std::string match_key_;
  int unused_pings_ = 0;
  bool complained_ = false;
};

int Main(int argc, char** argv) {
  try {
    Options options = ParseOptions(argc, argv);
    if (options.help) {
      std::fputs(kHelp, stdout);
      return 0;
    }
    Server(options).Run();
    return 0;
  } catch (const OptionError& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}

}  // namespace
}  // namespace device

int main(int argc, char** argv) { return device::Main(argc, argv); }
