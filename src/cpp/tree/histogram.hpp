// Histograms of gradients and hessians over bins, in integers, and the best split of each.
//
// Gradients and hessians are made integers once a tree, by powers of two that depend on the largest
// of them, on how many are very small beside it and on the number of rows alone. So every sum is
// exact: it depends neither on the order of the rows nor on how they are shared out among threads
// or machines, and the histogram of a node less that of one child is exactly that of the other.
#pragma once
#include <cstdint>

#include "tree/binning.hpp"

namespace fastnn {

// What a row adds to its bin, in so many int64:
// 1: the gradient above `count_bits` bits of count, where all hessians are 1.
// 2: the gradient; the hessian above the count.
// 4: the gradient, above its last 31 bits, and these; the hessian likewise, above the count.
// A gradient has up to 30 bits and a sign in the first two, and so has a hessian, and both have 31
// more in the last, which is for gradients or hessians too far apart. A sum in the first two is
// exactly a float64.
struct SumFormat {
  int words;
  int count_bits;
  double gradient_unit, hessian_unit;  // powers of two: of the last bit
};
constexpr int kLowBits = 31;
constexpr int64_t kLowMask = (int64_t(1) << kLowBits) - 1;

// Rows of bins, in groups of up to 64 features: that a row's bytes of a group share a cache line
// or two, and a group's histograms the second cache.
struct PackedBins {
  static constexpr int kGroup = 64;
  const uint8_t* data;
  int64_t rows;
  int features, groups, width;  // width: bytes of a group's row, a multiple of 4
  const uint8_t* group(int g) const { return data + int64_t(g) * rows * width; }
};

struct SplitRules {
  double l2, min_hessian, min_gain;
  int64_t min_samples;
};

// A node, as far as its split is concerned.
struct SplitNode {
  int64_t count;
  double gradient, hessian, value, lower, upper;  // the bounds are of the children's values
};

// The best split of one feature; gain -1 where there is none.
struct FeatureSplit {
  double gain, gradient_left, hessian_left;
  int64_t count_left;
  int bin;  // the last that goes left
  bool missing_left;
  uint32_t left[8];  // of categories: the bins that go left
};

struct FeatureBins {
  int bins;  // not counting the one for missing values, which is `missing`
  int missing;
  bool has_missing, categorical;
  int8_t monotonic;  // 1: values rise, -1: fall
};

// Rows of a loss, and where their gradients and hessians go.
struct LossRows {
  const double *y, *raw, *weight;  // weight: null for 1
  float *gradient, *hessian;       // hessian: null where it is not asked for
  LossRows from(int64_t row) const {
    return {y + row, raw + row, weight ? weight + row : nullptr, gradient + row,
            hessian ? hessian + row : nullptr};
  }
};

struct HistogramKernels {
  // Entries of a feature: more than bins, so that neighbours' equal bins are not 4 KB apart, where
  // a load waits for a store to the other.
  static constexpr int kEntries = kMostBins + 4;
  // The largest magnitude; NaN where there is one.
  float (*largest)(const float* x, int64_t n);
  void (*squared_error)(const LossRows& rows, int64_t n);
  void (*half_binomial)(const LossRows& rows, int64_t n);
  // How many are below each of three limits, but are not 0.
  void (*count_below)(const float* x, int64_t n, const float* limits, int64_t* counts);
  // `words` integers a row, next to each other.
  void (*integers)(const SumFormat& format, const float* gradient, const float* hessian, int64_t n,
                   int32_t* out);
  // Adds rows to the histograms of `features` (a multiple of 4) neighbours; rows from `first` on,
  // or those of an index. A feature's histogram has kEntries.
  struct Rows {
    const uint8_t* bins;  // of the first of the features
    int width, features;
    const int32_t* integers;
    const uint32_t* index;
    int64_t first, count;
    int64_t* sums;
  };
  void (*add)(const SumFormat& format, const Rows& rows);
  // parent -= child, `bins` entries of a feature and the one for missing values.
  void (*subtract)(const SumFormat& format, const FeatureBins& feature, int64_t* parent,
                   const int64_t* child);
  // Of all bins of a feature.
  void (*total)(const SumFormat& format, const int64_t* sums, double& gradient, double& hessian);
  // What gains less than `enough`, which another feature does, need not be found.
  void (*split)(const SumFormat& format, const SplitRules& rules, const SplitNode& node,
                const FeatureBins& feature, const int64_t* sums, double enough, FeatureSplit& best);
  // Rows whose bin is in the set go to `left`, the others to `right`, in their order; both have
  // room for 16 more. Returns how many went left. index: null for first, first + 1, ...
  int64_t (*part)(const uint8_t* column, const uint32_t* set, const uint32_t* index, uint32_t first,
                  int64_t count, uint32_t* left, uint32_t* right);
};
const HistogramKernels& portable_histogram();
const HistogramKernels& avx2_histogram();
const HistogramKernels& avx512_histogram();
const HistogramKernels& histogram_kernels();  // of the active instruction set

}  // namespace fastnn
