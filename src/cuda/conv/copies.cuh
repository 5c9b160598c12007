// Tiles of images and filters, gathered by cp.async: what implicit products copy in a step of K.
#pragma once
#include "cuda/conv/gather.cuh"
#include "cuda/conv/pixels.hpp"
#include "cuda/gemm/tiles.cuh"

namespace fastnn::cuda {

constexpr int kFarOutside = -(1 << 30);  // a pixel's place that no tap brings into the image

// Where the operands and the result lie, and how large they are.
struct Gathered {
  AxisSizes axes[kSpatial];
  const char *image, *filters;
  int64_t image_stride, image_group, image_step[kSpatial];
  int64_t filter_stride, filter_group, filter_step[kSpatial];
  int64_t out_image, out_group, out_step[kSpatial];
  int images, channels;  // of K in a tap, in pieces
  int rows, columns;     // of the filters: how many of a group there are to read, and wide
  int image_size[kSpatial];
};

// Of a convolution, or of its gradient by the input.
inline Gathered gathered(const Conv& s, bool transposed, const Pixels& image,
                         const Pixels& filters) {
  const Tensor5 &from = transposed ? s.y : s.x, &out = transposed ? s.x : s.y;
  Gathered c{};
  c.image = image.data, c.filters = filters.data;
  c.image_stride = image.image, c.image_group = image.group;
  c.filter_stride = filters.image, c.filter_group = s.w.size[0] / s.groups * filters.image;
  c.out_image = out.stride[0], c.out_group = out.size[1] / s.groups * out.stride[1];
  c.images = int(from.size[0]), c.channels = image.channels;
  c.rows = int(s.w.size[0] / s.groups), c.columns = filters.channels;
  for (int d = 0; d < kSpatial; d++) {
    c.axes[d] = {int(s.x.size[2 + d]), int(s.y.size[2 + d]), int(s.w.size[2 + d]),
                 int(s.stride[d]),     int(s.padding[d]),    int(s.dilation[d])};
    c.image_step[d] = image.step[d], c.filter_step[d] = filters.step[d];
    c.out_step[d] = out.stride[2 + d];
    c.image_size[d] = int(from.size[2 + d]);
  }
  return c;
}

// Copies the tiles of one step of K after the other. Filters lie along K (channels of x together)
// for y, and across for x.
template <class Element, class S, bool transposed>
class Copies {
 public:
  using A = TileOf<Element, S::kM, true, S::kThreads>;
  using B = TileOf<Element, S::kN, !transposed, S::kThreads>;

  __device__ __forceinline__ Copies(const Gathered& c, const Axis* axes, int group,
                                    int64_t first_row, int64_t rows, int first_column)
      : c_(c), axes_(axes) {
    const int thread = int(threadIdx.x);
    image_ = c.image + group * c.image_group * A::kSize;
    filters_ = c.filters + group * c.filter_group * A::kSize;
#pragma unroll
    for (int i = 0; i < kA; i++) {
      const int64_t row = first_row + thread / A::kRow + i * (S::kThreads / A::kRow);
      at_[i][0] = kFarOutside, at_[i][1] = at_[i][2] = 0, origin_[i] = 0;
      if (row >= rows) continue;
      const Place p = place_of(int(row), axes[0].positions, axes[1].positions, axes[2].positions);
      origin_[i] = p.image * c.image_stride;
#pragma unroll
      for (int d = 0; d < kSpatial; d++) {
        at_[i][d] = axes[d].first + p.at[d] * axes[d].stride;
        origin_[i] += at_[i][d] * c.image_step[d];
      }
    }
    walk_.begin(thread % A::kRow * A::kEach, axes, c.channels);
    if constexpr (transposed) {
      column_ = first_column + thread % B::kRow * B::kEach;
#pragma unroll
      for (int i = 0; i < kB; i++)
        of_rows_[i].begin(thread / B::kRow + i * (S::kThreads / B::kRow), axes, c.channels);
    } else {
      column_ = first_column + thread / B::kRow;
    }
  }

  __device__ __forceinline__ void load(char* to_a, char* to_b) {
    const int thread = int(threadIdx.x), piece = thread % A::kRow;
    const bool there = walk_.exists(axes_);
    int64_t beside = walk_.channel;
    int to[kSpatial];
#pragma unroll
    for (int d = 0; d < kSpatial; d++) {
      to[d] = walk_.tap[d] * axes_[d].step;
      beside += to[d] * c_.image_step[d];
    }
#pragma unroll
    for (int i = 0; i < kA; i++) {
      bool inside = there;
#pragma unroll
      for (int d = 0; d < kSpatial; d++)
        inside = inside && unsigned(at_[i][d] + to[d]) < unsigned(c_.image_size[d]);
      const char* from = image_ + (origin_[i] + beside) * A::kSize;
      const int row = thread / A::kRow + i * (S::kThreads / A::kRow);
      ptx::cp_async<kPieceBytes>(to_a + A::offset(row, piece), inside ? from : c_.image,
                                 inside ? kPieceBytes : 0);
    }
#pragma unroll
    for (int i = 0; i < kB; i++) {
      const int row = thread / B::kRow + i * (S::kThreads / B::kRow);
      const TapWalk& walk = transposed ? of_rows_[i] : walk_;
      int64_t at = 0;
#pragma unroll
      for (int d = 0; d < kSpatial; d++)
        at += (axes_[d].tap_first + walk.tap[d] * axes_[d].tap_step) * c_.filter_step[d];
      bool inside;
      if constexpr (transposed) {
        at += walk.channel * c_.filter_stride + column_;
        inside = walk.exists(axes_) && walk.channel < c_.rows && column_ < c_.columns;
      } else {
        const int column = column_ + i * (S::kThreads / B::kRow);
        at += column * c_.filter_stride + walk.channel;
        inside = there && column < c_.rows;
      }
      const char* from = filters_ + at * B::kSize;
      ptx::cp_async<kPieceBytes>(to_b + B::offset(row, thread % B::kRow),
                                 inside ? from : c_.filters, inside ? kPieceBytes : 0);
    }
    walk_.advance(A::kDepth, axes_, c_.channels);
    if constexpr (transposed)
#pragma unroll
      for (int i = 0; i < kB; i++) of_rows_[i].advance(A::kDepth, axes_, c_.channels);
  }

 private:
  static constexpr int kA = A::kPieces / S::kThreads, kB = B::kPieces / S::kThreads;
  static_assert(S::kThreads % A::kRow == 0 && S::kThreads % B::kRow == 0);

  const Gathered& c_;
  const Axis* axes_;
  const char *image_, *filters_;
  int64_t origin_[kA];
  int at_[kA][kSpatial];
  int column_;
  TapWalk walk_, of_rows_[transposed ? kB : 1];
};

}  // namespace fastnn::cuda
