// The best split of a node by one column, two classes, without sorting the node.
//
// Rows are counted into buckets of ranks. The decrease of the impurity is a convex function of how
// many rows of each class go left, so that over all splits inside a bucket it is at most what it
// is at the corners of what they can be. Only buckets that may hold the best split by this bound
// are sorted and searched: in a node of 1,000 rows or more, about a tenth of them.
#pragma once
#include <cstdint>

namespace fastnn {

// A column by row: row r's value is the rank[r * stride]th of the column's values, and is
// value[r * stride], too, where value is not null.
struct ColumnRanks {
  const uint32_t* rank;
  const float* value;
  int64_t stride;
};

// Fewer rows are sorted as fast.
constexpr int64_t kLeastBucketed = 128;
// Of the rows of a node, and of their weights.
constexpr int64_t kMostBucketed = (int64_t(1) << 21) - 1;
constexpr int kMostBucketBits = 8;

struct BucketSearch {
  ColumnRanks ranks;
  const float* values;    // of the column, in order, none missing
  const uint32_t* keys;   // n of the node, in any order
  const uint64_t* tally;  // what a key adds to a bucket, by its lowest bits (tally_of)
  int64_t n;
  int shift, weight_bits;  // of the row, and the weight, in a key
  int64_t total, ones;     // weight of all rows of the node, and of class 1
  int64_t least, most;     // rows that may go left
  double least_weight;
  double to_beat;  // a proxy: splits that are not better need not be found
  // Room for n + 16 each.
  uint32_t *own_ranks, *some_keys;
  uint64_t* records;
  float* some_values;
};

// Rows, weight and weight of class 1, in 21 bits each.
inline uint64_t tally_of(uint32_t low_bits, int weight_bits) {
  const uint64_t w = weight_bits ? low_bits >> 1 : 1;
  return 1 | w << 21 | (low_bits & 1 ? w : 0) << 42;
}

struct BucketBest {
  double proxy;
  int64_t left;        // rows; 0: no split is better than to_beat
  int64_t last;        // rank that goes left
  float below, above;  // values on both sides of the split
  bool constant;
  bool found_out;  // false: many rows lie in one bucket, and nothing was done
};

}  // namespace fastnn
