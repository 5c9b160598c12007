// The quantization kernels of one instruction set. Included by the files in kernels/, which define
// FASTNN_TARGET; see isa/vec.hpp for why nothing here may be shared between targets.
//
// A run is worked on in chunks that stay in L1. What lies strided, is no float32, is packed or is
// in groups too short for a loop of their own goes through a buffer of a chunk, so that the inner
// loops know dense float32, bytes, and two cases of scales: one for all, or one an element.
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

static FASTNN_INLINE VecF32 load_some(const float* p, int64_t n) {
  return n == kLanes ? VecF32::load(p) : VecF32::load_partial(p, int(n));
}

// ---- to and from float32 -----------------------------------------------------------------------

static FASTNN_INLINE float as_f32(double x) { return float(x); }
static FASTNN_INLINE void put(double& to, float x) { to = x; }
template <class T>
static FASTNN_INLINE float as_f32(T x) {
  return to_f32(x);
}
template <class T>
static FASTNN_INLINE void put(T& to, float x) {
  from_f32(to, x);
}

// n numbers from x on, as float32.
using Gather = void (*)(const void* x, int64_t stride, int64_t n, float* to);
template <class T>
static void gather(const void* x_, int64_t stride, int64_t n, float* to) {
  const T* x = static_cast<const T*>(x_);
  int64_t i = 0;
  if constexpr (sizeof(T) != 8)
    if (stride == 1)
      for (; i + kLanes <= n; i += kLanes) VecF32::load(x + i).store(to + i);
  for (; i < n; i++) to[i] = as_f32(x[i * stride]);
}

// And back, rounded once.
using Scatter = void (*)(const float* from, void* x, int64_t stride, int64_t n, bool around_caches);
template <class T>
static void scatter(const float* from, void* x_, int64_t stride, int64_t n, bool around_caches) {
  T* x = static_cast<T*>(x_);
  if constexpr (sizeof(T) != 8)
    if (stride == 1)
      return fill<T, VecF32>(x, n, around_caches,
                             [=](int64_t i, int lanes) __attribute__((always_inline)) {
                               return load_some(from + i, lanes);
                             });
  for (int64_t i = 0; i < n; i++) put(x[i * stride], from[i]);
}

// ---- which scale -------------------------------------------------------------------------------

// The scales of a run, chunk by chunk.
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

  // Calls segment(i, n, factor, zero, each) for the n elements of a chunk, which begin with element
  // `begin` of the run: there is one factor, or with `each` one for each of them.
  template <class F>
  FASTNN_INLINE void chunk(int64_t begin, int64_t n, F segment) {
    const int64_t first = run.first + begin;
    int64_t scale = first / run.group % run.period, within = first % run.group;
    if (segments) {
      for (int64_t i = 0; i < n;) {
        const int64_t count = n - i < run.group - within ? n - i : run.group - within;
        segment(i, count, run.factor + scale * run.stride, run.zero + scale * run.stride, false);
        i += count, within = 0;
        if (++scale == run.period) scale = 0;
      }
    } else if (run.group == 1 && run.stride == 1 && run.period >= kBlock) {
      for (int64_t i = 0; i < n; scale = 0) {
        const int64_t count = n - i < run.period - scale ? n - i : run.period - scale;
        segment(i, count, run.factor + scale, run.zero + scale, true);
        i += count;
      }
    } else {
      if (!filled || !same) write_out(scale, within, same && run.n > kChunk ? kChunk : n);
      filled = true;
      segment(0, n, factor, zero, true);
    }
  }

 private:
  void write_out(int64_t scale, int64_t within, int64_t n) {
    const bool vectors = run.group % kLanes == 0 && within % kLanes == 0;
    for (int64_t i = 0; i < n;) {
      const float f = run.factor[scale * run.stride], z = run.zero[scale * run.stride];
      const int64_t end = n - i < run.group - within ? n : i + run.group - within;
      if (vectors)
        for (; i < end; i += kLanes)
          VecF32::set1(f).store(factor + i), VecF32::set1(z).store(zero + i);
      else
        for (; i < end; i++) factor[i] = f, zero[i] = z;
      within = 0;
      if (++scale == run.period) scale = 0;
    }
  }
};

// ---- quantize ----------------------------------------------------------------------------------

struct Segment {
  const float* x;
  const float* factor;
  const float* zero;
  const uint32_t* words;
  Limits limits;
  uint8_t* q;
  int64_t n;
  bool around_caches;
};
using Encode = void (*)(const Segment&);

// Numbers of a scheme, before they are packed: the integers within the limits, or a float's codes.
struct Signed {
  static constexpr bool is_signed = true;
};
struct Unsigned {
  static constexpr bool is_signed = false;
};
template <class Code, class Round>
static FASTNN_INLINE VecI32 encode_lanes(VecF32 y, VecF32 zero, VecF32 least, VecF32 most,
                                         Round round) {
  if constexpr (requires { Code::is_signed; }) {
    y = select(is_nan(y), VecF32::zero(), y);
    return to_int(min(most, max(least, round(y) + zero)));
  } else {
    return Code::encode(y, round);
  }
}

template <class Code, bool stochastic, bool each>
static FASTNN_INLINE Bytes encode_block(const Segment& s, VecF32 least, VecF32 most, int64_t i,
                                        int64_t n) {
  VecI32 q[4];
  for (int64_t k = 0; k < 4; k++) {
    const int64_t at = i + k * kLanes, rest = n - k * kLanes;
    const int64_t lanes = n == kBlock || rest >= kLanes ? kLanes : rest > 0 ? rest : 0;
    const VecF32 factor = each ? load_some(s.factor + at, lanes) : VecF32::set1(*s.factor);
    const VecF32 zero = each ? load_some(s.zero + at, lanes) : VecF32::set1(*s.zero);
    // With a scale an element a fifth quicker, measured.
    if (each) __builtin_prefetch(s.x + at + kChunk);
    const VecF32 y = load_some(s.x + at, lanes) * factor;
    if constexpr (stochastic)
      q[k] = encode_lanes<Code>(y, zero, least, most, Stochastic{s.words + at});
    else
      q[k] = encode_lanes<Code>(y, zero, least, most, Nearest{});
  }
  if constexpr (requires { Code::is_signed; })
    if (Code::is_signed) return pack_s8(q[0], q[1], q[2], q[3]);
  return pack_u8(q[0], q[1], q[2], q[3]);
}

template <class Code, bool stochastic, bool each>
static void encode(const Segment& s) {
  const VecF32 least = VecF32::set1(s.limits.least), most = VecF32::set1(s.limits.most);
  int64_t i = 0;
  // The last ones; and before stores around the caches those up to the first whole line.
  auto part = [&](int64_t count) __attribute__((noinline)) {
    const Bytes bytes = encode_block<Code, stochastic, each>(s, least, most, i, count);
    bytes.store_partial(s.q + i, int(count));
    i += count;
  };
  if (s.around_caches) {
    const int64_t beyond = int64_t(uintptr_t(s.q) % kBlock);
    if (beyond && s.n >= 2 * kBlock) part(kBlock - beyond);
    if (uintptr_t(s.q + i) % kBlock == 0)
      for (; i + kBlock <= s.n; i += kBlock)
        stream(s.q + i, encode_block<Code, stochastic, each>(s, least, most, i, kBlock));
  }
  for (; i + kBlock <= s.n; i += kBlock)
    encode_block<Code, stochastic, each>(s, least, most, i, kBlock).store(s.q + i);
  if (i < s.n) part(s.n - i);
}

// n is even.
static void pack_nibbles(const uint8_t* bytes, int64_t n, uint8_t* to) {
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    Bytes block;
    __builtin_memcpy(&block, bytes + i, sizeof(block));
    store_nibbles(to + i / 2, block);
  }
  for (; i < n; i += 2) to[i / 2] = uint8_t((bytes[i] & 15) | bytes[i + 1] << 4);
}

static void quantize_run(const ScaledRun& run, int64_t item, Gather gather, Limits limits,
                         bool packed, bool stochastic, Encode shared, Encode each) {
  uint8_t* out = static_cast<uint8_t*>(run.to);
  Scales scales(run);
  uint32_t words[kBuffer];
  float numbers[kBuffer];
  uint8_t bytes[kBuffer];
  const bool in_place = item == 4 && run.from_stride == 1, direct = !packed && run.to_stride == 1;
  for (int64_t begin = 0; begin < run.n; begin += kChunk) {
    const int64_t n = run.n - begin < kChunk ? run.n - begin : kChunk;
    if (stochastic) philox_words(run.seed, run.element + uint64_t(begin), n, words);
    const char* from = static_cast<const char*>(run.from) + begin * run.from_stride * item;
    if (!in_place) gather(from, run.from_stride, n, numbers);
    const float* x = in_place ? reinterpret_cast<const float*>(from) : numbers;
    uint8_t* q = direct ? out + begin : bytes;
    scales.chunk(
        begin, n,
        [&](int64_t i, int64_t count, const float* factor, const float* zero, bool one_each) {
          (one_each ? each : shared)(
              {x + i, factor, zero, words + i, limits, q + i, count, direct && run.around_caches});
        });
    if (packed)
      pack_nibbles(bytes, n, out + begin / 2);
    else if (!direct)
      for (int64_t i = 0; i < n; i++) out[(begin + i) * run.to_stride] = bytes[i];
  }
  if (run.around_caches) end_stream();
}

// ---- dequantize --------------------------------------------------------------------------------

using Decode = void (*)(const uint8_t* q, const float* factor, const float* zero, float* out,
                        int64_t n, bool around_caches);

template <class Code>
static FASTNN_INLINE VecF32 decode_lanes(const uint8_t* q, int n) {
  const bool all = n == kLanes;
  if constexpr (requires { Code::is_signed; }) {
    if (Code::is_signed) return to_float(all ? load_s8(q) : load_s8_partial(q, n));
    return to_float(all ? load_u8(q) : load_u8_partial(q, n));
  } else {
    return Code::decode(all ? load_u8(q) : load_u8_partial(q, n));
  }
}

template <class Code, bool each>
static void decode(const uint8_t* q, const float* factor, const float* zero, float* out, int64_t n,
                   bool around_caches) {
  const VecF32 f = VecF32::set1(*factor), z = VecF32::set1(*zero);
  fill<float, VecF32>(out, n, around_caches,
                      [=](int64_t i, int lanes) __attribute__((always_inline)) {
                        const VecF32 y = decode_lanes<Code>(q + i, lanes);
                        if constexpr (each)
                          return (y - load_some(zero + i, lanes)) * load_some(factor + i, lanes);
                        return (y - z) * f;
                      });
}

static void unpack_nibbles(const uint8_t* from, int64_t n, bool is_signed, uint8_t* bytes) {
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) load_nibbles(from + i / 2).store(bytes + i);
  for (; i < n; i++) bytes[i] = uint8_t(from[i / 2] >> 4 * (i % 2) & 15);
  if (is_signed)
    for (i = 0; i < n; i++) bytes[i] = uint8_t((bytes[i] ^ 8) - 8);
}

static void dequantize_run(const ScaledRun& run, int64_t item, Scatter scatter, bool packed,
                           bool is_signed, Decode shared, Decode each) {
  const uint8_t* in = static_cast<const uint8_t*>(run.from);
  Scales scales(run);
  float numbers[kBuffer];
  uint8_t bytes[kBuffer];
  const bool direct = item == 4 && run.to_stride == 1;
  for (int64_t begin = 0; begin < run.n; begin += kChunk) {
    const int64_t n = run.n - begin < kChunk ? run.n - begin : kChunk;
    const uint8_t* q = bytes;
    if (packed)
      unpack_nibbles(in + begin / 2, n, is_signed, bytes);
    else if (run.from_stride == 1)
      q = in + begin;
    else
      for (int64_t i = 0; i < n; i++) bytes[i] = in[(begin + i) * run.from_stride];
    char* to = static_cast<char*>(run.to) + begin * run.to_stride * item;
    float* x = direct ? reinterpret_cast<float*>(to) : numbers;
    scales.chunk(
        begin, n,
        [&](int64_t i, int64_t count, const float* factor, const float* zero, bool one_each) {
          (one_each ? each : shared)(q + i, factor, zero, x + i, count,
                                     direct && run.around_caches);
        });
    if (!direct) scatter(numbers, to, run.to_stride, n, run.around_caches);
  }
  if (run.around_caches) end_stream();
}

// ---- the range of the finite values ------------------------------------------------------------

static FASTNN_INLINE VecF32 finite(VecF32 v) {
  return select(lt(abs(v), VecF32::set1(__builtin_inff())), v, VecF32::zero());
}
#if FASTNN_TARGET_ID == 2
static FASTNN_INLINE float least_of(VecF32 v) { return _mm512_reduce_min_ps(v.r); }
static FASTNN_INLINE float most_of(VecF32 v) { return _mm512_reduce_max_ps(v.r); }
#else
static FASTNN_INLINE float least_of(VecF32 v) {
  float least = v.r[0];
  for (int i = 1; i < kLanes; i++) least = v.r[i] < least ? v.r[i] : least;
  return least;
}
static FASTNN_INLINE float most_of(VecF32 v) {
  float most = v.r[0];
  for (int i = 1; i < kLanes; i++) most = v.r[i] > most ? v.r[i] : most;
  return most;
}
#endif

template <class Kept>
static FASTNN_INLINE void extremes(const float* x, int64_t n, float& least, float& most,
                                   Kept kept) {
  VecF32 low[4], high[4];
  for (int k = 0; k < 4; k++) low[k] = high[k] = VecF32::zero();
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock)
    for (int k = 0; k < 4; k++) {
      const VecF32 v = kept(VecF32::load(x + i + k * kLanes));
      low[k] = min(v, low[k]), high[k] = max(v, high[k]);  // a NaN is the first operand, and goes
    }
  for (; i < n; i += kLanes) {
    const VecF32 v = kept(load_some(x + i, n - i < kLanes ? n - i : kLanes));
    low[0] = min(v, low[0]), high[0] = max(v, high[0]);
  }
  least = least_of(min(min(low[0], low[1]), min(low[2], low[3])));
  most = most_of(max(max(high[0], high[1]), max(high[2], high[3])));
}
static FASTNN_INLINE void range_of(const float* x, int64_t n, float& least, float& most) {
  float l, h;
  extremes(x, n, l, h, [](VecF32 v) __attribute__((always_inline)) { return v; });
  if (h - l == __builtin_inff())  // perhaps there is an infinity, which is then left out
    extremes(x, n, l, h, finite);
  least = l < least ? l : least;
  most = h > most ? h : most;
}

static FASTNN_INLINE void range_of_each(const float* x, int64_t n, float* low, float* high) {
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

static void range_run(const RangeRun& run, int64_t item, Gather gather) {
  float numbers[kBuffer];
  for (int64_t g = 0; g < run.count; g++) {
    const char* x = static_cast<const char*>(run.x) + g * run.n * run.stride * item;
    for (int64_t begin = 0; begin < run.n;) {
      const bool in_place = item == 4 && run.stride == 1;
      const int64_t rest = run.n - begin, n = in_place || rest < kChunk ? rest : kChunk;
      const char* from = x + begin * run.stride * item;
      if (!in_place) gather(from, run.stride, n, numbers);
      const float* values = in_place ? reinterpret_cast<const float*>(from) : numbers;
      if (run.each)
        range_of_each(values, n, run.low + begin, run.high + begin);
      else
        range_of(values, n, run.low[g], run.high[g]);
      begin += n;
    }
  }
}

// ---- the table ---------------------------------------------------------------------------------

template <Scheme s>
struct CodeOf {
  using Code = Signed;
};
template <>
struct CodeOf<Scheme::u8> {
  using Code = Unsigned;
};
template <>
struct CodeOf<Scheme::u4> {
  using Code = Unsigned;
};
template <>
struct CodeOf<Scheme::e4m3> {
  using Code = E4M3;
};
template <>
struct CodeOf<Scheme::e5m2> {
  using Code = E5M2;
};

template <class T, Scheme scheme, bool stochastic>
static void quantize(const ScaledRun& run) {
  using Code = typename CodeOf<scheme>::Code;
  constexpr Limits range = limits(scheme);
  constexpr bool packed = is_packed(scheme);
  quantize_run(run, sizeof(T), gather<T>, range, packed, stochastic,
               encode<Code, stochastic, false>, encode<Code, stochastic, true>);
}
template <class T, Scheme scheme>
static void dequantize(const ScaledRun& run) {
  using Code = typename CodeOf<scheme>::Code;
  constexpr bool packed = is_packed(scheme);
  dequantize_run(run, sizeof(T), scatter<T>, packed, scheme == Scheme::s4, decode<Code, false>,
                 decode<Code, true>);
}
template <class T>
static void range(const RangeRun& run) {
  range_run(run, sizeof(T), gather<T>);
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
