// The scales that fit, and quantization by them. Elements that share a scale and lie in one run (a
// token, a channel, a group) are read once: up to 16384 of them are held in the registers of 4 to
// 512 threads, which find their range, choose, and write codes. All others are read twice: ranges
// are found first, with atomic maxima of integers, which come out the same in any order (floats
// that are not negative are ordered as their bits are), in the memory of the scales themselves.
#include "cuda/quant/codes.cuh"
#include "cuda/quant/quantize.hpp"
#include "cuda/quant/walk.cuh"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kLongest = 16384;
constexpr int64_t kMostBlocks = 1 << 20;

struct Smallest {
  __device__ static float of(float a, float b) { return fminf(a, b); }
};

// ---- runs in registers -------------------------------------------------------------------------

struct Call {
  const void* x;
  uint8_t* q;
  Limits limits;
  bool packed, symmetric;
  float* scale;
  int32_t* zero_point;
  const uint64_t* seed;
};

template <class T, class Code, int threads, int mine>
__global__ void __launch_bounds__(threads > 32 ? threads : 128)
    held_runs(const Loop loop, const Call call, const int64_t runs) {
  constexpr int block = threads > 32 ? threads : 128, groups = block / threads;
  constexpr int n = Pack<T>::kEach;
  FASTNN_SHARED(typename Group<threads>::Memory, memory);
  Group<threads> group{memory};
  const int last = loop.dims - 1, thread = int(threadIdx.x) % threads;
  const HeldRow<T, threads, mine> held{int(loop.group), thread};
  const uint64_t seed = call.seed ? *call.seed : 0;
  for (int64_t first = int64_t(blockIdx.x) * groups; first < runs;
       first += int64_t(gridDim.x) * groups) {
    // Groups without a run go along with the last one's and write nothing.
    const int64_t run = first + int(threadIdx.x) / threads;
    const bool exists = run < runs;
    const int64_t element = (exists ? run : runs - 1) * loop.group;
    const Offsets at = offsets_of(loop, element);
    float x[mine];
    held.load(x, static_cast<const T*>(call.x) + at.x, loop.x[last], 0);
    float low = 0, high = 0;
#pragma unroll
    for (int j = 0; j < mine; j++) low = fminf(low, finite(x[j])), high = fmaxf(high, finite(x[j]));
    group.template reduce<Smallest, Largest>(low, high);
    const Chosen chosen = choose(low, high, call.limits, call.symmetric);
    if (!exists) continue;
    if (thread == 0) {
      call.scale[at.s] = chosen.scale;
      if (!call.symmetric) call.zero_point[at.s] = chosen.zero;
    }
    const Grid grid(call.limits, chosen.scale, chosen.zero);
    const auto grid_of = [&](int) -> const Grid& { return grid; };
    uint8_t* q = call.q + (call.packed ? at.q / 2 : at.q);
    if (held.in_packs()) {
      const bool whole =
          loop.q[last] == 1 && reinterpret_cast<uintptr_t>(q) % (call.packed ? n / 2 : n) == 0;
#pragma unroll
      for (int j = 0; j < mine; j += n) {
        if (j >= held.count) continue;
        float some[n];
        uint32_t codes[n];
#pragma unroll
        for (int e = 0; e < n; e++) some[e] = x[j + e];
        const int i = held.index(j);
        if (call.seed)
          encode<Code, true>(codes, some, grid_of, seed, uint64_t(element + i));
        else
          encode<Code, false>(codes, some, grid_of, 0, 0);
        if (whole) {
          store_codes(q + (call.packed ? i / 2 : i), codes, call.packed);
        } else if (call.packed) {
#pragma unroll
          for (int e = 0; e < n; e += 2)
            q[(i + e) / 2] = uint8_t((codes[e] & 15) | codes[e + 1] << 4);
        } else {
#pragma unroll
          for (int e = 0; e < n; e++) q[(i + e) * loop.q[last]] = uint8_t(codes[e]);
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < mine; j++) {
        if (j >= held.count) continue;
        const int64_t i = held.index(j);
        uint32_t code;
        if (call.seed)
          code = Code::encode(x[j], grid, stochastic_of(seed, uint64_t(element + i)));
        else
          code = Code::encode(x[j], grid, Nearest{});
        q[i * loop.q[last]] = uint8_t(code);
      }
    }
  }
}

template <class T, class Code>
void run_held(const Loop& loop, const Call& call, void* stream) {
  constexpr int n = Pack<T>::kEach;
  const int64_t runs = loop.elements / loop.group;
  auto with = [&](auto kernel, int threads) {
    const int block = threads > 32 ? threads : 128;
    const int64_t blocks = ceil_div(runs, block / threads);
    launch(kernel, dim3(unsigned(blocks < kMostBlocks ? blocks : kMostBlocks)), dim3(block), 0,
           stream, loop, call, runs);
  };
  if (loop.group <= 8 * n)
    with(held_runs<T, Code, 4, 2 * n>, 4);
  else if (loop.group <= 32 * 16)
    with(held_runs<T, Code, 32, 16>, 32);
  else if (loop.group <= 256 * 16)
    with(held_runs<T, Code, 256, 16>, 256);
  else
    with(held_runs<T, Code, 512, 32>, 512);
}

// ---- ranges ------------------------------------------------------------------------------------

// Where ranges are collected, as the bits of floats that are not negative: the largest number, and
// minus the least; symmetric schemes have one for both.
struct Range {
  uint32_t *high, *low;
  __device__ void add(int64_t at, float least, float most) const {
    if (!low) most = fmaxf(most, -least);
    if (most > 0) atomicMax(high + at, __float_as_uint(most));
    if (low && least < 0) atomicMax(low + at, __float_as_uint(-least));
  }
};

__global__ void __launch_bounds__(kThreads) clear(const Range range, const int64_t count) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    range.high[i] = 0;
    if (range.low) range.low[i] = 0;
  }
}

__global__ void __launch_bounds__(kThreads)
    choose_all(const Range range, const Limits limits, const int64_t count) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    const float high = __uint_as_float(range.high[i]);
    const float low = range.low ? -__uint_as_float(range.low[i]) : 0;
    const Chosen chosen = choose(low, high, limits, !range.low);
    range.high[i] = __float_as_uint(chosen.scale);
    if (range.low) range.low[i] = uint32_t(chosen.zero);
  }
}

// Long runs: a warp takes a part of one at a time, and says what it found where the scale changes.
constexpr int kLanes = 32, kPart = 2048;
template <class T>
__global__ void __launch_bounds__(kThreads)
    ranges_of_runs(const Loop loop, const void* const data, const Range range, const int64_t runs,
                   const int64_t parts) {
  constexpr int n = Pack<T>::kEach;
  const int last = loop.dims - 1, lane = int(threadIdx.x) % kLanes;
  const int64_t warps = int64_t(gridDim.x) * (kThreads / kLanes), step = loop.x[last];
  int64_t scale = -1;
  float low = 0, high = 0;
  auto tell = [&] {
    low = Group<kLanes>::over_lanes<Smallest>(low, kLanes);
    high = Group<kLanes>::over_lanes<Largest>(high, kLanes);
    if (lane == 0 && scale >= 0) range.add(scale, low, high);
    low = high = 0;
  };
  auto take = [&](float x) { low = fminf(low, finite(x)), high = fmaxf(high, finite(x)); };
  for (int64_t i = int64_t(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
       i < runs * parts; i += warps) {
    const int64_t run = i / parts, begin = (i - run * parts) * kPart;
    const int count = int(loop.group - begin < kPart ? loop.group - begin : kPart);
    const Offsets at = offsets_of(loop, run * loop.group);
    if (at.s != scale) tell();
    scale = at.s;
    const T* x = static_cast<const T*>(data) + at.x + begin * step;
    if (step == 1 && count % n == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0) {
      const auto* packs = reinterpret_cast<const Pack<T>*>(x);
#pragma unroll 4
      for (int p = lane; p < count / n; p += kLanes) {
        const Pack<T> pack = packs[p];
#pragma unroll
        for (int e = 0; e < n; e++) take(to_float(pack.element[e]));
      }
    } else {
      for (int e = lane; e < count; e += kLanes) take(to_float(x[e * step]));
    }
  }
  tell();
}

// Short runs in a pattern of scales that repeats: a thread's elements are whole patterns apart, so
// that it has one scale, and neighbours read neighbours.
template <class T>
__global__ void __launch_bounds__(kThreads)
    ranges_of_patterns(const Loop loop, const void* const data, const Range range,
                       const int64_t patterns, const int64_t outer) {
  const int last = loop.dims - 1;
  const int64_t pattern = loop.group * loop.period, inner = loop.size[last];
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= patterns * pattern) return;
  for (int64_t o = blockIdx.y; o < outer; o += gridDim.y) {
    const Offsets at = offsets_of(loop, o * inner);
    const T* x = static_cast<const T*>(data) + at.x;
    float low = 0, high = 0;
#pragma unroll 4
    for (int64_t i = index; i < inner; i += patterns * pattern) {
      const float v = finite(to_float(x[i * loop.x[last]]));
      low = fminf(low, v), high = fmaxf(high, v);
    }
    range.add(at.s + index / loop.group % loop.period * loop.stride, low, high);
  }
}

constexpr int64_t kShortRun = 64;  // from here on a run is a warp's
constexpr int64_t kEnoughThreads = 1 << 19;

template <class T>
void find_ranges(const Loop& loop, const void* x, const Range& range, void* stream) {
  const int64_t inner = loop.size[loop.dims - 1], outer = loop.elements / inner;
  if (loop.group >= kShortRun) {
    const int64_t runs = loop.elements / loop.group, parts = ceil_div(loop.group, kPart);
    const int64_t blocks = ceil_div(runs * parts, kThreads / kLanes),
                  most = kEnoughThreads / kThreads;
    launch(ranges_of_runs<T>, dim3(unsigned(blocks < most ? blocks : most)), dim3(kThreads), 0,
           stream, loop, x, range, runs, parts);
    return;
  }
  const int64_t pattern = loop.group * loop.period, repeats = inner / pattern;
  int64_t at_once = ceil_div(kEnoughThreads, pattern * outer);
  if (at_once > repeats) at_once = repeats;
  launch(ranges_of_patterns<T>,
         dim3(unsigned(ceil_div(at_once * pattern, kThreads)),
              unsigned(outer < 65535 ? outer : 65535)),
         dim3(kThreads), 0, stream, loop, x, range, at_once, outer);
}

dim3 blocks_for(int64_t count) {
  const int64_t blocks = ceil_div(count, kThreads);
  return dim3(unsigned(blocks < 4096 ? blocks : 4096));
}

}  // namespace

void choose_scale(const Numbers& numbers, float* scale, int32_t* zero_point, void* stream) {
  if (numbers.scales == 0) return;
  const Range range{reinterpret_cast<uint32_t*>(scale), reinterpret_cast<uint32_t*>(zero_point)};
  launch(clear, blocks_for(numbers.scales), dim3(kThreads), 0, stream, range, numbers.scales);
  const Loop loop(numbers, By::x);
  if (loop.elements) {
    if (numbers.type == DType::f64)
      find_ranges<double>(loop, numbers.x, range, stream);
    else
      with_float_type("choose_scale", numbers.type,
                      [&](auto x) { find_ranges<decltype(x)>(loop, numbers.x, range, stream); });
  }
  launch(choose_all, blocks_for(numbers.scales), dim3(kThreads), 0, stream, range,
         limits(numbers.scheme), numbers.scales);
}

void quantize_dynamic(const Numbers& numbers, float* scale, int32_t* zero_point,
                      const uint64_t* seed, void* stream) {
  const Loop loop(numbers, order_for(numbers, seed != nullptr, By::q));
  const bool packed = is_packed(numbers.scheme);
  const int64_t pack = 16 / int64_t(dtype_size(numbers.type));
  // Two codes of a byte are one thread's.
  if (!loop.elements || !loop.each_in_a_run() || loop.group > kLongest ||
      numbers.type == DType::f64 || (packed && loop.group % pack)) {
    choose_scale(numbers, scale, zero_point, stream);
    return quantize(numbers, scale, zero_point, seed, stream);
  }
  const Call call{numbers.x,
                  static_cast<uint8_t*>(numbers.q),
                  limits(numbers.scheme),
                  packed,
                  !zero_point,
                  scale,
                  zero_point,
                  seed};
  with_float_type("quantize_dynamic", numbers.type, [&](auto x) {
    with_code(numbers.scheme,
              [&](auto code) { run_held<decltype(x), decltype(code)>(loop, call, stream); });
  });
}

}  // namespace fastnn::cuda
