// A convolution, or its gradient by the input, as a matrix product that lies nowhere: rows are the
// pixels of the result, columns its channels, and K runs over the taps of a filter and, of each,
// the channels. The main loop is the matrix product's; what is gathered are 16 bytes of a pixel's
// channels at a time, by cp.async, which also writes the zeros around the image.
#include "cuda/conv/implicit.hpp"

#include <algorithm>
#include <type_traits>

#include "cuda/conv/copies.cuh"
#include "cuda/gemm/epilogue.cuh"
#include "cuda/gemm/mainloop.cuh"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

// What the kernel knows of a call.
struct Call : Gathered {
  Gemm g;
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
  const Tensor5& out = p.transposed ? s.x : s.y;
  Call c{};
  c.g = p.g;
  static_cast<Gathered&>(c) = gathered(s, p.transposed, p.image, p.filters);
  int64_t rows = out.size[0], phases = 1;
  for (int d = 0; d < kSpatial; d++) {
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
