// The twins of the wrappers in ptx.cuh. Layouts of fragments are those of the PTX ISA, 9.7.14
// ("Warp Level Matrix Multiply-Accumulate Instructions").
#pragma once
#include "cuda/host_emulation/cuda.hpp"

#define FASTNN_HERE emulation::Where where = emulation::Where::current()

namespace fastnn::ptx {

// ---- cp.async ----------------------------------------------------------------------------------

template <int bytes>
void cp_async(void* to, const void* from, int valid = bytes, FASTNN_HERE) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  if (reinterpret_cast<uintptr_t>(to) % bytes ||
      (valid && reinterpret_cast<uintptr_t>(from) % bytes))
    emulation::fault(where, "cp.async: an address that is no multiple of " + std::to_string(bytes));
  if (valid < 0 || valid > bytes)
    emulation::fault(where, "cp.async: " + std::to_string(valid) + " valid bytes");
  emulation::copy_async(to, from, size_t(valid), size_t(bytes - valid));
}
inline void cp_async_commit() { emulation::copy_commit(); }
template <int groups>
void cp_async_wait() {
  emulation::copy_wait(groups);
}

// ---- ldmatrix ----------------------------------------------------------------------------------

template <bool transposed>
struct LoadMatrices {
  static void of(emulation::Lanes& lanes) {
    for (int lane = 0; lane < 32; lane++)
      for (int matrix = 0; matrix < 4; matrix++) {
        uint16_t pair[2];
        for (int i = 0; i < 2; i++) {
          const int at = 2 * (lane % 4) + i;
          const int row = transposed ? at : lane / 4, column = transposed ? lane / 4 : at;
          const auto* address = *static_cast<const char* const*>(lanes.value[matrix * 8 + row]);
          std::memcpy(&pair[i], address + 2 * column, 2);
        }
        std::memcpy(static_cast<uint32_t*>(lanes.result[lane]) + matrix, pair, 4);
      }
  }
};

template <bool transposed>
void load_matrices(uint32_t (&r)[4], const void* row, const emulation::Where& where) {
  if (reinterpret_cast<uintptr_t>(row) % 16)
    emulation::fault(where, "ldmatrix: an address that is no multiple of 16");
  emulation::collective(~0u, &row, r, LoadMatrices<transposed>::of, "ldmatrix", where);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, FASTNN_HERE) {
  load_matrices<false>(r, row, where);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, FASTNN_HERE) {
  load_matrices<true>(r, row, where);
}

inline uint32_t pack_bf16(float low, float high) {
  return __float2bfloat16_rn(low).bits | uint32_t(__float2bfloat16_rn(high).bits) << 16;
}

inline uint32_t pack_f16(float low, float high) {
  return __float2half_rn(low).bits | uint32_t(__float2half_rn(high).bits) << 16;
}

inline int anew(int x) { return x; }

inline float exp2(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0 : y;
}

// In float64, of which a product of two has all digits, and then rounded once (twice where the sum
// has more than 53, which those of small integers have not).
template <class Half, class To, class From>
uint32_t fma_pairs(uint32_t a, uint32_t b, uint32_t c, To to, From from) {
  const auto part = [&](uint32_t x, int i) { return double(to(Half{uint16_t(x >> 16 * i)})); };
  uint32_t two = 0;
  for (int i = 0; i < 2; i++)
    two |= uint32_t(from(float(part(a, i) * part(b, i) + part(c, i))).bits) << 16 * i;
  return two;
}
inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  return fma_pairs<__nv_bfloat16>(a, b, c, __bfloat162float, __float2bfloat16_rn);
}
inline uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  return fma_pairs<__half>(a, b, c, __half2float, __float2half_rn);
}

// ---- mma.sync ----------------------------------------------------------------------------------

// D += A B with A 16 x K and B K x 8, of elements of `bits` bits: a register holds 32 / bits
// neighbours along K. Thread (group, t) = (lane / 4, lane % 4) has rows group and group + 8 of A
// and D, column group of B, columns 2 t and 2 t + 1 of D.
template <class Element, class Accumulator, class Other = Element>
struct Multiply {
  static constexpr int kEach = 4 / sizeof(typename Element::Type), kK = 8 * kEach;
  struct Operands {
    const uint32_t *a, *b;
    Accumulator* d;
  };

  static void of(emulation::Lanes& lanes) {
    using Wide = typename Element::Wide;
    Wide a[16][kK], b[8][kK];
    for (int lane = 0; lane < 32; lane++) {
      const auto* x = static_cast<const Operands*>(lanes.value[lane]);
      const int group = lane / 4, k = lane % 4 * kEach;
      for (int i = 0; i < kEach; i++) {
        a[group][k + i] = part(x->a[0], i), a[group + 8][k + i] = part(x->a[1], i);
        a[group][k + kK / 2 + i] = part(x->a[2], i),
                              a[group + 8][k + kK / 2 + i] = part(x->a[3], i);
        b[group][k + i] = part<Other>(x->b[0], i),
                     b[group][k + kK / 2 + i] = part<Other>(x->b[1], i);
      }
    }
    for (int lane = 0; lane < 32; lane++) {
      Accumulator* d = static_cast<const Operands*>(lanes.value[lane])->d;
      for (int i = 0; i < 4; i++) {
        const Wide* row = a[lane / 4 + i / 2 * 8];
        const Wide* column = b[lane % 4 * 2 + i % 2];
        Wide sum = d[i];
        for (int k = 0; k < kK; k++) sum += row[k] * column[k];
        d[i] = Element::round(sum);
      }
    }
  }

  template <class Of = Element>
  static typename Of::Wide part(uint32_t word, int i) {
    typename Of::Type element;
    std::memcpy(&element, reinterpret_cast<const char*>(&word) + i * sizeof(element),
                sizeof(element));
    return Of::widen(element);
  }
};

// Tensor cores add exact products in a wide register and cut what is left off, instead of rounding.
inline float toward_zero(double x) {
  float f = float(x);
  if (std::fabs(double(f)) > std::fabs(x) && std::isfinite(x)) f = std::nextafterf(f, 0.0f);
  return f;
}
struct OfBf16 {
  using Type = uint16_t;
  using Wide = double;
  static double widen(uint16_t x) { return __bfloat162float({x}); }
  static float round(double x) { return toward_zero(x); }
};
struct OfF16 {
  using Type = uint16_t;
  using Wide = double;
  static double widen(uint16_t x) { return __half2float({x}); }
  static float round(double x) { return toward_zero(x); }
};
struct OfTf32 {
  using Type = uint32_t;
  using Wide = double;
  static double widen(uint32_t x) { return __uint_as_float(x & 0xFFFFE000u); }
  static float round(double x) { return toward_zero(x); }
};
template <class T>
struct OfInteger {
  using Type = T;
  using Wide = int64_t;
  static int64_t widen(T x) { return x; }
  static int32_t round(int64_t x) { return int32_t(uint32_t(uint64_t(x))); }
};
struct OfS8 : OfInteger<int8_t> {};
struct OfU8 : OfInteger<uint8_t> {};

template <class Element, class Other = Element, class Accumulator>
void multiply(Accumulator (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              const emulation::Where& where) {
  using M = Multiply<Element, Accumulator, Other>;
  const typename M::Operands operands{a, b, d};
  emulation::collective(~0u, &operands, nullptr, M::of, "mma.sync", where);
}
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              FASTNN_HERE) {
  multiply<OfBf16>(d, a, b, where);
}
inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             FASTNN_HERE) {
  multiply<OfF16>(d, a, b, where);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             FASTNN_HERE) {
  multiply<OfTf32>(d, a, b, where);
}
inline void mma_m16n8k32_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            FASTNN_HERE) {
  multiply<OfS8>(d, a, b, where);
}
inline void mma_m16n8k32_u8_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                               FASTNN_HERE) {
  multiply<OfU8, OfS8>(d, a, b, where);
}

}  // namespace fastnn::ptx
#undef FASTNN_HERE
