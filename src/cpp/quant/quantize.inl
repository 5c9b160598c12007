// The quantization kernels of one instruction set. Included by the files in kernels/, which define
// FASTNN_TARGET; see isa/vec.hpp for why nothing here may be shared between targets.
//
// A run is worked on in chunks that stay in L1. What lies strided, in float64, packed or in groups
// too short for a loop of their own goes through a buffer of a chunk, so that the inner loops know
// two cases only: one scale, or a scale an element.
#include "isa/float8.hpp"
#include "isa/philox.hpp"
#include "isa/rounding.hpp"
#include "isa/stream.hpp"
#include "quant/quantize.hpp"

namespace fastnn::FASTNN_TARGET {

constexpr int64_t kChunk = 1024;
constexpr int64_t kLanes = VecF32::width;
constexpr int64_t kBlock = Bytes::count;  // four vectors
// A buffer ends so far behind a chunk that whole vectors can be read of it.
constexpr int64_t kBuffer = kChunk + kBlock;

static FASTNN_INLINE float as_f32(double x) { return float(x); }
template <class T>
static FASTNN_INLINE float as_f32(T x) {
  return to_f32(x);
}
static FASTNN_INLINE void put(double& to, float x) { to = x; }
template <class T>
static FASTNN_INLINE void put(T& to, float x) {
  from_f32(to, x);
}
template <class T>
static FASTNN_INLINE void gather(const T* x, int64_t stride, int64_t n, float* to) {
  if (stride == 1)
    for (int64_t i = 0; i < n; i++) to[i] = as_f32(x[i]);
  else
    for (int64_t i = 0; i < n; i++) to[i] = as_f32(x[i * stride]);
}

// ---- schemes -----------------------------------------------------------------------------------

template <int least, int most>
struct Integers {
  template <class Round>
  static FASTNN_INLINE VecI32 encode(VecF32 y, VecF32 zero, Round round) {
    y = select(is_nan(y), VecF32::zero(), y);
    const VecF32 q = round(y) + zero;
    return to_int(min(VecF32::set1(most), max(VecF32::set1(least), q)));
  }
  static FASTNN_INLINE Bytes pack(VecI32 a, VecI32 b, VecI32 c, VecI32 d) {
    return least < 0 ? pack_s8(a, b, c, d) : pack_u8(a, b, c, d);
  }
  static FASTNN_INLINE VecF32 decode(const uint8_t* q, int64_t lanes) {
    if (least < 0) return to_float(lanes == kLanes ? load_s8(q) : load_s8_partial(q, int(lanes)));
    return to_float(lanes == kLanes ? load_u8(q) : load_u8_partial(q, int(lanes)));
  }
};
template <class F>
struct Floats {
  template <class Round>
  static FASTNN_INLINE VecI32 encode(VecF32 y, VecF32, Round round) {
    return F::encode(y, round);
  }
  static FASTNN_INLINE Bytes pack(VecI32 a, VecI32 b, VecI32 c, VecI32 d) {
    return pack_u8(a, b, c, d);
  }
  static FASTNN_INLINE VecF32 decode(const uint8_t* q, int64_t lanes) {
    return F::decode(lanes == kLanes ? load_u8(q) : load_u8_partial(q, int(lanes)));
  }
};
template <Scheme s>
struct CodeOf;
template <>
struct CodeOf<Scheme::s8> : Integers<-128, 127> {};
template <>
struct CodeOf<Scheme::u8> : Integers<0, 255> {};
template <>
struct CodeOf<Scheme::s4> : Integers<-8, 7> {};
template <>
struct CodeOf<Scheme::u4> : Integers<0, 15> {};
template <>
struct CodeOf<Scheme::e4m3> : Floats<E4M3> {};
template <>
struct CodeOf<Scheme::e5m2> : Floats<E5M2> {};

// ---- which scale -------------------------------------------------------------------------------

// One for all of a segment, or one an element.
struct Shared {
  VecF32 factor, zero;
  FASTNN_INLINE VecF32 factor_at(int64_t, int64_t) const { return factor; }
  FASTNN_INLINE VecF32 zero_at(int64_t, int64_t) const { return zero; }
};
struct Each {
  const float* factor;
  const float* zero;
  static FASTNN_INLINE VecF32 at(const float* p, int64_t n) {
    return n == kLanes ? VecF32::load(p) : VecF32::load_partial(p, int(n));
  }
  FASTNN_INLINE VecF32 factor_at(int64_t i, int64_t n) const { return at(factor + i, n); }
  FASTNN_INLINE VecF32 zero_at(int64_t i, int64_t n) const { return at(zero + i, n); }
};

// The scales of a run, chunk by chunk: calls segment(i, n, Shared or Each) for the elements of a
// chunk, which begin with element `begin` of the run.
struct Scales {
  const ScaledRun& run;
  // Groups that are as long are segments of their own; of shorter ones the scales are written out.
  const bool segments;
  // Whether the scales of one chunk serve for the next.
  const bool same;
  bool filled = false;
  float factor[kBuffer], zero[kBuffer];

  explicit Scales(const ScaledRun& run)
      : run(run),
        segments(run.group >= 512 ||
                 (run.group >= kBlock && run.group % kBlock == 0 && run.first % kBlock == 0)),
        same(run.group * run.period <= kChunk && kChunk % (run.group * run.period) == 0) {}

  template <class F>
  FASTNN_INLINE void chunk(int64_t begin, int64_t n, F segment) {
    const int64_t first = run.first + begin;
    int64_t scale = first / run.group % run.period, within = first % run.group;
    if (segments) {
      for (int64_t i = 0; i < n;) {
        const int64_t count = n - i < run.group - within ? n - i : run.group - within;
        const int64_t s = scale * run.stride;
        segment(i, count, Shared{VecF32::set1(run.factor[s]), VecF32::set1(run.zero[s])});
        i += count, within = 0;
        if (++scale == run.period) scale = 0;
      }
      return;
    }
    if (run.group == 1 && run.stride == 1 && run.period >= kBlock) {
      for (int64_t i = 0; i < n; scale = 0) {
        const int64_t count = n - i < run.period - scale ? n - i : run.period - scale;
        segment(i, count, Each{run.factor + scale, run.zero + scale});
        i += count;
      }
      return;
    }
    if (!filled || !same) fill_in(scale, within, same && run.n > kChunk ? kChunk : n);
    filled = true;
    segment(0, n, Each{factor, zero});
  }

 private:
  void fill_in(int64_t scale, int64_t within, int64_t n) {
    if (run.group % kLanes == 0 && within % kLanes == 0) {
      for (int64_t i = 0; i < n;) {
        const VecF32 f = VecF32::set1(run.factor[scale * run.stride]);
        const VecF32 z = VecF32::set1(run.zero[scale * run.stride]);
        for (; within < run.group && i < n; within += kLanes, i += kLanes)
          f.store(factor + i), z.store(zero + i);
        within = 0;
        if (++scale == run.period) scale = 0;
      }
      return;
    }
    for (int64_t i = 0; i < n; i++) {
      factor[i] = run.factor[scale * run.stride], zero[i] = run.zero[scale * run.stride];
      if (++within < run.group) continue;
      within = 0;
      if (++scale == run.period) scale = 0;
    }
  }
};

// ---- quantize ----------------------------------------------------------------------------------

template <class Code, bool stochastic, class T, class S>
static FASTNN_INLINE Bytes encode_block(const T* x, const S& scales, int64_t i, int64_t n,
                                        const uint32_t* words) {
  VecI32 q[4];
  for (int64_t k = 0; k < 4; k++) {
    const int64_t at = i + k * kLanes, rest = n - k * kLanes;
    const int64_t lanes = n == kBlock || rest >= kLanes ? kLanes : rest > 0 ? rest : 0;
    const VecF32 v =
        lanes == kLanes ? VecF32::load(x + at) : VecF32::load_partial(x + at, int(lanes));
    const VecF32 y = v * scales.factor_at(at, lanes), zero = scales.zero_at(at, lanes);
    if constexpr (stochastic)
      q[k] = Code::encode(y, zero, Stochastic{words + at});
    else
      q[k] = Code::encode(y, zero, Nearest{});
  }
  return Code::pack(q[0], q[1], q[2], q[3]);
}

template <class Code, bool stochastic, class T, class S>
static FASTNN_INLINE void encode(const T* x, S scales, const uint32_t* words, uint8_t* out,
                                 int64_t n, bool around_caches) {
  int64_t i = 0;
  auto part = [&](int64_t count) {
    encode_block<Code, stochastic>(x, scales, i, count, words).store_partial(out + i, int(count));
    i += count;
  };
  if (around_caches) {
    const int64_t beyond = int64_t(uintptr_t(out) % kBlock);
    if (beyond && n >= 2 * kBlock) part(kBlock - beyond);
    if (uintptr_t(out + i) % kBlock == 0)
      for (; i + kBlock <= n; i += kBlock)
        stream(out + i, encode_block<Code, stochastic>(x, scales, i, kBlock, words));
  }
  for (; i + kBlock <= n; i += kBlock)
    encode_block<Code, stochastic>(x, scales, i, kBlock, words).store(out + i);
  if (i < n) part(n - i);
}

template <class T, Scheme scheme, bool stochastic>
static void quantize(const ScaledRun& run) {
  using Code = CodeOf<scheme>;
  constexpr bool packed = scheme == Scheme::s4 || scheme == Scheme::u4;
  constexpr bool converted = sizeof(T) == 8;
  const T* x = static_cast<const T*>(run.from);
  uint8_t* out = static_cast<uint8_t*>(run.to);
  Scales scales(run);
  uint32_t words[stochastic ? kBuffer : 1];
  float numbers[kBuffer];
  uint8_t bytes[kBuffer];
  const bool direct = !packed && run.to_stride == 1;
  for (int64_t begin = 0; begin < run.n; begin += kChunk) {
    const int64_t n = run.n - begin < kChunk ? run.n - begin : kChunk;
    if (stochastic) philox_words(run.seed, run.element + uint64_t(begin), n, words);
    uint8_t* to = direct ? out + begin : bytes;
    const T* from = x + begin * run.from_stride;
    const bool around = direct && run.around_caches;
    auto each = [&](auto source) {
      scales.chunk(begin, n, [&](int64_t i, int64_t count, auto s) {
        encode<Code, stochastic>(source + i, s, words + i, to + i, count, around);
      });
    };
    if constexpr (converted) {
      gather(from, run.from_stride, n, numbers);
      each(static_cast<const float*>(numbers));
    } else if (run.from_stride == 1) {
      each(from);
    } else {
      gather(from, run.from_stride, n, numbers);
      each(static_cast<const float*>(numbers));
    }
    if (packed) {
      uint8_t* half = out + begin / 2;
      int64_t i = 0;
      for (; i + kBlock <= n; i += kBlock) {
        Bytes block;
        __builtin_memcpy(&block, bytes + i, sizeof(block));
        store_nibbles(half + i / 2, block);
      }
      for (; i < n; i += 2) half[i / 2] = uint8_t((bytes[i] & 15) | bytes[i + 1] << 4);
    } else if (!direct) {
      for (int64_t i = 0; i < n; i++) out[(begin + i) * run.to_stride] = bytes[i];
    }
  }
  if (run.around_caches) end_stream();
}

// ---- dequantize --------------------------------------------------------------------------------

template <class T, Scheme scheme>
static void dequantize(const ScaledRun& run) {
  using Code = CodeOf<scheme>;
  constexpr bool packed = scheme == Scheme::s4 || scheme == Scheme::u4;
  constexpr bool converted = sizeof(T) == 8;
  const uint8_t* q = static_cast<const uint8_t*>(run.from);
  T* out = static_cast<T*>(run.to);
  Scales scales(run);
  float numbers[kBuffer];
  uint8_t bytes[kBuffer];
  for (int64_t begin = 0; begin < run.n; begin += kChunk) {
    const int64_t n = run.n - begin < kChunk ? run.n - begin : kChunk;
    const uint8_t* from = q + begin * run.from_stride;
    if (packed) {
      const uint8_t* half = q + begin / 2;
      int64_t i = 0;
      for (; i + kBlock <= n; i += kBlock) {
        Bytes block = load_nibbles(half + i / 2);
        block.store(bytes + i);
      }
      for (; i < n; i++) bytes[i] = uint8_t(half[i / 2] >> 4 * (i % 2) & 15);
      if (scheme == Scheme::s4)
        for (i = 0; i < n; i++) bytes[i] = uint8_t((bytes[i] ^ 8) - 8);
      from = bytes;
    } else if (run.from_stride != 1) {
      for (int64_t i = 0; i < n; i++) bytes[i] = from[i * run.from_stride];
      from = bytes;
    }
    auto each = [&]<class To>(To* to, bool around) {
      scales.chunk(begin, n, [&](int64_t start, int64_t count, auto s) {
        fill<To, VecF32>(to + start, count, around,
                         [&](int64_t i, int lanes) __attribute__((always_inline)) {
                           const VecF32 y = Code::decode(from + start + i, lanes);
                           return (y - s.zero_at(i, lanes)) * s.factor_at(i, lanes);
                         });
      });
    };
    T* to = out + begin * run.to_stride;
    if constexpr (!converted) {
      if (run.to_stride == 1) {
        each(to, run.around_caches);
        continue;
      }
    }
    each(static_cast<float*>(numbers), false);
    for (int64_t i = 0; i < n; i++) put(to[i * run.to_stride], numbers[i]);
  }
  if (run.around_caches) end_stream();
}

// ---- the range of the finite values ------------------------------------------------------------

static FASTNN_INLINE VecF32 finite(VecF32 v) {
  return select(lt(abs(v), VecF32::set1(__builtin_inff())), v, VecF32::zero());
}
static FASTNN_INLINE void spread_of(VecF32 low, VecF32 high, float& least, float& most) {
  float l[kLanes], h[kLanes];
  low.store(l), high.store(h);
  for (int64_t i = 0; i < kLanes; i++) {
    least = l[i] < least ? l[i] : least;
    most = h[i] > most ? h[i] : most;
  }
}

template <class T>
static FASTNN_INLINE void range_of(const T* x, int64_t n, float& least, float& most) {
  VecF32 low[4], high[4];
  for (int k = 0; k < 4; k++) low[k] = high[k] = VecF32::zero();
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock)
    for (int k = 0; k < 4; k++) {
      const VecF32 v = finite(VecF32::load(x + i + k * kLanes));
      low[k] = min(low[k], v), high[k] = max(high[k], v);
    }
  for (; i < n; i += kLanes) {
    const VecF32 v =
        finite(n - i >= kLanes ? VecF32::load(x + i) : VecF32::load_partial(x + i, int(n - i)));
    low[0] = min(low[0], v), high[0] = max(high[0], v);
  }
  spread_of(min(min(low[0], low[1]), min(low[2], low[3])),
            max(max(high[0], high[1]), max(high[2], high[3])), least, most);
}

template <class T>
static FASTNN_INLINE void range_of_each(const T* x, int64_t n, float* low, float* high) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const VecF32 v = finite(VecF32::load(x + i));
    min(VecF32::load(low + i), v).store(low + i);
    max(VecF32::load(high + i), v).store(high + i);
  }
  if (i == n) return;
  const int rest = int(n - i);
  const VecF32 v = finite(VecF32::load_partial(x + i, rest));
  min(VecF32::load_partial(low + i, rest), v).store_partial(low + i, rest);
  max(VecF32::load_partial(high + i, rest), v).store_partial(high + i, rest);
}

template <class T>
static void range(const RangeRun& run) {
  float numbers[kBuffer];
  for (int64_t g = 0; g < run.count; g++) {
    const T* x = static_cast<const T*>(run.x) + g * run.n * run.stride;
    auto part = [&](auto* from, int64_t begin, int64_t n) {
      if (run.each)
        range_of_each(from, n, run.low + begin, run.high + begin);
      else
        range_of(from, n, run.low[g], run.high[g]);
    };
    if constexpr (sizeof(T) != 8) {
      if (run.stride == 1) {
        part(x, 0, run.n);
        continue;
      }
    }
    for (int64_t i = 0; i < run.n; i += kChunk) {
      const int64_t n = run.n - i < kChunk ? run.n - i : kChunk;
      gather(x + i * run.stride, run.stride, n, numbers);
      part(static_cast<const float*>(numbers), i, n);
    }
  }
}

#define FASTNN_BOTH(T, s) {quantize<T, s, false>, quantize<T, s, true>}
#define FASTNN_QUANTIZE(T)                                                               \
  {FASTNN_BOTH(T, Scheme::s8), FASTNN_BOTH(T, Scheme::u8),   FASTNN_BOTH(T, Scheme::s4), \
   FASTNN_BOTH(T, Scheme::u4), FASTNN_BOTH(T, Scheme::e4m3), FASTNN_BOTH(T, Scheme::e5m2)}
#define FASTNN_DEQUANTIZE(T)                                                          \
  {dequantize<T, Scheme::s8>, dequantize<T, Scheme::u8>,   dequantize<T, Scheme::s4>, \
   dequantize<T, Scheme::u4>, dequantize<T, Scheme::e4m3>, dequantize<T, Scheme::e5m2>}
static const QuantizeKernels quantize_table = {
    {FASTNN_QUANTIZE(float), FASTNN_QUANTIZE(double), FASTNN_QUANTIZE(bf16), FASTNN_QUANTIZE(f16)},
    {FASTNN_DEQUANTIZE(float), FASTNN_DEQUANTIZE(double), FASTNN_DEQUANTIZE(bf16),
     FASTNN_DEQUANTIZE(f16)},
    {range<float>, range<double>, range<bf16>, range<f16>}};
#undef FASTNN_BOTH
#undef FASTNN_QUANTIZE
#undef FASTNN_DEQUANTIZE

}  // namespace fastnn::FASTNN_TARGET
