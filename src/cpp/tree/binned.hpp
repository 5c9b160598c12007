// Columns of bins, and the loops of the search among them: histograms of what the rows of a node
// weigh in each bin, and the best border between two bins.
//
// All sums are integers: whole weights of classes, or targets in fixed point. So they depend
// neither on the order of the rows nor on the number of threads, and the histogram of a node less
// that of one child is exactly the other child's.
#pragma once
#include <cstdint>
#include <vector>

#include "tree/presort.hpp"

namespace fastnn {

constexpr int kMissingBin = 255;
constexpr int kBinSlots = 256;

// Bins of one byte, column f at bins + f * step, with room for 3 bytes behind the last; NaN in bin
// 255. What fell into them is known, so that a border lies in the middle between values.
struct BinnedColumns {
  int64_t rows, columns, step;
  const uint8_t* bins;

  struct Column {
    int bins;  // behind the last that has values
    bool missing;
    bool close;  // largest values of some neighbours are so close that they count as equal
    float least[kBinSlots], largest[kBinSlots];
  };
  std::vector<Column> of;

  // Throws std::bad_alloc.
  BinnedColumns(const FloatMatrix& x, const uint8_t* bins, int64_t step, int threads);
  const uint8_t* column(int64_t f) const { return bins + f * step; }
};

// Rows of a node, each in the upper bits of its key, and one column.
struct BinnedRows {
  const uint8_t* column;
  const uint32_t* keys;
  int64_t n;
  int shift;
};

// One word a bin for two classes: from below the rows, their weight, and that of class 1.
constexpr int kFieldBits = 21;
// Many classes: a class after the other, a word a bin; the weight below, the rows above 32 bits.
// One target: a pair of words a bin, the sum, and weight and rows as above.

struct BinScan {
  const uint64_t* sums;
  int bins;      // of the column, without the missing ones
  bool missing;  // the column has missing values
  int64_t n, least;
  double least_weight;
};
struct TwoClassScan {
  BinScan of;
  uint64_t all;   // the node's word
  double enough;  // what a decrease has to reach, as in BestBorder
};
struct ManyClassScan {
  BinScan of;
  int classes;
  const uint64_t* all;  // the node's words
};
struct OneTargetScan {
  BinScan of;
  double unit;  // of the sums
  int64_t sum, weight;
};
// The first of the best borders, by scikit-learn's proxy to the bit.
struct BestBorder {
  double proxy, decrease;
  int bin;  // the last on the left; -1: none
  int64_t left;
  bool missing_left, constant;
  uint64_t word;  // of two classes: what goes left
};

struct BinnedKernels {
  void (*add_two_classes)(const BinnedRows& rows, const uint64_t* word_of, uint64_t* sums);
  // The weight is above `class_bits`: a row adds word_of[weight] to its class.
  void (*add_many_classes)(const BinnedRows& rows, int class_bits, const uint64_t* word_of,
                           uint64_t* sums);
  // `pairs` in the order of the rows.
  void (*add_pairs)(const BinnedRows& rows, const int64_t* pairs, int64_t* sums);
  void (*subtract)(uint64_t* parent, const uint64_t* child, int64_t words);
  BestBorder (*two_classes)(const TwoClassScan&);
  BestBorder (*many_classes)(const ManyClassScan&);
  BestBorder (*one_target)(const OneTargetScan&);
  // Rows in the order of their bins, and as they were in each. `counts` has 256.
  void (*sort)(const BinnedRows& rows, uint32_t* counts, uint32_t* sorted);
  // Rows whose bin is < below or >= from to the front, the others behind them, each side in its
  // order. `spare` has room for n and 16 more. Returns how many are in front.
  int64_t (*partition)(const BinnedRows& rows, uint32_t below, uint32_t from, uint32_t* keys,
                       uint32_t* spare);
};
const BinnedKernels& portable_binned();
const BinnedKernels& avx2_binned();
const BinnedKernels& avx512_binned();
const BinnedKernels& binned_kernels();  // of the active instruction set

}  // namespace fastnn
