// One kernel, twice. For the queries' gradient a block keeps 64 queries and the gradients of their
// results (its rows), and goes through the keys and values; for that of the keys and values it
// keeps 64 keys and their values, and goes through the queries (of all heads that share the keys)
// and the gradients of their results. With x, x' the rows and y, y' what passes by, both compute
//
//   scores = x yᵀ,  probabilities P = exp(scores - log sum),  dP = x' y'ᵀ,  dS = P (dP - delta),
//
// the first adds dS y up (by the query), the second dS y (by the key) and P y' (by the value);
// delta is the sum over a query's result times its gradient.
#include "cuda/attention/scores.cuh"

namespace fastnn::cuda {
namespace {

// A warp a query.
template <class Element>
__global__ void __launch_bounds__(kThreads)
    deltas(const AttentionBackward a, float* to, const int64_t count) {
  const int64_t row = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= count) return;
  const int64_t i = row % a.q_length, head = row / a.q_length % a.heads,
                batch = row / a.q_length / a.heads;
  const auto* out = reinterpret_cast<const Element*>(a.out.data) + offset(a.out, batch, head) +
                    i * a.out.strides[2];
  const auto* grad = reinterpret_cast<const Element*>(a.grad.data) + offset(a.grad, batch, head) +
                     i * a.grad.strides[2];
  float sum = 0;
  for (int64_t d = threadIdx.x % 32; d < a.value_size; d += 32)
    sum += to_float(out[d * a.out.strides[3]]) * to_float(grad[d * a.grad.strides[3]]);
#pragma unroll
  for (int distance = 16; distance; distance /= 2)
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (threadIdx.x % 32 == 0) to[row] = sum;
}

template <class Element, int columns>
__device__ __forceinline__ void store(const AttentionOperand& to, const Head& at, int64_t head,
                                      int64_t first, int64_t length, int64_t size,
                                      const float (&sums)[columns][4], float scale) {
  auto* data = reinterpret_cast<Element*>(to.data) + offset(to, at.batch, head);
#pragma unroll
  for (int d = 0; d < columns; d++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int64_t row = first + row_of(e), column = 8 * d + column_of(e);
      if (row < length && column < size)
        data[row * to.strides[2] + column * to.strides[3]] =
            from_float<Element>(sums[d][e] * scale);
    }
}

// From the products x yᵀ and x' y'ᵀ to the weights of the sums: P (without what is dropped) and dS.
template <class Element, bool by_keys, int blocks>
__device__ __forceinline__ void weigh(float (&p)[1][blocks][4], float (&ds)[1][blocks][4],
                                      const Scores<by_keys>& scores, const AttentionBackward& a,
                                      const Head& head, const float* delta, int64_t first,
                                      int warp_row, int64_t column) {
  const int64_t row = first + warp_row, queries = (head.batch * a.heads + head.head) * a.q_length;
  const float* log_sums = static_cast<const float*>(a.log_sum) + queries;
  const float* deltas = delta + queries;
  // What does not exist is not seen either, and its weights are set below.
  auto query_of = [&](int e, int at) {
    return at_most(by_keys ? column + at + column_of(e) : row + row_of(e), a.q_length - 1);
  };
  auto weights = [&](float& product, float& other, float score, int64_t query, float keeps) {
    const float probability = exp_of_difference<Element>(score, log_sums[query]);
    other = probability * (other * keeps - deltas[query]);
    product = probability * keeps;
  };
  const Limits seen = scores.limits(row, column, 8 * blocks);
  if (scores.biased() || scores.threshold || a.grad_scores.data) {
    each_block(p, ds, [&](float(&of_p)[4], float(&of_ds)[4], int at) {
      float keeps[4] = {1, 1, 1, 1};
      if (scores.threshold) scores.keep(keeps, row, column + at);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        if (!seen.sees(e, at)) {
          of_p[e] = of_ds[e] = 0;
          continue;
        }
        const int64_t x = row + row_of(e), y = column + at + column_of(e);
        weights(of_p[e], of_ds[e], scores.of(of_p[e], x, y), by_keys ? y : x, keeps[e]);
        if (!by_keys && a.grad_scores.data)
          reinterpret_cast<float*>(a.grad_scores.data)[offset(a.grad_scores, head.batch, head.head) +
                                                       x * a.grad_scores.strides[2] +
                                                       y * a.grad_scores.strides[3]] = of_ds[e];
      }
    });
    return;
  }
#pragma unroll
  for (int j = 0; j < blocks; j++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      weights(p[0][j][e], ds[0][j][e], p[0][j][e] * scores.scale, query_of(e, 8 * j), 1);
  if (scores.whole(first, column, 8 * blocks)) return;
#pragma unroll
  for (int j = 0; j < blocks; j++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (!seen.sees(e, 8 * j)) p[0][j][e] = ds[0][j][e] = 0;
}

template <class Mode, int kSize, int kPassing, bool by_keys>
__global__ void __launch_bounds__(kThreads, 1)
    backward(const AttentionBackward a, const Pieces pieces, const float* delta,
             const int64_t blocks) {
  using Element = typename Mode::Element;
  using X = TileOf<Element, kRows, true, kThreads>;
  using Y = TileOf<Element, kPassing, true, kThreads>;
  constexpr int kDepth = X::kDepth, kChunks = kSize / kDepth;
  constexpr int kXBytes = kChunks * X::kBytes, kYBytes = kChunks * Y::kBytes;
  char* x_tiles = dynamic_shared<char>();  // x, x'
  char* y_tiles = x_tiles + 2 * kXBytes;   // two stages of y, y'
  const int64_t heads = by_keys ? a.kv_heads : a.heads, group = a.heads / a.kv_heads;
  const int64_t index = int64_t(blockIdx.x) / blocks, first = int64_t(blockIdx.x) % blocks * kRows;
  const int64_t batch = index / heads, own = index % heads;
  const int64_t length = by_keys ? a.q_length : a.k_length;  // of what passes by
  const int warp_row = int(threadIdx.x) / 32 * 16;

  // Two operands of a head, of size head_size and value_size.
  auto rows_of_two = [&](auto tile, char* to, int bytes, bool of_keys, int64_t head, int64_t row) {
    using Tile = decltype(tile);
    const AttentionOperand& x = of_keys ? a.k : a.q;
    const AttentionOperand& other = of_keys ? a.v : a.grad;
    const int64_t count = of_keys ? a.k_length : a.q_length;
    load_rows<Tile, kChunks>(to,
                             rows_of<Element>(x, batch, head, count, a.head_size,
                                              of_keys ? pieces.k : pieces.q),
                             row);
    load_rows<Tile, kChunks>(to + bytes,
                             rows_of<Element>(other, batch, head, count, a.value_size,
                                              of_keys ? pieces.v : pieces.grad),
                             row);
  };
  rows_of_two(X{}, x_tiles, kXBytes, by_keys, own, first);

  // What passes by: the part of it that any of the rows has to do with, once a head.
  const int64_t from_row = by_keys ? first - a.high : first + a.low;
  const int64_t to_row = by_keys ? first + kRows - 1 - a.low : first + kRows - 1 + a.high;
  const int64_t low = at_least(from_row, 0) / kPassing * kPassing,
                high = at_most(to_row, length - 1);
  const int64_t steps = high < low ? 0 : (high - low) / kPassing + 1;
  const int64_t all = by_keys ? steps * group : steps;
  auto load_step = [&](int64_t step) {
    if (step < all)
      rows_of_two(Y{}, y_tiles + step % 2 * 2 * kYBytes, kYBytes, !by_keys,
                  by_keys ? own * group + step / steps : own / group, low + step % steps * kPassing);
    ptx::cp_async_commit();
  };
  load_step(0);

  float by_first[kSize / 8][4] = {}, by_value[by_keys ? kSize / 8 : 1][4] = {};
  for (int64_t step = 0; step < all; step++) {
    load_step(step + 1);
    ptx::cp_async_wait<1>();
    __syncthreads();
    const char* y = y_tiles + step % 2 * 2 * kYBytes;
    float p[1][kPassing / 8][4] = {}, ds[1][kPassing / 8][4] = {};
#pragma unroll(sizeof(Element) == 4 ? 1 : kChunks)
    for (int c = 0; c < kChunks; c++) {
      Mode::template step<X, Y>(p, x_tiles + c * X::kBytes, y + c * Y::kBytes, warp_row, 0);
      Mode::template step<X, Y>(ds, x_tiles + kXBytes + c * X::kBytes, y + kYBytes + c * Y::kBytes,
                                warp_row, 0);
    }
    const int64_t row = low + step % steps * kPassing,
                  query_head = by_keys ? own * group + step / steps : own;
    const Head head{batch, query_head, query_head / group};
    const Scores<by_keys> scores(a, head);
    weigh<Element>(p, ds, scores, a, head, delta, first, warp_row, row);
#pragma unroll
    for (int s = 0; s < kPassing / 16; s++) {
      Mode::template step_of_results<Y>(by_first, ds[0][2 * s], ds[0][2 * s + 1], y, 16 * s);
      if constexpr (by_keys)
        Mode::template step_of_results<Y>(by_value, p[0][2 * s], p[0][2 * s + 1], y + kYBytes,
                                          16 * s);
    }
    __syncthreads();  // everyone has read the stage that is filled next
  }
  ptx::cp_async_wait<0>();

  const Head at{batch, own, own};
  if constexpr (by_keys) {
    store<Element>(a.grad_k, at, own, first + warp_row, a.k_length, a.head_size, by_first,
                   float(a.scale));
    store<Element>(a.grad_v, at, own, first + warp_row, a.k_length, a.value_size, by_value, 1.0f);
  } else {
    store<Element>(a.grad_q, at, own, first + warp_row, a.q_length, a.head_size, by_first,
                   float(a.scale));
  }
}

}  // namespace

void attention_backward(const AttentionBackward& a, float* workspace, void* stream) {
  with_kernel(a, [&](auto mode, auto size) {
    using Mode = decltype(mode);
    using Element = typename Mode::Element;
    constexpr int kSize = decltype(size)::value;
    // What there are registers for: the keys' pass has twice the sums.
    constexpr bool kWide = sizeof(Element) == 4;
    constexpr int kOfKeys = kSize < 128 && !kWide ? 64 : 32,
                  kOfQueries = kSize < 64 && !kWide ? 64 : 32;
    constexpr size_t kRowBytesOfAll = kSize * sizeof(Element);
    const Pieces pieces{in_pieces(a.q, sizeof(Element)), in_pieces(a.k, sizeof(Element)),
                        in_pieces(a.v, sizeof(Element)), in_pieces(a.grad, sizeof(Element))};
    const int64_t rows = a.batch * a.heads * a.q_length;
    launch(deltas<Element>, dim3(unsigned((rows + kThreads / 32 - 1) / (kThreads / 32))),
           dim3(kThreads), 0, stream, a, workspace, rows);
    const float* delta = workspace;
    const int64_t by_queries = (a.q_length + kRows - 1) / kRows;
    const int64_t by_keys = (a.k_length + kRows - 1) / kRows;
    launch(backward<Mode, kSize, kOfKeys, false>, dim3(unsigned(by_queries * a.batch * a.heads)),
           dim3(kThreads), (2 * kRows + 4 * kOfKeys) * kRowBytesOfAll, stream, a, pieces, delta,
           by_queries);
    launch(backward<Mode, kSize, kOfQueries, true>, dim3(unsigned(by_keys * a.batch * a.kv_heads)),
           dim3(kThreads), (2 * kRows + 4 * kOfQueries) * kRowBytesOfAll, stream, a, pieces, delta,
           by_keys);
  });
}

}  // namespace fastnn::cuda
