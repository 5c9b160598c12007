// What becomes of the products of a block of queries and a block of keys: scores, then weights.
//
// Rows are queries and columns keys, or, `by_keys`, the other way round. In most blocks every row
// sees every column and nothing but the scale changes a score: that is unrolled, and knows nothing
// of the rest. Masks, slopes and dropout have one copy of their code, through which the elements
// are moved 8 columns at a time, as registers have no index.
#pragma once
#include "common/philox.hpp"
#include "cuda/attention/view.cuh"

namespace fastnn::cuda {

constexpr float kLog2E = 1.442695040888963f;

// exp(x - base). Of 16 bits a tensor core keeps less than the short way loses.
template <class Element>
__device__ __forceinline__ float exp_of_difference(float x, float base) {
  if constexpr (sizeof(Element) == 4) return expf(x - base);
  return ptx::exp2(fmaf(x, kLog2E, -base * kLog2E));
}

// The softmax of a thread's two rows, blocks of columns after one another (Milakov and Gimelshein,
// arXiv:1805.02867). `total` is the thread's own: four threads share a row.
struct OnlineSoftmax {
  float largest[2] = {-kInfinity, -kInfinity}, total[2] = {0, 0};

  // From scores to exponentials; what was summed up before is to be multiplied with `shrink`.
  template <class Element, int blocks>
  __device__ __forceinline__ void add(float (&p)[1][blocks][4], float (&shrink)[2]) {
    float most[2] = {largest[0], largest[1]};
#pragma unroll
    for (int j = 0; j < blocks; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) most[e / 2] = fmaxf(most[e / 2], p[0][j][e]);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      most[half] = row_max(most[half]);
      // A row that has seen nothing yet has no largest score to take off.
      const float base = most[half] == -kInfinity ? 0 : most[half];
      shrink[half] = exp_of_difference<Element>(largest[half], base);
      largest[half] = most[half], most[half] = base;
      total[half] *= shrink[half];
    }
#pragma unroll
    for (int j = 0; j < blocks; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        p[0][j][e] = exp_of_difference<Element>(p[0][j][e], most[e / 2]);
        total[e / 2] += p[0][j][e];
      }
  }
};

// each_block() of two arrays.
template <int blocks, class F>
__device__ __forceinline__ void each_block(float (&x)[1][blocks][4], float (&y)[1][blocks][4],
                                           F f) {
#pragma unroll 1
  for (int column = 0; column < 8 * blocks; column += 8) {
    float of_x[4], of_y[4];
#pragma unroll
    for (int e = 0; e < 4; e++) of_x[e] = x[0][0][e], of_y[e] = y[0][0][e];
    f(of_x, of_y, column);
#pragma unroll
    for (int e = 0; e < 4; e++) {
#pragma unroll
      for (int j = 0; j + 1 < blocks; j++) x[0][j][e] = x[0][j + 1][e], y[0][j][e] = y[0][j + 1][e];
      x[0][blocks - 1][e] = of_x[e], y[0][blocks - 1][e] = of_y[e];
    }
  }
}

// Which of a block's columns a thread's two rows see: `count` from `from` on.
struct Limits {
  int from[2];
  unsigned count[2];
  __device__ __forceinline__ bool sees(int e, int column) const {
    return unsigned(column + column_of(e) - from[e / 2]) < count[e / 2];
  }
};

template <bool by_keys>
struct Scores {
  const Attention& a;
  int64_t low, high;      // row x sees columns x + low to x + high
  int64_t rows, columns;  // how many there are
  const char* mask;
  float slope, scale;
  uint64_t threshold, dropout_row;
  float kept;  // what a probability is multiplied with that was not dropped

  __device__ __forceinline__ Scores(const Attention& a, const Head& h)
      : a(a),
        low(by_keys ? -a.high : a.low),
        high(by_keys ? -a.low : a.high),
        rows(by_keys ? a.k_length : a.q_length),
        columns(by_keys ? a.q_length : a.k_length),
        mask(nullptr),
        slope(0),
        scale(float(a.scale)),
        threshold(0),
        dropout_row(0),
        kept(1) {
    if (a.mask.data)
      mask = a.mask.data + offset(a.mask, h.batch, h.head) * int64_t(mask_size(a.mask_type));
    if (a.slopes) slope = a.slopes[h.batch * a.slopes_batch + h.head * a.slopes_head];
    if (a.dropout > 0) {
      threshold = dropout_threshold(a.dropout);
      dropout_row = uint64_t(h.batch * a.heads + h.head) * uint64_t(a.q_length);
      kept = a.dropout < 1 ? float(1 / (1 - a.dropout)) : 0.0f;
    }
  }

  __device__ static int mask_size(DType type) {
    return type == DType::u8 ? 1 : type == DType::f32 ? 4 : 2;
  }

  // Whether more than the scale changes a score.
  __device__ __forceinline__ bool biased() const { return mask || a.slopes; }

  // Whether all of kRows rows see all of `count` columns.
  __device__ __forceinline__ bool whole(int64_t row, int64_t column, int count) const {
    return column >= row + kRows - 1 + low && column + count - 1 <= row + high &&
           column + count <= columns;
  }
  // Of this thread's rows, of a warp's 16 from `row` on.
  __device__ __forceinline__ Limits limits(int64_t row, int64_t column, int count) const {
    Limits limits;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t x = row + row_of(2 * half);
      const int64_t from = at_most(at_least(x + low - column, 0), count);
      const int64_t to = x < rows ? at_most(at_most(x + high + 1, columns) - column, count) : 0;
      limits.from[half] = int(from), limits.count[half] = to > from ? unsigned(to - from) : 0;
    }
    return limits;
  }

  // The score of a row and a column that it sees, from their product.
  __device__ __forceinline__ float of(float product, int64_t row, int64_t column) const {
    const int64_t i = by_keys ? column : row, j = by_keys ? row : column;
    float score = product * scale;
    if (mask) {
      const int64_t at = i * a.mask.strides[2] + j * a.mask.strides[3];
      switch (a.mask_type) {
        case DType::u8:
          score += mask[at] ? 0.0f : -kInfinity;  // an infinite one becomes NaN, as in torch
          break;
        case DType::bf16:
          score += to_float(reinterpret_cast<const __nv_bfloat16*>(mask)[at]);
          break;
        case DType::f16:
          score += to_float(reinterpret_cast<const __half*>(mask)[at]);
          break;
        default:
          score += reinterpret_cast<const float*>(mask)[at];
      }
    }
    if (a.slopes) score -= slope * fabsf(float(i + a.shift - j));
    return score;
  }

  // From products to scores: -infinity where a row does not see a column.
  template <int blocks>
  __device__ __forceinline__ void apply(float (&x)[1][blocks][4], int64_t first, int warp_row,
                                        int64_t column) const {
    const int64_t row = first + warp_row;
    if (biased()) {
      const Limits seen = limits(row, column, 8 * blocks);
      each_block(x, [&](float (&four)[4], int at) {
#pragma unroll
        for (int e = 0; e < 4; e++)
          four[e] = seen.sees(e, at) ? of(four[e], row + row_of(e), column + at + column_of(e))
                                     : -kInfinity;
      });
      return;
    }
#pragma unroll
    for (int j = 0; j < blocks; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) x[0][j][e] *= scale;
    if (whole(first, column, 8 * blocks)) return;
    const Limits seen = limits(row, column, 8 * blocks);
#pragma unroll
    for (int j = 0; j < blocks; j++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (!seen.sees(e, 8 * j)) x[0][j][e] = -kInfinity;
  }

  // What the probabilities of a thread's four elements are multiplied with, of a warp's 16 rows and
  // 8 columns from here on: 0 where they are dropped. Four keys of a query share a counter: whoever
  // have them make one of the counters each, and exchange their words.
  __device__ __forceinline__ void keep(float (&keeps)[4], int64_t row, int64_t column) const {
    const int lane = int(threadIdx.x) % 32, group = lane / 4;
    const int own = by_keys ? group % 4 : lane % 2 * 2;  // the element whose counter this one makes
    const int64_t x = row + (by_keys ? group / 4 * 4 : group) + own / 2 * 8;
    const int64_t y = column + (by_keys ? lane % 4 * 2 + own % 2 : lane % 4 / 2 * 4);
    const uint64_t query = uint64_t(by_keys ? y : x), key = uint64_t(by_keys ? x : y);
    const uint64_t keys = (uint64_t(a.k_length) + 3) / 4 * 4;
    PhiloxWords words = philox(*a.seed, ((dropout_row + query) * keys + key) / 4);
    uint32_t (&word)[4] = words.word;
    if constexpr (by_keys) {
#pragma unroll
      for (int distance = 1; distance <= 2; distance *= 2) {
        const bool upper = own & distance;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (i & distance) continue;
          const uint32_t sent = upper ? word[i] : word[i + distance];
          const uint32_t received = __shfl_xor_sync(0xffffffffu, sent, 4 * distance);
          word[i] = upper ? received : word[i];
          word[i + distance] = upper ? word[i + distance] : received;
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t sent = own ? word[i] : word[i + 2];
        const uint32_t received = __shfl_xor_sync(0xffffffffu, sent, 1);
        word[i] = own ? received : word[i];
        word[i + 2] = own ? word[i + 2] : received;
      }
    }
#pragma unroll
    for (int e = 0; e < 4; e++) keeps[e] = word[e] >= threshold ? kept : 0;
  }
};

}  // namespace fastnn::cuda
