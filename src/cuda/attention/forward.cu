// A block of four warps has 64 queries of one head, 16 a warp, and goes through the keys in blocks.
// While it works on the scores of one, the values of that one and then the keys of the next are on
// their way.
#include "cuda/attention/decode.hpp"
#include "cuda/attention/hopper.hpp"
#include "cuda/attention/plain.cuh"
#include "cuda/device.hpp"

namespace fastnn::cuda {
namespace {

template <class Mode, int kSize, int kKeys>
__global__ void __launch_bounds__(kThreads, 1)
    forward(const AttentionForward a, const Pieces pieces, const int64_t blocks) {
  using Element = typename Mode::Element;
  using Queries = TileOf<Element, kRows, true, kThreads>;
  using Keys = TileOf<Element, kKeys, true, kThreads>;
  constexpr int kDepth = Queries::kDepth, kChunks = kSize / kDepth;
  char* q_tiles = dynamic_shared<char>();
  char* k_tiles = q_tiles + kChunks * Queries::kBytes;
  char* v_tiles = k_tiles + kChunks * Keys::kBytes;

  const int64_t index = int64_t(blockIdx.x) / blocks, first = int64_t(blockIdx.x) % blocks * kRows;
  const Head head{index / a.heads, index % a.heads, index % a.heads / (a.heads / a.kv_heads)};
  const Source q = rows_of<Element>(a.q, head.batch, head.head, a.q_length, a.head_size, pieces.q);
  const Source k =
      rows_of<Element>(a.k, head.batch, head.kv_head, a.k_length, a.head_size, pieces.k);
  const Source v =
      rows_of<Element>(a.v, head.batch, head.kv_head, a.k_length, a.value_size, pieces.v);
  const Scores<false> scores(a, head);
  const int warp_row = int(threadIdx.x) / 32 * 16;

  // The keys that any of these queries sees.
  const int64_t low = at_least(first + a.low, 0) / kKeys * kKeys;
  const int64_t high = at_most(first + kRows - 1 + a.high, a.k_length - 1);

  // Begins to copy a block of keys or values, if there is one.
  auto load = [&](char* to, const Source& from, int64_t key) {
    if (key <= high) load_tiles<Keys, kChunks>(to, from, key);
    ptx::cp_async_commit();
  };
  load_tiles<Queries, kChunks>(q_tiles, q, first);
  load(k_tiles, k, low);
  load(v_tiles, v, low);

  float sums[1][kSize / 8][4] = {};
  bool large_query = false;
  OnlineSoftmax softmax;
  for (int64_t key = low; key <= high; key += kKeys) {
    ptx::cp_async_wait<1>();
    if (key == low) large_query = any_large_row<Queries, kChunks>(q_tiles);
    // The keys are there.
    const bool plain = sync_or<Element>(large_query || any_large_row<Keys, kChunks>(k_tiles));
    float p[1][kKeys / 8][4] = {};
#pragma unroll(sizeof(Element) == 4 ? 1 : kChunks)
    for (int c = 0; c < kChunks; c++)
      step<Mode, Queries, Keys>(plain, p, q_tiles + c * Queries::kBytes, k_tiles + c * Keys::kBytes,
                                warp_row, 0);
    __syncthreads();  // and read
    load(k_tiles, k, key + kKeys);

    scores.apply(p, first, warp_row, key);
    float shrink[2];
    softmax.add<Element>(p, shrink);
    if (scores.threshold)
      each_block(p, [&](float (&four)[4], int at) {
        float keeps[4];
        scores.keep(keeps, first + warp_row, key + at);
#pragma unroll
        for (int e = 0; e < 4; e++) four[e] *= keeps[e];
      });
#pragma unroll
    for (int d = 0; d < kSize / 8; d++)
#pragma unroll
      for (int e = 0; e < 4; e++) sums[0][d][e] *= shrink[e / 2];

    ptx::cp_async_wait<1>();
    // The values are there.
    const bool plain_values = sync_or<Element>(any_large_row<Keys, kChunks>(v_tiles));
#pragma unroll
    for (int s = 0; s < kKeys / 16; s++)
      step_of_results<Mode, Keys>(plain_values, sums, p[0][2 * s], p[0][2 * s + 1], v_tiles,
                                  16 * s);
    __syncthreads();
    load(v_tiles, v, key + kKeys);
  }
  ptx::cp_async_wait<0>();

  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float largest = softmax.largest[half], total = row_sum(softmax.total[half]);
    // A query that sees nothing: the sum is 0, and so is its result.
    const bool nothing = largest == -kInfinity && total == 0;
    inverse[half] = nothing ? 0 : 1 / total;
    const int64_t row = first + warp_row + row_of(2 * half);
    if (a.log_sum && threadIdx.x % 4 == 0 && row < a.q_length)
      static_cast<float*>(a.log_sum)[index * a.q_length + row] =
          nothing ? kInfinity : largest + logf(total);
  }
  store<Element>(a.out, head.batch, head.head, first + warp_row, a.q_length, 0, a.value_size, sums,
                 inverse);
}

}  // namespace

void attention(const AttentionForward& a, float* workspace, bool batch_invariant, void* stream) {
  if (decodes(a)) return attention_decode(a, workspace, batch_invariant, stream);
  if (capability() == kHopper && attention_on_hopper(a, stream)) return;
  auto kernel = [&](auto mode, auto size) {
    using Mode = decltype(mode);
    using Element = typename Mode::Element;
    // float32's parts take registers, of which fewer keys at a time leave more.
    constexpr int kSize = decltype(size)::value, kKeys = sizeof(Element) == 4 ? 32 : 64;
    const int64_t blocks = ceil_div(a.q_length, kRows);
    constexpr size_t shared = size_t(kRows + 2 * kKeys) * kSize * sizeof(Element);
    launch(forward<Mode, kSize, kKeys>, dim3(unsigned(blocks * a.batch * a.heads)), dim3(kThreads),
           shared, stream, a, pieces_of(a), blocks);
  };
  with_kernel(a, kernel, [&] { attention_long(a, stream); });
}

}  // namespace fastnn::cuda
