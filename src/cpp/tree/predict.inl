// The prediction kernels of one instruction set. Included once by each file in kernels/, which
// defines FASTNN_TARGET; see isa/vec.hpp for why nothing here may be shared between targets.
#include "isa/vec.hpp"
#include "tree/predict.hpp"

#if FASTNN_TARGET_ID == 2
#include "isa/transpose_avx512.hpp"
#endif

namespace fastnn::FASTNN_TARGET {

// ---- packing

// What is among the n numbers, n a multiple of 16.
static unsigned notice(const float* x, int64_t n) {
  uint32_t largest[16] = {};
  for (int64_t i = 0; i < n; i += 16)
    for (int j = 0; j < 16; j++) {
      const uint32_t bits = bit_cast<uint32_t>(x[i + j]) & 0x7fffffff;
      largest[j] = largest[j] < bits ? bits : largest[j];
    }
  bool nan = false, infinity = false;
  for (uint32_t bits : largest) nan |= bits > 0x7f800000, infinity |= bits == 0x7f800000;
  // A NaN may hide an infinity: then every number is looked at again.
  if (nan)
    for (int64_t i = 0; i < n; i++)
      infinity |= (bit_cast<uint32_t>(x[i]) & 0x7fffffff) == 0x7f800000;
  return (nan ? kSawNaN : 0) | (infinity ? kSawInfinity : 0);
}

static FASTNN_INLINE float packed_number(float x, int) { return x; }
static FASTNN_INLINE float packed_number(double x, int) { return float(x); }
static FASTNN_INLINE float packed_number(uint8_t x, int missing_bin) {
  return x == missing_bin ? __builtin_nanf("") : float(x);
}

#if FASTNN_TARGET_ID == 2
static FASTNN_INLINE __m512i load_words(const float* p, __mmask16 m) {
  return _mm512_maskz_loadu_epi32(m, p);
}
static FASTNN_INLINE __m512i load_words(const double* p, __mmask16 m) {
  const __m256 low = _mm512_cvtpd_ps(_mm512_maskz_loadu_pd(__mmask8(m), p));
  const __m256 high = _mm512_cvtpd_ps(_mm512_maskz_loadu_pd(__mmask8(m >> 8), p + 8));
  return _mm512_castps_si512(_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1));
}
// Rows whose features are neighbours.
template <class T>
static void pack_neighbours(const T* x, int64_t row_stride, int64_t rows, int64_t count,
                            float* tile) {
  for (int64_t f = 0; f < count; f += 16) {
    const int n = count - f < 16 ? int(count - f) : 16;
    const __mmask16 some = __mmask16((1u << n) - 1);
    for (int64_t r = 0; r < kTileRows; r += 16) {
      __m512i row[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++)
        row[i] =
            r + i < rows ? load_words(x + (r + i) * row_stride + f, some) : _mm512_setzero_si512();
      transpose16(row);
      float* to = tile + f * kTileRows + r;
      if (n == 16) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * kTileRows, row[i]);
      } else {
        for (int i = 0; i < n; i++) _mm512_storeu_si512(to + i * kTileRows, row[i]);
      }
    }
  }
}
#endif

template <class T>
static void pack_any(const PredictKernels::Pack& p) {
  const T* x = static_cast<const T*>(p.x.data);
  const int64_t rows = p.x.rows, rs = p.x.row_stride;
#if FASTNN_TARGET_ID == 2
  if constexpr (sizeof(T) >= 4)
    if (!p.columns && p.x.column_stride == 1 && rs != 1)
      return pack_neighbours(x, rs, rows, p.count, p.tile);
#endif
  const int missing = p.x.missing_bin;
  auto column = [&](int64_t f) { return x + (p.columns ? p.columns[f] : f) * p.x.column_stride; };
  if (rs == 1) {
    for (int64_t f = 0; f < p.count; f++) {
      const T* from = column(f);
      float* to = p.tile + f * kTileRows;
      for (int64_t r = 0; r < rows; r++) to[r] = packed_number(from[r], missing);
      for (int64_t r = rows; r < kTileRows; r++) to[r] = 0;
    }
    return;
  }
  // A few rows at a time, whose lines stay in the cache while their features are taken.
  constexpr int64_t kRows = 16;
  for (int64_t first = 0; first < kTileRows; first += kRows)
    for (int64_t f = 0; f < p.count; f++) {
      const T* from = column(f);
      float* to = p.tile + f * kTileRows;
      for (int64_t r = first; r < first + kRows; r++)
        to[r] = r < rows ? packed_number(from[r * rs], missing) : 0;
    }
}

static unsigned pack(const PredictKernels::Pack& p) {
  if (p.x.type == DType::f64)
    pack_any<double>(p);
  else if (p.x.type == DType::u8)
    pack_any<uint8_t>(p);
  else
    pack_any<float>(p);
  return notice(p.tile, p.count * kTileRows);
}

// ---- one row, one node

static FASTNN_INLINE bool in_set(const uint32_t* categories, float threshold, float x) {
  const int32_t set = bit_cast<int32_t>(threshold);
  if (!(x >= 0 && x < 256)) return false;
  const uint32_t c = uint32_t(x);
  return categories[int64_t(set) * kCategoryWords + c / 32] >> c % 32 & 1;
}
// flags: kMissingLeft and kCategorical
static FASTNN_INLINE bool goes_right(float x, float threshold, uint32_t flags,
                                     const uint32_t* categories) {
  if (x != x) return !(flags & kMissingLeft);
  if (flags & kCategorical) return !in_set(categories, threshold, x);
  return !(x <= threshold);
}

// From the tables' last level down to the leaves; `at` are places there. Each pass takes every row
// that is not at its leaf yet one level down: rows do not wait for each other, so that their loads
// overlap.
static void walk(const TreeView& t, const float* x, int64_t tile_size, int64_t rows, bool general,
                 int32_t* at) {
  int16_t list[kBlockTiles * kTileRows];
  int n = 0;
  for (int64_t r = 0; r < rows; r++) {
    at[r] = t.link[at[r]];
    list[n] = int16_t(r);
    n += at[r] >= 0;
  }
  while (n) {
    int left = 0;
    auto pass = [&](auto right_of) __attribute__((always_inline)) {
      for (int i = 0; i < n; i++) {
        const int r = list[i];
        const DeepNode& node = t.deep[at[r]];
        const float v = x[r / kTileRows * tile_size + r % kTileRows +
                          int64_t(node.feature & kDeepFeature) * kTileRows];
        const int32_t next = node.child[right_of(v, node)];
        at[r] = next;
        list[left] = int16_t(r);
        left += next >= 0;
      }
    };
    if (general)
      pass([&](float v, const DeepNode& node) __attribute__((always_inline)) {
        return goes_right(v, node.threshold, node.feature >> 16, t.categories);
      });
    else
      pass([](float v, const DeepNode& node)
               __attribute__((always_inline)) { return !(v <= node.threshold); });
    n = left;
  }
  for (int64_t r = 0; r < rows; r++) at[r] = ~at[r];
}

// ---- the tables

// Some rows at once, so that their loads overlap.
template <bool general>
static void top_scalar(const TreeView& t, const float* x, int32_t* out) {
  constexpr int kRows = 8;
  for (int r = 0; r < kTileRows; r += kRows) {
    uint32_t at[kRows];
    for (uint32_t& a : at) a = 1;
    for (int level = 0; level < t.levels; level++)
#pragma GCC unroll 8
      for (int i = 0; i < kRows; i++) {
        const uint32_t f = t.feature[at[i]];
        const float v = x[(f & kTopFeature) * kTileRows + r + i], threshold = t.threshold[at[i]];
        const bool right = general ? goes_right(v, threshold, f, t.categories) : !(v <= threshold);
        at[i] = 2 * at[i] + right;
      }
    for (int i = 0; i < kRows; i++) out[r + i] = int32_t(at[i] - (1u << t.levels));
  }
}

#if FASTNN_TARGET_ID == 2

// The entry `at` of a level's part of the tables, whose size is a power of two: the bits above are
// not looked at by the permutations.
template <int level>
static FASTNN_INLINE __m512 threshold_of(const float* t, __m512i at) {
  auto bit = [&](int b) { return _mm512_test_epi32_mask(at, _mm512_set1_epi32(b)); };
  auto two = [&](int i) {
    return _mm512_permutex2var_ps(_mm512_load_ps(t + i), at, _mm512_load_ps(t + i + 16));
  };
  if constexpr (level <= 3) return _mm512_permutexvar_ps(at, _mm512_load_ps(t));
  if constexpr (level == 4) return _mm512_permutexvar_ps(at, _mm512_load_ps(t + 16));
  if constexpr (level == 5) return two(32);
  if constexpr (level == 6) return _mm512_mask_blend_ps(bit(32), two(64), two(96));
  if constexpr (level == 7) {
    const __m512 low = _mm512_mask_blend_ps(bit(32), two(128), two(160));
    const __m512 high = _mm512_mask_blend_ps(bit(32), two(192), two(224));
    return _mm512_mask_blend_ps(bit(64), low, high);
  }
}
// With what lies in the upper halves of the lanes.
template <int level>
static FASTNN_INLINE __m512i feature_of(const uint16_t* t, __m512i at) {
  auto load = [&](int i) { return _mm512_load_si512(t + i); };
  if constexpr (level <= 4) return _mm512_permutexvar_epi16(at, load(0));
  if constexpr (level == 5) return _mm512_permutexvar_epi16(at, load(32));
  if constexpr (level == 6) return _mm512_permutex2var_epi16(load(64), at, load(96));
  if constexpr (level == 7)
    return _mm512_mask_blend_epi32(_mm512_test_epi32_mask(at, _mm512_set1_epi32(64)),
                                   _mm512_permutex2var_epi16(load(128), at, load(160)),
                                   _mm512_permutex2var_epi16(load(192), at, load(224)));
}
static FASTNN_INLINE __m512i step(__m512i at, __mmask16 right) {
  at = _mm512_add_epi32(at, at);
  return _mm512_mask_add_epi32(at, right, at, _mm512_set1_epi32(1));
}

constexpr int kVectors = kTileRows / 16;

// One level: features by gathers.
template <int level, bool general>
static FASTNN_INLINE void descend(const TreeView& t, const float* x, __m512i (&at)[kVectors]) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; v++) {
    const __m512i f = feature_of<level>(t.feature, at[v]);
    const __m512i number = _mm512_and_si512(f, _mm512_set1_epi32(kTopFeature));
    const __m512i place = _mm512_add_epi32(_mm512_slli_epi32(number, 6), lanes);
    static_assert(kTileRows == 1 << 6);
    const __m512 value = _mm512_i32gather_ps(place, x + 16 * v, 4);
    const __m512 threshold = threshold_of<level>(t.threshold, at[v]);
    __mmask16 right = _mm512_cmp_ps_mask(value, threshold, _CMP_NLE_UQ);
    if constexpr (general) {
      const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
      const __mmask16 set =
          _mm512_test_epi32_mask(f, _mm512_set1_epi32(kCategorical)) & __mmask16(~nan);
      if (set) {
        // Those in 0 to 255 have a bit somewhere.
        const __mmask16 known =
            _mm512_mask_cmp_ps_mask(set, value, _mm512_setzero_ps(), _CMP_GE_OQ) &
            _mm512_cmp_ps_mask(value, _mm512_set1_ps(256), _CMP_LT_OQ);
        const __m512i c = _mm512_maskz_cvttps_epi32(known, value);
        const __m512i word = _mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(threshold), 3),
                                              _mm512_srli_epi32(c, 5));
        static_assert(kCategoryWords == 1 << 3);
        const __m512i bits =
            _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), known, word, t.categories, 4);
        const __m512i bit = _mm512_srlv_epi32(bits, _mm512_and_si512(c, _mm512_set1_epi32(31)));
        const __mmask16 left = _mm512_mask_test_epi32_mask(known, bit, _mm512_set1_epi32(1));
        right = (right & ~set) | (set & ~left);
      }
      right &= ~(nan & _mm512_test_epi32_mask(f, _mm512_set1_epi32(kMissingLeft)));
    }
    at[v] = step(at[v], right);
  }
}

// The first four levels have few features: each is loaded as the vector that it is, and the
// comparisons so far choose among them. That is cheaper than a gather.
template <int levels>
static FASTNN_INLINE void first_levels(const TreeView& t, const float* x, __m512i (&at)[kVectors]) {
  __mmask16 right[kVectors][4];
  auto rows_of = [&](int entry, int v) {
    return x + int64_t(t.feature[entry] & kTopFeature) * kTileRows + 16 * v;
  };
  // Of two neighbouring entries.
  auto pair = [&](int entry, int v, __mmask16 second) {
    return _mm512_mask_loadu_ps(_mm512_loadu_ps(rows_of(entry, v)), second, rows_of(entry + 1, v));
  };
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; v++) {
    right[v][0] = _mm512_cmp_ps_mask(_mm512_loadu_ps(rows_of(1, v)), _mm512_set1_ps(t.threshold[1]),
                                     _CMP_NLE_UQ);
    at[v] = step(_mm512_set1_epi32(1), right[v][0]);
  }
  auto compare = [&](__m512 value, __m512 threshold, int v, int level)
                     __attribute__((always_inline)) {
                       right[v][level] = _mm512_cmp_ps_mask(value, threshold, _CMP_NLE_UQ);
                       at[v] = step(at[v], right[v][level]);
                     };
  if constexpr (levels > 1)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++)
      compare(pair(2, v, right[v][0]), threshold_of<1>(t.threshold, at[v]), v, 1);
  if constexpr (levels > 2)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      const __mmask16* r = right[v];
      const __m512 value = _mm512_mask_blend_ps(r[0], pair(4, v, r[1]), pair(6, v, r[1]));
      compare(value, threshold_of<2>(t.threshold, at[v]), v, 2);
      if constexpr (levels > 3) {
        const __m512 a = _mm512_mask_blend_ps(r[1], pair(8, v, r[2]), pair(10, v, r[2]));
        const __m512 b = _mm512_mask_blend_ps(r[1], pair(12, v, r[2]), pair(14, v, r[2]));
        compare(_mm512_mask_blend_ps(r[0], a, b), threshold_of<3>(t.threshold, at[v]), v, 3);
      }
    }
}

template <int levels, bool general>
static void top(const TreeView& t, const float* x, int32_t* out) {
  __m512i at[kVectors];
  constexpr int kFirst = general ? 0 : levels < 4 ? levels : 4;
  if constexpr (kFirst > 0)
    first_levels<kFirst>(t, x, at);
  else
    for (__m512i& a : at) a = _mm512_set1_epi32(1);
  if constexpr (levels > 0 && kFirst <= 0) descend<0, general>(t, x, at);
  if constexpr (levels > 1 && kFirst <= 1) descend<1, general>(t, x, at);
  if constexpr (levels > 2 && kFirst <= 2) descend<2, general>(t, x, at);
  if constexpr (levels > 3 && kFirst <= 3) descend<3, general>(t, x, at);
  if constexpr (levels > 4) descend<4, general>(t, x, at);
  if constexpr (levels > 5) descend<5, general>(t, x, at);
  if constexpr (levels > 6) descend<6, general>(t, x, at);
  if constexpr (levels > 7) descend<7, general>(t, x, at);
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; v++)
    _mm512_storeu_si512(out + 16 * v, _mm512_sub_epi32(at[v], _mm512_set1_epi32(1 << levels)));
}

using Top = void (*)(const TreeView&, const float*, int32_t*);
template <bool general>
static Top top_of(int levels) {
  static const Top tops[] = {top<0, general>, top<1, general>, top<2, general>,
                             top<3, general>, top<4, general>, top<5, general>,
                             top<6, general>, top<7, general>, top<8, general>};
  static_assert(kTopLevels == 8);
  return tops[levels];
}

#elif FASTNN_TARGET_ID == 1

constexpr int kVectors = 4;  // of 8 rows

static FASTNN_INLINE __m256 choose(__m256 no, __m256 yes, __m256 mask) {
  return _mm256_blendv_ps(no, yes, mask);
}
// right is -1 where a row goes right
static FASTNN_INLINE __m256i step(__m256i at, __m256 right) {
  return _mm256_sub_epi32(_mm256_add_epi32(at, at), _mm256_castps_si256(right));
}

// The first levels as in the AVX-512 kernel; from there on thresholds and features by gathers.
template <int levels>
static FASTNN_INLINE void first_levels(const TreeView& t, const float* x, __m256i (&at)[kVectors]) {
  auto rows_of = [&](int entry, int v) {
    return _mm256_loadu_ps(x + int64_t(t.feature[entry] & kTopFeature) * kTileRows + 8 * v);
  };
  const __m256 low = _mm256_load_ps(t.threshold), high = _mm256_load_ps(t.threshold + 8);
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; v++) {
    __m256 right[3];
    right[0] = _mm256_cmp_ps(rows_of(1, v), _mm256_set1_ps(t.threshold[1]), _CMP_NLE_UQ);
    at[v] = step(_mm256_set1_epi32(1), right[0]);
    auto pair = [&](int entry, __m256 second) {
      return choose(rows_of(entry, v), rows_of(entry + 1, v), second);
    };
    if constexpr (levels > 1) {
      const __m256 threshold = _mm256_permutevar8x32_ps(low, at[v]);
      right[1] = _mm256_cmp_ps(pair(2, right[0]), threshold, _CMP_NLE_UQ);
      at[v] = step(at[v], right[1]);
    }
    if constexpr (levels > 2) {
      const __m256 threshold = _mm256_permutevar8x32_ps(low, at[v]);
      const __m256 value = choose(pair(4, right[1]), pair(6, right[1]), right[0]);
      right[2] = _mm256_cmp_ps(value, threshold, _CMP_NLE_UQ);
      at[v] = step(at[v], right[2]);
    }
    if constexpr (levels > 3) {
      const __m256 threshold = _mm256_permutevar8x32_ps(high, at[v]);
      const __m256 a = choose(pair(8, right[2]), pair(10, right[2]), right[1]);
      const __m256 b = choose(pair(12, right[2]), pair(14, right[2]), right[1]);
      at[v] = step(at[v], _mm256_cmp_ps(choose(a, b, right[0]), threshold, _CMP_NLE_UQ));
    }
  }
}

template <int first>
static void top_vectors(const TreeView& t, const float* x, int32_t* out) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int r = 0; r < kTileRows; r += 8 * kVectors) {
    __m256i at[kVectors];
    first_levels<first>(t, x + r, at);
    for (int level = first; level < t.levels; level++)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) {
        // Two features at once, so that no gather reads beyond the table.
        const __m256i two =
            _mm256_i32gather_epi32((const int*)t.feature, _mm256_srli_epi32(at[v], 1), 4);
        const __m256i odd = _mm256_and_si256(at[v], _mm256_set1_epi32(1));
        const __m256i f = _mm256_and_si256(_mm256_srlv_epi32(two, _mm256_slli_epi32(odd, 4)),
                                           _mm256_set1_epi32(kTopFeature));
        const __m256i place = _mm256_add_epi32(_mm256_slli_epi32(f, 6), lanes);
        static_assert(kTileRows == 1 << 6);
        const __m256 value = _mm256_i32gather_ps(x + r + 8 * v, place, 4);
        const __m256 threshold = _mm256_i32gather_ps(t.threshold, at[v], 4);
        at[v] = step(at[v], _mm256_cmp_ps(value, threshold, _CMP_NLE_UQ));
      }
    for (int v = 0; v < kVectors; v++)
      _mm256_storeu_si256((__m256i*)(out + r + 8 * v),
                          _mm256_sub_epi32(at[v], _mm256_set1_epi32(1 << t.levels)));
  }
}

using Top = void (*)(const TreeView&, const float*, int32_t*);
template <bool general>
static Top top_of(int levels) {
  if (general || levels == 0) return top_scalar<general>;
  static const Top tops[] = {top_vectors<1>, top_vectors<2>, top_vectors<3>, top_vectors<4>};
  return tops[(levels < 4 ? levels : 4) - 1];
}

#else

using Top = void (*)(const TreeView&, const float*, int32_t*);
template <bool general>
static Top top_of(int) {
  return top_scalar<general>;
}

#endif

static void leaves(const TreeView& t, const float* x, int64_t tile_size, int64_t tiles,
                   bool general, int32_t* leaf) {
  const Top top = general ? top_of<true>(t.levels) : top_of<false>(t.levels);
  for (int64_t i = 0; i < tiles; i++) top(t, x + i * tile_size, leaf + i * kTileRows);
  if (t.link) walk(t, x, tile_size, tiles * kTileRows, general, leaf);
}

// ---- sums

static void add(const double* values, int64_t outputs, const int32_t* leaf, int64_t rows,
                double* out, int64_t out_row) {
  if (outputs == 1) {
    for (int64_t r = 0; r < rows; r++) out[r * out_row] += values[leaf[r]];
    return;
  }
  if (outputs == 2) {
    for (int64_t r = 0; r < rows; r++) {
      const double* from = values + 2 * int64_t(leaf[r]);
      double* to = out + r * out_row;
      // Read before either is written: as one vector.
      const double a = to[0] + from[0], b = to[1] + from[1];
      to[0] = a, to[1] = b;
    }
    return;
  }
  for (int64_t r = 0; r < rows; r++) {
    const double* from = values + outputs * leaf[r];
    double* to = out + r * out_row;
    int64_t k = 0;
    for (; k + VecF64::width <= outputs; k += VecF64::width)
      (VecF64::load(to + k) + VecF64::load(from + k)).store(to + k);
    const int rest = int(outputs - k);
    if (rest)
      (VecF64::load_partial(to + k, rest) + VecF64::load_partial(from + k, rest))
          .store_partial(to + k, rest);
  }
}

static const PredictKernels predict_table = {pack, leaves, add};

}  // namespace fastnn::FASTNN_TARGET
