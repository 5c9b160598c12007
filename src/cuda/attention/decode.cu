// Few queries and many keys, as in generating text: what counts is that keys and values are read
// once, at the memory's speed. Flash-decoding (Dao, Haziza, Massa and Sizov, 2023):
//
//   a block has 16 queries, of all heads that share the keys, and a split of these; of every 16
//   keys a warp of its own finds the scores and adds up the values, and the warps' sums are added
//   in the end. Where there are several splits, their sums go to scratch memory, with the largest
//   score and the sum of exponentials of each row, and a second kernel adds them up in their order.
//
// How long splits are is decided by the shape, whatever the device.
#include "cuda/attention/decode.cuh"
#include "cuda/attention/decode.hpp"

namespace fastnn::cuda {
namespace {

constexpr int kTile = 16;  // queries of a block
constexpr int kStep = 16;  // keys that a warp has in hand
// Of keys and values in turn. All but one are on their way.
constexpr int kStages = 4;
// A split is a multiple of what four warps have in hand.
constexpr int64_t kSplitStep = 4 * kStep;
constexpr int64_t kMostSplits = 128;
// Two to each multiprocessor of an H100 or H200.
constexpr int64_t kBlocks = 2 * 132;
constexpr int kCombining = 128;  // threads

// Which keys there are to see, and how they are shared out.
struct Splits {
  int64_t first, end, each, count;
};

int64_t queries_of_kv_head(const Attention& a) { return a.heads / a.kv_heads * a.q_length; }

Splits splits_of(const Attention& a, bool batch_invariant) {
  Splits s;
  s.first = a.low > 0 ? a.low : 0;
  s.end = a.q_length + a.high < a.k_length ? a.q_length + a.high : a.k_length;
  if (s.end <= s.first) return {0, 0, kSplitStep, 1};
  const int64_t keys = s.end - s.first;
  const int64_t blocks = (batch_invariant ? 1 : a.batch) * a.kv_heads *
                         ceil_div(queries_of_kv_head(a), int64_t(kTile));
  int64_t wanted = kBlocks / blocks;
  wanted = wanted < 1 ? 1 : wanted > kMostSplits ? kMostSplits : wanted;
  s.each = ceil_div(ceil_div(keys, wanted), kSplitStep) * kSplitStep;
  s.count = ceil_div(keys, s.each);
  return s;
}

// Sums of a split for each row (of all heads and queries), and behind them all the largest score
// and the sum of exponentials.
struct Parts {
  float* sums;
  float2* softmax;
};
Parts parts_of(const AttentionForward& a, float* workspace, int64_t splits) {
  const int64_t rows = a.batch * a.heads * a.q_length * splits;
  // In this order the pairs are aligned.
  return {workspace + 2 * rows, reinterpret_cast<float2*>(workspace)};
}

// How much a sum counts whose softmax began with another largest score, 0 where it has seen
// nothing.
__device__ __forceinline__ float weight_of(float largest, float total, float most) {
  return total == 0 ? 0 : expf(largest - most);
}

// A row's result from its sums. A query that sees nothing: the sum is 0, and so is its result.
template <class Element>
struct Result {
  float inverse;
  __device__ __forceinline__ Result(const AttentionForward& a, int64_t row, float most, float total,
                                    bool first)
      : inverse(total == 0 ? 0 : 1 / total) {
    if (a.log_sum && first)
      static_cast<float*>(a.log_sum)[row] = total == 0 ? kInfinity : most + logf(total);
  }
  // `row` counts heads and queries of all batches.
  __device__ __forceinline__ void put(const AttentionForward& a, int64_t row, int64_t column,
                                      float sum) const {
    const int64_t i = row % a.q_length, head = row / a.q_length;
    auto* to = reinterpret_cast<Element*>(a.out.data) +
               offset(a.out, head / a.heads, head % a.heads) + i * a.out.strides[2];
    to[column * a.out.strides[3]] = from_float<Element>(sum * inverse);
  }
};

// Begins to copy 16 bytes of a row, or copies its elements.
template <class Element, bool pieces>
__device__ __forceinline__ void copy_piece(char* to, const Source& from, int64_t row,
                                           int64_t column) {
  constexpr int kSize = sizeof(Element), kEach = kPieceBytes / kSize;
  const int64_t left = row < from.extent ? from.k - column : 0;
  const int count = left >= kEach ? kEach : left > 0 ? int(left) : 0;
  const char* source = from.data + (row * from.extent_stride + column * from.k_stride) * kSize;
  if constexpr (pieces)
    ptx::cp_async<kPieceBytes>(to, count ? source : from.data, count * kSize);
  else
    copy_elements<Element>(to, source, from.k_stride, count);
}

// A thread's pieces, of which number n is at row(n) and column(n).
template <class Element, class Row, class Column>
__device__ __forceinline__ void copy_pieces(char* to, const Source& from, int count, const Row& row,
                                            const Column& column) {
  if (from.pieces) {
#pragma unroll 8
    for (int n = 0; n < count; n++)
      copy_piece<Element, true>(to + n * 32 * kPieceBytes, from, row(n), column(n));
  } else {
#pragma unroll 1
    for (int n = 0; n < count; n++)
      copy_piece<Element, false>(to + n * 32 * kPieceBytes, from, row(n), column(n));
  }
}

// What the launch and the kernel agree on.
template <class Mode, int kSize>
struct Layout {
  using Element = typename Mode::Element;
  static constexpr int kElement = sizeof(Element);
  static constexpr int kEach = kPieceBytes / kElement;  // elements of a piece
  static constexpr int kDepth = 4 * kEach;              // of a chunk of keys and queries
  static constexpr int kWidth = 8 * kEach;              // of a chunk of values
  static constexpr int kValueChunks = kSize / kWidth;
  static constexpr int kWarps = kSize * kElement > 256 ? 2 : 4;
  static constexpr int kThreads = 32 * kWarps;
  // A warp's pieces follow each other, so that no bank is asked twice.
  static constexpr int kPieces = 32 * kPieceBytes;
  static constexpr int kStageBytes = kStep * kSize * kElement;
  static constexpr int kQueryBytes = kSize / kDepth * Operands<Mode>::kLeft * kPieces;
  static constexpr size_t kShared = kQueryBytes + kWarps * kStages * kStageBytes;
  // Where warps put their sums in the end, some elements apart from 32 banks.
  static constexpr int kRowOfSums = kSize + 4;
  static_assert(kTile * kRowOfSums * 4 <= kStages * kStageBytes);
};

template <class Mode, int kSize>
__global__ void __launch_bounds__(Layout<Mode, kSize>::kThreads, 2)
    decode(const AttentionForward a, const Pieces pieces, const Splits splits, const Parts parts,
           const int tiles) {
  using L = Layout<Mode, kSize>;
  using Element = typename Mode::Element;
  using Of = Operands<Mode>;
  FASTNN_SHARED(float, largest_of, [L::kWarps][kTile]);
  FASTNN_SHARED(float, total_of, [L::kWarps][kTile]);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int group = lane / 4, t = lane % 4;
  char* of_queries = dynamic_shared<char>() + lane * kPieceBytes;
  char* stages = dynamic_shared<char>() + L::kQueryBytes + warp * kStages * L::kStageBytes;
  char* line = stages + lane * kPieceBytes;

  const int64_t index = int64_t(blockIdx.x) / tiles, kv_head = index % a.kv_heads;
  const int64_t batch = index / a.kv_heads, heads = a.heads / a.kv_heads;
  const int64_t rows = heads * a.q_length, tile = int64_t(blockIdx.x) % tiles * kTile;
  const int64_t first = splits.first + int64_t(blockIdx.y) * splits.each;
  const int64_t end = at_most(first + splits.each, splits.end);
  // Behind the end there is nothing: its copies are zeros.
  const Source k = rows_of<Element>(a.k, batch, kv_head, end, a.head_size, pieces.k);
  const Source v = rows_of<Element>(a.v, batch, kv_head, end, a.value_size, pieces.v);
  const int chunks = int((a.head_size + L::kDepth - 1) / L::kDepth);

  // This thread's two rows, those behind the last as the last: which query of which head.
  int64_t query[2];
  Head head[2];
  Limits seen;  // counted from the split's first key
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int64_t row = tile + row_of(2 * half), there = at_most(row, rows - 1);
    query[half] = there % a.q_length;
    head[half] = {batch, kv_head * heads + there / a.q_length, kv_head};
    const int64_t from = at_least(query[half] + a.low, first);
    const int64_t to = row < rows ? at_most(query[half] + a.high + 1, end) : 0;
    seen.from[half] = int(at_most(from, end) - first);
    seen.count[half] = to > from ? unsigned(to - from) : 0;
  }
  const Scores<false> above(a, head[0]), below(a, head[1]);

  // The queries: a warp's share of the chunks, each by the threads that make their operands.
  for (int c = warp; c < chunks; c += L::kWarps)
#pragma unroll
    for (int half = 0; half < 2; half++)
      copy_pieces<Element>(
          of_queries + (c * Of::kLeft + half) * L::kPieces,
          rows_of<Element>(a.q, batch, head[half].head, a.q_length, a.head_size, pieces.q), 1,
          [&](int) { return query[half]; }, [&](int) { return c * L::kDepth + t * L::kEach; });
  ptx::cp_async_commit();

  // Begins to copy this warp's next keys or values, if there are any.
  int64_t next = first + warp * kStep;
  int stage = 0;
  auto begin = [&] {
    char* to = line + stage * L::kStageBytes;
    if (next < end) {
      if (stage % 2 == 0)
        copy_pieces<Element>(
            to, k, 2 * chunks, [&](int n) { return next + n % 2 * 8 + group; },
            [&](int n) { return n / 2 * L::kDepth + t * L::kEach; });
      else
        copy_pieces<Element>(
            to, v, 4 * L::kValueChunks, [&](int n) { return next + n % 4 / 2 * 8 + 2 * t + n % 2; },
            [&](int n) { return n / 4 * L::kWidth + group * L::kEach; });
    }
    next += stage % 2 ? L::kWarps * kStep : 0;
    stage = (stage + 1) % kStages;
    ptx::cp_async_commit();
  };
  for (int s = 0; s < kStages - 1; s++) begin();

  ptx::cp_async_wait<kStages - 1>();
  for (int c = warp; c < chunks; c += L::kWarps) {
    char* at = of_queries + c * Of::kLeft * L::kPieces;
    Piece left[Of::kLeft];
    Of::queries(left, read_piece(at), read_piece(at + L::kPieces));
#pragma unroll
    for (int i = 0; i < Of::kLeft; i++) write_piece(at + i * L::kPieces, left[i]);
  }
  __syncthreads();

  float sums[kSize / 8][4] = {};
  OnlineSoftmax softmax;
  int read = 0;  // the stage
  for (int64_t key = first + warp * kStep; key < end; key += L::kWarps * kStep) {
    ptx::cp_async_wait<kStages - 2>();
    begin();
    float p[1][2][4] = {};
    const char* keys = line + read * L::kStageBytes;
#pragma unroll 2
    for (int c = 0; c < chunks; c++) {
      Piece left[Of::kLeft];
#pragma unroll
      for (int i = 0; i < Of::kLeft; i++)
        left[i] = read_piece(of_queries + (c * Of::kLeft + i) * L::kPieces);
#pragma unroll
      for (int j = 0; j < 2; j++)
        Of::score(p[0][j], left, read_piece(keys + (2 * c + j) * L::kPieces));
    }

    const int in_split = int(key - first);
    if (above.biased()) {
      each_block(p, [&](float (&four)[4], int at) {
#pragma unroll
        for (int e = 0; e < 4; e++)
          four[e] = seen.sees(e, in_split + at)
                        ? (e < 2 ? above : below).of(four[e], query[e / 2], key + at + column_of(e))
                        : -kInfinity;
      });
    } else {
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          p[0][j][e] = seen.sees(e, in_split + 8 * j) ? p[0][j][e] * above.scale : -kInfinity;
    }
    float shrink[2];
    softmax.add<Element>(p, shrink);
#pragma unroll
    for (int d = 0; d < kSize / 8; d++)
#pragma unroll
      for (int e = 0; e < 4; e++) sums[d][e] *= shrink[e / 2];
    typename Of::Weights weights;
    Of::weights(weights, p[0]);

    ptx::cp_async_wait<kStages - 2>();
    begin();
    const char* values = line + (read + 1) * L::kStageBytes;
#pragma unroll
    for (int c = 0; c < L::kValueChunks; c++) {
      Piece four[4];
#pragma unroll
      for (int i = 0; i < 4; i++) four[i] = read_piece(values + (4 * c + i) * L::kPieces);
      Of::weigh(sums, c * L::kEach, weights, four);
    }
    read = (read + 2) % kStages;
  }
  ptx::cp_async_wait<0>();

  // The warps' sums, side by side where their stages were.
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float total = row_sum(softmax.total[half]);
    if (t == 0)
      largest_of[warp][row_of(2 * half)] = softmax.largest[half],
                                  total_of[warp][row_of(2 * half)] = total;
  }
#pragma unroll
  for (int e = 0; e < 4; e++) {
    float* row = reinterpret_cast<float*>(stages) + row_of(e) * L::kRowOfSums;
#pragma unroll
    for (int c = 0; c < L::kValueChunks; c++)
#pragma unroll
      for (int i = 0; i < L::kEach; i += 4) {
        const int d = c * L::kEach + i;
        *reinterpret_cast<float4*>(row + c * L::kWidth + column_of(e) * L::kEach + i) =
            make_float4(sums[d][e], sums[d + 1][e], sums[d + 2][e], sums[d + 3][e]);
      }
  }
  __syncthreads();
  const char* all = dynamic_shared<char>() + L::kQueryBytes;
  for (int64_t r = warp; r < kTile && tile + r < rows; r += L::kWarps) {
    float most = -kInfinity, total = 0, weight[L::kWarps];
#pragma unroll
    for (int w = 0; w < L::kWarps; w++) most = fmaxf(most, largest_of[w][r]);
#pragma unroll
    for (int w = 0; w < L::kWarps; w++) {
      weight[w] = weight_of(largest_of[w][r], total_of[w][r], most);
      if (total_of[w][r] != 0) total += weight[w] * total_of[w][r];
    }
    const int64_t row = index * rows + tile + r, part = row * splits.count + blockIdx.y;
    const bool whole = splits.count == 1;
    const Result<Element> result(a, row, most, total, whole && lane == 0);
    if (!whole && lane == 0) parts.softmax[part] = make_float2(most, total);
    for (int64_t d = lane; d < a.value_size; d += 32) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < L::kWarps; w++)
        if (total_of[w][r] != 0)
          sum += weight[w] * reinterpret_cast<const float*>(
                                 all + w * kStages * L::kStageBytes)[r * L::kRowOfSums + d];
      if (whole)
        result.put(a, row, d, sum);
      else
        parts.sums[part * a.value_size + d] = sum;
    }
  }
}

// A block a row: its splits' sums.
template <class Element>
__global__ void __launch_bounds__(kCombining)
    combine(const AttentionForward a, const Parts parts, const int splits) {
  FASTNN_SHARED(float2, of_splits, [kMostSplits]);
  FASTNN_SHARED(float, weights, [kMostSplits]);
  const int64_t row = blockIdx.x;
  const int thread = int(threadIdx.x);
  if (thread < splits) of_splits[thread] = parts.softmax[row * splits + thread];
  __syncthreads();
  float most = -kInfinity, total = 0;
  for (int s = 0; s < splits; s++) most = fmaxf(most, of_splits[s].x);
  if (thread < splits) weights[thread] = weight_of(of_splits[thread].x, of_splits[thread].y, most);
  __syncthreads();
  for (int s = 0; s < splits; s++)
    if (of_splits[s].y != 0) total += weights[s] * of_splits[s].y;
  const Result<Element> result(a, row, most, total, thread == 0);
  for (int64_t d = thread; d < a.value_size; d += kCombining) {
    const float* from = parts.sums + row * splits * a.value_size + d;
    float sum = 0;
#pragma unroll 8
    for (int s = 0; s < splits; s++) {
      const float x = from[s * a.value_size];
      sum += of_splits[s].y == 0 ? 0 : weights[s] * x;
    }
    result.put(a, row, d, sum);
  }
}

int64_t longest(DType type) { return type == DType::f32 ? 128 : 256; }

}  // namespace

bool decodes(const Attention& a) {
  return a.q_length <= kTile && a.dropout == 0 && a.head_size <= longest(a.type) &&
         a.value_size <= longest(a.type);
}

int64_t decode_workspace(const Attention& a, bool batch_invariant) {
  if (!decodes(a)) return 0;
  const int64_t splits = splits_of(a, batch_invariant).count;
  return splits == 1 ? 0 : a.batch * a.heads * a.q_length * splits * (a.value_size + 2);
}

void attention_decode(const AttentionForward& a, float* workspace, bool batch_invariant,
                      void* stream) {
  const Splits splits = splits_of(a, batch_invariant);
  const Parts parts = parts_of(a, workspace, splits.count);
  const int64_t tiles = ceil_div(queries_of_kv_head(a), int64_t(kTile));
  const dim3 grid(unsigned(a.batch * a.kv_heads * tiles), unsigned(splits.count));
  const int64_t size = a.head_size > a.value_size ? a.head_size : a.value_size;
  with_mode(a.type, [&](auto mode) {
    using Mode = decltype(mode);
    auto start = [&](auto padded) {
      using L = Layout<Mode, decltype(padded)::value>;
      launch(decode<Mode, decltype(padded)::value>, grid, dim3(L::kThreads), L::kShared, stream, a,
             pieces_of(a), splits, parts, int(tiles));
    };
    if (size <= 64)
      start(std::integral_constant<int, 64>{});
    else if (size <= 128)
      start(std::integral_constant<int, 128>{});
    else if constexpr (sizeof(typename Mode::Element) == 2)
      start(std::integral_constant<int, 256>{});
    if (splits.count > 1)
      launch(combine<typename Mode::Element>, dim3(unsigned(a.batch * a.heads * a.q_length)),
             dim3(kCombining), 0, stream, a, parts, int(splits.count));
  });
}

}  // namespace fastnn::cuda
