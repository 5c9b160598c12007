// Convolutions of 8-bit images: the implicit product of implicit.cu on the tensor cores' integers.
// What is gathered are the images as they are, with zeros around them; what the zero point would
// have added there and elsewhere is taken from the sums afterwards: it is the sum of a filter's
// weights over the taps that see the image, which is the same for all pixels but those at its
// edges. Groups of few channels, which would fill pieces and tiles with zeros, are multiplied one
// by one.
#include "cuda/conv/int8.hpp"

#include "cuda/conv/copies.cuh"
#include "cuda/gemm/epilogue.cuh"
#include "cuda/gemm/mainloop.cuh"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kThreads = 128, kEach = 4;  // neighbouring channels that a thread finishes
constexpr int64_t kFew = 8;               // channels of a group, below which there are no tiles
constexpr int64_t kMostBlocks = 65535;

// What a call's filters come to, one number a filter: what sums are multiplied by and what is
// added; the sum of the weights of each tap, and, behind those of the taps, of all.
struct Columns {
  float *scale, *shift;
  int32_t* taps;
};

struct Call : Gathered {
  Int8Conv call;
  Columns columns_of;
  int filters, taps;
};

__device__ __forceinline__ float inverse_of(const Int8Conv& c) {
  return c.y_scale ? __fdiv_rn(1.0f, *c.y_scale) : 1.0f;
}

// A block a filter.
__global__ void __launch_bounds__(kThreads)
    look_at_filters(const Int8Conv c, const Columns to, const int filters, const int taps) {
  FASTNN_SHARED(int, total, [1]);
  const Tensor5& w = c.sizes.w;
  const int m = int(blockIdx.x);
  if (threadIdx.x == 0) {
    const float inverse = inverse_of(c);
    to.scale[m] = __fmul_rn(__fmul_rn(*c.x_scale, c.w_scale[m * c.w_step]), inverse);
    to.shift[m] = c.bias ? __fmul_rn(c.bias[m], inverse) : 0;
    total[0] = 0;
  }
  __syncthreads();
  const auto* filter = reinterpret_cast<const int8_t*>(w.data) + m * w.stride[0];
  int mine = 0;
  for (int tap = int(threadIdx.x); tap < taps; tap += kThreads) {
    const int line = tap / int(w.size[4]);
    const auto* from = filter + line / int(w.size[3]) * w.stride[2] +
                       line % int(w.size[3]) * w.stride[3] + tap % int(w.size[4]) * w.stride[4];
    int sum = 0;
    for (int64_t channel = 0; channel < w.size[1]; channel++) sum += from[channel * w.stride[1]];
    to.taps[int64_t(tap) * filters + m] = sum;
    mine += sum;
  }
  if (mine) atomicAdd(&total[0], mine);
  __syncthreads();
  if (threadIdx.x == 0) to.taps[int64_t(taps) * filters + m] = total[0];
}

__device__ __forceinline__ bool sees(const Gathered& c, int axis, int position, int tap) {
  const AxisSizes& s = c.axes[axis];
  return unsigned(position * s.stride - s.padding + tap * s.dilation) < unsigned(s.x);
}
__device__ __forceinline__ bool sees_all(const Gathered& c, const Place& p) {
  bool all = true;
#pragma unroll
  for (int d = 0; d < kSpatial; d++)
    all = all && sees(c, d, p.at[d], 0) && sees(c, d, p.at[d], c.axes[d].kernel - 1);
  return all;
}

// The sum of filter m's weights over the taps that see the image from pixel p.
__device__ __forceinline__ int weights_seen(const Call& c, const Place& p, bool all, int m) {
  const int32_t* of = c.columns_of.taps + m;
  if (all) return of[int64_t(c.taps) * c.filters];
  int sum = 0;
  for (int i = 0; i < c.axes[0].kernel; i++) {
    if (!sees(c, 0, p.at[0], i)) continue;
    for (int j = 0; j < c.axes[1].kernel; j++) {
      if (!sees(c, 1, p.at[1], j)) continue;
      for (int k = 0; k < c.axes[2].kernel; k++)
        if (sees(c, 2, p.at[2], k))
          sum += of[int64_t((i * c.axes[1].kernel + j) * c.axes[2].kernel + k) * c.filters];
    }
  }
  return sum;
}

// `count` neighbouring filters from m on of the pixel whose first element is y's `at`.
__device__ __forceinline__ void finish(const Call& c, const Place& p, bool all, int64_t at, int m,
                                       const int (&sums)[kEach], int count) {
  const Int8Conv& call = c.call;
  const bool narrow = call.type == DType::u8 || call.type == DType::s8;
  const float inverse = inverse_of(call);
  const int x_zero = *call.x_zero, y_zero = narrow ? *call.y_zero : 0;
  float v[kEach];
#pragma unroll
  for (int e = 0; e < kEach; e++) {
    v[e] = 0;
    if (e >= count) continue;
    const int sum = sums[e] - x_zero * weights_seen(c, p, all, m + e);
    v[e] = __fadd_rn(__fmul_rn(float(sum), c.columns_of.scale[m + e]), c.columns_of.shift[m + e]);
    if (call.residual) {
      const int residual = call.residual_type == DType::u8
                               ? static_cast<const uint8_t*>(call.residual)[at + m + e]
                               : static_cast<const int8_t*>(call.residual)[at + m + e];
      v[e] = __fadd_rn(v[e], __fmul_rn(float(residual - *call.residual_zero),
                                       __fmul_rn(*call.residual_scale, inverse)));
    }
    // Comparisons that leave NaN as it is.
    if (call.relu && v[e] < 0) v[e] = 0;
    if (call.relu6 && v[e] > __fmul_rn(6, inverse)) v[e] = __fmul_rn(6, inverse);
  }
  const int64_t to = at + m;
  if (!narrow) {
    const int bytes = call.type == DType::f32 ? 4 : 2;
    auto* y = call.sizes.y.data;
    if (count == kEach && reinterpret_cast<uintptr_t>(y + to * bytes) % (kEach * bytes) == 0)
      return write_all(call.type, y, to, v);
    for (int e = 0; e < count; e++) write(call.type, y, to + e, v[e]);
    return;
  }
  const float low = call.type == DType::u8 ? 0 : -128, high = call.type == DType::u8 ? 255 : 127;
  uint32_t four = 0;
#pragma unroll
  for (int e = 0; e < kEach; e++) {
    // Rounded half to even, with the zero point a whole number that float32 holds, or beyond.
    const float rounded = v[e] != v[e] ? 0 : rintf(v[e]);
    const float moved = fminf(fmaxf(rounded + float(y_zero), low), high);
    four |= (uint32_t(int(moved)) & 255) << (8 * e);
  }
  auto* bytes = reinterpret_cast<uint8_t*>(call.sizes.y.data) + to;
  if (count == kEach && reinterpret_cast<uintptr_t>(bytes) % kEach == 0)
    *reinterpret_cast<uint32_t*>(bytes) = four;
  else
    for (int e = 0; e < count; e++) bytes[e] = uint8_t(four >> (8 * e));
}

// ---- tiles -------------------------------------------------------------------------------------

template <class Mode, class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    int8_tiles(const Call c, const int64_t rows, const int64_t tile_rows,
               const int64_t tile_columns) {
  using Load = Copies<int8_t, S, false>;
  char* shared = dynamic_shared<char>();
  FASTNN_SHARED(Axis, axes, [kSpatial]);
  const int thread = int(threadIdx.x), group = int(blockIdx.y);
  if (thread < kSpatial) axes[thread] = forward_axis(c.axes[thread]);
  __syncthreads();
  const TilePlace tile = tile_place(blockIdx.x, tile_rows, tile_columns);
  const int64_t first_row = tile.row * S::kM;
  const int first_column = int(tile.column) * S::kN;
  Load copies(c, axes, group, first_row, rows, first_column);
  tile_sums<Mode, S, typename Load::A, typename Load::B>(
      shared, int((int64_t(c.taps) * c.channels + Load::A::kDepth - 1) / Load::A::kDepth),
      [&](int64_t, char* to_a, char* to_b) { copies.load(to_a, to_b); });
  const auto* staged = reinterpret_cast<const int*>(shared);
  for (int i = thread; i < S::kM * S::kN / kEach; i += S::kThreads) {
    const int row = i / (S::kN / kEach), column = i % (S::kN / kEach) * kEach;
    const int left = c.rows - first_column - column;
    if (first_row + row >= rows || left <= 0) continue;
    const Place p = place_of(int(first_row) + row, c.axes[0].y, c.axes[1].y, c.axes[2].y);
    int64_t at = p.image * c.out_image;
#pragma unroll
    for (int d = 0; d < kSpatial; d++) at += p.at[d] * c.out_step[d];
    int sums[kEach];
#pragma unroll
    for (int e = 0; e < kEach; e++) sums[e] = staged[staged_at<S>(row, column) + e];
    finish(c, p, sees_all(c, p), at, group * c.rows + first_column + column, sums,
           left < kEach ? left : kEach);
  }
}

template <class Mode, class S>
void run(const Call& c, int64_t rows, void* stream) {
  const int64_t tile_rows = ceil_div(rows, S::kM), tile_columns = ceil_div(c.rows, S::kN);
  launch(int8_tiles<Mode, S>,
         dim3(unsigned(tile_rows * tile_columns), unsigned(c.call.sizes.groups)), dim3(S::kThreads),
         size_t(kStages) * (S::kM + S::kN) * kRowBytes, stream, c, rows, tile_rows, tile_columns);
}
template <class Mode>
void choose_shape(const Call& c, int64_t rows, void* stream) {
  const int64_t large = ceil_div(rows, Large::kM) * ceil_div(c.rows, Large::kN);
  large* c.call.sizes.groups < kEnoughBlocks ? run<Mode, Small>(c, rows, stream)
                                             : run<Mode, Large>(c, rows, stream);
}

// ---- few channels ------------------------------------------------------------------------------

// A thread has kEach filters of a pixel, so that neighbours read neighbouring channels.
template <class Byte>
__global__ void __launch_bounds__(kThreads, 8) int8_direct(const Call c, const int64_t count) {
  const Tensor5 &x = c.call.sizes.x, &w = c.call.sizes.w;
  const int fours = (c.filters + kEach - 1) / kEach;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int m = int(i % fours) * kEach, exist = c.filters - m < kEach ? c.filters - m : kEach;
  const Place p = place_of(int(i / fours), c.axes[0].y, c.axes[1].y, c.axes[2].y);
  const Byte* image = reinterpret_cast<const Byte*>(x.data) + p.image * x.stride[0];
  const int8_t* filter = reinterpret_cast<const int8_t*>(w.data) + m * w.stride[0];
  const int channels = int(w.size[1]);
  int64_t from[kEach];  // the first channel of a filter's group
#pragma unroll
  for (int e = 0; e < kEach; e++) from[e] = (m + e) / c.rows * channels * x.stride[1];
  int sums[kEach] = {};
  int tap[kSpatial];
  for (tap[0] = 0; tap[0] < c.axes[0].kernel; tap[0]++)
    for (tap[1] = 0; tap[1] < c.axes[1].kernel; tap[1]++)
      for (tap[2] = 0; tap[2] < c.axes[2].kernel; tap[2]++) {
        bool inside = true;
        int64_t pixel = 0, of = 0;
#pragma unroll
        for (int d = 0; d < kSpatial; d++) {
          const AxisSizes& s = c.axes[d];
          inside = inside && sees(c, d, p.at[d], tap[d]);
          pixel += (p.at[d] * s.stride - s.padding + tap[d] * s.dilation) * x.stride[2 + d];
          of += tap[d] * w.stride[2 + d];
        }
        if (!inside) continue;
        for (int channel = 0; channel < channels; channel++)
#pragma unroll
          for (int e = 0; e < kEach; e++)
            if (e < exist)
              sums[e] += int(image[pixel + from[e] + channel * x.stride[1]]) *
                         int(filter[e * w.stride[0] + of + channel * w.stride[1]]);
      }
  int64_t at = p.image * c.out_image;
#pragma unroll
  for (int d = 0; d < kSpatial; d++) at += p.at[d] * c.out_step[d];
  finish(c, p, sees_all(c, p), at, m, sums, exist);
}

}  // namespace

void int8_conv(const Int8Conv& call, const Allocate& allocate, void* stream) {
  const Conv& s = call.sizes;
  const int64_t filters = s.w.size[0], taps = s.w.spatial();
  if (s.y.count() == 0) return;
  const int64_t rows = s.y.size[0] * s.y.spatial();
  Columns columns;
  columns.scale = static_cast<float*>(allocate(size_t(filters * (taps + 3)) * 4));
  columns.shift = columns.scale + filters;
  columns.taps = reinterpret_cast<int32_t*>(columns.shift + filters);
  launch(look_at_filters, dim3(unsigned(filters)), dim3(kThreads), 0, stream, call, columns,
         int(filters), int(taps));
  const bool few = s.groups > kMostBlocks || (s.groups > 1 && s.w.size[1] < kFew);
  Pixels image, weights;
  if (!few) {
    const DType bytes = DType::s8;
    image = in_pixels(s.x, s.groups, bytes, false, allocate, stream);
    weights = in_pixels(s.w, 1, bytes, false, allocate, stream);
  }
  Call c{gathered(s, false, image, weights), call, columns, int(filters), int(taps)};
  if (few) {
    const int64_t count = rows * ceil_div(filters, kEach);
    launch(call.is_signed ? int8_direct<int8_t> : int8_direct<uint8_t>,
           dim3(unsigned(ceil_div(count, kThreads))), dim3(kThreads), 0, stream, c, count);
  } else {
    call.is_signed ? choose_shape<S8>(c, rows, stream) : choose_shape<U8>(c, rows, stream);
  }
}

}  // namespace fastnn::cuda
