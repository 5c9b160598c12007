// The pooling kernels of one instruction set. Included once by each file in kernels/, which defines
// FASTNN_TARGET; see isa/vec.hpp for why nothing here may be shared between targets.
//
// Planes (rows that lie together) are worked on row by row. A row of the input is first split into
// phases, the elements that one tap of successive windows reads, so that any stride and padding
// becomes plain vector loads; it is reduced along the width, and what is left of the rows of a
// window then along height and depth. The first of equal maxima in each row and then the first of
// those is the first of all. Where channels lie together, vectors go across them.
#include "isa/vec.hpp"
#include "pool/pool.hpp"

namespace fastnn::FASTNN_TARGET {

// The vector in which elements of type T are computed.
template <class T>
struct Compute {
  using V = VecF32;
};
template <>
struct Compute<double> {
  using V = VecF64;
};

static FASTNN_INLINE double wide(double x) { return x; }
template <class T>
static FASTNN_INLINE float wide(T x) {
  return to_f32(x);
}

enum Mode { kMax, kMaxCodes, kSum };

constexpr float kLowest = -__builtin_inff();

// ---- codes: whole numbers in the lanes of a vector, bytes or int32 in memory
// ----------------------

#if FASTNN_TARGET_ID == 2
static FASTNN_INLINE void put(uint8_t* p, VecF32 v, int n) {
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v.r));
  if (n == VecF32::width)
    _mm_storeu_si128((__m128i*)p, bytes);
  else
    _mm_mask_storeu_epi8(p, VecF32::first(n), bytes);
}
static FASTNN_INLINE void put(uint8_t* p, VecF64 v, int n) {
  _mm_mask_storeu_epi8(p, VecF64::first(n), _mm256_cvtepi32_epi8(_mm512_cvtpd_epi32(v.r)));
}
static FASTNN_INLINE void put(int32_t* p, VecF32 v, int n) {
  _mm512_mask_storeu_epi32(p, VecF32::first(n), _mm512_cvtps_epi32(v.r));
}
static FASTNN_INLINE void put(int32_t* p, VecF64 v, int n) {
  _mm256_mask_storeu_epi32(p, VecF64::first(n), _mm512_cvtpd_epi32(v.r));
}
static FASTNN_INLINE void get(VecF32& v, const uint8_t* p, int n) {
  const __m128i bytes = n == VecF32::width ? _mm_loadu_si128((const __m128i*)p)
                                           : _mm_maskz_loadu_epi8(VecF32::first(n), p);
  v = {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))};
}
static FASTNN_INLINE void get(VecF64& v, const uint8_t* p, int n) {
  v = {_mm512_cvtepi32_pd(_mm256_cvtepu8_epi32(_mm_maskz_loadu_epi8(VecF64::first(n), p)))};
}
static FASTNN_INLINE void get(VecF32& v, const int32_t* p, int n) {
  v = {_mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(VecF32::first(n), p))};
}
static FASTNN_INLINE void get(VecF64& v, const int32_t* p, int n) {
  v = {_mm512_cvtepi32_pd(_mm256_maskz_loadu_epi32(VecF64::first(n), p))};
}
#else
template <class I, class V>
static FASTNN_INLINE void put(I* p, V v, int n) {
#if FASTNN_TARGET_ID == 1
  if constexpr (sizeof(I) == 1 && V::width == 8) {
    if (n == V::width) {
      const __m256i i = _mm256_cvtps_epi32(v.r);
      const __m128i w = _mm_packus_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
      _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(w, w));
      return;
    }
  }
#endif
  typename V::T lanes[V::width];
  v.store(lanes);
  for (int i = 0; i < n; i++) p[i] = I(int32_t(lanes[i]));
}
template <class I, class V>
static FASTNN_INLINE void get(V& v, const I* p, int n) {
#if FASTNN_TARGET_ID == 1
  if constexpr (sizeof(I) == 1 && V::width == 8) {
    if (n == V::width) {
      v = {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
      return;
    }
  }
#endif
  typename V::T lanes[V::width] = {};
  for (int i = 0; i < n; i++) lanes[i] = typename V::T(int32_t(p[i]));
  v = V::load(lanes);
}
#endif

template <class V>
static FASTNN_INLINE void put_codes(char* p, bool wide_codes, int64_t at, V v, int n) {
  if (wide_codes)
    put(reinterpret_cast<int32_t*>(p) + at, v, n);
  else
    put(reinterpret_cast<uint8_t*>(p) + at, v, n);
}
template <class V>
static FASTNN_INLINE V get_codes(const char* p, bool wide_codes, int64_t at, int n) {
  V v;
  if (wide_codes)
    get(v, reinterpret_cast<const int32_t*>(p) + at, n);
  else
    get(v, reinterpret_cast<const uint8_t*>(p) + at, n);
  return v;
}
static FASTNN_INLINE int64_t code_at(const char* p, bool wide_codes, int64_t at) {
  return wide_codes ? int64_t(reinterpret_cast<const int32_t*>(p)[at])
                    : int64_t(reinterpret_cast<const uint8_t*>(p)[at]);
}

// ---- rows
// -----------------------------------------------------------------------------------------

template <class V, class T>
static FASTNN_INLINE V load_lanes(const T* p, int n) {
  return n == V::width ? V::load(p) : V::load_partial(p, n);
}
template <class V, class T>
static FASTNN_INLINE void store_lanes(T* p, V v, int n) {
  if (n == V::width)
    v.store(p);
  else
    v.store_partial(p, n);
}

// Working memory, handed out piece by piece.
struct Work {
  char* at;
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(at);
    at += (n * int64_t(sizeof(T)) + 63) / 64 * 64;
    return p;
  }
};

template <class C>
static FASTNN_INLINE void fill(C* p, int64_t n, C value) {
  for (int64_t i = 0; i < n; i++) p[i] = value;
}

// Element i of a row goes to phase (i + padding) % stride, place (i + padding) / stride.
static FASTNN_INLINE int64_t phase_start(int64_t first, const PoolWindows& w, int64_t length) {
  const int64_t t = first + w.padding;
  return t % w.stride * length + t / w.stride;
}

template <class T, class C>
static void split_row(const T* x, int64_t xs, const PoolWindows& w, int64_t length, C* phases) {
  using V = typename Compute<T>::V;
  const int64_t n = w.in;
  int64_t i = 0;
  if (xs == 1 && w.stride == 1) {
    C* to = phases + w.padding;
    for (; i + V::width <= n; i += V::width) V::load(x + i).store(to + i);
    if (i < n) V::load_partial(x + i, int(n - i)).store_partial(to + i, int(n - i));
    return;
  }
  if (xs == 1 && w.stride == 2) {
    C* to_even = phases + phase_start(0, w, length);
    C* to_odd = phases + phase_start(1, w, length);
    for (; i + 2 * V::width <= n; i += 2 * V::width) {
      V even, odd;
      even_odd(V::load(x + i), V::load(x + i + V::width), even, odd);
      even.store(to_even + i / 2);
      odd.store(to_odd + i / 2);
    }
    if (i < n) {
      const int rest = int(n - i), a = rest < V::width ? rest : V::width, b = rest - a;
      V even, odd;
      even_odd(V::load_partial(x + i, a), b ? V::load_partial(x + i + V::width, b) : V::zero(),
               even, odd);
      even.store_partial(to_even + i / 2, (rest + 1) / 2);
      odd.store_partial(to_odd + i / 2, rest / 2);
    }
    return;
  }
  for (int64_t m = 0; m < w.stride && m < n; m++) {
    C* to = phases + phase_start(m, w, length);
    for (int64_t j = 0; m + j * w.stride < n; j++) to[j] = wide(x[(m + j * w.stride) * xs]);
  }
}

// The other way round.
template <class T, class C>
static void join_row(const C* phases, const PoolWindows& w, int64_t length, T* x, int64_t xs) {
  using V = typename Compute<T>::V;
  const int64_t n = w.in;
  int64_t i = 0;
  if (xs == 1 && w.stride == 1) {
    const C* from = phases + w.padding;
    for (; i + V::width <= n; i += V::width) V::load(from + i).store(x + i);
    if (i < n) V::load_partial(from + i, int(n - i)).store_partial(x + i, int(n - i));
    return;
  }
  if (xs == 1 && w.stride == 2) {
    const C* from_even = phases + phase_start(0, w, length);
    const C* from_odd = phases + phase_start(1, w, length);
    for (; i + 2 * V::width <= n; i += 2 * V::width) {
      V a, b;
      zip(V::load(from_even + i / 2), V::load(from_odd + i / 2), a, b);
      a.store(x + i);
      b.store(x + i + V::width);
    }
    for (int64_t j = i / 2; 2 * j < n; j++) from_any(x[2 * j], from_even[j]);
    for (int64_t j = i / 2; 2 * j + 1 < n; j++) from_any(x[2 * j + 1], from_odd[j]);
    return;
  }
  for (int64_t m = 0; m < w.stride && m < n; m++) {
    const C* from = phases + phase_start(m, w, length);
    for (int64_t j = 0; m + j * w.stride < n; j++) from_any(x[(m + j * w.stride) * xs], from[j]);
  }
}

// The row itself, or a copy that lies together in the type of the computation.
template <class T, class C>
static FASTNN_INLINE const C* dense_row(const T* x, int64_t xs, int64_t n, C* copy) {
  using V = typename Compute<T>::V;
  if (xs != 1) {
    for (int64_t i = 0; i < n; i++) copy[i] = wide(x[i * xs]);
    return copy;
  }
  if constexpr (sizeof(T) == sizeof(C)) {
    return x;
  } else {
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) V::load(x + i).store(copy + i);
    if (i < n) V::load_partial(x + i, int(n - i)).store_partial(copy + i, int(n - i));
    return copy;
  }
}

template <class T, class C>
static void store_row(const C* from, T* to, int64_t stride, int64_t n) {
  using V = typename Compute<T>::V;
  if (stride == 1) {
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) V::load(from + i).store(to + i);
    if (i < n) V::load_partial(from + i, int(n - i)).store_partial(to + i, int(n - i));
  } else {
    for (int64_t i = 0; i < n; i++) from_any(to[i * stride], from[i]);
  }
}

// ---- reductions
// -----------------------------------------------------------------------------------

// Takes one more value. A NaN replaces whatever was there.
template <int mode, class V>
static FASTNN_INLINE void take(V& value, V& code, V v, V v_code) {
  if constexpr (mode == kSum) {
    value = value + v;
  } else if constexpr (mode == kMax) {
    value = select(is_nan(v), v, max(v, value));
  } else {
    const auto newer = either(lt(value, v), is_nan(v));
    value = select(newer, v, value);
    code = select(newer, v_code, code);
  }
}

// Along the width, one tap after the other. `taps` > 0 is their count, known when compiled.
template <int mode, int taps, class V, class C>
static FASTNN_INLINE void reduce_taps(const C* phases, const int64_t* offset, int count,
                                      const C* first, int64_t n, C* value, C* code) {
  const int many = taps ? taps : count;
  for (int64_t i = 0; i < n; i += V::width) {
    V best = mode == kSum ? V::zero() : V::set1(C(kLowest));
    V at = mode == kMaxCodes ? V::load(first + i) : V::zero();
    for (int t = 0; t < many; t++)
      take<mode>(best, at, V::load(phases + offset[t] + i), V::set1(C(t)));
    best.store(value + i);
    if constexpr (mode == kMaxCodes) at.store(code + i);
  }
}

template <class V, class C>
static FASTNN_INLINE C sum_lanes(const C* x, int64_t n) {
  V sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t i = 0;
  for (; i + 4 * V::width <= n; i += 4 * V::width)
    for (int u = 0; u < 4; u++) sum[u] = sum[u] + V::load(x + i + u * V::width);
  for (; i + V::width <= n; i += V::width) sum[0] = sum[0] + V::load(x + i);
  if (i < n) sum[1] = sum[1] + V::load_partial(x + i, int(n - i));
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// One window's part of a row that lies together.
template <int mode, class V, class C>
static FASTNN_INLINE void reduce_segment(const C* x, int64_t n, C& value, int64_t& at) {
  at = 0;
  if constexpr (mode == kSum) {
    // Long sums in parts: the error of one chain grows with its length.
    constexpr int64_t kPart = 1024;
    C sum = 0;
    for (int64_t i = 0; i < n; i += kPart)
      sum += sum_lanes<V>(x + i, n - i < kPart ? n - i : kPart);
    value = sum;
    return;
  }
  C best = C(kLowest);
  int64_t i = 0;
  if (n >= V::width) {
    V lanes = V::load(x), none = V::zero();
    for (i = V::width; i + V::width <= n; i += V::width)
      take<kMax>(lanes, none, V::load(x + i), none);
    C each[V::width];
    lanes.store(each);
    for (int l = 0; l < V::width; l++)
      if (each[l] > best || each[l] != each[l]) best = each[l];
  }
  for (; i < n; i++)
    if (x[i] > best || x[i] != x[i]) best = x[i];
  value = best;
  if constexpr (mode == kMaxCodes) {
    if (best != best) {
      for (at = n - 1; x[at] == x[at];) at--;
    } else {
      while (x[at] != best) at++;
    }
  }
}

// ---- planes
// ---------------------------------------------------------------------------------------

// Row `row` of all planes together: where its plane is, and where in it.
struct Place {
  int64_t batch, channel, z, y;
  Place(const PoolPlan& p, int64_t row, int64_t depth, int64_t height) {
    y = row % height;
    row /= height;
    z = row % depth;
    row /= depth;
    channel = row % p.channels;
    batch = row / p.channels;
  }
  int64_t offset(const int64_t* stride) const {
    return batch * stride[0] + channel * stride[1] + z * stride[2] + y * stride[3];
  }
};

template <class T, int mode>
static void forward_planes(const PoolPlan& p, char* x_, char* out_, char* codes, int64_t begin,
                           int64_t end, char* scratch) {
  using V = typename Compute<T>::V;
  using C = typename V::T;
  const T* x = reinterpret_cast<const T*>(x_);
  T* out = reinterpret_cast<T*>(out_);
  const PoolWindows &wz = p.axis[0], &wy = p.axis[1], &wx = p.axis[2];
  const int64_t length = p.phase_length, phase_count = p.segments ? 1 : wx.stride;
  Work work{scratch};
  C* phases = work.take<C>(phase_count * length);
  if (p.whole) {
    const C by = p.divisor != 0 ? C(p.divisor) : C(wx.divisor[0]);
    for (int64_t r = begin; r < end; r++) {
      const int64_t n = r / p.channels, c = r % p.channels;
      const C* row = dense_row(x + n * p.x[0] + c * p.x[1], p.x[4], wx.in, phases);
      C value;
      int64_t at;
      reduce_segment<mode, V>(row, wx.in, value, at);
      if constexpr (mode == kSum) value = value / by;
      from_any(out[n * p.out[0] + c * p.out[1]], value);
      if constexpr (mode == kMaxCodes) {
        const int64_t place = n * p.code[0] + c * p.code[1];
        if (p.wide_codes)
          reinterpret_cast<int32_t*>(codes)[place] = int32_t(at);
        else
          reinterpret_cast<uint8_t*>(codes)[place] = uint8_t(at);
      }
    }
    return;
  }
  const int64_t slot_size = mode == kMaxCodes ? 2 * p.row : p.row;
  C* slots = work.take<C>(p.ring_z * p.ring_y * slot_size);
  int64_t* owner = work.take<int64_t>(p.ring_z * p.ring_y);
  const C** rows = work.take<const C*>(p.window_rows);
  C* row_code = work.take<C>(p.window_rows);
  int64_t* offset = work.take<int64_t>(wx.kernel);
  C* first = work.take<C>(p.row);
  C* divisor = work.take<C>(p.row);
  C* result = work.take<C>(p.row);
  C* result_code = work.take<C>(p.row);

  fill(phases, phase_count * length, mode == kSum ? C(0) : C(kLowest));
  fill(owner, p.ring_z * p.ring_y, int64_t(-1));
  fill(first, p.row, C(0));
  fill(divisor, p.row, C(1));
  for (int64_t i = 0; i < wx.out; i++) {
    first[i] = C(wx.first[i]);
    divisor[i] = C(wx.divisor[i]);
  }
  if (!p.segments)
    for (int64_t k = 0; k < wx.kernel; k++)
      offset[k] = k * wx.dilation % wx.stride * length + k * wx.dilation / wx.stride;

  auto reduce_row = [&](const T* from, C* value) __attribute__((always_inline)) {
    C* code = value + p.row;
    if (p.segments) {
      const C* row = dense_row(from, p.x[4], wx.in, phases);
      for (int64_t o = 0; o < wx.out; o++) {
        int64_t at;
        reduce_segment<mode, V>(row + wx.begin[o] + wx.first[o], wx.count[o], value[o], at);
        if constexpr (mode == kMaxCodes) code[o] = C(at + wx.first[o]);
      }
      return;
    }
    split_row(from, p.x[4], wx, length, phases);
    const int count = int(wx.kernel);
    if (count == 2)
      reduce_taps<mode, 2, V>(phases, offset, 2, first, wx.out, value, code);
    else if (count == 3)
      reduce_taps<mode, 3, V>(phases, offset, 3, first, wx.out, value, code);
    else
      reduce_taps<mode, 0, V>(phases, offset, count, first, wx.out, value, code);
  };

  for (int64_t r = begin; r < end; r++) {
    const Place at(p, r, wz.out, wy.out);
    const int64_t plane = at.batch * p.channels + at.channel;
    const T* from = x + at.batch * p.x[0] + at.channel * p.x[1];
    int count = 0;
    for (int64_t i = 0; i < wz.count[at.z]; i++) {
      const int64_t kz = wz.first[at.z] + i, iz = wz.begin[at.z] + kz * wz.dilation;
      for (int64_t j = 0; j < wy.count[at.y]; j++) {
        const int64_t ky = wy.first[at.y] + j, iy = wy.begin[at.y] + ky * wy.dilation;
        const int64_t slot = iz % p.ring_z * p.ring_y + iy % p.ring_y;
        const int64_t id = (plane * wz.in + iz) * wy.in + iy;
        C* value = slots + slot * slot_size;
        if (owner[slot] != id) {
          reduce_row(from + iz * p.x[2] + iy * p.x[3], value);
          owner[slot] = id;
        }
        rows[count] = value;
        row_code[count++] = C((kz * wy.kernel + ky) * wx.kernel);
      }
    }
    T* to = out + at.offset(p.out);
    const int64_t code_place = at.offset(p.code);
    const V by = V::set1(p.divisor != 0 ? C(p.divisor) : C(wz.divisor[at.z] * wy.divisor[at.y]));
    for (int64_t i = 0; i < wx.out; i += V::width) {
      const int lanes = int(wx.out - i < V::width ? wx.out - i : V::width);
      V best = V::load(rows[0] + i), code = V::zero();
      if constexpr (mode == kMaxCodes) code = V::load(rows[0] + p.row + i) + V::set1(row_code[0]);
      for (int k = 1; k < count; k++) {
        V its_code = V::zero();
        if constexpr (mode == kMaxCodes)
          its_code = V::load(rows[k] + p.row + i) + V::set1(row_code[k]);
        take<mode>(best, code, V::load(rows[k] + i), its_code);
      }
      if constexpr (mode == kSum) best = best / (p.divisor != 0 ? by : by * V::load(divisor + i));
      if (p.out[4] == 1)
        store_lanes(to + i, best, lanes);
      else
        best.store(result + i);
      if constexpr (mode == kMaxCodes) {
        if (p.code[4] == 1)
          put_codes(codes, p.wide_codes, code_place + i, code, lanes);
        else
          code.store(result_code + i);
      }
    }
    if (p.out[4] != 1) store_row(result, to, p.out[4], wx.out);
    if (mode == kMaxCodes && p.code[4] != 1) {
      for (int64_t i = 0; i < wx.out; i++) {
        const int64_t place = code_place + i * p.code[4];
        if (p.wide_codes)
          reinterpret_cast<int32_t*>(codes)[place] = int32_t(result_code[i]);
        else
          reinterpret_cast<uint8_t*>(codes)[place] = uint8_t(result_code[i]);
      }
    }
  }
}

// Each element of the gradient gathers from the outputs that read it, in their order, so that the
// sums are those of a scatter in the order of the outputs.
template <class T, bool coded>
static void backward_planes(const PoolPlan& p, char* x_, char* out_, char* codes, int64_t begin,
                            int64_t end, char* scratch) {
  using V = typename Compute<T>::V;
  using C = typename V::T;
  T* x = reinterpret_cast<T*>(x_);
  const T* out = reinterpret_cast<const T*>(out_);
  const PoolWindows &wz = p.axis[0], &wy = p.axis[1], &wx = p.axis[2];
  const int64_t length = p.phase_length, phase_count = p.segments ? 1 : wx.stride;
  Work work{scratch};
  C* phases = work.take<C>(phase_count * length);
  if constexpr (!coded) {
    if (p.whole) {
      const C by = p.divisor != 0 ? C(p.divisor) : C(wx.divisor[0]);
      for (int64_t r = begin; r < end; r++) {
        const int64_t n = r / p.channels, c = r % p.channels;
        const C value = wide(out[n * p.out[0] + c * p.out[1]]) / by;
        T* to = x + n * p.x[0] + c * p.x[1];
        if (p.x[4] == 1) {
          const V v = V::set1(value);
          int64_t i = 0;
          for (; i + V::width <= wx.in; i += V::width) v.store(to + i);
          if (i < wx.in) v.store_partial(to + i, int(wx.in - i));
        } else {
          for (int64_t i = 0; i < wx.in; i++) from_any(to[i * p.x[4]], value);
        }
      }
      return;
    }
  }
  const int64_t slot_size = coded ? 2 * p.row : p.row;
  C* slots = work.take<C>(p.ring_z * p.ring_y * slot_size);
  int64_t* owner = work.take<int64_t>(p.ring_z * p.ring_y);
  const C** rows = work.take<const C*>(p.window_rows);
  C* row_code = work.take<C>(p.window_rows);
  int64_t* shift = work.take<int64_t>(wx.kernel);
  C* number = work.take<C>(wx.kernel);
  int64_t* phase_taps = work.take<int64_t>(phase_count + 1);
  C* divisor = work.take<C>(p.row);
  C* sum = work.take<C>(p.row);

  // The padding around the rows: zeros, and codes that no tap has.
  for (int64_t s = 0; s < p.ring_z * p.ring_y; s++) {
    fill(slots + s * slot_size, p.row, C(0));
    if (coded) fill(slots + s * slot_size + p.row, p.row, C(-1));
  }
  fill(owner, p.ring_z * p.ring_y, int64_t(-1));
  fill(sum, p.row, C(0));
  for (int64_t i = 0; i < wx.out; i++) divisor[i] = C(wx.divisor[i]);
  // Taps by phase, the last first: its output is the earliest.
  int64_t taps = 0;
  for (int64_t f = 0; f < phase_count && !p.segments; f++) {
    phase_taps[f] = taps;
    for (int64_t k = wx.kernel - 1; k >= 0; k--) {
      if (k * wx.dilation % wx.stride != f) continue;
      shift[taps] = k * wx.dilation / wx.stride;
      number[taps++] = C(k);
    }
    phase_taps[f + 1] = taps;
  }
  const int64_t places = (wx.in + wx.padding + wx.stride - 1) / wx.stride;

  for (int64_t r = begin; r < end; r++) {
    const Place at(p, r, wz.in, wy.in);
    const int64_t plane = at.batch * p.channels + at.channel;
    const int64_t from = at.batch * p.out[0] + at.channel * p.out[1];
    const int64_t from_code = at.batch * p.code[0] + at.channel * p.code[1];
    int count = 0;
    for (int64_t i = wz.back_begin[at.z]; i < wz.back_begin[at.z + 1]; i++) {
      const PoolTap tz = wz.back[i];
      for (int64_t j = wy.back_begin[at.y]; j < wy.back_begin[at.y + 1]; j++) {
        const PoolTap ty = wy.back[j];
        const int64_t slot = tz.o % p.ring_z * p.ring_y + ty.o % p.ring_y;
        const int64_t id = (plane * wz.out + tz.o) * wy.out + ty.o;
        C* row = slots + slot * slot_size;
        if (owner[slot] != id) {
          owner[slot] = id;
          const T* g = out + from + tz.o * p.out[2] + ty.o * p.out[3];
          C* to = row + p.lead;
          const V by =
              V::set1(p.divisor != 0 ? C(p.divisor) : C(wz.divisor[tz.o] * wy.divisor[ty.o]));
          if (p.out[4] != 1)
            for (int64_t o = 0; o < wx.out; o++) to[o] = wide(g[o * p.out[4]]);
          for (int64_t o = 0; o < wx.out; o += V::width) {
            const int lanes = int(wx.out - o < V::width ? wx.out - o : V::width);
            V v = p.out[4] == 1 ? load_lanes<V>(g + o, lanes) : load_lanes<V>(to + o, lanes);
            if constexpr (!coded)
              v = v / (p.divisor != 0 ? by : by * load_lanes<V>(divisor + o, lanes));
            store_lanes(to + o, v, lanes);
          }
          if constexpr (coded) {
            C* to_code = to + p.row;
            const int64_t place = from_code + tz.o * p.code[2] + ty.o * p.code[3];
            if (p.code[4] != 1)
              for (int64_t o = 0; o < wx.out; o++)
                to_code[o] = C(code_at(codes, p.wide_codes, place + o * p.code[4]));
            else
              for (int64_t o = 0; o < wx.out; o += V::width) {
                const int lanes = int(wx.out - o < V::width ? wx.out - o : V::width);
                store_lanes(to_code + o, get_codes<V>(codes, p.wide_codes, place + o, lanes),
                            lanes);
              }
          }
        }
        rows[count] = row + p.lead;
        row_code[count++] = C((tz.k * wy.kernel + ty.k) * wx.kernel);
      }
    }
    T* to = x + at.offset(p.x);
    if constexpr (!coded) {
      for (int64_t o = 0; o < wx.out; o += V::width) {
        V v = V::zero();
        for (int k = 0; k < count; k++) v = v + V::load(rows[k] + o);
        const int lanes = int(wx.out - o < V::width ? wx.out - o : V::width);
        store_lanes(sum + p.lead + o, v, lanes);
      }
      rows[0] = sum + p.lead;
      if (p.segments) {
        fill(phases, wx.in, C(0));
        for (int64_t o = 0; o < wx.out; o++) {
          C* segment = phases + wx.begin[o] + wx.first[o];
          const C v = rows[0][o];
          for (int64_t i = 0; i < wx.count[o]; i++) segment[i] += v;
        }
        store_row(phases, to, p.x[4], wx.in);
        continue;
      }
      count = 1;
    }
    for (int64_t f = 0; f < phase_count; f++) {
      const int64_t t0 = phase_taps[f], t1 = phase_taps[f + 1];
      C* phase = phases + f * length;
      for (int64_t j = 0; j < places; j += V::width) {
        V v = V::zero();
        for (int k = 0; k < count; k++) {
          for (int64_t t = t0; t < t1; t++) {
            const C* g = rows[k] + j - shift[t];
            if constexpr (coded) {
              const auto hit = eq(V::load(g + p.row), V::set1(row_code[k] + number[t]));
              v = select(hit, v + V::load(g), v);
            } else {
              v = v + V::load(g);
            }
          }
        }
        v.store(phase + j);
      }
    }
    join_row(phases, wx, length, to, p.x[4]);
  }
}

// ---- channels that lie together
// -------------------------------------------------------------------

// `vectors` of them, or `lanes` of one.
template <class T, int mode, int vectors>
static FASTNN_INLINE void window_of_channels(const PoolPlan& p, const T* x, T* out, char* codes,
                                             int64_t code_place, const int64_t* at, int lanes) {
  using V = typename Compute<T>::V;
  using C = typename V::T;
  const PoolWindows &wz = p.axis[0], &wy = p.axis[1], &wx = p.axis[2];
  const int64_t oz = at[0], oy = at[1], ox = at[2];
  const int64_t kz = wz.first[oz], ky = wy.first[oy], kx = wx.first[ox];
  const T* corner = x + (wz.begin[oz] + kz * wz.dilation) * p.x[2] +
                    (wy.begin[oy] + ky * wy.dilation) * p.x[3] +
                    (wx.begin[ox] + kx * wx.dilation) * p.x[4];
  const int64_t step_z = wz.dilation * p.x[2], step_y = wy.dilation * p.x[3],
                step_x = wx.dilation * p.x[4];
  V value[vectors], code[vectors];
  for (int u = 0; u < vectors; u++) {
    value[u] = mode == kSum ? V::zero() : V::set1(C(kLowest));
    code[u] = V::set1(C((kz * wy.kernel + ky) * wx.kernel + kx));
  }
  for (int64_t i = 0; i < wz.count[oz]; i++) {
    for (int64_t j = 0; j < wy.count[oy]; j++) {
      const T* from = corner + i * step_z + j * step_y;
      C number = C(((kz + i) * wy.kernel + ky + j) * wx.kernel + kx);
      V part[vectors];
      if constexpr (mode == kSum)
        for (int u = 0; u < vectors; u++) part[u] = V::zero();
      for (int64_t k = 0; k < wx.count[ox]; k++, from += step_x, number += 1) {
        for (int u = 0; u < vectors; u++) {
          const V v = load_lanes<V>(from + u * V::width, lanes);
          if constexpr (mode == kSum)
            part[u] = part[u] + v;
          else
            take<mode>(value[u], code[u], v, V::set1(number));
        }
      }
      if constexpr (mode == kSum)
        for (int u = 0; u < vectors; u++) value[u] = value[u] + part[u];
    }
  }
  const V by =
      V::set1(p.divisor != 0 ? C(p.divisor) : C(wz.divisor[oz] * wy.divisor[oy] * wx.divisor[ox]));
  for (int u = 0; u < vectors; u++) {
    if constexpr (mode == kSum) value[u] = value[u] / by;
    store_lanes(out + u * V::width, value[u], lanes);
    if constexpr (mode == kMaxCodes)
      put_codes(codes, p.wide_codes, code_place + u * V::width, code[u], lanes);
  }
}

template <class T, int mode>
static void forward_channels(const PoolPlan& p, char* x_, char* out_, char* codes, int64_t row,
                             int64_t channels) {
  constexpr int w = Compute<T>::V::width;
  const T* x = reinterpret_cast<const T*>(x_);
  T* out = reinterpret_cast<T*>(out_);
  int64_t at[3] = {row / p.axis[1].out, row % p.axis[1].out, 0};
  for (; at[2] < p.axis[2].out; at[2]++) {
    T* to = out + at[0] * p.out[2] + at[1] * p.out[3] + at[2] * p.out[4];
    const int64_t code = at[0] * p.code[2] + at[1] * p.code[3] + at[2] * p.code[4];
    int64_t c = 0;
    for (; c + 4 * w <= channels; c += 4 * w)
      window_of_channels<T, mode, 4>(p, x + c, to + c, codes, code + c, at, w);
    for (; c + w <= channels; c += w)
      window_of_channels<T, mode, 1>(p, x + c, to + c, codes, code + c, at, w);
    if (c < channels)
      window_of_channels<T, mode, 1>(p, x + c, to + c, codes, code + c, at, int(channels - c));
  }
}

template <class T, bool coded, int vectors>
static FASTNN_INLINE void element_of_channels(const PoolPlan& p, T* x, const T* out,
                                              const char* codes, int64_t c, const int64_t* at,
                                              int lanes) {
  using V = typename Compute<T>::V;
  using C = typename V::T;
  const PoolWindows &wz = p.axis[0], &wy = p.axis[1], &wx = p.axis[2];
  V sum[vectors];
  for (int u = 0; u < vectors; u++) sum[u] = V::zero();
  for (int64_t i = wz.back_begin[at[0]]; i < wz.back_begin[at[0] + 1]; i++) {
    const PoolTap tz = wz.back[i];
    for (int64_t j = wy.back_begin[at[1]]; j < wy.back_begin[at[1] + 1]; j++) {
      const PoolTap ty = wy.back[j];
      for (int64_t k = wx.back_begin[at[2]]; k < wx.back_begin[at[2] + 1]; k++) {
        const PoolTap tx = wx.back[k];
        const T* g = out + c + tz.o * p.out[2] + ty.o * p.out[3] + tx.o * p.out[4];
        if constexpr (coded) {
          const int64_t place = c + tz.o * p.code[2] + ty.o * p.code[3] + tx.o * p.code[4];
          const V number = V::set1(C((tz.k * wy.kernel + ty.k) * wx.kernel + tx.k));
          for (int u = 0; u < vectors; u++) {
            const auto hit =
                eq(get_codes<V>(codes, p.wide_codes, place + u * V::width, lanes), number);
            sum[u] = select(hit, sum[u] + load_lanes<V>(g + u * V::width, lanes), sum[u]);
          }
        } else {
          const V by =
              V::set1(p.divisor != 0 ? C(p.divisor)
                                     : C(wz.divisor[tz.o] * wy.divisor[ty.o] * wx.divisor[tx.o]));
          for (int u = 0; u < vectors; u++)
            sum[u] = sum[u] + load_lanes<V>(g + u * V::width, lanes) / by;
        }
      }
    }
  }
  for (int u = 0; u < vectors; u++) {
    T* to = x + c + u * V::width;
    if (p.around_caches && lanes == V::width && uintptr_t(to) % (sizeof(T) * V::width) == 0)
      stream(to, sum[u]);
    else
      store_lanes(to, sum[u], lanes);
  }
}

template <class T, bool coded>
static void backward_channels(const PoolPlan& p, char* x_, char* out_, char* codes, int64_t row,
                              int64_t channels) {
  constexpr int w = Compute<T>::V::width;
  T* x = reinterpret_cast<T*>(x_);
  const T* out = reinterpret_cast<const T*>(out_);
  int64_t at[3] = {row / p.axis[1].in, row % p.axis[1].in, 0};
  for (; at[2] < p.axis[2].in; at[2]++) {
    T* to = x + at[0] * p.x[2] + at[1] * p.x[3] + at[2] * p.x[4];
    int64_t c = 0;
    for (; c + 4 * w <= channels; c += 4 * w)
      element_of_channels<T, coded, 4>(p, to, out, codes, c, at, w);
    for (; c + w <= channels; c += w) element_of_channels<T, coded, 1>(p, to, out, codes, c, at, w);
    if (c < channels) element_of_channels<T, coded, 1>(p, to, out, codes, c, at, int(channels - c));
  }
}

// ---- outputs one by one
// ---------------------------------------------------------------------------

template <class T>
static void scatter(const PoolPlan& p, char* x_, char* out_, char* codes, int64_t channels,
                    char* sums_) {
  using C = typename Compute<T>::V::T;
  T* x = reinterpret_cast<T*>(x_);
  const T* out = reinterpret_cast<const T*>(out_);
  C* sums = reinterpret_cast<C*>(sums_);
  const PoolWindows &wz = p.axis[0], &wy = p.axis[1], &wx = p.axis[2];
  const int64_t elements = wz.in * wy.in * wx.in;
  fill(sums, elements * channels, C(0));
  for (int64_t z = 0; z < wz.out; z++)
    for (int64_t y = 0; y < wy.out; y++)
      for (int64_t o = 0; o < wx.out; o++) {
        const int64_t corner = (wz.begin[z] * wy.in + wy.begin[y]) * wx.in + wx.begin[o];
        const T* g = out + z * p.out[2] + y * p.out[3] + o * p.out[4];
        const int64_t place = z * p.code[2] + y * p.code[3] + o * p.code[4];
        for (int64_t c = 0; c < channels; c++) {
          const int64_t code = code_at(codes, p.wide_codes, place + c * p.code[1]);
          // Codes are an argument of the op: what is none of its own must not lead out of memory.
          if (uint64_t(code) >= uint64_t(p.taps)) continue;
          const int64_t at = corner + p.tap_position[code];
          if (uint64_t(at) < uint64_t(elements)) sums[at * channels + c] += wide(g[c * p.out[1]]);
        }
      }
  for (int64_t z = 0; z < wz.in; z++)
    for (int64_t y = 0; y < wy.in; y++) {
      T* to = x + z * p.x[2] + y * p.x[3];
      const C* from = sums + (z * wy.in + y) * wx.in * channels;
      if (channels == 1)
        store_row(from, to, p.x[4], wx.in);
      else
        for (int64_t i = 0; i < wx.in; i++)
          store_row(from + i * channels, to + i * p.x[4], p.x[1], channels);
    }
}

template <class T>
static constexpr PoolKernels::OfType kernels_of = {forward_planes<T, kMax>,
                                                   forward_planes<T, kMaxCodes>,
                                                   forward_planes<T, kSum>,
                                                   backward_planes<T, true>,
                                                   backward_planes<T, false>,
                                                   forward_channels<T, kMax>,
                                                   forward_channels<T, kMaxCodes>,
                                                   forward_channels<T, kSum>,
                                                   backward_channels<T, true>,
                                                   backward_channels<T, false>,
                                                   scatter<T>};
static const PoolKernels table = {
    {kernels_of<float>, kernels_of<double>, kernels_of<bf16>, kernels_of<f16>}};

}  // namespace fastnn::FASTNN_TARGET
