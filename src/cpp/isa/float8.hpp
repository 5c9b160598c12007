// Floats of eight bits, in the low bytes of VecI32: torch's float8_e4m3fn (Micikevicius et al.,
// "FP8 formats for deep learning", 2022: no infinity, NaN is all ones, largest number 448) and
// float8_e5m2 (a float16 without its lower byte, largest number 57344). Included after
// FASTNN_TARGET was chosen; see isa/vec.hpp.
//
//   F::encode(v, whole)   the codes of v, saturated: its magnitude is counted in units of the last
//                         place of its binade, and whole(count) makes an integer of the count. NaN
//                         stays NaN, and everything keeps its sign.
//   F::decode(codes)      their values
#pragma once
#include "isa/integers.hpp"

namespace fastnn::FASTNN_TARGET {

// `largest` is the code of the largest finite number.
template <int digits, int bias, int largest>
struct Float8 {
  // The exponent is that of the leading digit; below 1 numbers are subnormal, in units of 1's.
  template <class F>
  static FASTNN_INLINE VecI32 encode(VecF32 v, F whole) {
    constexpr float largest_value =
        float((1 << digits) + (largest & ((1 << digits) - 1))) * power(largest_exponent());
    const VecF32 a = min(VecF32::set1(largest_value), abs(v));  // NaN passes
    const VecI32 above = shift_right<23>(bits_of(a)) - VecI32::set1(127 - bias);
    const VecI32 exponent = max(above, VecI32::set1(1));
    const VecF32 per_unit = float_of(shift_left<23>(VecI32::set1(127 + bias + digits) - exponent));
    // A count that was rounded up to the next binade carries into the exponent.
    const VecI32 count = to_int(whole(a * per_unit));
    const VecI32 code = shift_left<digits>(exponent - VecI32::set1(1)) + count;
    const VecI32 sign = shift_right<24>(bits_of(v)) & VecI32::set1(0x80);
    return select(is_nan(v), VecI32::set1(0x7f), code) | sign;
  }

  static FASTNN_INLINE VecF32 decode(VecI32 code) {
    const VecI32 mag = code & VecI32::set1(0x7f);
    const VecF32 magnitude = to_float(mag);
    // Subnormal numbers by a product, so that nothing depends on whether the CPU flushes its own.
    const VecF32 least = VecF32::set1(power(1 - bias - digits));
    const VecF32 normal =
        float_of(shift_left<23 - digits>(mag + VecI32::set1((127 - bias) << digits)));
    VecF32 value =
        select(lt(magnitude, VecF32::set1(float(1 << digits))), magnitude * least, normal);
    // Infinity and NaN: an exponent of ones.
    const VecI32 beyond = shift_left<23 - digits>(mag) | VecI32::set1(0x7f800000);
    value = select(lt(VecF32::set1(float(largest)), magnitude), float_of(beyond), value);
    return float_of(bits_of(value) | shift_left<24>(code & VecI32::set1(0x80)));
  }

 private:
  static constexpr int largest_exponent() { return (largest >> digits) - bias - digits; }
  static constexpr float power(int n) {
    float p = 1;
    for (; n > 0; n--) p *= 2;
    for (; n < 0; n++) p /= 2;
    return p;
  }
};
using E4M3 = Float8<3, 7, 0x7e>;
using E5M2 = Float8<2, 15, 0x7b>;

}  // namespace fastnn::FASTNN_TARGET
