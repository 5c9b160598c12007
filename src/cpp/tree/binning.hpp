// Values to bins of one byte: the edges between them, and the search.
//
// A value x of a column with edges e[0] < e[1] < ... is in bin i where e[i-1] < x <= e[i]; a
// missing value (NaN; of a category, also a negative number) is in a bin of its own, the last.
#pragma once
#include <cstdint>

namespace fastnn {

constexpr int kMostBins = 256;  // with the one for missing values

// A matrix of float32 or float64. Steps count elements.
struct BinValues {
  const void* data;
  bool f32;
  int64_t rows, columns, row_step, column_step;
};

// One column's edges, ready to be searched.
struct BinTable {
  // The edges in float32 as an implicit search tree: node j of level k is tree[2^k + j]. A value
  // that equals one of them in float32 is compared again in float64.
  float tree[kMostBins];
  const double* edges;
  int count;
  uint8_t missing;
  bool categorical;
  bool in_float64;  // edges that no order of float32 stands for: NaN
};
void make_bin_table(const double* edges, int count, bool categorical, int missing, BinTable& table);

// Bins of all columns, each contiguous: out[column * out_step + row].
void bin_columns(const BinValues& x, const BinTable* tables, uint8_t* out, int64_t out_step);

// Edges as scikit-learn's _BinMapper finds them for values of equal weight: midpoints where a
// column has at most max_bins values, else quantiles by numpy's "averaged_inverted_cdf".
struct BinEdgesCall {
  BinValues x;
  const int64_t* sample;  // rows to look at, `samples` of them; all where null
  int64_t samples;
  const uint8_t* skip;      // columns that are left out; null for none
  int max_bins;             // without the one for missing values
  const double* quantiles;  // max_bins - 1, from 0 to 1
  double* edges;            // columns x (max_bins - 1)
  int32_t* counts;          // how many of them there are
};
// Throws std::bad_alloc.
void find_bin_edges(const BinEdgesCall& call);

// The kernels of one instruction set.
struct BinningKernels {
  static constexpr int kRows = 1024, kColumns = 16;
  // A block of values, column after column in float32: out[c * kRows + r].
  void (*floats)(const BinValues& x, int64_t row, int rows, int64_t column, int columns,
                 float* out);
  // Bins of n values of one column, in float32; `exact` holds them as they are, `step` apart.
  void (*search)(const BinTable& table, const float* x, const void* exact, bool f32, int64_t step,
                 int n, uint8_t* out);
  // Copies numbers below the pivot to one place and the others to another, in their order; both
  // have room for 8 more than there are. Returns how many were below.
  int64_t (*divide)(const double* values, int64_t n, double pivot, double* below, double* others);
  // Columns of bytes to rows of bytes: out[r * out_step + c] = columns[c * step + r].
  void (*rows_of_bytes)(const uint8_t* columns, int64_t step, int64_t rows, int count, uint8_t* out,
                        int64_t out_step);
};
const BinningKernels& portable_binning();
const BinningKernels& avx2_binning();
const BinningKernels& avx512_binning();
const BinningKernels& binning_kernels();  // of the active instruction set

}  // namespace fastnn
