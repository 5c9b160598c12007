// The loops of the search of random splits over a node's values, in any order, for each instruction
// set.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastnn {

// n keys of a node; what is read by row lies at the key shifted right. Arrays that are written have
// room for 16 more.
struct RandomRows {
  const uint32_t* keys;
  int64_t n;
  int shift;
};

// Of those that are not missing (NaN).
struct ValueRange {
  float least, most;
  int64_t missing;
};

// Left go values <= cut, and the missing ones if `missing_left`.
struct RandomCut {
  const float* values;  // of the rows, as `gather` left them
  float cut;
  bool missing_left;
};

// Classes and whole weights as keys hold them: see kernels.hpp.
struct KeyBits {
  int class_bits, weight_bits;
};
struct LeftSums {
  int64_t rows;
  double weight, sum;
};

struct RandomKernels {
  // The values of a column, one a row, and their range.
  ValueRange (*gather)(const RandomRows& rows, const float* column, float* values);
  // Rows that go left; adds their weights to those of their classes.
  int64_t (*count_left)(const RandomRows& rows, const RandomCut& cut, KeyBits bits,
                        int64_t* classes);
  // What the rows that go left sum up to: their weights (null: 1 each), and their targets, which
  // are weighted already. The order of the additions is the same for all instruction sets.
  LeftSums (*sum_left)(const RandomRows& rows, const RandomCut& cut, const double* targets,
                       const double* weights);
  // The keys of the rows that go left, in their order, to `left`, the others' to `right`. Returns
  // how many go left. `left` may be the rows' own keys.
  int64_t (*part)(const RandomRows& rows, const RandomCut& cut, uint32_t* left, uint32_t* right);
};
const RandomKernels& portable_random();
const RandomKernels& avx2_random();
const RandomKernels& avx512_random();

}  // namespace fastnn
