// Rows of a table by number, and the sums of gradients that belong to each; rotary position
// embedding.
#pragma once
#include <cstdint>

#include "common/dtype.hpp"

namespace fastnn {

constexpr int kEmbeddingTypes = 4;  // DType f32, f64, bf16, f16

// Contiguous int32 or int64.
struct Indices {
  const void* data;
  bool wide;
  int64_t count;
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// out (count, columns), contiguous: row i is the table's row indices[i]. Strides count elements.
struct Gather {
  DType type;
  const void* table;
  int64_t rows, columns, row_stride, column_stride;
  Indices indices;
  void* out;
};
// False, with nothing read or written, where an index is not in [0, rows).
bool gather(const Gather& call);

// out (rows, columns), contiguous: row r is the sum of those rows i of grad whose index is r, in
// the order of i; zero for the row `padding`, unless that is negative. With `by_frequency` it is
// their mean. grad has neighbouring columns. At most 2^32 - 1 rows and indices.
struct ScatterAdd {
  DType type;
  const void* grad;
  int64_t grad_stride;
  Indices indices;
  int64_t rows, columns, padding;
  bool by_frequency;
  void* out;
};
bool scatter_add(const ScatterAdd& call);

// Rotary position embedding (Su et al., arXiv:2104.09864): pairs of elements of x's last dimension
// are turned, (a, b) -> (a cos - b sin, b cos + a sin). The pairs are neighbours where
// `interleaved`, else an element and the one half a row further. cos and sin have a number for each
// element, or, with `paired`, for each pair. `transposed`: the transpose of that matrix, which for
// equal numbers in a pair is the turn back. Strides count elements, 0 is allowed in x, cos and sin;
// the last dimension has stride 1 in all. out may be x.
constexpr int kMaxRotaryDims = 64;
struct Rotary {
  DType type;        // of x and out
  DType table_type;  // of cos and sin: the same, or f32
  int dims;
  const int64_t* shape;
  const void* x;
  const int64_t* x_strides;
  void* out;
  const int64_t* out_strides;
  const void* cos;
  const int64_t* cos_strides;
  const void* sin;
  const int64_t* sin_strides;
  bool paired, interleaved, transposed;
};
void rotary(const Rotary& call);

// A row of grad and the row of out that it belongs to.
struct Entry {
  uint32_t row, index;
};

// The kernels of one instruction set.
struct EmbeddingKernels {
  // Copies n rows of `bytes` neighbouring bytes.
  void (*gather)(const char* table, int64_t row_bytes, int64_t bytes, const Indices& indices,
                 int64_t begin, int64_t end, char* out, bool around_caches);
  // out = the sum of `columns` elements of n rows, divided by `divisor`; zeros where n is 0.
  using Sum = void (*)(const void* grad, int64_t stride, const Entry* entries, int64_t n,
                       int64_t columns, double divisor, void* out, bool around_caches);
  Sum sum[kEmbeddingTypes];
  void (*end_stream)();
  // n rows of 2 * pairs elements; the strides are those between rows.
  using Turn = void (*)(const void* x, int64_t x_stride, void* out, int64_t out_stride,
                        const void* cos, int64_t cos_stride, const void* sin, int64_t sin_stride,
                        int64_t n, int64_t pairs);
  // [type][table in float32][paired][interleaved][transposed]
  Turn turn[kEmbeddingTypes][2][2][2][2];
};
const EmbeddingKernels& portable_embedding();
const EmbeddingKernels& avx2_embedding();
const EmbeddingKernels& avx512_embedding();

}  // namespace fastnn
