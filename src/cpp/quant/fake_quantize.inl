// The kernels of fake quantization of one instruction set. Included once by each file in kernels/,
// which defines FASTNN_TARGET; see isa/vec.hpp for why nothing here may be shared between targets.
#include "isa/bits.hpp"
#include "isa/philox.hpp"
#include "isa/rounding.hpp"
#include "isa/stream.hpp"
#include "quant/fake_quantize.hpp"

namespace fastnn::FASTNN_TARGET {

template <class T>
struct FakeLanes {
  using V = VecF32;
};
template <>
struct FakeLanes<double> {
  using V = VecF64;
};

// What is not a plain run of one scale goes through L1, so many elements at a time.
constexpr int64_t kFakeBlock = 512;
// Where each element of a row has a scale of its own, so many of them are kept for the next row.
constexpr int64_t kFakeLevels = 4096;

static FASTNN_INLINE VecF64 floor(VecF64 a) {
  const VecF64 near = round(a);
  return near - select(lt(a, near), VecF64::set1(1), VecF64::zero());
}

// Products of float64 as float32 has them.
static FASTNN_INLINE VecF32 as_float32(VecF32 a) { return a; }
#if FASTNN_TARGET_ID == 2
static FASTNN_INLINE VecF64 as_float32(VecF64 a) { return {_mm512_cvtps_pd(_mm512_cvtpd_ps(a.r))}; }
#elif FASTNN_TARGET_ID == 1
static FASTNN_INLINE VecF64 as_float32(VecF64 a) { return {_mm256_cvtps_pd(_mm256_cvtpd_ps(a.r))}; }
#else
// Of conversions lane by lane, there and back, GCC 12 makes none at all.
static FASTNN_INLINE VecF64 as_float32(VecF64 a) {
  typedef float Narrow __attribute__((vector_size(VecF64::width * sizeof(float))));
  return {__builtin_convertvector(__builtin_convertvector(a.r, Narrow), VecF64::Lanes)};
}
#endif

// One scale: its inverse, and the range with the zero point taken away.
struct Level {
  float inverse, scale, low, high;
};

// The zero point that is added to integers.
static FASTNN_INLINE float zero_at(const FakeRows& rows, const FakeGrid& grid, int64_t at) {
  if (grid.zero_kind == ZeroPoint::none) return 0;
  if (grid.zero_kind == ZeroPoint::integers)
    return float(static_cast<const int32_t*>(rows.zero_point)[at]);
  const float zero = __builtin_nearbyintf(static_cast<const float*>(rows.zero_point)[at]);
  return zero < grid.lowest ? grid.lowest : zero > grid.highest ? grid.highest : zero;
}

// What is wrong with a scale, which has to be positive, normal and finite, and with a zero point.
// Comparisons with NaN are false.
static FASTNN_INLINE int bad_level(float scale, float zero, const FakeGrid& grid) {
  const bool good_scale = (scale >= 0x1p-126f) & (scale <= 0x1.fffffep127f);
  const bool good_zero = (zero >= grid.lowest) & (zero <= grid.highest);
  return (good_scale ? 0 : int(BadGrid::scale)) | (good_zero ? 0 : int(BadGrid::zero_point));
}

static FASTNN_INLINE Level level_at(const FakeRows& rows, const FakeGrid& grid, int64_t at,
                                    int& bad) {
  const float scale = rows.scale[at], zero = zero_at(rows, grid, at);
  bad |= bad_level(scale, zero, grid);
  return {1.0f / scale, scale, grid.lowest - zero, grid.highest - zero};
}

// The same for vectors: one level for all lanes, or one each.
template <class V>
struct Levels {
  V inverse, scale, low, high;
};

template <class V>
struct OneLevel {
  Levels<V> all;
  FASTNN_INLINE explicit OneLevel(Level l)
      : all{V::set1(l.inverse), V::set1(l.scale), V::set1(l.low), V::set1(l.high)} {}
  FASTNN_INLINE Levels<V> operator()(int64_t) const { return all; }
};

template <class V>
struct LevelTable {
  using C = typename V::T;
  // Whole vectors are read: what lies beyond the last level is not used.
  C inverse[kFakeLevels + V::width], scale[kFakeLevels + V::width];
  C low[kFakeLevels + V::width], high[kFakeLevels + V::width];

  // The loop over what has been gathered is one of vectors.
  void fill(const FakeRows& rows, const FakeGrid& grid, int64_t at, int64_t n, int& bad) {
    const float lowest = grid.lowest, highest = grid.highest;
    float s[kFakeBlock], z[kFakeBlock];
    for (int64_t begin = 0; begin < n; begin += kFakeBlock) {
      const int64_t count = n - begin < kFakeBlock ? n - begin : kFakeBlock;
      const int64_t from = at + begin * rows.scale_stride;
      for (int64_t i = 0; i < count; i++) s[i] = rows.scale[from + i * rows.scale_stride];
      for (int64_t i = 0; i < count; i++) z[i] = zero_at(rows, grid, from + i * rows.scale_stride);
      int found = 0;
      for (int64_t i = 0; i < count; i++) found |= bad_level(s[i], z[i], grid);
      bad |= found;
      for (int64_t i = 0; i < count; i++) {
        inverse[begin + i] = 1.0f / s[i];
        scale[begin + i] = s[i];
        low[begin + i] = lowest - z[i];
        high[begin + i] = highest - z[i];
      }
    }
    for (int64_t i = n; i < n + V::width; i++) inverse[i] = scale[i] = low[i] = high[i] = 0;
  }
};

template <class V>
struct OwnLevels {
  const LevelTable<V>& table;
  int64_t first;
  FASTNN_INLINE Levels<V> operator()(int64_t i) const {
    i += first;
    return {V::load(table.inverse + i), V::load(table.scale + i), V::load(table.low + i),
            V::load(table.high + i)};
  }
};

// Numbers from 0 to 1 - 2^-24 that decide which way is rounded; for half to even there are none.
template <class V>
struct Fractions {
  using C = typename V::T;
  C value[kFakeBlock + V::width];

  void fill(uint64_t seed, uint64_t first, int64_t n) {
    uint32_t words[kFakeBlock];
    philox_words(seed, first, n, words);
    for (int64_t i = 0; i < n; i++) value[i] = C(int32_t(words[i] >> 8)) * C(0x1p-24);
    for (int64_t i = n; i < n + V::width; i++) value[i] = 0;
  }
};

template <bool random, class V>
static FASTNN_INLINE V rounded(V y, const typename V::T* fractions) {
  if constexpr (random) {
    const V below = floor(y);
    const V up = select(lt(V::load(fractions), y - below), V::set1(1), V::zero());
    return below + up;
  } else {
    return round(y);
  }
}

// NaN is put where of_nan is, or at the low end if that is NaN, too.
template <class V>
static FASTNN_INLINE V clamped(V r, const Levels<V>& l, V of_nan) {
  return min(max(select(is_nan(r), of_nan, r), l.low), l.high);
}

template <class V>
static FASTNN_INLINE V nan_of(const FakeGrid& grid) {
  return grid.as_torch ? V::set1(typename V::T(__builtin_nanf(""))) : V::zero();
}

static FASTNN_INLINE uint32_t lowest_bits(int n) { return 0xffffffffu >> (32 - n); }

template <class T, class V, bool masked, bool random, class LevelsAt>
static FASTNN_INLINE void forward_run(const T* x, T* out, int64_t n, LevelsAt levels,
                                      const typename V::T* fractions, V of_nan, bool narrow,
                                      bool around_caches, BitWriter& bits) {
  fill<T, V>(out, n, around_caches, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    const Levels<V> l = levels(i);
    const V value = lanes == V::width ? V::load(x + i) : V::load_partial(x + i, lanes);
    const V r = rounded<random>(value * l.inverse, fractions + i);
    const V d = clamped(r, l, of_nan);
    if constexpr (masked) bits.put(bits_of(eq(d, r)) & lowest_bits(lanes), lanes);
    // Adding 0 makes +0 of -0, as the way over integers does.
    const V result = (d + V::zero()) * l.scale;
    return narrow ? as_float32(result) : result;
  });
}

// A strided run through L1: `from` where it lies densely.
template <class T>
static FASTNN_INLINE const T* gathered(const T* x, int64_t stride, int64_t n, T* memory) {
  if (stride == 1) return x;
  for (int64_t i = 0; i < n; i++) memory[i] = x[i * stride];
  return memory;
}
template <class T>
static FASTNN_INLINE void scatter(const T* from, T* out, int64_t stride, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i * stride] = from[i];
}

template <class T, bool masked, bool random>
static int forward_rows(const FakeRows& rows, const FakeGrid& grid, uint8_t* mask,
                        bool around_caches) {
  using V = typename FakeLanes<T>::V;
  const bool own = rows.scale_stride != 0;
  const bool dense = rows.x_stride == 1 && rows.out_stride == 1;
  const int64_t block = dense && !own && !random ? rows.n : kFakeBlock;
  const bool stream = around_caches && rows.out_stride == 1;
  // A table serves all rows where it holds all levels.
  const bool same = own && rows.scale_row == 0 && rows.n <= kFakeLevels;
  const V of_nan = nan_of<V>(grid);
  LevelTable<V> table;
  Fractions<V> fractions;
  T in[kFakeBlock], result[kFakeBlock];
  uint8_t none;
  BitWriter bits(masked ? mask : &none, masked ? rows.first : 0);
  int bad = 0;
  if (same) table.fill(rows, grid, 0, rows.n, bad);
  for (int64_t row = 0; row < rows.rows; row++) {
    const T* x = static_cast<const T*>(rows.x) + row * rows.x_row;
    T* out = static_cast<T*>(rows.out) + row * rows.out_row;
    const int64_t at = row * rows.scale_row;
    const Level level = own ? Level{} : level_at(rows, grid, at, bad);
    for (int64_t i = 0; i < rows.n; i += block) {
      const int64_t n = rows.n - i < block ? rows.n - i : block;
      if (own && !same) table.fill(rows, grid, at + i * rows.scale_stride, n, bad);
      if (random) fractions.fill(*grid.seed, rows.first + uint64_t(row * rows.n + i), n);
      const T* from = gathered(x + i * rows.x_stride, rows.x_stride, n, in);
      T* to = rows.out_stride == 1 ? out + i : result;
      if (own)
        forward_run<T, V, masked, random>(from, to, n, OwnLevels<V>{table, same ? i : 0},
                                          fractions.value, of_nan, !grid.wide, stream, bits);
      else
        forward_run<T, V, masked, random>(from, to, n, OneLevel<V>(level), fractions.value, of_nan,
                                          !grid.wide, stream, bits);
      if (to == result) scatter(result, out + i * rows.out_stride, rows.out_stride, n);
    }
  }
  if (masked) bits.finish();
  if (stream) end_stream();
  return bad;
}

template <class T>
static BadGrid forward(const FakeRows& rows, const FakeGrid& grid, uint8_t* mask,
                       bool around_caches) {
  const int bad =
      mask ? (grid.seed ? forward_rows<T, true, true>(rows, grid, mask, around_caches)
                        : forward_rows<T, true, false>(rows, grid, mask, around_caches))
           : (grid.seed ? forward_rows<T, false, true>(rows, grid, mask, around_caches)
                        : forward_rows<T, false, false>(rows, grid, mask, around_caches));
  if (grid.as_torch) return BadGrid::none;
  return bad & int(BadGrid::scale) ? BadGrid::scale : BadGrid(bad);
}

// A product with 1 or 0 and not a choice: what is outside of an infinity or a NaN is NaN, and zeros
// keep their sign, as in torch.
template <class T, class V>
static FASTNN_INLINE void masked_run(const T* grad, T* out, int64_t n, const uint8_t* mask,
                                     uint64_t first, bool around_caches) {
  const V one = V::set1(1);
  fill<T, V>(out, n, around_caches, [=](int64_t i, int lanes) __attribute__((always_inline)) {
    const V g = lanes == V::width ? V::load(grad + i) : V::load_partial(grad + i, lanes);
    return g * select(mask_of(bits_at(mask, first + uint64_t(i)), V()), one, V::zero());
  });
}

template <class T>
static void masked_rows(const FakeRows& rows, const uint8_t* mask, bool around_caches) {
  using V = typename FakeLanes<T>::V;
  T in[kFakeBlock], result[kFakeBlock];
  const bool dense = rows.grad_stride == 1 && rows.out_stride == 1;
  const int64_t block = dense ? rows.n : kFakeBlock;
  const bool stream = around_caches && rows.out_stride == 1;
  for (int64_t row = 0; row < rows.rows; row++) {
    const T* grad = static_cast<const T*>(rows.grad) + row * rows.grad_row;
    T* out = static_cast<T*>(rows.out) + row * rows.out_row;
    for (int64_t i = 0; i < rows.n; i += block) {
      const int64_t n = rows.n - i < block ? rows.n - i : block;
      const T* from = gathered(grad + i * rows.grad_stride, rows.grad_stride, n, in);
      T* to = rows.out_stride == 1 ? out + i : result;
      masked_run<T, V>(from, to, n, mask, rows.first + uint64_t(row * rows.n + i), stream);
      if (to == result) scatter(result, out + i * rows.out_stride, rows.out_stride, n);
    }
  }
  if (stream) end_stream();
}

// What a vector of gradients adds to the sums of ds and of dz / -s; returns dx.
template <bool random, class V>
static FASTNN_INLINE V terms(V x, V g, const Levels<V>& l, uint32_t bits,
                             const typename V::T* fractions, V& by_scale, V& by_zero) {
  const V y = x * l.inverse;
  const V r = rounded<random>(y, fractions);
  const V d = clamped(r, l, V::zero());
  const auto inside = mask_of(bits, V());
  by_scale = g * select(inside, d - y, d);
  // A NaN became the zero point, and moves with it.
  const V outside = select(either(inside, is_nan(r)), V::zero(), V::set1(1));
  by_zero = g * outside;
  return g * select(inside, V::set1(1), V::zero());
}

// The elements of one block, of one scale or of one each. `take(i, lanes, by_scale, by_zero)` gets
// the terms.
template <class T, class V, bool random, class LevelsAt, class Take>
static FASTNN_INLINE void gradient_run(const T* x, const T* grad, T* out, int64_t n,
                                       LevelsAt levels, const typename V::T* fractions,
                                       const uint8_t* mask, uint64_t first, bool around_caches,
                                       Take take) {
  fill<T, V>(out, n, around_caches, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    const bool whole = lanes == V::width;
    const V value = whole ? V::load(x + i) : V::load_partial(x + i, lanes);
    const V g = whole ? V::load(grad + i) : V::load_partial(grad + i, lanes);
    V by_scale, by_zero;
    // Where nothing was loaded the gradient is 0, and so are the terms.
    const V result = terms<random>(value, g, levels(i), bits_at(mask, first + uint64_t(i)),
                                   fractions + i, by_scale, by_zero);
    take(i, lanes, by_scale, by_zero);
    return result;
  });
}

template <class T, bool random>
static void row_gradients_of(const FakeRows& rows, const FakeGrid& grid, const uint8_t* mask,
                             bool around_caches, double* sums) {
  using V = typename FakeLanes<T>::V;
  T x_in[kFakeBlock], grad_in[kFakeBlock], result[kFakeBlock];
  Fractions<V> fractions;
  const bool stream = around_caches && rows.out_stride == 1;
  int bad = 0;
  for (int64_t row = 0; row < rows.rows; row++) {
    const T* x = static_cast<const T*>(rows.x) + row * rows.x_row;
    const T* grad = static_cast<const T*>(rows.grad) + row * rows.grad_row;
    T* out = static_cast<T*>(rows.out) + row * rows.out_row;
    const OneLevel<V> level(level_at(rows, grid, row * rows.scale_row, bad));
    double scale_sum = 0, zero_sum = 0;
    for (int64_t i = 0; i < rows.n; i += kFakeBlock) {
      const int64_t n = rows.n - i < kFakeBlock ? rows.n - i : kFakeBlock;
      const uint64_t first = rows.first + uint64_t(row * rows.n + i);
      if (random) fractions.fill(*grid.seed, first, n);
      const T* from = gathered(x + i * rows.x_stride, rows.x_stride, n, x_in);
      const T* g = gathered(grad + i * rows.grad_stride, rows.grad_stride, n, grad_in);
      T* to = rows.out_stride == 1 ? out + i : result;
      V by_scale = V::zero(), by_zero = V::zero();
      gradient_run<T, V, random>(from, g, to, n, level, fractions.value, mask, first, stream,
                                 [&](int64_t, int, V s, V z) __attribute__((always_inline)) {
                                   by_scale = by_scale + s;
                                   by_zero = by_zero + z;
                                 });
      if (to == result) scatter(result, out + i * rows.out_stride, rows.out_stride, n);
      scale_sum += reduce_add(by_scale);
      zero_sum += reduce_add(by_zero);
    }
    sums[2 * row] = scale_sum, sums[2 * row + 1] = zero_sum;
  }
  if (stream) end_stream();
}

// Blocks of columns, and all rows of each: the sums stay in L1.
template <class T, bool random>
static void column_gradients_of(const FakeRows& rows, const FakeGrid& grid, const uint8_t* mask,
                                bool around_caches, double* sums) {
  using V = typename FakeLanes<T>::V;
  using C = typename V::T;
  constexpr int64_t kFew = 64;  // rows whose terms are added up in C
  T x_in[kFakeBlock], grad_in[kFakeBlock], result[kFakeBlock];
  C by_scale[kFakeBlock], by_zero[kFakeBlock];
  Fractions<V> fractions;
  LevelTable<V> table;
  const bool stream = around_caches && rows.out_stride == 1;
  int bad = 0;
  for (int64_t column = 0; column < rows.n; column += kFakeBlock) {
    const int64_t n = rows.n - column < kFakeBlock ? rows.n - column : kFakeBlock;
    for (int64_t start = 0; start < rows.rows; start += kFew) {
      for (int64_t i = 0; i < n; i++) by_scale[i] = by_zero[i] = 0;
      for (int64_t row = start; row < rows.rows && row < start + kFew; row++) {
        const T* x = static_cast<const T*>(rows.x) + row * rows.x_row;
        const T* grad = static_cast<const T*>(rows.grad) + row * rows.grad_row;
        T* out = static_cast<T*>(rows.out) + row * rows.out_row;
        if (row == 0) table.fill(rows, grid, column * rows.scale_stride, n, bad);
        const uint64_t first = rows.first + uint64_t(row * rows.n + column);
        if (random) fractions.fill(*grid.seed, first, n);
        const T* from = gathered(x + column * rows.x_stride, rows.x_stride, n, x_in);
        const T* g = gathered(grad + column * rows.grad_stride, rows.grad_stride, n, grad_in);
        T* to = rows.out_stride == 1 ? out + column : result;
        gradient_run<T, V, random>(
            from, g, to, n, OwnLevels<V>{table, 0}, fractions.value, mask, first, stream,
            [&](int64_t i, int lanes, V s, V z) __attribute__((always_inline)) {
              if (lanes == V::width) {
                (V::load(by_scale + i) + s).store(by_scale + i);
                (V::load(by_zero + i) + z).store(by_zero + i);
              } else {
                (V::load_partial(by_scale + i, lanes) + s).store_partial(by_scale + i, lanes);
                (V::load_partial(by_zero + i, lanes) + z).store_partial(by_zero + i, lanes);
              }
            });
        if (to == result) scatter(result, out + column * rows.out_stride, rows.out_stride, n);
      }
      for (int64_t i = 0; i < n; i++) {
        sums[column + i] += by_scale[i];
        sums[rows.n + column + i] += by_zero[i];
      }
    }
  }
  if (stream) end_stream();
}

template <class T>
static void row_gradients(const FakeRows& rows, const FakeGrid& grid, const uint8_t* mask,
                          bool around_caches, double* sums) {
  if (grid.seed)
    row_gradients_of<T, true>(rows, grid, mask, around_caches, sums);
  else
    row_gradients_of<T, false>(rows, grid, mask, around_caches, sums);
}

template <class T>
static void column_gradients(const FakeRows& rows, const FakeGrid& grid, const uint8_t* mask,
                             bool around_caches, double* sums) {
  if (grid.seed)
    column_gradients_of<T, true>(rows, grid, mask, around_caches, sums);
  else
    column_gradients_of<T, false>(rows, grid, mask, around_caches, sums);
}

static const FakeQuantizeKernels table = {
    {forward<float>, forward<double>, forward<bf16>, forward<f16>},
    {masked_rows<float>, masked_rows<double>, masked_rows<bf16>, masked_rows<f16>},
    {row_gradients<float>, row_gradients<double>, row_gradients<bf16>, row_gradients<f16>},
    {column_gradients<float>, column_gradients<double>, column_gradients<bf16>,
     column_gradients<f16>},
};

}  // namespace fastnn::FASTNN_TARGET
