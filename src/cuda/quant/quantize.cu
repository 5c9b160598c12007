// Bytes are what limits quantization: 5 an element of float32 to int8, 3 of bfloat16. A thread has
// four pieces of 16 bytes of x under way; what it makes of a piece, 4 or 8 codes, is one access
// next to its neighbours'. Which scale a piece has takes no division that the hardware lacks
// (divisor.cuh). Elements that do not lie in pieces go one by one.
#include "cuda/quant/quantize.hpp"

#include "cuda/quant/codes.cuh"
#include "cuda/quant/walk.cuh"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kThreads = 256, kAtOnce = 4;
constexpr int64_t kMostBlocks = 1 << 16;

// What kernels get of a call.
struct Call {
  DType type;
  Scheme scheme;
  Limits limits;
  uint32_t offset;
  bool packed;
  void* x;
  uint8_t* q;
  const float* scale;
  const int32_t* zero_point;
  const uint64_t* seed;

  Call(const Numbers& numbers, const float* scale, const int32_t* zero_point, const uint64_t* seed)
      : type(numbers.type),
        scheme(numbers.scheme),
        limits(fastnn::limits(numbers.scheme)),
        offset(sign_offset(numbers.scheme)),
        packed(is_packed(numbers.scheme)),
        x(numbers.x),
        q(static_cast<uint8_t*>(numbers.q)),
        scale(scale),
        zero_point(zero_point),
        seed(seed) {}

  __device__ __forceinline__ int zero(int64_t at) const { return zero_point ? zero_point[at] : 0; }
  __device__ __forceinline__ Grid grid(int64_t at) const { return {limits, scale[at], zero(at)}; }
  __device__ __forceinline__ uint8_t* codes(int64_t at) const { return q + (packed ? at / 2 : at); }
};

// ---- in pieces ---------------------------------------------------------------------------------

template <class T, class Code, bool stochastic>
__global__ void __launch_bounds__(kThreads) quantize_pieces(const Pieces pieces, const Call call) {
  constexpr int n = Pack<T>::kEach;
  const uint32_t first = blockIdx.x * uint32_t(kThreads * kAtOnce) + threadIdx.x;
  const uint64_t seed = stochastic ? *call.seed : 0;
  Offsets at[kAtOnce];
  Pack<T> packs[kAtOnce];
#pragma unroll
  for (int i = 0; i < kAtOnce; i++) {
    const uint32_t piece = first + i * kThreads;
    if (piece >= pieces.count) continue;
    at[i] = pieces.at<n>(piece);
    packs[i] = *reinterpret_cast<const Pack<T>*>(static_cast<const T*>(call.x) + at[i].x);
  }
  Grid grid;
  int64_t scale_of_grid = -1;
#pragma unroll
  for (int i = 0; i < kAtOnce; i++) {
    const uint32_t piece = first + i * kThreads;
    if (piece >= pieces.count) continue;
    float x[n];
    uint32_t codes[n];
#pragma unroll
    for (int e = 0; e < n; e++) x[e] = to_float(packs[i].element[e]);
    const uint64_t element = uint64_t(piece) * n;
    if (pieces.each) {
      float scale[n];
      int zero[n] = {};
      load_neighbours(scale, call.scale + at[i].s);
      if (call.zero_point) load_neighbours(zero, call.zero_point + at[i].s);
      encode<Code, stochastic>(
          codes, x, [&](int e) { return Grid(call.limits, scale[e], zero[e]); }, seed, element);
    } else {
      // Most often that of the piece before.
      if (at[i].s != scale_of_grid) grid = call.grid(scale_of_grid = at[i].s);
      encode<Code, stochastic>(codes, x, [&](int) -> const Grid& { return grid; }, seed, element);
    }
    store_codes(call.codes(at[i].q), codes, call.packed);
  }
}

template <class T, class Code>
__global__ void __launch_bounds__(kThreads)
    dequantize_pieces(const Pieces pieces, const Call call) {
  constexpr int n = Pack<T>::kEach;
  const uint32_t first = blockIdx.x * uint32_t(kThreads * kAtOnce) + threadIdx.x;
  Offsets at[kAtOnce];
  uint2 words[kAtOnce];
#pragma unroll
  for (int i = 0; i < kAtOnce; i++) {
    const uint32_t piece = first + i * kThreads;
    if (piece >= pieces.count) continue;
    at[i] = pieces.at<n>(piece);
    words[i] = load_codes<n>(call.codes(at[i].q), call.packed);
  }
#pragma unroll
  for (int i = 0; i < kAtOnce; i++) {
    if (first + i * kThreads >= pieces.count) continue;
    float scale[n];
    int zero[n] = {};
    if (pieces.each) {
      load_neighbours(scale, call.scale + at[i].s);
      if (call.zero_point) load_neighbours(zero, call.zero_point + at[i].s);
    } else {
      scale[0] = call.scale[at[i].s], zero[0] = call.zero(at[i].s);
#pragma unroll
      for (int e = 1; e < n; e++) scale[e] = scale[0], zero[e] = zero[0];
    }
    Pack<T> pack;
#pragma unroll
    for (int e = 0; e < n; e++) {
      const uint32_t code = code_of(words[i], e, call.packed);
      const float y = Code::decode(code, call.offset, float(zero[e] + int(call.offset)));
      pack.element[e] = from_float<T>(__fmul_rn(y, scale[e]));
    }
    *reinterpret_cast<Pack<T>*>(static_cast<T*>(call.x) + at[i].x) = pack;
  }
}

// ---- one by one --------------------------------------------------------------------------------

template <bool stochastic>
__device__ uint32_t encode_one(const Call& call, const Loop& loop, int64_t element, uint64_t seed) {
  const Offsets at = offsets_of(loop, element);
  const float x = read_number(call.type, call.x, at.x);
  const Grid grid = call.grid(at.s);
  auto by = [&](auto round) {
    return call.scheme == Scheme::e4m3   ? E4M3::encode(x, grid, round)
           : call.scheme == Scheme::e5m2 ? E5M2::encode(x, grid, round)
                                         : Integers::encode(x, grid, round);
  };
  if constexpr (stochastic)
    return by(stochastic_of(seed, uint64_t(element)));
  else
    return by(Nearest{});
}

// A byte a thread.
template <bool stochastic>
__global__ void __launch_bounds__(kThreads)
    quantize_each(const Loop loop, const Call call, const int64_t bytes) {
  const uint64_t seed = stochastic ? *call.seed : 0;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < bytes; i += step) {
    const int64_t element = call.packed ? 2 * i : i;
    uint32_t code = encode_one<stochastic>(call, loop, element, seed);
    if (call.packed)
      code = (code & 15) | encode_one<stochastic>(call, loop, element + 1, seed) << 4;
    *call.codes(offsets_of(loop, element).q) = uint8_t(code);
  }
}

__global__ void __launch_bounds__(kThreads) dequantize_each(const Loop loop, const Call call) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < loop.elements; i += step) {
    const Offsets at = offsets_of(loop, i);
    const uint32_t byte = *call.codes(at.q),
                   code = call.packed ? byte >> 4 * (at.q & 1) & 15 : byte;
    const float zero = float(call.zero(at.s) + int(call.offset));
    const float y = call.scheme == Scheme::e4m3   ? E4M3::decode(code, 0, 0)
                    : call.scheme == Scheme::e5m2 ? E5M2::decode(code, 0, 0)
                                                  : Integers::decode(code, call.offset, zero);
    write_number(call.type, call.x, at.x, __fmul_rn(y, call.scale[at.s]));
  }
}

dim3 blocks_for(int64_t threads) {
  const int64_t blocks = ceil_div(threads, kThreads);
  return dim3(unsigned(blocks < kMostBlocks ? blocks : kMostBlocks));
}
dim3 blocks_for(const Pieces& pieces) {
  return dim3(unsigned(ceil_div(pieces.count, kThreads * kAtOnce)));
}

bool in_pieces(const Loop& loop, const Call& call, Pieces& pieces) {
  if (call.type == DType::f64) return false;
  const int64_t n = 16 / int64_t(dtype_size(call.type));
  return in_pieces(loop, n, {call.x, 16}, {call.q, call.packed ? n / 2 : n}, call.scale,
                   call.zero_point, pieces);
}

template <bool stochastic>
void run_quantize(const Loop& loop, const Call& call, void* stream) {
  Pieces pieces;
  if (in_pieces(loop, call, pieces))
    return with_float_type("quantize", call.type, [&](auto x) {
      with_code(call.scheme, [&](auto code) {
        launch(quantize_pieces<decltype(x), decltype(code), stochastic>, blocks_for(pieces),
               dim3(kThreads), 0, stream, pieces, call);
      });
    });
  const int64_t bytes = call.packed ? loop.elements / 2 : loop.elements;
  launch(quantize_each<stochastic>, blocks_for(bytes), dim3(kThreads), 0, stream, loop, call,
         bytes);
}

}  // namespace

void quantize(const Numbers& numbers, const float* scale, const int32_t* zero_point,
              const uint64_t* seed, void* stream) {
  const Loop loop(numbers, order_for(numbers, seed != nullptr, By::q));
  if (loop.elements == 0) return;
  const Call call(numbers, scale, zero_point, seed);
  seed ? run_quantize<true>(loop, call, stream) : run_quantize<false>(loop, call, stream);
}

void dequantize(const Numbers& numbers, const float* scale, const int32_t* zero_point,
                void* stream) {
  const Loop loop(numbers, order_for(numbers, false, By::x));
  if (loop.elements == 0) return;
  const Call call(numbers, scale, zero_point, nullptr);
  Pieces pieces;
  if (!in_pieces(loop, call, pieces)) {
    launch(dequantize_each, blocks_for(loop.elements), dim3(kThreads), 0, stream, loop, call);
    return;
  }
  with_float_type("dequantize", call.type, [&](auto x) {
    with_code(call.scheme, [&](auto code) {
      launch(dequantize_pieces<decltype(x), decltype(code)>, blocks_for(pieces), dim3(kThreads), 0,
             stream, pieces, call);
    });
  });
}

}  // namespace fastnn::cuda
