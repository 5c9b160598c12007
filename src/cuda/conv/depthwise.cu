// Depthwise convolution and its gradient by the input: each pixel is to be read from memory once,
// and from L1 as few times as possible. A thread computes kOut neighbours of a line (or column) of
// the result, of 16 bytes of channels where they lie together, so that a pixel it has read serves
// all taps that see it.
#include "cuda/conv/depthwise.hpp"

#include "cuda/conv/gather.cuh"
#include "cuda/conv/lanes.cuh"
#include "cuda/conv/pixels.hpp"
#include "cuda/divisor.cuh"
#include "cuda/elementwise/activation.cuh"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kThreads = 128, kOut = 4;
constexpr int64_t kMostBlocks = 65535;

// Axes come in the order of the loops over taps: that along which a thread has neighbours is last.
struct Call {
  const void *from, *filters, *bias, *residual;
  void* to;
  int64_t from_image, from_channel, from_step[kSpatial];
  int64_t to_image, to_channel, to_step[kSpatial];
  int64_t filter_channel, filter_step[kSpatial];
  int size[kSpatial];  // of the image
  Axis axes[kSpatial];
  AxisSizes sizes[kSpatial];
  bool phases;  // axes are those of the block's phase, of `sizes`
  // A thread's number: channels fastest, or pixels. Each is the number of what follows it.
  bool channels_first;
  Divisor pieces, strips, lines, planes;
  int64_t images;
  unsigned threads;  // of an image
  int activation;
};

// The axis with its taps in the other direction.
__host__ __device__ inline Axis turned(Axis a) {
  a.first += a.step * (a.taps - 1), a.step = -a.step;
  a.tap_first += a.tap_step * (a.taps - 1), a.tap_step = -a.tap_step;
  return a;
}

// taps: along the last axis, whose pixels are then neighbours and `stride` apart from position to
// position; 0: any.
// Without the number of blocks the compiler takes 64 registers for the limit, and spills.
template <class T, int lanes, int taps, int stride>
__global__ void __launch_bounds__(kThreads, 4) one_filter_a_channel(const Call c) {
  using Some = Lanes<T, lanes>;
  FASTNN_SHARED(Axis, axes, [kSpatial]);
  if (threadIdx.x < kSpatial)
    axes[threadIdx.x] =
        c.phases ? phase_axis(c.sizes, int(threadIdx.x), int(blockIdx.z)) : c.axes[threadIdx.x];
  __syncthreads();
  unsigned rest = blockIdx.x * kThreads + threadIdx.x;
  if (rest >= c.threads) return;
  unsigned piece, strip, line, plane;
  if (c.channels_first) {
    plane = c.planes.take(rest), line = c.lines.take(rest), strip = c.strips.take(rest);
    piece = rest;
  } else {
    piece = c.pieces.take(rest), plane = c.planes.take(rest), strip = c.strips.take(rest);
    line = rest;
  }
  const int at[kSpatial] = {int(plane), int(line), int(strip) * kOut};
  bool any = true;
  for (int d = 0; d < kSpatial; d++) any = any && at[d] < axes[d].positions;
  if (!any) return;
  const int channel = int(piece) * lanes;
  const int first = axes[2].first + at[2] * axes[2].stride;  // pixel of the first neighbour

  for (int64_t image = blockIdx.y; image < c.images; image += gridDim.y) {
    float sums[kOut][lanes] = {};
    for (int i = 0; i < axes[0].taps; i++) {
      const int row = axes[0].first + at[0] * axes[0].stride + i * axes[0].step;
      if (unsigned(row) >= unsigned(c.size[0])) continue;
      for (int j = 0; j < axes[1].taps; j++) {
        const int column = axes[1].first + at[1] * axes[1].stride + j * axes[1].step;
        if (unsigned(column) >= unsigned(c.size[1])) continue;
        const int64_t from = image * c.from_image + channel * c.from_channel +
                             row * c.from_step[0] + column * c.from_step[1];
        const int64_t filter = channel * c.filter_channel +
                               (axes[0].tap_first + i * axes[0].tap_step) * c.filter_step[0] +
                               (axes[1].tap_first + j * axes[1].tap_step) * c.filter_step[1] +
                               axes[2].tap_first * c.filter_step[2];
        const int64_t next = axes[2].tap_step * c.filter_step[2];
        if constexpr (taps > 0) {
          Some weights[taps];
#pragma unroll
          for (int t = 0; t < taps; t++) weights[t] = Some::at(c.filters, filter + t * next);
#pragma unroll
          for (int w = 0; w < (kOut - 1) * stride + taps; w++) {
            if (unsigned(first + w) >= unsigned(c.size[2])) continue;
            const Some pixel = Some::at(c.from, from + (first + w) * c.from_step[2]);
#pragma unroll
            for (int o = 0; o < kOut; o++)
              if (w - o * stride >= 0 && w - o * stride < taps)
#pragma unroll
                for (int e = 0; e < lanes; e++)
                  sums[o][e] = fmaf(to_float(pixel.lane[e]),
                                    to_float(weights[w - o * stride].lane[e]), sums[o][e]);
          }
        } else {
          for (int t = 0; t < axes[2].taps; t++) {
            const Some weight = Some::at(c.filters, filter + t * next);
#pragma unroll
            for (int o = 0; o < kOut; o++) {
              const int w = first + o * axes[2].stride + t * axes[2].step;
              if (unsigned(w) >= unsigned(c.size[2])) continue;
              const Some pixel = Some::at(c.from, from + w * c.from_step[2]);
#pragma unroll
              for (int e = 0; e < lanes; e++)
                sums[o][e] = fmaf(to_float(pixel.lane[e]), to_float(weight.lane[e]), sums[o][e]);
            }
          }
        }
      }
    }
    int64_t to = image * c.to_image + channel * c.to_channel;
    for (int d = 0; d < kSpatial; d++)
      to += (axes[d].out_first + int64_t(at[d]) * axes[d].out_step) * c.to_step[d];
    Some bias;
    if (c.bias) bias = Some::at(c.bias, channel);
#pragma unroll
    for (int o = 0; o < kOut; o++) {
      if (at[2] + o >= axes[2].positions) break;
      const int64_t element = to + o * axes[2].out_step * c.to_step[2];
      Some added, out;
      if (c.residual) added = Some::at(c.residual, element);
#pragma unroll
      for (int e = 0; e < lanes; e++) {
        float x = sums[o][e];
        if (c.bias) x += to_float(bias.lane[e]);
        if (c.residual) x += to_float(added.lane[e]);
        out.lane[e] = from_float<T>(activate(c.activation, x));
      }
      *reinterpret_cast<Some*>(static_cast<T*>(c.to) + element) = out;
    }
  }
}

template <class T, int lanes>
void run(Call& c, int64_t phases, void* stream) {
  const int64_t blocks = ceil_div(c.threads, kThreads);
  const dim3 grid(unsigned(blocks), unsigned(c.images < kMostBlocks ? c.images : kMostBlocks),
                  unsigned(phases));
  const auto go = [&](auto kernel) { launch(kernel, grid, dim3(kThreads), 0, stream, c); };
  Axis& last = c.axes[2];
  if (!c.phases && last.step == -1) last = turned(last);
  const bool near = !c.phases && last.step == 1;
  if (near && last.stride == 1 && last.taps == 3) return go(one_filter_a_channel<T, lanes, 3, 1>);
  if (near && last.stride == 1 && last.taps == 5) return go(one_filter_a_channel<T, lanes, 5, 1>);
  if (near && last.stride == 1 && last.taps == 7) return go(one_filter_a_channel<T, lanes, 7, 1>);
  if (near && last.stride == 2 && last.taps == 3) return go(one_filter_a_channel<T, lanes, 3, 2>);
  if (near && last.stride == 2 && last.taps == 5) return go(one_filter_a_channel<T, lanes, 5, 2>);
  go(one_filter_a_channel<T, lanes, 0, 0>);
}

}  // namespace

void depthwise(const Conv& s, bool transposed, const Allocate& allocate, void* stream) {
  const Tensor5 &image = transposed ? s.y : s.x, &out = transposed ? s.x : s.y;
  const int64_t size = s.type == DType::f32 ? 4 : 2, together = 16 / size;
  const bool wide = has_lanes(image, together) && has_lanes(out, together) &&
                    reinterpret_cast<uintptr_t>(s.bias) % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(s.residual) % 16 == 0;
  Call c{};
  c.from = image.data, c.to = out.data, c.bias = s.bias, c.residual = s.residual;
  c.activation = s.activation;
  c.from_image = image.stride[0], c.from_channel = image.stride[1];
  c.to_image = out.stride[0], c.to_channel = out.stride[1];
  c.images = image.size[0];
  c.channels_first = wide || image.stride[1] == 1;
  // Neighbours of a thread lie along the lines where threads beside it have other channels, and
  // across them where those have the next pixels.
  const bool along = c.channels_first || out.size[3] == 1;
  const int order[kSpatial] = {0, along ? 1 : 2, along ? 2 : 1};
  Pixels filters;
  if (wide) {  // channels together, a tap after the other
    Tensor5 w = s.w;
    w.size[0] = 1, w.size[1] = s.w.size[0], w.stride[0] = 0, w.stride[1] = s.w.stride[0];
    filters = in_pixels(w, 1, s.type, false, allocate, stream);
  }
  c.filters = wide ? filters.data : s.w.data;
  c.filter_channel = wide ? 1 : s.w.stride[0];
  int64_t phases = 1, positions[kSpatial];
  for (int i = 0; i < kSpatial; i++) {
    const int d = order[i];
    const int64_t stride = s.stride[d];
    c.sizes[i] = {int(s.x.size[2 + d]), int(s.y.size[2 + d]), int(s.w.size[2 + d]),
                  int(stride),          int(s.padding[d]),    int(s.dilation[d])};
    c.from_step[i] = image.stride[2 + d], c.to_step[i] = out.stride[2 + d];
    c.filter_step[i] = wide ? filters.step[d] : s.w.stride[2 + d];
    c.size[i] = int(image.size[2 + d]);
    positions[i] = transposed ? ceil_div(out.size[2 + d], stride) : out.size[2 + d];
    c.axes[i] = transposed ? input_axis(c.sizes[i], 0) : forward_axis(c.sizes[i]);
    if (transposed) phases *= stride;
  }
  c.phases = phases > 1;
  const int64_t pieces = wide ? out.size[1] / together : out.size[1];
  const int64_t strips = ceil_div(positions[2], kOut);
  const int64_t threads = pieces * strips * positions[1] * positions[0];
  if (threads >= int64_t(1) << 31)
    throw std::invalid_argument("conv: x: expected images of fewer than 2^31 elements");
  c.threads = unsigned(threads);
  if (c.channels_first)
    c.planes = Divisor(positions[1] * strips * pieces), c.lines = Divisor(strips * pieces),
    c.strips = Divisor(pieces);
  else
    c.pieces = Divisor(positions[0] * strips * positions[1]),
    c.planes = Divisor(strips * positions[1]), c.strips = Divisor(positions[1]);
  with_float_type("conv", s.type, [&](auto zero) {
    using T = decltype(zero);
    wide ? run<T, kLanes<T>>(c, phases, stream) : run<T, 1>(c, phases, stream);
  });
}

}  // namespace fastnn::cuda
