// Limited by bytes alone. Rows of up to 4096 elements are held in registers:
// x is read once and the result written once; in the backward grad and x are read and grad_x is
// written once, statistics being computed again, and what each of up to kMostChunks groups of
// threads has summed up for the weight and the bias comes to 2 float32 an element of the row,
// written and read once. Longer rows are read three times, in the backward four, all but the first
// most likely from L2.
#include "cuda/norm/layer_norm.hpp"

#include <cmath>

#include "cuda/norm/statistics.cuh"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int64_t kMostBlocks = 1 << 20, kMostChunks = 512;
constexpr int kBlock = 128;  // threads, of groups that are no more than a warp

struct Constants {
  Count count;
  float eps, sqrt_eps;
};

// x^ = (x * scale - shift - off) * factor.
struct Normal : Moments {
  float factor;
  __device__ float of(float x) const { return (centered(x) - off) * factor; }
  __device__ float inverse_deviation() const { return scale * factor; }
};

template <class G, class Visit>
__device__ __forceinline__ Normal statistics(G& group, const Constants& c, bool centered,
                                             Visit visit) {
  Normal normal{moments(group, c.count, c.sqrt_eps, centered, visit), 0};
  normal.factor = 1 / sqrtf(normal.var + c.eps * normal.scale * normal.scale);
  return normal;
}

template <class T>
__device__ __forceinline__ float parameter(const void* data, DType type, int64_t i, float missing) {
  if (!data) return missing;
  return type == DType::f32 ? static_cast<const float*>(data)[i]
                            : to_float(static_cast<const T*>(data)[i]);
}
// The weight or bias of this thread's elements.
template <class T, class Held>
__device__ __forceinline__ void load_parameter(float (&to)[Held::mine], const Held& held,
                                               const void* data, DType type, float missing) {
  if (!data) {
#pragma unroll
    for (int j = 0; j < Held::mine; j++) to[j] = missing;
  } else if (type == DType::f32 && sizeof(T) == 2) {
    const float* from = static_cast<const float*>(data);
    constexpr int each = Pack<float>::kEach;
    const bool packs = held.in_packs() && reinterpret_cast<uintptr_t>(from) % 16 == 0;
#pragma unroll
    for (int j = 0; j < Held::mine; j += each) {
      if (packs) {
        Pack<float> pack;
        if (j < held.count) pack = *reinterpret_cast<const Pack<float>*>(from + held.index(j));
#pragma unroll
        for (int e = 0; e < each; e++) to[j + e] = j < held.count ? pack.element[e] : 0;
      } else {
#pragma unroll
        for (int e = 0; e < each; e++) to[j + e] = j + e < held.count ? from[held.index(j + e)] : 0;
      }
    }
  } else {
    held.load(to, static_cast<const T*>(data), 1, 0);
  }
}

template <class T, int threads, int mine>
__global__ void __launch_bounds__(threads > 32 ? threads : kBlock)
    held_forward(const RowNorm norm, const Constants c) {
  constexpr int block = threads > 32 ? threads : kBlock, groups = block / threads;
  FASTNN_SHARED(typename Group<threads>::Memory, memory);
  Group<threads> group{memory};
  using Held = HeldRow<T, threads, mine>;
  const Rows& rows = norm.rows;
  const Held held{int(rows.n), int(threadIdx.x) % threads};
  for (int64_t first = int64_t(blockIdx.x) * groups; first < rows.count;
       first += int64_t(gridDim.x) * groups) {
    // Groups without a row go along with the last one's and write nothing.
    const int64_t row = first + int(threadIdx.x) / threads;
    int64_t at[kRowOperands];
    place(rows, row < rows.count ? row : rows.count - 1, at);
    float x[mine];
    held.load(x, static_cast<const T*>(rows.data[0]) + at[0], rows.step[0], 0);
    const Normal normal = statistics(group, c, norm.centered, [&](auto f) {
#pragma unroll
      for (int j = 0; j < mine; j++)
        if (j < held.count) f(x[j]);
    });
    float w[mine], b[mine];
    load_parameter<T>(w, held, norm.weight, norm.parameter_type, 1);
    load_parameter<T>(b, held, norm.bias, norm.parameter_type, 0);
    if (row < rows.count)
      held.store(static_cast<T*>(rows.data[1]) + at[1], rows.step[1],
                 [&](int j) { return normal.of(x[j]) * w[j] + b[j]; });
  }
}

// Each group of threads has every gridDim.x * groups-th row, and the sums of its own for the weight
// and the bias.
template <class T, int threads, int mine>
__global__ void __launch_bounds__(threads > 32 ? threads : kBlock)
    held_backward(const RowNorm norm, const Constants c, const int64_t chunks) {
  constexpr int block = threads > 32 ? threads : kBlock, groups = block / threads;
  FASTNN_SHARED(typename Group<threads>::Memory, memory);
  Group<threads> group{memory};
  using Held = HeldRow<T, threads, mine>;
  const Rows& rows = norm.rows;
  const Held held{int(rows.n), int(threadIdx.x) % threads};
  const int64_t chunk = int64_t(blockIdx.x) * groups + int(threadIdx.x) / threads;
  float w[mine], by_weight[mine], by_bias[mine];
  load_parameter<T>(w, held, norm.weight, norm.parameter_type, 1);
#pragma unroll
  for (int j = 0; j < mine; j++) by_weight[j] = by_bias[j] = 0;
  // Every group of a block goes as many rounds.
  for (int64_t first = 0; first < rows.count; first += chunks) {
    const int64_t row = first + chunk;
    const bool exists = chunk < chunks && row < rows.count;
    int64_t at[kRowOperands];
    place(rows, exists ? row : rows.count - 1, at);
    float g[mine], x[mine];
    held.load(g, static_cast<const T*>(rows.data[0]) + at[0], rows.step[0], 0);
    held.load(x, static_cast<const T*>(rows.data[1]) + at[1], rows.step[1], 0);
    const Normal normal = statistics(group, c, norm.centered, [&](auto f) {
#pragma unroll
      for (int j = 0; j < mine; j++)
        if (j < held.count) f(x[j]);
    });
    float sum = 0, along = 0;
#pragma unroll
    for (int j = 0; j < mine; j++) {
      x[j] = j < held.count ? normal.of(x[j]) : 0;
      sum += g[j] * w[j], along += g[j] * w[j] * x[j];
      if (exists) by_weight[j] += g[j] * x[j], by_bias[j] += g[j];
    }
    group.template reduce<Add, Add>(sum, along);
    sum = norm.centered ? sum / c.count.of : 0, along /= c.count.of;
    const float inverse = normal.inverse_deviation();
    if (exists)
      held.store(static_cast<T*>(rows.data[2]) + at[2], rows.step[2],
                 [&](int j) { return (g[j] * w[j] - sum - x[j] * along) * inverse; });
  }
  if (!norm.workspace || chunk >= chunks) return;
  float* to = norm.workspace + chunk * held.n;
#pragma unroll
  for (int j = 0; j < mine; j++)
    if (j < held.count) {
      const int i = held.index(j);
      to[i] = by_weight[j];
      to[chunks * held.n + i] = by_bias[j];
    }
}

// ---- rows that are longer
// ------------------------------------------------------------------------------------

template <class T, bool backward>
__global__ void __launch_bounds__(kLongThreads, 1)
    long_rows(const RowNorm norm, const Constants c, const int64_t chunks) {
  constexpr int each = Pack<T>::kEach, of_x = backward ? 1 : 0, last = backward ? 2 : 1;
  FASTNN_SHARED(Group<kLongThreads>::Memory, memory);
  Group<kLongThreads> group{memory};
  const Rows& rows = norm.rows;
  for (int64_t row = blockIdx.x; row < rows.count; row += chunks) {
    int64_t at[kRowOperands];
    place(rows, row, at);
    const T* x = static_cast<const T*>(rows.data[of_x]) + at[of_x];
    const T* grad = static_cast<const T*>(rows.data[0]) + at[0];
    T* out = static_cast<T*>(rows.data[last]) + at[last];
    float v[each], g[each];
    const Normal normal = statistics(group, c, norm.centered, [&](auto f) {
      for_each_piece<T>(rows.n, [&](int64_t i, int count) {
        read_piece(v, x, rows.step[of_x], i, count);
#pragma unroll
        for (int e = 0; e < each; e++)
          if (e < count) f(v[e]);
      });
    });
    if constexpr (backward) {
      // A thread's own elements of its block's sums, from one row to the next.
      float* by_weight = norm.workspace ? norm.workspace + blockIdx.x * rows.n : nullptr;
      float* by_bias = by_weight + chunks * rows.n;
      float sum = 0, along = 0;
      for_each_piece<T>(rows.n, [&](int64_t i, int count) {
        read_piece(g, grad, rows.step[0], i, count);
        read_piece(v, x, rows.step[1], i, count);
#pragma unroll
        for (int e = 0; e < each; e++)
          if (e < count) {
            const float of_x = normal.of(v[e]);
            const float h = g[e] * parameter<T>(norm.weight, norm.parameter_type, i + e, 1);
            sum += h, along += h * of_x;
            if (by_weight) {
              const bool begins = row == blockIdx.x;
              by_weight[i + e] = (begins ? 0 : by_weight[i + e]) + g[e] * of_x;
              by_bias[i + e] = (begins ? 0 : by_bias[i + e]) + g[e];
            }
          }
      });
      group.template reduce<Add, Add>(sum, along);
      sum = norm.centered ? sum / c.count.of : 0, along /= c.count.of;
      const float inverse = normal.inverse_deviation();
      for_each_piece<T>(rows.n, [&](int64_t i, int count) {
        read_piece(g, grad, rows.step[0], i, count);
        read_piece(v, x, rows.step[1], i, count);
#pragma unroll
        for (int e = 0; e < each; e++)
          if (e < count) {
            const float h = g[e] * parameter<T>(norm.weight, norm.parameter_type, i + e, 1);
            v[e] = (h - sum - normal.of(v[e]) * along) * inverse;
          }
        write_piece(v, out, rows.step[2], i, count);
      });
    } else {
      for_each_piece<T>(rows.n, [&](int64_t i, int count) {
        read_piece(v, x, rows.step[0], i, count);
#pragma unroll
        for (int e = 0; e < each; e++)
          if (e < count)
            v[e] = normal.of(v[e]) * parameter<T>(norm.weight, norm.parameter_type, i + e, 1) +
                   parameter<T>(norm.bias, norm.parameter_type, i + e, 0);
        write_piece(v, out, rows.step[1], i, count);
      });
    }
  }
}

// ---- the second stage: the chunks' sums in their order
// --------------------------------------------------------

constexpr int kColumns = 32, kLanes = 8;

__global__ void __launch_bounds__(kColumns* kLanes)
    sum_chunks(const float* workspace, const int64_t n, const int64_t chunks, double* by_weight,
               double* by_bias) {
  FASTNN_SHARED(double, sums, [kLanes][kColumns]);
  double* to = blockIdx.y ? by_bias : by_weight;
  if (!to) return;
  const int lane = int(threadIdx.x) / kColumns, mine = int(threadIdx.x) % kColumns;
  const int64_t column = int64_t(blockIdx.x) * kColumns + mine;
  const float* from = workspace + blockIdx.y * chunks * n + column;
  double sum = 0;
  if (column < n)
    for (int64_t chunk = lane; chunk < chunks; chunk += kLanes) sum += double(from[chunk * n]);
  sums[lane][mine] = sum;
  __syncthreads();
  if (lane || column >= n) return;
  for (int other = 1; other < kLanes; other++) sum += sums[other][mine];
  to[column] = sum;
}

int64_t chunks_of(int64_t rows) { return rows < kMostChunks ? rows : kMostChunks; }

template <class T, bool backward, int threads, int mine>
void launch_held(const RowNorm& norm, const Constants& c, void* stream) {
  constexpr int block = threads > 32 ? threads : kBlock, groups = block / threads;
  if constexpr (backward) {
    const int64_t chunks = chunks_of(norm.rows.count);
    launch(held_backward<T, threads, mine>, dim3(unsigned(ceil_div(chunks, groups))), dim3(block),
           0, stream, norm, c, chunks);
  } else {
    const int64_t blocks = ceil_div(norm.rows.count, groups);
    launch(held_forward<T, threads, mine>,
           dim3(unsigned(blocks < kMostBlocks ? blocks : kMostBlocks)), dim3(block), 0, stream,
           norm, c);
  }
}

template <bool backward>
void run(const RowNorm& norm, void* stream) {
  const int64_t n = norm.rows.n, rows = norm.rows.count;
  if (n == 0 || rows == 0) return;
  Constants c;
  int power = 0;
  while (std::ldexp(1.0, power) < double(n)) power++;
  c.count = {float(n), float(std::ldexp(1.0, -power)), float(std::ldexp(1.0, power) / double(n))};
  c.eps = float(norm.eps), c.sqrt_eps = norm.eps > 0 ? float(std::sqrt(norm.eps)) : 0;
  with_float_type("row_norm", norm.type, [&](auto zero) {
    using T = decltype(zero);
    if (n <= 64) return launch_held<T, backward, 8, 8>(norm, c, stream);
    if (n <= 256) return launch_held<T, backward, 32, 8>(norm, c, stream);
    if (n <= 1024) return launch_held<T, backward, 128, 8>(norm, c, stream);
    if (n <= 4096)
      return launch_held<T, backward, backward ? 512 : 256, backward ? 8 : 16>(norm, c, stream);
    const int64_t most = backward ? kMostChunks : kMostBlocks, blocks = rows < most ? rows : most;
    launch(long_rows<T, backward>, dim3(unsigned(blocks)), dim3(kLongThreads), 0, stream, norm, c,
           blocks);
  });
  if (backward && norm.workspace)
    launch(sum_chunks, dim3(unsigned(ceil_div(n, kColumns)), 2), dim3(kColumns * kLanes), 0, stream,
           static_cast<const float*>(norm.workspace), n, chunks_of(rows), norm.by_weight,
           norm.by_bias);
}

}  // namespace

int64_t row_norm_workspace(int64_t rows, int64_t n) { return 2 * chunks_of(rows) * n; }
void row_norm(const RowNorm& norm, void* stream) { run<false>(norm, stream); }
void row_norm_backward(const RowNorm& norm, void* stream) { run<true>(norm, stream); }

}  // namespace fastnn::cuda
