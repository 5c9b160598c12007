// The loops of attention/kernels.hpp over one instruction set's vectors. Included by the files in
// kernels/, which define the target first.
#pragma once
#include "attention/kernels.hpp"
#include "isa/math.hpp"
#include "isa/philox.hpp"
#include "isa/vec.hpp"
#if FASTNN_TARGET_ID == 2
#include "isa/transpose_avx512.hpp"
#endif

namespace fastnn::FASTNN_TARGET {

FASTNN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// 2^x for x <= 127, as exp_below. Narrow: to 2^-17, for what is then rounded to bfloat16.
template <bool Narrow>
FASTNN_INLINE VecF32 exp2_of(VecF32 x) {
  using V = VecF32;
  x = max(V::set1(-152.0f), x);
  const V n = round(x), f = x - n;
  // 2^f, |f| <= 1/2; the other one to 2^-27
  if constexpr (Narrow)
    return ldexp(polynomial(f, 1.0f, 0.6931367339f, 0.240225301f, 0.05583828295f, 0.009656710289f),
                 n);
  return ldexp(polynomial(f, 1.0f, 0.693147188f, 0.2402265076f, 0.05550357114f, 0.009618082557f,
                          0.001339086336f, 0.0001545316295f),
               n);
}
template <bool Narrow>
FASTNN_INLINE VecF64 exp2_of(VecF64 x) {
  return Full::exp(x * VecF64::set1(0x1.62e42fefa39efp-1));
}

// ---- probabilities -----------------------------------------------------------------------------

// Two keys of each lane in bfloat16, a word; to the nearest, halves away from zero.
#if FASTNN_TARGET_ID == 2
FASTNN_INLINE void put_pair(uint32_t* to, VecF32 low, VecF32 high) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(int(0xffff0000));
  const __m512i a = _mm512_add_epi32(_mm512_castps_si512(low.r), half);
  const __m512i b = _mm512_add_epi32(_mm512_castps_si512(high.r), half);
  _mm512_storeu_si512(to, _mm512_or_si512(_mm512_srli_epi32(a, 16), _mm512_and_si512(b, upper)));
}
#else
FASTNN_INLINE void put_pair(uint32_t* to, VecF32 low, VecF32 high) {
  using V = VecF32;
  float a[V::width], b[V::width];
  low.store(a);
  high.store(b);
  for (int l = 0; l < V::width; l++) {
    bf16 x, y;
    from_f32(x, a[l]);
    from_f32(y, b[l]);
    to[l] = uint32_t(x.bits) | uint32_t(y.bits) << 16;
  }
}
#endif
// Scores of which rounding the largest leaves so much that it has an exponential of its own, or
// that are beyond the range in base 2, are better brought there first.
template <class V>
FASTNN_INLINE bool any_far(V largest, V by) {
  using T = typename V::T;
  const V none = V::set1(-T(__builtin_inf()));
  const V far = select(lt(V::set1(T(1 << 20)), abs(largest * by)), V::set1(1), V::zero());
  return reduce_add(select(eq(largest, none), V::zero(), far)) > 0;
}
template <class V>
FASTNN_INLINE V in_base_2(V s) {
  using T = typename V::T;
  constexpr T infinity = T(__builtin_inf()),
              most = sizeof(T) == 4 ? T(__FLT_MAX__) : T(__DBL_MAX__);
  const V far = s * V::set1(T(0x1.71547652b82fep+0));
  // A NaN stays one.
  const V near = min(V::set1(most), max(V::set1(-most), far));
  return select(lt(abs(s), V::set1(infinity)), near, far);
}

template <class V, bool Pairs>
static bool probabilities_of(const ScoreBlock& b) {
  using T = typename V::T;
  constexpr int W = V::width;
  constexpr T infinity = T(__builtin_inf());
  auto *max_of = static_cast<T*>(b.max), *sum_of = static_cast<T*>(b.sum);
  auto* factor_of = static_cast<T*>(b.factor);
  const V scale = V::set1(T(b.scale)), none = V::set1(-infinity);
  // Then the largest score is that of the largest product.
  const bool plain = !b.bias && b.scale > 0;
  const double log2_e = 0x1.71547652b82fep+0;
  const V by = V::set1(T(plain ? b.scale * log2_e : log2_e));
  bool changed = false;
  for (int l = 0; l < b.used; l += W) {
    T* const scores = static_cast<T*>(b.scores) + l;
    const T* const bias = static_cast<const T*>(b.bias) + (b.bias ? l : 0);
    uint32_t* const pairs = static_cast<uint32_t*>(b.pairs) + (Pairs ? l : 0);
    V largest[4] = {none, none, none, none};
    auto look = [&](int64_t j, int chain) __attribute__((always_inline)) {
      V s = V::load(scores + j * b.lanes);
      if (!plain) {
        s = b.bias ? fma(s, scale, V::load(bias + j * b.lanes)) : s * scale;
        s.store(scores + j * b.lanes);
      }
      largest[chain] = max(largest[chain], s);
    };
    int64_t j = 0;
    for (; j + 4 <= b.keys; j += 4)
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++) look(j + c, c);
    for (; j < b.keys; j++) look(j, 0);
    const V score = max(max(largest[0], largest[1]), max(largest[2], largest[3]));
    V found = score * by, multiply = by;
    if (any_far(score, by)) {
      const V first = plain ? scale : V::set1(1);
      for (j = 0; j < b.keys; j++)
        in_base_2(V::load(scores + j * b.lanes) * first).store(scores + j * b.lanes);
      found = in_base_2(score * first), multiply = V::set1(1);
    }
    const V before = V::load(max_of + l);
    const V now = max(before, found);
    // A query that has seen nothing yet: every exponential is to be 0, and no difference NaN.
    const V base = select(eq(now, none), V::zero(), now);
    const V factor = exp2_of<false>(before - base);
    now.store(max_of + l);
    factor.store(factor_of + l);
    V sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    const V less = neg(base);
    auto raise = [&](int64_t j, int chain) __attribute__((always_inline)) {
      const V p = exp2_of<Pairs>(fma(V::load(scores + j * b.lanes), multiply, less));
      if (!Pairs) p.store(scores + j * b.lanes);
      sums[chain] = sums[chain] + p;
      return p;
    };
    for (j = 0; j + 4 <= b.keys; j += 4)
#pragma GCC unroll 2
      for (int c = 0; c < 4; c += 2) {
        const V low = raise(j + c, c), high = raise(j + c + 1, c + 1);
        if constexpr (Pairs) put_pair(pairs + (j + c) / 2 * b.lanes, low, high);
      }
    for (; j < b.keys; j += 2) {
      const V low = raise(j, 0), high = j + 1 < b.keys ? raise(j + 1, 1) : V::zero();
      if constexpr (Pairs) put_pair(pairs + j / 2 * b.lanes, low, high);
    }
    const V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    fma(V::load(sum_of + l), factor, sum).store(sum_of + l);
  }
  for (int l = 0; l < b.used; l++) changed |= !(factor_of[l] == T(1));
  return changed;
}
template <class V>
static bool probabilities(const ScoreBlock& b) {
  if constexpr (sizeof(typename V::T) == 4)
    if (b.pairs) return probabilities_of<V, true>(b);
  return probabilities_of<V, false>(b);
}

template <class V>
static void gradients(const GradientBlock& b) {
  using T = typename V::T;
  constexpr int W = V::width;
  const V scale = V::set1(T(b.scale));
  for (int l = 0; l < b.lanes; l += W) {
    T* const scores = static_cast<T*>(b.scores) + l;
    T* const products = static_cast<T*>(b.products) + l;
    const T* const bias = static_cast<const T*>(b.bias) + (b.bias ? l : 0);
    const V less = neg(V::load(static_cast<const T*>(b.log_sum) + l));
    const V delta = V::load(static_cast<const T*>(b.delta) + l);
    for (int64_t j = 0; j < b.keys; j++) {
      const V s = V::load(scores + j * b.lanes);
      const V x = b.bias ? fma(s, scale, V::load(bias + j * b.lanes)) + less : fma(s, scale, less);
      // Not above 1, however log_sum was rounded; a NaN stays one.
      const V p = exp_below(min(V::zero(), x));
      p.store(scores + j * b.lanes);
      (p * (V::load(products + j * b.lanes) - delta)).store(products + j * b.lanes);
    }
  }
}

template <class V>
static void scale_columns(void* numbers, int64_t rows, int lanes, const void* factor) {
  using T = typename V::T;
  for (int l = 0; l < lanes; l += V::width) {
    const V f = V::load(static_cast<const T*>(factor) + l);
    T* p = static_cast<T*>(numbers) + l;
    for (int64_t i = 0; i < rows; i++, p += lanes) (V::load(p) * f).store(p);
  }
}

// ---- bias --------------------------------------------------------------------------------------

template <class T>
FASTNN_INLINE T mask_element(const char* row, int64_t index, DType type) {
  constexpr T infinity = T(__builtin_inf());
  switch (type) {
    case DType::u8:
      return row[index] ? T(0) : -infinity;
    case DType::bf16:
      return T(to_f32(reinterpret_cast<const bf16*>(row)[index]));
    case DType::f16:
      return T(to_f32(reinterpret_cast<const f16*>(row)[index]));
    case DType::f64:
      return T(reinterpret_cast<const double*>(row)[index]);
    default:
      return T(reinterpret_cast<const float*>(row)[index]);
  }
}

#if FASTNN_TARGET_ID == 2
// 16 keys of a lane.
FASTNN_INLINE VecF32 mask_keys(const char* row, int64_t j, int n, DType type) {
  if (type == DType::u8) {
    const __m128i bytes = _mm_maskz_loadu_epi8(VecF32::first(n), row + j);
    const __mmask16 seen = _mm_test_epi8_mask(bytes, bytes);
    return {_mm512_mask_blend_ps(seen, _mm512_set1_ps(-__builtin_inff()), _mm512_setzero_ps())};
  }
  if (type == DType::bf16) return VecF32::load_partial(reinterpret_cast<const bf16*>(row) + j, n);
  if (type == DType::f16) return VecF32::load_partial(reinterpret_cast<const f16*>(row) + j, n);
  return VecF32::load_partial(reinterpret_cast<const float*>(row) + j, n);
}
#endif

// keys x lanes of what the masks add, to `to`.
template <class T>
static void read_masks(const BiasBlock& b, T* to) {
  if (b.one_mask) {
    for (int64_t j = 0; j < b.keys; j++) {
      const T x = mask_element<T>(b.mask[0], j * b.mask_step, b.mask_type);
      for (int l = 0; l < b.lanes; l++) to[j * b.lanes + l] = x;
    }
    return;
  }
#if FASTNN_TARGET_ID == 2
  if constexpr (sizeof(T) == 4)
    if (b.mask_step == 1 && b.mask_type != DType::f64) {
      for (int l = 0; l < b.lanes; l += 16)
        for (int64_t j = 0; j < b.keys; j += 16) {
          const int n = int(least(16, b.keys - j));
          __m512i block[16];
#pragma GCC unroll 16
          for (int i = 0; i < 16; i++)
            block[i] = _mm512_castps_si512(mask_keys(b.mask[l + i], j, n, b.mask_type).r);
          transpose16(block);
          for (int i = 0; i < n; i++) _mm512_storeu_si512(to + (j + i) * b.lanes + l, block[i]);
        }
      return;
    }
#endif
  for (int l = 0; l < b.lanes; l++)
    for (int64_t j = 0; j < b.keys; j++)
      to[j * b.lanes + l] = mask_element<T>(b.mask[l], j * b.mask_step, b.mask_type);
}

template <class V>
static void make_bias(const BiasBlock& b) {
  using T = typename V::T;
  T* const to = static_cast<T*>(b.bias);
  if (b.mask) read_masks(b, to);
  if (b.mask && !b.slope && !b.bounded) return;
  const V none = V::set1(-T(__builtin_inf()));
  const V low = V::set1(T(b.low)), high = V::set1(T(b.high)), shift = V::set1(T(b.shift));
  for (int l = 0; l < b.lanes; l += V::width) {
    const V first = V::load(static_cast<const T*>(b.distance) + l);
    const V slope = b.slope ? neg(V::load(static_cast<const T*>(b.slope) + l)) : V::zero();
    for (int64_t j = 0; j < b.keys; j++) {
      T* const p = to + j * b.lanes + l;
      const V distance = first + V::set1(T(j));
      V x = b.mask ? V::load(p) : V::zero();
      if (b.slope) x = fma(slope, abs(distance - shift), x);
      if (b.bounded) x = select(either(lt(distance, low), lt(high, distance)), none, x);
      x.store(p);
    }
  }
}

// ---- dropout -----------------------------------------------------------------------------------

template <class V>
static void drop(const DropBlock& b) {
  using T = typename V::T;
  auto* const to = static_cast<T*>(b.factors);
  constexpr int kGroup = 16;
  uint32_t words[kGroup][kMostKeys];
  for (int l0 = 0; l0 < b.lanes; l0 += kGroup) {
    const int lanes = b.lanes - l0 < kGroup ? b.lanes - l0 : kGroup;
    for (int l = 0; l < lanes; l++) philox_words(b.seed, b.first[l0 + l], b.keys, words[l]);
#if FASTNN_TARGET_ID == 2
    if constexpr (sizeof(T) == 4)
      if (lanes == 16 && b.threshold <= 0xffffffffu) {
        const __m512i threshold = _mm512_set1_epi32(int(uint32_t(b.threshold)));
        for (int64_t j = 0; j < b.keys; j += 16) {
          __m512i block[16];
#pragma GCC unroll 16
          for (int i = 0; i < 16; i++) block[i] = _mm512_loadu_si512(words[i] + j);
          transpose16(block);
          for (int i = 0; i < int(least(16, b.keys - j)); i++)
            _mm512_storeu_ps(to + (j + i) * b.lanes + l0,
                             _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(block[i], threshold),
                                                 _mm512_set1_ps(float(b.scale))));
        }
        continue;
      }
#endif
    for (int64_t j = 0; j < b.keys; j++)
      for (int l = 0; l < lanes; l++)
        to[j * b.lanes + l0 + l] = words[l][j] >= b.threshold ? T(b.scale) : T(0);
  }
}

template <class V>
static void multiply(void* numbers, const void* by_, int64_t count) {
  using T = typename V::T;
  auto* p = static_cast<T*>(numbers);
  const auto* by = static_cast<const T*>(by_);
  for (int64_t i = 0; i < count; i += V::width) (V::load(p + i) * V::load(by + i)).store(p + i);
}

// ---- copies ------------------------------------------------------------------------------------

template <class From, class To>
struct Copied {
  using V = VecF32;
  static FASTNN_INLINE void one(const From* from, To* to) { from_f32(*to, to_f32(*from)); }
};
template <>
struct Copied<double, double> {
  using V = VecF64;
  static FASTNN_INLINE void one(const double* from, double* to) { *to = *from; }
};

template <class From, class To>
static void copy_rows(const RowCopy& c) {
  using C = Copied<From, To>;
  constexpr int W = C::V::width;
  const auto* from = reinterpret_cast<const From*>(c.from);
  auto* to = reinterpret_cast<To*>(c.to);
  for (int64_t i = 0; i < c.rows; i++, from += c.row, to += c.to_row) {
    int64_t e = 0;
    if (c.step == 1) {
      for (; e + W <= c.n; e += W) C::V::load(from + e).store(to + e);
      if (e < c.n) {
        C::V::load_partial(from + e, int(c.n - e)).store_partial(to + e, int(c.n - e));
        e = c.n;
      }
    }
    for (; e < c.n; e++) C::one(from + e * c.step, to + e);
    for (; e < c.to_row; e++) to[e] = To{};
  }
}
// The bits as they are: a conversion to float32 and back would quiet a NaN.
template <class Half>
static void copy_halves(const RowCopy& c) {
  const auto* from = reinterpret_cast<const Half*>(c.from);
  auto* to = reinterpret_cast<Half*>(c.to);
  for (int64_t i = 0; i < c.rows; i++, from += c.row, to += c.to_row) {
    int64_t e = 0;
    if (c.step == 1) {
      __builtin_memcpy(to, from, size_t(c.n) * sizeof(Half));
      e = c.n;
    }
    for (; e < c.n; e++) to[e] = from[e * c.step];
    for (; e < c.to_row; e++) to[e] = Half{};
  }
}

static void pair_rows(const RowCopy& c) {
  const auto* from = reinterpret_cast<const bf16*>(c.from);
  auto* to = reinterpret_cast<uint32_t*>(c.to);
  for (int64_t i = 0; i < c.rows; i += 2, from += 2 * c.row, to += c.to_row) {
    const bool both = i + 1 < c.rows;
    int64_t e = 0;
#if FASTNN_TARGET_ID == 2
    if (c.step == 1)
      for (; e < c.n; e += 16) {
        const __mmask16 m = VecF32::first(int(least(16, c.n - e)));
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, from + e));
        const __m512i high =
            both ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, from + c.row + e))
                 : _mm512_setzero_si512();
        _mm512_mask_storeu_epi32(to + e, m, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
#endif
    for (; e < c.n; e++)
      to[e] = uint32_t(from[e * c.step].bits) |
              (both ? uint32_t(from[c.row + e * c.step].bits) << 16 : 0u);
  }
}

static void pair_keys(const float* from, int64_t keys, int lanes, uint32_t* to) {
  for (int64_t j = 0; j < keys; j += 2, from += 2 * lanes, to += lanes)
    for (int l = 0; l < lanes; l += VecF32::width)
      put_pair(to + l, VecF32::load(from + l),
               j + 1 < keys ? VecF32::load(from + lanes + l) : VecF32::zero());
}

template <class From>
static void row_dots(const RowCopy& a, const RowCopy& b, void* sums_) {
  using C = Copied<From, From>;
  using V = typename C::V;
  using T = typename V::T;
  auto* sums = static_cast<T*>(sums_);
  for (int64_t i = 0; i < a.rows; i++) {
    const auto* x = reinterpret_cast<const From*>(a.from) + i * a.row;
    const auto* y = reinterpret_cast<const From*>(b.from) + i * b.row;
    V sum = V::zero();
    int64_t e = 0;
    T rest = 0;
    if (a.step == 1 && b.step == 1) {
      for (; e + V::width <= a.n; e += V::width) sum = fma(V::load(x + e), V::load(y + e), sum);
      if (e < a.n) {
        const int n = int(a.n - e);
        sum = fma(V::load_partial(x + e, n), V::load_partial(y + e, n), sum);
        e = a.n;
      }
    }
    for (; e < a.n; e++) {
      if constexpr (sizeof(T) == 8)
        rest += x[e * a.step] * y[e * b.step];
      else
        rest += to_f32(x[e * a.step]) * to_f32(y[e * b.step]);
    }
    sums[i] = reduce_add(sum) + rest;
  }
}

}  // namespace fastnn::FASTNN_TARGET
