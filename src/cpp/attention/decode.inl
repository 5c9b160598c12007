// Few queries against many keys: nothing is used often enough to be packed, and what counts is that
// keys and values are read once, at the memory's speed. Vectors lie along a key's elements.
#pragma once
#include "attention/decode.hpp"
#include "attention/kernels.inl"

namespace fastnn::FASTNN_TARGET {

template <class Src>
struct Wider {
  using V = VecF32;
};
template <>
struct Wider<double> {
  using V = VecF64;
};

// Lines are asked for so many bytes ahead: rows are read several at a time, which the hardware does
// not take for one long read.
constexpr int64_t kAheadBytes = 4096;
// Rows that are one and the same, expanded, have nothing ahead.
FASTNN_INLINE int64_t elements_ahead(int64_t row, int64_t size) {
  return row ? (kAheadBytes / (row * size) + 1) * row : 0;
}

// Sum f of the sums that `add_across` gives is that of the vector with this number.
constexpr int across_index(int f) { return 4 * (f % 4) + f / 4; }

#if FASTNN_TARGET_ID == 2
constexpr int kSums = 16;
// The sums of the elements of each of 16 vectors, in the order of across_index.
FASTNN_INLINE void add_across(const VecF32 (&s)[16], float* to) {
  auto halves = [](__m512 a, __m512 b) __attribute__((always_inline)) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  __m512 quad[4];  // a quarter of each holds what is left of one vector
#pragma GCC unroll 4
  for (int v = 0; v < 4; v++)
    quad[v] = halves(halves(s[4 * v].r, s[4 * v + 1].r), halves(s[4 * v + 2].r, s[4 * v + 3].r));
  auto pairs = [](__m512 a, __m512 b) __attribute__((always_inline)) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  };
  const __m512d t = _mm512_castps_pd(pairs(quad[0], quad[1]));
  const __m512d u = _mm512_castps_pd(pairs(quad[2], quad[3]));
  _mm512_storeu_ps(to, _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(t, u)),
                                     _mm512_castpd_ps(_mm512_unpackhi_pd(t, u))));
}
#else
constexpr int kSums = 8;  // as the registers are fewer
#endif
template <class V, class T, int N>
FASTNN_INLINE void add_across(const V (&s)[N], T* to) {
#pragma GCC unroll 16
  for (int f = 0; f < N; f++) to[f] = reduce_add(s[N == 16 ? across_index(f) : f]);
}

// scores[row][key] = the product of ROWS queries, of numbers, with keys.
template <class Src, int ROWS>
static void score_rows(const DecodeBlock& b) {
  using V = typename Wider<Src>::V;
  using T = typename V::T;
  constexpr int W = V::width, KEYS = kSums / ROWS;
  const auto* q = static_cast<const T*>(b.rows);
  auto* scores = static_cast<T*>(b.scores);
  const int64_t ahead = elements_ahead(b.from_row, sizeof(Src));
  for (int64_t j = 0; j < b.keys; j += KEYS) {
    const Src* key[KEYS];
#pragma GCC unroll 16
    for (int i = 0; i < KEYS; i++)
      key[i] = reinterpret_cast<const Src*>(b.from) + least(j + i, b.keys - 1) * b.from_row;
    V sum[ROWS * KEYS];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS * KEYS; i++) sum[i] = V::zero();
    auto step = [&](auto load_q, auto load_k) __attribute__((always_inline)) {
      V x[ROWS];
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) x[r] = load_q(r);
#pragma GCC unroll 16
      for (int i = 0; i < KEYS; i++) {
        const V k = load_k(key[i]);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
          const int f = r * KEYS + i;
          V& s = sum[kSums == 16 ? across_index(f) : f];
          s = fma(x[r], k, s);
        }
      }
    };
    int64_t e = 0;
    for (; e + W <= b.n; e += W) {
#pragma GCC unroll 16
      for (int i = 0; i < KEYS; i++) __builtin_prefetch(key[i] + ahead + e);
      step([&](int r) __attribute__((always_inline)) { return V::load(q + r * b.n + e); },
           [&](const Src* k) __attribute__((always_inline)) { return V::load(k + e); });
    }
    if (const int left = int(b.n - e))
      step([&](int r)
               __attribute__((always_inline)) { return V::load_partial(q + r * b.n + e, left); },
           [&](const Src* k)
               __attribute__((always_inline)) { return V::load_partial(k + e, left); });
    T sums[ROWS * KEYS];
    add_across(sum, sums);
    if (j + KEYS <= b.keys) {
      for (int r = 0; r < ROWS; r++)
        __builtin_memcpy(scores + r * b.scores_row + j, sums + r * KEYS, KEYS * sizeof(T));
    } else {
      for (int r = 0; r < ROWS; r++)
        for (int64_t i = j; i < b.keys; i++) scores[r * b.scores_row + i] = sums[r * KEYS + i - j];
    }
  }
}

template <int N>
struct Vectors {
  static constexpr int value = N;
};

// rows[row] += the sum over keys of scores[row][key] times their values.
template <class Src, int ROWS>
static void weigh_rows(const DecodeBlock& b) {
  using V = typename Wider<Src>::V;
  using T = typename V::T;
  constexpr int W = V::width, NV = kSums / ROWS;
  // Of rows longer than the registers serve, so many at a time, which stay in L1.
  constexpr int64_t kRows = 32;
  auto* to = static_cast<T*>(b.rows);
  const auto* scores = static_cast<const T*>(b.scores);
  const int64_t ahead = elements_ahead(b.from_row, sizeof(Src));
  auto strip = [&](int64_t j0, int64_t j1, int64_t e, auto vectors,
                   int last) __attribute__((always_inline)) {
    constexpr int N = decltype(vectors)::value;
    V sum[ROWS][N];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
      for (int v = 0; v < N; v++) sum[r][v] = V::zero();
    const Src* from = reinterpret_cast<const Src*>(b.from) + j0 * b.from_row + e;
    for (int64_t j = j0; j < j1; j++, from += b.from_row) {
      V x[N];
#pragma GCC unroll 16
      for (int v = 0; v < N; v++) {
        x[v] = N > 1 || last == W ? V::load(from + v * W) : V::load_partial(from, last);
        __builtin_prefetch(from + ahead + v * W);
      }
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        const V p = V::set1(scores[r * b.scores_row + j]);
#pragma GCC unroll 16
        for (int v = 0; v < N; v++) sum[r][v] = fma(p, x[v], sum[r][v]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
      for (int v = 0; v < N; v++) {
        T* p = to + r * b.n + e + v * W;
        const int n = N > 1 ? W : last;
        (V::load_partial(p, n) + sum[r][v]).store_partial(p, n);
      }
  };
  const int64_t rows = b.n > NV * W ? kRows : b.keys;
  for (int64_t j = 0; j < b.keys; j += rows) {
    const int64_t end = least(b.keys, j + rows);
    int64_t e = 0;
    for (; e + NV * W <= b.n; e += NV * W) strip(j, end, e, Vectors<NV>(), W);
    for (; e < b.n; e += W) strip(j, end, e, Vectors<1>(), int(least(W, b.n - e)));
  }
}

template <class Src>
static void score_keys(const DecodeBlock& b) {
  switch (b.count) {
    case 1:
      return score_rows<Src, 1>(b);
    case 2:
      return score_rows<Src, 2>(b);
    default:
      return score_rows<Src, 4>(b);
  }
}
template <class Src>
static void weigh_values(const DecodeBlock& b) {
  switch (b.count) {
    case 1:
      return weigh_rows<Src, 1>(b);
    case 2:
      return weigh_rows<Src, 2>(b);
    default:
      return weigh_rows<Src, 4>(b);
  }
}

// The scores of one query to exponentials.
template <class V>
static void soften_row(void* scores_, const void* bias_, int64_t keys, double scale_, void* max_,
                       void* sum_) {
  using T = typename V::T;
  constexpr int W = V::width;
  constexpr T infinity = T(__builtin_inf());
  auto* scores = static_cast<T*>(scores_);
  const auto* bias = static_cast<const T*>(bias_);
  const V scale = V::set1(T(scale_)), none = V::set1(-infinity);
  V largest = none;
  for (int64_t j = 0; j < keys; j += W) {
    const int n = int(least(W, keys - j));
    V x = V::load_partial(scores + j, n) * scale;
    if (bias) x = x + V::load_partial(bias + j, n);
    x.store_partial(scores + j, n);
    if (n < W) {  // lanes behind the last are no scores
      T lanes[W];
      none.store(lanes);
      x.store_partial(lanes, n);
      x = V::load(lanes);
    }
    largest = max(largest, x);
  }
  T lanes[W], most = -infinity;
  largest.store(lanes);
  // A NaN may be lost here; its exponential is not.
  for (int l = 0; l < W; l++) most = lanes[l] > most ? lanes[l] : most;
  const V less = V::set1(most == -infinity ? T(0) : -most);
  V sum = V::zero();
  T rest = 0;
  for (int64_t j = 0; j < keys; j += W) {
    const int n = int(least(W, keys - j));
    const V p = exp_below(V::load_partial(scores + j, n) + less);
    p.store_partial(scores + j, n);
    if (n == W)
      sum = sum + p;
    else
      for (int l = 0; l < n; l++) rest += scores[j + l];
  }
  *static_cast<T*>(max_) = most;
  *static_cast<T*>(sum_) = reduce_add(sum) + rest;
}

// As make_bias, of one query.
template <class V>
static void row_bias(const BiasBlock& b) {
  using T = typename V::T;
  T* const to = static_cast<T*>(b.bias);
  const T first = *static_cast<const T*>(b.distance);
  const T slope = b.slope ? *static_cast<const T*>(b.slope) : T(0);
  for (int64_t j = 0; j < b.keys; j++) {
    T x = b.mask ? mask_element<T>(b.mask[0], j * b.mask_step, b.mask_type) : T(0);
    const T distance = first + T(j), from = distance - T(b.shift);
    x -= slope * (from < 0 ? -from : from);
    if (b.bounded && (distance < T(b.low) || distance > T(b.high))) x = -T(__builtin_inf());
    to[j] = x;
  }
}

static const DecodeKernels decode_table = {
    {score_keys<float>, score_keys<double>, score_keys<bf16>, score_keys<f16>},
    {weigh_values<float>, weigh_values<double>, weigh_values<bf16>, weigh_values<f16>},
    {soften_row<VecF32>, soften_row<VecF64>},
    {row_bias<VecF32>, row_bias<VecF64>},
};

static const AttentionKernels attention_table = {
    {probabilities<VecF32>, probabilities<VecF64>},
    {gradients<VecF32>, gradients<VecF64>},
    {make_bias<VecF32>, make_bias<VecF64>},
    {drop<VecF32>, drop<VecF64>},
    {multiply<VecF32>, multiply<VecF64>},
    {scale_columns<VecF32>, scale_columns<VecF64>},
    pair_keys,
    {{copy_rows<float, float>, nullptr, copy_rows<float, bf16>, copy_rows<float, f16>},
     {nullptr, copy_rows<double, double>},
     {copy_rows<bf16, float>, nullptr, copy_halves<bf16>},
     {copy_rows<f16, float>, nullptr, nullptr, copy_halves<f16>}},
    pair_rows,
    {row_dots<float>, row_dots<double>, row_dots<bf16>, row_dots<f16>},
    &decode_table,
};

}  // namespace fastnn::FASTNN_TARGET
