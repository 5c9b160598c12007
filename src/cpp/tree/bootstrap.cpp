// MT19937 (Matsumoto and Nishimura, ACM TOMACS 8, 1998), seeded by one integer, and numpy's masks:
// draws above the range are drawn again.
#include "tree/bootstrap.hpp"

#include <algorithm>

namespace fastnn {
namespace {

class Twister {
 public:
  static constexpr int kWords = 624;
  explicit Twister(uint32_t seed) {
    for (int i = 0; i < kWords; i++) {
      state_[i] = seed;
      seed = 1812433253u * (seed ^ (seed >> 30)) + uint32_t(i) + 1;
    }
  }
  // The next 624 numbers.
  void next(uint32_t* out) {
    constexpr int kShift = 397;
    for (int i = 0; i < kWords - kShift; i++)
      state_[i] = state_[i + kShift] ^ mixed(state_[i], state_[i + 1]);
    for (int i = kWords - kShift; i < kWords - 1; i++)
      state_[i] = state_[i + kShift - kWords] ^ mixed(state_[i], state_[i + 1]);
    state_[kWords - 1] = state_[kShift - 1] ^ mixed(state_[kWords - 1], state_[0]);
    for (int i = 0; i < kWords; i++) {
      uint32_t y = state_[i];
      y ^= y >> 11;
      y ^= y << 7 & 0x9d2c5680u;
      y ^= y << 15 & 0xefc60000u;
      out[i] = y ^ y >> 18;
    }
  }

 private:
  static uint32_t mixed(uint32_t high, uint32_t low) {
    const uint32_t y = (high & 0x80000000u) | (low & 0x7fffffffu);
    return y >> 1 ^ ((0u - (y & 1)) & 0x9908b0dfu);
  }
  uint32_t state_[kWords];
};

// Draws up to `most`, 624 numbers at a time.
class MaskedDraws {
 public:
  MaskedDraws(uint32_t seed, uint32_t most) : twister_(seed), most_(most), mask_(most) {
    for (int shift = 1; shift < 32; shift *= 2) mask_ |= mask_ >> shift;
  }
  // What comes next; returns how many.
  int next(uint32_t* out) {
    twister_.next(out);
    int kept = 0;
    for (int i = 0; i < Twister::kWords; i++) {
      const uint32_t y = out[i] & mask_;
      out[kept] = y;
      kept += y <= most_;
    }
    return kept;
  }

 private:
  Twister twister_;
  uint32_t most_, mask_;
};

}  // namespace

int64_t first_draw(uint32_t seed, int64_t below) {
  MaskedDraws draws(seed, uint32_t(below - 1));
  uint32_t drawn[Twister::kWords];
  while (!draws.next(drawn)) {
  }
  return drawn[0];
}

void bootstrap_counts(uint32_t seed, int64_t rows, int64_t draws, double* counts) {
  std::fill(counts, counts + rows, 0.0);
  if (rows == 1) {
    counts[0] = double(draws);
    return;
  }
  MaskedDraws from(seed, uint32_t(rows - 1));
  uint32_t drawn[Twister::kWords];
  for (int64_t left = draws; left > 0;) {
    const int64_t n = std::min<int64_t>(left, from.next(drawn));
    for (int64_t i = 0; i < n; i++) counts[drawn[i]] += 1.0;
    left -= n;
  }
}

}  // namespace fastnn
