// A node's rows, and histograms of them over the bins of the columns that are looked at.
//
// Where all columns are, the histograms of a large node are kept: its smaller child's are made from
// the rows, and what is left is the larger child's.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/parallel.hpp"
#include "tree/binned.hpp"
#include "tree/layout.hpp"

namespace fastnn {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

class BinLayout final : public Layout {
 public:
  BinLayout(const BinnedColumns& binned, const TreeTarget& target, const ExactSettings& settings)
      : Layout(target, settings, binned.rows, binned.columns),
        binned_(binned),
        kernels_(binned_kernels()),
        shift_(search_.shift()),
        candidates_(size_t(binned.columns)) {
    choose_way();
    for (const BinnedColumns::Column& c : binned_.of) some_close_ = some_close_ || c.close;
    keys_ = Memory(size_t(n_ + 1) * 4);
    spare_ = Memory(size_t(n_ + 16) * 4);
    search_.keys(binned_.rows, keys());
    threads_.resize(size_t(s_.threads));
    for (OfThread& t : threads_) {
      t.work = search_.work();
      t.sums.resize(size_t(words_));
    }
  }

  void sum_up(double* sums) const override {
    search_.add_rows({}, {nullptr, keys(), n_, 0}, 0, n_, sums);
  }

  void enter(const GrowingNode& node, const double* sums, const int64_t* features,
             int64_t count) override {
    enough_ = -1, left_known_ = false;
    take_kept(node);
    make_room(node.rows());
    if (way_ == Way::one_target && slot_ < 0) gather(node.start, node.end);
    const bool keep =
        count && words_ && slot_ < 0 && node.rows() >= kLarge && columns_ * words_ <= kMostKept;
    if (keep) {
      slot_ = take_slot();
      for_features(node.rows() * count, features, count,
                   [&](int64_t f, int) { add_up(f, node.start, node.end, of_slot(slot_, f)); });
    }
    if (way_ == Way::one_target && count && slot_ >= 0) sum_of_node(features, count);
    entered_ = count && (slot_ >= 0 || worth(node.rows() * count) > 1);
    if (entered_)
      for_features(slot_ >= 0 ? kBinSlots * count : node.rows() * count, features, count,
                   [&](int64_t f, int thread) {
                     candidates_[size_t(f)] = find(f, node, sums, threads_[size_t(thread)], -1);
                   });
  }

  Candidate look(int64_t f, const GrowingNode& node, const double* sums, double enough,
                 Draws&) override {
    if (entered_) return candidates_[size_t(f)];
    OfThread& t = threads_[0];
    const Candidate c = find(f, node, sums, t, enough_);
    if (!c.left || !(c.proxy > enough)) return c;
    enough_ = std::max(enough_, t.decrease);
    left_known_ = by_classes() && !sorts(f, node.rows());
    if (left_known_) {
      left_.assign(size_t(t_.sums()), 0.0);
      if (way_ == Way::two_classes)
        read_two_classes(t.left, left_.data());
      else
        sum_left(t.sums.data(), c, left_.data());
    }
    return c;
  }

  void sides(const GrowingNode& node, const double* sums, const ChosenSplit& split, double* left,
             double* right) override {
    const Candidate& c = split.of;
    judged_ = keys() + node.start;
    if (!by_classes()) {
      partition(node, split);
      const SortedSlice s{nullptr, judged_, node.rows(), 0};
      search_.add_rows({}, s, 0, c.left, left);
      search_.add_rows({}, s, c.left, s.n, right);
      return;
    }
    if (left_known_) {
      std::copy(left_.begin(), left_.end(), left);
    } else if (slot_ >= 0 && !sorts(split.feature, node.rows())) {
      sum_left(of_slot(slot_, split.feature), c, left);
    } else {
      partition(node, split);
      search_.add_rows({}, {nullptr, judged_, node.rows(), 0}, 0, c.left, left);
    }
    for (int64_t i = 0; i < t_.sums(); i++) right[i] = sums[i] - left[i];
  }

  int64_t row(int64_t i) const override { return judged_[i] >> shift_; }

  void divide(const GrowingNode& node, const ChosenSplit& split, const int64_t* features,
              int64_t count) override {
    if (by_classes()) partition(node, split);
    if (s_.max_leaf_nodes >= 0) forget();
    if (slot_ < 0 || node.start != start_ || node.end != end_) return;
    const int64_t middle = node.start + split.of.left;
    const bool left_small = middle - node.start < node.end - middle;
    const Range small = left_small ? Range{node.start, middle} : Range{middle, node.end};
    const Range large = left_small ? Range{middle, node.end} : Range{node.start, middle};
    if (large.end - large.start < kLarge) return;
    const int other = take_slot();
    if (way_ == Way::one_target) gather(small.start, small.end);
    for_features((small.end - small.start + kBinSlots) * count, features, count,
                 [&](int64_t f, int) {
                   if (binned_.of[size_t(f)].close) return;
                   add_up(f, small.start, small.end, of_slot(other, f));
                   kernels_.subtract(of_slot(slot_, f), of_slot(other, f), words_);
                 });
    const Kept of_small{small, other}, of_large{large, slot_};
    kept_.push_back(left_small ? of_large : of_small);
    kept_.push_back(left_small ? of_small : of_large);
    slot_ = -1;
  }

 private:
  // Nodes of so many rows keep their histograms for their children, while all of them together
  // are not too large.
  static constexpr int64_t kLarge = 1024, kMostKept = int64_t(1) << 20;

  enum class Way { two_classes, many_classes, one_target, general };
  struct Range {
    int64_t start, end;
  };
  struct Kept {
    Range of;
    int slot;
  };
  struct OfThread {
    SplitSearch::Work work;
    std::vector<uint64_t> sums;  // of a column
    std::vector<uint32_t> sorted;
    std::vector<float> values;
    uint64_t left;  // of the last border of two classes
    double decrease;
  };

  uint32_t* keys() const { return keys_.as<uint32_t>(); }
  bool by_classes() const { return way_ == Way::two_classes || way_ == Way::many_classes; }

  void choose_way() {
    way_ = Way::general, words_ = 0;
    if (s_.monotonic) return;
    constexpr int kTableBits = 12, kMostClasses = 64;
    const bool counts =
        search_.way() == SplitSearch::Way::two_classes ||
        (search_.way() == SplitSearch::Way::many_classes && search_.weights_in_keys());
    if (counts && shift_ <= kTableBits) {
      const int class_bits = search_.class_bits(), weight_bits = search_.weight_bits();
      if (t_.classes[0] == 2 && total_weight_ < double(int64_t(1) << kFieldBits)) {
        way_ = Way::two_classes, words_ = kBinSlots;
        word_of_.resize(size_t(1) << shift_);
        for (uint64_t low = 0; low < word_of_.size(); low++) {
          const uint64_t w = weight_bits ? low >> 1 : 1;
          word_of_[low] = 1 | w << kFieldBits | (low & 1 ? w << (2 * kFieldBits) : 0);
        }
      } else if (t_.most_classes <= kMostClasses) {
        way_ = Way::many_classes, words_ = kBinSlots * t_.most_classes;
        word_of_.resize(size_t(1) << (shift_ - class_bits));
        for (uint64_t w = 0; w < word_of_.size(); w++)
          word_of_[w] = uint64_t(1) << 32 | (weight_bits ? w : 1);
      }
    } else if (search_.way() == SplitSearch::Way::one_target && fix_targets()) {
      way_ = Way::one_target, words_ = 2 * kBinSlots;
    }
  }

  // Targets in fixed point, whose sums are whole numbers below 2^53. False where weights are not
  // whole, or targets out of range.
  bool fix_targets() {
    double most = 0;
    bool whole = total_weight_ < double(int64_t(1) << 31);
    for (int64_t r = 0; r < binned_.rows; r++) {
      const double w = t_.weight(r);
      whole = whole && w >= 0 && w == std::floor(w);
      most += w * std::fabs(t_.y[r]);
    }
    if (!whole || !(most < 1e250)) return false;
    int exponent = 0;
    std::frexp(std::max(most, 1e-250), &exponent);
    unit_ = std::ldexp(1.0, exponent - 52);
    const double in_units = std::ldexp(1.0, 52 - exponent);
    pair_of_.resize(size_t(binned_.rows));
    for (int64_t r = 0; r < binned_.rows; r++) {
      const auto w = int64_t(t_.weight(r));
      pair_of_[size_t(r)] = {w * std::llrint(t_.y[r] * in_units), int64_t(1) << 32 | w};
    }
    pairs_.resize(size_t(n_));
    return true;
  }

  // Targets of rows [start, end), in their order, and the sum.
  void gather(int64_t start, int64_t end) {
    sum_ = 0;
    for (int64_t i = start; i < end; i++) {
      const Pair& p = pair_of_[keys()[i] >> shift_];
      pairs_[size_t(i - start)] = p;
      sum_ += p.sum;
    }
  }
  // The same from the histogram of any column.
  void sum_of_node(const int64_t* features, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
      if (binned_.of[size_t(features[i])].close) continue;
      const uint64_t* sums = of_slot(slot_, features[i]);
      sum_ = 0;
      for (int b = 0; b < kBinSlots; b++) sum_ += int64_t(sums[2 * b]);
      return;
    }
  }

  int worth(int64_t elements) const {
    return std::min<int>(threads_worth(double(elements), 800, s_.threads), int(columns_));
  }
  template <class Call>
  void for_features(int64_t elements, const int64_t* features, int64_t count, const Call& call) {
    const int threads = worth(elements);
    if (threads <= 1) {
      for (int64_t i = 0; i < count; i++) call(features[i], 0);
      return;
    }
    std::atomic<int64_t> next{0};
    parallel(threads, [&](int thread, int) {
      for (int64_t i; (i = next.fetch_add(1)) < count;) call(features[i], thread);
    });
  }

  BinnedRows rows_of(int64_t f, int64_t start, int64_t end) const {
    return {binned_.column(f), keys() + start, end - start, shift_};
  }

  // The histogram of a column; of one target, after `gather` of these rows.
  void add_up(int64_t f, int64_t start, int64_t end, uint64_t* sums) const {
    if (binned_.of[size_t(f)].close && way_ == Way::one_target) return;
    std::memset(sums, 0, size_t(words_) * 8);
    const BinnedRows rows = rows_of(f, start, end);
    if (way_ == Way::two_classes)
      kernels_.add_two_classes(rows, word_of_.data(), sums);
    else if (way_ == Way::many_classes)
      kernels_.add_many_classes(rows, search_.class_bits(), word_of_.data(), sums);
    else
      kernels_.add_pairs(rows, &pairs_[0].sum, reinterpret_cast<int64_t*>(sums));
  }

  // Few rows of many classes are sorted: a histogram is larger than they are.
  bool sorts(int64_t f, int64_t rows) const {
    return way_ == Way::general || binned_.of[size_t(f)].close ||
           (way_ == Way::many_classes && slot_ < 0 && rows < kBinSlots);
  }

  // For rows that are sorted: threads must not ask for memory.
  void make_room(int64_t rows) {
    if (!some_close_ &&
        (by_classes() ? way_ == Way::two_classes || rows >= kBinSlots : way_ == Way::one_target))
      return;
    constexpr size_t kRoom = 16;
    if (threads_[0].sorted.size() >= size_t(rows) + kRoom) return;
    for (OfThread& t : threads_) {
      t.values.resize(size_t(rows) + kRoom);
      t.sorted.resize(size_t(rows) + kRoom);
    }
  }

  Candidate find(int64_t f, const GrowingNode& node, const double* sums, OfThread& t,
                 double enough) const {
    if (sorts(f, node.rows())) return find_sorted(f, node, sums, t);
    const uint64_t* of = t.sums.data();
    if (slot_ >= 0)
      of = of_slot(slot_, f);
    else
      add_up(f, node.start, node.end, t.sums.data());
    const BinnedColumns::Column& column = binned_.of[size_t(f)];
    const BinScan scan{of,          column.bins,         column.missing,
                       node.rows(), s_.min_samples_leaf, s_.min_weight_leaf};
    BestBorder b;
    int64_t missing = 0;
    if (way_ == Way::two_classes) {
      const uint64_t all = uint64_t(node.rows()) | uint64_t(sums[0]) << kFieldBits |
                           uint64_t(sums[3]) << (2 * kFieldBits);
      b = kernels_.two_classes({scan, all, enough});
      t.left = b.word, t.decrease = b.decrease;
      missing = int64_t(of[kMissingBin] & ((uint64_t(1) << kFieldBits) - 1));
    } else if (way_ == Way::many_classes) {
      uint64_t all[64];
      for (int64_t c = 0; c < t_.most_classes; c++) {
        all[c] = uint64_t(sums[2 + c]);
        missing += int64_t(of[c * kBinSlots + kMissingBin] >> 32);
      }
      b = kernels_.many_classes({scan, int(t_.most_classes), all});
    } else {
      b = kernels_.one_target({scan, unit_, sum_, int64_t(sums[0])});
      missing = int64_t(of[2 * kMissingBin + 1] >> 32);
    }
    Candidate c{};
    c.proxy = b.proxy, c.missing = missing, c.constant = b.constant;
    if (b.bin < 0) return c;
    c.left = b.left, c.last = b.bin, c.missing_left = b.missing_left;
    c.told_missing_left = missing ? b.missing_left : b.left > node.rows() - b.left;
    int next = b.bin + 1;
    while (next < column.bins && !filled(of, next)) next++;
    c.threshold = border(column, b.bin, next);
    return c;
  }

  bool filled(const uint64_t* sums, int bin) const {
    if (way_ == Way::two_classes) return sums[bin] != 0;
    if (way_ == Way::one_target) return sums[2 * bin + 1] != 0;
    uint64_t any = 0;
    for (int64_t c = 0; c < t_.most_classes; c++) any |= sums[c * kBinSlots + bin];
    return any != 0;
  }

  // NaN <= infinity is false: all but NaN go left.
  static double border(const BinnedColumns::Column& column, int last, int next) {
    if (next >= column.bins) return kInfinity;
    return double(column.largest[last]) / 2.0 + double(column.least[next]) / 2.0;
  }

  // As the exact search, of values that are their bins'.
  Candidate find_sorted(int64_t f, const GrowingNode& node, const double* sums, OfThread& t) const {
    const BinnedColumns::Column& column = binned_.of[size_t(f)];
    const uint8_t* bins = binned_.column(f);
    uint32_t counts[kBinSlots];
    kernels_.sort(rows_of(f, node.start, node.end), counts, t.sorted.data());
    SortedSlice s{t.values.data(), t.sorted.data(), node.rows(), 0};
    for (int64_t i = 0; i < s.n; i++) {
      const uint8_t bin = bins[s.keys[i] >> shift_];
      t.values[size_t(i)] =
          bin == kMissingBin ? std::numeric_limits<float>::quiet_NaN() : column.largest[bin];
    }
    if (column.missing) s.count_missing(s.n);
    Candidate c = search_.best(s, sums, limits(f, node), t.work);
    if (!c.left) return c;
    const int64_t j = c.left - (c.missing_left ? c.missing : 0);
    c.last = bins[s.keys[j - 1] >> shift_];
    c.threshold =
        border(column, int(c.last), j < s.n - s.missing ? bins[s.keys[j] >> shift_] : kBinSlots);
    return c;
  }

  void read_two_classes(uint64_t word, double* sums) const {
    const uint64_t field = (uint64_t(1) << kFieldBits) - 1;
    const double weight = double(word >> kFieldBits & field);
    const double ones = double(word >> (2 * kFieldBits));
    sums[0] = weight, sums[2] = weight - ones, sums[3] = ones;
  }

  // Of the classes on the left of a border.
  void sum_left(const uint64_t* of, const Candidate& c, double* sums) const {
    const auto sum = [&](const uint64_t* words) {
      uint64_t all = c.missing_left ? words[kMissingBin] : 0;
      for (int b = 0; b <= c.last; b++) all += words[b];
      return all;
    };
    if (way_ == Way::two_classes) return read_two_classes(sum(of), sums);
    for (int64_t k = 0; k < t_.most_classes; k++) {
      const double weight = double(sum(of + k * kBinSlots) & 0xffffffff);
      sums[2 + k] = weight, sums[0] += weight;
    }
  }

  void partition(const GrowingNode& node, const ChosenSplit& split) {
    kernels_.partition(rows_of(split.feature, node.start, node.end), uint32_t(split.of.last) + 1,
                       split.of.missing_left ? uint32_t(kMissingBin) : uint32_t(kBinSlots),
                       keys() + node.start, spare_.as<uint32_t>());
  }

  // The histograms that were kept for this node, which becomes the one at hand. Nodes come from
  // left to right: those before it were leaves.
  void take_kept(const GrowingNode& node) {
    if (slot_ >= 0) free_.push_back(slot_);
    slot_ = -1, start_ = node.start, end_ = node.end;
    while (!kept_.empty() && kept_.back().of.start < node.start) {
      free_.push_back(kept_.back().slot);
      kept_.pop_back();
    }
    if (kept_.empty() || kept_.back().of.start != node.start || kept_.back().of.end != node.end)
      return;
    slot_ = kept_.back().slot;
    kept_.pop_back();
  }
  void forget() {
    for (const Kept& k : kept_) free_.push_back(k.slot);
    kept_.clear();
  }
  int take_slot() {
    if (free_.empty()) {
      slots_.emplace_back(size_t(columns_ * words_) * 8);
      return int(slots_.size()) - 1;
    }
    const int slot = free_.back();
    free_.pop_back();
    return slot;
  }
  uint64_t* of_slot(int slot, int64_t f) const {
    return slots_[size_t(slot)].as<uint64_t>() + f * words_;
  }

  struct Pair {
    int64_t sum, rows_and_weight;
  };

  const BinnedColumns& binned_;
  const BinnedKernels& kernels_;
  const int shift_;
  Way way_;
  int64_t words_;  // of a column's histogram
  bool some_close_ = false;
  double unit_ = 1;
  std::vector<uint64_t> word_of_;
  std::vector<Pair> pair_of_, pairs_;  // by row; of the node at hand
  int64_t sum_ = 0;                    // of the node at hand
  Memory keys_, spare_;
  std::vector<OfThread> threads_;
  std::vector<Candidate> candidates_;
  bool entered_ = false;  // candidates_ are the node's
  double enough_ = 0;     // the decrease by the best split of the node yet
  bool left_known_ = false;
  std::vector<double> left_;
  uint32_t* judged_ = nullptr;
  // Histograms kept: of the node at hand, [start, end), and of nodes to come, the next one last.
  std::vector<Memory> slots_;
  std::vector<int> free_;
  std::vector<Kept> kept_;
  int slot_ = -1;
  int64_t start_ = 0, end_ = 0;
};

}  // namespace

std::unique_ptr<Layout> bin_layout(const BinnedColumns& binned, const TreeTarget& target,
                                   const ExactSettings& settings) {
  return std::make_unique<BinLayout>(binned, target, settings);
}

}  // namespace fastnn
