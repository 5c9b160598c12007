#include <algorithm>
#include <cstring>

#include "tree/layout.hpp"

namespace fastnn {
namespace {

class RowLayout final : public Layout {
 public:
  RowLayout(const Presort& sorted, const TreeTarget& target, const ExactSettings& settings)
      : Layout(target, settings, sorted.rows, sorted.columns),
        sorted_(sorted),
        threads_(
            threads_worth(double(sorted.rows) * double(sorted.columns), 2000, settings.threads)),
        few_(sorted.few),
        work_(search_.work()) {
    constexpr int64_t kRoom = 16;
    const int64_t words = sorted_.rows / 64 + 1;
    memory_ = Memory(size_t(words + 2 * n_) * 8 + size_t(4 * n_ + 3 * kRoom + sorted_.rows) * 4);
    bits_ = memory_.as<uint64_t>();
    std::memset(bits_, 0, size_t(words) * 8);
    records_ = bits_ + words;
    keys_ = reinterpret_cast<uint32_t*>(records_ + 2 * n_);
    values_ = reinterpret_cast<float*>(keys_ + n_);
    spare_keys_ = reinterpret_cast<uint32_t*>(values_ + n_ + kRoom);
    node_ranks_ = spare_keys_ + n_ + kRoom;
    key_of_ = node_ranks_ + n_ + kRoom;
    int64_t kept = 0;
    for (int64_t r = 0; r < sorted_.rows; r++) {
      key_of_[r] = search_.key(uint32_t(r));
      if (t_.weight(r) != 0.0) keys_[kept++] = key_of_[r];
    }
  }

  void sum_up(double* sums) const override {
    search_.add_rows({}, {nullptr, keys_, n_, 0}, 0, n_, sums);
  }

  void enter(const GrowingNode& node, const double*, const int64_t*, int64_t) override {
    if (node.start >= compact_.start && node.end <= compact_.end) return;
    if (compact_.end) {
      compact_.start = compact_.end = 0;
      search_.as_given();
    }
    if (worth_compacting(node)) compact(node);
  }

  Candidate look(int64_t f, const GrowingNode& node, const double* sums, double enough,
                 Draws&) override {
    const NodeLimits limited = limits(f, node, enough);
    if (counted(f, limited, sums))
      return search_.few(codes_of(f), few_.values.data() + f * kMostFewValues, keys_ + node.start,
                         node.rows(), sums, limited, work_);
    Candidate c{};
    if (sorted_.missing[size_t(f)] || !search_.counts_buckets(node.rows(), sums, limited) ||
        !search_.in_buckets(node_sort(f, node), sums, limited, c))
      c = best_of_sorted(f, node, sums, limited);
    return c;
  }

  // Divides the node's rows on the way.
  void sides(const GrowingNode& node, const double* sums, const ChosenSplit& split, double* left,
             double* right) override {
    const int64_t f = split.feature;
    const Candidate& c = split.of;
    judged_ = keys_ + node.start;
    const TreeKernels& kernels = tree_kernels();
    if (counted(f, limits(f, node), sums))
      kernels.partition_codes(judged_, node.rows(), search_.shift(), codes_of(f), int(c.last),
                              spare_keys_);
    else
      kernels.partition_rows(judged_, node.rows(), search_.shift(), ranks_of(f, node.rows()),
                             uint32_t(c.last + 1), c.missing_left ? first_missing_rank(f) : kNoRank,
                             spare_keys_);
    const SortedSlice s{nullptr, judged_, node.rows(), 0};
    if (!search_.by_keys()) {
      search_.add_rows({}, s, 0, c.left, left);
      search_.add_rows({}, s, c.left, s.n, right);
      return;
    }
    // Whole weights: the difference is exact.
    const bool less = c.left * 2 <= s.n;
    double *summed = less ? left : right, *rest = less ? right : left;
    search_.add_rows({}, s, less ? 0 : c.left, less ? c.left : s.n, summed);
    for (int64_t i = 0; i < t_.sums(); i++) rest[i] = sums[i] - summed[i];
  }

  int64_t row(int64_t i) const override {
    const uint32_t number = judged_[i] >> search_.shift();
    return compact_.end ? compact_.rows[number] : number;
  }

  void divide(const GrowingNode&, const ChosenSplit&, const int64_t*, int64_t) override {}

 private:
  // The nodes below one of few rows are searched one after the other, and read its rows many times:
  // what is read is laid together, with the rows numbered anew.
  struct Compact {
    int64_t start = 0, end = 0;  // of the node; 0: none
    int64_t size = 0, room = 0;
    Memory memory;
    // By column, size (of codes: size + 3) each.
    uint32_t* ranks = nullptr;
    float* values = nullptr;
    uint8_t* codes = nullptr;
    std::vector<uint32_t> rows;
  };

  // Whether the column's few values are counted, and splits are of codes in place of ranks.
  bool counted(int64_t f, const NodeLimits& limited, const double* sums) const {
    return few_.counts[size_t(f)] && search_.counts_few(sums, limited);
  }

  bool worth_compacting(const GrowingNode& node) const {
    constexpr int64_t kMost = 1 << 18, kLeast = 64;
    const int64_t n = node.rows();
    if (few_.all || s_.max_leaf_nodes >= 0 || n < kLeast || n * columns_ > kMost) return false;
    if (n * 2 > sorted_.rows) return false;
    int64_t levels = 0;
    while (levels < s_.max_depth - node.depth && n >> levels > 1) levels++;
    return levels * s_.max_features * 2 >= columns_;
  }

  void compact(const GrowingNode& node) {
    constexpr int64_t kTogether = 16, kAhead = 8;
    if (!ranks_) ranks_ = &sorted_.ranks(threads_);
    const int64_t n = node.rows();
    const int shift = search_.shift();
    uint32_t* keys = keys_ + node.start;
    if (n > compact_.room) {
      compact_.room = n;
      compact_.memory = Memory(size_t(columns_) * size_t(n * 8 + n + 3));
      compact_.ranks = compact_.memory.as<uint32_t>();
    }
    compact_.size = n;
    compact_.values = reinterpret_cast<float*>(compact_.ranks + columns_ * n);
    compact_.codes = reinterpret_cast<uint8_t*>(compact_.values + columns_ * n);
    compact_.rows.resize(size_t(n));
    for (int64_t i = 0; i < n; i++) compact_.rows[size_t(i)] = keys[i] >> shift;
    const uint32_t* rows = compact_.rows.data();
    uint32_t* to_ranks = compact_.ranks;
    float* to_values = compact_.values;
    if (ranks_->by_row) {
      // A few rows at a time: so many cache lines are written in turn, one for each column.
      std::vector<Presort::Entry> block(size_t(kTogether * columns_));
      for (int64_t begin = 0; begin < n; begin += kTogether) {
        const int64_t count = std::min(n - begin, kTogether);
        for (int64_t i = 0; i < count; i++) {
          const auto* next = reinterpret_cast<const char*>(
              ranks_->by_row + rows[std::min(begin + i + kAhead, n - 1)] * columns_);
          for (int64_t b = 0; b < columns_ * 8; b += 64) __builtin_prefetch(next + b);
          std::copy_n(ranks_->by_row + rows[begin + i] * columns_, columns_, &block[i * columns_]);
        }
        for (int64_t f = 0; f < columns_; f++)
          for (int64_t i = 0; i < count; i++) {
            const Presort::Entry& entry = block[i * columns_ + f];
            to_ranks[f * n + begin + i] = entry.rank, to_values[f * n + begin + i] = entry.value;
          }
      }
    } else {
      for (int64_t f = 0; f < columns_; f++)
        for (int64_t i = 0; i < n; i++) {
          const uint32_t rank = ranks_->by_column[f * sorted_.rows + rows[i]];
          to_ranks[f * n + i] = rank;
          to_values[f * n + i] = sorted_.values[f * sorted_.rows + rank];
        }
    }
    for (int64_t f = 0; f < columns_; f++)
      if (few_.counts[size_t(f)])
        for (int64_t i = 0; i < n; i++)
          compact_.codes[f * (n + 3) + i] = few_.codes[size_t(f)][rows[i]];
    for (int64_t i = 0; i < n; i++) {
      const uint32_t low = keys[i] & ((1u << shift) - 1);
      key_of_[rows[i]] = keys[i] = uint32_t(i) << shift | low;
    }
    compact_.start = node.start, compact_.end = node.end;
    if (!search_.by_keys() || s_.monotonic) search_.renumber(rows, n);
  }

  const uint8_t* codes_of(int64_t f) const {
    return compact_.end ? compact_.codes + f * (compact_.size + 3) : few_.codes[size_t(f)];
  }

  Candidate best_of_sorted(int64_t f, const GrowingNode& node, const double* sums,
                           const NodeLimits& limited) {
    const NodeSort sort = node_sort(f, node);
    tree_kernels().sort_node(sort);
    SortedSlice s{values_, spare_keys_, node.rows(), 0};
    s.count_missing(sorted_.missing[size_t(f)]);
    Candidate c = search_.best(s, sums, limited, work_);
    const int64_t behind = c.left - (c.missing_left ? s.missing : 0);
    c.last = behind < s.n - s.missing
                 ? int64_t(sort.ranks.rank[(s.keys[behind] >> sort.shift) * sort.ranks.stride]) - 1
                 : int64_t(first_missing_rank(f)) - 1;
    return c;
  }

  NodeSort node_sort(int64_t f, const GrowingNode& node) {
    const int64_t column = f * sorted_.rows;
    return {ranks_of(f, node.rows()),
            sorted_.order + column,
            sorted_.values + column,
            sorted_.rows,
            key_of_,
            keys_ + node.start,
            node.rows(),
            search_.shift(),
            bits_,
            records_,
            values_,
            spare_keys_,
            node_ranks_};
  }

  // Few rows of many read a cache line each, which holds their other columns as well.
  ColumnRanks ranks_of(int64_t f, int64_t rows) {
    if (compact_.end)
      return {compact_.ranks + f * compact_.size, compact_.values + f * compact_.size, 1};
    if (!ranks_) ranks_ = &sorted_.ranks(threads_);
    if (ranks_->by_row && rows * kDenseShare < sorted_.rows)
      return {&ranks_->by_row[f].rank, &ranks_->by_row[f].value, 2 * columns_};
    return {ranks_->by_column + f * sorted_.rows, nullptr, 1};
  }

  uint32_t first_missing_rank(int64_t f) const {
    return uint32_t(sorted_.rows - sorted_.missing[size_t(f)]);
  }

  static constexpr uint32_t kNoRank = 0xffffffffu;

  const Presort& sorted_;
  const int threads_;
  const Presort::Few& few_;
  const Presort::Ranks* ranks_ = nullptr;  // once they are asked for
  Memory memory_;
  uint64_t *bits_ = nullptr, *records_ = nullptr;
  float* values_ = nullptr;
  uint32_t *keys_ = nullptr, *spare_keys_ = nullptr, *key_of_ = nullptr;
  uint32_t* node_ranks_ = nullptr;
  uint32_t* judged_ = nullptr;
  Compact compact_;
  SplitSearch::Work work_;
};

}  // namespace

std::unique_ptr<Layout> row_layout(const Presort& sorted, const TreeTarget& target,
                                   const ExactSettings& settings) {
  return std::make_unique<RowLayout>(sorted, target, settings);
}

}  // namespace fastnn
