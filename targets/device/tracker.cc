#include "tracker.h"

#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/string.h>

#include <cinttypes>
#include <cstdio>
#include <random>

namespace device {
namespace {

namespace json = tvm::ffi::json;
using tvm::ffi::Any;
using tvm::ffi::String;

constexpr int32_t kTrackerMagic = 0x2f271;
constexpr int32_t kMaxMessage = 1 << 20;
constexpr int kAnswerSeconds = 10;
// tvm.rpc.base.TrackerCode
const char* const kSuccess = "0";
constexpr int64_t kPut = 3, kUpdateInfo = 5, kPendingMatchKeys = 7;

std::string RandomDigits() {
  std::random_device random;
  char text[33];
  std::snprintf(text, sizeof(text), "%08x%08x%08x%08x", random(), random(), random(), random());
  return text;
}

std::string Dump(json::Array message) { return json::Stringify(message); }

}  // namespace

Tracker::Tracker(const Address& address, const std::string& key, int port)
    : socket_(Connect(address)), key_(key), port_(port) {
  LimitTransfers(socket_.get(), kAnswerSeconds);
  KeepAlive(socket_.get());
  // the tracker wants the magic number alone in its first packet, so the answer has to be awaited
  SendInt(socket_.get(), kTrackerMagic);
  if (ReceiveInt(socket_.get()) != kTrackerMagic) {
    throw NetworkError(ToString(address) + " is not a TVM tracker");
  }
  json::Object info;
  info.Set(String("key"), String("server:" + key_));
  info.Set(String("addr"), json::Array{Any(nullptr), Any(int64_t{port_})});  // it fills in the address it sees
  Command(Dump({Any(kUpdateInfo), info}));
}

std::string Tracker::Offer() {
  std::string match_key = key_ + ":" + RandomDigits();
  Command(Dump({Any(kPut), String(key_), json::Array{Any(int64_t{port_}), String(match_key)}, Any(nullptr)}));
  return match_key;
}

bool Tracker::IsPending(const std::string& match_key) {
  // match keys are plain text: no need to parse the list
  return Call(Dump({Any(kPendingMatchKeys)})).find("\"" + match_key + "\"") != std::string::npos;
}

void Tracker::Command(const std::string& request) {
  if (Call(request) != kSuccess) throw NetworkError("the tracker refused " + request);
}

std::string Tracker::Call(const std::string& request) {
  SendInt(socket_.get(), static_cast<int32_t>(request.size()));
  SendAll(socket_.get(), request);
  int32_t size = ReceiveInt(socket_.get());
  if (size <= 0 || size > kMaxMessage) throw NetworkError("the tracker sent a message of impossible size");
  return ReceiveAll(socket_.get(), size);
}

}  // namespace device
