// A convolution, or its gradient by the input, as a matrix product that lies nowhere: rows are the
// pixels of the result, columns its channels, and K runs over the taps of a filter and, of each,
// the channels. The main loop is the matrix product's; what is gathered are 16 bytes of a pixel's
// channels at a time, by cp.async, which also writes the zeros around the image.
#include "cuda/conv/implicit.hpp"

#include <algorithm>
#include <type_traits>

#include "cuda/conv/gather.cuh"
#include "cuda/gemm/epilogue.cuh"
#include "cuda/gemm/mainloop.cuh"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kFarOutside = -(1 << 30);  // a pixel's place that no tap brings into the image

// What the kernel knows of a call.
struct Call {
  Gemm g;
  AxisSizes axes[kSpatial];
  const char *image, *filters;
  int64_t image_stride, image_group, image_step[kSpatial];
  int64_t filter_stride, filter_group, filter_step[kSpatial];
  int64_t out_image, out_group, out_step[kSpatial];
  int images, channels;  // of K in a tap, in pieces
  int rows, columns;     // of the filters: how many of a group there are to read, and wide
  int image_size[kSpatial];
};

// Copies the tiles of one step of K after the other. Filters lie along K (channels of x together)
// for y, and across for x.
template <class Element, class S, bool transposed>
class Copies {
 public:
  using A = TileOf<Element, S::kM, true, S::kThreads>;
  using B = TileOf<Element, S::kN, !transposed, S::kThreads>;

  __device__ __forceinline__ Copies(const Call& c, const Axis* axes, int group, int64_t first_row,
                                    int64_t rows, int first_column)
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

  const Call& c_;
  const Axis* axes_;
  const char *image_, *filters_;
  int64_t origin_[kA];
  int at_[kA][kSpatial];
  int column_;
  TapWalk walk_, of_rows_[transposed ? kB : 1];
};

// An element of the result by one thread, without tensor cores.
template <class Element, bool transposed>
__device__ float plain_sum(const Call& c, const Axis* axes, int group, int64_t row, int column) {
  const auto* image = reinterpret_cast<const Element*>(c.image) + group * c.image_group;
  const auto* filters = reinterpret_cast<const Element*>(c.filters) + group * c.filter_group;
  const Place p = place_of(int(row), axes[0].positions, axes[1].positions, axes[2].positions);
  float sum = 0;
  TapWalk walk;
  for (walk.begin(0, axes, c.channels); walk.exists(axes); walk.advance(1, axes, c.channels)) {
    int64_t at = p.image * c.image_stride + walk.channel, of = 0;
    bool inside = !transposed || walk.channel < c.rows;
    for (int d = 0; d < kSpatial; d++) {
      const int pixel = axes[d].first + p.at[d] * axes[d].stride + walk.tap[d] * axes[d].step;
      inside = inside && unsigned(pixel) < unsigned(c.image_size[d]);
      at += pixel * c.image_step[d];
      of += (axes[d].tap_first + walk.tap[d] * axes[d].tap_step) * c.filter_step[d];
    }
    if (!inside) continue;
    of += transposed ? walk.channel * c.filter_stride + column
                     : column * c.filter_stride + walk.channel;
    sum = fmaf(to_float(image[at]), to_float(filters[of]), sum);
  }
  return sum;
}

template <class Mode, class S, bool transposed>
__global__ void __launch_bounds__(S::kThreads, 1)
    implicit(const Call c, const int64_t tile_rows, const int64_t tile_columns) {
  using Element = typename Mode::Element;
  using Load = Copies<Element, S, transposed>;
  constexpr bool kSplit = sizeof(Element) == 4;
  char* shared = dynamic_shared<char>();
  FASTNN_SHARED(Axis, axes, [kSpatial]);
  FASTNN_SHARED(int64_t, row_at, [S::kM]);  // of the result, in elements; -1: there is none
  const int thread = int(threadIdx.x), group = int(blockIdx.y);
  if (thread < kSpatial)
    axes[thread] =
        transposed ? phase_axis(c.axes, thread, int(blockIdx.z)) : forward_axis(c.axes[thread]);
  __syncthreads();
  const TilePlace tile = tile_place(blockIdx.x, tile_rows, tile_columns);
  const int64_t first_row = tile.row * S::kM;
  const int64_t rows =
      int64_t(c.images) * axes[0].positions * axes[1].positions * axes[2].positions;
  const int first_column = int(tile.column) * S::kN;
  if (first_row >= rows) return;  // of this phase
  if (thread < S::kM) {
    int64_t at = -1;
    if (first_row + thread < rows) {
      const Place p = place_of(int(first_row) + thread, axes[0].positions, axes[1].positions,
                               axes[2].positions);
      at = p.image * c.out_image + group * c.out_group;
      for (int d = 0; d < kSpatial; d++)
        at += (axes[d].out_first + int64_t(p.at[d]) * axes[d].out_step) * c.out_step[d];
    }
    row_at[thread] = at;
  }

  const int64_t k = int64_t(axes[0].taps) * axes[1].taps * axes[2].taps * c.channels;
  Load copies(c, axes, group, first_row, rows, first_column);
  const bool again = tile_sums<Mode, S, typename Load::A, typename Load::B>(
      shared, int((k + Load::A::kDepth - 1) / Load::A::kDepth),
      [&](int64_t, char* to_a, char* to_b) { copies.load(to_a, to_b); });
  const auto* staged = reinterpret_cast<const float*>(shared);

  // Neighbours in the result are written by neighbouring threads, whichever way it lies.
  const bool across = c.g.c.column != 1;
  for (int i = thread; i < S::kM * S::kN / 4; i += S::kThreads) {
    const int row = across ? i % S::kM : i / (S::kN / 4);
    const int column = 4 * (across ? i / S::kM : i % (S::kN / 4));
    const int64_t left = c.g.n - first_column - column;
    if (row_at[row] < 0 || left <= 0) continue;
    const int count = left < 4 ? int(left) : 4;
    float four[4];
#pragma unroll
    for (int e = 0; e < 4; e++) four[e] = staged[staged_at<S>(row, column) + e];
    if constexpr (kSplit)
      if (again)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (e < count)
            four[e] = plain_sum<Element, transposed>(c, axes, group, first_row + row,
                                                     first_column + column + e);
    const int64_t at = row_at[row] + (first_column + column) * c.g.c.column;
    finish_at(c.g, at, at, 0, group * c.g.n + first_column + column, four, count);
  }
}

template <class Mode, class S, bool transposed>
void run(const Call& c, int64_t rows, int64_t groups, int64_t phases, void* stream) {
  const int64_t tile_rows = ceil_div(rows, S::kM), tile_columns = ceil_div(c.g.n, S::kN);
  constexpr size_t shared = size_t(kStages) * (S::kM + S::kN) * kRowBytes;
  launch(implicit<Mode, S, transposed>,
         dim3(unsigned(tile_rows * tile_columns), unsigned(groups), unsigned(phases)),
         dim3(S::kThreads), shared, stream, c, tile_rows, tile_columns);
}

template <class Mode, bool transposed>
void choose_shape(const Call& c, int64_t rows, int64_t groups, int64_t phases, void* stream) {
  // As for a matrix product; few channels leave half of the largest tiles empty.
  const int64_t columns = c.g.n <= LargeGroups::kN ? LargeGroups::kN : Large::kN;
  const int64_t large = ceil_div(rows, Large::kM) * ceil_div(c.g.n, columns) * groups * phases;
  if (large < kEnoughBlocks) return run<Mode, Small, transposed>(c, rows, groups, phases, stream);
  if constexpr (Mode::kGroup == 0)
    if (c.g.n > LargeGroups::kN)
      return run<Mode, Large, transposed>(c, rows, groups, phases, stream);
  run<Mode, LargeGroups, transposed>(c, rows, groups, phases, stream);
}

template <class Mode>
void choose_way(const Call& c, bool transposed, int64_t rows, int64_t groups, int64_t phases,
                void* stream) {
  transposed ? choose_shape<Mode, true>(c, rows, groups, phases, stream)
             : choose_shape<Mode, false>(c, rows, groups, phases, stream);
}

}  // namespace

void implicit_product(const Implicit& p, void* stream) {
  const Conv& s = *p.sizes;
  const Tensor5 &image = p.transposed ? s.y : s.x, &out = p.transposed ? s.x : s.y;
  Call c{};
  c.g = p.g;
  c.image = p.image.data, c.filters = p.filters.data;
  c.image_stride = p.image.image, c.image_group = p.image.group;
  c.filter_stride = p.filters.image, c.filter_group = s.w.size[0] / s.groups * p.filters.image;
  c.out_image = out.stride[0], c.out_group = out.size[1] / s.groups * out.stride[1];
  c.images = int(image.size[0]), c.channels = p.image.channels;
  c.rows = int(s.w.size[0] / s.groups), c.columns = p.filters.channels;
  int64_t rows = image.size[0], phases = 1;
  for (int d = 0; d < kSpatial; d++) {
    c.axes[d] = {int(s.x.size[2 + d]), int(s.y.size[2 + d]), int(s.w.size[2 + d]),
                 int(s.stride[d]),     int(s.padding[d]),    int(s.dilation[d])};
    c.image_step[d] = p.image.step[d], c.filter_step[d] = p.filters.step[d];
    c.out_step[d] = out.stride[2 + d];
    c.image_size[d] = int(image.size[2 + d]);
    rows *= p.transposed ? ceil_div(out.size[2 + d], s.stride[d]) : out.size[2 + d];
    if (p.transposed) phases *= s.stride[d];
  }
  const auto go = [&](auto mode) {
    choose_way<decltype(mode)>(c, p.transposed, rows, s.groups, phases, stream);
  };
  switch (p.g.a_type) {
    case DType::f32:
      return p.g.parts == 3   ? go(SplitF32<3>{})
             : p.g.parts == 2 ? go(SplitF32<2>{})
                              : go(SplitF32<1>{});
    case DType::bf16:
      return go(Bf16{});
    case DType::f16:
      return go(F16{});
    default:
      throw std::invalid_argument(std::string("conv: no CUDA kernel for ") +
                                  dtype_name(p.g.a_type));
  }
}

}  // namespace fastnn::cuda
