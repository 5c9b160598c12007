// The gradient of a convolution by its weight, as a matrix product: rows are the channels of y,
// columns the taps and, of each, the channels of x, and K runs over the pixels of all images. Both
// operands lie across. There are few rows and columns and much of K, which is therefore divided
// among blocks; what they find is added up in its order by a second kernel.
#include <algorithm>

#include "cuda/conv/gather.cuh"
#include "cuda/conv/implicit.hpp"
#include "cuda/divisor.cuh"
#include "cuda/gemm/epilogue.cuh"
#include "cuda/gemm/mainloop.cuh"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

// Blocks that are worth dividing K for, and the fewest steps of K that a block gets then.
constexpr int64_t kWantedBlocks = 264, kLeastSteps = 8;
constexpr int kThreads = 256;

struct Call {
  Gemm g;  // n: channels of x in a group; c: w, whose columns are the channels
  const char *x, *y;
  int64_t x_image, x_group, x_step[kSpatial];
  int64_t y_group, y_step;
  int64_t w_row, w_step[kSpatial];
  int x_size[kSpatial], kernel[kSpatial], stride[kSpatial], padding[kSpatial], dilation[kSpatial];
  Divisor pixels, plane, line;  // of y: how many there are in an image, a plane and a line
  int channels, y_channels;     // in pieces
  int columns;                  // taps * channels
  int64_t positions, split;     // all of K, and how much of it a block gets
  float* partial;               // a block's sums, where others have more: split, group, row, column
};

// A column's tap, counted along each axis, and its channel.
struct Column {
  int channel, tap[kSpatial];

  __device__ __forceinline__ Column(const Call& c, int column) {
    channel = column % c.channels, column /= c.channels;
    tap[2] = column % c.kernel[2], column /= c.kernel[2];
    tap[1] = column % c.kernel[1], tap[0] = column / c.kernel[1];
  }
  __device__ __forceinline__ int64_t offset(const Call& c) const {
    return tap[0] * c.w_step[0] + tap[1] * c.w_step[1] + tap[2] * c.w_step[2] +
           channel * c.g.c.column;
  }
};

// What a column's tap sees of the pixels of y.
class Seen {
 public:
  __device__ __forceinline__ Seen(const Call& c, const Column& column) : beside_(column.channel) {
#pragma unroll
    for (int d = 0; d < kSpatial; d++) {
      to_[d] = column.tap[d] * c.dilation[d] - c.padding[d];
      beside_ += to_[d] * c.x_step[d];
    }
  }
  // The element of x for pixel `position` of y, or -1 outside of the image.
  __device__ __forceinline__ int64_t of(const Call& c, unsigned position) const {
    const unsigned image = c.pixels.take(position), plane = c.plane.take(position),
                   line = c.line.take(position);
    const int at[kSpatial] = {int(plane) * c.stride[0], int(line) * c.stride[1],
                              int(position) * c.stride[2]};
    int64_t element = image * c.x_image + beside_;
#pragma unroll
    for (int d = 0; d < kSpatial; d++) {
      if (unsigned(at[d] + to_[d]) >= unsigned(c.x_size[d])) return -1;
      element += at[d] * c.x_step[d];
    }
    return element;
  }

 private:
  int to_[kSpatial];
  int64_t beside_;
};

// An element by one thread, without tensor cores: of the pixels from `first` to `end`.
template <class Element>
__device__ float plain_sum(const Call& c, int group, int64_t row, int column, int64_t first,
                           int64_t end) {
  const Seen seen(c, Column(c, column));
  const auto* x = reinterpret_cast<const Element*>(c.x) + group * c.x_group;
  const auto* y = reinterpret_cast<const Element*>(c.y) + group * c.y_group + row;
  float sum = 0;
  for (int64_t position = first; position < end; position++) {
    const int64_t at = seen.of(c, unsigned(position));
    if (at >= 0) sum = fmaf(to_float(y[position * c.y_step]), to_float(x[at]), sum);
  }
  return sum;
}

template <class Mode, class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    weight_gradient(const Call c, const int64_t tile_rows, const int64_t tile_columns) {
  using Element = typename Mode::Element;
  using A = TileOf<Element, S::kM, false, S::kThreads>;
  using B = TileOf<Element, S::kN, false, S::kThreads>;
  constexpr bool kSplit = sizeof(Element) == 4;
  constexpr int kTogether = S::kThreads / B::kRow;  // rows of a tile that are copied at a time
  static_assert(S::kThreads % B::kRow == 0);
  char* shared = dynamic_shared<char>();
  const int thread = int(threadIdx.x), group = int(blockIdx.y);
  const TilePlace tile = tile_place(blockIdx.x, tile_rows, tile_columns);
  const int64_t first_row = tile.row * S::kM;
  const int first_column = int(tile.column) * S::kN;
  const int64_t first = int64_t(blockIdx.z) * c.split,
                end = first + c.split < c.positions ? first + c.split : c.positions;

  const Source y{c.y + group * c.y_group * A::kSize, c.y_channels, end, 1, c.y_step, true};
  const char* x = c.x + group * c.x_group * B::kSize;
  const int piece = thread % B::kRow, column = first_column + piece * B::kEach;
  const Seen seen(c, Column(c, column));
  const bool again = tile_sums<Mode, S, A, B>(
      shared, int((end - first + A::kDepth - 1) / A::kDepth),
      [&](int64_t step, char* to_a, char* to_b) {
        const int64_t from = first + step * A::kDepth;
        A::load(to_a, y, first_row, from);
#pragma unroll
        for (int i = 0; i < B::kPieces / S::kThreads; i++) {
          const int row = thread / B::kRow + i * kTogether;
          const int64_t at =
              from + row < end && column < c.columns ? seen.of(c, unsigned(from + row)) : -1;
          ptx::cp_async<kPieceBytes>(to_b + B::offset(row, piece),
                                     at >= 0 ? x + at * B::kSize : c.x, at >= 0 ? kPieceBytes : 0);
        }
      });
  const auto* staged = reinterpret_cast<const float*>(shared);

  for (int i = thread; i < S::kM * S::kN / 4; i += S::kThreads) {
    const int row = i / (S::kN / 4), column = first_column + 4 * (i % (S::kN / 4));
    if (first_row + row >= c.g.m || column >= c.columns) continue;
    float four[4];
#pragma unroll
    for (int e = 0; e < 4; e++) four[e] = staged[staged_at<S>(row, column - first_column) + e];
    if constexpr (kSplit)
      if (again)
#pragma unroll
        for (int e = 0; e < 4; e++)
          four[e] = plain_sum<Element>(c, group, first_row + row, column + e, first, end);
    if (c.partial) {
      const int64_t line = (int64_t(blockIdx.z) * gridDim.y + group) * c.g.m + first_row + row;
      *reinterpret_cast<float4*>(c.partial + line * c.columns + column) =
          make_float4(four[0], four[1], four[2], four[3]);
      continue;
    }
    const Column place(c, column);  // 4 divides a tap's channels
    const int64_t left = c.g.n - place.channel;
    finish_at(c.g, (group * c.g.m + first_row + row) * c.w_row + place.offset(c), 0, 0, 0, four,
              left < 4 ? int(left) : 4);
  }
}

// Adds up what the blocks have found, four columns a thread.
__global__ void __launch_bounds__(kThreads)
    add_partial(const Call c, const int64_t lines, const int splits) {
  const int across = c.columns / 4;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= lines * across) return;
  const int64_t line = index / across;
  const Column place(c, int(index % across) * 4);
  const auto* from = reinterpret_cast<const float4*>(c.partial) + index;
  float four[4] = {0, 0, 0, 0};
#pragma unroll 4
  for (int s = 0; s < splits; s++) {
    const float4 more = from[s * lines * across];
    four[0] += more.x, four[1] += more.y, four[2] += more.z, four[3] += more.w;
  }
  const int64_t left = c.g.n - place.channel;
  finish_at(c.g, line * c.w_row + place.offset(c), 0, 0, 0, four, left < 4 ? int(left) : 4);
}

template <class Mode, class S>
void run(Call c, int64_t groups, const Allocate& allocate, void* stream) {
  constexpr int64_t kDepth = kRowBytes / sizeof(typename Mode::Element);
  const int64_t tile_rows = ceil_div(c.g.m, S::kM), tile_columns = ceil_div(c.columns, S::kN);
  const int64_t steps = ceil_div(c.positions, kDepth), tiles = tile_rows * tile_columns * groups;
  const int64_t wanted = std::max<int64_t>(1, std::min(kWantedBlocks / tiles, steps / kLeastSteps));
  c.split = std::max<int64_t>(1, ceil_div(steps, wanted)) * kDepth;
  const int64_t splits = std::max<int64_t>(1, ceil_div(c.positions, c.split));
  const int64_t lines = groups * c.g.m;
  if (splits > 1)
    c.partial = static_cast<float*>(allocate(size_t(splits * lines * c.columns) * sizeof(float)));
  constexpr size_t shared = size_t(kStages) * (S::kM + S::kN) * kRowBytes;
  launch(weight_gradient<Mode, S>,
         dim3(unsigned(tile_rows * tile_columns), unsigned(groups), unsigned(splits)),
         dim3(S::kThreads), shared, stream, c, tile_rows, tile_columns);
  if (splits > 1)
    launch(add_partial, dim3(unsigned(ceil_div(lines * c.columns / 4, kThreads))), dim3(kThreads),
           0, stream, c, lines, int(splits));
}

template <class Mode>
void choose_shape(const Call& c, int64_t groups, const Allocate& allocate, void* stream) {
  using Most = std::conditional_t<(Mode::kGroup > 0), LargeGroups, Large>;
  const int64_t most = std::max<int64_t>(
      1, c.positions * sizeof(typename Mode::Element) / (kRowBytes * kLeastSteps));
  const int64_t blocks = ceil_div(c.g.m, Most::kM) * ceil_div(c.columns, Most::kN) * groups * most;
  if (c.g.m > Small::kM && c.columns > Small::kN && blocks >= kEnoughBlocks)
    run<Mode, Most>(c, groups, allocate, stream);
  else
    run<Mode, Small>(c, groups, allocate, stream);
}

}  // namespace

void implicit_weight(const Gemm& g, const Conv& s, const Pixels& x, const Pixels& y,
                     const Allocate& allocate, void* stream) {
  Call c{};
  c.g = g;
  c.x = x.data, c.x_image = x.image, c.x_group = x.group, c.channels = x.channels;
  c.y = y.data, c.y_group = y.group, c.y_channels = y.channels;
  // Of all dimensions one stride apart any that has neighbours says which.
  for (const int d : {0, 2, 3, 4})
    if (s.y.size[d] > 1) c.y_step = d ? y.step[d - 2] : y.image;
  c.w_row = s.w.stride[0];
  c.columns = c.channels;
  for (int d = 0; d < kSpatial; d++) {
    c.x_step[d] = x.step[d], c.w_step[d] = s.w.stride[2 + d];
    c.x_size[d] = int(s.x.size[2 + d]), c.kernel[d] = int(s.w.size[2 + d]);
    c.stride[d] = int(s.stride[d]), c.padding[d] = int(s.padding[d]);
    c.dilation[d] = int(s.dilation[d]);
    c.columns *= c.kernel[d];
  }
  c.positions = s.y.size[0] * s.y.spatial();
  if (c.positions) {
    c.pixels = Divisor(s.y.spatial());
    c.plane = Divisor(s.y.size[3] * s.y.size[4]), c.line = Divisor(s.y.size[4]);
  }
  const auto go = [&](auto mode) { choose_shape<decltype(mode)>(c, s.groups, allocate, stream); };
  switch (g.a_type) {
    case DType::f32:
      return g.parts == 3   ? go(SplitF32<3>{})
             : g.parts == 2 ? go(SplitF32<2>{})
                            : go(SplitF32<1>{});
    case DType::bf16:
      return go(Bf16{});
    case DType::f16:
      return go(F16{});
    default:
      throw std::invalid_argument(std::string("conv: no CUDA kernel for ") + dtype_name(g.a_type));
  }
}

}  // namespace fastnn::cuda
