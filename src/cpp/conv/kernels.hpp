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

// Runs of positions, `lanes` of them side by side, for the weight's gradient: those of y, and the
// ones of x that some taps of a filter meet. Position i of y is at y + i * y_step, position p of x,
// by the first tap, at x + offset[b] + p * x_step; the next run is a row further.
struct TapRuns {
  const void *x, *y;
  int64_t x_step, y_step, x_row, y_row, rows;
  int64_t in, out, first;  // i of [0, out) meets, by tap a, p = i * step + first + a of [0, in)
  const int64_t* offset;
  int count;  // of offsets
  int lanes;
  void* sums;  // a vector for each tap of the first offset; those of the next are a row further
  int64_t sums_row;
  // What later calls will read, asked for in passing: a line for each position, and for each of the
  // `step` rows of x that a run sees first; lines and rows are bytes apart.
  int asks;  // 1: for the first row of x, 4: for the second, 2: for y
  const char *x_ahead, *y_ahead;
  int64_t x_line, y_line, x_ahead_row;
};

// Depthwise convolution of one element type. Sums and filters are float32, of float64 float64.
struct DepthwiseKernels {
  int width;
  // Positions side by side, row by row: out[r * out_row + i] = start + sum over t of
  // w[t] x[r * x_row + offset[t] + i].
  void (*rows)(const void* x, int64_t x_row, const int64_t* offset, const void* w, int taps,
               double start, void* out, int64_t out_row, int64_t rows, int64_t n);
  // Channels side by side: out[p * out_step + c] = start[c] + sum over t of
  // w[tap[t] * w_row + c] x[p * x_step + offset[t] + c], with `start` (none: 0) and w of the
  // element type.
  void (*positions)(const void* x, int64_t x_step, const int64_t* offset, const void* w,
                    int64_t w_row, const int* tap, int taps, const void* start, void* out,
                    int64_t out_step, int64_t positions, int64_t channels);
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
  // sums[b][a] += the products of what tap a meets, for 1, 3, 5 or 7 taps, of at least
  // (taps + step - 1) / step positions, and at most weight_rows[taps] offsets, at `step` 1 or 2, or
  // 1 for one tap.
  int weight_rows[8];
  void (*weight)(int taps, int step, const TapRuns& r);
  // totals += sums, which become 0: vectors as they are, or folded to one number each.
  void (*weight_totals)(double* totals, void* sums, int64_t vectors, bool fold);
  // w[l * channel + offset[t]] = sum over s of totals[s * slot + t * lanes + l], for l in
  // [begin, end).
  void (*weight_finish)(const double* totals, int64_t slots, int64_t slot, int64_t lanes, int taps,
                        const int64_t* offset, void* w, int64_t channel, int64_t begin,
                        int64_t end);
};

// Winograd's products are summed by so many channels, and those sums by as many as a group has:
// with chains as short as that the error stays about that of a direct convolution, which knows no
// cancellation within a tile.
constexpr int64_t kWinogradSum = 16, kWinogradGroup = 128;
constexpr int kMostWinogradFilters = 32, kMostWinogradTaps = 5, kMostWinogradSpan = 6;
using WinogradTransformFn = void (*)(const float* const* pixels, int64_t channels, float* to,
                                     int64_t group, int64_t position, float* sums);
// Square filters of so many taps, in each direction, at a step: see winograd.inl.
struct WinogradKernels {
  int taps, step, span, products, panel;
  WinogradTransformFn input;
  void (*filter)(const float* g, int64_t ld, float* v, int64_t position, int filters);
  void (*product)(const float* u, int64_t u_group, int64_t tiles, const float* v, int64_t channels,
                  float* m);
  bool (*output)(const float* m, int64_t position, int64_t tiles, float* y, int64_t y_row);
  // For the filters' gradient: of 2 x 2 pixels of y's, its products, and their results.
  WinogradTransformFn spread;
  void (*weight_product)(const float* u, const float* z, int64_t z_group, int64_t filter,
                         int64_t tiles, float* m, bool add);
  bool (*gather)(const float* m, int64_t position, float* g);
};

struct ConvKernels {
  CopyRowsFn copy_rows[3];  // of elements of 2, 4 and 8 bytes
  TransposeFn transpose[3];
  GatherRowsFn gather_rows[3];
  InterleaveFn interleave[3];
  AddRowsFn add_rows[2];          // of float32 and float64
  DepthwiseKernels depthwise[4];  // by DType
  WinogradKernels winograd[3];    // of different taps and steps
};
constexpr int size_index(int64_t bytes) { return bytes == 2 ? 0 : bytes == 4 ? 1 : 2; }

const ConvKernels& portable_conv();
const ConvKernels& avx2_conv();
const ConvKernels& avx512_conv();
const ConvKernels& conv_kernels();  // of the active instruction set

}  // namespace fastnn
