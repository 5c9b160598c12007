// The copy that brings the channels of a pixel together: a transposition through shared memory, so
// that both its reads and its writes meet neighbours, whichever of the two lie together.
#include "cuda/conv/pixels.hpp"

#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kThreads = 256, kTile = 1024;  // elements at a time
constexpr int kPieceBytes = 16;
constexpr int64_t kMostBlocks = 65535;

struct Copy {
  const void* from;
  void* to;
  int64_t image, group, channel, step[kSpatial];  // strides of `from`, in elements
  int64_t images, groups, pixels;
  int size[kSpatial];
  int channels, padded;
  int tile_channels;  // a power of two
};

template <class T>
__global__ void __launch_bounds__(kThreads) bring_together(const Copy c) {
  FASTNN_SHARED(T, tile, [2 * kTile]);  // rows of tile_channels and one more: banks differ
  const int width = c.tile_channels, height = kTile / width;
  const int across = (c.padded + width - 1) / width;
  const int64_t first_pixel = int64_t(blockIdx.x) / across * height;
  const int first_channel = int(blockIdx.x % across) * width;
  const auto* from = static_cast<const T*>(c.from);
  auto* to = static_cast<T*>(c.to);
  for (int64_t outer = blockIdx.y; outer < c.images * c.groups; outer += gridDim.y) {
    const int64_t image = outer / c.groups, group = outer % c.groups;
    for (int i = int(threadIdx.x); i < kTile; i += kThreads) {
      const bool along = c.channel == 1;
      const int row = along ? i / width : i % height, column = along ? i % width : i / height;
      const int64_t pixel = first_pixel + row;
      const int channel = first_channel + column;
      T x{};
      if (pixel < c.pixels && channel < c.channels) {
        const int64_t line = pixel / c.size[2], w = pixel % c.size[2];
        x = from[image * c.image + group * c.group + channel * c.channel +
                 line / c.size[1] * c.step[0] + line % c.size[1] * c.step[1] + w * c.step[2]];
      }
      tile[row * (width + 1) + column] = x;
    }
    __syncthreads();
    for (int i = int(threadIdx.x); i < kTile; i += kThreads) {
      const int row = i / width, column = i % width;
      const int64_t pixel = first_pixel + row;
      const int channel = first_channel + column;
      if (pixel < c.pixels && channel < c.padded)
        to[((image * c.pixels + pixel) * c.groups + group) * c.padded + channel] =
            tile[row * (width + 1) + column];
    }
    __syncthreads();  // before the tile is filled again
  }
}

bool evenly_spaced(const Tensor5& t) {
  int64_t step = 0, count = 1;  // of the dimensions within
  for (const int d : {4, 3, 2, 0}) {
    if (t.size[d] == 1) continue;
    if (count == 1)
      step = t.stride[d];
    else if (t.stride[d] != step * count)
      return false;
    count *= t.size[d];
  }
  return true;
}

}  // namespace

Pixels in_pixels(const Tensor5& t, int64_t groups, DType type, bool even, const Allocate& allocate,
                 void* stream) {
  const int64_t size = int64_t(dtype_size(type)), each = kPieceBytes / size;
  const int64_t channels = t.size[1] / groups, pixels = t.spatial();
  Pixels p;
  bool direct = (t.stride[1] == 1 || t.size[1] == 1) && channels % each == 0 &&
                reinterpret_cast<uintptr_t>(t.data) % kPieceBytes == 0 &&
                (!even || evenly_spaced(t));
  for (const int d : {0, 2, 3, 4}) direct = direct && (t.size[d] == 1 || t.stride[d] % each == 0);
  if (direct) {
    p = {t.data, t.stride[0], {t.stride[2], t.stride[3], t.stride[4]}, channels, int(channels)};
    return p;
  }
  const int64_t padded = ceil_div(channels, each) * each;
  p.channels = int(padded), p.group = padded;
  p.step[2] = groups * padded;
  p.step[1] = p.step[2] * t.size[4], p.step[0] = p.step[1] * t.size[3];
  p.image = p.step[2] * pixels;
  void* to = allocate(size_t(t.size[0] * p.image * size));
  p.data = static_cast<const char*>(to);
  Copy c{t.data,        to,
         t.stride[0],   channels * t.stride[1],
         t.stride[1],   {t.stride[2], t.stride[3], t.stride[4]},
         t.size[0],     groups,
         pixels,        {int(t.size[2]), int(t.size[3]), int(t.size[4])},
         int(channels), int(padded),
         int(each)};
  while (c.tile_channels < 32 && c.tile_channels < padded) c.tile_channels *= 2;
  const int64_t blocks =
      ceil_div(pixels, kTile / c.tile_channels) * ceil_div(padded, c.tile_channels);
  const int64_t outer = t.size[0] * groups;
  const auto go = [&](auto zero) {
    launch(bring_together<decltype(zero)>,
           dim3(unsigned(blocks), unsigned(outer < kMostBlocks ? outer : kMostBlocks)),
           dim3(kThreads), 0, stream, c);
  };
  if (blocks == 0 || outer == 0) return p;
  // What is copied are bits, of so many bytes.
  size == 4 ? go(uint32_t{}) : size == 2 ? go(uint16_t{}) : go(uint8_t{});
  return p;
}

}  // namespace fastnn::cuda
