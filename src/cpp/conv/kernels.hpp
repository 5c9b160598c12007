// What convolution needs of one instruction set besides a matrix product: moving elements between
// an image and the panels that the product multiplies.
#pragma once
#include <cstdint>

namespace fastnn {

// dst[r * dst_row + i] = lo <= i < hi ? src[r * src_row + i * stride] : 0, for r < rows, i < n.
// Nothing outside of [lo, hi) is read. Strides in elements.
using CopyRowsFn = void (*)(void* dst, int64_t dst_row, const void* src, int64_t src_row,
                            int64_t rows, int64_t stride, int64_t lo, int64_t hi, int64_t n);
// Rows of neighbours, each from somewhere else: dst[r * ld + i] = element i of row r, for i < n.
using GatherRowsFn = void (*)(void* dst, int64_t ld, const struct Lane* rows, int64_t count,
                              int64_t n);
// One lane of a transposition, or one row: its elements [lo, hi) are at src[i * stride], the others
// zero.
struct Lane {
  const char* src;
  int32_t lo, hi;
};
// dst[i * ld + l] = element i of lane l, for i < n, l < lanes.
using TransposeFn = void (*)(void* dst, int64_t ld, const Lane* lanes, int count, int64_t stride,
                             int64_t n);

// A transposition of a few lanes, up to kFewLanes, whose elements are neighbours and in the same
// range.
constexpr int kFewLanes = 4;
using InterleaveFn = void (*)(void* dst, const struct Lane* lanes, int count, int64_t n);

// to[at[r] + i] += from[r * ld + i], for r < rows, i < n.
using AddRowsFn = void (*)(void* to, const int64_t* at, const void* from, int64_t ld, int rows,
                           int n);

// Depthwise convolution of one element type. Sums and filters are float32, of float64 float64;
// `sums` holds a vector of `width` lanes a tap, to be added up by the caller.
struct DepthwiseKernels {
  int width;
  // Positions side by side, row by row: out[r * out_row + i] = start + sum over t of
  // w[t] x[r * x_row + offset[t] + i].
  void (*rows)(const void* x, int64_t x_row, const int64_t* offset, const void* w, int taps,
               double start, void* out, int64_t out_row, int64_t rows, int64_t n);
  // sums[t][i % width] += y[i] x[offset[t] + i].
  void (*weight)(const void* x, const int64_t* offset, int taps, const void* y, int64_t n,
                 void* sums);
  // Channels side by side: out[p * out_step + c] = start[c] + sum over t of
  // w[tap[t] * w_row + c] x[p * x_step + offset[t] + c], with `start` (none: 0) and w of the
  // element type.
  void (*positions)(const void* x, int64_t x_step, const int64_t* offset, const void* w,
                    int64_t w_row, const int* tap, int taps, const void* start, void* out,
                    int64_t out_step, int64_t positions, int64_t channels);
  // n positions, `lanes` channels: sums[t][c] += y[i * y_step + c] x[offset[t] + i * x_step + c].
  void (*channels)(const void* x, const int64_t* offset, int taps, int64_t x_step, const void* y,
                   int64_t y_step, int64_t n, int lanes, void* sums);
  // A tile of up to `window_rows` x `window_positions` positions of a 3 x 3 filter at `step` 1 or
  // 2, channels side by side and at least a vector of them:
  //   out[r * out_row + p * out_step + c] = activation(
  //       start[c] + sum over i, k of w[i * 3 + k][c] x[(r * step + i) * row + p * step + k][c])
  // for r < rows, p < positions; x has row = (window_positions - 1) * step + 3 pointers a row, and
  // those of the next tile are `ahead` of these, if that is worth asking for (not 0).
  int window_rows, window_positions;
  void (*window)(int step, const void* const* x, const void* const* w, const void* start, void* out,
                 int64_t out_row, int64_t out_step, int rows, int positions, int64_t channels,
                 int64_t ahead, int activation);
};

struct ConvKernels {
  CopyRowsFn copy_rows[3];  // of elements of 2, 4 and 8 bytes
  TransposeFn transpose[3];
  GatherRowsFn gather_rows[3];
  InterleaveFn interleave[3];
  AddRowsFn add_rows[2];          // of float32 and float64
  DepthwiseKernels depthwise[4];  // by DType
  // See winograd.inl.
  void (*winograd_input)(const float* even, const float* odd, int64_t row, int64_t channel,
                         int64_t channels, float* u, int64_t u_channel, int64_t position,
                         int64_t tiles, float* sums, int64_t sums_row);
  void (*winograd_filter)(const float* g, int64_t ld, float* v, int64_t position, int filters);
  bool (*winograd_output)(const float* m, int64_t position, int64_t row, float* y, int64_t y_row,
                          int rows, int64_t tiles);
};
constexpr int size_index(int64_t bytes) { return bytes == 2 ? 0 : bytes == 4 ? 1 : 2; }

const ConvKernels& portable_conv();
const ConvKernels& avx2_conv();
const ConvKernels& avx512_conv();
const ConvKernels& conv_kernels();  // of the active instruction set

}  // namespace fastnn
