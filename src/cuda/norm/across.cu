// Batch and group norm where channels are neighbours (channels-last). A thread has 16 bytes of a
// row, and of some rows below each other; a block a tile of up to 32 such columns, so that a row's
// part is whole sectors. What the threads of a column have found is added up by shuffles and
// through shared memory; the sums of all chunks of rows are combined by another kernel, and a
// second pass writes the results, beginning with what the first one read last, which L2 still has.
#include "cuda/norm/coefficients.cuh"
#include "cuda/norm/statistics.cuh"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kWarps = kAcrossThreads / 32;
// Rows of a thread that are under way; of 16 bits twice as many numbers fill the registers.
template <class T>
constexpr int kAtOnce = sizeof(T) == 4 ? 4 : 2;

// What a thread has to do: which channels, which rows.
template <class T>
struct Column {
  static constexpr int kEach = Pack<T>::kEach;
  const NormLayout& l;
  int lanes;  // threads of a row
  int64_t image, chunk, channel;
  int64_t row, step, end;  // of this thread: the first row, and how far it is to the next
  int mine;                // channels

  __device__ Column(const Pass& pass, bool backwards) : l(pass.layout), lanes(pass.threads) {
    const int64_t width = int64_t(lanes) * kEach, tiles = (l.channels + width - 1) / width;
    int64_t item = backwards ? int64_t(gridDim.x) - 1 - blockIdx.x : blockIdx.x;
    channel = item % tiles * width + int(threadIdx.x) % lanes * kEach;
    item /= tiles;
    image = item / pass.chunks;
    chunk = item - image * pass.chunks;
    const int64_t rest = l.channels - channel;
    mine = rest < 0 ? 0 : rest < kEach ? int(rest) : kEach;
    step = kAcrossThreads / lanes;
    row = chunk * pass.chunk + int(threadIdx.x) / lanes;
    end = chunk * pass.chunk + pass.chunk;
    end = end < l.rows ? end : l.rows;
  }
  __device__ T* at(int o, int64_t r) const {
    return static_cast<T*>(l.data[o]) + image * l.image[o] + channel * l.channel[o] + r * l.row[o];
  }
  // The pack of each of n rows from `from` on; zeros where there is none.
  template <int n>
  __device__ __forceinline__ void load(Pack<T> (&to)[n], int o, int64_t from) const {
    const T* data = at(o, from);
    const int64_t next = step * l.row[o];
    const int64_t rows = mine && from < end ? (end - from + step - 1) / step : 0;
    if (l.packed[o]) {
#pragma unroll
      for (int i = 0; i < n; i++, data += next)
        if (i < rows)
          to[i] = *reinterpret_cast<const Pack<T>*>(data);
        else
          to[i] = nothing();
    } else {
#pragma unroll
      for (int i = 0; i < n; i++, data += next)
#pragma unroll
        for (int k = 0; k < kEach; k++)
          to[i].element[k] = i < rows && k < mine ? data[k * l.channel[o]] : from_float<T>(0);
    }
  }
  template <int n>
  __device__ __forceinline__ void store(const Pack<T> (&x)[n], int o, int64_t from) const {
    T* data = at(o, from);
    const int64_t next = step * l.row[o];
    const int64_t rows = mine && from < end ? (end - from + step - 1) / step : 0;
    if (l.packed[o]) {
#pragma unroll
      for (int i = 0; i < n; i++, data += next)
        if (i < rows) *reinterpret_cast<Pack<T>*>(data) = x[i];
    } else {
#pragma unroll
      for (int i = 0; i < n; i++, data += next)
#pragma unroll
        for (int k = 0; k < kEach; k++)
          if (i < rows && k < mine) data[k * l.channel[o]] = x[i].element[k];
    }
  }
  __device__ static Pack<T> nothing() {
    Pack<T> pack;
#pragma unroll
    for (int k = 0; k < kEach; k++) pack.element[k] = from_float<T>(0);
    return pack;
  }
  // Of channel k of this thread, in arrays (images, chunks, channels) and (images, channels).
  __device__ int64_t partial(int64_t chunks, int k) const {
    return (image * chunks + chunk) * l.channels + channel + k;
  }
  __device__ int64_t number(int k) const { return image * l.channels + channel + k; }
};

// What the threads of a column have in common.
template <int each>
struct Tile {
  // [of two sums][warp][channel], and [of two sums][channel]
  struct Memory {
    float parts[2][kWarps][32 * each], totals[2][32 * each];
  };
  Memory& memory;
  int lanes;

  // Each thread gets the totals of its own channels.
  template <class OpA, class OpB>
  __device__ __forceinline__ void reduce(float (&a)[each], float (&b)[each]) const {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, column = lane % lanes;
    for (int offset = lanes; offset < 32; offset *= 2)
#pragma unroll
      for (int k = 0; k < each; k++) {
        a[k] = OpA::of(a[k], __shfl_xor_sync(0xffffffffu, a[k], offset));
        b[k] = OpB::of(b[k], __shfl_xor_sync(0xffffffffu, b[k], offset));
      }
    if (lane < lanes) {
#pragma unroll
      for (int k = 0; k < each; k++) {
        memory.parts[0][warp][column * each + k] = a[k];
        memory.parts[1][warp][column * each + k] = b[k];
      }
    }
    __syncthreads();
    for (int i = int(threadIdx.x); i < lanes * each; i += kAcrossThreads) {
      float x = memory.parts[0][0][i], y = memory.parts[1][0][i];
#pragma unroll
      for (int w = 1; w < kWarps; w++)
        x = OpA::of(x, memory.parts[0][w][i]), y = OpB::of(y, memory.parts[1][w][i]);
      memory.totals[0][i] = x, memory.totals[1][i] = y;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < each; k++) {
      a[k] = memory.totals[0][column * each + k];
      b[k] = memory.totals[1][column * each + k];
    }
  }
};

// As moments(), of each channel.
template <class T>
__global__ void __launch_bounds__(kAcrossThreads) across_statistics(const Pass pass) {
  constexpr int each = Pack<T>::kEach;
  FASTNN_SHARED(typename Tile<each>::Memory, memory);
  const Column<T> column(pass, false);
  const Tile<each> tile{memory, column.lanes};
  Pack<T> x[kAcrossRows];
  column.load(x, 0, column.row);
  float sum[each], largest[each];
#pragma unroll
  for (int k = 0; k < each; k++) sum[k] = largest[k] = 0;
#pragma unroll
  for (int i = 0; i < kAcrossRows; i++)
#pragma unroll
    for (int k = 0; k < each; k++) {
      const float v = to_float(x[i].element[k]);
      sum[k] += v * pass.share, largest[k] = fmaxf(largest[k], fabsf(v));
    }
  tile.template reduce<Add, Largest>(sum, largest);
  const float n = float(column.end - column.chunk * pass.chunk);
  const float unshare = 1 / (n * pass.share), sqrt_eps = sqrtf(float(pass.eps));
  Moments m[each];
  float first[each], squares[each];
#pragma unroll
  for (int k = 0; k < each; k++) {
    m[k].scale = unit_scale(fmaxf(largest[k], sqrt_eps));
    m[k].shift = sum[k] * unshare * m[k].scale;
    first[k] = squares[k] = 0;
  }
#pragma unroll
  for (int i = 0; i < kAcrossRows; i++)
    if (column.row + i * column.step < column.end) {
#pragma unroll
      for (int k = 0; k < each; k++) {
        const float d = m[k].centered(to_float(x[i].element[k]));
        first[k] += d, squares[k] += d * d;
      }
    }
  tile.template reduce<Add, Add>(first, squares);
  if (int(threadIdx.x) >= column.lanes) return;
#pragma unroll
  for (int k = 0; k < each; k++)
    if (k < column.mine) {
      m[k].find(first[k], squares[k], n, true);
      pass.partials[column.partial(pass.chunks, k)] = {m[k].mean(), m[k].variance() * n};
    }
}

template <class T>
__global__ void __launch_bounds__(kAcrossThreads) across_results(const Pass pass) {
  constexpr int each = Pack<T>::kEach;
  const Column<T> column(pass, true);
  const NormLayout& l = pass.layout;
  Coefficients c[each];
#pragma unroll
  for (int k = 0; k < each; k++)
    if (k < column.mine) c[k] = pass.coefficients[column.number(k)];
  for (int64_t row = column.row; row < column.end; row += kAtOnce<T> * column.step) {
    Pack<T> x[kAtOnce<T>], y[kAtOnce<T>];
    column.load(x, 0, row);
    if (l.data[1]) column.load(y, 1, row);
#pragma unroll
    for (int i = 0; i < kAtOnce<T>; i++)
#pragma unroll
      for (int k = 0; k < each; k++) {
        float value = (to_float(x[i].element[k]) - c[k].center) * c[k].scale + c[k].shift;
        if (l.data[1]) value += to_float(y[i].element[k]);
        if (pass.relu) value = relu_of(value);
        x[i].element[k] = from_float<T>(value);
      }
    column.store(x, 2, row);
  }
}

// The gradient, 0 where relu let nothing through.
template <class T>
__device__ __forceinline__ void load_gradient(const Column<T>& column, Pack<T> (&g)[kAtOnce<T>],
                                              int64_t row) {
  column.load(g, 0, row);
  if (!column.l.data[2]) return;
  Pack<T> out[kAtOnce<T>];
  column.load(out, 2, row);
#pragma unroll
  for (int i = 0; i < kAtOnce<T>; i++)
#pragma unroll
    for (int k = 0; k < Pack<T>::kEach; k++)
      if (to_float(out[i].element[k]) <= 0) g[i].element[k] = from_float<T>(0);
}

template <class T>
__global__ void __launch_bounds__(kAcrossThreads) across_gradient_sums(const Pass pass) {
  constexpr int each = Pack<T>::kEach;
  FASTNN_SHARED(typename Tile<each>::Memory, memory);
  const Column<T> column(pass, false);
  const Tile<each> tile{memory, column.lanes};
  const int64_t groups = pass.layout.channels / pass.channel_share;
  float center[each], sum[each], along[each];
#pragma unroll
  for (int k = 0; k < each; k++) {
    const int64_t group = (column.channel + k) / pass.channel_share;
    center[k] = k < column.mine ? float(pass.mean[column.image * groups + group]) : 0;
    sum[k] = along[k] = 0;
  }
#pragma unroll
  for (int from = 0; from < kAcrossRows; from += kAtOnce<T>) {
    const int64_t row = column.row + from * column.step;
    Pack<T> g[kAtOnce<T>], x[kAtOnce<T>];
    column.load(x, 1, row);
    load_gradient(column, g, row);
#pragma unroll
    for (int i = 0; i < kAtOnce<T>; i++)
      if (row + i * column.step < column.end) {
#pragma unroll
        for (int k = 0; k < each; k++) {
          const float grad = to_float(g[i].element[k]);
          sum[k] += grad, along[k] += grad * (to_float(x[i].element[k]) - center[k]);
        }
      }
  }
  tile.template reduce<Add, Add>(sum, along);
  if (int(threadIdx.x) >= column.lanes) return;
#pragma unroll
  for (int k = 0; k < each; k++)
    if (k < column.mine) pass.partials[column.partial(pass.chunks, k)] = {sum[k], along[k]};
}

template <class T>
__global__ void __launch_bounds__(kAcrossThreads) across_gradients(const Pass pass) {
  constexpr int each = Pack<T>::kEach;
  const Column<T> column(pass, true);
  Coefficients c[each];
#pragma unroll
  for (int k = 0; k < each; k++)
    if (k < column.mine) c[k] = pass.coefficients[column.number(k)];
  for (int64_t row = column.row; row < column.end; row += kAtOnce<T> * column.step) {
    Pack<T> g[kAtOnce<T>], x[kAtOnce<T>];
    if (pass.training) column.load(x, 1, row);
    load_gradient(column, g, row);
    if (pass.layout.data[4]) column.store(g, 4, row);
#pragma unroll
    for (int i = 0; i < kAtOnce<T>; i++)
#pragma unroll
      for (int k = 0; k < each; k++) {
        float value = to_float(g[i].element[k]) * c[k].scale;
        if (pass.training)
          value += fmaf(to_float(x[i].element[k]) - c[k].center, c[k].by_x, c[k].shift);
        g[i].element[k] = from_float<T>(value);
      }
    column.store(g, 3, row);
  }
}

template <bool backward>
void run(const Pass& pass, void* stream) {
  const NormLayout& l = pass.layout;
  with_float_type("norm", pass.type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t tiles = ceil_div(l.channels, int64_t(pass.threads) * Pack<T>::kEach);
    const dim3 grid(unsigned(l.images * pass.chunks * tiles));
    auto* const sums = backward ? across_gradient_sums<T> : across_statistics<T>;
    auto* const results = backward ? across_gradients<T> : across_results<T>;
    launch(pass.stage == Stage::sums ? sums : results, grid, dim3(kAcrossThreads), 0, stream, pass);
  });
}

}  // namespace

void across_forward(const Pass& pass, void* stream) { run<false>(pass, stream); }
void across_backward(const Pass& pass, void* stream) { run<true>(pass, stream); }

}  // namespace fastnn::cuda
