// uint8 times int8 on tensor cores, two ways. Many rows: the tiles of the matrix product
// (gemm/mainloop.cuh), with the zero points taken from their sums. Up to 16 rows, where reading the
// weight is all that takes time: no tile and no shared memory, each weight goes once from global
// memory to the registers of the thread that multiplies it. Sixteen of its rows are the left
// operand of mma.sync, rows of x its columns. Which k is multiplied when does not matter to a sum
// of integers, so that a thread's share of an operand is 16 neighbours, one access; eight warps
// share K, and a column of ones has the sums of the weight's rows.
#include "cuda/quant/int8_linear.hpp"

#include "cuda/quant/finish.cuh"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kLanes = 32;

template <int each>
__device__ __forceinline__ void finish(const Int8Linear& c, int64_t m, int64_t n,
                                       const int (&sums)[each], const int (&w_sums)[each],
                                       int count) {
  const int zero = c.x_zero[m * c.x_step];
  const float x_scale = c.x_scale[m * c.x_step];
  float y[each];
#pragma unroll
  for (int e = 0; e < each; e++) {
    const float scale = __fmul_rn(x_scale, e < count ? c.w_scale[(n + e) * c.w_step] : 0);
    y[e] = __fmul_rn(float(sums[e] - zero * w_sums[e]), scale);
  }
  finish_row(c.type, c.y, c.n, m, n, c.bias, c.bias_type, c.activation, y, count);
}

// ---- many rows ---------------------------------------------------------------------------------

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    many_rows(const Int8Linear c, const bool q_pieces, const bool w_pieces, const int64_t tile_rows,
              const int64_t tile_columns) {
  using A = TileOf<uint8_t, S::kM, true, S::kThreads>;
  using B = TileOf<uint8_t, S::kN, true, S::kThreads>;
  char* shared = dynamic_shared<char>();
  const TilePlace tile = tile_place(blockIdx.x, tile_rows, tile_columns);
  const int64_t first_row = tile.row * S::kM, first_column = tile.column * S::kN;
  const Source q{reinterpret_cast<const char*>(c.q), c.m, c.k, c.q_row, 1, q_pieces};
  const Source w{reinterpret_cast<const char*>(c.w), c.n, c.k, c.w_row, c.w_column, w_pieces};
  tile_sums<U8, S, A, B>(shared, int((c.k + A::kDepth - 1) / A::kDepth),
                         [&](int64_t step, char* to_a, char* to_b) {
                           A::load(to_a, q, first_row, step * A::kDepth);
                           B::load(to_b, w, first_column, step * A::kDepth);
                         });
  for_fours<S>(reinterpret_cast<const int*>(shared), first_row, first_column, c.m, c.n,
               [&](int64_t m, int64_t n, const int (&sums)[4], int count) {
                 int w_sums[4];
#pragma unroll
                 for (int e = 0; e < 4; e++) w_sums[e] = e < count ? c.w_sums[n + e] : 0;
                 finish(c, m, n, sums, w_sums, count);
               });
}

template <class S>
void run_many(const Int8Linear& c, void* stream) {
  const auto in_pieces = [](const void* data, int64_t row, int64_t column) {
    return reinterpret_cast<uintptr_t>(data) % kPieceBytes == 0 && row % kPieceBytes == 0 &&
           column == 1;
  };
  const int64_t rows = ceil_div(c.m, S::kM), columns = ceil_div(c.n, S::kN);
  launch(many_rows<S>, dim3(unsigned(rows * columns)), dim3(S::kThreads),
         size_t(kStages) * (S::kM + S::kN) * kRowBytes, stream, c, in_pieces(c.q, c.q_row, 1),
         in_pieces(c.w, c.w_row, c.w_column), rows, columns);
}

// ---- few rows ----------------------------------------------------------------------------------

constexpr int kWarps = 8, kWeights = 16, kRows = 8, kMostRows = 16;
constexpr int kShare = 16, kBlock = 4 * kShare;  // bytes of a thread, and of a row of the weight

__global__ void __launch_bounds__(kWarps* kLanes) few(const Int8Linear c) {
  FASTNN_SHARED(int, sums, [kWarps][kWeights][kRows + 1]);
  const int warp = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
  const int group = lane / 4, share = lane % 4;
  const int64_t first = int64_t(blockIdx.x) * kWeights, first_row = int64_t(blockIdx.y) * kRows;
  const int64_t upper = first + group, lower = upper + 8, row = first_row + group;
  auto load = [&](const void* data, bool exists, int64_t at) {
    return exists ? *reinterpret_cast<const uint4*>(static_cast<const char*>(data) + at)
                  : make_uint4(0, 0, 0, 0);
  };
  int products[4] = {}, ones[4] = {};
  const uint32_t one[2] = {0x01010101, 0x01010101};
#pragma unroll 2
  for (int64_t k = int64_t(warp) * kBlock + share * kShare; k - share * kShare < c.k;
       k += kWarps * kBlock) {
    const bool inside = k < c.k;
    const uint4 a = load(c.w, inside && upper < c.n, upper * c.w_row + k);
    const uint4 b = load(c.w, inside && lower < c.n, lower * c.w_row + k);
    const uint4 x = load(c.q, inside && row < c.m, row * c.q_row + k);
    // uint8 less 128 is the same bits with the first one turned.
    constexpr uint32_t turned = 0x80808080;
    const uint32_t left[2][4] = {{a.x, b.x, a.y, b.y}, {a.z, b.z, a.w, b.w}};
    const uint32_t right[2][2] = {{x.x ^ turned, x.y ^ turned}, {x.z ^ turned, x.w ^ turned}};
#pragma unroll
    for (int s = 0; s < 2; s++) {
      ptx::mma_m16n8k32_s8(products, left[s], right[s]);
      ptx::mma_m16n8k32_s8(ones, left[s], one);
    }
  }
#pragma unroll
  for (int e = 0; e < 4; e++) sums[warp][group + e / 2 * 8][2 * share + e % 2] = products[e];
  if (share == 0) sums[warp][group][kRows] = ones[0], sums[warp][group + 8][kRows] = ones[2];
  __syncthreads();
  const int weight = int(threadIdx.x) % kWeights, column = int(threadIdx.x) / kWeights;
  if (column >= kRows || first + weight >= c.n || first_row + column >= c.m) return;
  int sum[1] = {}, w_sum[1] = {};
#pragma unroll
  for (int w = 0; w < kWarps; w++)
    sum[0] += sums[w][weight][column], w_sum[0] += sums[w][weight][kRows];
  sum[0] += 128 * w_sum[0];
  finish(c, first_row + column, first + weight, sum, w_sum, 1);
}

// A warp a row.
constexpr int kSumWarps = 4;
__global__ void __launch_bounds__(kSumWarps* kLanes)
    sum_rows(const int8_t* const w, const int64_t n, const int64_t k, const int64_t w_row,
             const int64_t w_column, const bool pieces, int32_t* const sums) {
  const int lane = int(threadIdx.x) % kLanes;
  const int64_t row = int64_t(blockIdx.x) * kSumWarps + threadIdx.x / kLanes;
  if (row >= n) return;
  const int8_t* from = w + row * w_row;
  int sum = 0;
  if (pieces)
#pragma unroll 4
    for (int64_t i = lane * kShare; i < k; i += kLanes * kShare) {
      const uint4 four = *reinterpret_cast<const uint4*>(from + i);
      int8_t bytes[kShare];
      memcpy(bytes, &four, sizeof four);
#pragma unroll
      for (int e = 0; e < kShare; e++) sum += bytes[e];
    }
  else
    for (int64_t i = lane; i < k; i += kLanes) sum += from[i * w_column];
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (lane == 0) sums[row] = sum;
}

// Whether rows of K bytes are read 16 at a time to their ends.
bool in_shares(const void* data, int64_t row, int64_t column, int64_t k) {
  return reinterpret_cast<uintptr_t>(data) % kShare == 0 && row % kShare == 0 && column == 1 &&
         k % kShare == 0;
}

}  // namespace

bool few_rows(const Int8Linear& c) {
  return c.m <= kMostRows && in_shares(c.w, c.w_row, c.w_column, c.k) &&
         in_shares(c.q, c.q_row, 1, c.k);
}

void int8_linear(const Int8Linear& c, void* stream) {
  if (c.m == 0 || c.n == 0) return;
  if (few_rows(c))
    launch(few, dim3(unsigned(ceil_div(c.n, kWeights)), unsigned(ceil_div(c.m, kRows))),
           dim3(kWarps * kLanes), 0, stream, c);
  else if (ceil_div(c.m, Large::kM) * ceil_div(c.n, Large::kN) >= kEnoughBlocks)
    run_many<Large>(c, stream);
  else
    run_many<Small>(c, stream);
}

void row_sums(const int8_t* w, int64_t n, int64_t k, int64_t w_row, int64_t w_column, int32_t* sums,
              void* stream) {
  if (n == 0) return;
  launch(sum_rows, dim3(unsigned(ceil_div(n, kSumWarps))), dim3(kSumWarps * kLanes), 0, stream, w,
         n, k, w_row, w_column, in_shares(w, w_row, w_column, k), sums);
}

}  // namespace fastnn::cuda
