// GEMM with the AVX-512 dot-product instructions: vdpbf16ps for bfloat16 (and float32 at `medium`
// precision, and floats of eight bits), vpdpbusd for int8.
#define FASTNN_TARGET avx512_dot
#define FASTNN_TARGET_ID 2
#include "gemm/float_ops.inl"

namespace fastnn {
namespace avx512_dot {

// For permutations: sixteen indices from each on, in turns.
static FASTNN_INLINE __m512i interleaved(int first, int second) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i pair = _mm512_mullo_epi32(lane, _mm512_set1_epi32(0x10001));
  return _mm512_add_epi32(pair, _mm512_set1_epi32(first | second << 16));
}

// Two bfloat16 a word.
struct Bf16Ops {
  using Word = uint32_t;
  using Acc = float;
  using Vec = __m512i;
  using Sum = VecF32;
  static constexpr int width = 16, dot_width = 32, k_word = 2;

  static FASTNN_INLINE VecF32 zero() { return VecF32::zero(); }
  static FASTNN_INLINE Vec load(const char* p) { return _mm512_loadu_si512(p); }
  static FASTNN_INLINE Vec load_partial(const char* p, int n) {
    return _mm512_maskz_loadu_epi32(VecF32::first(n), p);
  }
  static FASTNN_INLINE Vec broadcast(const char* p) {
    int word;
    __builtin_memcpy(&word, p, 4);
    return _mm512_set1_epi32(word);
  }
  static FASTNN_INLINE VecF32 multiply_add(VecF32 sum, Vec a, Vec b) {
    return {_mm512_dpbf16_ps(sum.r, (__m512bh)a, (__m512bh)b)};
  }
  static FASTNN_INLINE VecF32 start(const char*) { return zero(); }
  static FASTNN_INLINE VecF32 sums(const float* p) { return VecF32::load(p); }
  static FASTNN_INLINE VecF32 plus(VecF32 a, VecF32 b) { return a + b; }
  static FASTNN_INLINE void put(float* p, VecF32 sum) { sum.store(p); }

  static FASTNN_INLINE uint16_t half(bf16 x) { return x.bits; }
  static FASTNN_INLINE uint16_t half(float x) {
    bf16 h;
    from_f32(h, x);
    return h.bits;
  }
  template <class Src>  // of eight bits, which a bfloat16 holds
  static FASTNN_INLINE uint16_t half(Src x) {
    return uint16_t(bit_cast<uint32_t>(operand(x)) >> 16);
  }
  template <class Src>
  static FASTNN_INLINE Word make_word(const Src* e) {
    return uint32_t(half(e[0])) | uint32_t(half(e[1])) << 16;
  }
  static FASTNN_INLINE Word make_zero_word() { return 0; }

  static FASTNN_INLINE __m256i halves(const bf16* p, int n) {
    return _mm256_maskz_loadu_epi16(VecF32::first(n), p);
  }
  static FASTNN_INLINE __m256i halves(const float* p, int n) {
    return VecF32::load_partial(p, n).to(bf16());
  }
  static FASTNN_INLINE __m256i upper(VecF32 x) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x.r), 16));
  }
  template <class Src>
  static FASTNN_INLINE __m256i halves(const Src* p, int n) {
    return upper(load_operand_partial<VecF32>(p, n));
  }
  template <class Src>
  static FASTNN_INLINE void across(const Src* src, int64_t k_stride, int n, Word* dst, int room) {
    const __m512i low = _mm512_cvtepu16_epi32(halves(src, n));
    const __m512i high = _mm512_cvtepu16_epi32(halves(src + k_stride, n));
    _mm512_mask_storeu_epi32(dst, VecF32::first(room),
                             _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  static FASTNN_INLINE void across_panel(const bf16* src, int64_t k_stride, Word* dst) {
    const __m512i even = _mm512_loadu_si512(src), odd = _mm512_loadu_si512(src + k_stride);
    _mm512_storeu_si512(dst, _mm512_permutex2var_epi16(even, interleaved(0, 32), odd));
    _mm512_storeu_si512(dst + 16, _mm512_permutex2var_epi16(even, interleaved(16, 48), odd));
  }
  static FASTNN_INLINE __m512i words(const bf16* p) { return _mm512_loadu_si512(p); }
  static FASTNN_INLINE __m512i words(const float* p) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(VecF32::load(p).to(bf16())),
                              VecF32::load(p + 16).to(bf16()), 1);
  }
  template <class Src>
  static FASTNN_INLINE __m512i words(const Src* p) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(upper(load_operand<VecF32>(p))),
                              upper(load_operand<VecF32>(p + 16)), 1);
  }
  template <class Src>
  static FASTNN_INLINE void along(const Src* src, int64_t lane_stride, int n, Word* dst, int ld,
                                  int room) {
    __m512i row[16];
#pragma GCC unroll 16
    for (int l = 0; l < 16; l++)
      row[l] = l < n ? words(src + l * lane_stride) : _mm512_setzero_si512();
    transpose16(row);
    store_words(row, dst, ld, room);
  }

  static FASTNN_INLINE Vec dot_load(const bf16* p) { return _mm512_loadu_si512(p); }
  static FASTNN_INLINE Vec dot_load_partial(const bf16* p, int n) {
    return _mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p);
  }
};

// Four int8 a word; vpdpbusd multiplies an unsigned A by a signed B and adds four products to 32
// bits without saturation. A signed A is stored as a + 128, and 128 times the sum of each column
// of B, kept behind the panel, is taken away again: the sums start from it.
template <bool SignedA>
struct Int8Ops {
  using Word = uint32_t;
  using Acc = int32_t;
  using Vec = __m512i;
  using Sum = __m512i;
  static constexpr int width = 16, k_word = 4;
  static constexpr bool requantizes = !SignedA;

  static FASTNN_INLINE Vec zero() { return _mm512_setzero_si512(); }
  static FASTNN_INLINE Vec load(const char* p) { return _mm512_loadu_si512(p); }
  static FASTNN_INLINE Vec load_partial(const char* p, int) { return load(p); }
  static FASTNN_INLINE Vec broadcast(const char* p) { return _mm512_set1_epi32(*(const int*)p); }
  static FASTNN_INLINE Vec multiply_add(Vec sum, Vec a, Vec b) {
    return _mm512_dpbusd_epi32(sum, a, b);
  }
  static FASTNN_INLINE Vec start(const char* p) { return SignedA ? load(p) : zero(); }
  static FASTNN_INLINE Vec sums(const int32_t* p) { return _mm512_loadu_si512(p); }
  static FASTNN_INLINE Vec plus(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
  static FASTNN_INLINE void put(int32_t* p, Vec sum) { _mm512_storeu_si512(p, sum); }
};

// Along K, for few rows: 64 bytes at a time of both operands.
struct ByteDotOps {
  using Acc = int32_t;
  using Vec = __m512i;
  using Sum = VecI32;
  static constexpr int dot_width = 64;
  static FASTNN_INLINE VecI32 zero() { return VecI32::set1(0); }
  static FASTNN_INLINE VecI32 multiply_add(VecI32 sum, Vec a, Vec b) {
    return {_mm512_dpbusd_epi32(sum.r, a, b)};
  }
  static FASTNN_INLINE Vec dot_load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static FASTNN_INLINE Vec dot_load_partial(const uint8_t* p, int n) {
    return _mm512_maskz_loadu_epi8((__mmask64(1) << n) - 1, p);
  }
};
FASTNN_INLINE int32_t reduce_add(VecI32 a) { return _mm512_reduce_add_epi32(a.r); }

// Packing of one side; Flip turns a signed A into a + 128.
template <bool Flip>
struct Int8Pack {
  using Word = uint32_t;
  static constexpr int width = 16, k_word = 4;
  static constexpr uint32_t flip = Flip ? 0x80808080u : 0;
  template <class Src>
  static FASTNN_INLINE Word make_word(const Src* e) {
    return flip ^ (uint32_t(uint8_t(e[0])) | uint32_t(uint8_t(e[1])) << 8 |
                   uint32_t(uint8_t(e[2])) << 16 | uint32_t(uint8_t(e[3])) << 24);
  }
  static FASTNN_INLINE Word make_zero_word() { return 0; }
  template <class Src>
  static FASTNN_INLINE void across(const Src* src, int64_t k_stride, int n, Word* dst, int room) {
    const __mmask16 m = VecF32::first(n);
    __m512i w = _mm512_set1_epi32(int(flip));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const __m512i b = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(m, src + i * k_stride));
      w = _mm512_xor_si512(w, _mm512_slli_epi32(b, 8 * i));
    }
    _mm512_mask_storeu_epi32(dst, VecF32::first(room), w);
  }
  static FASTNN_INLINE void across_panel(const int8_t* src, int64_t k_stride, Word* dst)
    requires(!Flip)
  {
    auto rows = [&](int i) {  // rows i and i + 2
      return _mm512_inserti64x4(
          _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)(src + i * k_stride))),
          _mm256_loadu_si256((const __m256i*)(src + (i + 2) * k_stride)), 1);
    };
    // Of each column, the elements of rows 0 and 1 are beside each other, and those of 2 and 3: of
    // columns 0 to 7 and 16 to 23 in `low`, of the others in `high`.
    const __m512i even = rows(0), odd = rows(1);
    const __m512i low = _mm512_unpacklo_epi8(even, odd), high = _mm512_unpackhi_epi8(even, odd);
    __m512i at = interleaved(0, 16);  // of columns 0 to 7; of 8 to 15 in `high`; then 8 further on
    at = _mm512_mask_add_epi16(at, 0xFFFF0000, at, _mm512_set1_epi16(32 - 8));
    _mm512_storeu_si512(dst, _mm512_permutex2var_epi16(low, at, high));
    at = _mm512_add_epi16(at, _mm512_set1_epi16(8));
    _mm512_storeu_si512(dst + 16, _mm512_permutex2var_epi16(low, at, high));
  }
  template <class Src>
  static FASTNN_INLINE void along(const Src* src, int64_t lane_stride, int n, Word* dst, int ld,
                                  int room) {
    __m512i row[16];
#pragma GCC unroll 16
    for (int l = 0; l < 16; l++)
      row[l] = l < n ? _mm512_xor_si512(_mm512_loadu_si512(src + l * lane_stride),
                                        _mm512_set1_epi32(int(flip)))
                     : _mm512_setzero_si512();
    transpose16(row);
    store_words(row, dst, ld, room);
  }
};

static void negative_sums(void* panel, int64_t words) {
  const char* b = static_cast<const char*>(panel);
  __m512i sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t w = 0; w < words; w++)
    for (int v = 0; v < 2; v++)
      sum[v] = _mm512_dpbusd_epi32(sum[v], _mm512_set1_epi8(1),
                                   _mm512_loadu_si512(b + (w * 2 + v) * 64));
  for (int v = 0; v < 2; v++)
    _mm512_storeu_si512((char*)panel + words * 128 + v * 64,
                        _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum[v], 7)));
}

template <class Src>
constexpr Kernel bf16_kernel(const char* name, DType type) {
  constexpr bool in_place = sizeof(Src) == 2;
  Kernel k = {.name = name,
              .a = type,
              .b = type,
              .mr = 14,
              .nr = 32,
              .k_word = 2,
              .k_step = 2,
              .kc = 3072,
              .a_bytes = 2,
              .b_bytes = 2,
              .pack_a = pack_panel<Bf16Ops, Src, 14>,
              .pack_b = pack_panel<Bf16Ops, Src, 32>,
              .tile = run_tile<Bf16Ops, 14, 2, in_place, false>,
              .store = store_f32,
              .direct_a = in_place,
              .finishes = true};
  if constexpr (in_place) k.dot = run_dot<Bf16Ops, bf16>, k.dot_name = "avx512 bf16 vdpbf16ps dot";
  return k;
}

template <class A>
constexpr Kernel int8_kernel(const char* name, DType type) {
  constexpr bool is_signed = A(-1) < A(0);
  return {.name = name,
          .a = type,
          .b = DType::s8,
          .acc = DType::s32,
          .mr = 14,
          .nr = 32,
          .k_word = 4,
          .k_step = 4,
          .kc = 4096,
          .a_bytes = 1,
          .b_bytes = 1,
          .b_extra = is_signed ? 128 : 0,
          .pack_a = pack_panel<Int8Pack<is_signed>, A, 14>,
          .pack_b = pack_panel<Int8Pack<false>, int8_t, 32>,
          .finish_b = is_signed ? negative_sums : nullptr,
          .tile = run_tile<Int8Ops<is_signed>, 14, 2, !is_signed, false>,
          .store = store_s32,
          .dot = is_signed ? nullptr : run_dot<ByteDotOps, uint8_t>,
          .dot_name = is_signed ? "" : "avx512 u8s8 vpdpbusd dot",
          .direct_a = !is_signed,
          .finishes = true,
          .requantizes = !is_signed,
          .runs = !is_signed};
}

static constexpr Kernel e4m3 = bf16_kernel<f8_e4m3>("avx512 e4m3 as bf16 vdpbf16ps 14x32", kE4M3);
static constexpr Kernel e5m2 = bf16_kernel<f8_e5m2>("avx512 e5m2 as bf16 vdpbf16ps 14x32", kE5M2);
static const Kernel kernels[] = {
    bf16_kernel<bf16>("avx512 bf16 vdpbf16ps 14x32", DType::bf16),
    e4m3,
    e5m2,
    mixed_kernel("avx512 e4m3 e5m2 as bf16 vdpbf16ps 14x32", e4m3, e5m2),
    mixed_kernel("avx512 e5m2 e4m3 as bf16 vdpbf16ps 14x32", e5m2, e4m3),
    int8_kernel<int8_t>("avx512 s8s8 vpdpbusd 14x32", DType::s8),
    int8_kernel<uint8_t>("avx512 u8s8 vpdpbusd 14x32", DType::u8),
    {},
};
static const Kernel medium[] = {
    bf16_kernel<float>("avx512 f32 as bf16 vdpbf16ps 14x32", DType::f32),
    {},
};

}  // namespace avx512_dot

const Kernel* avx512_dot_kernels(DType type, Precision precision) {
  using namespace avx512_dot;
  return type == DType::f32 && precision == Precision::medium ? medium : kernels;
}

double avx512_dot_peak(const char* kind, int64_t iterations) {
  using namespace avx512_dot;
  if (__builtin_strcmp(kind, "bf16") == 0) {
    VecF32 sum[12] = {};
    const __m512i x = _mm512_set1_epi32(0x3f003f00);
    chains(sum, iterations, [&](VecF32& s) {
      s = Bf16Ops::multiply_add(s, x, x);
      asm volatile("" : "+v"(s.r));
    });
    return double(iterations) * 12 * 64;
  }
  if (__builtin_strcmp(kind, "int8") == 0) {
    __m512i sum[12];
    for (auto& s : sum) s = _mm512_setzero_si512();
    const __m512i x = _mm512_set1_epi32(0x01020304);
    chains(sum, iterations, [&](__m512i& s) {
      s = _mm512_dpbusd_epi32(s, x, x);
      asm volatile("" : "+v"(s));
    });
    return double(iterations) * 12 * 128;
  }
  return -1;
}

}  // namespace fastnn
