// One kernel, twice. For the queries' gradient a block keeps 64 queries and the gradients of their
// results (its rows), and goes through the keys and values; for that of the keys and values it
// keeps 64 keys and their values, and goes through the queries (of all heads that share the keys)
// and the gradients of their results. With x, x' the rows and y, y' what passes by, both compute
//
//   scores = x yᵀ,  probabilities P = exp(scores - log sum),  dP = x' y'ᵀ,  dS = P (dP - delta),
//
// the first adds dS y up (by the query), the second dS y (by the key) and P y' (by the value);
// delta is the sum over a query's result times its gradient.
#include "cuda/attention/gradients.cuh"
#include "cuda/attention/plain.cuh"

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

template <class Mode, int kSize, int kPassing, bool by_keys>
__global__ void __launch_bounds__(kThreads, 1)
    backward(const AttentionBackward a, const Pieces pieces, const float* delta,
             const int64_t blocks) {
  using Element = typename Mode::Element;
  using X = TileOf<Element, kRows, true, kThreads>;
  using Y = TileOf<Element, kPassing, true, kThreads>;
  using Sums = QuerySums<by_keys, kPassing>;
  constexpr int kDepth = X::kDepth, kChunks = kSize / kDepth;
  constexpr int kXBytes = kChunks * X::kBytes, kYBytes = kChunks * Y::kBytes;
  char* x_tiles = dynamic_shared<char>();                                   // x, x'
  char* y_tiles = x_tiles + 2 * kXBytes;                                    // two stages of y, y'
  auto* sums_of_queries = reinterpret_cast<float*>(y_tiles + 4 * kYBytes);  // likewise
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
    load_tiles<Tile, kChunks>(
        to, rows_of<Element>(x, batch, head, count, a.head_size, of_keys ? pieces.k : pieces.q),
        row);
    load_tiles<Tile, kChunks>(
        to + bytes,
        rows_of<Element>(other, batch, head, count, a.value_size, of_keys ? pieces.v : pieces.grad),
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
    if (step < all) {
      const int64_t row = low + step % steps * kPassing;
      const int64_t head = by_keys ? own * group + step / steps : own / group;
      rows_of_two(Y{}, y_tiles + step % 2 * 2 * kYBytes, kYBytes, !by_keys, head, row);
      Sums::copy(sums_of_queries + step % 2 * 2 * kPassing, a, delta, batch, head, row);
    }
    ptx::cp_async_commit();
  };
  load_step(0);

  float by_first[1][kSize / 8][4] = {}, by_value[1][by_keys ? kSize / 8 : 1][4] = {};
  bool large_row = false;
  for (int64_t step = 0; step < all; step++) {
    load_step(step + 1);
    ptx::cp_async_wait<1>();
    const char* y = y_tiles + step % 2 * 2 * kYBytes;
    if (step == 0) large_row = any_large_row<X, 2 * kChunks>(x_tiles);
    const bool plain = sync_or<Element>(large_row || any_large_row<Y, 2 * kChunks>(y));
    float p[1][kPassing / 8][4] = {}, ds[1][kPassing / 8][4] = {};
#pragma unroll(sizeof(Element) == 4 ? 1 : kChunks)
    for (int c = 0; c < kChunks; c++) {
      cuda::step<Mode, X, Y>(plain, p, x_tiles + c * X::kBytes, y + c * Y::kBytes, warp_row, 0);
      cuda::step<Mode, X, Y>(plain, ds, x_tiles + kXBytes + c * X::kBytes,
                             y + kYBytes + c * Y::kBytes, warp_row, 0);
    }
    const int64_t row = low + step % steps * kPassing,
                  query_head = by_keys ? own * group + step / steps : own;
    const Head head{batch, query_head, query_head / group};
    const Scores<by_keys> scores(a, head);
    const Sums sums(a, delta, sums_of_queries + step % 2 * 2 * kPassing, head, first + warp_row);
    weigh<Element>(p, ds, scores, a, head, sums, first, warp_row, row, 0);
#pragma unroll
    for (int s = 0; s < kPassing / 16; s++) {
      step_of_results<Mode, Y>(plain, by_first, ds[0][2 * s], ds[0][2 * s + 1], y, 16 * s);
      if constexpr (by_keys)
        step_of_results<Mode, Y>(plain, by_value, p[0][2 * s], p[0][2 * s + 1], y + kYBytes,
                                 16 * s);
    }
    __syncthreads();  // everyone has read the stage that is filled next
  }
  ptx::cp_async_wait<0>();

  const float scale[2] = {float(a.scale), float(a.scale)}, one[2] = {1, 1};
  const int64_t row = first + warp_row;
  if constexpr (by_keys) {
    store<Element>(a.grad_k, batch, own, row, a.k_length, 0, a.head_size, by_first, scale);
    store<Element>(a.grad_v, batch, own, row, a.k_length, 0, a.value_size, by_value, one);
  } else {
    store<Element>(a.grad_q, batch, own, row, a.q_length, 0, a.head_size, by_first, scale);
  }
}

}  // namespace

void attention_backward(const AttentionBackward& a, float* workspace, void* stream) {
  const int64_t queries = a.batch * a.heads * a.q_length;
  with_mode(a.type, [&](auto mode) {
    launch(deltas<typename decltype(mode)::Element>,
           dim3(unsigned(ceil_div(queries, kThreads / 32))), dim3(kThreads), 0, stream, a,
           workspace, queries);
  });
  const float* delta = workspace;
  auto kernels = [&](auto mode, auto size) {
    using Mode = decltype(mode);
    using Element = typename Mode::Element;
    constexpr int kSize = decltype(size)::value;
    // What there are registers for: the keys' pass has twice the sums.
    constexpr bool kWide = sizeof(Element) == 4;
    constexpr int kOfKeys = kSize < 128 && !kWide ? 64 : 32,
                  kOfQueries = kSize < 64 && !kWide ? 64 : 32;
    constexpr size_t kRowBytesOfAll = kSize * sizeof(Element);
    const Pieces pieces = pieces_of(a);
    const int64_t by_queries = ceil_div(a.q_length, kRows), by_keys = ceil_div(a.k_length, kRows);
    launch(backward<Mode, kSize, kOfKeys, false>, dim3(unsigned(by_queries * a.batch * a.heads)),
           dim3(kThreads), (2 * kRows + 4 * kOfKeys) * kRowBytesOfAll, stream, a, pieces, delta,
           by_queries);
    launch(backward<Mode, kSize, kOfQueries, true>, dim3(unsigned(by_keys * a.batch * a.kv_heads)),
           dim3(kThreads),
           (2 * kRows + 4 * kOfQueries) * kRowBytesOfAll + 2 * QuerySums<true, kOfQueries>::kBytes,
           stream, a, pieces, delta, by_keys);
  };
  with_kernel(a, kernels, [&] { attention_backward_long(a, delta, stream); });
}

}  // namespace fastnn::cuda
