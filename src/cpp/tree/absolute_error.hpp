// Absolute error: how far the targets of some rows lie from their weighted median, which is what
// minimises it. Of the rows of a node in some order, for all beginnings and all ends.
//
// Targets are summed up in Fenwick trees over their ranks in the node (P. Fenwick, A new data
// structure for cumulative frequency tables, 1994), as scikit-learn does, so that the same order
// of the rows gives the same bits: in small nodes many splits gain the same but for rounding.
#pragma once
#include <cstdint>
#include <vector>

#include "common/memory.hpp"
#include "tree/criteria.hpp"

namespace fastnn {

class AbsoluteErrors {
 public:
  AbsoluteErrors(const TreeTarget& target, int64_t rows);

  // Of one thread at a time.
  struct Work {
    uint32_t* rows;  // of the node, in an order that the caller writes
    // Errors of rows[0 ... i] and of rows[i ...], summed over the outputs, and of one output the
    // medians.
    double *first, *last, *first_median, *last_median;

   private:
    friend class AbsoluteErrors;
    struct Link {
      uint32_t before, after;
    };
    Memory memory;
    double* sums;
    Link* links;
    uint32_t* ranks;
  };
  Work work() const;

  // What follows is about these rows, a node's.
  void enter(const uint32_t* rows, int64_t n);
  // Of each output.
  const std::vector<double>& medians() const { return medians_; }
  // Of `count` of the node's rows, which are added by steps from the first. The median is of the
  // first output.
  struct Side {
    double weight, error, median;
  };
  Side side(const uint32_t* first, int64_t count, int64_t step, Work& w) const;
  // Of w.rows, which are all of the node; medians if asked for.
  void find_sides(Work& w, bool medians) const;
  // The same without medians, by far less work and with other roundings: w.first[i] + w.last[i + 1]
  // is less than margin() off. False where that cannot be had.
  bool estimate_sides(Work& w) const;
  double margin() const { return margin_; }

 private:
  // Targets of one output.
  struct Output {
    std::vector<uint32_t> row_at, place_of;  // of all rows, in ascending order of their targets
    std::vector<uint32_t> rank_of;           // by row, of the node's
    std::vector<double> values, weights;     // by rank
  };
  // A pass through the ranks of the node's rows.
  struct Pass {
    const Output& of;
    const uint32_t* first;
    int64_t step;
    uint32_t rank(int64_t i) const { return first[i * step]; }
  };

  template <class Call>
  bool for_passes(Work& w, const Call& call) const;
  Work::Link* link_all(Work& w) const;
  static uint32_t take(Work::Link* links, uint32_t rank);
  void put_in_order(Output& o, int64_t output, const uint32_t* rows);
  double whole_median(const Output& o) const;
  double magnitude(const Output& o) const;
  Side side(const Output& o, const uint32_t* first, int64_t count, int64_t step, Work& w) const;
  void estimate_unweighted(const Pass& pass, double* errors, Work& w) const;
  bool estimate_weighted(const Pass& pass, double* errors, Work& w) const;

  const TreeTarget& t_;
  const int64_t rows_;
  bool whole_ = true, negative_ = false;  // all weights, some weights
  std::vector<Output> outputs_;
  int64_t n_ = 0;     // rows of the node
  double total_ = 0;  // their weights, added in their order
  double magnitude_ = 0, margin_ = 0;
  std::vector<double> medians_;
  std::vector<uint32_t> places_;
  std::vector<uint64_t> marks_;  // a bit a place: all 0 but within put_in_order
  Work own_;
};

}  // namespace fastnn
