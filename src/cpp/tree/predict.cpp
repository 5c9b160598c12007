// Rows are packed in tiles of 64, feature by feature, so that the lanes of a vector are rows. A
// block of tiles that fits into L1 goes through one tree after the other; where the trees are more
// than half of L2 holds, many blocks go through a group of trees before the next group is fetched.
// No row's result depends on how rows are shared out.
#include "tree/predict.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "common/kernels_of.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"

namespace fastnn {
namespace {

constexpr int64_t kDenseFeatures = 1024;    // up to which all features are packed
constexpr int64_t kBlockBytes = 24 << 10;   // packed rows in L1, beside a tree
constexpr int64_t kGroupBytes = 768 << 10;  // trees in L2
constexpr int64_t kChunkBytes = 256 << 10;  // packed rows, beside a group

const PredictKernels& kernels() { return FASTNN_KERNELS_OF(predict); }

// The largest float32 that is <= x: for a float32 v, v <= x exactly where v <= that.
float round_down(double x) {
  const float f = float(x);
  return double(f) <= x ? f : std::nextafter(f, -std::numeric_limits<float>::infinity());
}

template <class T>
T field(const TreeNodes& t, int64_t node, int64_t offset) {
  T value;
  std::memcpy(&value, t.data + node * t.stride + offset, sizeof(T));
  return value;
}

struct Node {
  int64_t left, right;
  float threshold;
  uint32_t feature;
  uint32_t flags;  // kMissingLeft, kCategorical
  bool leaf() const { return left < 0; }
};

[[noreturn]] void no_tree(int64_t node, const std::string& what) {
  throw std::invalid_argument("node " + std::to_string(node) + " of a tree: " + what);
}

}  // namespace

Forest::Forest(int64_t features, int64_t outputs, int64_t columns)
    : features_(features),
      outputs_(outputs),
      columns_(columns),
      compact_(features > kDenseFeatures) {
  if (features < 1 || features > INT32_MAX || outputs < 1 || columns < outputs)
    throw std::invalid_argument("a forest: expected features and 1 <= outputs <= columns");
  if (compact_) place_.assign(size_t(features), -1);
}

void Forest::set_categories(const uint32_t* words, int64_t sets) {
  if (trees()) throw std::invalid_argument("categories: expected before the first tree");
  categories_.assign(words, words + sets * kCategoryWords);
}

int64_t Forest::reserve(int64_t bytes) {
  const size_t offset = lines_.size();
  lines_.resize(offset + size_t(bytes + 63) / 64);  // zeros
  return int64_t(offset);
}

int64_t Forest::packed(int64_t feature) {
  if (!compact_) return feature;
  int32_t& place = place_[size_t(feature)];
  if (place < 0) {
    place = int32_t(used_.size());
    used_.push_back(feature);
  }
  return place;
}

void Forest::add(const TreeNodes& tree, const double* values, int64_t column, double scale) {
  const int64_t n = tree.count;
  if (n < 1 || n > INT32_MAX) throw std::invalid_argument("a tree: expected 1 to 2^31 - 1 nodes");
  if (column < 0 || column + outputs_ > columns_)
    throw std::invalid_argument("a tree: expected a column of the result");
  const int64_t sets = int64_t(categories_.size()) / kCategoryWords;

  // The nodes, checked; how deep the tree is; its leaves, numbered in their order.
  std::vector<Node> nodes(static_cast<size_t>(n));
  std::vector<int32_t> depth(static_cast<size_t>(n)), leaf_of(static_cast<size_t>(n), -1);
  std::vector<bool> has_parent(static_cast<size_t>(n));
  int64_t deepest = 0, leaves = 0, highest = 0;
  for (int64_t i = 0; i < n; i++) {
    Node& node = nodes[size_t(i)];
    node.left = field<int64_t>(tree, i, tree.left);
    if (node.leaf()) {
      leaf_of[size_t(i)] = int32_t(leaves++);
      continue;
    }
    node.right = field<int64_t>(tree, i, tree.right);
    if (node.left <= i || node.right <= i || node.left >= n || node.right >= n)
      no_tree(i, "expected children after it");
    for (const int64_t child : {node.left, node.right}) {
      if (has_parent[size_t(child)]) no_tree(child, "expected one parent");
      has_parent[size_t(child)] = true;
    }
    const int64_t feature = field<int64_t>(tree, i, tree.feature);
    if (feature < 0 || feature >= features_) no_tree(i, "expected one of the features");
    node.feature = uint32_t(packed(feature));
    highest = std::max<int64_t>(highest, node.feature);
    node.flags = tree.missing >= 0 && field<uint8_t>(tree, i, tree.missing) ? kMissingLeft : 0;
    const int64_t set = tree.category >= 0 ? field<int64_t>(tree, i, tree.category) : -1;
    if (set >= sets) no_tree(i, "expected one of the sets of categories");
    if (set >= 0) {
      const int32_t bits = int32_t(set);
      std::memcpy(&node.threshold, &bits, 4);
      node.flags |= kCategorical;
    } else {
      node.threshold = round_down(field<double>(tree, i, tree.threshold));
    }
    const int32_t below = depth[size_t(i)] + 1;
    depth[size_t(node.left)] = depth[size_t(node.right)] = below;
    deepest = std::max<int64_t>(deepest, below);
  }

  // The tables hold features in 14 bits.
  const int levels = highest > kTopFeature ? 0 : int(std::min<int64_t>(deepest, kTopLevels));
  const int64_t places = int64_t(1) << levels, entries = std::max<int64_t>(places, 32);
  // Places that no row comes to cost memory only.
  const bool direct = deepest <= levels && (places <= 2 * leaves || outputs_ <= 2);
  const int64_t slots = direct ? places : leaves;

  Tree t{};
  const int64_t before = bytes();
  t.levels = levels, t.column = column, t.link = t.deep = -1;
  t.threshold = reserve(entries * int64_t(sizeof(float)));
  t.feature = reserve(entries * int64_t(sizeof(uint16_t)));
  if (!direct) t.link = reserve(places * int64_t(sizeof(int32_t)));
  t.values = reserve(slots * outputs_ * int64_t(sizeof(double)));
  t.node = reserve(slots * int64_t(sizeof(int32_t)));

  auto put_leaf = [&](int64_t node, int64_t slot) {
    at<int32_t>(t.node)[slot] = int32_t(node);
    double* to = at<double>(t.values) + slot * outputs_;
    for (int64_t k = 0; k < outputs_; k++) to[k] = scale * values[node * outputs_ + k];
  };

  // From the top on; the children of a leaf in the tables are itself and nothing.
  std::vector<int64_t> above{0}, level;
  for (int l = 0; l < levels; l++) {
    level.assign(above.size() * 2, -1);
    for (size_t p = 0; p < above.size(); p++) {
      const size_t entry = (size_t(1) << l) + p;
      if (above[p] >= 0 && !nodes[size_t(above[p])].leaf()) {
        const Node& node = nodes[size_t(above[p])];
        at<float>(t.threshold)[entry] = node.threshold;
        at<uint16_t>(t.feature)[entry] = uint16_t(node.feature | node.flags);
        level[2 * p] = node.left, level[2 * p + 1] = node.right;
      } else {
        at<float>(t.threshold)[entry] = std::numeric_limits<float>::infinity();
        at<uint16_t>(t.feature)[entry] = uint16_t(kMissingLeft);
        level[2 * p] = above[p];
      }
    }
    above.swap(level);
  }
  if (direct) {
    for (int64_t p = 0; p < places; p++)
      if (above[size_t(p)] >= 0) put_leaf(above[size_t(p)], p);
  } else {
    // What is below, in the tree's own order.
    std::vector<int32_t> inner(static_cast<size_t>(n), -1);
    std::vector<int64_t> below;
    for (int64_t node : above)
      if (node >= 0 && !nodes[size_t(node)].leaf()) below.push_back(node);
    for (size_t i = 0; i < below.size(); i++) {
      const Node& node = nodes[size_t(below[i])];
      for (int64_t child : {node.left, node.right})
        if (!nodes[size_t(child)].leaf()) below.push_back(child);
    }
    std::sort(below.begin(), below.end());
    for (size_t i = 0; i < below.size(); i++) inner[size_t(below[i])] = int32_t(i);
    auto link = [&](int64_t node) {
      return nodes[size_t(node)].leaf() ? ~leaf_of[size_t(node)] : inner[size_t(node)];
    };
    if (!below.empty()) t.deep = reserve(int64_t(below.size() * sizeof(DeepNode)));
    for (size_t i = 0; i < below.size(); i++) {
      const Node& node = nodes[size_t(below[i])];
      DeepNode& deep = at<DeepNode>(t.deep)[i];
      deep.threshold = node.threshold;
      deep.feature = node.feature | node.flags << 16;
      deep.child[0] = link(node.left), deep.child[1] = link(node.right);
    }
    for (int64_t p = 0; p < places; p++)
      at<int32_t>(t.link)[p] = above[size_t(p)] < 0 ? ~0 : link(above[size_t(p)]);
    for (int64_t i = 0; i < n; i++)
      if (leaf_of[size_t(i)] >= 0) put_leaf(i, leaf_of[size_t(i)]);
  }
  t.bytes = bytes() - before;
  trees_.push_back(t);
}

// f(kernels, tree, leaf, first row, rows) for each tree and each block, for a row in the order of
// the trees; and f.begin(first, rows), f.end(first, rows) before and after them.
template <class F>
unsigned Forest::run(const TreeRows& x, size_t first_tree, size_t last_tree, F f) const {
  if (x.rows == 0) return 0;
  const PredictKernels& k = kernels();
  const int64_t tile_size = std::max<int64_t>(width(), 1) * kTileRows, tile_bytes = tile_size * 4;
  const int64_t tiles = (x.rows + kTileRows - 1) / kTileRows;
  const int64_t block = std::clamp<int64_t>(kBlockBytes / tile_bytes, 1, kBlockTiles);

  // Nanoseconds, only to decide on threads: a region costs about 5 us.
  double cost = double(width());
  for (size_t i = first_tree; i < last_tree; i++) cost += trees_[i].link < 0 ? 5 : 50;
  constexpr double kWorthAThread = 10e3;
  const int threads = int(std::min<double>(
      std::clamp<double>(double(x.rows) * cost / kWorthAThread, 1, max_threads()), double(tiles)));

  // At least four a thread.
  int64_t chunk = block;
  if (bytes() > kGroupBytes)
    chunk =
        std::max(block, std::min(kChunkBytes / tile_bytes, tiles / (4 * threads)) / block * block);
  const int64_t chunk_bytes = std::min(chunk, tiles) * tile_bytes;
  char* memory = static_cast<char*>(scratch(Scratch::misc, size_t(chunk_bytes * threads)));
  std::atomic<unsigned> saw{0};
  // Chunk by chunk, to whichever thread is free: one whose core is busy with other work takes
  // fewer.
  std::atomic<int64_t> next{0};
  parallel(threads, [&](int thread, int) {
    float* packed_rows = reinterpret_cast<float*>(memory + thread * chunk_bytes);
    unsigned noticed = 0;
    for (int64_t first; (first = next.fetch_add(chunk, std::memory_order_relaxed)) < tiles;) {
      const int64_t count = std::min(chunk, tiles - first), begin = first * kTileRows;
      unsigned here = 0;
      for (int64_t i = 0; i < count; i++) {
        PredictKernels::Pack pack{x, compact_ ? used_.data() : nullptr, width(),
                                  packed_rows + i * tile_size};
        const int64_t row = begin + i * kTileRows;
        pack.x.rows = std::min<int64_t>(kTileRows, x.rows - row);
        const int64_t bytes_each = int64_t(dtype_size(x.type));
        pack.x.data = static_cast<const char*>(x.data) + row * x.row_stride * bytes_each;
        here |= k.pack(pack);
      }
      noticed |= here;
      const bool general = (here & kSawNaN) || !categories_.empty();
      const int64_t rows = std::min(count * kTileRows, x.rows - begin);
      f.begin(begin, rows);
      for (size_t from = first_tree, to; from < last_tree; from = to) {
        int64_t bytes = trees_[from].bytes;
        for (to = from + 1; to < last_tree && (bytes += trees_[to].bytes) <= kGroupBytes;) to++;
        for (int64_t b = 0; b < count; b += block) {
          const int64_t some = std::min(block, count - b), row = begin + b * kTileRows;
          const int64_t block_rows = std::min(some * kTileRows, x.rows - row);
          alignas(64) int32_t leaf[kBlockTiles * kTileRows];
          for (size_t i = from; i < to; i++) {
            const Tree& t = trees_[i];
            const TreeView view{t.levels,
                                at<float>(t.threshold),
                                at<uint16_t>(t.feature),
                                at<int32_t>(t.link),
                                at<DeepNode>(t.deep),
                                categories_.data()};
            k.leaves(view, packed_rows + b * tile_size, tile_size, some, general, leaf);
            f.tree(k, i, t, leaf, row, block_rows);
          }
        }
      }
      f.end(begin, rows);
    }
    saw |= noticed;
  });
  scratch_trim();
  return saw;
}

unsigned Forest::apply(const TreeRows& x, int64_t* out) const {
  struct Numbers {
    const Forest& forest;
    int64_t total;
    int64_t* out;
    void begin(int64_t, int64_t) const {}
    void tree(const PredictKernels&, size_t number, const Tree& t, const int32_t* leaf, int64_t row,
              int64_t rows) const {
      const int32_t* node = forest.at<int32_t>(t.node);
      int64_t* to = out + int64_t(number) * total + row;
      for (int64_t r = 0; r < rows; r++) to[r] = node[leaf[r]];
    }
    void end(int64_t, int64_t) const {}
  };
  return run(x, 0, trees_.size(), Numbers{*this, x.rows, out});
}

unsigned Forest::predict(const TreeRows& x, int64_t first, int64_t last, bool accumulate,
                         double divisor, double* out) const {
  if (first < 0 || last < first || last > trees())
    throw std::invalid_argument("trees: expected a range of those there are");
  struct Sums {
    const Forest& forest;
    bool accumulate;
    double divisor;
    double* out;
    void begin(int64_t row, int64_t rows) const {
      const int64_t columns = forest.columns_;
      if (!accumulate) std::fill(out + row * columns, out + (row + rows) * columns, 0.0);
    }
    void tree(const PredictKernels& k, size_t, const Tree& t, const int32_t* leaf, int64_t row,
              int64_t rows) const {
      k.add(forest.at<double>(t.values), forest.outputs_, leaf, rows,
            out + row * forest.columns_ + t.column, forest.columns_);
    }
    void end(int64_t row, int64_t rows) const {
      const int64_t columns = forest.columns_;
      if (divisor != 1)
        for (int64_t i = row * columns; i < (row + rows) * columns; i++) out[i] /= divisor;
    }
  };
  return run(x, size_t(first), size_t(last), Sums{*this, accumulate, divisor, out});
}

}  // namespace fastnn
