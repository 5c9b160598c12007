// Products of rows that lie evenly apart with a B that was packed before, each on the calling
// thread: what a kernel is made of that computes several products one after the other.
#pragma once
#include <vector>

#include "gemm/tiles.hpp"

namespace fastnn {

class Prepared;

class RowProduct {
 public:
  // B is k x n, packed by `threads` threads unless `prepared` has it already. A's rows may lie in
  // runs as a StripSource's do, where `takes_runs`.
  RowProduct(const Kernel& kernel, const Matrix& b, int64_t k, int64_t n, Prepared& prepared,
             int threads, const StripSource* strips = nullptr);
  static bool takes_runs(const Kernel& kernel, int64_t k) { return even_blocks(kernel, k) >= k; }

  int64_t panels() const { return b_.panels; }          // of B, that is, of C's columns,
  int64_t panel_columns() const { return kernel_.nr; }  // so many in each but perhaps the last
  int64_t panel_rows(int64_t m) const { return ceil_div(m, ceil_div(m, kernel_.mr)); }
  int64_t sums_bytes(int64_t m) const;  // of memory that `run` needs for m rows in one line

  // Rows of A, `row` elements apart, in lines as long that are `line` elements apart, in C
  // `c_line`.
  struct Rows {
    const char* a;
    int64_t row, count;
    int64_t lines = 1, line = 0, c_line = 0;
  };
  // Panels [q0, q1) of C = epilogue(A B). `to` is of all columns and these rows.
  void run(const Store& to, const Rows& rows, int64_t q0, int64_t q1, char* sums) const;

 private:
  const Kernel& kernel_;
  int64_t n_;
  Layout b_;
  const char* packed_;
  int64_t run_;                // elements of K that lie together,
  std::vector<int64_t> runs_;  // and where, in bytes from a row's first
};

}  // namespace fastnn
