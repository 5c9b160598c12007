// Forward and backward go over the positions alike: see positions.hpp. All that is added up over
// positions is added up afterwards, in their order.
#include "softmax/cross_entropy.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "common/kernels_of.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "softmax/positions.hpp"

namespace fastnn {
namespace {

const CrossEntropyKernels& kernels() { return FASTNN_KERNELS_OF(cross_entropy); }

constexpr int64_t kMostPositions = SoftmaxKernels::kMostColumns;  // of one call of a kernel

using Kernels = CrossEntropyKernels;

// A class's weight, and the sum of all.
struct Weights {
  const void* data;
  bool wide;
  double sum;
  explicit Weights(const CrossEntropy& call) : data(call.weight), wide(call.type == DType::f64) {
    sum = double(call.classes());
    if (!data) return;
    sum = 0;
    for (int64_t c = 0; c < call.classes(); c++) sum += at(c);
  }
  double at(int64_t c) const {
    if (!data) return 1;
    return wide ? static_cast<const double*>(data)[c] : double(static_cast<const float*>(data)[c]);
  }
};

class Losses {
 public:
  explicit Losses(const CrossEntropy& call)
      : call_(call),
        family_(kernels().family[int(call.type)]),
        weights_(call),
        item_(int64_t(dtype_size(call.type))),
        flat_(call.smoothing / double(call.classes())),
        hard_(1 - call.smoothing) {}

  // The losses of the block's positions, which are those from `first` on.
  void reduce(const Kernels::Block& block, bool columns, int64_t first, double* loss, double* lse,
              double* mass) const {
    Kernels::Sums sums[kMostPositions];
    const bool smooth = call_.smoothing > 0;
    (columns ? family_.columns : family_.rows)(block, smooth, sums);
    for (int64_t k = 0; k < block.positions; k++) {
      const Kernels::Sums& s = sums[k];
      const double log_sum = std::log(s.exps);
      const int64_t p = first + k;
      lse[p] = s.most + log_sum;
      double hard, weight;  // sum w t (lse - x), sum w t
      if (call_.index) {
        const int64_t c = call_.index[p];
        if (c == call_.ignore_index) {
          loss[p] = mass[p] = 0;
          continue;
        }
        const char* x =
            static_cast<const char*>(block.x) + (k * block.x_position + c * block.x_step) * item_;
        weight = weights_.at(c);
        hard = weight * (s.most - family_.read(x) + log_sum);
      } else {
        weight = s.p;
        hard = s.p_below;
      }
      loss[p] = hard_ * hard;
      mass[p] = hard_ * weight;
      if (!smooth) continue;
      loss[p] += flat_ * (s.below + weights_.sum * log_sum);
      mass[p] += flat_ * weights_.sum;
    }
  }

  void gradient(const Kernels::Block& block, bool columns, int64_t first, const double* lse,
                const double* mass, const double* scale, void* out, int64_t out_step,
                int64_t out_position) const {
    Kernels::Factors factors[kMostPositions];
    for (int64_t k = 0; k < block.positions; k++) {
      const int64_t p = first + k;
      const bool ignored = call_.index && call_.index[p] == call_.ignore_index;
      const double r = ignored ? 0 : scale[p];
      factors[k] = {lse[p], r * mass[p], r * flat_, r * hard_,
                    ignored || !call_.index ? -1 : call_.index[p]};
    }
    (columns ? family_.gradient_columns : family_.gradient_rows)(block, factors, out, out_step,
                                                                 out_position);
  }

 private:
  const CrossEntropy& call_;
  const Kernels::Family& family_;
  const Weights weights_;
  const int64_t item_;
  const double flat_, hard_;
};

int threads_for(const CrossEntropy& call, double elements) {
  const double cost = call.type == DType::f64 ? 3000 : 1000;  // picoseconds an element
  constexpr double kWorthAThread = 10e6;                      // 10 us: a region costs about 5
  return int(std::clamp<double>(elements * cost / kWorthAThread, 1, max_threads()));
}

// f(block, columns, first position, memory of the gradient's part) on all threads.
template <class F>
void for_each_block(const CrossEntropy& call, const double* per_position,
                    const SoftmaxOperand* grad_x, F f) {
  // An array of one number a position, in whose order all go: it tells which position is where.
  int64_t strides[kMaxSoftmaxDims], next = 1;
  for (int d = call.dims - 1; d >= 0; d--) {
    strides[d] = d == 1 ? 0 : next;
    if (d != 1) next *= call.shape[d];
  }
  const int64_t item = int64_t(dtype_size(call.type));
  SoftmaxOperand operands[Positions::kMost];
  int64_t items[Positions::kMost];
  int used = 0;
  auto add = [&](const SoftmaxOperand& operand, int64_t bytes) {
    operands[used] = operand;
    items[used++] = bytes;
  };
  add(call.x, item);
  const bool with_probabilities = call.probabilities.data != nullptr;
  if (with_probabilities) add(call.probabilities, item);
  const int number = used;
  add({const_cast<double*>(per_position), strides}, 8);
  const int inputs = used;
  if (grad_x) add(*grad_x, item);
  const SoftmaxCall shape{call.type, false, call.dims, call.shape, 1};
  const Positions all(shape, operands, items, used, number, grad_x ? used - 1 : 0, number);
  const int threads = threads_for(call, double(all.count) * double(all.n));
  const int64_t bytes = all.copies_bytes();
  char* memory = static_cast<char*>(scratch(Scratch::misc, size_t(bytes * threads)));
  parallel(threads, [&](int thread, int of) {
    const Range r = share_of(all.count, all.grain(), thread, of);
    all.for_each_block(
        r.begin, r.end, inputs, memory + thread * bytes, [&](const Positions::Block& b) {
          for (int64_t k = 0; k < b.count; k += kMostPositions) {
            auto at = [&](int o) { return b.data[o] + k * b.position[o] * items[o]; };
            Kernels::Block block;
            block.x = at(0), block.x_step = b.step[0], block.x_position = b.position[0];
            if (with_probabilities) {
              block.probabilities = at(1);
              block.p_step = b.step[1], block.p_position = b.position[1];
            }
            block.positions = std::min(kMostPositions, b.count - k);
            block.n = all.n, block.weight = call.weight;
            const int64_t first = reinterpret_cast<const double*>(at(number)) - per_position;
            if (grad_x)
              f(block, all.columns, first, at(used - 1), b.step[used - 1], b.position[used - 1]);
            else
              f(block, all.columns, first, nullptr, 0, 0);
          }
        });
  });
  scratch_trim();
}

}  // namespace

double check_targets(const CrossEntropy& call) {
  const int64_t positions = call.positions();
  if (!call.index) return double(positions);
  const Weights weights(call);
  double total = 0;
  for (int64_t p = 0; p < positions; p++) {
    const int64_t c = call.index[p];
    if (c == call.ignore_index) continue;
    if (c < 0 || c >= call.classes())
      throw std::out_of_range("Target " + std::to_string(c) + " is out of bounds.");
    total += weights.at(c);
  }
  return total;
}

void cross_entropy(const CrossEntropy& call, double* loss, double* lse, double* mass) {
  const Losses losses(call);
  for_each_block(call, loss, nullptr,
                 [&](const Kernels::Block& block, bool columns, int64_t first, char*, int64_t,
                     int64_t) { losses.reduce(block, columns, first, loss, lse, mass); });
}

double reduce_losses(const CrossEntropy& call, const double* loss, double total) {
  const int64_t positions = call.positions();
  double sum = 0;
  for (int64_t p = 0; p < positions; p++) sum += loss[p];
  return call.reduction == Reduction::mean ? sum / total : sum;
}

void cross_entropy_backward(const CrossEntropy& call, const double* lse, const double* mass,
                            const double* scale, SoftmaxOperand grad_x) {
  // Again, as torch does: the indices may have been written since, through memory of another's,
  // and a gradient is written at them.
  check_targets(call);
  const Losses losses(call);
  for_each_block(call, lse, &grad_x,
                 [&](const Kernels::Block& block, bool columns, int64_t first, char* out,
                     int64_t step, int64_t position) {
                   losses.gradient(block, columns, first, lse, mass, scale, out, step, position);
                 });
}

void cross_entropy_in_place(const CrossEntropy& call, double* loss, double* lse, double* mass,
                            const double* scale) {
  const Losses losses(call);
  const int64_t rows = call.shape[0], n = call.shape[1], row = call.x.strides[0];
  const int64_t item = int64_t(dtype_size(call.type));
  parallel(threads_for(call, double(rows) * double(n)), [&](int thread, int of) {
    const Range r = share_of(rows, 1, thread, of);
    for (int64_t p = r.begin; p < r.end; p++) {
      Kernels::Block block;
      char* x = static_cast<char*>(call.x.data) + p * row * item;
      block.x = x, block.x_step = 1, block.x_position = row;
      block.positions = 1, block.n = n, block.weight = call.weight;
      losses.reduce(block, false, p, loss, lse, mass);
      if (scale) losses.gradient(block, false, p, lse, mass, scale, x, 1, row);
    }
  });
}

}  // namespace fastnn
