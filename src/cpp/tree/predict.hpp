// Prediction of trees and forests: the leaf that each row falls into, and sums of the leaves'
// values.
#pragma once
#include <cstdint>
#include <vector>

#include "common/dtype.hpp"

namespace fastnn {

// A tree as numpy holds it: a record of `stride` bytes a node, with its fields at these offsets.
// Node 0 is the root, children come after their one parent, and the `left` of a leaf is negative;
// nodes that are nobody's children are not looked at. A row
// goes left where its feature is <= threshold, or NaN and `missing` is set; in a node whose
// category is >= 0, where its feature is in that set.
struct TreeNodes {
  const char* data = nullptr;
  int64_t count = 0, stride = 0;
  int64_t left = 0, right = 0, feature = 0;  // int64
  int64_t threshold = 0;                     // float64
  int64_t missing = -1;                      // uint8; -1: no such field, and NaN goes right
  int64_t category = -1;                     // int64; -1: no such field
};

// Rows of features. Strides count elements. Those of uint8 are bins, of which `missing_bin` is NaN.
struct TreeRows {
  DType type;  // f32, f64 or u8
  const void* data;
  int64_t rows, row_stride, column_stride;
  int missing_bin = -1;
};

// What was noticed among the features; of those that no tree asks for only where Forest::sees_all.
constexpr unsigned kSawNaN = 1, kSawInfinity = 2;

class Forest {
 public:
  // Rows have `features` numbers, results `columns`, and a leaf `outputs` of them.
  Forest(int64_t features, int64_t outputs, int64_t columns);
  // A set of categories from 0 to 255: bit c % 32 of word c / 32.
  void set_categories(const uint32_t* words, int64_t sets);
  // values: count * outputs. Those of a leaf, times `scale`, are added to columns from `column` on.
  // Throws std::invalid_argument for what is no tree.
  void add(const TreeNodes& tree, const double* values, int64_t column, double scale);

  // out (trees, rows): the number of the leaf.
  unsigned apply(const TreeRows& x, int64_t* out) const;
  // out (rows, columns) = (out, or zeros) plus the leaves' values of the trees [first, last), tree
  // by tree, each sum divided by `divisor`. Float64, in the order of the trees: the bits depend on
  // nothing else.
  unsigned predict(const TreeRows& x, int64_t first, int64_t last, bool accumulate, double divisor,
                   double* out) const;

  int64_t trees() const { return int64_t(trees_.size()); }
  int64_t features() const { return features_; }
  int64_t columns() const { return columns_; }
  bool sees_all() const { return !compact_; }
  int64_t bytes() const { return int64_t(lines_.size() * sizeof(Line)); }

 private:
  struct alignas(64) Line {
    unsigned char bytes[64];
  };
  struct Tree {
    int levels;
    // Offsets in lines_; -1 where there is none.
    int64_t threshold, feature, link, deep, values, node;
    int64_t column, bytes;
  };
  template <class F>
  unsigned run(const TreeRows& x, size_t first_tree, size_t last_tree, F f) const;
  int64_t reserve(int64_t bytes);
  template <class T>
  T* at(int64_t offset) {
    return offset < 0 ? nullptr : reinterpret_cast<T*>(lines_[size_t(offset)].bytes);
  }
  template <class T>
  const T* at(int64_t offset) const {
    return offset < 0 ? nullptr : reinterpret_cast<const T*>(lines_[size_t(offset)].bytes);
  }
  int64_t packed(int64_t feature);
  int64_t width() const { return compact_ ? int64_t(used_.size()) : features_; }

  int64_t features_, outputs_, columns_;
  bool compact_;               // rows are packed without the features that no tree asks for
  std::vector<int64_t> used_;  // then: which they are, and where each of them is packed
  std::vector<int32_t> place_;
  std::vector<Line> lines_;
  std::vector<Tree> trees_;
  std::vector<uint32_t> categories_;
};

// ---- what the kernels are given

constexpr int kTileRows = 64;      // rows that are packed together, feature by feature
constexpr int kBlockTiles = 8;     // at most so many tiles a call
constexpr int kTopLevels = 8;      // levels that lie in tables
constexpr int kCategoryWords = 8;  // a set of categories
// In the tables' features; above the number.
constexpr unsigned kMissingLeft = 0x8000, kCategorical = 0x4000, kTopFeature = 0x3fff;

// Below the tables: children are other nodes, or ~leaf.
struct DeepNode {
  float threshold;   // or, as an integer, the set of categories
  uint32_t feature;  // kMissingLeft and kCategorical, shifted up by 16
  int32_t child[2];
};
constexpr uint32_t kDeepFeature = 0x3fffffff;

struct TreeView {
  int levels;
  // The node i has the children 2i and 2i + 1, and the root is 1. A leaf above the lowest level
  // goes on to the left. At least 32 entries, aligned to 64 bytes.
  const float* threshold;
  const uint16_t* feature;
  // What is below the tables: a node, or ~leaf. Null where each place there is a leaf of its own.
  const int32_t* link;
  const DeepNode* deep;
  const uint32_t* categories;
};

// The kernels of one instruction set.
struct PredictKernels {
  // tile[feature][kTileRows], float32, zeros after the last row. `columns` are the features to
  // take, null for all. What was noticed.
  struct Pack {
    TreeRows x;
    const int64_t* columns;
    int64_t count;
    float* tile;
  };
  unsigned (*pack)(const Pack&);
  // leaf[row] of so many tiles, each `tile_size` floats after the one before. `general`: with NaN
  // or categories.
  void (*leaves)(const TreeView& tree, const float* x, int64_t tile_size, int64_t tiles,
                 bool general, int32_t* leaf);
  // out[row][0 to outputs) += values[leaf[row]][0 to outputs)
  void (*add)(const double* values, int64_t outputs, const int32_t* leaf, int64_t rows, double* out,
              int64_t out_row);
};
const PredictKernels& portable_predict();
const PredictKernels& avx2_predict();
const PredictKernels& avx512_predict();

}  // namespace fastnn
