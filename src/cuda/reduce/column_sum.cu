// Two stages without atomics: blocks sum pieces of kPiece rows, whose sums are then summed in their
// order.
#include "cuda/reduce/column_sum.hpp"

#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kColumns = 32, kLanes = 8;  // a block has a thread for each
constexpr int64_t kPiece = 256;           // rows

// to[piece, column] = the sum of rows [piece * kPiece, ...) of x.
template <class T, class To>
__global__ void __launch_bounds__(kColumns* kLanes)
    sum_pieces(const T* x, const int64_t rows, const int64_t columns, const int64_t row_stride,
               const int64_t column_stride, To* to, const int64_t piece) {
  FASTNN_SHARED(float, sums, [kLanes][kColumns]);
  const int lane = int(threadIdx.x) / kColumns, mine = int(threadIdx.x) % kColumns;
  const int64_t column = int64_t(blockIdx.x) * kColumns + mine;
  const int64_t first = int64_t(blockIdx.y) * piece,
                end = first + piece < rows ? first + piece : rows;
  float sum = 0;
  if (column < columns)
    for (int64_t row = first + lane; row < end; row += kLanes)
      sum += to_float(x[row * row_stride + column * column_stride]);
  sums[lane][mine] = sum;
  __syncthreads();
  if (lane || column >= columns) return;
  for (int other = 1; other < kLanes; other++) sum += sums[other][mine];
  to[int64_t(blockIdx.y) * columns + column] = from_float<To>(sum);
}

int64_t pieces(int64_t rows) {
  const int64_t count = ceil_div(rows, kPiece);
  return count < 1 ? 1 : count < 1024 ? count : 1024;
}

}  // namespace

int64_t column_sum_workspace(int64_t rows, int64_t columns) {
  return pieces(rows) > 1 ? pieces(rows) * columns : 0;
}

void column_sum(const ColumnSum& s, void* stream) {
  if (s.columns == 0) return;
  const int64_t count = pieces(s.rows), blocks = ceil_div(s.columns, kColumns);
  const int64_t piece = ceil_div(s.rows > 0 ? s.rows : 1, count);
  const dim3 threads(kColumns * kLanes);
  with_float_type("column_sum", s.type, [&](auto zero) {
    using T = decltype(zero);
    const auto* x = static_cast<const T*>(s.x);
    auto* out = static_cast<T*>(s.out);
    if (count == 1) {
      launch(sum_pieces<T, T>, dim3(unsigned(blocks)), threads, 0, stream, x, s.rows, s.columns,
             s.row_stride, s.column_stride, out, piece);
      return;
    }
    launch(sum_pieces<T, float>, dim3(unsigned(blocks), unsigned(count)), threads, 0, stream, x,
           s.rows, s.columns, s.row_stride, s.column_stride, s.workspace, piece);
    launch(sum_pieces<float, T>, dim3(unsigned(blocks)), threads, 0, stream,
           static_cast<const float*>(s.workspace), count, s.columns, s.columns, int64_t(1), out,
           count);
  });
}

}  // namespace fastnn::cuda
