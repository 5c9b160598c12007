#include "cuda/elementwise/elementwise.hpp"

#include "cuda/elementwise/activation.cuh"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 8192;

// Dimensions whose elements follow each other in all of the tensors are one.
void merge(Elementwise& e, bool backward) {
  int64_t* strides[3] = {e.x_strides, e.y_strides, e.saved_strides};
  const int tensors = backward ? 3 : 2;
  int kept = 0;
  for (int d = 0; d < e.dims; d++) {
    if (e.shape[d] == 1) continue;
    bool follows = kept > 0;
    for (int t = 0; t < tensors && follows; t++)
      follows = strides[t][kept - 1] == strides[t][d] * e.shape[d];
    const int to = follows ? kept - 1 : kept++;
    e.shape[to] = follows ? e.shape[to] * e.shape[d] : e.shape[d];
    for (int t = 0; t < tensors; t++) strides[t][to] = strides[t][d];
  }
  e.dims = kept;
}

template <class T, bool backward>
__global__ void __launch_bounds__(kThreads) each(const Elementwise e, const int64_t count) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    int64_t x = 0, y = 0, saved = 0, rest = i;
    for (int d = e.dims - 1; d >= 0; d--) {
      const int64_t at = d ? rest % e.shape[d] : rest;
      rest /= e.shape[d];
      x += at * e.x_strides[d], y += at * e.y_strides[d];
      if (backward) saved += at * e.saved_strides[d];
    }
    const float value = to_float(static_cast<const T*>(e.x)[x]);
    const float result =
        backward ? activate_backward(e.kind, value, to_float(static_cast<const T*>(e.saved)[saved]))
                 : activate(e.kind, value);
    static_cast<T*>(e.y)[y] = from_float<T>(result);
  }
}

template <bool backward>
void run(Elementwise e, void* stream) {
  int64_t count = 1;
  for (int d = 0; d < e.dims; d++) count *= e.shape[d];
  if (count == 0) return;
  merge(e, backward);
  const int64_t blocks = ceil_div(count, kThreads);
  with_float_type("activation", e.type, [&](auto zero) {
    launch(each<decltype(zero), backward>,
           dim3(unsigned(blocks < kMostBlocks ? blocks : kMostBlocks)), dim3(kThreads), 0, stream,
           e, count);
  });
}

}  // namespace

void activation(Elementwise e, void* stream) { run<false>(e, stream); }
void activation_backward(Elementwise e, void* stream) { run<true>(e, stream); }

}  // namespace fastnn::cuda
