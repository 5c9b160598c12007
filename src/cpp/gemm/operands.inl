// Elements of an operand as float32: those of up to 16 bits that vectors load themselves, and
// floats of eight, which become float32, or bfloat16, exactly. Included after isa/vec.hpp, in its
// namespace.
#pragma once
#include "gemm/float8.hpp"
#include "isa/float8.hpp"

namespace fastnn::FASTNN_TARGET {

template <class Src>
struct Float8Of {
  static constexpr bool exists = false;
};
template <>
struct Float8Of<f8_e4m3> : E4M3 {
  static constexpr bool exists = true;
};
template <>
struct Float8Of<f8_e5m2> : E5M2 {
  static constexpr bool exists = true;
};

template <class V, class Src>
FASTNN_INLINE V load_operand(const Src* p) {
  if constexpr (Float8Of<Src>::exists)
    return Float8Of<Src>::decode(load_u8(p));
  else
    return V::load(p);
}
template <class V, class Src>
FASTNN_INLINE V load_operand_partial(const Src* p, int n) {
  if constexpr (Float8Of<Src>::exists)
    return Float8Of<Src>::decode(load_u8_partial(p, n));
  else
    return V::load_partial(p, n);
}
template <class Src>
FASTNN_INLINE float operand(Src x) {
  if constexpr (Float8Of<Src>::exists) {
    float lanes[VecF32::width];
    Float8Of<Src>::decode(VecI32::set1(x.bits)).store(lanes);
    return lanes[0];
  } else {
    return to_f32(x);
  }
}

}  // namespace fastnn::FASTNN_TARGET
