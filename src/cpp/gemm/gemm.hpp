// C = activation(alpha * row_scale * col_scale * (A B) + bias + beta * residual), in batches.
//
// A is M x K, B is K x N, C is M x N, all with any strides (in elements). Sums are float32 for
// float32, bfloat16 and float16, float64 for float64, int32 for int8; C is rounded once.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cpu_features.hpp"
#include "common/dtype.hpp"

namespace fastnn {

enum class Precision : int { highest = 0, high = 1, medium = 2 };
enum class BiasAxis : int { none = 0, row = 1, column = 2 };
constexpr int kMaxBatchDims = 6;

struct Kernel;
class Prepared;     // gemm/prepared.hpp
struct Requantize;  // quant/requantize.hpp

// B, split and laid out as one kernel reads it. Valid for the kernel that made it only.
struct PackedOperand {
  int64_t k = 0, n = 0;
  DType dtype = DType::f32;
  Precision precision = Precision::highest;
  const Kernel* kernel = nullptr;
  Isa isa = Isa::portable;  // the active one when it was packed
  unsigned flags = 0;
  size_t bytes = 0;
  std::unique_ptr<char, void (*)(void*)> data{nullptr, nullptr};
};

struct Matrix {
  char* data = nullptr;
  DType type = DType::f32;
  int64_t rs = 0, cs = 0;  // strides of rows and columns
  int64_t batch[kMaxBatchDims] = {};
};

// Where pieces of a matrix's rows lie, if they do.
struct MatrixRows {
  const char* first = nullptr;
  int64_t step = 0, bytes = 0;
};

// A matrix B that lies nowhere as such: its panels are made where they are needed. The patches of
// an image that a convolution multiplies with are one.
class PanelSource {
 public:
  // Rows [k0, k0 + k) of segment `segment` and columns [j0, j0 + columns), as elements of B's type,
  // to dst[row * ld + column]; the columns up to `ld` as zeros.
  virtual void fill(void* dst, int64_t segment, int64_t k0, int64_t k, int64_t j0, int columns,
                    int ld) const = 0;
  // Where rows from k0 on of segment `segment` are copied from, of columns [j0, j0 + columns) or
  // the first of these, if each is a copy of what lies together.
  virtual MatrixRows rows(int64_t /*segment*/, int64_t /*k0*/, int64_t /*j0*/,
                          int64_t /*columns*/) const {
    return {};
  }

 protected:
  ~PanelSource() = default;
};

// Where the columns (or the rows) of C lie when they are not evenly apart: in pieces of `length`,
// of which each is found by `counts`, the last running fastest. Strides in elements.
struct Pieces {
  static constexpr int kDims = 3;
  int64_t length = 0;  // 0: one piece
  int64_t counts[kDims] = {1, 1, 1};
  int64_t c[kDims] = {}, residual[kDims] = {};

  // How far a piece is from the first one, in C and in the residual.
  void find(int64_t index, int64_t& in_c, int64_t& in_residual) const {
    in_c = in_residual = 0;
    for (int d = kDims - 1; d >= 0; d--) {
      in_c += index % counts[d] * c[d];
      in_residual += index % counts[d] * residual[d];
      index /= counts[d];
    }
  }
};

// A matrix A whose rows overlap, as the patches of a channels-last image do, so that it lies
// nowhere as such. Its rows come in lines, in each of which they are evenly apart; lines come in
// strips, each of which is copied by its user just before its use, or lies somewhere already.
class StripSource {
 public:
  int64_t lines = 0, line = 0;  // M = lines * line
  int64_t row_step = 0;         // elements from a row to the next of its line
  int64_t line_step = 0;        // and from a line to the next of its strip
  int64_t lines_together = 1;   // no strip crosses a multiple of it
  int64_t run = 0;              // so many elements of K lie together;
  std::vector<int64_t> runs;    // where each such piece lies, from its row's first element
  // The bytes of a strip of so many lines; 0 where it is not copied.
  virtual int64_t bytes(int64_t count) const = 0;
  // The first row of lines [first, first + count), perhaps in `memory`.
  virtual const char* fill(char* memory, int64_t first, int64_t count) const = 0;

 protected:
  ~StripSource() = default;
};

struct Gemm {
  int64_t m = 0, n = 0, k = 0;
  int batch_dims = 0;
  int64_t batch[kMaxBatchDims] = {};
  Matrix a, b, c, residual;  // residual.data may be null, or c.data
  double alpha = 1, beta = 0;
  const char* bias = nullptr;
  DType bias_type = DType::f32;
  BiasAxis bias_axis = BiasAxis::none;
  int64_t bias_stride = 1;
  int activation = 0;
  const float* row_scale = nullptr;
  const float* col_scale = nullptr;
  Precision precision = Precision::highest;
  const PackedOperand* packed = nullptr;
  bool batch_invariant = false;  // a row's bits do not depend on the number of rows

  // For products with a PanelSource alone, which gemm_panels computes.
  const PanelSource* b_panels = nullptr;
  int64_t segments = 1;   // K is so many pieces of k, each a sum of its own at first
  int64_t a_segment = 0;  // A's stride from one to the next
  Pieces columns;
  // Likewise, which gemm_strips computes; B is then a matrix, and C's rows lie in pieces of a line.
  const StripSource* a_strips = nullptr;
  Pieces rows;
  // Of 8-bit operands, in place of scales, bias and activation; the residual has 8 bits.
  const Requantize* requantize = nullptr;
  Prepared* prepared = nullptr;  // where B is kept as it was packed, as this part of it
  int64_t prepared_part = 0;
};

// An operand is only there as it was packed before, and is needed as it was.
struct OperandGone : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// Throws std::invalid_argument where the types do not go together, OperandGone, std::bad_alloc.
void gemm(const Gemm& g);

// The same with b_panels in place of B, without batches, on up to `threads` threads.
void gemm_panels(const Gemm& g, int threads);

// The same with a_strips in place of A, whose runs are multiples of strips_step: 0 where no kernel
// reads such an A. False as well where B is too large to be packed at once.
bool gemm_strips(const Gemm& g, int threads);
int64_t strips_step(DType type, Precision precision, bool batch_invariant);
// C = transposed(A) B with a_strips in place of A, whose lines are summed over: K = M of the
// strips. B's rows are those of the lines: `rows` says how far each line's first is from B's first,
// b.rs how far the next. False where there is no kernel for it.
bool gemm_strips_transposed(const Gemm& g, int threads);

std::unique_ptr<PackedOperand> pack_b(const Matrix& b, int64_t k, int64_t n, Precision precision);

std::string packed_path(const PackedOperand&);

// The kernel that runs this type and precision now, e.g. "avx512 f32 14x32".
std::string gemm_path(DType ab, Precision precision);

// Adds a call to those of `name`, a string that stays where it is.
void count_call(const char* name);

// Calls by path since the start, or the last reset.
std::map<std::string, int64_t> gemm_counters();
void reset_gemm_counters();

// out[j] = sum over i of x[i * rs + j * cs], added in blocks whose size does not depend on threads.
void column_sum(const void* x, int64_t m, int64_t n, int64_t rs, int64_t cs, DType type, void* out);

// Register-only loops: operations a second of one unit ("f32", "f64", "bf16", "int8").
double peak_flops(const std::string& kind, int threads, double seconds);

}  // namespace fastnn
