#include "tree/grow.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <deque>
#include <limits>
#include <mutex>
#include <new>
#include <utility>

#include "common/integers.hpp"
#include "common/kernels_of.hpp"
#include "common/memory.hpp"
#include "common/parallel.hpp"

namespace fastnn {

const HistogramKernels& histogram_kernels() { return FASTNN_KERNELS_OF(histogram); }

namespace {

constexpr double kInfinite = std::numeric_limits<double>::infinity();
// Rows that one thread divides at a time: by the number of rows alone.
constexpr int64_t kPart = 1 << 14;

// Threads that so many nanoseconds of work are worth.
int worth_threads(double nanoseconds) {
  return int(std::clamp<double>(nanoseconds / 15e3, 1, max_threads()));
}

// Runs one(i) for i < count, in any order, on the threads that the work is worth.
template <class F>
void for_each_part(int64_t count, double nanoseconds, F one) {
  const int threads = int(std::min<int64_t>(worth_threads(nanoseconds), count));
  if (threads <= 1) {
    for (int64_t i = 0; i < count; i++) one(i);
    return;
  }
  std::atomic<int64_t> next{0};
  parallel(threads, [&](int, int) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) one(i);
  });
}

int bits_of(int64_t n) { return 64 - __builtin_clzll(uint64_t(std::max<int64_t>(n, 1))); }

// The unit in which `largest` has `bits` bits.
double unit_of(double largest, int bits) {
  if (largest == 0) return 1;
  int exponent;
  std::frexp(largest, &exponent);  // largest < 2^exponent
  return std::ldexp(1.0, exponent - bits);
}

// A float64 holds a sum of 53 bits exactly, a row's integer has 31 and a sign.
SumFormat format_of(int words, const GrowSettings& s) {
  SumFormat f;
  f.words = words;
  f.count_bits = bits_of(s.all_rows);
  const int beside_count = std::min(30, 62 - 2 * f.count_bits);
  const int alone = std::min(30, words == 2 ? 53 - f.count_bits : 62 - f.count_bits);
  const int more = words == 4 ? kLowBits : 0;
  f.gradient_unit = unit_of(s.largest_gradient, more + (words == 1 ? beside_count : alone));
  f.hessian_unit =
      unit_of(s.constant_hessian ? 1 : s.largest_hessian, more + std::max(1, beside_count));
  return f;
}

// Whether so many of n numbers are so small beside the unit that splits may depend on what rounding
// changes: half of them are below 2^bulk units, 1 of 64 below 2^12, or 1 of 2^14 below 2^4; and
// enough for a node and its split. Numbers that are spread evenly around 0 are less often so small.
struct Coarse {
  float limits[3];
  Coarse(double unit, int bulk)
      : limits{float(std::ldexp(unit, bulk)), float(std::ldexp(unit, 12)),
               float(std::ldexp(unit, 4))} {}
  static bool of(const int64_t* counts, int64_t n, int64_t min_samples) {
    constexpr int kShare[3] = {1, 6, 14};
    for (int i = 0; i < 3; i++)
      if (counts[i] >= std::max({n >> kShare[i], 2 * min_samples, int64_t(1)})) return true;
    return false;
  }
};

// A range of features whose histograms are made together.
struct Tile {
  int begin, end;  // multiples of 4, counted through the groups' padding
};

struct Leaf {
  SplitNode node;
  int depth = 0;
  int64_t begin = 0, end = 0;
  int interaction = 0;
  std::shared_ptr<std::vector<uint32_t>> allowed;  // null: all
  FeatureSplit split{-1, 0, 0, 0, 0, false, {}};
  int feature = -1;
  bool leaf = false, evaluated = false;
  int64_t* histogram = nullptr;
  int left = -1, right = -1;
};

// Histograms, for whoever needs one.
class Histograms {
 public:
  // Before a tree: all are free, and have so many bytes.
  void start(size_t bytes) {
    if (bytes != bytes_) all_.clear();
    bytes_ = bytes;
    free_.clear();
    for (const Memory& m : all_) free_.push_back(m.as<int64_t>());
  }
  int64_t* take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) {
      free_.reserve(all_.size() + 1);  // for give, which must not throw
      all_.emplace_back(bytes_);
      return all_.back().as<int64_t>();
    }
    int64_t* h = free_.back();
    free_.pop_back();
    return h;
  }
  void give(Leaf& leaf) {
    if (!leaf.histogram) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(leaf.histogram);
    leaf.histogram = nullptr;
  }

 private:
  std::mutex mutex_;
  size_t bytes_ = 0;
  std::deque<Memory> all_;
  std::vector<int64_t*> free_;
};

}  // namespace

struct Grower::State {
  int64_t rows;
  const uint8_t* columns;
  int64_t step;
  std::vector<FeatureBins> features;
  std::vector<int> slot;  // of a feature, in the groups' order with padding
  PackedBins packed{};
  Memory packed_memory, integers, partition_memory;
  uint32_t* partition = nullptr;
  std::vector<Tile> tiles, large_tiles;  // for several threads, and for one
  int slots = 0;
  Histograms histograms;

  // Of the tree that grows:
  SumFormat format{};
  size_t integers_bytes = 0;
  GrowSettings settings;
  GrowHooks* hooks = nullptr;
  bool bounded = false;    // some feature is monotonic
  bool any_order = false;  // which leaf is split next changes nothing

  int64_t* sums_of(int64_t* histogram, int feature) const {
    return histogram + int64_t(slot[size_t(feature)]) * HistogramKernels::kEntries * format.words;
  }

  const std::vector<Tile>& tiles_of(double nanoseconds) const {
    return worth_threads(nanoseconds) > 1 ? tiles : large_tiles;
  }

  class Branch;
  void pack();
  void cut(int parts, std::vector<Tile>& out) const;
  bool coarse(const float* x, const Coarse& unit);
  SumFormat choose_format(const float* gradient, const float* hessian);
  void make_integers(const float* gradient, const float* hessian);
  // The histogram of a tile over the partition's rows [begin, end).
  void add_tile(const Tile& tile, int64_t begin, int64_t end, int64_t* sums) const;
  void choose(const Leaf& leaf, std::vector<uint8_t>& chosen) const;
  void grow_branches(Branch& whole, int threads);
};

// A leaf and what grows from it, by one thread that may start regions of several.
class Grower::State::Branch {
 public:
  // For up to so many rows.
  Branch(State& state, int64_t most_rows) : s(state) {
    const int64_t parts = (most_rows + kPart - 1) / kPart;
    for (Memory* m : {&left_memory, &right_memory})
      *m = Memory(size_t(most_rows + 16 * (parts + 1)) * 4);
  }

  std::vector<Leaf> leaves;
  std::vector<int> heap;

  void evaluate(int first, int count, int64_t* parent_histogram, int small);
  void split_next(int at);
  void push(int leaf);
  int pop();
  int pop_largest();

 private:
  bool before(int a, int b) const {
    return leaves[size_t(a)].split.gain > leaves[size_t(b)].split.gain;
  }
  int64_t divide(const Leaf& leaf);

  State& s;
  std::vector<FeatureSplit> found[2];
  Memory left_memory, right_memory;
};

Grower::Grower(const uint8_t* columns, int64_t step, int64_t rows,
               std::vector<FeatureBins> features)
    : state_(std::make_unique<State>()) {
  State& s = *state_;
  s.rows = rows, s.columns = columns, s.step = step, s.features = std::move(features);
  s.pack();
  s.partition_memory = Memory(size_t(rows + 16) * 4);
  s.partition = s.partition_memory.as<uint32_t>();
}
Grower::~Grower() = default;
bool Grower::has_missing(int feature) const {
  return state_->features[size_t(feature)].has_missing;
}
void Grower::set_has_missing(int feature, bool missing) {
  state_->features[size_t(feature)].has_missing = missing;
}
const uint32_t* Grower::partition() const { return state_->partition; }

// Rows of bytes, for histograms; and which features have missing values.
void Grower::State::pack() {
  const BinningKernels& k = binning_kernels();
  const int n = int(features.size());
  packed.rows = rows, packed.features = n;
  packed.groups = (n + PackedBins::kGroup - 1) / PackedBins::kGroup;
  const int in_group = (n + packed.groups - 1) / packed.groups;
  packed.width = int(round_up(in_group, 4));
  slots = packed.groups * packed.width;
  packed_memory = Memory(size_t(rows) * size_t(slots) + 64);
  packed.data = packed_memory.as<uint8_t>();
  slot.resize(size_t(n));
  for (int f = 0; f < n; f++) slot[size_t(f)] = f / in_group * packed.width + f % in_group;
  constexpr int64_t kBlock = 4096;
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  std::vector<std::atomic<bool>> missing(static_cast<size_t>(n));
  for_each_part(blocks, double(rows) * n * 0.5, [&](int64_t block) {
    const int64_t begin = block * kBlock, count = std::min(kBlock, rows - begin);
    for (int g = 0; g < packed.groups; g++) {
      const int first = g * in_group, some = std::min(in_group, n - first);
      uint8_t* to = const_cast<uint8_t*>(packed.group(g)) + begin * packed.width;
      if (some < packed.width)
        for (int64_t r = 0; r < count; r++)
          std::fill(to + r * packed.width + some, to + (r + 1) * packed.width, uint8_t(0));
      k.rows_of_bytes(columns + first * step + begin, step, count, some, to, packed.width);
    }
    for (int f = 0; f < n; f++) {
      const uint8_t *column = columns + f * step + begin, m = uint8_t(features[size_t(f)].missing);
      if (!missing[size_t(f)].load(std::memory_order_relaxed) &&
          std::find(column, column + count, m) != column + count)
        missing[size_t(f)].store(true, std::memory_order_relaxed);
    }
  });
  for (int f = 0; f < n; f++) features[size_t(f)].has_missing = missing[size_t(f)];
  // Tiles of equal size, within a group: few enough features for the caches, and, for several
  // threads, one a thread. No sum depends on it.
  constexpr int kTile = 24;
  const int quads = packed.width / 4, least = (packed.width + kTile - 1) / kTile;
  cut(least, large_tiles);
  cut(std::clamp((max_threads() + packed.groups - 1) / packed.groups, least, quads), tiles);
}

void Grower::State::cut(int parts, std::vector<Tile>& out) const {
  const int quads = packed.width / 4;
  for (int g = 0; g < packed.groups; g++)
    for (int p = 0; p < parts; p++)
      out.push_back({g * packed.width + quads * p / parts * 4,
                     g * packed.width + quads * (p + 1) / parts * 4});
}

// Whether a unit is too coarse for these numbers and those of all other processes.
bool Grower::State::coarse(const float* x, const Coarse& unit) {
  constexpr int64_t kBlock = 1 << 15;
  std::atomic<int64_t> all[3] = {};
  for_each_part((rows + kBlock - 1) / kBlock, double(rows) * 0.1, [&](int64_t b) {
    int64_t counts[3];
    const int64_t begin = b * kBlock;
    histogram_kernels().count_below(x + begin, std::min(kBlock, rows - begin), unit.limits, counts);
    for (int i = 0; i < 3; i++) all[i].fetch_add(counts[i], std::memory_order_relaxed);
  });
  int64_t counts[3] = {all[0], all[1], all[2]};
  if (hooks->distributed()) hooks->reduce(counts, 3);
  return Coarse::of(counts, settings.all_rows, settings.rules.min_samples);
}

// The format with the fewest words that loses nothing that matters.
SumFormat Grower::State::choose_format(const float* gradient, const float* hessian) {
  const int beside_count = std::min(30, 62 - 2 * bits_of(settings.all_rows));
  if (settings.constant_hessian && beside_count >= 23) {  // a float32 has 24 bits
    const SumFormat one = format_of(1, settings);
    if (!coarse(gradient, {one.gradient_unit, std::min(20, beside_count - 7)})) return one;
  }
  // Sums of hessians only divide, and their errors are as often up as down.
  constexpr double kOfHessians = 1.0 / 16;
  const SumFormat two = format_of(2, settings);
  if (!coarse(gradient, {two.gradient_unit, 20}) &&
      (!hessian || !coarse(hessian, {two.hessian_unit * kOfHessians, 16})))
    return two;
  return format_of(4, settings);
}

void Grower::State::add_tile(const Tile& tile, int64_t begin, int64_t end, int64_t* sums) const {
  const int words = format.words;
  sums += int64_t(tile.begin) * HistogramKernels::kEntries * words;
  std::fill(sums, sums + int64_t(tile.end - tile.begin) * HistogramKernels::kEntries * words,
            int64_t(0));
  HistogramKernels::Rows r;
  const int g = tile.begin / packed.width;
  r.bins = packed.group(g) + tile.begin % packed.width;
  r.width = packed.width, r.features = tile.end - tile.begin;
  r.integers = integers.as<int32_t>();
  const bool all = end - begin == rows;
  r.index = all ? nullptr : partition + begin;
  r.first = 0, r.count = end - begin;
  r.sums = sums;
  histogram_kernels().add(format, r);
}

// Which features a node may be split by.
void Grower::State::choose(const Leaf& leaf, std::vector<uint8_t>& chosen) const {
  const int n = leaf.allowed ? int(leaf.allowed->size()) : int(features.size());
  std::vector<uint8_t> mask(size_t(n), 1);
  if (hooks->subsamples()) hooks->subsample(n, mask.data());
  chosen.assign(features.size(), 0);
  for (int i = 0; i < n; i++)
    chosen[leaf.allowed ? (*leaf.allowed)[size_t(i)] : size_t(i)] = mask[size_t(i)];
}

// The best splits of one node (the root) or of two children, of which `small` has fewer rows: its
// histogram is made from them, the other's from what is left of the parent's.
void Grower::State::Branch::evaluate(int first, int count, int64_t* parent_histogram, int small) {
  const HistogramKernels& k = histogram_kernels();
  Leaf* children[2] = {&leaves[size_t(first)], count > 1 ? &leaves[size_t(first) + 1] : nullptr};
  Leaf& few = *children[small];
  const int large = 1 - small;
  int64_t* few_histogram = s.histograms.take();
  few.histogram = few_histogram;
  if (count > 1) children[large]->histogram = parent_histogram;
  std::vector<uint8_t> chosen[2];
  const double add_cost = double(few.end - few.begin) * s.slots * 1.0;
  const double scan_cost = double(s.features.size()) * count * 400;
  const bool is_root = count == 1;
  auto make = [&](const Tile& tile) { s.add_tile(tile, few.begin, few.end, few_histogram); };
  if (s.hooks->distributed() || is_root) {
    const std::vector<Tile>& tiles = s.tiles_of(add_cost);
    for_each_part(int64_t(tiles.size()), add_cost, [&](int64_t t) { make(tiles[size_t(t)]); });
    if (s.hooks->distributed())
      s.hooks->reduce(few_histogram,
                      int64_t(s.slots) * HistogramKernels::kEntries * s.format.words);
  }
  if (is_root) {
    // Any feature's histogram sums up to the node.
    const int f = few.allowed ? int((*few.allowed)[0]) : 0;
    const int64_t* sums = s.sums_of(few_histogram, f);
    k.total(s.format, sums, few.node.gradient, few.node.hessian);
    if (s.settings.constant_hessian) few.node.hessian = double(few.node.count);
    if (few.node.count < 2 * s.settings.rules.min_samples ||
        few.node.hessian < s.settings.rules.min_hessian) {
      few.leaf = true;
      s.histograms.give(few);
      return;
    }
  }
  for (int c = 0; c < count; c++)
    if (!children[c]->leaf) s.choose(*children[c], chosen[c]), found[c].resize(s.features.size());
  const bool made = s.hooks->distributed() || is_root;
  const int in_group =
      int((s.features.size() + size_t(s.packed.groups) - 1) / size_t(s.packed.groups));
  const double cost = (made ? 0 : add_cost) + scan_cost;
  const std::vector<Tile>& tiles = s.tiles_of(cost);
  for_each_part(int64_t(tiles.size()), cost, [&](int64_t t) {
    const Tile& tile = tiles[size_t(t)];
    if (!made) make(tile);
    const int g = tile.begin / s.packed.width;
    double enough[2] = {-kInfinite, -kInfinite};  // what a feature of this tile gains
    for (int at = tile.begin; at < tile.end; at++) {
      const int in = at % s.packed.width, f = g * in_group + in;
      if (in >= in_group || f >= int(s.features.size())) continue;
      const FeatureBins& feature = s.features[size_t(f)];
      const int64_t* sums[2] = {};
      sums[small] = s.sums_of(few_histogram, f);
      if (count > 1 && !children[large]->leaf) {
        int64_t* rest = s.sums_of(parent_histogram, f);
        k.subtract(s.format, feature, rest, sums[small]);
        sums[large] = rest;
      }
      for (int c = 0; c < count; c++)
        if (!children[c]->leaf && chosen[c][size_t(f)]) {
          FeatureSplit& best = found[c][size_t(f)];
          k.split(s.format, s.settings.rules, children[c]->node, feature, sums[c], enough[c], best);
          enough[c] = std::max(enough[c], best.gain);
        }
    }
  });
  for (int c = 0; c < count; c++) {
    Leaf& child = *children[c];
    if (child.leaf) {
      s.histograms.give(child);
      continue;
    }
    child.evaluated = true;
    const int n = child.allowed ? int(child.allowed->size()) : int(s.features.size());
    for (int i = 0; i < n; i++) {
      const int f = child.allowed ? int((*child.allowed)[size_t(i)]) : i;
      if (chosen[c][size_t(f)] && found[c][size_t(f)].gain > child.split.gain)
        child.split = found[c][size_t(f)], child.feature = f;
    }
    if (child.split.gain <= 0) {
      child.leaf = true;
      s.histograms.give(child);
    } else {
      push(first + c);
    }
  }
}

// Rows of a leaf, divided between its children: first those on the left. Returns how many.
int64_t Grower::State::Branch::divide(const Leaf& leaf) {
  const HistogramKernels& k = histogram_kernels();
  const FeatureBins& feature = s.features[size_t(leaf.feature)];
  uint32_t set[8] = {};
  if (feature.categorical) {
    std::copy_n(leaf.split.left, 8, set);
  } else {
    for (int b = 0; b <= leaf.split.bin; b++) set[b / 32] |= 1u << b % 32;
    // The missing ones may lie in reach of the last bin.
    set[feature.missing / 32] &= ~(1u << feature.missing % 32);
    if (leaf.split.missing_left) set[feature.missing / 32] |= 1u << feature.missing % 32;
  }
  const uint8_t* column = s.columns + leaf.feature * s.step;
  const int64_t n = leaf.end - leaf.begin, parts = (n + kPart - 1) / kPart;
  uint32_t* rows_of_leaf = s.partition + leaf.begin;
  const bool all = n == s.rows;
  uint32_t *left = left_memory.as<uint32_t>(), *right = right_memory.as<uint32_t>();
  std::vector<int64_t> counts(size_t(parts), 0);
  for_each_part(parts, double(n) * 1.0, [&](int64_t p) {
    const int64_t begin = p * kPart, count = std::min(kPart, n - begin), at = begin + 16 * p;
    counts[size_t(p)] = k.part(column, set, all ? nullptr : rows_of_leaf + begin, uint32_t(begin),
                               count, left + at, right + at);
  });
  int64_t on_left = 0;
  for (const int64_t c : counts) on_left += c;
  std::vector<int64_t> left_at(size_t(parts), 0), right_at(size_t(parts), on_left);
  for (int64_t p = 1; p < parts; p++) {
    left_at[size_t(p)] = left_at[size_t(p) - 1] + counts[size_t(p) - 1];
    right_at[size_t(p)] = right_at[size_t(p) - 1] + kPart - counts[size_t(p) - 1];
  }
  for_each_part(parts, double(n) * 0.5, [&](int64_t p) {
    const int64_t begin = p * kPart, count = std::min(kPart, n - begin), at = begin + 16 * p;
    std::copy_n(left + at, counts[size_t(p)], rows_of_leaf + left_at[size_t(p)]);
    std::copy_n(right + at, count - counts[size_t(p)], rows_of_leaf + right_at[size_t(p)]);
  });
  return on_left;
}

// Python's heapq, to the order of what is equal: which of two equal gains is split first decides
// where leaves are counted.
void Grower::State::Branch::push(int leaf) {
  heap.push_back(leaf);
  if (s.any_order) return;
  size_t at = heap.size() - 1;
  while (at > 0) {
    const size_t parent = (at - 1) / 2;
    if (!before(leaf, heap[parent])) break;
    heap[at] = heap[parent];
    at = parent;
  }
  heap[at] = leaf;
}
int Grower::State::Branch::pop() {
  const int last = heap.back();
  heap.pop_back();
  if (heap.empty() || s.any_order) return last;
  const int top = heap[0];
  size_t at = 0, child = 1;
  while (child < heap.size()) {
    if (child + 1 < heap.size() && !before(heap[child], heap[child + 1])) child++;
    heap[at] = heap[child];
    at = child;
    child = 2 * at + 1;
  }
  heap[at] = last;
  while (at > 0) {
    const size_t parent = (at - 1) / 2;
    if (!before(last, heap[parent])) break;
    heap[at] = heap[parent];
    at = parent;
  }
  heap[at] = last;
  return top;
}

int Grower::State::Branch::pop_largest() {
  const auto rows_of = [&](int leaf) {
    return leaves[size_t(leaf)].end - leaves[size_t(leaf)].begin;
  };
  const auto largest = std::max_element(heap.begin(), heap.end(),
                                        [&](int a, int b) { return rows_of(a) < rows_of(b); });
  const int leaf = *largest;
  *largest = heap.back();
  heap.pop_back();
  return leaf;
}

void Grower::State::Branch::split_next(int at) {
  const int64_t on_left = divide(leaves[size_t(at)]);
  const int first = int(leaves.size());
  leaves.resize(leaves.size() + 2);
  Leaf &leaf = leaves[size_t(at)], &left = leaves[size_t(first)],
       &right = leaves[size_t(first) + 1];
  const FeatureBins& feature = s.features[size_t(leaf.feature)];
  const SplitNode& node = leaf.node;
  const double l2 = s.settings.rules.l2;
  auto value = [&](double gradient, double hessian) {
    const double v = -gradient / (hessian + l2 + 1e-15);
    return v < node.lower ? node.lower : v > node.upper ? node.upper : v;
  };
  left.node = {leaf.split.count_left,
               leaf.split.gradient_left,
               leaf.split.hessian_left,
               value(leaf.split.gradient_left, leaf.split.hessian_left),
               -kInfinite,
               kInfinite};
  const double gradient = node.gradient - left.node.gradient;
  const double hessian = node.hessian - left.node.hessian;
  right.node = {node.count - left.node.count, gradient,   hessian,
                value(gradient, hessian),     -kInfinite, kInfinite};
  left.begin = leaf.begin, left.end = right.begin = leaf.begin + on_left, right.end = leaf.end;
  left.depth = right.depth = leaf.depth + 1;
  leaf.left = first, leaf.right = first + 1;
  if (s.hooks->interacts()) {
    auto allowed = std::make_shared<std::vector<uint32_t>>();
    left.interaction = right.interaction =
        s.hooks->interact(leaf.interaction, leaf.feature, *allowed);
    left.allowed = right.allowed = allowed;
  }
  // Where no value was missing, those at prediction go where most went.
  if (!feature.has_missing) leaf.split.missing_left = left.node.count > right.node.count;

  const int leaf_count = (int(leaves.size()) + 1) / 2;  // each split adds one
  if (s.settings.max_leaves && leaf_count == s.settings.max_leaves) {
    left.leaf = right.leaf = true;
    for (const int h : heap) {
      leaves[size_t(h)].leaf = true;
      s.histograms.give(leaves[size_t(h)]);
    }
    heap.clear();
    s.histograms.give(leaf);
    return;
  }
  if (s.settings.max_depth && left.depth == s.settings.max_depth) left.leaf = right.leaf = true;
  if (left.node.count < 2 * s.settings.rules.min_samples) left.leaf = true;
  if (right.node.count < 2 * s.settings.rules.min_samples) right.leaf = true;
  if (s.bounded) {
    double lower[2] = {node.lower, node.lower}, upper[2] = {node.upper, node.upper};
    if (feature.monotonic) {
      const double middle = (left.node.value + right.node.value) / 2;
      const int below = feature.monotonic > 0 ? 0 : 1;
      upper[below] = middle, lower[1 - below] = middle;
    }
    left.node.lower = lower[0], left.node.upper = upper[0];
    right.node.lower = lower[1], right.node.upper = upper[1];
  }
  if (left.leaf && right.leaf) {
    s.histograms.give(leaf);
    return;
  }
  int64_t* parent_histogram = std::exchange(leaf.histogram, nullptr);
  const int small = left.node.count < right.node.count ? 0 : 1;
  evaluate(first, 2, parent_histogram, small);
}

// Grows what is left of a tree, leaf by leaf on several threads: no node depends on another but on
// those above it.
void Grower::State::grow_branches(Branch& whole, int threads) {
  std::vector<int> seeds;
  while (!whole.heap.empty()) seeds.push_back(whole.pop_largest());
  int64_t most_rows = 0;
  for (const int seed : seeds)
    most_rows =
        std::max(most_rows, whole.leaves[size_t(seed)].end - whole.leaves[size_t(seed)].begin);
  std::vector<std::vector<Leaf>> grown(seeds.size());  // the seed, and what grew from it
  std::atomic<size_t> next{0};
  std::atomic<bool> out_of_memory{false};
  parallel(threads, [&](int, int) {
    try {
      Branch branch(*this, most_rows);
      for (size_t i; (i = next.fetch_add(1)) < seeds.size();) {
        branch.leaves.assign(1, whole.leaves[size_t(seeds[i])]);
        branch.heap.assign(1, 0);
        while (!branch.heap.empty()) branch.split_next(branch.pop());
        grown[i].swap(branch.leaves);
      }
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
  for (size_t i = 0; i < seeds.size(); i++) {
    const int offset = int(whole.leaves.size()) - 1;
    for (Leaf& leaf : grown[i])
      if (leaf.left >= 0) leaf.left += offset, leaf.right += offset;
    whole.leaves[size_t(seeds[i])] = std::move(grown[i][0]);
    for (size_t l = 1; l < grown[i].size(); l++) whole.leaves.push_back(std::move(grown[i][l]));
  }
}

// What the rows add to their bins, and memory for sums of it.
void Grower::State::make_integers(const float* gradient, const float* hessian) {
  format = choose_format(gradient, hessian);
  histograms.start(size_t(slots) * HistogramKernels::kEntries * 8 * size_t(format.words));
  const size_t needed = size_t(rows) * 4 * size_t(format.words);
  if (needed > integers_bytes) integers = Memory(needed), integers_bytes = needed;
  std::vector<float> ones;
  constexpr int64_t kBlock = 1 << 14;
  if (!hessian && format.words > 1) ones.assign(size_t(kBlock), 1.0f);
  for_each_part((rows + kBlock - 1) / kBlock, double(rows), [&](int64_t b) {
    const int64_t begin = b * kBlock, n = std::min(kBlock, rows - begin);
    histogram_kernels().integers(format, gradient + begin, hessian ? hessian + begin : ones.data(),
                                 n, integers.as<int32_t>() + begin * format.words);
  });
}

std::vector<GrownNode> Grower::grow(const float* gradient, const float* hessian,
                                    const GrowSettings& settings, GrowHooks& hooks) {
  State& s = *state_;
  s.settings = settings;
  s.hooks = &hooks;
  s.bounded = false;
  for (const FeatureBins& f : s.features) s.bounded |= f.monotonic != 0;
  // Then the last one found, whose histogram is still in the caches.
  s.any_order = !settings.max_leaves && !hooks.subsamples();
  State::Branch whole(s, s.rows);
  whole.leaves.resize(1);
  Leaf& root = whole.leaves[0];
  root.node = {settings.all_rows, 0, 0, 0, -kInfinite, kInfinite};
  root.end = s.rows;
  if (!settings.allowed.empty())
    root.allowed = std::make_shared<std::vector<uint32_t>>(settings.allowed);
  if (std::isfinite(settings.largest_gradient + settings.largest_hessian)) {
    s.make_integers(gradient, hessian);
    whole.evaluate(0, 1, nullptr, 0);
  } else {
    root.leaf = true;  // no split gains anything that is a number
  }
  if (whole.leaves[0].leaf)
    for (int64_t i = 0; i < s.rows; i++) s.partition[i] = uint32_t(i);
  // As soon as there are leaves enough for all threads, each takes one with all that grows from it.
  const int threads = s.any_order && !hooks.distributed() && !hooks.interacts() ? max_threads() : 1;
  while (!whole.heap.empty()) {
    if (threads > 1 && whole.heap.size() >= size_t(4 * threads)) {
      s.grow_branches(whole, threads);
      break;
    }
    whole.split_next(threads > 1 ? whole.pop_largest() : whole.pop());
  }

  // In the order of a walk.
  std::vector<GrownNode> tree;
  struct Visit {
    int leaf, parent;
    bool right;
  };
  std::vector<Visit> stack{{0, -1, false}};
  while (!stack.empty()) {
    const Visit v = stack.back();
    stack.pop_back();
    const Leaf& leaf = whole.leaves[size_t(v.leaf)];
    const int at = int(tree.size());
    if (v.parent >= 0) (v.right ? tree[size_t(v.parent)].right : tree[size_t(v.parent)].left) = at;
    GrownNode n{};
    n.value = leaf.leaf ? leaf.node.value * settings.shrinkage : leaf.node.value;
    n.gain = leaf.evaluated ? leaf.split.gain : -1;
    n.gradient = leaf.node.gradient, n.hessian = leaf.node.hessian;
    n.count = leaf.node.count;
    n.begin = leaf.begin, n.end = leaf.end;
    n.depth = leaf.depth;
    n.leaf = leaf.leaf;
    if (!leaf.leaf) {
      n.feature = leaf.feature, n.bin = leaf.split.bin;
      n.missing_left = leaf.split.missing_left;
      n.categorical = s.features[size_t(leaf.feature)].categorical;
      std::copy_n(leaf.split.left, 8, n.set);
      stack.push_back({leaf.right, at, true});
      stack.push_back({leaf.left, at, false});
    }
    tree.push_back(n);
  }
  return tree;
}

int Grower::words() const { return state_->format.words; }

void Grower::add_values(const std::vector<GrownNode>& tree, const double* values,
                        double* prediction) const {
  const State& s = *state_;
  for_each_part(int64_t(tree.size()), double(s.rows) * 2, [&](int64_t i) {
    const GrownNode& n = tree[size_t(i)];
    if (!n.leaf) return;
    for (int64_t r = n.begin; r < n.end; r++) prediction[s.partition[r]] += values[i];
  });
}

void loss_gradients(Loss loss, const LossRows& rows, int64_t n) {
  const HistogramKernels& k = histogram_kernels();
  const auto kernel = loss == Loss::squared_error ? k.squared_error : k.half_binomial;
  constexpr int64_t kBlock = 1 << 12;
  for_each_part(
      (n + kBlock - 1) / kBlock, double(n) * (loss == Loss::squared_error ? 0.5 : 2),
      [&](int64_t b) { kernel(rows.from(b * kBlock), std::min(kBlock, n - b * kBlock)); });
}

float largest_magnitude(const float* x, int64_t n) { return histogram_kernels().largest(x, n); }

}  // namespace fastnn
