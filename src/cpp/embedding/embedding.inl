// The embedding kernels of one instruction set. Included once by each file in kernels/, which
// defines FASTNN_TARGET; see isa/vec.hpp for why nothing here may be shared between targets.
#include "embedding/embedding.hpp"
#include "isa/stream.hpp"

namespace fastnn::FASTNN_TARGET {

template <class T>
struct LanesOf {
  using V = VecF32;
};
template <>
struct LanesOf<double> {
  using V = VecF64;
};

// ---- gather

static FASTNN_INLINE int64_t index_at(const Indices& indices, int64_t i) {
  return indices.wide ? static_cast<const int64_t*>(indices.data)[i]
                      : static_cast<const int32_t*>(indices.data)[i];
}

static void gather_rows(const char* table, int64_t row_bytes, int64_t bytes, const Indices& indices,
                        int64_t begin, int64_t end, char* out, bool around_caches) {
  constexpr int64_t line = 64, vector = VecF32::width * 4, ahead = 4;
  for (int64_t i = begin; i < end; i++) {
    // The rows lie anywhere: the first lines of those to come are fetched by hand, the rest is for
    // the hardware.
    if (i + ahead < end) {
      const char* next = table + index_at(indices, i + ahead) * row_bytes;
      for (int64_t b = 0; b < bytes && b < 4 * line; b += line) __builtin_prefetch(next + b);
    }
    const char* from = table + index_at(indices, i) * row_bytes;
    char* to = out + i * bytes;
    int64_t b = 0;
    if (!around_caches) {
      for (; b + vector <= bytes; b += vector)
        VecF32::load(reinterpret_cast<const float*>(from + b))
            .store(reinterpret_cast<float*>(to + b));
    } else if (uintptr_t(to) % vector == 0) {
      for (; b + vector <= bytes; b += vector)
        stream(reinterpret_cast<float*>(to + b),
               VecF32::load(reinterpret_cast<const float*>(from + b)));
    }
    __builtin_memcpy(to + b, from + b, size_t(bytes - b));
  }
  if (around_caches) end_stream();
}

// ---- sums

// One chain of additions is no longer than this: its error grows with its length.
constexpr int64_t kChain = 64;

// `vectors` vectors of lanes from column c on.
template <int vectors, class T, class V>
static FASTNN_INLINE void sum_columns(const T* grad, int64_t stride, const Entry* entries,
                                      int64_t n, int64_t c, V divisor, bool divide, T* out,
                                      bool around_caches) {
  V total[vectors];
  for (int v = 0; v < vectors; v++) total[v] = V::zero();
  for (int64_t first = 0; first < n; first += kChain) {
    const int64_t last = first + kChain < n ? first + kChain : n;
    V sum[vectors];
    const T* row = grad + int64_t(entries[first].index) * stride + c;
    for (int v = 0; v < vectors; v++) sum[v] = V::load(row + v * V::width);
    for (int64_t i = first + 1; i < last; i++) {
      row = grad + int64_t(entries[i].index) * stride + c;
      for (int v = 0; v < vectors; v++) sum[v] = sum[v] + V::load(row + v * V::width);
    }
    // The first chain is taken as it is, so that a single row keeps the sign of its zeros.
    for (int v = 0; v < vectors; v++) total[v] = first ? total[v] + sum[v] : sum[v];
  }
  for (int v = 0; v < vectors; v++) {
    if (divide) total[v] = total[v] / divisor;
    if (around_caches)
      stream(out + c + v * V::width, total[v]);
    else
      total[v].store(out + c + v * V::width);
  }
}

template <class T>
static void sum_rows(const void* grad_, int64_t stride, const Entry* entries, int64_t n,
                     int64_t columns, double divisor_, void* out_, bool around_caches) {
  using V = typename LanesOf<T>::V;
  const T* grad = static_cast<const T*>(grad_);
  T* out = static_cast<T*>(out_);
  if (n == 0) {
    fill<T, V>(out, columns, around_caches, [](int64_t, int) { return V::zero(); });
    return;
  }
  const V divisor = V::set1(typename V::T(divisor_));
  const bool divide = divisor_ != 1;
  const bool aligned = uintptr_t(out) % (V::width * sizeof(T)) == 0;
  constexpr int many = 8;
  int64_t c = 0;
  for (; c + many * V::width <= columns; c += many * V::width)
    sum_columns<many, T, V>(grad, stride, entries, n, c, divisor, divide, out,
                            around_caches && aligned);
  for (; c + V::width <= columns; c += V::width)
    sum_columns<1, T, V>(grad, stride, entries, n, c, divisor, divide, out,
                         around_caches && aligned);
  if (c == columns) return;
  const int rest = int(columns - c);
  V total = V::zero();
  for (int64_t first = 0; first < n; first += kChain) {
    const int64_t last = first + kChain < n ? first + kChain : n;
    V sum = V::load_partial(grad + int64_t(entries[first].index) * stride + c, rest);
    for (int64_t i = first + 1; i < last; i++)
      sum = sum + V::load_partial(grad + int64_t(entries[i].index) * stride + c, rest);
    total = first ? total + sum : sum;
  }
  if (divide) total = total / divisor;
  total.store_partial(out + c, rest);
}

// ---- rotary

template <class V, class T>
static FASTNN_INLINE V lanes(const T* p, int n) {
  return n == V::width ? V::load(p) : V::load_partial(p, n);
}
template <class V, class T>
static FASTNN_INLINE void put(V v, T* p, int n) {
  if (n == V::width)
    v.store(p);
  else
    v.store_partial(p, n);
}
// n pairs of neighbours, apart.
template <class V, class T>
static FASTNN_INLINE void pairs_at(const T* p, int n, V& a, V& b) {
  const int low = 2 * n < V::width ? 2 * n : V::width;
  even_odd(lanes<V>(p, low), lanes<V>(p + V::width, 2 * n - low), a, b);
}
template <class V, class T>
static FASTNN_INLINE void put_pairs(V a, V b, T* p, int n) {
  V first, second;
  zip(a, b, first, second);
  const int low = 2 * n < V::width ? 2 * n : V::width;
  put(first, p, low);
  put(second, p + V::width, 2 * n - low);
}

template <class T, class Table, bool paired, bool interleaved, bool transposed>
static void turn(const void* x_, int64_t xs, void* out_, int64_t os, const void* cos_, int64_t cs,
                 const void* sin_, int64_t ss, int64_t n, int64_t pairs) {
  using V = typename LanesOf<T>::V;
  for (int64_t row = 0; row < n; row++) {
    const T* x = static_cast<const T*>(x_) + row * xs;
    T* out = static_cast<T*>(out_) + row * os;
    const Table* cos = static_cast<const Table*>(cos_) + row * cs;
    const Table* sin = static_cast<const Table*>(sin_) + row * ss;
    for (int64_t i = 0; i < pairs; i += V::width) {
      const int m = pairs - i < V::width ? int(pairs - i) : V::width;
      V a, b, c, d, s, t;  // c and s belong to a, d and t to b
      if constexpr (interleaved) {
        pairs_at(x + 2 * i, m, a, b);
      } else {
        a = lanes<V>(x + i, m);
        b = lanes<V>(x + pairs + i, m);
      }
      if constexpr (paired) {
        c = d = lanes<V>(cos + i, m);
        s = t = lanes<V>(sin + i, m);
      } else if constexpr (interleaved) {
        pairs_at(cos + 2 * i, m, c, d);
        pairs_at(sin + 2 * i, m, s, t);
      } else {
        c = lanes<V>(cos + i, m), d = lanes<V>(cos + pairs + i, m);
        s = lanes<V>(sin + i, m), t = lanes<V>(sin + pairs + i, m);
      }
      const V to_a = transposed ? fma(a, c, b * t) : fma(a, c, neg(b * s));
      const V to_b = transposed ? fma(b, d, neg(a * s)) : fma(b, d, a * t);
      if constexpr (interleaved) {
        put_pairs(to_a, to_b, out + 2 * i, m);
      } else {
        put(to_a, out + i, m);
        put(to_b, out + pairs + i, m);
      }
    }
  }
}

static void finish_stream() { end_stream(); }

#define FASTNN_TURN_TO(T, Table, paired)                                           \
  {                                                                                \
    {turn<T, Table, paired, false, false>, turn<T, Table, paired, false, true>}, { \
      turn<T, Table, paired, true, false>, turn<T, Table, paired, true, true>      \
    }                                                                              \
  }
#define FASTNN_TURN_BY(T, Table) {FASTNN_TURN_TO(T, Table, false), FASTNN_TURN_TO(T, Table, true)}
static const EmbeddingKernels table = {
    gather_rows,
    {sum_rows<float>, sum_rows<double>, sum_rows<bf16>, sum_rows<f16>},
    finish_stream,
    {{FASTNN_TURN_BY(float, float), FASTNN_TURN_BY(float, float)},
     {FASTNN_TURN_BY(double, double), {}},
     {FASTNN_TURN_BY(bf16, bf16), FASTNN_TURN_BY(bf16, float)},
     {FASTNN_TURN_BY(f16, f16), FASTNN_TURN_BY(f16, float)}}};
#undef FASTNN_TURN_TO
#undef FASTNN_TURN_BY

}  // namespace fastnn::FASTNN_TARGET
