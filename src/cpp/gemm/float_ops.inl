// Ops of the plain float32 and float64 kernels: one element a word, a fused multiply-add a vector.
// bfloat16, float16 and floats of eight bits become float32 when they are packed.
#pragma once
#include "gemm/microkernel.inl"
#include "gemm/operands.inl"

namespace fastnn::FASTNN_TARGET {

template <class V>
struct FloatOps {
  using Word = typename V::T;
  using Acc = typename V::T;
  using Vec = V;
  using Sum = V;
  static constexpr int64_t fold = sizeof(Word) == 8 ? 256 : 128;  // see kernel.hpp
  static constexpr int width = V::width, dot_width = V::width, k_word = 1;

  static FASTNN_INLINE V zero() { return V::zero(); }
  static FASTNN_INLINE V load(const char* p) { return V::load((const Word*)p); }
  static FASTNN_INLINE V load_partial(const char* p, int n) {
    return V::load_partial((const Word*)p, n);
  }
  static FASTNN_INLINE V broadcast(const char* p) { return V::set1(*(const Word*)p); }
  static FASTNN_INLINE V multiply_add(V sum, V a, V b) { return fma(a, b, sum); }
  static FASTNN_INLINE V start(const char*) { return V::zero(); }
  static FASTNN_INLINE V sums(const Acc* p) { return V::load(p); }
  static FASTNN_INLINE V plus(V a, V b) { return a + b; }
  static FASTNN_INLINE void put(Acc* p, V sum) { sum.store(p); }

  static FASTNN_INLINE Word element(double x) { return Word(x); }
  template <class Src>
  static FASTNN_INLINE Word element(Src x) {
    return operand(x);
  }
  template <class Src>
  static FASTNN_INLINE Word make_word(const Src* e) {
    return element(e[0]);
  }
  static FASTNN_INLINE Word make_zero_word() { return 0; }

  template <class Src>
  static FASTNN_INLINE void across(const Src* src, int64_t, int n, Word* dst, int room) {
    const V v = n == width ? load_operand<V>(src) : load_operand_partial<V>(src, n);
    room == width ? v.store(dst) : v.store_partial(dst, room);
  }
  template <class Src>
  static FASTNN_INLINE void along(const Src* src, int64_t lane_stride, int n, Word* dst, int ld,
                                  int room) {
#if FASTNN_TARGET_ID == 2
    if constexpr (sizeof(Word) == 4) {
      __m512i row[16];
#pragma GCC unroll 16
      for (int l = 0; l < 16; l++)
        row[l] = l < n ? _mm512_castps_si512(load_operand<V>(src + l * lane_stride).r)
                       : _mm512_setzero_si512();
      transpose16(row);
      store_words(row, (uint32_t*)dst, ld, room);
      return;
    }
#endif
    for (int w = 0; w < width; w++)
      for (int l = 0; l < room; l++)
        dst[w * ld + l] = l < n ? element(src[l * lane_stride + w]) : Word(0);
  }

  template <class Src>
  static FASTNN_INLINE V dot_load(const Src* p) {
    return load_operand<V>(p);
  }
  template <class Src>
  static FASTNN_INLINE V dot_load_partial(const Src* p, int n) {
    return load_operand_partial<V>(p, n);
  }
};
using F32Ops = FloatOps<VecF32>;
using F64Ops = FloatOps<VecF64>;

// So that a panel of B stays in L2, from which a tile reads it as fast as it multiplies.
constexpr int64_t kFloatBlock = 1024;

// The kernel of one source type over FloatOps. In place only where the source is what is computed.
template <class V, class Src, int MR, int NV>
constexpr Kernel float_kernel(const char* name, const char* dot_name, DType type) {
  using Ops = FloatOps<V>;
  constexpr bool in_place = sizeof(Src) == sizeof(typename V::T);
  constexpr DType acc = sizeof(typename V::T) == 8 ? DType::f64 : DType::f32;
  constexpr int size = sizeof(typename V::T), nr = NV * V::width;
  return {.name = name,
          .a = type,
          .b = type,
          .acc = acc,
          .mr = MR,
          .nr = nr,
          .kc = kFloatBlock,
          .fold = Ops::fold,
          .a_bytes = size,
          .b_bytes = size,
          .pack_a = pack_panel<Ops, Src, MR>,
          .pack_b = pack_panel<Ops, Src, nr>,
          .tile = run_tile<Ops, MR, NV, in_place, in_place>,
          .store = size == 8 ? store_f64 : store_f32,
          .dot = run_dot<Ops, Src>,
          .dot_name = dot_name,
          .direct_a = in_place,
          .direct_b = in_place,
          .finishes = true};
}

// For few rows: more vectors a row, B read where it lies.
template <class V, int MR, int NV>
constexpr Kernel wide_kernel(const char* name, DType type) {
  using Ops = FloatOps<V>;
  using T = typename V::T;
  constexpr int nr = NV * V::width;
  return {.name = name,
          .a = type,
          .b = type,
          .acc = type,
          .mr = MR,
          .nr = nr,
          .kc = kFloatBlock,
          .fold = Ops::fold,
          .a_bytes = sizeof(T),
          .b_bytes = sizeof(T),
          .tile = run_wide_tile<Ops, MR, NV>,
          .store = sizeof(T) == 8 ? store_f64 : store_f32,
          .dot = run_dot<Ops, T>,
          .direct_a = true,
          .direct_b = true,
          .finishes = true,
          .few_rows = true};
}

// n independent chains of sums on registers, for peak_flops.
template <class Sum, class Step>
FASTNN_INLINE void chains(Sum* sums, int64_t iterations, Step step) {
  Sum s[12];  // a local array: its elements stay in registers
#pragma GCC unroll 16
  for (int c = 0; c < 12; c++) s[c] = sums[c];
  for (int64_t i = 0; i < iterations; i++)
#pragma GCC unroll 16
    for (int c = 0; c < 12; c++) step(s[c]);
#pragma GCC unroll 16
  for (int c = 0; c < 12; c++) sums[c] = s[c];
}

}  // namespace fastnn::FASTNN_TARGET
