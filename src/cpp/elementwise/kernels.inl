// The elementwise kernels of one instruction set. Included once by each file in kernels/, which
// defines FASTNN_TARGET; see isa/vec.hpp for why nothing here may be shared between targets.
#include "elementwise/elementwise.hpp"
#include "isa/math.hpp"
#include "isa/stream.hpp"

namespace fastnn::FASTNN_TARGET {

// The vector in which elements of type T are computed, and the functions accurate enough for them.
template <class T>
struct Compute {
  using V = VecF32;
  template <int kind>
  static FASTNN_INLINE V forward_of(V x) {
    return activate_narrow_as<kind>(x);
  }
  template <int kind>
  static FASTNN_INLINE V backward_of(V grad, V saved) {
    return grad * derivative<Narrow, kind>(saved);
  }
};
template <>
struct Compute<float> {
  using V = VecF32;
  template <int kind>
  static FASTNN_INLINE V forward_of(V x) {
    return activate_as<kind>(x);
  }
  template <int kind>
  static FASTNN_INLINE V backward_of(V grad, V saved) {
    // These two are exact enough in float32: one fma and a product.
    if constexpr (kind == kSigmoid || kind == kTanh) return grad * derivative<Wide, kind>(saved);
    return narrow(widen_low(grad) * derivative<Wide, kind>(widen_low(saved)),
                  widen_high(grad) * derivative<Wide, kind>(widen_high(saved)));
  }
};
template <>
struct Compute<double> {
  using V = VecF64;
  template <int kind>
  static FASTNN_INLINE V forward_of(V x) {
    return activate_as<kind>(x);
  }
  template <int kind>
  static FASTNN_INLINE V backward_of(V grad, V saved) {
    return grad * derivative<Full, kind>(saved);
  }
};

// relu's gradient: where the output is NaN the gradient passes, as in torch. So it does in relu6's,
// of which torch's depends on the place in the tensor.
template <int kind, class T, class V>
static FASTNN_INLINE V backward_value(V grad, V saved) {
  if constexpr (kind == kRelu)
    return select(le(saved, V::zero()), V::zero(), grad);
  else if constexpr (kind == kRelu6)
    return select(either(le(saved, V::zero()), le(V::set1(6), saved)), V::zero(), grad);
  else
    return Compute<T>::template backward_of<kind>(grad, saved);
}

template <class V, class T>
static FASTNN_INLINE V load_lanes(const T* p, int n) {
  return n == V::width ? V::load(p) : V::load_partial(p, n);
}

// Strided runs go through a small contiguous copy.
constexpr int64_t kBuffer = 256;
template <class T>
static FASTNN_INLINE const T* gather(const T* x, int64_t stride, int64_t n, T* buffer) {
  if (stride == 1) return x;
  for (int64_t i = 0; i < n; i++) buffer[i] = x[i * stride];
  return buffer;
}

template <class T, int kind>
static void unary(const void* x_, int64_t xs, void* out_, int64_t os, int64_t n,
                  bool around_caches) {
  using V = typename Compute<T>::V;
  const T* x = static_cast<const T*>(x_);
  T* out = static_cast<T*>(out_);
  auto contiguous = [](const T* from, T* to, int64_t count, bool around) {
    fill<T, V>(to, count, around, [from](int64_t i, int lanes) __attribute__((always_inline)) {
      return Compute<T>::template forward_of<kind>(load_lanes<V>(from + i, lanes));
    });
    if (around) end_stream();
  };
  if (xs == 1 && os == 1) return contiguous(x, out, n, around_caches);
  T in[kBuffer], result[kBuffer];
  for (int64_t i = 0; i < n; i += kBuffer) {
    const int64_t count = n - i < kBuffer ? n - i : kBuffer;
    const T* from = gather(x + i * xs, xs, count, in);
    if (os == 1) {
      contiguous(from, out + i, count, false);
    } else {
      contiguous(from, result, count, false);
      for (int64_t j = 0; j < count; j++) out[(i + j) * os] = result[j];
    }
  }
}

template <class T, int kind>
static void backward(const void* grad_, int64_t gs, const void* saved_, int64_t ss, void* out_,
                     int64_t os, int64_t n, bool around_caches) {
  using V = typename Compute<T>::V;
  const T* grad = static_cast<const T*>(grad_);
  const T* saved = static_cast<const T*>(saved_);
  T* out = static_cast<T*>(out_);
  auto contiguous = [](const T* g, const T* s, T* to, int64_t count, bool around) {
    fill<T, V>(to, count, around, [g, s](int64_t i, int lanes) __attribute__((always_inline)) {
      return backward_value<kind, T>(load_lanes<V>(g + i, lanes), load_lanes<V>(s + i, lanes));
    });
    if (around) end_stream();
  };
  if (gs == 1 && ss == 1 && os == 1) return contiguous(grad, saved, out, n, around_caches);
  T a[kBuffer], b[kBuffer], result[kBuffer];
  for (int64_t i = 0; i < n; i += kBuffer) {
    const int64_t count = n - i < kBuffer ? n - i : kBuffer;
    const T* g = gather(grad + i * gs, gs, count, a);
    const T* s = gather(saved + i * ss, ss, count, b);
    if (os == 1) {
      contiguous(g, s, out + i, count, false);
    } else {
      contiguous(g, s, result, count, false);
      for (int64_t j = 0; j < count; j++) out[(i + j) * os] = result[j];
    }
  }
}

#define FASTNN_UNARY(T)                                                            \
  nullptr, unary<T, kRelu>, unary<T, kGelu>, unary<T, kGeluTanh>, unary<T, kSilu>, \
      unary<T, kSigmoid>, unary<T, kTanh>, unary<T, kRelu6>
#define FASTNN_BACKWARD(T)                                                                     \
  nullptr, backward<T, kRelu>, backward<T, kGelu>, backward<T, kGeluTanh>, backward<T, kSilu>, \
      backward<T, kSigmoid>, backward<T, kTanh>, backward<T, kRelu6>
static const ElementwiseKernels table = {
    {{FASTNN_UNARY(float), unary<float, kExp>, unary<float, kErf>},
     {FASTNN_UNARY(double), unary<double, kExp>, unary<double, kErf>},
     {FASTNN_UNARY(bf16)},
     {FASTNN_UNARY(f16)}},
    {{FASTNN_BACKWARD(float)},
     {FASTNN_BACKWARD(double)},
     {FASTNN_BACKWARD(bf16)},
     {FASTNN_BACKWARD(f16)}}};
#undef FASTNN_UNARY
#undef FASTNN_BACKWARD

}  // namespace fastnn::FASTNN_TARGET
