// The tile instructions of AMX in software, as Intel's manual has them, for processors without them.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace {

constexpr int kRegisters = 8, kRows = 16, kBytes = 64;

struct Tiles {
  bool shaped = false;
  int bytes[kRegisters], rows[kRegisters];
  uint8_t data[kRegisters][kRows][kBytes];
};

thread_local Tiles tiles;
std::atomic<int64_t> products{0};

void Must(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "tiles: %s\n", what);
  std::abort();
}

float Widened(const uint8_t* from) {
  uint32_t bits = uint32_t{from[0]} << 16 | uint32_t{from[1]} << 24;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// To each sum, `add` adds the products of four bytes of a row and of a column, step by step.
template <typename Sum, typename Add>
void AddProducts(uint8_t sums, uint8_t left, uint8_t right, Add add) {
  Must(tiles.shaped, "not shaped");
  ++products;
  Must(tiles.rows[sums] == tiles.rows[left] && tiles.bytes[sums] == tiles.bytes[right], "shapes do not fit");
  Must(tiles.bytes[left] == 4 * tiles.rows[right], "the reductions do not fit");
  for (int row = 0; row < tiles.rows[sums]; ++row) {
    for (int column = 0; column < tiles.bytes[sums] / 4; ++column) {
      Sum sum;
      std::memcpy(&sum, tiles.data[sums][row] + 4 * column, sizeof sum);
      for (int step = 0; step < tiles.rows[right]; ++step) {
        sum = add(tiles.data[left][row] + 4 * step, tiles.data[right][step] + 4 * column, sum);
      }
      std::memcpy(tiles.data[sums][row] + 4 * column, &sum, sizeof sum);
    }
  }
}

}  // namespace

extern "C" {

void emulated_ldtilecfg(const uint8_t* shape) {
  Must(shape[0] == 1, "palette 1 is the only one");
  Must(reinterpret_cast<uintptr_t>(shape) % 64 == 0, "the shape is not in one line of the cache");
  tiles = Tiles();
  tiles.shaped = true;
  for (int i = 0; i < kRegisters; ++i) {
    tiles.bytes[i] = shape[16 + 2 * i] | shape[17 + 2 * i] << 8;
    tiles.rows[i] = shape[48 + i];
    Must(tiles.bytes[i] >= 1 && tiles.bytes[i] <= kBytes && tiles.bytes[i] % 4 == 0, "a row is too long");
    Must(tiles.rows[i] >= 1 && tiles.rows[i] <= kRows, "too many rows");
  }
}

void emulated_tilerelease() {
  Must(tiles.shaped, "released twice");
  tiles.shaped = false;
}

void emulated_tilezero(uint8_t tile) {
  Must(tiles.shaped, "not shaped");
  std::memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}

void emulated_tileloadd64(uint8_t tile, const uint8_t* from, int64_t stride) {
  Must(tiles.shaped, "not shaped");
  std::memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
  for (int row = 0; row < tiles.rows[tile]; ++row) {
    std::memcpy(tiles.data[tile][row], from + row * stride, tiles.bytes[tile]);
  }
}

void emulated_tilestored64(uint8_t tile, uint8_t* to, int64_t stride) {
  Must(tiles.shaped, "not shaped");
  for (int row = 0; row < tiles.rows[tile]; ++row) {
    std::memcpy(to + row * stride, tiles.data[tile][row], tiles.bytes[tile]);
  }
}

// How many products of tiles there were since the program began.
int64_t emulated_products() { return products; }

void emulated_tdpbf16ps(uint8_t sums, uint8_t left, uint8_t right) {
  AddProducts<float>(sums, left, right, [](const uint8_t* a, const uint8_t* b, float sum) {
    for (int byte : {0, 2}) sum += Widened(a + byte) * Widened(b + byte);
    return sum;
  });
}

void emulated_tdpbusd(uint8_t sums, uint8_t left, uint8_t right) {
  AddProducts<int32_t>(sums, left, right, [](const uint8_t* a, const uint8_t* b, int32_t sum) {
    for (int byte = 0; byte < 4; ++byte) sum += int32_t{a[byte]} * int32_t{static_cast<int8_t>(b[byte])};
    return sum;
  });
}

}  // extern "C"
