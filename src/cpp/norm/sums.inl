// Sums over each channel of a block: its statistics, and those of its gradient. Included by
// batch_norm.inl.
namespace fastnn::FASTNN_TARGET {

// Statistics are sums of deviations from a value near the mean: squares of the elements themselves
// would cancel where the mean is far from 0. That value is the mean of an eighth of the block: even
// if that part is unlike the rest, its distance from the block's mean squared is at most eight
// times the block's variance, so that little can cancel. Where it is small beside the elements it
// is taken for 0: nothing cancels then, and subtracting it would round each of them, which shows in
// a mean that is near 0 itself.
constexpr int64_t kPilot = 8;
template <class V>
static FASTNN_INLINE V pilot(V sum, V size, V share) {
  return select(lt(abs(sum) + abs(sum), size), V::zero(), sum * share);
}

// Chan, Golub and LeVeque (1983): two sets of elements, each with its mean and sum of squared
// deviations, become one. Of numbers, or of vectors of them.
template <class N>
struct Merge {
  N part, share, weight;
  // `from` turns a number into an N.
  template <class From>
  FASTNN_INLINE Merge(double before, double count, From from)
      : part(from(1 / count)),
        share(from(count / (before + count))),
        weight(from(before * (count / (before + count)))) {}
  // The second is given by the sums of its deviations from `shift` and of their squares.
  FASTNN_INLINE void operator()(N sum, N sum_squares, N shift, N& mean, N& squares) const {
    const N off = sum * part, delta = shift + off - mean;
    mean = mean + delta * share;
    squares = squares + (sum_squares - sum * off + delta * delta * weight);
  }
};

// A row is added up in four chains, in float32, and these are in float64: terms of both signs may
// leave little of what they were. `positive` second terms do not.
template <class T, bool dense>
struct Plane {
  using V = typename ComputeIn<T>::V;
  using S = typename V::T;
  static constexpr int64_t kFetch = 256;  // elements

  struct Sums {
    Wide<V> first[NormBlock::kMostChannels], second[NormBlock::kMostChannels];
  };
  // Of the channels [begin, end). f(row, channel) gives what to do for each vector:
  // g(element, lanes, &first, &second).
  template <bool positive, class F>
  static FASTNN_INLINE void add_up(int64_t rows, int64_t begin, int64_t end, int64_t n, Sums& sums,
                                   F f) {
    for (int64_t c = begin; c < end; c++) sums.first[c] = sums.second[c] = Wide<V>::zero();
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = begin; c < end; c++) {
        V s[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
        V q[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
        auto g = f(r, c);
        for_each_vector<V>(n, [&](int k, int64_t i, int lanes)
                                  __attribute__((always_inline)) { g(i, lanes, s[k], q[k]); });
        for (int k = 0; k < 4; k++) sums.first[c].add(s[k]);
        if constexpr (positive) {
          sums.second[c].add((q[0] + q[1]) + (q[2] + q[3]));
        } else {
          for (int k = 0; k < 4; k++) sums.second[c].add(q[k]);
        }
      }
  }
  static void stats(const NormBlock& b, int64_t before, double* mean, double* squares) {
    const int64_t stride = b.inner[0];
    const int64_t pilot_rows = (b.rows + kPilot - 1) / kPilot;
    const int64_t pilot_n = b.rows > 1 ? b.n : (b.n + kPilot - 1) / kPilot;
    const V in_tail = ones<V>(int(b.n % V::width));
    Sums sums;
    S center[NormBlock::kMostChannels];
    // One row is read in order: a channel's pilot, then all of it.
    const int64_t step = b.rows == 1 ? 1 : b.channels;
    for (int64_t begin = 0; begin < b.channels; begin += step) {
      const int64_t end = begin + step;
      add_up<true>(pilot_rows, begin, end, pilot_n, sums,
                   [&](int64_t r, int64_t c) __attribute__((always_inline)) {
                     return [=, row = row_of<T>(b, 0, r, c)](int64_t i, int lanes, V& s, V& q)
                                __attribute__((always_inline)) {
                                  const V v = load_at<dense, V>(row, stride, i, lanes);
                                  s = s + v;
                                  q = q + abs(v);
                                };
                   });
      for (int64_t c = begin; c < end; c++) {
        S one[V::width];
        pilot(V::set1(S(sums.first[c].total())), V::set1(S(sums.second[c].total())),
              V::set1(S(1) / S(pilot_rows * pilot_n)))
            .store(one);
        center[c] = one[0];
      }
      add_up<true>(
          b.rows, begin, end, b.n, sums, [&](int64_t r, int64_t c) __attribute__((always_inline)) {
            const V whole = V::set1(center[c]), tail = whole * in_tail;
            return [=, row = row_of<T>(b, 0, r, c)](int64_t i, int lanes, V& s, V& q)
                       __attribute__((always_inline)) {
                         const V d = load_and_fetch<dense, V, 3>(row, stride, i, lanes, kFetch) -
                                     (lanes == V::width ? whole : tail);
                         s = s + d;
                         q = fma(d, d, q);
                       };
          });
    }
    const Merge<double> merge(double(before), double(b.rows * b.n), [](double x) { return x; });
    for (int64_t c = 0; c < b.channels; c++)
      merge(sums.first[c].total(), sums.second[c].total(), double(center[c]), mean[c], squares[c]);
  }

  template <bool relu>
  static FASTNN_INLINE void reduce_as(const NormBlock& b, const void* centers, double* sum_grad,
                                      double* sum_grad_x) {
    Sums sums;
    add_up<false>(
        b.rows, 0, b.channels, b.n, sums, [&](int64_t r, int64_t c) __attribute__((always_inline)) {
          const V center = V::set1(static_cast<const S*>(centers)[c]);
          const int64_t grad_stride = b.inner[0], x_stride = b.inner[1], out_stride = b.inner[2];
          return [=, grad = row_of<T>(b, 0, r, c), x = row_of<T>(b, 1, r, c),
                  out = row_of<T>(b, 2, r, c)](int64_t i, int lanes, V& s,
                                               V& q) __attribute__((always_inline)) {
            V g = load_and_fetch<dense, V, 3>(grad, grad_stride, i, lanes, kFetch);
            if constexpr (relu)
              g = select(
                  le(load_and_fetch<dense, V, 3>(out, out_stride, i, lanes, kFetch), V::zero()),
                  V::zero(), g);
            s = s + g;
            // Past the end g is 0; x - center is not, and must be finite for that.
            q = fma(g, load_and_fetch<dense, V, 3>(x, x_stride, i, lanes, kFetch) - center, q);
          };
        });
    for (int64_t c = 0; c < b.channels; c++) {
      sum_grad[c] += sums.first[c].total();
      sum_grad_x[c] += sums.second[c].total();
    }
  }
  static void reduce(const NormBlock& b, const void* centers, bool relu, double* sum_grad,
                     double* sum_grad_x) {
    relu ? reduce_as<true>(b, centers, sum_grad, sum_grad_x)
         : reduce_as<false>(b, centers, sum_grad, sum_grad_x);
  }
};

// A lane adds up one channel, and no other lanes average its rounding out: chains are short. A
// stretch of kChain rows is gone over four vectors a time, so that the memory it lies in is read
// once, in order; the next stretch is fetched meanwhile.
template <class T, bool dense>
struct Across {
  using V = typename ComputeIn<T>::V;
  using S = typename V::T;
  static constexpr int w = V::width;
  static constexpr int64_t kChain = 16;
  static constexpr int64_t kVectors = 256 / w;  // of the channels whose sums are kept at a time

  struct Sums {
    V first[kVectors], second[kVectors];
  };
  // f(row, vector, lanes, &first, &second) for each vector of `n` channels in each of `rows`.
  template <class F>
  static FASTNN_INLINE void add_up(int64_t rows, int64_t n, Sums& sums, F f) {
    for (int64_t v = 0; v * w < n; v++) sums.first[v] = sums.second[v] = V::zero();
    for (int64_t begin = 0; begin < rows; begin += kChain) {
      const int64_t end = begin + kChain < rows ? begin + kChain : rows;
      auto chains = [&]<int vectors>(int64_t first, int lanes) __attribute__((always_inline)) {
        V s[vectors], q[vectors];
        for (int v = 0; v < vectors; v++) s[v] = q[v] = V::zero();
        for (int64_t r = begin; r < end; r++)
          for (int v = 0; v < vectors; v++) f(r, first + v, lanes, s[v], q[v]);
        for (int v = 0; v < vectors; v++) {
          sums.first[first + v] = sums.first[first + v] + s[v];
          sums.second[first + v] = sums.second[first + v] + q[v];
        }
      };
      int64_t v = 0;
      for (; (v + 4) * w <= n; v += 4) chains.template operator()<4>(v, w);
      for (; (v + 1) * w <= n; v++) chains.template operator()<1>(v, w);
      if (v * w < n) chains.template operator()<1>(v, int(n - v * w));
    }
  }
  // f(first channel, lanes, halves of the vectors in float64...) for what a vector is in float64.
  template <class F>
  static FASTNN_INLINE void widened(VecF32 a, VecF32 b, VecF32 c, int lanes, F f) {
    constexpr int half = VecF64::width;
    f(0, lanes < half ? lanes : half, widen_low(a), widen_low(b), widen_low(c));
    if (lanes > half) f(half, lanes - half, widen_high(a), widen_high(b), widen_high(c));
  }
  template <class F>
  static FASTNN_INLINE void widened(VecF64 a, VecF64 b, VecF64 c, int lanes, F f) {
    f(0, lanes, a, b, c);
  }

  static void stats(const NormBlock& b, int64_t before, double* mean, double* squares) {
    const int64_t inner = b.inner[0], row = b.row[0];
    const int64_t pilot_rows = (b.rows + kPilot - 1) / kPilot;
    const Merge<VecF64> merge(double(before), double(b.rows), VecF64::set1);
    Sums sums;
    V center[kVectors];
    for (int64_t first = 0; first < b.n; first += kVectors * w) {
      const int64_t n = b.n - first < kVectors * w ? b.n - first : kVectors * w;
      const T* x = reinterpret_cast<const T*>(b.at[0]) + first * inner;
      add_up(pilot_rows, n, sums,
             [&](int64_t r, int64_t v, int lanes, V& s, V& q) __attribute__((always_inline)) {
               const V e =
                   load_and_fetch<dense, V, 2>(x + r * row, inner, v * w, lanes, kChain * row);
               s = s + e;
               q = q + abs(e);
             });
      for (int64_t v = 0; v * w < n; v++)
        center[v] = pilot(sums.first[v], sums.second[v], V::set1(S(1) / S(pilot_rows)));
      add_up(b.rows, n, sums,
             [&](int64_t r, int64_t v, int lanes, V& s, V& q) __attribute__((always_inline)) {
               const V d =
                   load_and_fetch<dense, V, 2>(x + r * row, inner, v * w, lanes, kChain * row) -
                   center[v];
               s = s + d;
               q = fma(d, d, q);
             });
      for (int64_t v = 0; v * w < n; v++)
        widened(sums.first[v], sums.second[v], center[v], int(n - v * w < w ? n - v * w : w),
                [&](int at, int lanes, VecF64 sum, VecF64 square, VecF64 shift)
                    __attribute__((always_inline)) {
                      double *m = mean + first + v * w + at, *q = squares + first + v * w + at;
                      VecF64 to_mean = VecF64::load_partial(m, lanes);
                      VecF64 to_squares = VecF64::load_partial(q, lanes);
                      merge(sum, square, shift, to_mean, to_squares);
                      to_mean.store_partial(m, lanes);
                      to_squares.store_partial(q, lanes);
                    });
    }
  }

  template <bool relu>
  static FASTNN_INLINE void reduce_as(const NormBlock& b, const void* centers, double* sum_grad,
                                      double* sum_grad_x) {
    Sums sums;
    V center[kVectors];
    for (int64_t first = 0; first < b.n; first += kVectors * w) {
      const int64_t n = b.n - first < kVectors * w ? b.n - first : kVectors * w;
      const T* grad = reinterpret_cast<const T*>(b.at[0]) + first * b.inner[0];
      const T* x = reinterpret_cast<const T*>(b.at[1]) + first * b.inner[1];
      const T* out = reinterpret_cast<const T*>(b.at[2]) + first * b.inner[2];
      for (int64_t v = 0; v * w < n; v++)
        center[v] = load_at<true, V>(static_cast<const S*>(centers) + first, 1, v * w,
                                     int(n - v * w < w ? n - v * w : w));
      add_up(b.rows, n, sums,
             [&](int64_t r, int64_t v, int lanes, V& s, V& q) __attribute__((always_inline)) {
               V g = load_and_fetch<dense, V, 2>(grad + r * b.row[0], b.inner[0], v * w, lanes,
                                                 kChain * b.row[0]);
               if constexpr (relu)
                 g = select(le(load_and_fetch<dense, V, 2>(out + r * b.row[2], b.inner[2], v * w,
                                                           lanes, kChain * b.row[2]),
                               V::zero()),
                            V::zero(), g);
               s = s + g;
               q = fma(g,
                       load_and_fetch<dense, V, 2>(x + r * b.row[1], b.inner[1], v * w, lanes,
                                                   kChain * b.row[1]) -
                           center[v],
                       q);
             });
      for (int64_t v = 0; v * w < n; v++)
        widened(sums.first[v], sums.second[v], V::zero(), int(n - v * w < w ? n - v * w : w),
                [&](int at, int lanes, VecF64 sum, VecF64 product, VecF64)
                    __attribute__((always_inline)) {
                      double* s = sum_grad + first + v * w + at;
                      double* q = sum_grad_x + first + v * w + at;
                      (VecF64::load_partial(s, lanes) + sum).store_partial(s, lanes);
                      (VecF64::load_partial(q, lanes) + product).store_partial(q, lanes);
                    });
    }
  }
  static void reduce(const NormBlock& b, const void* centers, bool relu, double* sum_grad,
                     double* sum_grad_x) {
    relu ? reduce_as<true>(b, centers, sum_grad, sum_grad_x)
         : reduce_as<false>(b, centers, sum_grad, sum_grad_x);
  }
};

// What the chunks have found, chunk by chunk, for n channels that lie together.
static void combine(int64_t chunks, const double* counts, const double* means,
                    const double* squares, int64_t stride, int64_t n, double* mean,
                    double* square) {
  for (int64_t i = 0; i < n; i += VecF64::width) {
    const int lanes = n - i < VecF64::width ? int(n - i) : VecF64::width;
    VecF64 m = VecF64::zero(), q = VecF64::zero();
    double before = 0;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const double share = counts[chunk] / (before + counts[chunk]);
      const VecF64 delta = VecF64::load_partial(means + chunk * stride + i, lanes) - m;
      m = m + delta * VecF64::set1(share);
      q = q + (VecF64::load_partial(squares + chunk * stride + i, lanes) +
               delta * delta * VecF64::set1(before * share));
      before += counts[chunk];
    }
    m.store_partial(mean + i, lanes);
    q.store_partial(square + i, lanes);
  }
}

}  // namespace fastnn::FASTNN_TARGET
