// The loops of the exact search over sorted values, for each instruction set.
//
// A key is what lies beside a value: row << shift | class, in 32 bits.
#pragma once
#include <cstddef>
#include <cstdint>

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

// Two classes, each row counted once.
struct TwoClasses {
  SplitRange range;
  int64_t total, ones;  // all rows of the node, and those of class 1
  int64_t first_ones;   // of what stands left from the start
};

// Any number of classes, whole weights (null: 1 each).
struct ManyClasses {
  SplitRange range;
  int shift;
  const int32_t* weights;             // by row
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

struct TreeKernels {
  // Moves what goes left (its row's bit in `side` differs from `flip`) to the front and the rest
  // behind it; each side keeps its order. `spare` has room for n values and n keys. Returns how
  // many went left.
  int64_t (*partition)(float* values, uint32_t* keys, int64_t n, int shift, const uint32_t* side,
                       uint32_t flip, float* spare_values, uint32_t* spare_keys);
  BestCandidate (*two_classes)(const TwoClasses&);
  BestCandidate (*many_classes)(const ManyClasses&);
  BestCandidate (*one_target)(const OneTarget&);
};
const TreeKernels& portable_tree();
const TreeKernels& avx2_tree();
const TreeKernels& avx512_tree();

}  // namespace fastnn
