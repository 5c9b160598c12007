// A tree grown leaf by leaf on binned rows, as scikit-learn's TreeGrower grows it: the leaf with
// the largest gain is split next.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "tree/histogram.hpp"

namespace fastnn {

// What growing asks of others. Called on the thread that called grow, between its regions; what
// they throw passes through.
struct GrowHooks {
  virtual ~GrowHooks() = default;
  // Sums `count` integers of all processes, in place.
  virtual bool distributed() const { return false; }
  virtual void reduce(int64_t* sums, int64_t count) = 0;
  // Marks the features, of `count` allowed ones, that a node may be split by.
  virtual bool subsamples() const { return false; }
  virtual void subsample(int count, uint8_t* chosen) = 0;
  // The features that children may be split by, of a node with this state (0: the root); returns
  // their state.
  virtual bool interacts() const { return false; }
  virtual int interact(int state, int feature, std::vector<uint32_t>& allowed) = 0;
};

struct GrowSettings {
  int max_leaves = 0, max_depth = 0;  // 0: no limit
  SplitRules rules;
  double shrinkage = 1;
  int64_t all_rows;                          // of all processes
  double largest_gradient, largest_hessian;  // of all processes; NaN where one is not finite
  bool constant_hessian;                     // all are 1
  std::vector<uint32_t> allowed;             // features of the root; empty for all
};

// Nodes from the root on, each followed by its left branch and then its right one.
struct GrownNode {
  double value, gain, gradient, hessian;
  int64_t count;
  int64_t begin, end;  // its rows in the order of the partition
  int32_t feature, bin, left, right, depth;
  uint8_t leaf, missing_left, categorical, unused;
  uint32_t set[8];  // of categories: the bins that go left
};
static_assert(sizeof(GrownNode) == 112);  // as the dtype in Python says

class Grower {
 public:
  // `columns` holds the bins of features * rows, feature after feature `step` apart, with 3 bytes
  // to spare behind the last. It must outlive this. Throws std::bad_alloc.
  Grower(const uint8_t* columns, int64_t step, int64_t rows, std::vector<FeatureBins> features);
  ~Grower();
  Grower(const Grower&) = delete;
  Grower& operator=(const Grower&) = delete;

  // Features of which a row is missing; filled by the constructor, and until the first tree it may
  // be changed (what other processes have).
  bool has_missing(int feature) const;
  void set_has_missing(int feature, bool missing);

  // A tree on gradients, and on hessians unless they are all 1 (null): of one leaf of value 0 where
  // one is not finite. Throws std::bad_alloc, and
  // what the hooks throw.
  std::vector<GrownNode> grow(const float* gradient, const float* hessian,
                              const GrowSettings& settings, GrowHooks& hooks);
  // The rows in the order of the last tree's leaves.
  const uint32_t* partition() const;
  // Of the last tree: int64 that a bin's sums took.
  int words() const;
  // prediction[row] += the value, one a node, of the row's leaf in the last tree; of all rows.
  void add_values(const std::vector<GrownNode>& tree, const double* values,
                  double* prediction) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Gradients and hessians of n rows.
enum class Loss { squared_error, half_binomial };
void loss_gradients(Loss loss, const LossRows& rows, int64_t n);

// The largest magnitude of n numbers, NaN where one is not finite.
float largest_magnitude(const float* x, int64_t n);

}  // namespace fastnn
