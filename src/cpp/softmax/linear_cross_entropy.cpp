// Rows go through in chunks: their logits, the losses and, in the place of the logits, the
// gradients by them, from which come those of x and of the weights (Hsu et al., Liger Kernel,
// arXiv:2410.10989). Chunks depend on the shape alone.
#include "softmax/linear_cross_entropy.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/cpu_features.hpp"
#include "common/integers.hpp"
#include "common/memory.hpp"
#include "common/parallel.hpp"

namespace fastnn {
namespace {

// Bytes of a chunk's logits: the more rows, the less often are the weight's gradients gone over. A
// product of fewer rows than kFewest goes slower.
constexpr int64_t kChunkBytes = 48 << 20, kFewest = 64;
// Of the part of the weight that a product goes over at once: packed, all of it would be as large
// as the logits.
constexpr int64_t kPartBytes = 8 << 20;

template <class T>
void add_to(void* sum, const char* more, int64_t n) {
  T* to = static_cast<T*>(sum);
  const T* from = reinterpret_cast<const T*>(more);
  parallel(n < 100'000 ? 1 : max_threads(), [&](int thread, int threads) {
    const Range r = share_of(n, 1024, thread, threads);
    for (int64_t i = r.begin; i < r.end; i++) to[i] += from[i];
  });
}

class Chunks {
 public:
  explicit Chunks(const LinearCrossEntropy& call)
      : call_(call),
        item_(int64_t(dtype_size(call.type))),
        sums_(call.type == DType::f64 ? DType::f64 : DType::f32),
        wide_(int64_t(dtype_size(sums_))) {
    const int64_t most = std::max(kFewest, kChunkBytes / (call.classes * item_));
    rows_ = ceil_div(call.rows, ceil_div(call.rows, most));
    part_ = std::clamp<int64_t>(kPartBytes / (call.features * wide_), 1, call.classes);
  }

  void run() const {
    const Memory memory(size_t(rows_ * call_.classes * item_));
    char* logits = memory.as<char>();
    std::vector<double> lse(size_t(call_.rows)), mass(size_t(call_.rows));
    for (int64_t first = 0; first < call_.rows; first += rows_) {
      const int64_t rows = std::min(rows_, call_.rows - first);
      find_logits(logits, first, rows);
      find_losses(logits, first, rows, lse.data(), mass.data());
      if (!call_.scale) continue;
      if (call_.grad_x) by_x(logits, first, rows);
      if (call_.grad_weight) by_weight(logits, first, rows);
      if (call_.grad_bias) by_bias(logits, first, rows);
    }
  }

 private:
  Matrix chunk(char* logits) const {
    Matrix m;
    m.data = logits, m.type = call_.type, m.rs = call_.classes, m.cs = 1;
    return m;
  }
  Matrix rows_of_x(int64_t first) const {
    Matrix m = call_.x;
    m.data += first * m.rs * item_;
    return m;
  }
  static Matrix transposed(Matrix m) {
    std::swap(m.rs, m.cs);
    return m;
  }
  void multiply(const Matrix& a, const Matrix& b, const Matrix& c, int64_t m, int64_t n, int64_t k,
                bool add, const char* bias = nullptr) const {
    Gemm g;
    g.m = m, g.n = n, g.k = k;
    g.a = a, g.b = b, g.c = c;
    if (add) g.residual = c, g.beta = 1;
    if (bias) {
      g.bias = bias, g.bias_stride = call_.bias_stride;
      g.bias_axis = BiasAxis::column, g.bias_type = call_.type;
    }
    g.precision = call_.precision, g.batch_invariant = call_.batch_invariant;
    gemm(g);
  }

  // f(first class, classes) for each part of the weight.
  template <class F>
  void for_each_part(F f) const {
    for (int64_t c = 0; c < call_.classes; c += part_) f(c, std::min(part_, call_.classes - c));
  }
  Matrix classes_of_weight(int64_t c) const {
    Matrix m = call_.weight;
    m.data += c * m.rs * item_;
    return m;
  }
  Matrix columns_of(char* logits, int64_t c) const { return chunk(logits + c * item_); }

  void find_logits(char* logits, int64_t first, int64_t rows) const {
    for_each_part([&](int64_t c, int64_t classes) {
      const char* bias = call_.bias ? call_.bias + c * call_.bias_stride * item_ : nullptr;
      multiply(rows_of_x(first), transposed(classes_of_weight(c)), columns_of(logits, c), rows,
               classes, call_.features, false, bias);
    });
  }

  void find_losses(char* logits, int64_t first, int64_t rows, double* lse, double* mass) const {
    const int64_t shape[] = {rows, call_.classes}, strides[] = {call_.classes, 1};
    CrossEntropy c;
    c.type = call_.type, c.dims = 2, c.shape = shape;
    c.x = {logits, strides};
    c.index = call_.index + first;
    c.weight = call_.class_weight;
    c.ignore_index = call_.ignore_index, c.smoothing = call_.smoothing;
    cross_entropy_in_place(c, call_.loss + first, lse + first, mass + first,
                           call_.scale ? call_.scale + first : nullptr);
  }

  // to (m x features) = or += a b, with k as the inner size.
  void add_product(const Matrix& a, const Matrix& b, void* to, int64_t m, int64_t k,
                   bool add) const {
    Matrix c;
    c.data = static_cast<char*>(to), c.type = sums_, c.rs = call_.features, c.cs = 1;
    // A product that is computed in parts (AMX) does not add to what it may have to begin anew.
    const Isa isa = active_isa();
    const bool apart = (isa == Isa::amx || isa == Isa::amx_emulated) && call_.type != DType::f64;
    if (!add || !apart) {
      multiply(a, b, c, m, call_.features, k, add);
      return;
    }
    const Memory product(size_t(m * call_.features * wide_));
    c.data = product.as<char>();
    multiply(a, b, c, m, call_.features, k, false);
    add_to<float>(to, product.as<char>(), m * call_.features);
  }

  void by_x(char* logits, int64_t first, int64_t rows) const {
    char* to = static_cast<char*>(call_.grad_x) + first * call_.features * wide_;
    for_each_part([&](int64_t c, int64_t classes) {
      add_product(columns_of(logits, c), classes_of_weight(c), to, rows, classes, c > 0);
    });
  }

  void by_weight(char* logits, int64_t first, int64_t rows) const {
    for_each_part([&](int64_t c, int64_t classes) {
      char* to = static_cast<char*>(call_.grad_weight) + c * call_.features * wide_;
      add_product(transposed(columns_of(logits, c)), rows_of_x(first), to, classes, rows,
                  first > 0);
    });
  }

  void by_bias(char* logits, int64_t first, int64_t rows) const {
    // A row of ones times the gradients, so that they are summed as all else is.
    std::vector<char> ones(size_t(rows * item_));
    for (int64_t i = 0; i < rows; i++) {
      const double f64 = 1;
      const float f32 = 1;
      const uint16_t half = call_.type == DType::bf16 ? 0x3f80 : 0x3c00;
      const void* one = call_.type == DType::f64   ? static_cast<const void*>(&f64)
                        : call_.type == DType::f32 ? static_cast<const void*>(&f32)
                                                   : &half;
      std::memcpy(ones.data() + i * item_, one, size_t(item_));
    }
    Matrix row, to;
    row.data = ones.data(), row.type = call_.type, row.rs = rows, row.cs = 1;
    to.data = static_cast<char*>(call_.grad_bias);
    to.type = sums_, to.rs = call_.classes, to.cs = 1;
    multiply(row, chunk(logits), to, 1, call_.classes, rows, first > 0);
  }

  const LinearCrossEntropy& call_;
  const int64_t item_;
  const DType sums_;
  const int64_t wide_;
  int64_t rows_, part_;
};

}  // namespace

void linear_cross_entropy(const LinearCrossEntropy& call) { Chunks(call).run(); }

}  // namespace fastnn
