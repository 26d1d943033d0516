// What a library needs of the processor, checked before any of its code runs; for all programs that load one.
//
// Each library has a text that names features, and where their bits are found (tvm_lowrank/codegen/processor.py).
// Libraries without it are taken as they are.
#ifndef TVM_LOWRANK_NEEDS_H_
#define TVM_LOWRANK_NEEDS_H_

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <sstream>
#include <string>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#else
#include <sys/auxv.h>
#endif

namespace tlr {

// Whether a bit is set, such as that at "cpuid.7.0.ebx.5"; one at a place that is not known is not.
inline bool HasBit(const std::string& place) {
  unsigned bit = 0;
  uint64_t bits = 0;
#if defined(__x86_64__)
  unsigned leaf = 0, subleaf = 0, values[4] = {};
  char name = 0;
  if (std::sscanf(place.c_str(), "cpuid.%x.%u.e%cx.%u", &leaf, &subleaf, &name, &bit) == 4) {
    if (name >= 'a' && name <= 'd' && __get_cpuid_count(leaf, subleaf, values, values + 1, values + 2, values + 3)) {
      bits = values[name - 'a'];
    }
  } else if (std::sscanf(place.c_str(), "xcr0.%u", &bit) == 1 && HasBit("cpuid.1.0.ecx.27")) {
    unsigned low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    bits = uint64_t{high} << 32 | low;
  }
#else
  if (std::sscanf(place.c_str(), "hwcap.%u", &bit) == 1) {
    bits = getauxval(AT_HWCAP);
  } else if (std::sscanf(place.c_str(), "hwcap2.%u", &bit) == 1) {
    bits = getauxval(AT_HWCAP2);
  }
#endif
  return bit < 64 && (bits >> bit & 1);
}

// What of a library's text this processor does not have, such as "avx512f, avx512bw"; "" if it has everything.
inline std::string Missing(const std::string& text) {
  std::istringstream words(text);
  std::string missing;
  for (std::string word; words >> word;) {
    size_t colon = word.find(':');
    if (colon == std::string::npos) continue;  // what comes before the features
    std::istringstream places(word.substr(colon + 1));
    for (std::string place; std::getline(places, place, '+');) {
      if (HasBit(place)) continue;
      missing += (missing.empty() ? "" : ", ") + word.substr(0, colon);
      break;
    }
  }
  return missing;
}

// Why the library in a file cannot run here, in a few words; "" if it can, or is not one. Asks Linux for tiles (AMX),
// which a process may only use then.
inline std::string WhyNot(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL);
  if (library == nullptr) return "";  // whoever loads it says why
  auto symbol = static_cast<const char*>(dlsym(library, "tvm_lowrank_needs"));
  std::string text = symbol ? symbol : "", reason = Missing(text);
  dlclose(library);
  if (!reason.empty()) return "needs a processor with " + reason + ", which this one does not have";
#if defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (text.find(" amx_tile:") != std::string::npos && syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) {
    return std::string("needs amx_tile, which Linux refuses this process: ") + std::strerror(errno);
  }
#endif
  return "";
}

}  // namespace tlr

#endif  // TVM_LOWRANK_NEEDS_H_
