// Linear layers whose weight alone is quantized, for x in bfloat16: vdpbf16ps multiplies what is
// exact in bfloat16, and adds in float32. (It takes denormals for zero.)
#define FASTNN_TARGET avx512_dot
#define FASTNN_TARGET_ID 2
#include "quant/weight_only.inl"

namespace fastnn {
namespace avx512_dot {

template <WeightFormat F>
struct DotBytes {
  using X = bf16;
  using Vec = __m512i;
  using Raw = __m256i;
  static constexpr WeightFormat format = F;
  static constexpr int k = 32, vectors = 1, x_vectors = 1, block_bytes = 32;
  static constexpr float factor = kFactor<F>;
  static constexpr int x_of(int j) { return j; }
  static constexpr int from(int, int i) { return i; }
  static FASTNN_INLINE Raw load(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static FASTNN_INLINE Raw load_partial(const uint8_t* p, int n) {
    return _mm256_maskz_loadu_epi8((__mmask32(1) << n) - 1, p);
  }
  static FASTNN_INLINE Vec vec(Raw raw, int) {
    return (__m512i)_mm512_cvtne2ps_pbh(from_bytes<F>(_mm256_extracti128_si256(raw, 1)).r,
                                        from_bytes<F>(_mm256_castsi256_si128(raw)).r);
  }
  static FASTNN_INLINE Vec load_x(const char* p) { return _mm512_loadu_si512(p); }
  static FASTNN_INLINE VecF32 mac(VecF32 sum, Vec x, Vec w) {
    return {_mm512_dpbf16_ps(sum.r, (__m512bh)x, (__m512bh)w)};
  }
};

// A number for each nibble, whatever the bit above it is.
constexpr Numbers numbers_of(bool is_signed, int times) {
  Numbers t{};
  for (int i = 0; i < 32; i++) t.of[i] = bf16_of((is_signed ? ((i & 15) ^ 8) - 8 : i & 15) * times);
  return t;
}
constexpr Numbers kHigh = numbers_of(true, 16), kSigned4 = numbers_of(true, 1),
                  kUnsigned4 = numbers_of(false, 1);

// Number j of the four nibbles in each word.
FASTNN_INLINE __m512i nibble(__m512i words, int j, const Numbers& numbers) {
  return _mm512_permutexvar_epi16(_mm512_srli_epi16(words, unsigned(4 * j)),
                                  _mm512_load_si512(numbers.of));
}

// Words of four neighbours, 16 bits; a lane of the sums is eight.
template <WeightFormat F>
struct DotNibbles : DotBytes<F> {
  using Vec = __m512i;
  using Raw = __m512i;
  static constexpr int k = 128, vectors = 4, x_vectors = 4, block_bytes = 64;
  static constexpr int from(int j, int i) { return 4 * i + j; }
  static FASTNN_INLINE Raw load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static FASTNN_INLINE Raw load_partial(const uint8_t* p, int n) {
    return _mm512_maskz_loadu_epi8((__mmask64(1) << n) - 1, p);
  }
  static FASTNN_INLINE Vec vec(Raw raw, int j) {
    return nibble(raw, j, F == WeightFormat::s4 ? kSigned4 : kUnsigned4);
  }
};

// Words of two int8, each as 16 times its high half and its low half, which is not negative.
struct DotHalves : DotNibbles<WeightFormat::s4> {
  static constexpr WeightFormat format = WeightFormat::s8;
  static constexpr int k = 64, x_vectors = 2;
  static constexpr int x_of(int j) { return j / 2; }
  static constexpr int from(int j, int i) { return 2 * i + j; }
  static FASTNN_INLINE Vec vec(Raw raw, int j) {
    return nibble(raw, j, j % 2 ? kHigh : kUnsigned4);
  }
};

template <int ROWS>
static void scaled_rows(const char* x, int64_t x_row, const char* panel, int64_t words,
                        int64_t segments, const float* scales, float* total, bool add) {
  VecF32 sums[ROWS][2], totals[ROWS][2];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++)
      totals[r][v] = add ? VecF32::load(total + r * 32 + v * 16) : VecF32::zero();
  for (int64_t s = 0; s < segments; s++, scales += 32) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = VecF32::zero();
    for (int64_t w = 0; w < words; w++, x += 4, panel += 128) {
      const __m512i b0 = _mm512_loadu_si512(panel), b1 = _mm512_loadu_si512(panel + 64);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        int pair;
        __builtin_memcpy(&pair, x + r * x_row, 4);
        const __m512i a = _mm512_set1_epi32(pair);
        sums[r][0].r = _mm512_dpbf16_ps(sums[r][0].r, (__m512bh)a, (__m512bh)b0);
        sums[r][1].r = _mm512_dpbf16_ps(sums[r][1].r, (__m512bh)a, (__m512bh)b1);
      }
    }
    const VecF32 s0 = VecF32::load(scales), s1 = VecF32::load(scales + 16);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      totals[r][0] = fma(sums[r][0], s0, totals[r][0]);
      totals[r][1] = fma(sums[r][1], s1, totals[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) totals[r][v].store(total + r * 32 + v * 16);
}

// Six rows at most: twelve sums and twelve totals stay in registers.
static void scaled_tile(const char* x, int64_t x_row, int rows, const char* panel, int64_t words,
                        int64_t segments, const float* scales, float* total, bool add) {
  static constexpr decltype(&scaled_rows<1>) of[] = {scaled_rows<1>, scaled_rows<2>,
                                                     scaled_rows<3>, scaled_rows<4>,
                                                     scaled_rows<5>, scaled_rows<6>};
  const int parts = (rows + 5) / 6;
  for (int p = 0, r = 0; p < parts; p++) {
    const int n = (rows - r + parts - p - 1) / (parts - p);
    of[n - 1](x + r * x_row, x_row, panel, words, segments, scales, total + r * 32, add);
    r += n;
  }
}

// ---- panels ------------------------------------------------------------------------------------

// Two words of a panel from 32 bits with four int8: as mantissas of numbers whose last place is 1,
// from which that and the zero point are subtracted. Exact.
template <bool Zeros>
struct BytesToWords {
  static constexpr int k = 4;
  VecF32 low = VecF32::set1(0x1p23f + 128), high = VecF32::set1(0x1p15f + 128);
  FASTNN_INLINE void take_zeros(__m512i zero) {
    const VecF32 z = {_mm512_cvtepi32_ps(zero)};
    low = VecF32::set1(0x1p23f + 128) + z, high = VecF32::set1(0x1p15f + 128) + z;
  }
  FASTNN_INLINE __m512i word(__m512i d, int j) const {
    const __m512i u = _mm512_xor_si512(j ? _mm512_srli_epi32(d, 16) : d, _mm512_set1_epi32(0x8080));
    constexpr int and_or = 0xea;
    const __m512i a = _mm512_ternarylogic_epi32(u, _mm512_set1_epi32(0xff),
                                                _mm512_set1_epi32(0x4b000000), and_or);
    const __m512i b = _mm512_ternarylogic_epi32(u, _mm512_set1_epi32(0xff00),
                                                _mm512_set1_epi32(0x47000000), and_or);
    const __m512i first = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(a), low.r));
    const __m512i second = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(b), high.r));
    return _mm512_or_si512(_mm512_srli_epi32(first, 16), second);
  }
};

// Four words from 32 bits with eight nibbles.
template <WeightFormat F, bool Zeros>
struct NibblesToWords {
  static constexpr int k = 8;
  static constexpr int shift = F == WeightFormat::s4 ? 8 : 0;  // to numbers that are not negative
  __m512i less;
  FASTNN_INLINE void take_zeros(__m512i zero) {
    zero = _mm512_add_epi32(zero, _mm512_set1_epi32(shift));
    less = _mm512_mask_blend_epi16(0xaaaaaaaa, zero, _mm512_slli_epi32(zero, 16));
  }
  FASTNN_INLINE __m512i word(__m512i d, int j) const {
    d = _mm512_srli_epi32(d, unsigned(8 * j));
    __m512i index = _mm512_mask_blend_epi16(0xaaaaaaaa, d, _mm512_slli_epi32(d, 12));
    if constexpr (!Zeros) return nibble(index, 0, F == WeightFormat::s4 ? kSigned4 : kUnsigned4);
    constexpr int and_xor = 0x6a;
    index =
        _mm512_ternarylogic_epi32(index, _mm512_set1_epi16(15), _mm512_set1_epi16(shift), and_xor);
    return nibble(_mm512_sub_epi16(index, less), 0, kSigned);
  }
};

// Sixteen rows of the weight are turned as they lie, in pieces of 32 bits, and then made numbers.
template <WeightFormat F, class ToWords, bool Zeros>
static void make_panel(const uint8_t* w, int64_t w_row, int columns, int64_t k0, int64_t count,
                       int64_t group, const int32_t* zero, int64_t groups, char* panel) {
  const __m512i rows =
      _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_epi32(int(groups)));
  for (int t = 0; t < 32; t += 16) {
    const int n = columns - t < 0 ? 0 : int(least(16, columns - t));
    ToWords make;
    int64_t next = k0;
    for (int64_t k = 0; k < count; k += 16 * ToWords::k) {
      const int64_t left = count - k, size = weight_bytes(F, least(left, 16 * ToWords::k));
      const __mmask64 mask = size == 64 ? ~__mmask64(0) : (__mmask64(1) << size) - 1;
      __m512i piece[16];
#pragma GCC unroll 16
      for (int l = 0; l < 16; l++)
        piece[l] =
            l < n ? _mm512_maskz_loadu_epi8(mask, w + (t + l) * w_row + weight_bytes(F, k0 + k))
                  : _mm512_setzero_si512();
      transpose16(piece);
      for (int i = 0; i < 16 && i * ToWords::k < left; i++) {
        if (Zeros && k0 + k + i * ToWords::k == next) {
          const int64_t g = next / group;
          make.take_zeros(_mm512_mask_i32gather_epi32(_mm512_setzero_si512(), VecF32::first(n),
                                                      rows, zero + t * groups + g, 4));
          next = (g + 1) * group;
        }
        char* to = panel + ((k + i * ToWords::k) / 2 * 32 + t) * 4;
#pragma GCC unroll 4
        for (int j = 0; j < ToWords::k / 2; j++)
          if (i * ToWords::k + 2 * j < left)
            _mm512_storeu_si512(to + j * 128, make.word(piece[i], j));
      }
    }
  }
}

template <WeightFormat F, template <bool> class ToWords>
static void panel(const uint8_t* w, int64_t w_row, int columns, int64_t k0, int64_t count,
                  int64_t group, const int32_t* zero, int64_t groups, char* to) {
  (zero ? make_panel<F, ToWords<true>, true>
        : make_panel<F, ToWords<false>, false>)(w, w_row, columns, k0, count, group, zero, groups,
                                                to);
}
template <bool Zeros>
using S4ToWords = NibblesToWords<WeightFormat::s4, Zeros>;
template <bool Zeros>
using U4ToWords = NibblesToWords<WeightFormat::u4, Zeros>;

template <WeightFormat F>
struct DotDecoderOf {
  using D = DotBytes<F>;
};
template <>
struct DotDecoderOf<WeightFormat::s4> {
  using D = DotNibbles<WeightFormat::s4>;
};
template <>
struct DotDecoderOf<WeightFormat::u4> {
  using D = DotNibbles<WeightFormat::u4>;
};

static constexpr WeightOnlyKernels table = [] {
  WeightOnlyKernels t = make_table<DotDecoderOf>();
  add_decoder<DotHalves>(t, kHalves);
  t.scaled_tile = scaled_tile;
  t.make_panel[int(WeightFormat::s8)] = panel<WeightFormat::s8, BytesToWords>;
  t.make_panel[int(WeightFormat::s4)] = panel<WeightFormat::s4, S4ToWords>;
  t.make_panel[int(WeightFormat::u4)] = panel<WeightFormat::u4, U4ToWords>;
  return t;
}();

}  // namespace avx512_dot

const WeightOnlyKernels& avx512_dot_weight_only() { return avx512_dot::table; }

}  // namespace fastnn
