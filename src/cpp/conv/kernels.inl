// The kernels of one instruction set. Included once by each file in kernels/, which defines
// FASTNN_TARGET; see isa/vec.hpp for why nothing here may be shared between targets.
#include "conv/depthwise.inl"
#include "conv/depthwise_weight.inl"
#include "conv/depthwise_window.inl"
#include "conv/kernels.hpp"
#include "conv/winograd.inl"
#include "isa/vec.hpp"
#if FASTNN_TARGET_ID == 2
#include "isa/transpose_avx512.hpp"
#endif

namespace fastnn::FASTNN_TARGET {

FASTNN_INLINE int64_t clamp(int64_t x, int64_t most) { return x < 0 ? 0 : x < most ? x : most; }

template <class T>
static void copy_rows(void* dst_, int64_t dst_row, const void* src_, int64_t src_row, int64_t rows,
                      int64_t stride, int64_t lo, int64_t hi, int64_t n) {
  T* dst = static_cast<T*>(dst_);
  const T* src = static_cast<const T*>(src_);
  lo = clamp(lo, n), hi = clamp(hi, n);
  for (int64_t r = 0; r < rows; r++, dst += dst_row, src += src_row) {
    for (int64_t i = 0; i < lo; i++) dst[i] = T{};
    if (stride == 1)
      for (int64_t i = lo; i < hi; i++) dst[i] = src[i];
    else
      for (int64_t i = lo; i < hi; i++) dst[i] = src[i * stride];
    for (int64_t i = hi < lo ? lo : hi; i < n; i++) dst[i] = T{};
  }
}

template <class T>
static void transpose(void* dst_, int64_t ld, const Lane* lanes, int count, int64_t stride,
                      int64_t n) {
  T* dst = static_cast<T*>(dst_);
  for (int l = 0; l < count; l++) {
    const T* src = reinterpret_cast<const T*>(lanes[l].src);
    const int64_t lo = clamp(lanes[l].lo, n), hi = clamp(lanes[l].hi, n);
    for (int64_t i = 0; i < n; i++) dst[i * ld + l] = i >= lo && i < hi ? src[i * stride] : T{};
  }
}

template <class T>
static void gather_rows(void* dst_, int64_t ld, const Lane* rows, int64_t count, int64_t n) {
  T* dst = static_cast<T*>(dst_);
  for (int64_t r = 0; r < count; r++, dst += ld) {
    const T* src = reinterpret_cast<const T*>(rows[r].src);
    const int64_t lo = rows[r].lo, hi = rows[r].hi;
    for (int64_t i = 0; i < n; i++) dst[i] = i >= lo && i < hi ? src[i] : T{};
  }
}

template <class T>
static void interleave(void* dst, const Lane* lanes, int count, int64_t n) {
  transpose<T>(dst, count, lanes, count, 1, n);
}

template <class V>
static void add_rows(void* to_, const int64_t* at, const void* from_, int64_t ld, int rows, int n) {
  using T = typename V::T;
  const T* from = static_cast<const T*>(from_);
  for (int r = 0; r < rows; r++, from += ld) {
    T* to = static_cast<T*>(to_) + at[r];
    int i = 0;
    for (; i + V::width <= n; i += V::width) (V::load(to + i) + V::load(from + i)).store(to + i);
    if (i < n)
      (V::load_partial(to + i, n - i) + V::load_partial(from + i, n - i))
          .store_partial(to + i, n - i);
  }
}

#if FASTNN_TARGET_ID == 2
// Bits [lo, hi) of 16, counted from i.
FASTNN_INLINE uint32_t range_mask(int64_t lo, int64_t hi, int64_t i, int width) {
  const int64_t a = clamp(lo - i, width), b = clamp(hi - i, width);
  return a < b ? uint32_t((uint64_t(1) << b) - (uint64_t(1) << a)) : 0;
}

// 16 elements `stride` apart where the mask says so.
FASTNN_INLINE __m512i load_words(const uint32_t* p, int64_t stride, __mmask16 mask) {
  if (stride == 1) return _mm512_maskz_loadu_epi32(mask, p);
  if (stride == 2) {
    // Every other word of two vectors; the words in between are not touched.
    uint32_t wide = mask;
    wide = (wide | wide << 8) & 0x00ff00ff;
    wide = (wide | wide << 4) & 0x0f0f0f0f;
    wide = (wide | wide << 2) & 0x33333333;
    wide = (wide | wide << 1) & 0x55555555;
    const __m512i a = _mm512_maskz_loadu_epi32(__mmask16(wide), p);
    const __m512i b = _mm512_maskz_loadu_epi32(__mmask16(wide >> 16), p + 16);
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_epi32(a, even, b);
  }
  alignas(64) uint32_t lanes[16] = {};
  for (uint32_t m = mask; m; m &= m - 1) {
    const int i = __builtin_ctz(m);
    lanes[i] = p[i * stride];
  }
  return _mm512_load_si512(lanes);
}

// Which lanes of each vector of a row are read, and which written: the same for all rows.
template <class Mask, int WIDTH>
struct RowMasks {
  static constexpr int kMost = 16;
  Mask in[kMost], out[kMost];
  int count = 0;
  RowMasks(int64_t lo, int64_t hi, int64_t n) {
    for (int64_t i = 0; i < n && count < kMost; i += WIDTH, count++) {
      in[count] = Mask(range_mask(lo, hi, i, WIDTH));
      out[count] = Mask(range_mask(0, n, i, WIDTH));
    }
  }
};

static void copy_rows4(void* dst_, int64_t dst_row, const void* src_, int64_t src_row, int64_t rows,
                       int64_t stride, int64_t lo, int64_t hi, int64_t n) {
  using Masks = RowMasks<__mmask16, 16>;
  for (int64_t i0 = 0; i0 < n; i0 += 16 * Masks::kMost) {
    const Masks m(lo - i0, hi - i0, n - i0);
    uint32_t* dst = static_cast<uint32_t*>(dst_) + i0;
    const uint32_t* src = static_cast<const uint32_t*>(src_) + i0 * stride;
    if (stride == 1)
      for (int64_t r = 0; r < rows; r++, dst += dst_row, src += src_row)
        for (int i = 0; i < m.count; i++)
          _mm512_mask_storeu_epi32(dst + 16 * i, m.out[i],
                                   _mm512_maskz_loadu_epi32(m.in[i], src + 16 * i));
    else
      for (int64_t r = 0; r < rows; r++, dst += dst_row, src += src_row)
        for (int i = 0; i < m.count; i++)
          _mm512_mask_storeu_epi32(dst + 16 * i, m.out[i],
                                   load_words(src + 16 * i * stride, stride, m.in[i]));
  }
}

static void copy_rows2(void* dst_, int64_t dst_row, const void* src_, int64_t src_row, int64_t rows,
                       int64_t stride, int64_t lo, int64_t hi, int64_t n) {
  if (stride != 1)
    return copy_rows<uint16_t>(dst_, dst_row, src_, src_row, rows, stride, lo, hi, n);
  using Masks = RowMasks<__mmask32, 32>;
  for (int64_t i0 = 0; i0 < n; i0 += 32 * Masks::kMost) {
    const Masks m(lo - i0, hi - i0, n - i0);
    uint16_t* dst = static_cast<uint16_t*>(dst_) + i0;
    const uint16_t* src = static_cast<const uint16_t*>(src_) + i0;
    for (int64_t r = 0; r < rows; r++, dst += dst_row, src += src_row)
      for (int i = 0; i < m.count; i++)
        _mm512_mask_storeu_epi16(dst + 32 * i, m.out[i],
                                 _mm512_maskz_loadu_epi16(m.in[i], src + 32 * i));
  }
}

static void gather_rows4(void* dst_, int64_t ld, const Lane* rows, int64_t count, int64_t n) {
  if (n > 32) return gather_rows<uint32_t>(dst_, ld, rows, count, n);
  uint32_t* dst = static_cast<uint32_t*>(dst_);
  const __mmask16 low = VecF32::first(int(clamp(n, 16))),
                  high = VecF32::first(int(clamp(n - 16, 16)));
  for (int64_t r = 0; r < count; r++, dst += ld) {
    const auto* src = reinterpret_cast<const uint32_t*>(rows[r].src);
    // 0 <= lo <= hi <= 32
    const uint32_t in = uint32_t((uint64_t(1) << rows[r].hi) - (uint64_t(1) << rows[r].lo));
    _mm512_mask_storeu_epi32(dst, low, _mm512_maskz_loadu_epi32(__mmask16(in), src));
    if (n > 16)
      _mm512_mask_storeu_epi32(dst + 16, high,
                               _mm512_maskz_loadu_epi32(__mmask16(in >> 16), src + 16));
  }
}

static void transpose4(void* dst_, int64_t ld, const Lane* lanes, int count, int64_t stride,
                       int64_t n) {
  for (int l0 = 0; l0 < count; l0 += 16) {
    const int room = int(clamp(count - l0, 16));
    for (int64_t i = 0; i < n; i += 16) {
      __m512i row[16];
#pragma GCC unroll 16
      for (int l = 0; l < 16; l++) {
        if (l < room) {
          const Lane& lane = lanes[l0 + l];
          row[l] = load_words(reinterpret_cast<const uint32_t*>(lane.src) + i * stride, stride,
                              __mmask16(range_mask(lane.lo, lane.hi, i, 16)));
        } else {
          row[l] = _mm512_setzero_si512();
        }
      }
      transpose16(row);
      uint32_t* dst = static_cast<uint32_t*>(dst_) + i * ld + l0;
      const __mmask16 out = VecF32::first(room);
      const int64_t left = n - i;
#pragma GCC unroll 16
      for (int r = 0; r < 16; r++)
        if (r < left) _mm512_mask_storeu_epi32(dst + r * ld, out, row[r]);
    }
  }
}

static void transpose2(void* dst_, int64_t ld, const Lane* lanes, int count, int64_t stride,
                       int64_t n) {
  if (stride != 1) return transpose<uint16_t>(dst_, ld, lanes, count, stride, n);
  for (int l0 = 0; l0 < count; l0 += 16) {
    const int room = int(clamp(count - l0, 16));
    for (int64_t i = 0; i < n; i += 16) {
      __m512i row[16];
#pragma GCC unroll 16
      for (int l = 0; l < 16; l++) {
        if (l < room) {
          const Lane& lane = lanes[l0 + l];
          row[l] = _mm512_cvtepu16_epi32(
              _mm256_maskz_loadu_epi16(__mmask16(range_mask(lane.lo, lane.hi, i, 16)),
                                       reinterpret_cast<const uint16_t*>(lane.src) + i));
        } else {
          row[l] = _mm512_setzero_si512();
        }
      }
      transpose16(row);
      uint16_t* dst = static_cast<uint16_t*>(dst_) + i * ld + l0;
      const __mmask16 out = VecF32::first(room);
      const int64_t left = n - i;
#pragma GCC unroll 16
      for (int r = 0; r < 16; r++)
        if (r < left) _mm256_mask_storeu_epi16(dst + r * ld, out, _mm512_cvtepi32_epi16(row[r]));
    }
  }
}

// Element l of output vector o is element (16 o + l) / COUNT of one of COUNT vectors.
template <int COUNT>
FASTNN_INLINE void store_interleaved(uint32_t* dst, const __m512i* v, int64_t left) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 4
  for (int o = 0; o < COUNT; o++) {
    alignas(64) int from[16];
    uint32_t mask[COUNT] = {};
#pragma GCC unroll 16
    for (int l = 0; l < 16; l++) {
      from[l] = (16 * o + l) / COUNT;
      mask[(16 * o + l) % COUNT] |= 1u << l;
    }
    const __m512i index = COUNT == 1 ? lane : _mm512_load_si512(from);
    __m512i out = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int c = 0; c < COUNT; c++)
      out = _mm512_mask_permutexvar_epi32(out, __mmask16(mask[c]), index, v[c]);
    _mm512_mask_storeu_epi32(dst + 16 * o, VecF32::first(int(clamp(left - 16 * o, 16))), out);
  }
}

template <int COUNT>
static void interleave_words(uint32_t* dst, const Lane* lanes, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    __m512i v[COUNT];
#pragma GCC unroll 4
    for (int c = 0; c < COUNT; c++)
      v[c] = _mm512_maskz_loadu_epi32(__mmask16(range_mask(lanes[c].lo, lanes[c].hi, i, 16)),
                                      reinterpret_cast<const uint32_t*>(lanes[c].src) + i);
    store_interleaved<COUNT>(dst + COUNT * i, v, COUNT * (n - i));
  }
}
static void interleave4(void* dst, const Lane* lanes, int count, int64_t n) {
  auto* to = static_cast<uint32_t*>(dst);
  if (count == 2) return interleave_words<2>(to, lanes, n);
  if (count == 3) return interleave_words<3>(to, lanes, n);
  if (count == 4) return interleave_words<4>(to, lanes, n);
  interleave<uint32_t>(dst, lanes, count, n);
}

// Pairs of lanes are words.
template <int PAIRS>
static void interleave_pairs(uint32_t* dst, const Lane* lanes, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    __m512i v[PAIRS];
#pragma GCC unroll 2
    for (int p = 0; p < PAIRS; p++) {
      __m512i half[2];
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        const Lane& lane = lanes[2 * p + h];
        half[h] = _mm512_cvtepu16_epi32(
            _mm256_maskz_loadu_epi16(__mmask16(range_mask(lane.lo, lane.hi, i, 16)),
                                     reinterpret_cast<const uint16_t*>(lane.src) + i));
      }
      v[p] = _mm512_or_si512(half[0], _mm512_slli_epi32(half[1], 16));
    }
    store_interleaved<PAIRS>(dst + PAIRS * i, v, PAIRS * (n - i));
  }
}
static void interleave2(void* dst, const Lane* lanes, int count, int64_t n) {
  auto* to = static_cast<uint32_t*>(dst);
  if (count == 2) return interleave_pairs<1>(to, lanes, n);
  if (count == 4) return interleave_pairs<2>(to, lanes, n);
  interleave<uint16_t>(dst, lanes, count, n);
}

constexpr CopyRowsFn copies[] = {copy_rows2, copy_rows4, copy_rows<uint64_t>};
constexpr TransposeFn transposes[] = {transpose2, transpose4, transpose<uint64_t>};
constexpr GatherRowsFn gathers[] = {gather_rows<uint16_t>, gather_rows4, gather_rows<uint64_t>};
constexpr InterleaveFn interleaves[] = {interleave2, interleave4, interleave<uint64_t>};
#else
constexpr CopyRowsFn copies[] = {copy_rows<uint16_t>, copy_rows<uint32_t>, copy_rows<uint64_t>};
constexpr TransposeFn transposes[] = {transpose<uint16_t>, transpose<uint32_t>,
                                      transpose<uint64_t>};
constexpr GatherRowsFn gathers[] = {gather_rows<uint16_t>, gather_rows<uint32_t>,
                                    gather_rows<uint64_t>};
constexpr InterleaveFn interleaves[] = {interleave<uint16_t>, interleave<uint32_t>,
                                        interleave<uint64_t>};
#endif

template <class T>
constexpr DepthwiseKernels depthwise_kernels = {
    In<T>::V::width,
    depthwise_rows<T>,
    depthwise_positions<T>,
    kWindowRows,
    kWindowPositions,
    depthwise_window<T>,
    {0, weight_rows(1), 0, weight_rows(3), 0, weight_rows(5), 0, weight_rows(7)},
    depthwise_weight<T>,
    depthwise_totals<T>,
    depthwise_finish<T>};

static const ConvKernels table = {
    {copies[0], copies[1], copies[2]},
    {transposes[0], transposes[1], transposes[2]},
    {gathers[0], gathers[1], gathers[2]},
    {interleaves[0], interleaves[1], interleaves[2]},
    {add_rows<VecF32>, add_rows<VecF64>},
    {depthwise_kernels<float>, depthwise_kernels<double>, depthwise_kernels<bf16>,
     depthwise_kernels<f16>},
    {winograd_kernels<Three>, winograd_kernels<ThreeByTwo>, winograd_kernels<Five>}};

}  // namespace fastnn::FASTNN_TARGET
