#include "tree/binned.hpp"

#include <algorithm>
#include <atomic>
#include <limits>

#include "common/kernels_of.hpp"
#include "common/parallel.hpp"
#include "tree/kernels.hpp"

namespace fastnn {

const BinnedKernels& binned_kernels() { return FASTNN_KERNELS_OF(binned); }

namespace {

void find_range(const FloatMatrix& x, const BinnedColumns& binned, int64_t f, int64_t begin,
                int64_t end, BinnedColumns::Column& c) {
  const uint8_t* bins = binned.column(f);
  const float* values = x.data + f * x.column_stride;
  for (int64_t r = begin; r < end; r++) {
    const float v = values[r * x.row_stride];
    float &least = c.least[bins[r]], &largest = c.largest[bins[r]];
    // Soon there is nothing to write.
    if (v < least) least = v;
    if (v > largest) largest = v;
  }
}

}  // namespace

BinnedColumns::BinnedColumns(const FloatMatrix& x, const uint8_t* given, int64_t given_step,
                             int threads)
    : rows(x.rows), columns(x.columns), step(given_step), bins(given), of(size_t(x.columns)) {
  constexpr float kInfinite = std::numeric_limits<float>::infinity();
  for (Column& c : of) {
    std::fill_n(c.least, kBinSlots, kInfinite);
    std::fill_n(c.largest, kBinSlots, -kInfinite);
  }
  // A block of rows at a time, so that a cache line serves all the columns it holds.
  constexpr int64_t kBlock = 1024, kTogether = 16;
  const int64_t block = x.row_stride == 1 ? rows : kBlock;
  std::atomic<int64_t> next{0};
  threads =
      std::min<int>(threads_worth(double(rows) * double(columns), 1500, threads), int(columns));
  const int64_t together = std::min(kTogether, (columns + threads - 1) / threads);
  parallel(threads, [&](int, int) {
    for (int64_t first; (first = next.fetch_add(together)) < columns;) {
      const int64_t last = std::min(columns, first + together);
      for (int64_t begin = 0; begin < rows; begin += block)
        for (int64_t f = first; f < last; f++)
          find_range(x, *this, f, begin, std::min(rows, begin + block), of[size_t(f)]);
    }
  });
  for (int64_t f = 0; f < columns; f++) {
    Column& c = of[size_t(f)];
    // NaN compares to nothing: the bin of what is missing stays as it was.
    c.bins = kMissingBin;
    while (c.bins && c.least[c.bins - 1] > c.largest[c.bins - 1]) c.bins--;
    const uint8_t* column_bins = column(f);
    c.missing =
        std::find(column_bins, column_bins + rows, uint8_t(kMissingBin)) != column_bins + rows;
    c.close = false;
    float before = -kInfinite;
    for (int b = 0; b < c.bins; b++) {
      if (c.least[b] > c.largest[b]) continue;
      c.close |= !(c.largest[b] > before + kFeatureThreshold);
      before = c.largest[b];
    }
  }
}

}  // namespace fastnn
