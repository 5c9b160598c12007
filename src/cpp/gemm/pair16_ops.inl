// int8 without VNNI: widened to int16 when packed, two a word, and vpmaddwd adds their two products
// into 32 bits. Exact: |-128 * -128 * 2| fits, where vpmaddubsw would saturate at 16 bits.
#pragma once
#include "gemm/microkernel.inl"

namespace fastnn::FASTNN_TARGET {

struct Pair16Ops {
  using Word = int32_t;
  using Acc = int32_t;
#if FASTNN_TARGET_ID == 2
  using Vec = __m512i;
  static constexpr int width = 16;
  static FASTNN_INLINE Vec zero() { return _mm512_setzero_si512(); }
  static FASTNN_INLINE Vec load(const char* p) { return _mm512_loadu_si512(p); }
  static FASTNN_INLINE Vec broadcast(const char* p) { return _mm512_set1_epi32(*(const int*)p); }
  static FASTNN_INLINE Vec add(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
  static FASTNN_INLINE Vec multiply_add(Vec sum, Vec a, Vec b) {
    return add(sum, _mm512_madd_epi16(a, b));
  }
  static FASTNN_INLINE void store(int32_t* p, Vec v) { _mm512_storeu_si512(p, v); }
#else
  using Vec = __m256i;
  static constexpr int width = 8;
  static FASTNN_INLINE Vec zero() { return _mm256_setzero_si256(); }
  static FASTNN_INLINE Vec load(const char* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static FASTNN_INLINE Vec broadcast(const char* p) { return _mm256_set1_epi32(*(const int*)p); }
  static FASTNN_INLINE Vec add(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
  static FASTNN_INLINE Vec multiply_add(Vec sum, Vec a, Vec b) {
    return add(sum, _mm256_madd_epi16(a, b));
  }
  static FASTNN_INLINE void store(int32_t* p, Vec v) { _mm256_storeu_si256((__m256i*)p, v); }
#endif
  using Sum = Vec;
  static constexpr int k_word = 2;
  static constexpr bool requantizes = false;
  static FASTNN_INLINE Vec load_partial(const char* p, int) { return load(p); }
  static FASTNN_INLINE Vec start(const char*) { return zero(); }
  static FASTNN_INLINE Vec sums(const int32_t* p) { return load((const char*)p); }
  static FASTNN_INLINE Vec plus(Vec a, Vec b) { return add(a, b); }
  static FASTNN_INLINE void put(int32_t* p, Vec sum) { store(p, sum); }
  template <class Src>
  static FASTNN_INLINE Word make_word(const Src* e) {
    return Word(uint32_t(uint16_t(int16_t(e[0]))) | uint32_t(uint16_t(int16_t(e[1]))) << 16);
  }
  static FASTNN_INLINE Word make_zero_word() { return 0; }
  template <class Src>
  static FASTNN_INLINE void across(const Src* src, int64_t k_stride, int n, Word* dst, int room) {
    for (int l = 0; l < room; l++) {
      const Src e[2] = {l < n ? src[l] : Src(0), l < n ? src[l + k_stride] : Src(0)};
      dst[l] = make_word(e);
    }
  }
  template <class Src>
  static FASTNN_INLINE void along(const Src* src, int64_t lane_stride, int n, Word* dst, int ld,
                                  int room) {
    for (int l = 0; l < room; l++)
      for (int w = 0; w < width; w++)
        dst[w * ld + l] = l < n ? make_word(src + l * lane_stride + 2 * w) : 0;
  }
};

// A read where it lies: two bytes a word, widened on the way.
struct Pair8InPlaceOps : Pair16Ops {
  static FASTNN_INLINE Vec broadcast(const char* p) {
    short pair;
    __builtin_memcpy(&pair, p, 2);
#if FASTNN_TARGET_ID == 2
    return _mm512_cvtepu8_epi16(_mm256_set1_epi16(pair));
#else
    return _mm256_cvtepu8_epi16(_mm_set1_epi16(pair));
#endif
  }
};

template <class A, int MR, int NV>
constexpr Kernel pair16_kernel(const char* name, DType a, int64_t kc) {
  constexpr int nr = NV * Pair16Ops::width;
  constexpr bool in_place = A(-1) > A(0);
  TileFn tile = run_tile<Pair16Ops, MR, NV, false, false>;
  if constexpr (in_place) tile = run_tile_apart<Pair16Ops, Pair8InPlaceOps, MR, NV>;
  return {.name = name,
          .a = a,
          .b = DType::s8,
          .acc = DType::s32,
          .mr = MR,
          .nr = nr,
          .k_word = 2,
          .k_step = 2,
          .kc = kc,
          .a_bytes = 2,
          .b_bytes = 2,
          .pack_a = pack_panel<Pair16Ops, A, MR>,
          .pack_b = pack_panel<Pair16Ops, int8_t, nr>,
          .tile = tile,
          .store = store_s32,
          .direct_a = in_place,
          .finishes = true,
          .runs = in_place};
}

}  // namespace fastnn::FASTNN_TARGET
