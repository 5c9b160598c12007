// The criteria of scikit-learn's trees, in its order of operations, so that the same sums give the
// same bits. Sources: Breiman et al., Classification and Regression Trees (1984); for Poisson, half
// the deviance of the mean.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace fastnn {

enum class TreeCriterion : int {
  gini = 0,
  entropy = 1,
  squared_error = 2,
  poisson = 3,
  absolute_error = 4
};

// What trees are grown on: outputs of each row, and the rows' weights.
struct TreeTarget {
  TreeCriterion criterion;
  int64_t outputs;
  const int64_t* classes;  // of each output; null in regression
  const double* y;         // rows x outputs: values, or codes 0, 1, ... of classes
  const double* weights;   // null: 1 each
  int64_t most_classes = 1;

  bool classification() const {
    return criterion == TreeCriterion::gini || criterion == TreeCriterion::entropy;
  }
  bool absolute() const { return criterion == TreeCriterion::absolute_error; }
  // Sums of one node or side: [0] weight, [1] weighted squares (regression), [2 ...] weights of
  // the classes of each output, or weighted sums of the outputs.
  int64_t sums() const { return 2 + outputs * most_classes; }
  double weight(int64_t row) const { return weights ? weights[row] : 1.0; }

  void add(double* s, int64_t row) const {
    const double w = weight(row);
    const double* of_row = y + row * outputs;
    if (classification()) {
      for (int64_t k = 0; k < outputs; k++) s[2 + k * most_classes + int64_t(of_row[k])] += w;
    } else {
      for (int64_t k = 0; k < outputs; k++) {
        const double wy = w * of_row[k];
        s[2 + k] += wy;
        s[1] += wy * of_row[k];
      }
    }
    s[0] += w;
  }
  void subtract(double* s, int64_t row) const {
    const double w = weight(row);
    const double* of_row = y + row * outputs;
    if (classification()) {
      for (int64_t k = 0; k < outputs; k++) s[2 + k * most_classes + int64_t(of_row[k])] -= w;
    } else {
      for (int64_t k = 0; k < outputs; k++) s[2 + k] -= w * of_row[k];
    }
    s[0] -= w;
  }
};

inline double log_base_2(double x) { return std::log(x) / std::log(2.0); }

// Impurity of gini, entropy and squared error from their sums. `s` may be a difference of sums.
inline double impurity_of(const TreeTarget& t, const double* s) {
  double sum = 0;
  switch (t.criterion) {
    case TreeCriterion::gini:
      for (int64_t k = 0; k < t.outputs; k++) {
        double squares = 0;
        const double* c = s + 2 + k * t.most_classes;
        for (int64_t i = 0; i < t.classes[k]; i++) squares += c[i] * c[i];
        sum += 1.0 - squares / (s[0] * s[0]);
      }
      return sum / double(t.outputs);
    case TreeCriterion::entropy:
      for (int64_t k = 0; k < t.outputs; k++) {
        const double* c = s + 2 + k * t.most_classes;
        for (int64_t i = 0; i < t.classes[k]; i++)
          if (c[i] > 0.0) {
            const double p = c[i] / s[0];
            sum -= p * log_base_2(p);
          }
      }
      return sum / double(t.outputs);
    default:
      sum = s[1] / s[0];
      for (int64_t k = 0; k < t.outputs; k++) {
        const double mean = s[2 + k] / s[0];
        sum -= mean * mean;
      }
      return sum / double(t.outputs);
  }
}

// Sums of y up to this count as zero.
constexpr double kPoissonZero = 10 * std::numeric_limits<double>::epsilon();

// What the split with the largest value of is taken: up to constants and factors the impurity's
// decrease. `right` = node - left.
inline double proxy_of(const TreeTarget& t, const double* left, const double* right) {
  if (t.criterion == TreeCriterion::squared_error) {
    double l = 0, r = 0;
    for (int64_t k = 0; k < t.outputs; k++)
      l += left[2 + k] * left[2 + k], r += right[2 + k] * right[2 + k];
    return l / left[0] + r / right[0];
  }
  if (t.criterion == TreeCriterion::poisson) {
    double l = 0, r = 0;
    for (int64_t k = 0; k < t.outputs; k++) {
      const double a = left[2 + k], b = right[2 + k];
      if (a <= kPoissonZero || b <= kPoissonZero) return -std::numeric_limits<double>::infinity();
      l -= a * log_base_2(a / left[0]), r -= b * log_base_2(b / right[0]);
    }
    return -l - r;
  }
  return -right[0] * impurity_of(t, right) - left[0] * impurity_of(t, left);
}

// Half the Poisson deviance of `count` rows with these sums.
template <class RowAt>
double poisson_loss(const TreeTarget& t, const double* s, int64_t count, RowAt row_at) {
  double loss = 0;
  for (int64_t k = 0; k < t.outputs; k++) {
    if (s[2 + k] <= kPoissonZero) return std::numeric_limits<double>::infinity();
    const double mean = s[2 + k] / s[0];
    for (int64_t i = 0; i < count; i++) {
      const int64_t row = row_at(i);
      const double y = t.y[row * t.outputs + k];
      if (y != 0) loss += t.weight(row) * (y * std::log(y / mean));
    }
  }
  return loss / (s[0] * double(t.outputs));
}

}  // namespace fastnn
