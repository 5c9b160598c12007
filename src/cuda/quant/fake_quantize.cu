// Fake quantization, forward and backward. A thread has eight neighbours at a time, whose bits are
// a byte of the mask: 8 1/8 bytes an element of float32 are all that is moved. The gradients of
// scales are sums in two steps, without atomics: of parts of up to 1024 elements in float32, and of
// those in float64, in an order that the shape alone decides.
#include "cuda/quant/fake_quantize.hpp"

#include "cuda/quant/codes.cuh"
#include "cuda/quant/walk.cuh"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kThreads = 256, kAtOnce = 2, kEach = 8, kLanes = 32;
constexpr int64_t kMostBlocks = 1 << 16;

// ---- eight neighbours --------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void load_eight(float (&to)[kEach], const T* from) {
  constexpr int n = Pack<T>::kEach;
#pragma unroll
  for (int e = 0; e < kEach; e += n) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from + e);
#pragma unroll
    for (int i = 0; i < n; i++) to[e + i] = to_float(pack.element[i]);
  }
}
template <class T>
__device__ __forceinline__ void store_eight(T* to, const float (&x)[kEach]) {
  constexpr int n = Pack<T>::kEach;
#pragma unroll
  for (int e = 0; e < kEach; e += n) {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < n; i++) pack.element[i] = from_float<T>(x[e + i]);
    *reinterpret_cast<Pack<T>*>(to + e) = pack;
  }
}

// ---- what a number is rounded to ---------------------------------------------------------------

// One scale: its inverse, and the range with the zero point taken away.
struct Level {
  float inverse, scale, low, high;
};

struct Grids {
  const float* scale;
  const void* zero_point;
  ZeroPoint kind;
  float lowest, highest;
  bool as_torch;
  const uint64_t* seed;

  explicit Grids(const FakeGrid& grid)
      : scale(grid.scale),
        zero_point(grid.zero_point),
        kind(grid.zero_kind),
        lowest(grid.lowest),
        highest(grid.highest),
        as_torch(grid.as_torch),
        seed(grid.seed) {}

  __device__ float zero(int64_t at) const {
    if (kind == ZeroPoint::none) return 0;
    if (kind == ZeroPoint::integers) return float(static_cast<const int32_t*>(zero_point)[at]);
    return fminf(fmaxf(rintf(static_cast<const float*>(zero_point)[at]), lowest), highest);
  }
  __device__ Level level(int64_t at) const {
    const float s = scale[at], z = zero(at);
    return {__frcp_rn(s), s, __fsub_rn(lowest, z), __fsub_rn(highest, z)};
  }
};

// x / scale rounded (up where `fraction`, below 1, is less than what it is above its floor; 1: to
// nearest), and that within the range.
struct Rounded {
  float y, to;
  bool inside;
  __device__ __forceinline__ Rounded(float x, const Level& level, float fraction, bool as_torch) {
    y = __fmul_rn(x, level.inverse);
    const float below = floorf(y);
    const float r = fraction == 1                    ? rintf(y)
                    : fraction < __fsub_rn(y, below) ? __fadd_rn(below, 1)
                                                     : below;
    const float number = r != r ? (as_torch ? level.low : 0) : r;
    to = fminf(fmaxf(number, level.low), level.high);
    inside = r == to;
  }
};

__device__ __forceinline__ float fraction_of(uint32_t word) { return float(word >> 8) * 0x1p-24f; }
__device__ __forceinline__ float fraction_at(const uint64_t* seed, uint64_t element) {
  return seed ? fraction_of(stochastic_of(*seed, element).word) : 1;
}
template <bool random>
__device__ __forceinline__ void fractions_of(float (&to)[kEach], uint64_t seed, uint64_t first) {
#pragma unroll
  for (int e = 0; e < kEach; e += 4) {
    PhiloxWords words;
    if constexpr (random) words = philox(seed, (first + e) / 4);
#pragma unroll
    for (int i = 0; i < 4; i++) to[e + i] = random ? fraction_of(words.word[i]) : 1;
  }
}

// ---- forward -----------------------------------------------------------------------------------

struct Forward {
  DType type;
  const void* x;
  void* out;
  uint8_t* mask;
  Grids grids;
};

template <class T, bool random>
__global__ void __launch_bounds__(kThreads)
    forward_pieces(const Pieces pieces, const Forward call) {
  const uint32_t first = blockIdx.x * uint32_t(kThreads * kAtOnce) + threadIdx.x;
  const uint64_t seed = random ? *call.grids.seed : 0;
  Offsets at[kAtOnce];
  float x[kAtOnce][kEach];
#pragma unroll
  for (int i = 0; i < kAtOnce; i++) {
    const uint32_t piece = first + i * kThreads;
    if (piece >= pieces.count) continue;
    at[i] = pieces.at<kEach>(piece);
    load_eight(x[i], static_cast<const T*>(call.x) + at[i].x);
  }
#pragma unroll
  for (int i = 0; i < kAtOnce; i++) {
    const uint32_t piece = first + i * kThreads;
    if (piece >= pieces.count) continue;
    float fraction[kEach];
    fractions_of<random>(fraction, seed, uint64_t(piece) * kEach);
    Level level = call.grids.level(at[i].s);
    uint32_t bits = 0;
#pragma unroll
    for (int e = 0; e < kEach; e++) {
      if (pieces.each && e) level = call.grids.level(at[i].s + e);
      const Rounded r(x[i][e], level, fraction[e], call.grids.as_torch);
      // Adding 0 makes +0 of -0, as the way over integers does.
      x[i][e] = __fmul_rn(__fadd_rn(r.to, 0), level.scale);
      bits |= uint32_t(r.inside) << e;
    }
    store_eight(static_cast<T*>(call.out) + at[i].q, x[i]);
    if (call.mask) call.mask[piece] = uint8_t(bits);
  }
}

__global__ void __launch_bounds__(kThreads) forward_each(const Loop loop, const Forward call) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  const int lane = int(threadIdx.x) % kLanes;
  // Whole warps, whose votes are the mask.
  const int64_t end = (loop.elements + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < end; i += step) {
    bool inside = false;
    if (i < loop.elements) {
      const Offsets at = offsets_of(loop, i);
      const Level level = call.grids.level(at.s);
      const Rounded r(read(call.type, call.x, at.x), level,
                      fraction_at(call.grids.seed, uint64_t(i)), call.grids.as_torch);
      write(call.type, call.out, at.q, __fmul_rn(__fadd_rn(r.to, 0), level.scale));
      inside = r.inside;
    }
    const uint32_t bits = __ballot_sync(0xffffffffu, inside);
    if (call.mask && lane % 8 == 0 && i < loop.elements) call.mask[i / 8] = uint8_t(bits >> lane);
  }
}

// What may be read beyond the last element's bit is 0.
__global__ void end_mask(uint8_t* const mask, const int64_t begin, const int64_t end) {
  const int64_t i = begin + threadIdx.x;
  if (i < end) mask[i] = 0;
}

// ---- the gradient of the input alone -----------------------------------------------------------

struct Masked {
  DType type;
  const void* grad;
  void* out;
  const uint8_t* mask;
};
__device__ __forceinline__ float masked(float grad, bool inside) {
  return inside ? grad : __fmul_rn(grad, 0);
}
__device__ __forceinline__ bool bit_of(const uint8_t* mask, int64_t i) {
  return mask[i / 8] >> (i % 8) & 1;
}

template <class T>
__global__ void __launch_bounds__(kThreads) masked_pieces(const Pieces pieces, const Masked call) {
  const uint32_t first = blockIdx.x * uint32_t(kThreads * kAtOnce) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kAtOnce; i++) {
    const uint32_t piece = first + i * kThreads;
    if (piece >= pieces.count) continue;
    const Offsets at = pieces.at<kEach>(piece);
    float g[kEach];
    load_eight(g, static_cast<const T*>(call.grad) + at.x);
    const uint32_t bits = call.mask[piece];
#pragma unroll
    for (int e = 0; e < kEach; e++) g[e] = masked(g[e], bits >> e & 1);
    store_eight(static_cast<T*>(call.out) + at.q, g);
  }
}

__global__ void __launch_bounds__(kThreads) masked_each(const Loop loop, const Masked call) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < loop.elements; i += step) {
    const Offsets at = offsets_of(loop, i);
    write(call.type, call.out, at.q,
          masked(read(call.type, call.grad, at.x), bit_of(call.mask, i)));
  }
}

// ---- all gradients -----------------------------------------------------------------------------

constexpr int kPart = 1024;  // of a run: a warp's
constexpr int kSlice = 64;   // repeats of a pattern: a thread's
constexpr int64_t kShortRun = 32;

struct Gradients {
  const void *grad, *x;
  void* out;
  const uint8_t* mask;
  Grids grids;
  float* partial;  // two a part: of the scale, and of the zero point over -scale
};

struct Sums {
  float scale = 0, zero = 0;
  // Returns the gradient of x.
  __device__ __forceinline__ float add(float g, float x, bool inside, const Level& level,
                                       float fraction) {
    const Rounded r(x, level, fraction, false);
    scale += g * (inside ? __fsub_rn(r.to, r.y) : r.to);
    zero += inside || r.y != r.y ? 0 : g;
    return masked(g, inside);
  }
};

// Long runs of one scale.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gradients_of_runs(const Loop loop, const Gradients call, const int64_t runs,
                      const int64_t parts) {
  const int lane = int(threadIdx.x) % kLanes;
  const int64_t warps = int64_t(gridDim.x) * (kThreads / kLanes);
  for (int64_t i = int64_t(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
       i < runs * parts; i += warps) {
    const int64_t run = i / parts, begin = (i - run * parts) * kPart;
    const int64_t element = run * loop.group + begin;
    const int count = int(loop.group - begin < kPart ? loop.group - begin : kPart);
    const Level level = call.grids.level(offsets_of(loop, run * loop.group).s);
    const T *grad = static_cast<const T*>(call.grad) + element,
            *x = static_cast<const T*>(call.x) + element;
    T* out = static_cast<T*>(call.out) + element;
    const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    Sums sums;
    if (element % kEach == 0 && count % kEach == 0 && aligned(grad) && aligned(x) && aligned(out)) {
      for (int e = lane * kEach; e < count; e += kLanes * kEach) {
        float g[kEach], v[kEach], fraction[kEach];
        load_eight(g, grad + e), load_eight(v, x + e);
        const uint32_t bits = call.mask[(element + e) / 8];
        if (call.grids.seed)
          fractions_of<true>(fraction, *call.grids.seed, uint64_t(element + e));
        else
          fractions_of<false>(fraction, 0, 0);
#pragma unroll
        for (int k = 0; k < kEach; k++)
          g[k] = sums.add(g[k], v[k], bits >> k & 1, level, fraction[k]);
        store_eight(out + e, g);
      }
    } else {
      for (int e = lane; e < count; e += kLanes)
        out[e] = from_float<T>(sums.add(to_float(grad[e]), to_float(x[e]),
                                        bit_of(call.mask, element + e), level,
                                        fraction_at(call.grids.seed, uint64_t(element + e))));
    }
    sums.scale = Group<kLanes>::over_lanes<Add>(sums.scale, kLanes);
    sums.zero = Group<kLanes>::over_lanes<Add>(sums.zero, kLanes);
    if (lane == 0) call.partial[2 * i] = sums.scale, call.partial[2 * i + 1] = sums.zero;
  }
}

// Short ones, in a pattern of scales that repeats: a thread has one element of kSlice patterns.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gradients_of_patterns(const Loop loop, const Gradients call, const int64_t slices,
                          const int64_t count) {
  const int64_t pattern = loop.group * loop.period, inner = loop.size[loop.dims - 1];
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    const int64_t slice = i / pattern, within = i - slice * pattern, outer = slice / slices;
    const int64_t begin = outer * inner, first = (slice - outer * slices) * kSlice * pattern;
    const int64_t end = first + kSlice * pattern < inner ? first + kSlice * pattern : inner;
    const Level level = call.grids.level(offsets_of(loop, begin + within).s);
    Sums sums;
    for (int64_t e = begin + first + within; e < begin + end; e += pattern)
      static_cast<T*>(call.out)[e] = from_float<T>(sums.add(
          to_float(static_cast<const T*>(call.grad)[e]), to_float(static_cast<const T*>(call.x)[e]),
          bit_of(call.mask, e), level, fraction_at(call.grids.seed, uint64_t(e))));
    call.partial[2 * i] = sums.scale, call.partial[2 * i + 1] = sums.zero;
  }
}

// The parts' numbers, as dimensions: those along which scales differ, and those that are summed.
constexpr int kMostAxes = kMaxFakeDims + 3;
struct Partials {
  int64_t parts = 1;  // of a run, or slices
  int own = 0, summed = 0;
  int64_t scales = 1, each = 1;  // the products of both sizes
  int64_t own_size[kMostAxes], own_stride[kMostAxes], scale_stride[kMostAxes];
  int64_t summed_size[kMostAxes], summed_stride[kMostAxes];

  explicit Partials(const Loop& loop) {
    const int last = loop.dims - 1;
    const int64_t repeats = loop.size[last] / (loop.group * loop.period);
    int64_t stride = 1;
    if (loop.group >= kShortRun) {
      parts = ceil_div(loop.group, kPart);
      add(parts, 0, stride), add(loop.period, loop.stride, stride), add(repeats, 0, stride);
    } else {
      parts = ceil_div(repeats, kSlice);
      add(loop.group, 0, stride), add(loop.period, loop.stride, stride), add(parts, 0, stride);
    }
    for (int d = last - 1; d >= 0; d--) add(loop.size[d], loop.s[d], stride);
  }

 private:
  void add(int64_t size, int64_t of_scale, int64_t& stride) {
    if (of_scale) {
      own_size[own] = size, own_stride[own] = stride, scale_stride[own++] = of_scale;
      scales *= size;
    } else {
      summed_size[summed] = size, summed_stride[summed++] = stride;
      each *= size;
    }
    stride *= size;
  }
};

// A warp a scale.
__global__ void __launch_bounds__(kThreads)
    add_partials(const Partials partials, const float* const partial, const Grids grids,
                 const double factor, float* const by_scale, float* const by_zero_point) {
  const int lane = int(threadIdx.x) % kLanes;
  const int64_t warps = int64_t(gridDim.x) * (kThreads / kLanes);
  for (int64_t i = int64_t(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
       i < partials.scales; i += warps) {
    int64_t rest = i, at = 0, scale = 0;
    for (int d = 0; d < partials.own; d++) {
      const int64_t index = rest % partials.own_size[d];
      rest /= partials.own_size[d];
      at += index * partials.own_stride[d], scale += index * partials.scale_stride[d];
    }
    double of_scale = 0, of_zero = 0;
    for (int64_t j = lane; j < partials.each; j += kLanes) {
      int64_t part = at;
      rest = j;
      for (int d = 0; d < partials.summed; d++) {
        part += rest % partials.summed_size[d] * partials.summed_stride[d];
        rest /= partials.summed_size[d];
      }
      of_scale += double(partial[2 * part]), of_zero += double(partial[2 * part + 1]);
    }
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      of_scale += __shfl_xor_sync(0xffffffffu, of_scale, offset);
      of_zero += __shfl_xor_sync(0xffffffffu, of_zero, offset);
    }
    if (lane == 0) {
      by_scale[scale] = float(of_scale * factor);
      by_zero_point[scale] = float(-double(grids.scale[scale]) * of_zero * factor);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    no_gradients(float* const a, float* const b, const int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) a[i] = b[i] = 0;
}

// ---- launches ----------------------------------------------------------------------------------

dim3 blocks_for(int64_t threads) {
  const int64_t blocks = ceil_div(threads, kThreads);
  return dim3(unsigned(blocks < kMostBlocks ? blocks : kMostBlocks));
}
dim3 blocks_for(const Pieces& pieces) {
  return dim3(unsigned(ceil_div(pieces.count, kThreads * kAtOnce)));
}

// In the order of the index, which is that of the mask's bits. The scheme means nothing.
Loop loop_of(int dims, const int64_t* shape, const int64_t* x, const int64_t* out,
             const int64_t* scale) {
  Numbers numbers{};
  numbers.dims = dims, numbers.shape = shape;
  numbers.x_strides = x, numbers.q_strides = out, numbers.scale_strides = scale;
  return Loop(numbers, By::index);
}

// The loop over contiguous tensors.
struct Contiguous {
  int64_t strides[kMaxFakeDims];
  Contiguous(int dims, const int64_t* shape) {
    int64_t stride = 1;
    for (int d = dims - 1; d >= 0; d--) strides[d] = stride, stride *= shape[d];
  }
};

}  // namespace

void fake_quantize(const FakeQuantize& call, void* stream) {
  const Loop loop =
      loop_of(call.dims, call.shape, call.x_strides, call.out_strides, call.grid.strides);
  if (call.mask)
    launch(end_mask, dim3(1), dim3(kLanes), 0, stream, call.mask, ceil_div(loop.elements, 8),
           fake_mask_bytes(loop.elements));
  if (loop.elements == 0) return;
  const Forward forward{call.type, call.x, call.out, call.mask, Grids(call.grid)};
  Pieces pieces;
  if (!in_pieces(loop, kEach, {call.x, 16}, {call.out, 16}, nullptr, nullptr, pieces)) {
    launch(forward_each, blocks_for(loop.elements), dim3(kThreads), 0, stream, loop, forward);
    return;
  }
  with_float_type("fake_quantize", call.type, [&](auto x) {
    using T = decltype(x);
    launch(call.grid.seed ? forward_pieces<T, true> : forward_pieces<T, false>, blocks_for(pieces),
           dim3(kThreads), 0, stream, pieces, forward);
  });
}

void fake_masked(const FakeMasked& call, void* stream) {
  const int64_t none[kMaxFakeDims] = {};
  const Loop loop = loop_of(call.dims, call.shape, call.grad_strides, call.out_strides, none);
  if (loop.elements == 0) return;
  const Masked masked{call.type, call.grad, call.out, call.mask};
  Pieces pieces;
  if (!in_pieces(loop, kEach, {call.grad, 16}, {call.out, 16}, nullptr, nullptr, pieces)) {
    launch(masked_each, blocks_for(loop.elements), dim3(kThreads), 0, stream, loop, masked);
    return;
  }
  with_float_type("fake_quantize", call.type, [&](auto x) {
    launch(masked_pieces<decltype(x)>, blocks_for(pieces), dim3(kThreads), 0, stream, pieces,
           masked);
  });
}

int64_t fake_gradients_workspace(int dims, const int64_t* shape, const int64_t* scale_strides) {
  const Contiguous dense(dims, shape);
  const Loop loop = loop_of(dims, shape, dense.strides, dense.strides, scale_strides);
  if (loop.elements == 0) return 0;
  const Partials partials(loop);
  return 2 * partials.scales * partials.each;
}

void fake_gradients(const FakeGradients& call, float* workspace, void* stream) {
  const Contiguous dense(call.dims, call.shape);
  const Loop loop = loop_of(call.dims, call.shape, dense.strides, dense.strides, call.grid.strides);
  if (loop.elements == 0) {
    if (call.count)
      launch(no_gradients, dim3(unsigned(ceil_div(call.count, kThreads))), dim3(kThreads), 0,
             stream, call.by_scale, call.by_zero_point, call.count);
    return;
  }
  const Grids grids(call.grid);
  const Gradients gradients{call.grad, call.x, call.out, call.mask, grids, workspace};
  const Partials partials(loop);
  const int64_t count = partials.scales * partials.each;
  with_float_type("fake_quantize", call.type, [&](auto x) {
    using T = decltype(x);
    if (loop.group >= kShortRun)
      launch(gradients_of_runs<T>, blocks_for(count * kLanes), dim3(kThreads), 0, stream, loop,
             gradients, loop.elements / loop.group, partials.parts);
    else
      launch(gradients_of_patterns<T>, blocks_for(count), dim3(kThreads), 0, stream, loop,
             gradients, partials.parts, count);
  });
  launch(add_partials, blocks_for(partials.scales * kLanes), dim3(kThreads), 0, stream, partials,
         static_cast<const float*>(workspace), grids, call.factor, call.by_scale,
         call.by_zero_point);
}

}  // namespace fastnn::cuda
