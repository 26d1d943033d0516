#include "device_info.h"

#include <sys/utsname.h>
#include <tvm/ffi/extra/json.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <thread>

namespace device {
namespace {

namespace fs = std::filesystem;
namespace json = tvm::ffi::json;
using tvm::ffi::Any;
using tvm::ffi::String;

std::optional<std::string> FirstLine(const fs::path& path) {
  std::ifstream file(path);
  std::string line;
  if (!std::getline(file, line) || line.empty()) return std::nullopt;
  return line.substr(0, line.find('\0'));  // files of the device tree end with a zero
}

std::optional<double> Number(const fs::path& path) {
  std::ifstream file(path);
  double value;
  if (!(file >> value)) return std::nullopt;
  return value;
}

// The first value of a name in /proc/cpuinfo.
std::optional<std::string> CpuInfo(const std::string& name) {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    size_t colon = line.find(": ");
    if (colon != std::string::npos && line.compare(0, name.size(), name) == 0) return line.substr(colon + 2);
  }
  return std::nullopt;
}

// ARM kernels name the board, not the processor.
std::optional<std::string> Model() {
  if (auto board = FirstLine("/proc/device-tree/model")) return board;
  if (auto processor = CpuInfo("model name")) return processor;
  return CpuInfo("Hardware");
}

std::optional<double> Celsius() {
  std::optional<double> hottest;
  std::error_code ignored;
  for (const auto& zone : fs::directory_iterator("/sys/class/thermal", ignored)) {
    if (auto value = Number(zone.path() / "temp")) hottest = std::max(hottest.value_or(*value / 1e3), *value / 1e3);
  }
  return hottest;
}

template <typename T>
Any OrNull(const std::optional<T>& value) {
  if (!value) return Any(nullptr);
  return Any(*value);
}

}  // namespace

const char* TvmVersion() { return TVM_VERSION; }

String DeviceInfo() {
  utsname system{};
  uname(&system);
  int64_t cores = std::thread::hardware_concurrency();
  json::Array megahertz, governors;
  for (int64_t core = 0; core < cores; ++core) {
    fs::path folder = "/sys/devices/system/cpu/cpu" + std::to_string(core) + "/cpufreq";
    auto kilohertz = Number(folder / "scaling_cur_freq");
    megahertz.push_back(kilohertz ? Any(*kilohertz / 1e3) : Any(nullptr));
    governors.push_back(OrNull(FirstLine(folder / "scaling_governor")));
  }
  json::Object info;
  info.Set(String("tvm"), String(TvmVersion()));
  info.Set(String("architecture"), String(system.machine));
  info.Set(String("system"), String(std::string(system.sysname) + " " + system.release));
  info.Set(String("model"), OrNull(Model()));
  info.Set(String("cpu_part"), OrNull(CpuInfo("CPU part")));
  info.Set(String("cores"), cores);
  info.Set(String("mhz"), megahertz);
  info.Set(String("governor"), governors);
  info.Set(String("celsius"), OrNull(Celsius()));
  info.Set(String("emulated"), std::getenv("TVM_LOWRANK_EMULATED") != nullptr);  // its times mean nothing
  return json::Stringify(info);
}

}  // namespace device
