// The loops of the exact search over sorted values, for each instruction set.
//
// A key is what lies beside a value, in 32 bits: the row above, then the row's whole weight (no
// bits where all are 1), and its class below.
#pragma once
#include <cstddef>
#include <cstdint>

#include "tree/buckets.hpp"

namespace fastnn {

// Values closer than this are one: scikit-learn's FEATURE_THRESHOLD.
constexpr float kFeatureThreshold = 1e-7f;

// A candidate j splits `n` sorted values before the jth, 1 <= j < n. What stands left from the
// start (missing values, when they go left) is `first_left`; candidates whose left side counts
// fewer rows than `least` or more than `most` are none.
struct SplitRange {
  const float* values;
  const uint32_t* keys;
  int64_t n;
  int64_t first_left, least, most;
};

// The first candidate of the largest proxy, and 0 where there is none. The proxies are
// scikit-learn's to the bit: weighted counts times impurities, negated.
struct BestCandidate {
  double proxy;
  int64_t j;
};

// Two classes, in the lowest bit of a key; weights whole and below 2^24 together.
struct TwoClasses {
  SplitRange range;
  int weight_bits;
  int64_t total, ones;               // weight of all rows of the node, and of class 1
  int64_t first_weight, first_ones;  // of what stands left from the start
  double least_weight;
};

// Any number of classes, whole weights.
struct ManyClasses {
  SplitRange range;
  int class_bits, weight_bits, classes;
  const int32_t* weights;             // by row, where keys have no room for them; or null
  int64_t total;                      // weight of all rows of the node
  int64_t first_weight;               // of what stands left from the start
  int64_t *left, *right;              // weights of each class at the start; changed
  int64_t square_left, square_right;  // sums of their squares
  double least_weight;
};

// Squared error: y in the order of the rows, weights or null.
struct OneTarget {
  SplitRange range;
  int shift;
  const double *y, *weights;
  double total, sum;               // weight and weighted sum of the node
  double first_weight, first_sum;  // of what stands left from the start
  double least_weight;
};

// A node of this share of the column's rows or more is read off a set of bits.
constexpr int64_t kDenseShare = 12;

// Rows of a node in the order of a column that was sorted once: order[rank of row r] is r.
struct NodeSort {
  ColumnRanks ranks;
  const uint32_t* order;
  const float* values;     // of the column, in order
  int64_t rows;            // of the column
  const uint32_t* key_of;  // by row
  const uint32_t* keys;    // n of the node, in any order
  int64_t n;
  int shift;          // of the row in a key
  uint64_t* bits;     // a bit a rank: all 0 before and after
  uint64_t* records;  // room for 2 n
  // The result, with room for 16 more.
  float* sorted_values;
  uint32_t* sorted_keys;
  uint32_t* spare_ranks;
};

// A column of few values, by the number of each row's value among them, a byte; 3 bytes are
// readable behind the last. Counting is all the sorting it takes.
constexpr int kMostFewValues = 32, kMostFewClasses = 64, kFewTables = 2;

// n keys of a node in any order, of whole weights that are `total` together and at most
// kMostFewWeight. Tables and `all` hold `lanes` classes, 16 or 64, and begin a cache line.
struct FewValues {
  const uint8_t* codes;
  const uint32_t* keys;
  int64_t n;
  int shift, class_bits, weight_bits, lanes;
  const int32_t* all;  // weight of each class in the node
  int64_t total;
  int64_t least, most;  // rows that may go left
  double least_weight;
  int32_t* table;  // kFewTables x kMostFewValues x lanes: all 0 before and after
};
constexpr int64_t kMostFewWeight = 32767;

// Values up to the number `code` go left, which are `left` rows (0: there is no split); `next` is
// the following one in the node.
struct FewBest {
  double proxy;
  int64_t left;
  int code, next;
  bool constant;
};

struct TreeKernels {
  // Moves what goes left (its row's bit in `side` differs from `flip`) to the front and the rest
  // behind it; each side keeps its order. `spare` has room for n values and n keys. Returns how
  // many went left.
  int64_t (*partition)(float* values, uint32_t* keys, int64_t n, int shift, const uint32_t* side,
                       uint32_t flip, float* spare_values, uint32_t* spare_keys);
  // As partition, of keys without values: left where the row's rank is < below or >= from. `spare`
  // has room for n. Returns how many went left.
  int64_t (*partition_rows)(uint32_t* keys, int64_t n, int shift, ColumnRanks ranks, uint32_t below,
                            uint32_t from, uint32_t* spare);
  // As partition_rows; left where the row's code is <= last.
  int64_t (*partition_codes)(uint32_t* keys, int64_t n, int shift, const uint8_t* codes, int last,
                             uint32_t* spare);
  void (*sort_node)(const NodeSort&);
  FewBest (*few_values)(const FewValues&);
  BestCandidate (*two_classes)(const TwoClasses&);
  BucketBest (*best_in_buckets)(const BucketSearch&);
  BestCandidate (*many_classes)(const ManyClasses&);
  BestCandidate (*one_target)(const OneTarget&);
};
const TreeKernels& portable_tree();
const TreeKernels& avx2_tree();
const TreeKernels& avx512_tree();

}  // namespace fastnn
