// Limited by bytes: x is read and the result written, the mask comes from the index and the seed.
// Four elements share the ten rounds of one counter; a thread computes them for itself and has two
// pieces of 16 bytes under way.
#include "cuda/dropout/dropout.hpp"

#include "common/philox.hpp"
#include "cuda/reduce/rows.cuh"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kThreads = 256, kPieces = 2, kWords = 4;  // words of a counter

struct Mask {
  const uint64_t* seed;  // nobody waits for the device to know it
  uint64_t threshold;
  float scale;
  // 0 x, which keeps NaN.
  __device__ float of(float x, unsigned word) const {
    return x * (uint64_t(word) >= threshold ? scale : 0.0f);
  }
};

// x and y lie in the order of their indices, from multiples of 16 bytes on.
template <class T>
__global__ void __launch_bounds__(kThreads)
    in_pieces(const T* x, T* y, const int64_t count, const Mask mask) {
  constexpr int each = Pack<T>::kEach;
  const int64_t first = (int64_t(blockIdx.x) * kPieces * kThreads + threadIdx.x) * each;
  const uint64_t seed = *mask.seed;
  Pack<T> pack[kPieces];
#pragma unroll
  for (int p = 0; p < kPieces; p++) {
    const int64_t i = first + int64_t(p) * kThreads * each;
    if (i + each <= count) pack[p] = *reinterpret_cast<const Pack<T>*>(x + i);
  }
#pragma unroll
  for (int p = 0; p < kPieces; p++) {
    const int64_t i = first + int64_t(p) * kThreads * each;
    const bool whole = i + each <= count;
#pragma unroll
    for (int from = 0; from < each; from += kWords) {
      const PhiloxWords words = philox(seed, uint64_t(i + from) / kWords);
#pragma unroll
      for (int e = 0; e < kWords; e++) {
        const int64_t at = i + from + e;
        if (whole)
          pack[p].element[from + e] =
              from_float<T>(mask.of(to_float(pack[p].element[from + e]), words.word[e]));
        else if (at < count)
          y[at] = from_float<T>(mask.of(to_float(x[at]), words.word[e]));
      }
    }
    if (whole) *reinterpret_cast<Pack<T>*>(y + i) = pack[p];
  }
}

// Any strides: a thread has the four elements of a counter.
template <class T>
__global__ void __launch_bounds__(kThreads)
    in_fours(const Dropout d, const int64_t count, const Mask mask) {
  const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kWords;
  if (first >= count) return;
  const PhiloxWords words = philox(*mask.seed, uint64_t(first) / kWords);
#pragma unroll
  for (int e = 0; e < kWords; e++) {
    if (first + e >= count) return;
    int64_t rest = first + e, x = 0, y = 0;
    for (int k = d.dims - 1; k >= 0; k--) {
      const int64_t at = k ? rest % d.shape[k] : rest;
      if (k) rest /= d.shape[k];
      x += at * d.x_strides[k], y += at * d.y_strides[k];
    }
    static_cast<T*>(d.y)[y] =
        from_float<T>(mask.of(to_float(static_cast<const T*>(d.x)[x]), words.word[e]));
  }
}

// Dimensions whose elements follow each other in both tensors are one.
void merge(Dropout& d) {
  int kept = 0;
  for (int k = 0; k < d.dims; k++) {
    if (d.shape[k] == 1) continue;
    const bool follows = kept > 0 && d.x_strides[kept - 1] == d.x_strides[k] * d.shape[k] &&
                         d.y_strides[kept - 1] == d.y_strides[k] * d.shape[k];
    const int to = follows ? kept - 1 : kept++;
    d.shape[to] = follows ? d.shape[to] * d.shape[k] : d.shape[k];
    d.x_strides[to] = d.x_strides[k], d.y_strides[to] = d.y_strides[k];
  }
  d.dims = kept;
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

void dropout(Dropout d, void* stream) {
  int64_t count = 1;
  for (int k = 0; k < d.dims; k++) count *= d.shape[k];
  if (count == 0) return;
  merge(d);
  const Mask mask{d.seed, dropout_threshold(d.p), d.p < 1 ? float(1 / (1 - d.p)) : 0.0f};
  const bool in_order = d.dims == 0 || (d.dims == 1 && d.x_strides[0] == 1 && d.y_strides[0] == 1);
  with_float_type("dropout", d.type, [&](auto zero) {
    using T = decltype(zero);
    if (in_order && aligned(d.x) && aligned(d.y)) {
      const int64_t blocks = ceil_div(count, int64_t(kThreads) * kPieces * Pack<T>::kEach);
      launch(in_pieces<T>, dim3(unsigned(blocks)), dim3(kThreads), 0, stream,
             static_cast<const T*>(d.x), static_cast<T*>(d.y), count, mask);
    } else {
      launch(in_fours<T>, dim3(unsigned(ceil_div(count, int64_t(kThreads) * kWords))),
             dim3(kThreads), 0, stream, d, count, mask);
    }
  });
}

}  // namespace fastnn::cuda
