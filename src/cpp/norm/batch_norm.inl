// The batch norm kernels of one instruction set. Included once by each file in kernels/, which
// defines FASTNN_TARGET; see isa/vec.hpp for why nothing here may be shared between targets.
#include "isa/stream.hpp"
#include "norm/batch_norm.hpp"
#include "norm/vectors.inl"

namespace fastnn::FASTNN_TARGET {

template <class T>
static FASTNN_INLINE T* row_of(const NormBlock& b, int operand, int64_t r, int64_t c) {
  return reinterpret_cast<T*>(b.at[operand]) + r * b.row[operand] + c * b.channel[operand];
}

// The same, and asks for what is `ahead` elements on, for L1 (3) or L2 (2).
template <bool dense, class V, int cache, class T>
static FASTNN_INLINE V load_and_fetch(const T* p, int64_t stride, int64_t i, int lanes,
                                      int64_t ahead) {
  if constexpr (dense) __builtin_prefetch(p + i + ahead, 0, cache);
  return load_at<dense, V>(p, stride, i, lanes);
}
// row[i] = f(i-th vector), as fill() of isa/stream.hpp, of any stride.
template <bool dense, class V, class T, class F>
static FASTNN_INLINE void fill_row(T* row, int64_t stride, int64_t n, bool around_caches, F f) {
  if constexpr (dense) {
    fill<T, V>(row, n, around_caches, f);
  } else {
    for (int64_t i = 0; i < n; i += V::width) {
      const int lanes = n - i < V::width ? int(n - i) : V::width;
      T scattered[V::width];
      f(i, lanes).store(scattered);
      for (int j = 0; j < lanes; j++) row[(i + j) * stride] = scattered[j];
    }
  }
}

}  // namespace fastnn::FASTNN_TARGET

#include "norm/sums.inl"

namespace fastnn::FASTNN_TARGET {

// A coefficient: of a block's channel, or of the channels of the vector at i.
template <bool across, class V>
struct Coefficient {
  const typename V::T* p;
  V all;
  FASTNN_INLINE Coefficient(const void* from, int64_t c)
      : p(static_cast<const typename V::T*>(from)), all(V::set1(p[c])) {}
  FASTNN_INLINE V at(int64_t i, int lanes) const {
    if constexpr (across)
      return load_at<true, V>(p, 1, i, lanes);
    else
      return all;
  }
};

template <class T, bool dense, bool across, bool residual>
static FASTNN_INLINE void apply_as(const NormBlock& b, const void* const* coef, bool relu) {
  using V = typename ComputeIn<T>::V;
  // The second operand of max is its result where that is NaN.
  const V least = V::set1(relu ? 0 : -__builtin_inf());
  const int64_t x_stride = b.inner[0], added_stride = b.inner[1], ahead = b.ahead;
  for (int64_t r = 0; r < b.rows; r++)
    for (int64_t c = 0; c < b.channels; c++) {
      const Coefficient<across, V> center(coef[0], c), scale(coef[1], c), shift(coef[2], c);
      const T* x = row_of<T>(b, 0, r, c);
      const T* added = row_of<T>(b, 1, r, c);
      T* out = row_of<T>(b, 2, r, c);
      fill_row<dense, V>(out, b.inner[2], b.n, b.around_caches,
                         [=](int64_t i, int lanes) __attribute__((always_inline)) {
                           if constexpr (dense && !across) __builtin_prefetch(x + i + ahead, 0, 2);
                           V y = fma(load_at<dense, V>(x, x_stride, i, lanes) - center.at(i, lanes),
                                     scale.at(i, lanes), shift.at(i, lanes));
                           if constexpr (residual)
                             y = y + load_at<dense, V>(added, added_stride, i, lanes);
                           return max(least, y);
                         });
    }
}

// The gradient of what the normalization gave, before relu. Of a row.
template <class T, bool dense, bool relu>
struct OutputGradient {
  using V = typename ComputeIn<T>::V;
  const T *grad, *out;
  int64_t grad_stride, out_stride;
  FASTNN_INLINE OutputGradient(const NormBlock& b, int64_t r, int64_t c)
      : grad(row_of<T>(b, 0, r, c)),
        out(row_of<T>(b, 2, r, c)),
        grad_stride(b.inner[0]),
        out_stride(b.inner[2]) {}
  FASTNN_INLINE V operator()(int64_t i, int lanes) const {
    const V g = load_at<dense, V>(grad, grad_stride, i, lanes);
    if constexpr (relu)
      return select(le(load_at<dense, V>(out, out_stride, i, lanes), V::zero()), V::zero(), g);
    else
      return g;
  }
};

// It is that of the residual, too.
template <class T, bool dense, bool relu>
static __attribute__((noinline)) void backward_residual(const NormBlock& b, int64_t r, int64_t c) {
  const OutputGradient<T, dense, relu> gradient(b, r, c);
  fill_row<dense, typename ComputeIn<T>::V>(
      row_of<T>(b, 4, r, c), b.inner[4], b.n, b.around_caches,
      [=](int64_t i, int lanes) __attribute__((always_inline)) { return gradient(i, lanes); });
}

template <class T, bool dense, bool across, bool training, bool relu>
static FASTNN_INLINE void backward_as(const NormBlock& b, const void* const* coef, bool residual) {
  using V = typename ComputeIn<T>::V;
  const int64_t x_stride = b.inner[1], ahead = b.ahead;
  for (int64_t r = 0; r < b.rows; r++)
    for (int64_t c = 0; c < b.channels; c++) {
      const Coefficient<across, V> center(coef[0], c), by_grad(coef[1], c), by_x(coef[2], c),
          rest(coef[3], c);
      const OutputGradient<T, dense, relu> gradient(b, r, c);
      const T* x = row_of<T>(b, 1, r, c);
      if (residual) backward_residual<T, dense, relu>(b, r, c);
      fill_row<dense, V>(row_of<T>(b, 3, r, c), b.inner[3], b.n, b.around_caches,
                         [=](int64_t i, int lanes) __attribute__((always_inline)) {
                           if constexpr (dense && !across && training) {
                             __builtin_prefetch(gradient.grad + i + ahead, 0, 2);
                             __builtin_prefetch(x + i + ahead, 0, 2);
                             if constexpr (relu) __builtin_prefetch(gradient.out + i + ahead, 0, 2);
                           }
                           const V g = gradient(i, lanes);
                           if constexpr (training)
                             return fma(
                                 g, by_grad.at(i, lanes),
                                 fma(load_at<dense, V>(x, x_stride, i, lanes) - center.at(i, lanes),
                                     by_x.at(i, lanes), rest.at(i, lanes)));
                           else
                             return g * by_grad.at(i, lanes);
                         });
    }
}

template <class T, bool dense, bool across>
static void apply(const NormBlock& b, const void* const* coef, bool residual, bool relu) {
  residual ? apply_as<T, dense, across, true>(b, coef, relu)
           : apply_as<T, dense, across, false>(b, coef, relu);
}

template <class T, bool dense, bool across>
static void backward(const NormBlock& b, const void* const* coef, bool training, bool residual,
                     bool relu) {
  if (training)
    relu ? backward_as<T, dense, across, true, true>(b, coef, residual)
         : backward_as<T, dense, across, true, false>(b, coef, residual);
  else
    relu ? backward_as<T, dense, across, false, true>(b, coef, residual)
         : backward_as<T, dense, across, false, false>(b, coef, residual);
}

template <class T>
static void widen(const void* x_, int64_t stride, int64_t n, double* out) {
  const T* x = static_cast<const T*>(x_);
  for (int64_t i = 0; i < n; i++) out[i] = to_f64(x[i * stride]);
}

template <class T>
static void narrow(const double* from, int64_t n, void* to_, int64_t stride) {
  T* to = static_cast<T*>(to_);
  for (int64_t i = 0; i < n; i++) from_any(to[i * stride], typename ComputeIn<T>::V::T(from[i]));
}

#define FASTNN_PLANE(T, dense)                                              \
  {Plane<T, dense>::stats, apply<T, dense, false>, Plane<T, dense>::reduce, \
   backward<T, dense, false>}
#define FASTNN_ACROSS(T, dense)                                              \
  {Across<T, dense>::stats, apply<T, dense, true>, Across<T, dense>::reduce, \
   backward<T, dense, true>}
static const BatchNormKernels batch_norm_table = {
    {{FASTNN_PLANE(float, false), FASTNN_PLANE(float, true)},
     {FASTNN_PLANE(double, false), FASTNN_PLANE(double, true)},
     {FASTNN_PLANE(bf16, false), FASTNN_PLANE(bf16, true)},
     {FASTNN_PLANE(f16, false), FASTNN_PLANE(f16, true)}},
    {{FASTNN_ACROSS(float, false), FASTNN_ACROSS(float, true)},
     {FASTNN_ACROSS(double, false), FASTNN_ACROSS(double, true)},
     {FASTNN_ACROSS(bf16, false), FASTNN_ACROSS(bf16, true)},
     {FASTNN_ACROSS(f16, false), FASTNN_ACROSS(f16, true)}},
    {widen<float>, widen<double>, widen<bf16>, widen<f16>},
    {narrow<float>, narrow<double>, narrow<bf16>, narrow<f16>},
    combine,
    end_stream};
#undef FASTNN_PLANE
#undef FASTNN_ACROSS

}  // namespace fastnn::FASTNN_TARGET
