// The kernels of binning. Included once by each file in kernels/, which defines FASTNN_TARGET; see
// isa/vec.hpp for why nothing here may be shared between targets.
#include "isa/vec.hpp"
#include "tree/binning.hpp"
#if FASTNN_TARGET_ID == 2
#include "isa/transpose_avx512.hpp"
#endif

namespace fastnn::FASTNN_TARGET {

template <class T>
static void floats_by_steps(const T* p, int rows, int columns, int64_t row_step,
                            int64_t column_step, float* out) {
  for (int c = 0; c < columns; c++) {
    const T* from = p + c * column_step;
    float* to = out + c * BinningKernels::kRows;
    if (row_step == 1)
      for (int r = 0; r < rows; r++) to[r] = float(from[r]);
    else
      for (int r = 0; r < rows; r++) to[r] = float(from[r * row_step]);
  }
}

#if FASTNN_TARGET_ID == 2
FASTNN_INLINE __m512i sixteen_floats(const double* p, __mmask16 mask) {
  const __m256 low = _mm512_cvtpd_ps(_mm512_maskz_loadu_pd(__mmask8(mask), p));
  const __m256 high = _mm512_cvtpd_ps(_mm512_maskz_loadu_pd(__mmask8(mask >> 8), p + 8));
  return _mm512_castps_si512(_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1));
}
FASTNN_INLINE __m512i sixteen_floats(const float* p, __mmask16 mask) {
  return _mm512_castps_si512(_mm512_maskz_loadu_ps(mask, p));
}
// Rows that lie together are transposed in registers.
template <class T>
static void floats_by_rows(const T* p, int rows, int columns, int64_t row_step, float* out) {
  const __mmask16 mask = __mmask16((1u << columns) - 1);
  for (int r = 0; r < rows; r += 16) {
    __m512i v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
      v[i] = sixteen_floats(p + (r + i < rows ? r + i : rows - 1) * row_step, mask);
    transpose16(v);
#pragma GCC unroll 16
    for (int c = 0; c < 16; c++)
      if (c < columns) _mm512_storeu_si512(out + c * BinningKernels::kRows + r, v[c]);
  }
}
#endif

template <class T>
static void floats_of(const BinValues& x, int64_t row, int rows, int64_t column, int columns,
                      float* out) {
  const T* p = static_cast<const T*>(x.data) + row * x.row_step + column * x.column_step;
#if FASTNN_TARGET_ID == 2
  if (x.column_step == 1 && columns > 1) return floats_by_rows(p, rows, columns, x.row_step, out);
#endif
  floats_by_steps(p, rows, columns, x.row_step, x.column_step, out);
}

static void floats(const BinValues& x, int64_t row, int rows, int64_t column, int columns,
                   float* out) {
  x.f32 ? floats_of<float>(x, row, rows, column, columns, out)
        : floats_of<double>(x, row, rows, column, columns, out);
}

// The bin of a value which equals an edge in float32, from `bin`, the number of edges below it.
FASTNN_INLINE uint8_t settle(const BinTable& table, double value, int bin) {
  while (bin < table.count && value > table.edges[bin]) bin++;
  return uint8_t(bin);
}
FASTNN_INLINE double value_at(const void* exact, bool f32, int64_t i) {
  return f32 ? double(static_cast<const float*>(exact)[i]) : static_cast<const double*>(exact)[i];
}

// In float64 alone, as scikit-learn searches.
FASTNN_INLINE uint8_t search_one(const BinTable& table, double value) {
  if (value != value || (table.categorical && value < 0)) return table.missing;
  int left = 0, right = table.count;
  while (left < right) {
    const int middle = left + (right - left - 1) / 2;
    if (value <= table.edges[middle])
      right = middle;
    else
      left = middle + 1;
  }
  return uint8_t(left);
}

#if FASTNN_TARGET_ID == 2
static void search(const BinTable& table, const float* x, const void* exact, bool f32, int64_t step,
                   int n, uint8_t* out) {
  if (table.in_float64) {
    for (int i = 0; i < n; i++) out[i] = search_one(table, value_at(exact, f32, i * step));
    return;
  }
  const float* t = table.tree;
  const __m512 root = _mm512_set1_ps(t[1]);
  // Levels of up to 16 nodes are one register each; tails of other levels are never selected.
  const __m512 l1 = _mm512_loadu_ps(t + 2), l2 = _mm512_loadu_ps(t + 4);
  const __m512 l3 = _mm512_loadu_ps(t + 8), l4 = _mm512_loadu_ps(t + 16);
  __m512 l5[2], l6[4], l7[8];
  for (int i = 0; i < 2; i++) l5[i] = _mm512_loadu_ps(t + 32 + 16 * i);
  for (int i = 0; i < 4; i++) l6[i] = _mm512_loadu_ps(t + 64 + 16 * i);
  for (int i = 0; i < 8; i++) l7[i] = _mm512_loadu_ps(t + 128 + 16 * i);
  const __m512i one = _mm512_set1_epi32(1), missing = _mm512_set1_epi32(table.missing);
  const __m512i bit5 = _mm512_set1_epi32(32), bit6 = _mm512_set1_epi32(64);
  for (int i = 0; i < n; i += 16) {
    const __mmask16 lanes = n - i >= 16 ? __mmask16(0xffff) : __mmask16((1u << (n - i)) - 1);
    const __m512 v = _mm512_maskz_loadu_ps(lanes, x + i);
    __mmask16 same = 0;
    __m512i node = _mm512_setzero_si512();
    // node = 2 node + (v > nodes)
    const auto down = [&](__m512 nodes) __attribute__((always_inline)) {
      same |= _mm512_cmp_ps_mask(v, nodes, _CMP_EQ_OQ);
      const __mmask16 right = _mm512_cmp_ps_mask(v, nodes, _CMP_GT_OQ);
      node = _mm512_add_epi32(node, node);
      node = _mm512_mask_add_epi32(node, right, node, one);
    };
    down(root);
    down(_mm512_permutexvar_ps(node, l1));
    down(_mm512_permutexvar_ps(node, l2));
    down(_mm512_permutexvar_ps(node, l3));
    down(_mm512_permutexvar_ps(node, l4));
    down(_mm512_permutex2var_ps(l5[0], node, l5[1]));
    const __mmask16 upper5 = _mm512_test_epi32_mask(node, bit5);
    down(_mm512_mask_blend_ps(upper5, _mm512_permutex2var_ps(l6[0], node, l6[1]),
                              _mm512_permutex2var_ps(l6[2], node, l6[3])));
    const __mmask16 odd = _mm512_test_epi32_mask(node, bit5);
    const __mmask16 upper6 = _mm512_test_epi32_mask(node, bit6);
    const __m512 low = _mm512_mask_blend_ps(odd, _mm512_permutex2var_ps(l7[0], node, l7[1]),
                                            _mm512_permutex2var_ps(l7[2], node, l7[3]));
    const __m512 high = _mm512_mask_blend_ps(odd, _mm512_permutex2var_ps(l7[4], node, l7[5]),
                                             _mm512_permutex2var_ps(l7[6], node, l7[7]));
    down(_mm512_mask_blend_ps(upper6, low, high));
    __mmask16 absent = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    if (table.categorical) absent |= _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_LT_OQ);
    node = _mm512_mask_mov_epi32(node, absent, missing);
    _mm_mask_storeu_epi8(out + i, lanes, _mm512_cvtepi32_epi8(node));
    for (unsigned rest = same & lanes & ~absent; rest; rest &= rest - 1) {
      const int lane = i + __builtin_ctz(rest);
      out[lane] = settle(table, value_at(exact, f32, lane * step), out[lane]);
    }
  }
}
#else
// So many values at a time that the steps of their searches overlap.
static void search(const BinTable& table, const float* x, const void* exact, bool f32, int64_t step,
                   int n, uint8_t* out) {
  constexpr int w = 16;
  int i = 0;
  if (!table.in_float64)
    for (; i + w <= n; i += w) {
      uint32_t node[w], same = 0;
      for (int k = 0; k < w; k++) node[k] = 1;
#if FASTNN_TARGET_ID == 1
      for (int half = 0; half < w; half += 8) {
        const __m256 v = _mm256_loadu_ps(x + i + half);
        __m256i at = _mm256_set1_epi32(1);
        __m256 equal = _mm256_setzero_ps();
        for (int level = 0; level < 8; level++) {
          const __m256 edge = _mm256_i32gather_ps(table.tree, at, 4);
          equal = _mm256_or_ps(equal, _mm256_cmp_ps(v, edge, _CMP_EQ_OQ));
          const __m256i right = _mm256_castps_si256(_mm256_cmp_ps(v, edge, _CMP_GT_OQ));
          at = _mm256_sub_epi32(_mm256_add_epi32(at, at), right);
        }
        _mm256_storeu_si256((__m256i*)(node + half), at);
        same |= uint32_t(_mm256_movemask_ps(equal)) << half;
      }
#else
      for (int level = 0; level < 8; level++)
        for (int k = 0; k < w; k++) {
          const float edge = table.tree[node[k]];
          same |= uint32_t(x[i + k] == edge) << k;
          node[k] = 2 * node[k] + (x[i + k] > edge);
        }
#endif
      for (int k = 0; k < w; k++) {
        const float v = x[i + k];
        const bool absent = v != v || (table.categorical && v < 0);
        out[i + k] = absent ? table.missing : uint8_t(node[k] - kMostBins);
        if (same >> k & 1 && !absent)
          out[i + k] = settle(table, value_at(exact, f32, (i + k) * step), out[i + k]);
      }
    }
  for (; i < n; i++) out[i] = search_one(table, value_at(exact, f32, i * step));
}
#endif

static int64_t divide(const double* values, int64_t n, double pivot, double* below,
                      double* others) {
  int64_t b = 0, i = 0;
#if FASTNN_TARGET_ID == 2
  const __m512d p = _mm512_set1_pd(pivot);
  for (; i + 8 <= n; i += 8) {
    const __m512d v = _mm512_loadu_pd(values + i);
    const __mmask8 is_below = _mm512_cmp_pd_mask(v, p, _CMP_LT_OQ);
    _mm512_storeu_pd(below + b, _mm512_maskz_compress_pd(is_below, v));
    _mm512_storeu_pd(others + (i - b), _mm512_maskz_compress_pd(__mmask8(~is_below), v));
    b += __builtin_popcount(is_below);
  }
#endif
  for (; i < n; i++) {
    const double v = values[i];
    below[b] = v;
    others[i - b] = v;
    b += v < pivot;
  }
  return b;
}

static void rows_of_bytes(const uint8_t* columns, int64_t step, int64_t rows, int count,
                          uint8_t* out, int64_t out_step) {
  int64_t r = 0;
#if FASTNN_TARGET_ID >= 1
  for (; r + 16 <= rows; r += 16)
    for (int c = 0; c < count; c += 16) {
      const int some = count - c < 16 ? count - c : 16;
      __m128i a[16], b[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++)
        a[i] = i < some ? _mm_loadu_si128((const __m128i*)(columns + (c + i) * step + r))
                        : _mm_setzero_si128();
      // Each round interleaves the first half of the registers with the second.
      const auto round = [](const __m128i* from, __m128i* to) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
          to[2 * i] = _mm_unpacklo_epi8(from[i], from[i + 8]);
          to[2 * i + 1] = _mm_unpackhi_epi8(from[i], from[i + 8]);
        }
      };
      round(a, b), round(b, a), round(a, b), round(b, a);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        uint8_t* to = out + (r + i) * out_step + c;
        if (some == 16)
          _mm_storeu_si128((__m128i*)to, a[i]);
        else
          __builtin_memcpy(to, &a[i], unsigned(some));
      }
    }
#endif
  for (; r < rows; r++)
    for (int c = 0; c < count; c++) out[r * out_step + c] = columns[c * step + r];
}

static const BinningKernels binning_table = {floats, search, divide, rows_of_bytes};

}  // namespace fastnn::FASTNN_TARGET
