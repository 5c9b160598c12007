// Attention of long rows: forward and backward. See long_rows.cuh.
#include "cuda/attention/gradients.cuh"
#include "cuda/attention/long_rows.cuh"

namespace fastnn::cuda {
namespace {

template <class Mode>
__global__ void __launch_bounds__(LongRows<Mode>::kThreads, 1)
    forward_long(const AttentionForward a, const Pieces pieces, const int64_t blocks) {
  using Element = typename Mode::Element;
  using Long = LongRows<Mode>;
  using X = typename Long::X;
  using Y = typename Long::Y;
  using Z = typename Long::Z;
  const int64_t index = int64_t(blockIdx.x) / blocks, first = int64_t(blockIdx.x) % blocks * kRows;
  const int64_t slice = int64_t(blockIdx.y) * Long::kSlice;
  const Head head{index / a.heads, index % a.heads, index % a.heads / (a.heads / a.kv_heads)};
  const Scores<false> scores(a, head);
  const int chunks = Long::chunks(a.head_size), steps = chunks + Long::kWeightTiles;
  const int warp_row = Long::warp_row();

  // The keys that any of these queries sees.
  const int64_t low = at_least(first + a.low, 0) / Long::kColumns * Long::kColumns;
  const int64_t high = at_most(first + kRows - 1 + a.high, a.k_length - 1);
  Passing now{int(low), high < low ? 0 : int((high - low) / Long::kColumns) + 1, 1};
  Long rows{now};
  auto load = [&](char* stage, int step, const Passing& place) {
    if (step < chunks) {
      const int64_t k = int64_t(step) * X::kDepth;
      load_tiles<X, 1>(
          stage, rows_of<Element>(a.q, head.batch, head.head, a.q_length, a.head_size, pieces.q),
          first, k);
      load_tiles<Y, 1>(
          stage + X::kBytes,
          rows_of<Element>(a.k, head.batch, head.kv_head, a.k_length, a.head_size, pieces.k),
          place.column, k);
    } else {
      load_tiles<Z, 1>(stage,
                       across(rows_of<Element>(a.v, head.batch, head.kv_head, a.k_length,
                                               a.value_size, pieces.v)),
                       slice, place.column + int64_t(step - chunks) * X::kDepth);
    }
  };
  for (int s = 0; s < Long::kStages - 1; s++) rows.begin(steps, load);

  typename Long::Sums sums = {};
  float largest[2] = {-kInfinity, -kInfinity}, total[2] = {0, 0};
  float* of_halves = Long::floats();  // [half of the warps][row]
  const int half_of_warps = int(threadIdx.x) / Long::kHalf;
  for (; !now.ended(); now.next(Long::kColumns)) {
    typename Long::Products p = {};
    rows.multiply(p, chunks, steps, load);
    scores.apply(p, first, warp_row, now.column + Long::warp_column());
    float most[2] = {largest[0], largest[1]};
#pragma unroll
    for (int j = 0; j < Long::kColumns / 16; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) most[e / 2] = fmaxf(most[e / 2], p[0][j][e]);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      most[half] = row_max(most[half]);
      of_halves[half_of_warps * kRows + warp_row + row_of(2 * half)] = most[half];
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; half++) {
      most[half] =
          fmaxf(most[half], of_halves[(1 - half_of_warps) * kRows + warp_row + row_of(2 * half)]);
      // A row that has seen nothing yet has no largest score to take off.
      const float base = most[half] == -kInfinity ? 0 : most[half];
      const float shrink = exp_of_difference<Element>(largest[half], base);
      largest[half] = most[half], most[half] = base;
      total[half] *= shrink;
#pragma unroll
      for (int d = 0; d < Long::kSlice / 16; d++)
        sums[0][d][2 * half] *= shrink, sums[0][d][2 * half + 1] *= shrink;
    }
#pragma unroll
    for (int j = 0; j < Long::kColumns / 16; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        p[0][j][e] = exp_of_difference<Element>(p[0][j][e], most[e / 2]);
        total[e / 2] += p[0][j][e];
      }
    if (scores.threshold)
      each_block(p, [&](float (&four)[4], int at) {
        float keeps[4];
        scores.keep(keeps, first + warp_row, now.column + Long::warp_column() + at);
#pragma unroll
        for (int e = 0; e < 4; e++) four[e] *= keeps[e];
      });
    rows.add(sums, p, steps, load);
  }
  ptx::cp_async_wait<0>();

  __syncthreads();  // everyone has read the largest scores
#pragma unroll
  for (int half = 0; half < 2; half++) {
    total[half] = row_sum(total[half]);
    of_halves[half_of_warps * kRows + warp_row + row_of(2 * half)] = total[half];
  }
  __syncthreads();
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    // In the same order on both halves.
    const int at = warp_row + row_of(2 * half);
    const float all = of_halves[at] + of_halves[kRows + at];
    // A query that sees nothing: the sum is 0, and so is its result.
    const bool nothing = largest[half] == -kInfinity && all == 0;
    inverse[half] = nothing ? 0 : 1 / all;
    if (a.log_sum && slice == 0 && half_of_warps == 0 && threadIdx.x % 4 == 0 &&
        first + at < a.q_length)
      static_cast<float*>(a.log_sum)[index * a.q_length + first + at] =
          nothing ? kInfinity : largest[half] + logf(all);
  }
  store<Element>(a.out, head.batch, head.head, first + warp_row, a.q_length,
                 slice + Long::warp_place(), a.value_size, sums, inverse);
}

// The gradient by the queries, or of keys and values; of these, blocks from `first_of_values` on
// (in y) have the values' slices.
template <class Mode, bool by_keys>
__global__ void __launch_bounds__(LongRows<Mode>::kThreads, 1)
    backward_long(const AttentionBackward a, const Pieces pieces, const float* delta,
                  const int blocks, const int first_of_values) {
  using Element = typename Mode::Element;
  using Long = LongRows<Mode>;
  using X = typename Long::X;
  using Y = typename Long::Y;
  using Z = typename Long::Z;
  using OfQueries = QuerySums<by_keys, Long::kColumns>;
  const bool values = int(blockIdx.y) >= first_of_values;
  // As little of 64 bits as there can be: there is no register to spare.
  const int slice = (int(blockIdx.y) - (values ? first_of_values : 0)) * Long::kSlice;
  const int heads = int(by_keys ? a.kv_heads : a.heads), group = int(a.heads / a.kv_heads);
  const int index = int(blockIdx.x) / blocks, first = int(blockIdx.x) % blocks * kRows;
  const int own_batch = index / heads, own = index % heads;
  const int own_kv_head = by_keys ? own : own / group;
  const int warp_row = Long::warp_row();
  // The values' gradients need no other product than the scores.
  const int of_scores = Long::chunks(a.head_size),
            chunks = of_scores + (values ? 0 : Long::chunks(a.value_size)),
            steps = chunks + Long::kWeightTiles;

  // What passes by: the part of it that any of the rows has to do with, once a head.
  const int64_t length = by_keys ? a.q_length : a.k_length;
  const int64_t from_row = by_keys ? first - a.high : first + a.low;
  const int64_t to_row = by_keys ? first + kRows - 1 - a.low : first + kRows - 1 + a.high;
  const int64_t low = at_least(from_row, 0) / Long::kColumns * Long::kColumns,
                high = at_most(to_row, length - 1);
  Passing now{int(low), high < low ? 0 : int((high - low) / Long::kColumns) + 1,
              by_keys ? group : 1};
  Long rows{now};
  auto load = [&](char* stage, int step, const Passing& place) {
    // Kept throughout, what follows from these would take more registers than there are.
    const int batch = ptx::anew(own_batch), kv_head = ptx::anew(own_kv_head);
    const int head = by_keys ? kv_head * group + place.head : own;
    const bool of_values = step < chunks ? step >= of_scores : values;
    const Source queries =
        of_values ? rows_of<Element>(a.grad, batch, head, a.q_length, a.value_size, pieces.grad)
                  : rows_of<Element>(a.q, batch, head, a.q_length, a.head_size, pieces.q);
    const Source keys =
        of_values ? rows_of<Element>(a.v, batch, kv_head, a.k_length, a.value_size, pieces.v)
                  : rows_of<Element>(a.k, batch, kv_head, a.k_length, a.head_size, pieces.k);
    if (step < chunks) {
      const int k = (of_values ? step - of_scores : step) * X::kDepth;
      load_tiles<X, 1>(stage, by_keys ? keys : queries, first, k);
      load_tiles<Y, 1>(stage + X::kBytes, by_keys ? queries : keys, place.column, k);
      if (step == 0) OfQueries::copy(Long::floats(), a, delta, batch, head, place.column);
    } else {
      load_tiles<Z, 1>(stage, across(by_keys ? queries : keys), slice,
                       place.column + (step - chunks) * X::kDepth);
    }
  };
  for (int s = 0; s < Long::kStages - 1; s++) rows.begin(steps, load);

  typename Long::Sums sums = {};
  for (; !now.ended(); now.next(Long::kColumns)) {
    typename Long::Products p = {}, ds = {};
    rows.multiply(p, of_scores, steps, load);
    rows.multiply(ds, chunks - of_scores, steps, load);
    const int query_head = by_keys ? own_kv_head * group + now.head : own;
    const Head head{ptx::anew(own_batch), ptx::anew(query_head), own_kv_head};
    const Scores<by_keys> scores(a, head);
    const OfQueries of_queries(a, delta, Long::floats(), head, first + warp_row);
    weigh<Element>(p, ds, scores, a, head, of_queries, first, warp_row, now.column,
                   Long::warp_column());
    if (values)
#pragma unroll
      for (int j = 0; j < Long::kColumns / 16; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) ds[0][j][e] = p[0][j][e];
    rows.add(sums, ds, steps, load);
  }
  ptx::cp_async_wait<0>();

  const AttentionOperand& to = by_keys ? (values ? a.grad_v : a.grad_k) : a.grad_q;
  const float scale = values ? 1 : float(a.scale);
  store<Element>(to, own_batch, own, first + warp_row, by_keys ? a.k_length : a.q_length,
                 slice + Long::warp_place(), values ? a.value_size : a.head_size, sums,
                 {scale, scale});
}

}  // namespace

void attention_long(const AttentionForward& a, void* stream) {
  with_mode(a.type, [&](auto mode) {
    using Mode = decltype(mode);
    using Long = LongRows<Mode>;
    const int64_t blocks = ceil_div(a.q_length, kRows);
    launch(
        forward_long<Mode>,
        dim3(unsigned(blocks * a.batch * a.heads), unsigned(ceil_div(a.value_size, Long::kSlice))),
        dim3(Long::kThreads), Long::kShared, stream, a, pieces_of(a), blocks);
  });
}

void attention_backward_long(const AttentionBackward& a, const float* deltas, void* stream) {
  with_mode(a.type, [&](auto mode) {
    using Mode = decltype(mode);
    using Long = LongRows<Mode>;
    const Pieces pieces = pieces_of(a);
    const int by_queries = int(ceil_div(a.q_length, kRows)),
              by_keys = int(ceil_div(a.k_length, kRows));
    const int of_size = int(ceil_div(a.head_size, Long::kSlice)),
              of_values = int(ceil_div(a.value_size, Long::kSlice));
    launch(backward_long<Mode, false>, dim3(unsigned(by_queries * a.batch * a.heads), of_size),
           dim3(Long::kThreads), Long::kShared, stream, a, pieces, deltas, by_queries, of_size);
    launch(backward_long<Mode, true>,
           dim3(unsigned(by_keys * a.batch * a.kv_heads), of_size + of_values),
           dim3(Long::kThreads), Long::kShared, stream, a, pieces, deltas, by_keys, of_size);
  });
}

}  // namespace fastnn::cuda
