// The gradient of a depthwise convolution by its weight: sums over the pixels of all images, of
// each channel by itself. A thread has kTaps taps of a lane's channels in registers and goes
// through pixels; the threads of a block, and then the blocks, add up in a fixed order.
#include <algorithm>

#include "cuda/conv/depthwise.hpp"
#include "cuda/conv/gather.cuh"
#include "cuda/conv/lanes.cuh"
#include "cuda/divisor.cuh"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kThreads = 256, kTaps = 9;
// Blocks that are worth dividing the pixels for, and the fewest pixels of a thread then.
constexpr int64_t kWantedBlocks = 1056, kLeastPixels = 16;

struct Call {
  const void *x, *y;
  void* w;
  int64_t x_image, x_channel, x_step[kSpatial];
  int64_t y_image, y_channel, y_step[kSpatial];
  int64_t w_channel, w_step[kSpatial];
  int x_size[kSpatial], kernel[kSpatial], stride[kSpatial], padding[kSpatial], dilation[kSpatial];
  Divisor pixels, plane, line;  // of y: how many there are in an image, a plane and a line
  int channels, taps;
  int64_t positions, split;  // pixels of all images, and how many of them a block gets
  float* partial;            // [split][tap][channel]
};

// threads_across: threads with other channels; those behind them have other pixels.
template <class T, int lanes, int threads_across>
__global__ void __launch_bounds__(kThreads) gradient_of_taps(const Call c) {
  using Some = Lanes<T, lanes>;
  constexpr int kRows = kThreads / threads_across, kWidth = threads_across * lanes;
  FASTNN_SHARED(float, found, [kRows * kWidth]);
  const int across = int(threadIdx.x) % threads_across, row = int(threadIdx.x) / threads_across;
  const int channel = (int(blockIdx.x) * threads_across + across) * lanes;
  const int first_tap = int(blockIdx.y) * kTaps;
  int64_t beside[kTaps];
  int to[kTaps][kSpatial];
#pragma unroll
  for (int t = 0; t < kTaps; t++) {
    const Place tap = place_of(first_tap + t, c.kernel[0], c.kernel[1], c.kernel[2]);
    beside[t] = 0;
#pragma unroll
    for (int d = 0; d < kSpatial; d++) {
      to[t][d] = tap.at[d] * c.dilation[d] - c.padding[d];
      beside[t] += to[t][d] * c.x_step[d];
    }
  }

  float sums[kTaps][lanes] = {};
  const int64_t first = int64_t(blockIdx.z) * c.split,
                end = first + c.split < c.positions ? first + c.split : c.positions;
  if (channel < c.channels)
    for (int64_t position = first + row; position < end; position += kRows) {
      unsigned rest = unsigned(position);
      const unsigned image = c.pixels.take(rest), plane = c.plane.take(rest),
                     line = c.line.take(rest);
      const Some grad =
          Some::at(c.y, image * c.y_image + channel * c.y_channel + plane * c.y_step[0] +
                            line * c.y_step[1] + rest * c.y_step[2]);
      const int at[kSpatial] = {int(plane) * c.stride[0], int(line) * c.stride[1],
                                int(rest) * c.stride[2]};
      const int64_t from = image * c.x_image + channel * c.x_channel + at[0] * c.x_step[0] +
                           at[1] * c.x_step[1] + at[2] * c.x_step[2];
#pragma unroll
      for (int t = 0; t < kTaps; t++) {
        bool inside = first_tap + t < c.taps;
#pragma unroll
        for (int d = 0; d < kSpatial; d++)
          inside = inside && unsigned(at[d] + to[t][d]) < unsigned(c.x_size[d]);
        if (!inside) continue;
        const Some pixel = Some::at(c.x, from + beside[t]);
#pragma unroll
        for (int e = 0; e < lanes; e++)
          sums[t][e] = fmaf(to_float(grad.lane[e]), to_float(pixel.lane[e]), sums[t][e]);
      }
    }

#pragma unroll
  for (int t = 0; t < kTaps; t++) {
    __syncthreads();  // the last tap's sums have been read
#pragma unroll
    for (int e = 0; e < lanes; e++) found[row * kWidth + across * lanes + e] = sums[t][e];
    for (int half = kRows / 2; half > 0; half /= 2) {
      __syncthreads();
      for (int i = int(threadIdx.x); i < half * kWidth; i += kThreads)
        found[i] += found[half * kWidth + i];
    }
    __syncthreads();
    const int64_t line = int64_t(blockIdx.z) * c.taps + first_tap + t;
    for (int i = int(threadIdx.x); i < kWidth; i += kThreads) {
      const int mine = int(blockIdx.x) * kWidth + i;
      if (mine < c.channels && first_tap + t < c.taps)
        c.partial[line * c.channels + mine] = found[i];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) add_up(const Call c, const int splits) {
  const int64_t count = int64_t(c.taps) * c.channels;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) return;
  float sum = 0;
#pragma unroll 4
  for (int s = 0; s < splits; s++) sum += c.partial[s * count + index];
  const Place tap = place_of(int(index / c.channels), c.kernel[0], c.kernel[1], c.kernel[2]);
  static_cast<T*>(c.w)[index % c.channels * c.w_channel + tap.at[0] * c.w_step[0] +
                       tap.at[1] * c.w_step[1] + tap.at[2] * c.w_step[2]] = from_float<T>(sum);
}

template <class T, int lanes, int threads_across>
void run(Call& c, const Allocate& allocate, void* stream) {
  const int64_t across = ceil_div(c.channels, threads_across * lanes),
                down = ceil_div(c.taps, kTaps), rows = kThreads / threads_across;
  const int64_t wanted = std::max<int64_t>(
      1, std::min(kWantedBlocks / (across * down), c.positions / (rows * kLeastPixels)));
  c.split = std::max<int64_t>(1, ceil_div(c.positions, wanted));
  const int64_t splits = std::max<int64_t>(1, ceil_div(c.positions, c.split));
  const int64_t count = int64_t(c.taps) * c.channels;
  c.partial = static_cast<float*>(allocate(size_t(splits * count) * sizeof(float)));
  launch(gradient_of_taps<T, lanes, threads_across>,
         dim3(unsigned(across), unsigned(down), unsigned(splits)), dim3(kThreads), 0, stream, c);
  launch(add_up<T>, dim3(unsigned(ceil_div(count, kThreads))), dim3(kThreads), 0, stream, c,
         int(splits));
}

}  // namespace

void depthwise_weight(const Conv& s, const Allocate& allocate, void* stream) {
  Call c{};
  c.x = s.x.data, c.y = s.y.data, c.w = s.w.data;
  c.x_image = s.x.stride[0], c.x_channel = s.x.stride[1];
  c.y_image = s.y.stride[0], c.y_channel = s.y.stride[1];
  c.w_channel = s.w.stride[0];
  c.channels = int(s.groups), c.taps = int(s.w.spatial());
  for (int d = 0; d < kSpatial; d++) {
    c.x_step[d] = s.x.stride[2 + d], c.y_step[d] = s.y.stride[2 + d];
    c.w_step[d] = s.w.stride[2 + d];
    c.x_size[d] = int(s.x.size[2 + d]), c.kernel[d] = int(s.w.size[2 + d]);
    c.stride[d] = int(s.stride[d]), c.padding[d] = int(s.padding[d]);
    c.dilation[d] = int(s.dilation[d]);
  }
  c.positions = s.y.size[0] * s.y.spatial();
  if (c.positions) {
    c.pixels = Divisor(s.y.spatial());
    c.plane = Divisor(s.y.size[3] * s.y.size[4]), c.line = Divisor(s.y.size[4]);
  }
  with_float_type("conv", s.type, [&](auto zero) {
    using T = decltype(zero);
    // Threads beside each other read what lies together: 16 bytes of channels each, channels, or
    // pixels.
    if (has_lanes(s.x, kLanes<T>) && has_lanes(s.y, kLanes<T>))
      run<T, kLanes<T>, 32>(c, allocate, stream);
    else if (s.x.stride[1] == 1)
      run<T, 1, 32>(c, allocate, stream);
    else
      run<T, 1, 1>(c, allocate, stream);
  });
}

}  // namespace fastnn::cuda
