#include "tree/binning.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "common/kernels_of.hpp"
#include "common/memory.hpp"
#include "common/parallel.hpp"

namespace fastnn {

const BinningKernels& binning_kernels() { return FASTNN_KERNELS_OF(binning); }

void make_bin_table(const double* edges, int count, bool categorical, int missing,
                    BinTable& table) {
  table.edges = edges;
  table.count = count;
  table.categorical = categorical;
  table.missing = uint8_t(missing);
  table.in_float64 = false;
  for (int i = 0; i < count; i++) table.in_float64 |= std::isnan(edges[i]);
  table.tree[0] = INFINITY;  // no node
  for (int level = 0; level < 8; level++)
    for (int j = 0; j < 1 << level; j++) {
      const int i = (2 * j + 1) * (128 >> level) - 1;
      table.tree[(1 << level) + j] = i < count ? float(edges[i]) : INFINITY;
    }
}

namespace {

constexpr int kRows = BinningKernels::kRows, kColumns = BinningKernels::kColumns;

int worth_threads(double nanoseconds) {
  return int(std::clamp<double>(nanoseconds / 20e3, 1, max_threads()));
}

// The distinct values of a column, while there are few.
class FewValues {
 public:
  explicit FewValues(int most) : most_(most) { std::fill_n(used_, kSlots, false); }
  // False once there are more than `most`.
  bool add(double value) {
    if (value == 0) value = 0;  // not -0
    uint64_t bits;
    std::memcpy(&bits, &value, 8);
    for (uint64_t slot = bits * 0x9e3779b97f4a7c15u >> 54;; slot = (slot + 1) % kSlots) {
      if (!used_[slot]) {
        if (count_ == most_) return false;
        used_[slot] = true;
        values_[slot] = value;
        list_[count_++] = value;
        return true;
      }
      if (values_[slot] == value) return true;
    }
  }
  double* list() { return list_; }
  int count() const { return count_; }

 private:
  static constexpr int kSlots = 1024;
  int most_, count_ = 0;
  bool used_[kSlots];
  double values_[kSlots], list_[kMostBins];
};

// Working memory of one thread.
struct Work {
  Memory memory, bins;
  double *sorted, *below[2], *others[2];
  explicit Work(int64_t n) : memory(size_t(n + 16) * 8 * 5), bins(size_t(n)) {
    sorted = memory.as<double>();
    for (int i = 0; i < 2; i++) {
      below[i] = sorted + (1 + 2 * i) * (n + 16);
      others[i] = sorted + (2 + 2 * i) * (n + 16);
    }
  }
};

double median_of(const double* v, int64_t n) {
  constexpr int kSome = 9;
  double some[kSome];
  for (int i = 0; i < kSome; i++) {
    const double x = v[(2 * i + 1) * n / (2 * kSome)];
    int at = i;
    for (; at > 0 && some[at - 1] > x; at--) some[at] = some[at - 1];
    some[at] = x;
  }
  return some[kSome / 2];
}

// The numbers of two neighbouring ranks; the second is `above` where it is beyond the last.
struct Neighbours {
  double first, second;
};
Neighbours select(const BinningKernels& k, const double* v, int64_t n, int64_t rank, double above,
                  Work& work) {
  constexpr int64_t kFew = 24;
  for (int round = 0; n > kFew; round++) {
    // Numbers come from one pair of buffers and go to the other.
    double *below = work.below[round % 2], *others = work.others[round % 2];
    if (round > 60) {  // pivots that divide badly, time after time
      std::copy_n(v, n, below);
      std::nth_element(below, below + rank, below + n);
      if (rank + 1 < n) above = *std::min_element(below + rank + 1, below + n);
      return {below[rank], above};
    }
    const double pivot = median_of(v, n);
    int64_t count = k.divide(v, n, pivot, below, others);
    if (count == 0) {  // nothing is smaller: those that are equal, and the others
      if (pivot == INFINITY) return {pivot, rank + 1 < n ? pivot : above};
      count = k.divide(v, n, std::nextafter(pivot, INFINITY), below, others);
      if (rank + 1 < count) return {pivot, pivot};
      if (rank + 1 == count)
        return {pivot, count < n ? *std::min_element(others, others + (n - count)) : above};
    }
    if (rank < count)
      v = below, n = count, above = pivot;  // the smallest of the others
    else
      v = others, n -= count, rank -= count;
  }
  double few[kFew];
  for (int64_t i = 0; i < n; i++) {
    int64_t at = i;
    for (; at > 0 && few[at - 1] > v[i]; at--) few[at] = few[at - 1];
    few[at] = v[i];
  }
  return {few[rank], rank + 1 < n ? few[rank + 1] : above};
}

// Numbers by their ranks, without sorting the others: they are shared out among bins first, and
// only what is in the same bin is compared. Destroys v.
class Ranks {
 public:
  Ranks(const BinningKernels& k, double* v, int64_t n, Work& work)
      : k_(k), n_(n), sorted_(v), work_(work) {
    constexpr int64_t kFew = 1024, kMost = 2048;
    if (n <= kFew) {
      std::sort(v, v + n);
      begin_[kMostBins] = -1;
      return;
    }
    double some[kMost], edges[kMostBins];
    const int64_t sample = std::clamp<int64_t>(n / 16, kFew / 2, kMost);
    for (int64_t i = 0; i < sample; i++) some[i] = v[i * n / sample];
    std::sort(some, some + sample);
    int count = 0;
    for (int i = 1; i < kMostBins; i++) {
      const double edge = some[i * sample / kMostBins];
      if (!count || edge > edges[count - 1]) edges[count++] = edge;
    }
    BinTable table;
    make_bin_table(edges, count, false, kMostBins - 1, table);
    uint8_t* bins = work.bins.as<uint8_t>();
    double* sorted = work.sorted;
    float floats[kRows];
    for (int64_t i = 0; i < n; i += kRows) {
      const int some_rows = int(std::min<int64_t>(kRows, n - i));
      k.floats({v + i, false, some_rows, 1, 1, some_rows}, 0, some_rows, 0, 1, floats);
      k.search(table, floats, v + i, false, 1, some_rows, bins + i);
    }
    // Four counts, so that equal bins in a row need not wait for each other.
    int64_t counts[4][kMostBins] = {}, next[kMostBins];
    for (int64_t i = 0; i < n; i++) counts[i % 4][bins[i]]++;
    begin_[0] = 0;
    for (int b = 0; b < kMostBins; b++)
      begin_[b + 1] = begin_[b] + counts[0][b] + counts[1][b] + counts[2][b] + counts[3][b];
    std::copy_n(begin_, kMostBins, next);
    for (int64_t i = 0; i < n; i++) sorted[next[bins[i]]++] = v[i];
    sorted_ = sorted;
  }

  // Of this rank and of the next one, which is the same beyond the last. Ranks must not fall from
  // call to call.
  Neighbours at(int64_t rank) {
    if (begin_[kMostBins] < 0) return {sorted_[rank], sorted_[std::min(rank + 1, n_ - 1)]};
    while (rank >= begin_[bin_ + 1]) bin_++;
    const int64_t begin = begin_[bin_], end = begin_[bin_ + 1];
    double above = NAN;
    if (rank + 1 == end) {
      int next = bin_ + 1;
      while (next < kMostBins && begin_[next + 1] == end) next++;
      if (next < kMostBins)
        above = *std::min_element(sorted_ + begin_[next], sorted_ + begin_[next + 1]);
    }
    const Neighbours found = select(k_, sorted_ + begin, end - begin, rank - begin, above, work_);
    return rank + 1 < n_ ? found : Neighbours{found.first, found.first};
  }

 private:
  const BinningKernels& k_;
  int64_t n_, begin_[kMostBins + 1];
  double* sorted_;
  int bin_ = 0;
  Work& work_;
};

// Returns how many edges there are.
int edges_of_column(const BinningKernels& k, const BinEdgesCall& call, double* v, int64_t n,
                    double* edges, Work& work) {
  constexpr double kAlmostInfinite = 1e300;
  n = std::remove_if(v, v + n, [](double x) { return std::isnan(x); }) - v;
  FewValues few(call.max_bins);
  int64_t i = 0;
  while (i < n && few.add(v[i])) i++;
  int count = 0;
  if (i == n) {
    double* list = few.list();
    std::sort(list, list + few.count());
    for (int j = 0; j + 1 < few.count(); j++) edges[count++] = (list[j] + list[j + 1]) / 2;
  } else {
    count = call.max_bins - 1;
    Ranks ranks(k, v, n, work);
    for (int q = 0; q < count; q++) {
      const double virtual_rank = double(n) * call.quantiles[q] - 1;
      const double before = std::floor(virtual_rank);
      const double gamma = virtual_rank == before ? 0.5 : 1.0;
      const int64_t rank = std::clamp<int64_t>(int64_t(before), 0, n - 1);
      const auto [a, b] = ranks.at(rank);
      edges[q] = b - (b - a) * (1 - gamma);
    }
  }
  // Between infinities there is NaN: once, at the end.
  const int numbers =
      int(std::remove_if(edges, edges + count, [](double x) { return std::isnan(x); }) - edges);
  const bool nan = numbers < count;
  std::sort(edges, edges + numbers);
  count = int(std::unique(edges, edges + numbers) - edges);
  for (int j = 0; j < count; j++)
    if (edges[j] > kAlmostInfinite) edges[j] = kAlmostInfinite;
  if (nan) edges[count++] = NAN;
  return count;
}

template <class T>
void copy_columns(const BinEdgesCall& call, int64_t begin, int64_t end, const int64_t* columns,
                  int64_t count, double* out) {
  constexpr int64_t kAhead = 16;
  const BinValues& x = call.x;
  const T* data = static_cast<const T*>(x.data);
  for (int64_t i = begin; i < end; i++) {
    if (call.sample && i + kAhead < end) {
      const char* next = (const char*)(data + call.sample[i + kAhead] * x.row_step);
      if (x.column_step == 1)
        for (int64_t b = columns[0] * int64_t(sizeof(T));
             b <= columns[count - 1] * int64_t(sizeof(T)); b += 64)
          __builtin_prefetch(next + b);
    }
    const T* row = data + (call.sample ? call.sample[i] : i) * x.row_step;
    for (int64_t c = 0; c < count; c++) out[c * call.samples + i] = row[columns[c] * x.column_step];
  }
}

}  // namespace

void find_bin_edges(const BinEdgesCall& call) {
  const BinningKernels& k = binning_kernels();
  std::vector<int64_t> columns;
  for (int64_t c = 0; c < call.x.columns; c++) {
    call.counts[c] = 0;
    if (!call.skip || !call.skip[c]) columns.push_back(c);
  }
  // So many columns at a time that their copies take some 64 MB.
  const int64_t together =
      std::clamp<int64_t>((64 << 20) / 8 / std::max<int64_t>(call.samples, 1), 4, 64);
  const Memory memory(size_t(together * call.samples) * 8);
  double* copies = memory.as<double>();
  std::atomic<bool> out_of_memory{false};
  for (size_t first = 0; first < columns.size(); first += size_t(together)) {
    const int64_t count = std::min<int64_t>(together, int64_t(columns.size() - first));
    std::atomic<int64_t> next{0};
    parallel(worth_threads(double(count) * double(call.samples) * 5), [&](int thread, int threads) {
      const Range r = share_of(call.samples, 64, thread, threads);
      const auto copy = call.x.f32 ? copy_columns<float> : copy_columns<double>;
      copy(call, r.begin, r.end, columns.data() + first, count, copies);
      if (threads > 1) barrier();
      try {
        Work work(call.samples);
        for (int64_t c; (c = next.fetch_add(1)) < count;) {
          const int64_t column = columns[first + size_t(c)];
          call.counts[column] = edges_of_column(k, call, copies + c * call.samples, call.samples,
                                                call.edges + column * (call.max_bins - 1), work);
        }
      } catch (const std::bad_alloc&) {
        out_of_memory = true;
      }
    });
  }
  if (out_of_memory) throw std::bad_alloc();
}

void bin_columns(const BinValues& x, const BinTable* tables, uint8_t* out, int64_t out_step) {
  const BinningKernels& k = binning_kernels();
  const int64_t blocks = (x.rows + kRows - 1) / kRows;
  parallel(worth_threads(double(x.rows) * double(x.columns) * 1), [&](int thread, int threads) {
    const Range r = share_of(blocks, 1, thread, threads);
    alignas(64) float floats[kColumns * kRows];
    for (int64_t block = r.begin; block < r.end; block++) {
      const int64_t row = block * kRows;
      const int rows = int(std::min<int64_t>(kRows, x.rows - row));
      for (int64_t column = 0; column < x.columns; column += kColumns) {
        const int columns = int(std::min<int64_t>(kColumns, x.columns - column));
        k.floats(x, row, rows, column, columns, floats);
        for (int c = 0; c < columns; c++) {
          const int64_t at = row * x.row_step + (column + c) * x.column_step;
          k.search(tables[column + c], floats + c * kRows,
                   static_cast<const char*>(x.data) + at * (x.f32 ? 4 : 8), x.f32, x.row_step, rows,
                   out + (column + c) * out_step + row);
        }
      }
    }
  });
}

}  // namespace fastnn
