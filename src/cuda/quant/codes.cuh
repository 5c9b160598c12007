// From numbers to those of a scheme and back, to the bits of quant/quantize.inl; which scale is
// chosen. Products and sums are named (__fmul_rn), as the compiler would make one operation of two,
// which rounds differently.
#pragma once
#include "common/philox.hpp"
#include "cuda/device.cuh"
#include "quant/scheme.hpp"

namespace fastnn::cuda {

// A float32 between -2^22 and 2^22 plus this is rounded to an integer, halves to even, which then
// is its lower bits.
constexpr float kToInteger = 12582912.0f;
constexpr uint32_t kToIntegerBits = 0x4B400000;

struct Nearest {
  __device__ __forceinline__ uint32_t operator()(float y) const {
    return __float_as_uint(__fadd_rn(y, kToInteger));
  }
};
struct Stochastic {
  uint32_t word;
  __device__ __forceinline__ uint32_t operator()(float y) const {
    const float low = floorf(y), above = __fsub_rn(y, low);
    const float whole = float(word >> 8) * 0x1p-24f < above ? __fadd_rn(low, 1) : low;
    return __float_as_uint(__fadd_rn(whole, kToInteger));
  }
};

// What a scale makes of numbers: integers are clamped before the zero point is added, so that the
// sum needs no more than integers' own.
struct Grid {
  float inverse, least, most;
  uint32_t zero;
  Grid() = default;
  __device__ __forceinline__ Grid(Limits limits, float scale, int zero_point) {
    inverse = __frcp_rn(scale);
    least = limits.least - float(zero_point), most = limits.most - float(zero_point);
    zero = uint32_t(zero_point);
  }
};

// Integers of 8 bits, and of 4 before they are packed: encode() leaves them in the lower bits. They
// are read without their sign, which turned the other way is an offset: of the numbers 0 to 255 or
// 0 to 15, `offset` (128, 8 or 0) is 0.
struct Integers {
  template <class Round>
  __device__ static __forceinline__ uint32_t encode(float x, const Grid& grid, Round round) {
    float y = __fmul_rn(x, grid.inverse);
    y = y != y ? 0 : fminf(fmaxf(y, grid.least), grid.most);
    return round(y) + grid.zero;
  }
  __device__ static __forceinline__ float decode(uint32_t code, uint32_t offset, float zero) {
    return __fsub_rn(float(code ^ offset), zero);
  }
};

// As isa/float8.hpp. `largest` is the code of the largest finite number.
template <int digits, int bias, uint32_t largest>
struct Float8 {
  template <class Round>
  __device__ static __forceinline__ uint32_t encode(float x, const Grid& grid, Round round) {
    const float y = __fmul_rn(x, grid.inverse), a = fminf(fabsf(y), grid.most);
    const int above = int(__float_as_uint(a) >> 23) - (127 - bias);
    const int exponent = above > 1 ? above : 1;
    const float per_unit = __uint_as_float(uint32_t(127 + bias + digits - exponent) << 23);
    // A count that was rounded up to the next binade carries into the exponent.
    const uint32_t count = round(__fmul_rn(a, per_unit)) - kToIntegerBits;
    const uint32_t code = (uint32_t(exponent - 1) << digits) + count;
    // The sign is x's: a product that is NaN has none of its own on a GPU.
    return (y != y ? 0x7f : code) | (__float_as_uint(x) >> 24 & 0x80);
  }
  __device__ static __forceinline__ float decode(uint32_t code, uint32_t, float) {
    const uint32_t magnitude = code & 0x7f, sign = (code & 0x80) << 24;
    const float value =
        __uint_as_float(magnitude << (23 - digits)) * __uint_as_float((254 - bias) << 23);
    // Infinity and NaN: an exponent of ones.
    const uint32_t beyond = magnitude << (23 - digits) | 0x7f800000;
    return __uint_as_float((magnitude > largest ? beyond : __float_as_uint(value)) | sign);
  }
};
using E4M3 = Float8<3, 7, 0x7e>;
using E5M2 = Float8<2, 15, 0x7b>;

// Calls f with a value of the scheme's Code.
template <class F>
void with_code(Scheme scheme, F f) {
  switch (scheme) {
    case Scheme::e4m3:
      return f(E4M3{});
    case Scheme::e5m2:
      return f(E5M2{});
    default:
      return f(Integers{});
  }
}
// For Integers::decode().
inline uint32_t sign_offset(Scheme scheme) {
  return scheme == Scheme::s8 ? 128 : scheme == Scheme::s4 ? 8 : 0;
}

// ---- several at a time -------------------------------------------------------------------------

// Codes of n numbers from an address on that is a multiple of n (or of n / 2, two a byte).
template <int n>
__device__ __forceinline__ void store_codes(uint8_t* to, const uint32_t (&codes)[n], bool packed) {
  static_assert(n == 4 || n == 8);
  if (packed) {
    uint32_t word = 0;
#pragma unroll
    for (int e = 0; e < n; e++) word |= (codes[e] & 15) << 4 * e;
    if constexpr (n == 4)
      *reinterpret_cast<uint16_t*>(to) = uint16_t(word);
    else
      *reinterpret_cast<uint32_t*>(to) = word;
    return;
  }
  uint32_t words[n / 4] = {};
#pragma unroll
  for (int e = 0; e < n; e++) words[e / 4] |= (codes[e] & 255) << 8 * (e % 4);
  if constexpr (n == 4)
    *reinterpret_cast<uint32_t*>(to) = words[0];
  else
    *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
}
// Two words, of which four codes use one and eight packed ones, too.
template <int n>
__device__ __forceinline__ uint2 load_codes(const uint8_t* from, bool packed) {
  if constexpr (n == 4)
    return make_uint2(packed ? *reinterpret_cast<const uint16_t*>(from)
                             : *reinterpret_cast<const uint32_t*>(from),
                      0);
  return packed ? make_uint2(*reinterpret_cast<const uint32_t*>(from), 0)
                : *reinterpret_cast<const uint2*>(from);
}
__device__ __forceinline__ uint32_t code_of(uint2 words, int e, bool packed) {
  return packed ? words.x >> 4 * e & 15 : (e < 4 ? words.x : words.y) >> 8 * (e % 4) & 255;
}

// That of one element. Chosen, not indexed, which would put all four into memory.
__device__ __forceinline__ Stochastic stochastic_of(uint64_t seed, uint64_t element) {
  const PhiloxWords words = philox(seed, element / 4);
  const uint32_t low = element & 1 ? words.word[1] : words.word[0];
  const uint32_t high = element & 1 ? words.word[3] : words.word[2];
  return {element & 2 ? high : low};
}

// n neighbours, of which the first is element `first` of all: with random numbers a multiple of 4.
template <class Code, bool stochastic, int n, class GridOf>
__device__ __forceinline__ void encode(uint32_t (&codes)[n], const float (&x)[n], GridOf grid_of,
                                       uint64_t seed, uint64_t first) {
#pragma unroll
  for (int e = 0; e < n; e += 4) {
    PhiloxWords words;
    if constexpr (stochastic) words = philox(seed, (first + e) / 4);
#pragma unroll
    for (int i = e; i < e + 4; i++)
      if constexpr (stochastic)
        codes[i] = Code::encode(x[i], grid_of(i), Stochastic{words.word[i - e]});
      else
        codes[i] = Code::encode(x[i], grid_of(i), Nearest{});
  }
}

// ---- scales ------------------------------------------------------------------------------------

struct Chosen {
  float scale;
  int zero;
};
__device__ inline Chosen choose(float low, float high, Limits range, bool symmetric) {
  const float steps = range.most - range.least;
  float scale = symmetric ? __fdiv_rn(fmaxf(high, -low), range.most)
                          : __fsub_rn(__fdiv_rn(high, steps), __fdiv_rn(low, steps));
  scale = scale == 0 ? 1 : fmaxf(scale, 0x1p-126f);
  if (symmetric) return {scale, 0};
  const float zero = range.least - rintf(__fdiv_rn(low, scale));
  return {scale, int(fminf(fmaxf(zero, range.least), range.most))};
}
// What is infinite or NaN has no say in the scale.
__device__ __forceinline__ float finite(float x) { return fabsf(x) <= 3.402823466e38f ? x : 0; }

}  // namespace fastnn::cuda
