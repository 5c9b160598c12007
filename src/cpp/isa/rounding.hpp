// The two ways of making integers of float32 lanes: to nearest, halves to even, and stochastic, up
// with the probability of what a number is above its floor. Included after FASTNN_TARGET was
// chosen; see isa/vec.hpp.
//
//   floor(v)
//   uniform(words)      VecF32 from 0 to 1 - 2^-24: the upper 24 bits of random words
//   Nearest{}(v), Stochastic{words}(v)
#pragma once
#include "isa/integers.hpp"

namespace fastnn::FASTNN_TARGET {

#if FASTNN_TARGET_ID == 2
FASTNN_INLINE VecF32 floor(VecF32 a) { return {_mm512_roundscale_ps(a.r, 9)}; }
#elif FASTNN_TARGET_ID == 1
FASTNN_INLINE VecF32 floor(VecF32 a) { return {_mm256_round_ps(a.r, 9)}; }
#else
FASTNN_INLINE VecF32 floor(VecF32 a) {
  VecF32 v;
  for (int i = 0; i < VecF32::width; i++) v.r[i] = __builtin_floorf(a.r[i]);
  return v;
}
#endif

FASTNN_INLINE VecF32 uniform(const uint32_t* words) {
  return to_float(shift_right<8>(VecI32::load(words))) * VecF32::set1(0x1p-24f);
}

struct Nearest {
  FASTNN_INLINE VecF32 operator()(VecF32 y) const { return round(y); }
};
struct Stochastic {
  const uint32_t* words;
  FASTNN_INLINE VecF32 operator()(VecF32 y) const {
    const VecF32 low = floor(y);
    const auto up = lt(uniform(words), y - low);
    return low + select(up, VecF32::set1(1), VecF32::zero());
  }
};

}  // namespace fastnn::FASTNN_TARGET
