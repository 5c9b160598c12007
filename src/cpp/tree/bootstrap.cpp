// MT19937 (Matsumoto and Nishimura, ACM TOMACS 8, 1998), seeded by one integer, and numpy's masks:
// draws above the range are drawn again.
#include "tree/bootstrap.hpp"

#include <algorithm>

namespace fastnn {
namespace {

class Twister {
 public:
  explicit Twister(uint32_t seed) {
    for (int i = 0; i < kWords; i++) {
      state_[i] = seed;
      seed = 1812433253u * (seed ^ (seed >> 30)) + uint32_t(i) + 1;
    }
  }
  uint32_t next() {
    if (at_ == kWords) twist();
    uint32_t y = state_[at_++];
    y ^= y >> 11;
    y ^= y << 7 & 0x9d2c5680u;
    y ^= y << 15 & 0xefc60000u;
    return y ^ y >> 18;
  }
  // Below or equal to `most`.
  uint32_t up_to(uint32_t most, uint32_t mask) {
    for (;;) {
      const uint32_t y = next() & mask;
      if (y <= most) return y;
    }
  }

 private:
  static constexpr int kWords = 624, kShift = 397;
  static uint32_t mixed(uint32_t high, uint32_t low) {
    const uint32_t y = (high & 0x80000000u) | (low & 0x7fffffffu);
    return y >> 1 ^ (y & 1 ? 0x9908b0dfu : 0u);
  }
  void twist() {
    int i = 0;
    for (; i < kWords - kShift; i++)
      state_[i] = state_[i + kShift] ^ mixed(state_[i], state_[i + 1]);
    for (; i < kWords - 1; i++)
      state_[i] = state_[i + kShift - kWords] ^ mixed(state_[i], state_[i + 1]);
    state_[i] = state_[kShift - 1] ^ mixed(state_[i], state_[0]);
    at_ = 0;
  }
  uint32_t state_[kWords];
  int at_ = kWords;
};

uint32_t mask_of(uint32_t most) {
  uint32_t mask = most;
  for (int shift = 1; shift < 32; shift *= 2) mask |= mask >> shift;
  return mask;
}

}  // namespace

int64_t first_draw(uint32_t seed, int64_t below) {
  const auto most = uint32_t(below - 1);
  return Twister(seed).up_to(most, mask_of(most));
}

void bootstrap_counts(uint32_t seed, int64_t rows, int64_t draws, double* counts) {
  std::fill(counts, counts + rows, 0.0);
  if (rows == 1) {
    counts[0] = double(draws);
    return;
  }
  Twister twister(seed);
  const auto most = uint32_t(rows - 1);
  const uint32_t mask = mask_of(most);
  for (int64_t i = 0; i < draws; i++) counts[twister.up_to(most, mask)] += 1.0;
}

}  // namespace fastnn
