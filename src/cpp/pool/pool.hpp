// Maximum and average pooling over one to three spatial dimensions, and their gradients.
//
// Tensors are (batch, channels, depth, height, width), with leading spatial dimensions of size 1
// where there are fewer than three. The maximum is remembered as its `code`: the number of the tap
// in its window, (kz * kernel_h + ky) * kernel_w + kx, in one byte where the window has at most 256
// taps, else in four.
#pragma once
#include <cstdint>

#include "common/dtype.hpp"

namespace fastnn {

constexpr int kPoolTypes = 4;                    // DType f32, f64, bf16, f16
constexpr int64_t kMostTaps = int64_t(1) << 24;  // codes pass through float32

// The windows along one spatial dimension. kernel is 0 for adaptive ones: from floor(o in / out) to
// ceil((o + 1) in / out).
struct PoolAxis {
  int64_t in = 1, out = 1, kernel = 1, stride = 1, padding = 0, dilation = 1;
};

struct PoolTensor {
  void* data = nullptr;
  int64_t stride[5] = {};  // in elements; 0 is allowed where the tensor is read
};

struct PoolCall {
  DType type;
  int64_t batch, channels;
  PoolAxis axis[3];
  PoolTensor x;      // of the input's shape: what is read, or the gradient that is written
  PoolTensor out;    // of the output's shape: likewise
  PoolTensor codes;  // of the output's shape; may have no data
  bool wide_codes = false;
  bool include_padding = true;  // in the count that a sum is divided by
  double divisor = 0;           // instead of that count, if not 0
};

// What a call computes.
enum PoolJob { kPoolMax, kPoolScatter, kPoolGather, kPoolIndices, kPoolAvg, kPoolAvgBackward };

// All throw std::invalid_argument for windows that do not meet the input or have too many taps.
// The first maximum counts; a NaN counts as larger, the last of them.
void max_pool(const PoolCall& call);
// x = 0, then x[position of the maximum] += out, in the order of the outputs.
void max_pool_scatter(const PoolCall& call);
// out = x[position of the maximum].
void max_pool_gather(const PoolCall& call);
// out (of int64) = the position in its plane of size depth * height * width.
void max_pool_indices(const PoolCall& call);
void avg_pool(const PoolCall& call);
// x = the gradient of avg_pool's input, from out, that of its output.
void avg_pool_backward(const PoolCall& call);

// ---- between pool.cpp and the kernels
// ------------------------------------------------------------

// Tap k of output o.
struct PoolTap {
  int64_t o, k;
};

struct PoolWindows {
  int64_t in, out;
  int64_t kernel;  // taps of the largest window
  int64_t stride, padding, dilation;
  bool regular;           // begin[o] = o * stride - padding, and all have `kernel` taps
  const int64_t* begin;   // of output o: where its tap 0 lies, perhaps in the padding
  const int64_t* first;   // its first tap inside of the input
  const int64_t* count;   // and how many there are
  const double* divisor;  // what this dimension adds to the divisor of an average
  // For backward: element i is read by the taps back[back_begin[i]] to back[back_begin[i + 1]],
  // in the order of their outputs.
  const int64_t* back_begin;
  const PoolTap* back;
  // The first element that output o reads, and the one after its last.
  int64_t from(int64_t o) const { return begin[o] + first[o] * dilation; }
  int64_t after(int64_t o) const { return from(o) + (count[o] - 1) * dilation + 1; }
};

struct PoolPlan {
  PoolWindows axis[3];
  int64_t channels;
  int64_t x[5], out[5], code[5];  // strides
  bool wide_codes;
  double divisor;
  // Positions of the taps relative to tap 0, in a dense plane and in x.
  const int64_t *tap_position, *tap_address;
  int64_t taps;
  // Planes whose rows are not reduced tap by tap, but output by output.
  bool segments;
  bool whole;          // a plane is one such segment
  bool around_caches;  // write gradients around them
  bool fetch;          // the rows that the next row of outputs reads, while one is found
  // Rows in work: element i of a row is in phase (i + padding) % stride at (i + padding) / stride,
  // so that one tap of successive outputs lies together.
  int64_t phase_length;
  int64_t row, lead;       // length of a row of outputs in work, and of the padding before it
  int64_t ring_z, ring_y;  // how many rows are kept in work
  int64_t window_rows;     // rows of the largest window
};

// The kernels of one instruction set. Of a plane they compute the rows [begin, end) of what is
// written; of channels that lie together, one such row.
struct PoolKernels {
  using Planes = void (*)(const PoolPlan& plan, char* x, char* out, char* codes, int64_t begin,
                          int64_t end, char* scratch);
  using Channels = void (*)(const PoolPlan& plan, char* x, char* out, char* codes, int64_t row,
                            int64_t channels);
  // All outputs of `channels` planes. `sums`: room for channels * in elements of float or double.
  using Scatter = void (*)(const PoolPlan& plan, char* x, char* out, char* codes, int64_t channels,
                           char* sums);
  struct OfType {
    Planes max, max_codes, avg, max_backward, avg_backward;
    Channels max_channels, max_codes_channels, avg_channels, max_backward_channels,
        avg_backward_channels;
    Scatter scatter;
  } of[kPoolTypes];
};
const PoolKernels& portable_pool();
const PoolKernels& avx2_pool();
const PoolKernels& avx512_pool();

}  // namespace fastnn
