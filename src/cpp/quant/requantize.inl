// Requantize on vectors: see requantize.hpp. Included after isa/vec.hpp, in its namespace.
#pragma once
#include "isa/integers.hpp"
#include "isa/vec.hpp"
#include "quant/requantize.hpp"

namespace fastnn::FASTNN_TARGET {

// A vector of int32, as many as VecF32 has floats. `n`: only the first n lanes are in memory.
struct Ints {
  static constexpr int width = VecF32::width;
#if FASTNN_TARGET_ID == 2
  __m512i r;
  static FASTNN_INLINE Ints zero() { return {_mm512_setzero_si512()}; }
  static FASTNN_INLINE Ints set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
  static FASTNN_INLINE Ints load(const int32_t* p, int n) {
    return {n == width ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi32(VecF32::first(n), p)};
  }
  static FASTNN_INLINE __m128i bytes(const void* p, int n) {
    return n == width ? _mm_loadu_si128((const __m128i*)p)
                      : _mm_maskz_loadu_epi8(VecF32::first(n), p);
  }
  static FASTNN_INLINE Ints widen(const uint8_t* p, int n) {
    return {_mm512_cvtepu8_epi32(bytes(p, n))};
  }
  static FASTNN_INLINE Ints widen(const int8_t* p, int n) {
    return {_mm512_cvtepi8_epi32(bytes(p, n))};
  }
  // Of each lane of an 8-bit x and an 8-bit w, to this.
  FASTNN_INLINE Ints plus_product(Ints x, Ints w) const {
    return {_mm512_add_epi32(r, _mm512_madd_epi16(x.r, w.r))};
  }
  FASTNN_INLINE VecF32 floats() const { return {_mm512_cvtepi32_ps(r)}; }
  // To the nearest, half to even; the lowest number of a NaN.
  static FASTNN_INLINE Ints rounded(VecF32 v) { return {_mm512_cvtps_epi32(v.r)}; }
  FASTNN_INLINE void store_low_bytes(uint8_t* p, int n) const {
    if (n == width)
      _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(r));
    else
      _mm512_mask_cvtepi32_storeu_epi8(p, VecF32::first(n), r);
  }
#elif FASTNN_TARGET_ID == 1
  __m256i r;
  static FASTNN_INLINE Ints zero() { return {_mm256_setzero_si256()}; }
  static FASTNN_INLINE Ints set1(int32_t x) { return {_mm256_set1_epi32(x)}; }
  static FASTNN_INLINE Ints load(const int32_t* p, int n) {
    return {_mm256_maskload_epi32(p, VecF32::first(n))};
  }
  static FASTNN_INLINE __m128i bytes(const void* p, int n) {
    if (n == width) return _mm_loadl_epi64((const __m128i*)p);
    uint64_t word = 0;
    for (int i = 0; i < n; i++) word |= uint64_t(((const uint8_t*)p)[i]) << 8 * i;
    return _mm_cvtsi64_si128((long long)word);
  }
  static FASTNN_INLINE Ints widen(const uint8_t* p, int n) {
    return {_mm256_cvtepu8_epi32(bytes(p, n))};
  }
  static FASTNN_INLINE Ints widen(const int8_t* p, int n) {
    return {_mm256_cvtepi8_epi32(bytes(p, n))};
  }
  FASTNN_INLINE Ints plus_product(Ints x, Ints w) const {
    return {_mm256_add_epi32(r, _mm256_madd_epi16(x.r, w.r))};
  }
  FASTNN_INLINE VecF32 floats() const { return {_mm256_cvtepi32_ps(r)}; }
  static FASTNN_INLINE Ints rounded(VecF32 v) { return {_mm256_cvtps_epi32(v.r)}; }
  FASTNN_INLINE void store_low_bytes(uint8_t* p, int n) const {
    const __m256i low = _mm256_and_si256(r, _mm256_set1_epi32(0xff));
    const __m256i half = _mm256_packus_epi32(low, low);
    const __m128i four =
        _mm_packus_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const uint64_t word =
        uint32_t(_mm_cvtsi128_si32(four)) | uint64_t(uint32_t(_mm_extract_epi32(four, 2))) << 32;
    if (n == width)
      __builtin_memcpy(p, &word, 8);
    else
      for (int i = 0; i < n; i++) p[i] = uint8_t(word >> 8 * i);
  }
#else
  typedef int32_t Lanes __attribute__((vector_size(4 * width)));
  Lanes r;
  static FASTNN_INLINE Ints zero() { return {Lanes{}}; }
  static FASTNN_INLINE Ints set1(int32_t x) { return {x - Lanes{}}; }
  template <class T>
  static FASTNN_INLINE Ints each(const T* p, int n) {
    Ints v = zero();
    for (int i = 0; i < n; i++) v.r[i] = p[i];
    return v;
  }
  static FASTNN_INLINE Ints load(const int32_t* p, int n) { return each(p, n); }
  static FASTNN_INLINE Ints widen(const uint8_t* p, int n) { return each(p, n); }
  static FASTNN_INLINE Ints widen(const int8_t* p, int n) { return each(p, n); }
  FASTNN_INLINE Ints plus_product(Ints x, Ints w) const { return {r + x.r * w.r}; }
  FASTNN_INLINE VecF32 floats() const {
    VecF32 v;
    for (int i = 0; i < width; i++) v.r[i] = float(r[i]);
    return v;
  }
  static FASTNN_INLINE Ints rounded(VecF32 v) {
    v = round(v);
    Ints out;
    for (int i = 0; i < width; i++) out.r[i] = v.r[i] == v.r[i] ? int32_t(v.r[i]) : INT32_MIN;
    return out;
  }
  FASTNN_INLINE void store_low_bytes(uint8_t* p, int n) const {
    for (int i = 0; i < n; i++) p[i] = uint8_t(r[i]);
  }
#endif
};
#if FASTNN_TARGET_ID == 2
FASTNN_INLINE Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.r, b.r)}; }
FASTNN_INLINE Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.r, b.r)}; }
#elif FASTNN_TARGET_ID == 1
FASTNN_INLINE Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.r, b.r)}; }
FASTNN_INLINE Ints operator-(Ints a, Ints b) { return {_mm256_sub_epi32(a.r, b.r)}; }
#else
FASTNN_INLINE Ints operator+(Ints a, Ints b) { return {a.r + b.r}; }
FASTNN_INLINE Ints operator-(Ints a, Ints b) { return {a.r - b.r}; }
#endif

FASTNN_INLINE void put_result(float* p, VecF32 v, Ints, int n) {
  n == VecF32::width ? v.store(p) : v.store_partial(p, n);
}
FASTNN_INLINE void put_result(bf16* p, VecF32 v, Ints, int n) {
  n == VecF32::width ? v.store(p) : v.store_partial(p, n);
}
FASTNN_INLINE void put_result(uint8_t* p, VecF32 v, Ints zero, int n) {
  (Ints::rounded(v) + zero).store_low_bytes(p, n);
}

// What is the same of all elements, and of the columns of one vector, on registers.
template <class Residual>
struct Requantizer {
  VecF32 low, high, residual_scale;
  Ints zero, residual_zero;
  Ints start;
  VecF32 scale, shift;
  FASTNN_INLINE explicit Requantizer(const Requantize& q)
      : low(VecF32::set1(q.low)),
        high(VecF32::set1(q.high)),
        residual_scale(VecF32::set1(q.residual_scale)),
        zero(Ints::set1(q.zero)),
        residual_zero(Ints::set1(q.residual_zero)) {}
  FASTNN_INLINE void columns(const Requantize& q, int64_t j, int n) {
    start = Ints::load(q.start + j, n);
    scale = VecF32::load_partial(q.scale + j, n), shift = VecF32::load_partial(q.shift + j, n);
  }
  // `residual` may be null where Residual is void.
  template <class T>
  FASTNN_INLINE void put(T* to, Ints sum, const Residual* residual, int n) const {
    VecF32 v = (sum + start).floats() * scale + shift;
    if constexpr (sizeof(Residual) == 1)
      v = v + (Ints::widen(residual, n) - residual_zero).floats() * residual_scale;
    put_result(to, min(high, max(low, v)), zero, n);  // a NaN is the second operand, and passes
  }
};
struct NoResidual {
  int32_t unused;
};

// Rows of a tile of sums, `ld` apart, from column j on; strides in bytes.
template <class T, class Residual>
static void requantize_rows(const int32_t* acc, int ld, int rows, int cols, const Requantize& q,
                            int64_t j, char* c, int64_t c_row, const char* residual,
                            int64_t residual_row) {
  Requantizer<Residual> to(q);
  auto vector = [&](int v, int n) __attribute__((always_inline)) {
    to.columns(q, j + v, n);
    for (int i = 0; i < rows; i++)
      to.put(reinterpret_cast<T*>(c + i * c_row) + v, Ints::load(acc + i * ld + v, n),
             reinterpret_cast<const Residual*>(residual + i * residual_row) + v, n);
  };
  int v = 0;
  for (; v + Ints::width <= cols; v += Ints::width) vector(v, Ints::width);  // without masks
  if (v < cols) vector(v, cols - v);
}
template <class T>
static void requantize_typed(const int32_t* acc, int ld, int rows, int cols, const Requantize& q,
                             int64_t j, char* c, int64_t c_row, const char* residual,
                             int64_t residual_row) {
  const auto put = !residual                      ? requantize_rows<T, NoResidual>
                   : q.residual_type == DType::s8 ? requantize_rows<T, int8_t>
                                                  : requantize_rows<T, uint8_t>;
  put(acc, ld, rows, cols, q, j, c, c_row, residual, residual ? residual_row : 0);
}
[[maybe_unused]] static void requantize_tile(const int32_t* acc, int ld, int rows, int cols,
                                             const Requantize& q, int64_t j, DType type, char* c,
                                             int64_t c_row, const char* residual,
                                             int64_t residual_row) {
  const auto put = type == DType::f32    ? requantize_typed<float>
                   : type == DType::bf16 ? requantize_typed<bf16>
                                         : requantize_typed<uint8_t>;
  put(acc, ld, rows, cols, q, j, c, c_row, residual, residual_row);
}

#if FASTNN_TARGET_ID == 2
// Rows of two whole vectors of sums, from column j on, on their way from the registers to uint8,
// with a residual of uint8 or none, where q is `small`: two rows fill a vector of bytes, and
// rounding to 32 bits, addition in 16 and packing to 8 all saturate.
template <bool HasResidual, int ROWS>
FASTNN_INLINE void requantize_registers(const __m512i (&sum)[ROWS][2], const Requantize& q,
                                        int64_t j, char* c, int64_t c_row, const char* residual,
                                        int64_t residual_row) {
  constexpr int W = Ints::width;
  const Ints start[] = {Ints::load(q.start + j, W), Ints::load(q.start + j + W, W)};
  const VecF32 scale[] = {VecF32::load(q.scale + j), VecF32::load(q.scale + j + W)};
  const VecF32 shift[] = {VecF32::load(q.shift + j), VecF32::load(q.shift + j + W)};
  const VecF32 residual_scale = VecF32::set1(q.residual_scale);
  const Ints residual_zero = Ints::set1(q.residual_zero);
  const __m512i zero = _mm512_set1_epi16(int16_t(q.zero));
  const __m512i low = _mm512_set1_epi8(int8_t(int(__builtin_rintf(q.low)) + q.zero)),
                high = _mm512_set1_epi8(int8_t(int(__builtin_rintf(q.high)) + q.zero));
  auto rounded = [&](int i, int v) __attribute__((always_inline)) {
    VecF32 y = (Ints{sum[i][v]} + start[v]).floats() * scale[v] + shift[v];
    if constexpr (HasResidual) {
      const auto* at = reinterpret_cast<const uint8_t*>(residual + i * residual_row) + v * W;
      y = y + (Ints::widen(at, W) - residual_zero).floats() * residual_scale;
    }
    return Ints::rounded(y).r;
  };
  auto words = [&](int i) __attribute__((always_inline)) {
    return _mm512_adds_epi16(_mm512_packs_epi32(rounded(i, 0), rounded(i, 1)), zero);
  };
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; i += 2) {
    const bool two = i + 1 < ROWS;
    const __m512i first = words(i), second = two ? words(i + 1) : first;
    const __m512i bytes =
        in_order(_mm512_min_epu8(high, _mm512_max_epu8(low, _mm512_packus_epi16(first, second))));
    _mm256_storeu_si256((__m256i*)(c + i * c_row), _mm512_castsi512_si256(bytes));
    if (two)
      _mm256_storeu_si256((__m256i*)(c + (i + 1) * c_row), _mm512_extracti64x4_epi64(bytes, 1));
  }
}
#endif

}  // namespace fastnn::FASTNN_TARGET
