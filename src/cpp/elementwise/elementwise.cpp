// Dimensions that lie densely together become one; what is left is cut into runs for the threads.
#include "elementwise/elementwise.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <vector>

#include "common/caches.hpp"
#include "common/cpu_features.hpp"
#include "common/kernels_of.hpp"
#include "common/parallel.hpp"

namespace fastnn {
namespace {

const ElementwiseKernels& kernels() { return FASTNN_KERNELS_OF(elementwise); }

constexpr int kMost = 3;  // operands

// The operands seen as rows: the last dimension is the inner loop, `outer` those around it.
struct Loop {
  int operands;
  int outer = 0;
  int64_t size[kMaxElementwiseDims];
  int64_t stride[kMost][kMaxElementwiseDims];
  char* data[kMost];
  int64_t inner = 1, inner_stride[kMost] = {1, 1, 1};
  int64_t elements = 1;
};

// The last operand is the output: its strides decide the order of the dimensions.
Loop make_loop(int dims, const int64_t* shape, const Operand* operands, int count) {
  Loop l;
  l.operands = count;
  for (int o = 0; o < count; o++) l.data[o] = static_cast<char*>(operands[o].data);
  int order[kMaxElementwiseDims], n = 0;
  for (int d = 0; d < dims; d++) {
    l.elements *= shape[d];
    if (shape[d] != 1) order[n++] = d;
  }
  if (l.elements == 0) return l;
  const int64_t* by = operands[count - 1].strides;
  std::stable_sort(order, order + n, [&](int a, int b) { return by[a] > by[b]; });
  int kept = 0;
  for (int i = 0; i < n; i++) {
    const int d = order[i];
    bool dense = kept > 0;
    for (int o = 0; o < count; o++)
      dense = dense && l.stride[o][kept - 1] == operands[o].strides[d] * shape[d];
    if (!dense) l.size[kept++] = 1;
    l.size[kept - 1] *= shape[d];
    for (int o = 0; o < count; o++) l.stride[o][kept - 1] = operands[o].strides[d];
  }
  if (kept > 0) {
    l.outer = kept - 1;
    l.inner = l.size[kept - 1];
    for (int o = 0; o < count; o++) l.inner_stride[o] = l.stride[o][kept - 1];
  }
  return l;
}

// Calls row(addresses, n) for the elements [begin, end), in order.
template <class F>
void run_range(const Loop& l, int64_t item, int64_t begin, int64_t end, F& row) {
  while (begin < end) {
    int64_t outer = begin / l.inner;
    const int64_t within = begin - outer * l.inner;
    const int64_t n = std::min(l.inner - within, end - begin);
    char* at[kMost];
    for (int o = 0; o < l.operands; o++) at[o] = l.data[o] + within * l.inner_stride[o] * item;
    for (int d = l.outer - 1; d >= 0; d--) {
      const int64_t index = outer % l.size[d];
      outer /= l.size[d];
      for (int o = 0; o < l.operands; o++) at[o] += index * l.stride[o][d] * item;
    }
    row(at, n);
    begin += n;
  }
}

// Whether the result is better written around the caches: it will have left them before anyone
// reads it, and each line need not be read before it is written. Measured for relu of float32: 1.5
// times as quick; of bfloat16, or with more arithmetic: no difference.
bool around_caches(const Loop& l, int64_t item) {
  const char* out = l.data[l.operands - 1];
  for (int o = 0; o + 1 < l.operands; o++)
    if (l.data[o] == out) return false;  // its lines are in the caches already
  return item >= 4 && l.elements * item > last_cache_bytes();
}

// Picoseconds an element, on one thread with data in the caches: only to decide on threads.
int64_t cost(int kind, DType type) {
  if (kind == kRelu || kind == kRelu6) return type == DType::f64 ? 150 : 80;
  return type == DType::f64 ? 3000 : type == DType::f32 ? 1000 : 500;
}

template <class F>
void run(const Loop& l, DType type, int kind, F row) {
  const int64_t item = int64_t(dtype_size(type));
  constexpr int64_t kWorthAThread = 10'000'000;  // 10 us: a region costs about 5
  const int64_t shares = int64_t(double(l.elements) * double(cost(kind, type)) / kWorthAThread);
  const int threads = shares < 2 ? 1 : int(std::min<int64_t>(shares, max_threads()));
  parallel(threads, [&](int thread, int count) {
    const Range r = share_of(l.elements, 1024, thread, count);
    run_range(l, item, r.begin, r.end, row);
  });
}

}  // namespace

void unary(int kind, DType type, int dims, const int64_t* shape, Operand x, Operand out) {
  const Operand operands[] = {x, out};
  const Loop l = make_loop(dims, shape, operands, 2);
  if (l.elements == 0) return;
  const auto f = kernels().unary[int(type)][kind];
  const bool stream = around_caches(l, int64_t(dtype_size(type)));
  run(l, type, kind, [&](char** at, int64_t n) {
    f(at[0], l.inner_stride[0], at[1], l.inner_stride[1], n, stream);
  });
}

void activate_row(int kind, DType type, void* x, int64_t n) {
  kernels().unary[int(type)][kind](x, 1, x, 1, n, false);
}

void activation_backward(int kind, DType type, int dims, const int64_t* shape, Operand grad,
                         Operand saved, Operand out) {
  const Operand operands[] = {grad, saved, out};
  const Loop l = make_loop(dims, shape, operands, 3);
  if (l.elements == 0) return;
  const auto f = kernels().backward[int(type)][kind];
  const bool stream = around_caches(l, int64_t(dtype_size(type)));
  run(l, type, kind, [&](char** at, int64_t n) {
    f(at[0], l.inner_stride[0], at[1], l.inner_stride[1], at[2], l.inner_stride[2], n, stream);
  });
}

UlpError largest_ulp_error(int kind, uint32_t first, uint64_t count, uint64_t step) {
  const auto tested = kernels().unary[int(DType::f32)][kind];
#ifdef FASTNN_HAS_AVX512
  const auto exact = cpu_features().avx512 ? avx512_elementwise().unary[int(DType::f64)][kind]
                                           : portable_elementwise().unary[int(DType::f64)][kind];
#else
  const auto exact = portable_elementwise().unary[int(DType::f64)][kind];
#endif
  constexpr int64_t kBlock = 2048;
  const bool monotonic = kind >= 5;  // sigmoid, tanh, exp, erf
  std::mutex mutex;
  UlpError worst{0, 0};
  parallel(max_threads(), [&](int thread, int threads) {
    std::vector<float> x(kBlock), y(kBlock);
    std::vector<double> xd(kBlock), r(kBlock), error(kBlock);
    UlpError mine{0, 0};
    const Range share = share_of(int64_t(count), kBlock, thread, threads);
    for (int64_t b = share.begin; b < share.end; b += kBlock) {
      const int64_t in_block = std::min(kBlock, share.end - b);
      for (int64_t i = 0; i < in_block; i++) {
        const uint32_t bits = first + uint32_t(b + i) * uint32_t(step);  // modulo 2^32
        std::memcpy(&x[i], &bits, 4);
        xd[i] = x[i];
      }
      tested(x.data(), 1, y.data(), 1, in_block, false);
      // A monotonic function whose exact values at both ends are equal is constant in between: most
      // of all floats lie where it saturates.
      const double ends[2] = {xd[0], xd[in_block - 1]};
      exact(ends, 1, r.data(), 1, 2, false);
      int64_t n = in_block;  // to judge: one of them if all are alike
      if (!monotonic || step != 1 || r[0] != r[1])
        exact(xd.data(), 1, r.data(), 1, n, false);
      else if (std::memcmp(&y[0], &y[1], size_t(n - 1) * sizeof(float)) == 0)
        n = 1;
      else
        std::fill(r.begin(), r.begin() + n, double(r[0]));
      for (int64_t i = 0; i < n; i++) {
        // One over the unit in the last place of r: its exponent less 23, no less than -149.
        const double magnitude = std::max(std::abs(r[i]), 0x1p-126);
        uint64_t bits;
        std::memcpy(&bits, &magnitude, 8);
        const uint64_t per_unit_bits = (uint64_t(2046 + 23) << 52) - (bits >> 52 << 52);
        double per_unit;
        std::memcpy(&per_unit, &per_unit_bits, 8);
        error[i] = std::abs(double(y[i]) - r[i]) * per_unit;
      }
      bool beyond = false;
      for (int64_t i = 0; i < n; i++) beyond |= !(error[i] <= mine.error);
      if (!beyond) continue;
      for (int64_t i = 0; i < n; i++) {
        if (error[i] <= mine.error) continue;
        double e = error[i];
        if (!(e < 1)) {  // infinities, NaN and what rounds to infinity need a closer look
          const float rounded = float(r[i]);
          if (std::memcmp(&rounded, &y[i], 4) == 0 || (rounded != rounded && y[i] != y[i]))
            e = 0;
          else if (!std::isfinite(e))
            e = std::numeric_limits<double>::infinity();
        }
        if (e > mine.error) mine = {e, x[i]};
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);
    if (mine.error > worst.error || (mine.error == worst.error && mine.at < worst.at)) worst = mine;
  });
  return worst;
}

}  // namespace fastnn
