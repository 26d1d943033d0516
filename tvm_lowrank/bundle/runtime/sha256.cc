#include "sha256.h"

#include <array>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <vector>

namespace tlr {
namespace {

constexpr size_t kBlock = 64;

constexpr std::array<uint32_t, 64> kRounds = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

uint32_t Rotated(uint32_t x, int n) { return (x >> n) | (x << (32 - n)); }

class Digest {
 public:
  void Add(const uint8_t* block) {
    std::array<uint32_t, 64> w;
    for (size_t i = 0; i < 16; ++i) {
      const uint8_t* p = block + 4 * i;
      w[i] = uint32_t{p[0]} << 24 | uint32_t{p[1]} << 16 | uint32_t{p[2]} << 8 | p[3];
    }
    for (size_t i = 16; i < 64; ++i) {
      uint32_t a = w[i - 15], b = w[i - 2];
      w[i] = w[i - 16] + (Rotated(a, 7) ^ Rotated(a, 18) ^ (a >> 3)) + w[i - 7] +
             (Rotated(b, 17) ^ Rotated(b, 19) ^ (b >> 10));
    }
    std::array<uint32_t, 8> s = state_;
    for (size_t i = 0; i < 64; ++i) {
      uint32_t t1 = s[7] + (Rotated(s[4], 6) ^ Rotated(s[4], 11) ^ Rotated(s[4], 25)) +
                    ((s[4] & s[5]) ^ (~s[4] & s[6])) + kRounds[i] + w[i];
      uint32_t t2 = (Rotated(s[0], 2) ^ Rotated(s[0], 13) ^ Rotated(s[0], 22)) +
                    ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
      s = {t1 + t2, s[0], s[1], s[2], s[3] + t1, s[4], s[5], s[6]};
    }
    for (size_t i = 0; i < 8; ++i) state_[i] += s[i];
  }

  std::string Hex() const {
    std::string text;
    for (uint32_t word : state_) {
      char digits[9];
      std::snprintf(digits, sizeof digits, "%08x", word);
      text += digits;
    }
    return text;
  }

 private:
  std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
};

}  // namespace

std::string Sha256(const std::string& path) {
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (!file) return "";
  Digest digest;
  std::vector<uint8_t> buffer(1024 * kBlock);
  uint64_t total = 0;
  size_t got;
  while ((got = std::fread(buffer.data(), 1, buffer.size(), file.get())) == buffer.size()) {
    for (size_t i = 0; i < got; i += kBlock) digest.Add(&buffer[i]);
    total += got;
  }
  if (std::ferror(file.get())) return "";
  total += got;
  // the last bytes, a bit that is set, zeros, and the number of bits
  size_t padded = (got + 9 + kBlock - 1) / kBlock * kBlock;
  buffer.resize(got);
  buffer.push_back(0x80);
  buffer.resize(padded, 0);
  for (int i = 0; i < 8; ++i) buffer[padded - 1 - i] = static_cast<uint8_t>(8 * total >> 8 * i);
  for (size_t i = 0; i < padded; i += kBlock) digest.Add(&buffer[i]);
  return digest.Hex();
}

}  // namespace tlr
