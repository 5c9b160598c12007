// What one instruction set does for attention beside the products, which are the matrix product's
// own tiles (gemm/kernel.hpp).
//
// Queries lie in the lanes: a block of scores is keys x lanes, as a tile leaves K Q^T, so that the
// largest score and the sum of each query are found without any sum across lanes, and the
// probabilities lie as the tiles of the next product, V^T P, read their B.
#pragma once
#include <cstdint>

#include "common/dtype.hpp"

namespace fastnn {

constexpr int kMostLanes = 64;
constexpr int64_t kMostKeys = 256;  // of a block

// A block of scores on its way to probabilities. "Numbers" are float, or double for float64.
struct ScoreBlock {
  void* scores;      // numbers, keys x lanes: products, and then what became of them
  const void* bias;  // numbers, keys x lanes, added after the scale; null for none
  int64_t keys;
  int lanes, used;  // of a row, and how many of them, whole vectors, hold queries
  double scale;
  // Where two keys' probabilities go in a word of bfloat16, as pair_keys' do; null: to `scores`.
  void* pairs;
  // Of each lane: the largest score, times log2(e), and the sum of the exponentials so far, and
  // what earlier results are to be multiplied with.
  void *max, *sum, *factor;
};

// What is added to the scores of a block, keys x lanes.
struct BiasBlock {
  void* bias;  // numbers
  int64_t keys;
  int lanes;
  const char* const* mask;  // of each lane, at the block's first key; null for none
  DType mask_type;          // u8: a key whose byte is 0 is excluded
  int64_t mask_step;        // elements from key to key
  bool one_mask;            // the same for all lanes
  // Of each lane, in numbers: the first key's index less the lane's own, and ALiBi's slope.
  const void *distance, *slope;  // slope null for none
  double shift;                  // |distance - shift| is ALiBi's
  bool bounded;
  double low, high;  // of the distance
};

// The backward's block: scores become probabilities (exp(scale s + bias - log_sum)), and `products`
// of the gradient and the values become the scores' gradients, p (products - delta).
struct GradientBlock {
  void *scores, *products;
  const void* bias;
  int64_t keys;
  int lanes;
  double scale;
  const void *log_sum, *delta;  // of each lane
};

// What the probabilities of a block are multiplied with by dropout: 0 or `scale`.
struct DropBlock {
  void* factors;  // numbers, keys x lanes
  int64_t keys;
  int lanes;
  const uint64_t* first;  // of each lane: the element that its first key is
  uint64_t seed, threshold;
  double scale;
};

// Rows of `n` elements, of which each begins `row` elements after the last and whose elements are
// `step` apart, to rows of `to_row` elements of another type, with zeros behind them.
struct RowCopy {
  const char* from;
  int64_t row, step;
  char* to;
  int64_t to_row;
  int64_t rows, n;
};

struct DecodeKernels;  // decode.hpp

struct AttentionKernels {
  // Indexed by whether numbers are double.
  bool (*probabilities[2])(const ScoreBlock&);  // whether any factor is not 1
  void (*gradients[2])(const GradientBlock&);
  void (*bias[2])(const BiasBlock&);
  void (*drop[2])(const DropBlock&);
  void (*multiply[2])(void* numbers, const void* by, int64_t count);
  // Each column of rows x lanes times its factor.
  void (*scale_columns[2])(void* numbers, int64_t rows, int lanes, const void* factor);
  // keys x lanes of float32 to words of two bfloat16, keys 2i and 2i + 1 of a lane together; zeros
  // where the last has no second.
  void (*pair_keys)(const float* from, int64_t keys, int lanes, uint32_t* to);
  // By the types of source and destination; null where there is no such copy.
  void (*copy_rows[4][4])(const RowCopy&);
  // Rows of bfloat16 to words of row 2i and row 2i + 1, `to_row` words a row.
  void (*pair_rows)(const RowCopy&);
  // The sum over n elements of a b, in numbers, of so many rows: `a` and `b` of the call's type.
  void (*row_dots[4])(const RowCopy& a, const RowCopy& b, void* sums);
  const DecodeKernels* decode;
};

const AttentionKernels& portable_attention();
const AttentionKernels& avx2_attention();
const AttentionKernels& avx512_attention();

const AttentionKernels& attention_kernels();  // of the active instruction set

}  // namespace fastnn
