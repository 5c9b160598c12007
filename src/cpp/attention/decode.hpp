// What one instruction set does for few queries and many keys: see decode.inl.
#pragma once
#include "attention/kernels.hpp"

namespace fastnn {

// `count` (1, 2 or 4) queries' rows of n numbers, one after the other, with rows of keys or values,
// and their scores.
struct DecodeBlock {
  void* rows;
  int count;
  const char* from;  // of the call's type, elements that lie together
  int64_t from_row;  // elements
  int64_t keys, n;
  void* scores;  // numbers
  int64_t scores_row;
};

struct DecodeKernels {
  // By the call's type.
  void (*score[4])(const DecodeBlock&);  // scores = the products of rows and keys
  void (*weigh[4])(const DecodeBlock&);  // rows += scores times values
  // By whether numbers are double. Scores of a query become exponentials of scale * score + bias
  // (null for none) less the largest; that, and their sum, are numbers.
  void (*soften[2])(void* scores, const void* bias, int64_t keys, double scale, void* max,
                    void* sum);
  void (*bias[2])(const BiasBlock&);  // of one lane
};

}  // namespace fastnn
