// The kernels of linear layers whose weight alone is quantized, for one instruction set. Included
// once by each weight_only file in kernels/, which defines FASTNN_TARGET; see isa/vec.hpp for why
// nothing here may be shared between targets.
//
// A decoder makes vectors of numbers of a block of the weight's row. Products sum over K, so these
// may come in any order as long as x is packed in the same: where four bits are taken out of every
// word of a vector by a shift, vector j has every eighth element, from j on.
//
//   k, vectors, block_bytes     elements of a block, vectors it makes, bytes it is made of
//   X, Vec                      what x is packed as, a vector of it; mac(sum, x, w)
//   load(p), load_partial(p, n) a block as it lies; vec(raw, j): its vector j
//   x_vectors, x_of(j)          of x in a block, and which of them vector j is multiplied with
//   from(j, i)                  which element of the block is number i of x's vector j
//   factor                      that all results are to be multiplied by
#include "isa/vec.hpp"
#if FASTNN_TARGET_ID == 2
#include "isa/transpose_avx512.hpp"
#endif
#include "quant/weight_only.hpp"

namespace fastnn::FASTNN_TARGET {

constexpr int W = VecF32::width;
FASTNN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- numbers of a format -----------------------------------------------------------------------

template <WeightFormat F>
FASTNN_INLINE float scalar(const uint8_t* w, int64_t k) {
  if constexpr (F == WeightFormat::s8) return float(int8_t(w[k]));
  if constexpr (is_nibble(F)) {
    const int nibble = w[k / 2] >> 4 * (k & 1) & 15;
    return float(F == WeightFormat::s4 ? (nibble ^ 8) - 8 : nibble);
  }
  if constexpr (F == WeightFormat::e5m2) return to_f32(f16{uint16_t(w[k] << 8)});
  const uint16_t magnitude = w[k] & 0x7f, sign = w[k] & 0x80;
  const bool nan = magnitude == 0x7f;
  return to_f32(f16{uint16_t(sign << 8 | (nan ? 0x7e00 : magnitude << 7))}) * 256;
}

// e4m3 has the exponent bias 7 and is read as float16, whose is 15.
template <WeightFormat F>
constexpr float kFactor = F == WeightFormat::e4m3 ? 256 : 1;

#if FASTNN_TARGET_ID == 2
template <WeightFormat F>
FASTNN_INLINE VecF32 from_bytes(__m128i b) {
  if constexpr (F == WeightFormat::s8) return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b))};
  if constexpr (F == WeightFormat::e5m2)
    return {_mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(b), 8))};
  // The sign goes up with the rest, twice; all ones below it are NaN.
  const __m256i h = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(b), 7),
                                     _mm256_set1_epi16(short(0xbf80)));
  const __m256i ones = _mm256_set1_epi16(0x3f80);
  const __mmask16 nan = _mm256_cmpeq_epi16_mask(_mm256_and_si256(h, ones), ones);
  return {_mm512_cvtph_ps(_mm256_mask_mov_epi16(h, nan, _mm256_set1_epi16(0x7e00)))};
}
FASTNN_INLINE __m128i bytes(const uint8_t* p) { return _mm_loadu_si128((const __m128i*)p); }
FASTNN_INLINE __m128i bytes_partial(const uint8_t* p, int n) {
  return _mm_maskz_loadu_epi8(VecF32::first(n), p);
}
FASTNN_INLINE VecF32 from_integers(const int32_t* p, int n) {
  return {_mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(VecF32::first(n), p))};
}
FASTNN_INLINE VecF32 permuted(VecF32 v, const int32_t* index) {
  return {_mm512_permutexvar_ps(_mm512_loadu_si512(index), v.r)};
}
// The elements of 2 W nibbles, those of even index and those of odd index apart.
template <WeightFormat F>
FASTNN_INLINE void nibbles(const uint8_t* p, VecF32& even, VecF32& odd) {
  const __m512i d = _mm512_cvtepu8_epi32(bytes(p));
  const __m512 values = F == WeightFormat::s4
                            ? _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)
                            : _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  even = {_mm512_permutexvar_ps(d, values)};
  odd = {_mm512_permutexvar_ps(_mm512_srli_epi32(d, 4), values)};
}
#elif FASTNN_TARGET_ID == 1
template <WeightFormat F>
FASTNN_INLINE VecF32 from_bytes(__m128i b) {
  if constexpr (F == WeightFormat::s8) return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b))};
  if constexpr (F == WeightFormat::e5m2)
    return {_mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(b), 8))};
  const __m128i h =
      _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(b), 7), _mm_set1_epi16(short(0xbf80)));
  const __m128i ones = _mm_set1_epi16(0x3f80);
  const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(h, ones), ones);
  return {_mm256_cvtph_ps(_mm_blendv_epi8(h, _mm_set1_epi16(0x7e00), nan))};
}
FASTNN_INLINE __m128i bytes(const uint8_t* p) { return _mm_loadl_epi64((const __m128i*)p); }
FASTNN_INLINE __m128i bytes_partial(const uint8_t* p, int n) {
  uint8_t b[8] = {};
  for (int i = 0; i < n; i++) b[i] = p[i];
  return bytes(b);
}
FASTNN_INLINE VecF32 from_integers(const int32_t* p, int n) {
  return {_mm256_cvtepi32_ps(_mm256_maskload_epi32(p, VecF32::first(n)))};
}
FASTNN_INLINE VecF32 permuted(VecF32 v, const int32_t* index) {
  return {_mm256_permutevar8x32_ps(v.r, _mm256_loadu_si256((const __m256i*)index))};
}
template <WeightFormat F>
FASTNN_INLINE __m256 low_nibbles(__m256i d) {
  if constexpr (F == WeightFormat::s4)
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(d, 28), 28));
  return _mm256_cvtepi32_ps(_mm256_and_si256(d, _mm256_set1_epi32(15)));
}
template <WeightFormat F>
FASTNN_INLINE void nibbles(const uint8_t* p, VecF32& even, VecF32& odd) {
  const __m256i d = _mm256_cvtepu8_epi32(bytes(p));
  even = {low_nibbles<F>(d)};
  odd = {low_nibbles<F>(_mm256_srli_epi32(d, 4))};
}
#else
struct Bytes {
  uint8_t b[W];
};
FASTNN_INLINE Bytes bytes_partial(const uint8_t* p, int n) {
  Bytes v{};
  for (int i = 0; i < n; i++) v.b[i] = p[i];
  return v;
}
FASTNN_INLINE Bytes bytes(const uint8_t* p) { return bytes_partial(p, W); }
template <WeightFormat F>
FASTNN_INLINE VecF32 from_bytes(Bytes b) {
  VecF32 v;
  for (int i = 0; i < W; i++) v.r[i] = scalar<F>(b.b, i) * (1 / kFactor<F>);
  return v;
}
FASTNN_INLINE VecF32 from_integers(const int32_t* p, int n) {
  VecF32 v = VecF32::zero();
  for (int i = 0; i < n; i++) v.r[i] = float(p[i]);
  return v;
}
FASTNN_INLINE VecF32 permuted(VecF32 v, const int32_t* index) {
  VecF32 out;
  for (int i = 0; i < W; i++) out.r[i] = v.r[index[i]];
  return out;
}
template <WeightFormat F>
FASTNN_INLINE void nibbles(const uint8_t* p, VecF32& even, VecF32& odd) {
  for (int i = 0; i < W; i++) even.r[i] = scalar<F>(p, 2 * i), odd.r[i] = scalar<F>(p, 2 * i + 1);
}
#endif

// ---- decoders to float32 -----------------------------------------------------------------------

template <WeightFormat F>
struct ByteDecoder {
  using X = float;
  using Vec = VecF32;
  static constexpr WeightFormat format = F;
  static constexpr int k = W, vectors = 1, x_vectors = 1, block_bytes = W;
  static constexpr float factor = kFactor<F>;
  using Raw = decltype(bytes(nullptr));
  static constexpr int x_of(int j) { return j; }
  static constexpr int from(int, int i) { return i; }
  static FASTNN_INLINE Raw load(const uint8_t* p) { return bytes(p); }
  static FASTNN_INLINE Raw load_partial(const uint8_t* p, int n) { return bytes_partial(p, n); }
  static FASTNN_INLINE Vec vec(Raw raw, int) { return from_bytes<F>(raw); }
  static FASTNN_INLINE Vec load_x(const char* p) { return Vec::load((const float*)p); }
  static FASTNN_INLINE VecF32 mac(VecF32 sum, Vec x, Vec w) { return fma(x, w, sum); }
};

// Lanes of eight neighbours, 32 bits.
template <WeightFormat F>
struct NibbleDecoder : ByteDecoder<F> {
  using Vec = VecF32;
  static constexpr int k = 8 * W, vectors = 8, x_vectors = 8, block_bytes = 4 * W;
  static constexpr int from(int j, int i) { return 8 * i + j; }
#if FASTNN_TARGET_ID == 2
  using Raw = __m512i;
  static FASTNN_INLINE Raw load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static FASTNN_INLINE Raw load_partial(const uint8_t* p, int n) {
    return _mm512_maskz_loadu_epi8((__mmask64(1) << n) - 1, p);
  }
  static FASTNN_INLINE Vec vec(Raw raw, int j) {
    const __m512 values =
        F == WeightFormat::s4
            ? _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)
            : _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return {_mm512_permutexvar_ps(_mm512_srli_epi32(raw, unsigned(4 * j)), values)};
  }
#elif FASTNN_TARGET_ID == 1
  using Raw = __m256i;
  static FASTNN_INLINE Raw load(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static FASTNN_INLINE Raw load_partial(const uint8_t* p, int n) {
    uint8_t b[block_bytes] = {};
    for (int i = 0; i < n; i++) b[i] = p[i];
    return load(b);
  }
  static FASTNN_INLINE Vec vec(Raw raw, int j) {
    if constexpr (F == WeightFormat::s4)
      return {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(raw, 28 - 4 * j), 28))};
    return {low_nibbles<F>(_mm256_srli_epi32(raw, 4 * j))};
  }
#else
  struct Raw {
    uint8_t b[block_bytes];
  };
  static FASTNN_INLINE Raw load_partial(const uint8_t* p, int n) {
    Raw v{};
    for (int i = 0; i < n; i++) v.b[i] = p[i];
    return v;
  }
  static FASTNN_INLINE Raw load(const uint8_t* p) { return load_partial(p, block_bytes); }
  static FASTNN_INLINE Vec vec(const Raw& raw, int j) {
    Vec v;
    for (int i = 0; i < W; i++) v.r[i] = scalar<F>(raw.b, 8 * i + j);
    return v;
  }
#endif
};

template <WeightFormat F>
struct DecoderOf {
  using D = ByteDecoder<F>;
};
template <>
struct DecoderOf<WeightFormat::s4> {
  using D = NibbleDecoder<WeightFormat::s4>;
};
template <>
struct DecoderOf<WeightFormat::u4> {
  using D = NibbleDecoder<WeightFormat::u4>;
};

// ---- few rows ----------------------------------------------------------------------------------

// The sums of four vectors, each always in the same order.
FASTNN_INLINE void reduce_four(const VecF32* v, float* out) {
#if FASTNN_TARGET_ID == 2
  const __m512 a =
      _mm512_add_ps(_mm512_unpacklo_ps(v[0].r, v[1].r), _mm512_unpackhi_ps(v[0].r, v[1].r));
  const __m512 b =
      _mm512_add_ps(_mm512_unpacklo_ps(v[2].r, v[3].r), _mm512_unpackhi_ps(v[2].r, v[3].r));
  const __m512 c = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  const __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1)));
#else
  for (int i = 0; i < 4; i++) out[i] = reduce_add(v[i]);
#endif
}

// Σ zero scale x_sum over the groups of one row of the weight and one of x.
static float zeros_part(const float* scale, const int32_t* zero, const float* x_sum,
                        int64_t groups) {
  VecF32 sum = VecF32::zero();
  for (int64_t g = 0; g < groups; g += W) {
    const int n = int(least(W, groups - g));
    sum = fma(VecF32::load_partial(scale + g, n) * from_integers(zero + g, n),
              VecF32::load_partial(x_sum + g, n), sum);
  }
  return reduce_add(sum);
}

template <class D, Scales Way, int ROWS, int COLS>
static void few_tile(const FewRows& f, int64_t i, int64_t n, float* out, int64_t ld) {
  constexpr int64_t vector = sizeof(typename D::Vec), x_block = D::x_vectors * vector;
  constexpr int kept = COLS < 4 ? 4 : COLS;
  VecF32 total[ROWS][kept], sum[ROWS][COLS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int c = 0; c < kept; c++) total[r][c] = VecF32::zero();
  const int64_t whole = f.k / D::k;
  const uint8_t* w = f.w + n * f.w_row;
  const char* x = f.x + i * f.x_row;
  const float* scale = f.scale + n * f.groups;
  auto clear = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int c = 0; c < COLS; c++) sum[r][c] = VecF32::zero();
  };
  auto step = [&](int64_t b, auto load) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int c = 0; c < COLS; c++) {
      const uint8_t* from = w + c * f.w_row + b * D::block_bytes;
      // The rows after these: each is too short for the hardware to see it coming.
      __builtin_prefetch(from + COLS * f.w_row);
      const typename D::Raw raw = load(from);
#pragma GCC unroll 8
      for (int j = 0; j < D::vectors; j++) {
        const typename D::Vec v = D::vec(raw, j);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
          sum[r][c] =
              D::mac(sum[r][c], D::load_x(x + r * f.x_row + b * x_block + D::x_of(j) * vector), v);
      }
    }
  };
  auto scaled = [&](int64_t s) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int c = 0; c < COLS; c++) {
      VecF32 by;
      if constexpr (Way == Scales::in_block) {
        const int64_t g = s * f.scale_step;
        by = VecF32::load_partial(scale + c * f.groups + g, int(least(f.scale_step, f.groups - g)));
        by = permuted(by, f.index);
      } else {
        by = VecF32::set1(scale[c * f.groups + s * f.scale_step]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) total[r][c] = fma(sum[r][c], by, total[r][c]);
    }
  };
  auto all = [](const uint8_t* p) __attribute__((always_inline)) { return D::load(p); };
  if constexpr (Way == Scales::of_segments) {
    for (int64_t b = 0, s = 0; b < whole; s++) {
      clear();
      for (const int64_t end = least(whole, b + f.segment); b < end; b++) step(b, all);
      scaled(s);
    }
  } else {
    for (int64_t b = 0; b < whole; b++) {
      clear();
      step(b, all);
      scaled(b);
    }
  }
  if (const int64_t left = f.k - whole * D::k) {
    const int n_bytes = int(left * D::block_bytes / D::k);
    clear();
    step(whole, [=](const uint8_t* p)
                    __attribute__((always_inline)) { return D::load_partial(p, n_bytes); });
    scaled(Way == Scales::of_segments ? 0 : whole);  // then there is one, or many in a block
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) {
    float sums[4];
    reduce_four(total[r], sums);
    for (int c = 0; c < COLS; c++) {
      out[r * ld + c] = sums[c] * D::factor;
      if (f.zero)
        out[r * ld + c] -= zeros_part(scale + c * f.groups, f.zero + (n + c) * f.groups,
                                      f.x_sums + (i + r) * f.groups, f.groups);
    }
  }
}

// Columns that take part while a block of x is in the registers, as these allow.
constexpr int columns_with(int rows) {
  return FASTNN_TARGET_ID == 2 ? (rows <= 2   ? 4
                                  : rows <= 4 ? 2
                                              : 1)
                               : (rows == 1   ? 4
                                  : rows == 2 ? 2
                                              : 1);
}

template <class D, Scales Way, int ROWS>
static void few_columns(int rows, const FewRows& f, int64_t i, int64_t n, int columns, float* sums,
                        int64_t ld) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return few_columns<D, Way, ROWS - 1>(rows, f, i, n, columns, sums, ld);
  constexpr int COLS = columns_with(ROWS);
  int c = 0;
  for (; c + COLS <= columns; c += COLS) few_tile<D, Way, ROWS, COLS>(f, i, n + c, sums + c, ld);
  for (; c < columns; c++) few_tile<D, Way, ROWS, 1>(f, i, n + c, sums + c, ld);
}

template <class D, Scales Way>
static void few(const FewRows& f, int64_t i, int rows, int64_t n, int columns, float* sums,
                int64_t ld) {
  for (int r = 0; r < rows; r += kFewRows)
    few_columns<D, Way, kFewRows>(int(least(kFewRows, rows - r)), f, i + r, n, columns,
                                  sums + r * ld, ld);
}

template <class D>
static void few_rows(const FewRows& f, int64_t i, int rows, int64_t n, int columns, float* sums,
                     int64_t ld) {
  if constexpr (is_nibble(D::format)) {
    if (f.way == Scales::in_block)
      return few<D, Scales::in_block>(f, i, rows, n, columns, sums, ld);
    if (f.way == Scales::of_blocks)
      return few<D, Scales::of_blocks>(f, i, rows, n, columns, sums, ld);
  }
  few<D, Scales::of_segments>(f, i, rows, n, columns, sums, ld);
}

template <class D, class T>
static void pack_typed(const T* x, int64_t k, typename D::X* out) {
  constexpr int lanes = sizeof(typename D::Vec) / sizeof(typename D::X);
  for (int64_t b = 0; b < k; b += D::k, out += D::x_vectors * lanes) {
    const int64_t n = least(D::k, k - b);
    for (int j = 0; j < D::x_vectors; j++)
      for (int i = 0; i < lanes; i++) {
        const int64_t at = D::from(j, i);
        typename D::X& to = out[j * lanes + i];
        if constexpr (sizeof(typename D::X) == 2)
          to.bits = at < n ? x[b + at].bits : uint16_t(0);
        else
          to = at < n ? to_f32(x[b + at]) : 0.0f;
      }
  }
}

template <class D>
static void pack_x(const char* x, DType type, int64_t k, char* out) {
  auto* to = (typename D::X*)out;
  if constexpr (sizeof(typename D::X) == 2) {
    pack_typed<D>((const bf16*)x, k, to);
  } else {
    switch (type) {
      case DType::bf16:
        return pack_typed<D>((const bf16*)x, k, to);
      case DType::f16:
        return pack_typed<D>((const f16*)x, k, to);
      default:
        return pack_typed<D>((const float*)x, k, to);
    }
  }
}

// In pieces, whose sums are summed: the error grows with their number and their length.
template <class T>
static float sum_of(const T* x, int64_t n) {
  constexpr int64_t piece = 32 * W;
  VecF32 total = VecF32::zero();
  for (int64_t i = 0; i < n; i += piece) {
    VecF32 sum = VecF32::zero();
    for (int64_t j = i; j < least(n, i + piece); j += W)
      sum = sum + (n - j >= W ? VecF32::load(x + j) : VecF32::load_partial(x + j, int(n - j)));
    total = total + sum;
  }
  return reduce_add(total);
}

static void group_sums(const char* x, DType type, int64_t groups, int64_t group, float* sums) {
  for (int64_t g = 0; g < groups; g++) switch (type) {
      case DType::bf16:
        sums[g] = sum_of((const bf16*)x + g * group, group);
        break;
      case DType::f16:
        sums[g] = sum_of((const f16*)x + g * group, group);
        break;
      default:
        sums[g] = sum_of((const float*)x + g * group, group);
    }
}

// ---- many rows ---------------------------------------------------------------------------------

FASTNN_INLINE void put(float* p, VecF32 v) { v.store(p); }
#ifdef __AVX512BF16__
FASTNN_INLINE void put(bf16* p, VecF32 v) {  // no denormals, which it takes for zero
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v.r));
}
#else
FASTNN_INLINE void put(bf16* p, VecF32 v) { v.store(p); }
#endif

#ifdef __AVX512BF16__
struct Numbers {
  alignas(64) uint16_t of[32];
};
constexpr uint16_t bf16_of(int v) {  // of few digits
  return uint16_t(__builtin_bit_cast(uint32_t, float(v)) >> 16);
}
constexpr Numbers kSigned = [] {  // -16 to 15, by their low five bits
  Numbers t{};
  for (int i = 0; i < 32; i++) t.of[i] = bf16_of(i < 16 ? i : i - 32);
  return t;
}();
// 32 nibbles less a zero point, from -15 to 15.
template <WeightFormat F>
FASTNN_INLINE void put_nibbles(bf16* out, const uint8_t* p, int zero) {
  const __m512i d = _mm512_cvtepu8_epi32(bytes(p));
  __m512i words =
      _mm512_and_si512(_mm512_or_si512(d, _mm512_slli_epi32(d, 12)), _mm512_set1_epi16(15));
  if constexpr (F == WeightFormat::s4) words = _mm512_xor_si512(words, _mm512_set1_epi16(8));
  words =
      _mm512_sub_epi16(words, _mm512_set1_epi16(short(F == WeightFormat::s4 ? zero + 8 : zero)));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(words, _mm512_load_si512(kSigned.of)));
}
#endif

// count elements that share a scale, where there is one, and a zero point.
template <WeightFormat F, class T>
static FASTNN_INLINE void decode_run(const uint8_t* w, int64_t k, int64_t count, float scale,
                                     float zero, T* out) {
  constexpr bool scaled = sizeof(T) == 4;
  auto one = [&](int64_t i) __attribute__((always_inline)) {
    const float v = scalar<F>(w, k + i) - zero;
    from_f32(out[i], scaled ? v * scale : v);
  };
  auto finished = [&](VecF32 v) __attribute__((always_inline)) {
    if constexpr (kFactor<F> != 1) v = v * VecF32::set1(kFactor<F>);
    v = v - VecF32::set1(zero);
    return scaled ? v * VecF32::set1(scale) : v;
  };
  int64_t i = 0;
  if constexpr (is_nibble(F)) {
    if ((k & 1) && count) one(i++);
#ifdef __AVX512BF16__
    if constexpr (!scaled)
      for (; i + 2 * W <= count; i += 2 * W) put_nibbles<F>(out + i, w + (k + i) / 2, int(zero));
#endif
    for (; i + 2 * W <= count; i += 2 * W) {
      VecF32 even, odd, low, high;
      nibbles<F>(w + (k + i) / 2, even, odd);
      zip(even, odd, low, high);
      put(out + i, finished(low));
      put(out + i + W, finished(high));
    }
  } else {
    for (; i + W <= count; i += W) put(out + i, finished(from_bytes<F>(bytes(w + k + i))));
  }
  for (; i < count; i++) one(i);
}

// So many rows are turned together, of which so many elements of K are decoded together.
constexpr int kTurned = FASTNN_TARGET_ID == 2 ? 16 : 8, kSpan = 2 * W < kTurned ? kTurned : 2 * W;

FASTNN_INLINE void turn(const float* rows, int count, float* out, int ld) {
#if FASTNN_TARGET_ID == 2
  __m512i block[16];
#pragma GCC unroll 16
  for (int j = 0; j < 16; j++) block[j] = _mm512_load_si512(rows + j * kSpan);
  transpose16(block);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++)
    if (i < count) _mm512_storeu_si512(out + i * ld, block[i]);
#else
  for (int i = 0; i < count; i++)
    for (int j = 0; j < kTurned; j++) out[i * ld + j] = rows[j * kSpan + i];
#endif
}

template <WeightFormat F>
static void decode_f32(const uint8_t* w, int64_t w_row, int columns, int64_t k0, int64_t count,
                       int64_t group, const float* scale, const int32_t* zero, int64_t groups,
                       float* out, int ld) {
  alignas(64) float rows[kTurned][kSpan] = {};
  for (int j0 = 0; j0 < ld; j0 += kTurned)
    for (int64_t i0 = k0, end = k0 + count; i0 < end; i0 += kSpan) {
      const int64_t n = least(kSpan, end - i0);
      for (int j = 0; j < kTurned; j++) {
        const int64_t row = j0 + j;
        if (row >= columns) {
          for (float& e : rows[j]) e = 0;
          continue;
        }
        for (int64_t k = i0; k < i0 + n;) {
          const int64_t g = k / group, run = least(i0 + n, (g + 1) * group) - k;
          decode_run<F>(w + row * w_row, k, run, scale[row * groups + g],
                        zero ? float(zero[row * groups + g]) : 0.0f, rows[j] + (k - i0));
          k += run;
        }
      }
      for (int i = 0; i < n; i += kTurned)
        turn(rows[0] + i, int(least(kTurned, n - i)), out + (i0 - k0 + i) * ld + j0, ld);
    }
}

template <WeightFormat F>
static void decode_bf16(const uint8_t* w, int64_t k0, int64_t count, int64_t group,
                        const int32_t* zero, bf16* out) {
  for (int64_t k = k0, end = k0 + count; k < end;) {
    const int64_t g = k / group, n = least(end, (g + 1) * group) - k;
    decode_run<F>(w, k, n, 1, zero ? float(zero[g]) : 0.0f, out);
    k += n, out += n;
  }
}

static void add_scaled(float* total, const float* sums, const float* scale, int rows, int ld,
                       bool add) {
  for (int j = 0; j < ld; j += W) {
    const VecF32 by = VecF32::load(scale + j);
    for (int i = 0; i < rows; i++) {
      const VecF32 v = VecF32::load(sums + i * ld + j);
      float* to = total + i * ld + j;
      (add ? fma(v, by, VecF32::load(to)) : v * by).store(to);
    }
  }
}

template <class T>
static void widen_typed(const T* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) VecF32::load(x + i).store(out + i);
  if (i < n) VecF32::load_partial(x + i, int(n - i)).store_partial(out + i, int(n - i));
}
static void widen(const char* x, DType type, int64_t n, float* out) {
  type == DType::bf16 ? widen_typed((const bf16*)x, n, out) : widen_typed((const f16*)x, n, out);
}

template <class D>
constexpr void add_decoder(WeightOnlyKernels& t, int at) {
  t.block[at] = D::k;
  t.x_block[at] = D::x_vectors * int(sizeof(typename D::Vec));
  t.pack_x[at] = pack_x<D>;
  t.few_rows[at] = few_rows<D>;
}

template <template <WeightFormat> class Decoder>
constexpr WeightOnlyKernels make_table() {
  using enum WeightFormat;
  WeightOnlyKernels t{};
  t.x_bytes = sizeof(typename Decoder<s8>::D::X);
  add_decoder<typename Decoder<s8>::D>(t, int(s8));
  add_decoder<typename Decoder<s4>::D>(t, int(s4));
  add_decoder<typename Decoder<u4>::D>(t, int(u4));
  add_decoder<typename Decoder<e4m3>::D>(t, int(e4m3));
  add_decoder<typename Decoder<e5m2>::D>(t, int(e5m2));
  t.group_sums = group_sums;
  const decltype(t.decode_f32) f32 = {decode_f32<s8>, decode_f32<s4>, decode_f32<u4>,
                                      decode_f32<e4m3>, decode_f32<e5m2>};
  const decltype(t.decode_bf16) b16 = {decode_bf16<s8>, decode_bf16<s4>, decode_bf16<u4>,
                                       decode_bf16<e4m3>, decode_bf16<e5m2>};
  for (int f = 0; f < kWeightFormats; f++) t.decode_f32[f] = f32[f], t.decode_bf16[f] = b16[f];
  t.add_scaled = add_scaled;
  t.widen = widen;
  return t;
}

}  // namespace fastnn::FASTNN_TARGET
