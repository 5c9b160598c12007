// Limited by bytes: the forward reads the logits once, the backward reads them once and writes the
// gradient. Nothing of a row is kept but what its sums need: the largest element so far, the sum of
// e^(x - that), and where targets are spread over all classes the sum of q (that - x), which grows
// by the sum of q whenever a larger element is found. A row of neighbours is a warp's or a block's;
// where positions are the neighbours, as in images, a block has 32 of them, eight threads each.
#include "cuda/cross_entropy/cross_entropy.hpp"

#include <type_traits>

#include "cuda/reduce/rows.cuh"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int64_t kMostBlocks = 1 << 20;
constexpr int kShortThreads = 32, kBlock = 128;  // rows that are a warp's, and their blocks
constexpr int64_t kShort = 2048;                 // the longest of those
constexpr int kWidth = 32, kLanes = 8;  // neighbouring positions of a block, threads of each
constexpr int kAhead = 4;               // classes of such a thread on their way

// What a position's target says of its classes.
struct Target {
  const float* weight;
  int64_t index;
  bool is_index, ignored;
  float base, hard, at_index;  // q is at_index at the index, and base w elsewhere

  __device__ Target(const CrossEntropy& c, int64_t position)
      : weight(c.weight), index(-1), is_index(c.index), ignored(false) {
    base = c.smoothing / float(c.rows.n), hard = 1 - c.smoothing, at_index = 0;
    if (!is_index) return;
    index = c.index[position];
    ignored = index == c.ignore_index;
    if (ignored) return;
    FASTNN_CHECK(uint64_t(index) < uint64_t(c.rows.n), "Target is out of bounds");
    at_index = hard * weight_of(index);
  }
  __device__ __forceinline__ float weight_of(int64_t i) const { return weight ? weight[i] : 1.0f; }
  // q but for what at_index is.
  __device__ __forceinline__ float spread(int64_t i, float probability) const {
    return weight_of(i) * (is_index ? base : hard * probability + base);
  }
};

// The sums of a part of a row. kSpread: whether q is more than one number.
template <bool kSpread>
struct Sums {
  float most = -INFINITY, sum = 0, below = 0, mass = 0;

  // e^(x - most): what is equal counts as 1, infinities included.
  __device__ static __forceinline__ float times(float x, float most) {
    return x == most ? 1.0f : expf(x - most);
  }
  __device__ __forceinline__ void rise(float to) {
    sum *= times(most, to);
    if (kSpread && mass != 0 && most != to) below += mass * (to - most);
    most = to;
  }
  // `count` of them. A class of an index's target that has no weight counts for nothing.
  template <int each>
  __device__ __forceinline__ void take(const float (&x)[each], const float (&q)[each], int count,
                                       bool is_index) {
    float larger = most;
#pragma unroll
    for (int e = 0; e < each; e++)
      if (e < count) larger = fmaxf(larger, x[e]);
    rise(larger);
#pragma unroll
    for (int e = 0; e < each; e++)
      if (e < count) {
        sum += times(x[e], most);
        if constexpr (kSpread) {
          mass += q[e];
          if (q[e] != 0 || !is_index) below += q[e] * (x[e] == -INFINITY ? INFINITY : most - x[e]);
        }
      }
  }
  __device__ __forceinline__ void merge(const Sums& other) {
    const float larger = fmaxf(most, other.most);
    Sums risen = other;
    rise(larger), risen.rise(larger);
    sum += risen.sum, below += risen.below, mass += risen.mass;
  }
};

// What a position leaves behind.
template <class T, bool kSpread>
__device__ void write_position(const CrossEntropy& c, const Sums<kSpread>& s, const Target& target,
                               const T* x, int64_t position, double* losses, void* out) {
  // NaN in a row with +infinity, or with -infinity alone.
  const float log_sum = logf(fabsf(s.most) == INFINITY ? NAN : s.sum);
  float loss = 0;
  if (kSpread && (s.mass != 0 || !target.is_index)) loss = s.below + s.mass * log_sum;
  if (target.at_index != 0)
    loss += target.at_index * (s.most - to_float(x[target.index * c.rows.step[0]]) + log_sum);
  c.lse[position] = target.ignored ? 0 : double(s.most) + log_sum;
  c.mass[position] = target.ignored ? 0 : double(s.mass) + target.at_index;
  if (target.ignored) loss = 0;
  if (losses)
    losses[position] = loss;
  else
    static_cast<T*>(out)[position] = from_float<T>(loss);
}

// What the backward knows of a position.
struct Slope {
  float lse, rest, mass, grad;  // the logarithm in two parts, so that x - lse is rounded once
  __device__ Slope(const CrossEntropy& c, int64_t position, const float* grads, int64_t grad_step,
                   const double* total) {
    const double exact = c.lse[position];
    lse = float(exact), rest = float(exact - lse), mass = float(c.mass[position]);
    const double g = grads[position * grad_step];
    grad = float(total ? g / *total : g);
  }
  __device__ __forceinline__ float of(float x, float q) const {
    return grad * (mass * expf(x - lse - rest) - q);
  }
};

// ---- rows of neighbours ------------------------------------------------------------------------

template <class T, int threads, bool kSpread>
// Without the second number ptxas takes it to be three, and spills on sm_90a.
__global__ void __launch_bounds__(threads > 32 ? threads : kBlock, 2)
    forward_rows(const CrossEntropy c, double* const losses, void* const out) {
  constexpr int block = threads > 32 ? threads : kBlock, groups = block / threads;
  constexpr int each = Pack<T>::kEach;
  FASTNN_SHARED(typename Group<threads>::Memory, memory);
  Group<threads> group{memory};
  for (int64_t first = int64_t(blockIdx.x) * groups; first < c.rows.count;
       first += int64_t(gridDim.x) * groups) {
    // Groups without a row go along with the last one's and write nothing.
    const int64_t row = first + int(threadIdx.x) / threads;
    const int64_t position = row < c.rows.count ? row : c.rows.count - 1;
    int64_t at[kRowOperands];
    place(c.rows, position, at);
    const T* x = static_cast<const T*>(c.rows.data[0]) + at[0];
    const T* t = static_cast<const T*>(c.rows.data[1]) + at[1];
    const Target target(c, position);
    Sums<kSpread> sums;
    if (!target.ignored)
      for_each_piece<T, threads>(c.rows.n, [&](int64_t i, int count) {
        float a[each], q[each] = {};
        read_piece(a, x, c.rows.step[0], i, count);
        if constexpr (kSpread) {
          if (!target.is_index) read_piece(q, t, c.rows.step[1], i, count);
#pragma unroll
          for (int e = 0; e < each; e++)
            if (e < count) q[e] = target.spread(i + e, q[e]);
        }
        sums.take(a, q, count, target.is_index);
      });
    sums.rise(group.template reduce<Largest>(sums.most));
    sums.sum = group.template reduce<Add>(sums.sum);
    if constexpr (kSpread) group.template reduce<Add, Add>(sums.below, sums.mass);
    if (row < c.rows.count && threadIdx.x % threads == 0)
      write_position(c, sums, target, x, position, losses, out);
  }
}

template <class T, int threads>
__global__ void __launch_bounds__(threads > 32 ? threads : kBlock)
    backward_rows(const CrossEntropy c, const float* const grads, const int64_t grad_step,
                  const double* const total) {
  constexpr int block = threads > 32 ? threads : kBlock, groups = block / threads;
  constexpr int each = Pack<T>::kEach;
  const bool spread = c.smoothing != 0 || !c.index;
  for (int64_t row = int64_t(blockIdx.x) * groups + threadIdx.x / threads; row < c.rows.count;
       row += int64_t(gridDim.x) * groups) {
    int64_t at[kRowOperands];
    place(c.rows, row, at);
    const T* x = static_cast<const T*>(c.rows.data[0]) + at[0];
    T* to = static_cast<T*>(c.rows.data[1]) + at[1];
    const T* t = static_cast<const T*>(c.rows.data[2]) + at[2];
    const Target target(c, row);
    const Slope slope(c, row, grads, grad_step, total);
    for_each_piece<T, threads>(c.rows.n, [&](int64_t i, int count) {
      float a[each] = {}, q[each] = {};
      if (!target.ignored) {
        read_piece(a, x, c.rows.step[0], i, count);
        if (!target.is_index) read_piece(q, t, c.rows.step[2], i, count);
#pragma unroll
        for (int e = 0; e < each; e++)
          if (e < count) {
            if (spread) q[e] = target.spread(i + e, q[e]);
            if (i + e == target.index) q[e] += target.at_index;
            a[e] = slope.of(a[e], q[e]);
          }
      }
      write_piece(a, to, c.rows.step[1], i, count);
    });
  }
}

// ---- neighbouring rows -------------------------------------------------------------------------

template <class T, bool kSpread>
__global__ void __launch_bounds__(kWidth* kLanes, 4)
    forward_columns(const CrossEntropy c, double* const losses, void* const out) {
  FASTNN_SHARED(float, parts, [kLanes][kWidth][4]);
  const int column = int(threadIdx.x) % kWidth, lane = int(threadIdx.x) / kWidth;
  for (int64_t first = int64_t(blockIdx.x) * kWidth; first < c.rows.count;
       first += int64_t(gridDim.x) * kWidth) {
    const int64_t row = first + column, position = row < c.rows.count ? row : c.rows.count - 1;
    int64_t at[kRowOperands];
    place(c.rows, position, at);
    const T* x = static_cast<const T*>(c.rows.data[0]) + at[0];
    const T* t = static_cast<const T*>(c.rows.data[1]) + at[1];
    const Target target(c, position);
    Sums<kSpread> sums;
    if (!target.ignored)
      for (int64_t i = lane; i < c.rows.n; i += kLanes * kAhead) {
        const int64_t left = (c.rows.n - i + kLanes - 1) / kLanes;
        const int count = left < kAhead ? int(left) : kAhead;
        float a[kAhead], q[kAhead] = {};
#pragma unroll
        for (int e = 0; e < kAhead; e++)
          if (e < count) a[e] = to_float(x[(i + e * kLanes) * c.rows.step[0]]);
        if constexpr (kSpread)
#pragma unroll
          for (int e = 0; e < kAhead; e++)
            if (e < count) {
              const int64_t of = i + e * kLanes;
              q[e] = target.spread(of, target.is_index ? 0 : to_float(t[of * c.rows.step[1]]));
            }
        sums.take(a, q, count, target.is_index);
      }
    float* mine = parts[lane][column];
    mine[0] = sums.most, mine[1] = sums.sum, mine[2] = sums.below, mine[3] = sums.mass;
    __syncthreads();
    if (lane == 0 && row < c.rows.count) {
      for (int other = 1; other < kLanes; other++) {
        const float* theirs = parts[other][column];
        sums.merge({theirs[0], theirs[1], theirs[2], theirs[3]});
      }
      write_position(c, sums, target, x, position, losses, out);
    }
    __syncthreads();  // before the parts are written again
  }
}

template <class T>
__global__ void __launch_bounds__(kWidth* kLanes, 4)
    backward_columns(const CrossEntropy c, const float* const grads, const int64_t grad_step,
                     const double* const total) {
  const int column = int(threadIdx.x) % kWidth, lane = int(threadIdx.x) / kWidth;
  const bool spread = c.smoothing != 0 || !c.index;
  for (int64_t row = int64_t(blockIdx.x) * kWidth + column; row < c.rows.count;
       row += int64_t(gridDim.x) * kWidth) {
    int64_t at[kRowOperands];
    place(c.rows, row, at);
    const T* x = static_cast<const T*>(c.rows.data[0]) + at[0];
    T* to = static_cast<T*>(c.rows.data[1]) + at[1];
    const T* t = static_cast<const T*>(c.rows.data[2]) + at[2];
    const Target target(c, row);
    const Slope slope(c, row, grads, grad_step, total);
#pragma unroll 4
    for (int64_t i = lane; i < c.rows.n; i += kLanes) {
      float q = i == target.index ? target.at_index : 0;
      if (spread) q += target.spread(i, target.is_index ? 0 : to_float(t[i * c.rows.step[2]]));
      const float slope_of = slope.of(to_float(x[i * c.rows.step[0]]), q);
      to[i * c.rows.step[1]] = from_float<T>(target.ignored ? 0 : slope_of);
    }
  }
}

// ---- the sum of all positions ------------------------------------------------------------------

constexpr int kSumThreads = 256, kSumWarps = kSumThreads / 32;
constexpr int64_t kPiece = 2048, kMostPieces = 512;

int64_t pieces_of(int64_t positions) {
  const int64_t pieces = ceil_div(positions, kPiece);
  return pieces < kMostPieces ? pieces : kMostPieces;
}

// Of a block, in thread 0.
__device__ __forceinline__ void sum_of_block(double& a, double& b) {
  FASTNN_SHARED(double, of_warps, [2][kSumWarps]);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  for (int offset = 16; offset > 0; offset /= 2)
    a += __shfl_xor_sync(0xffffffffu, a, offset), b += __shfl_xor_sync(0xffffffffu, b, offset);
  if (lane == 0) of_warps[0][warp] = a, of_warps[1][warp] = b;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < kSumWarps; w++) a += of_warps[0][w], b += of_warps[1][w];
}

__device__ void write_sum(const LossSum& s, double loss, double total) {
  *s.total = total;
  const float result = float(s.mean ? loss / total : loss);
  switch (s.type) {
    case DType::bf16:
      *static_cast<__nv_bfloat16*>(s.out) = from_float<__nv_bfloat16>(result);
      break;
    case DType::f16:
      *static_cast<__half*>(s.out) = from_float<__half>(result);
      break;
    default:
      *static_cast<float*>(s.out) = result;
  }
}

__global__ void __launch_bounds__(kSumThreads) sum_pieces(const LossSum s) {
  double loss = 0, total = 0;
  const int64_t step = int64_t(gridDim.x) * kSumThreads;
#pragma unroll 4
  for (int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x; i < s.positions; i += step) {
    loss += s.losses[i];
    const int64_t index = s.index ? s.index[i] : 0;
    if (!s.index || index != s.ignore_index) total += s.index && s.weight ? s.weight[index] : 1.0;
  }
  sum_of_block(loss, total);
  if (threadIdx.x) return;
  if (gridDim.x == 1) return write_sum(s, loss, total);
  s.workspace[2 * blockIdx.x] = loss, s.workspace[2 * blockIdx.x + 1] = total;
}

__global__ void __launch_bounds__(kSumThreads) sum_all(const LossSum s, const int pieces) {
  double loss = 0, total = 0;
  for (int i = int(threadIdx.x); i < pieces; i += kSumThreads)
    loss += s.workspace[2 * i], total += s.workspace[2 * i + 1];
  sum_of_block(loss, total);
  if (threadIdx.x == 0) write_sum(s, loss, total);
}

// ---- launches ----------------------------------------------------------------------------------

unsigned blocks_of(int64_t rows, int64_t each) {
  const int64_t blocks = ceil_div(rows, each);
  return unsigned(blocks < kMostBlocks ? blocks : kMostBlocks);
}

// f(threads) with the threads of a row of neighbours, or f(0) where rows are neighbours.
template <class F>
void with_way(const Rows& rows, F f) {
  if (rows.step[0] != 1 && rows.n > 1)
    f(std::integral_constant<int, 0>{});
  else if (rows.n <= kShort)
    f(std::integral_constant<int, kShortThreads>{});
  else
    f(std::integral_constant<int, kLongThreads>{});
}

}  // namespace

void cross_entropy(const CrossEntropy& call, double* losses, void* out, void* stream) {
  const int64_t count = call.rows.count;
  const bool spread = call.smoothing != 0 || !call.index;
  with_float_type("cross_entropy", call.type, [&](auto zero) {
    using T = decltype(zero);
    with_way(call.rows, [&](auto way) {
      constexpr int threads = decltype(way)::value;
      if constexpr (threads == 0) {
        launch(spread ? forward_columns<T, true> : forward_columns<T, false>,
               dim3(blocks_of(count, kWidth)), dim3(kWidth * kLanes), 0, stream, call, losses, out);
      } else {
        constexpr int block = threads > 32 ? threads : kBlock;
        launch(spread ? forward_rows<T, threads, true> : forward_rows<T, threads, false>,
               dim3(blocks_of(count, block / threads)), dim3(block), 0, stream, call, losses, out);
      }
    });
  });
}

void cross_entropy_backward(const CrossEntropy& call, const float* grad, int64_t grad_step,
                            const double* total, void* stream) {
  const int64_t count = call.rows.count;
  with_float_type("cross_entropy", call.type, [&](auto zero) {
    using T = decltype(zero);
    with_way(call.rows, [&](auto way) {
      constexpr int threads = decltype(way)::value;
      if constexpr (threads == 0) {
        launch(backward_columns<T>, dim3(blocks_of(count, kWidth)), dim3(kWidth * kLanes), 0,
               stream, call, grad, grad_step, total);
      } else {
        constexpr int block = threads > 32 ? threads : kBlock;
        launch(backward_rows<T, threads>, dim3(blocks_of(count, block / threads)), dim3(block), 0,
               stream, call, grad, grad_step, total);
      }
    });
  });
}

int64_t loss_sum_workspace(int64_t positions) { return 2 * pieces_of(positions); }

void loss_sum(const LossSum& call, void* stream) {
  const int64_t pieces = pieces_of(call.positions);
  launch(sum_pieces, dim3(unsigned(pieces)), dim3(kSumThreads), 0, stream, call);
  if (pieces > 1) launch(sum_all, dim3(1), dim3(kSumThreads), 0, stream, call, int(pieces));
}

}  // namespace fastnn::cuda
