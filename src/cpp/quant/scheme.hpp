// What numbers are quantized to. The numbers are shared with
// python/fastnn/backends/cpu/quantize.py.
#pragma once

namespace fastnn {

// s4 and u4: two a byte, the first in the low half. e4m3 and e5m2: torch's float8_e4m3fn,
// float8_e5m2.
enum class Scheme : int { s8 = 0, u8 = 1, s4 = 2, u4 = 3, e4m3 = 4, e5m2 = 5 };
constexpr int kSchemes = 6;

constexpr bool is_packed(Scheme s) { return s == Scheme::s4 || s == Scheme::u4; }
constexpr bool is_integer(Scheme s) { return s < Scheme::e4m3; }

// Whether numbers can be divided by it: positive, normal and finite.
constexpr bool is_scale(float x) { return x >= 0x1p-126f && x <= 0x1.fffffep127f; }

// The least and the largest number; a symmetric scale maps the largest magnitude to `most`.
struct Limits {
  float least, most;
};
constexpr Limits limits(Scheme s) {
  switch (s) {
    case Scheme::s8:
      return {-128, 127};
    case Scheme::u8:
      return {0, 255};
    case Scheme::s4:
      return {-8, 7};
    case Scheme::u4:
      return {0, 15};
    case Scheme::e4m3:
      return {-448, 448};
    default:
      return {-57344, 57344};
  }
}

}  // namespace fastnn
