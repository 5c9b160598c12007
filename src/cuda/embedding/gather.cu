// Copying, limited by the bytes of the result: a thread has the same piece of kRows rows, so that
// kRows indices, and then as many pieces of 16 bytes, are on their way at a time. Neighbouring
// threads have neighbouring pieces.
#include "cuda/embedding/embedding.hpp"
#include "cuda/embedding/indices.cuh"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kThreads = 256, kRows = 4;

// `pieces` of a row; `step`: from one to the next in the table.
template <class Piece>
__global__ void __launch_bounds__(kThreads)
    copy_rows(const Gather call, const int64_t pieces, const int64_t row_stride,
              const int64_t step) {
  const auto* table = static_cast<const Piece*>(call.table);
  auto* out = static_cast<Piece*>(call.out);
  // Of the rows there are kRows runs, a thread has one row of each.
  const int64_t run = (call.indices.count + kRows - 1) / kRows;
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t first = at / pieces, piece = at - first * pieces;
  if (first >= run) return;
  Piece copied[kRows];
  int64_t row[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const int64_t i = first + r * run;
    row[r] = i < call.indices.count ? index_at(call.indices, i, call.rows) : -1;
  }
#pragma unroll
  for (int r = 0; r < kRows; r++)
    if (row[r] >= 0) copied[r] = table[row[r] * row_stride + piece * step];
#pragma unroll
  for (int r = 0; r < kRows; r++)
    if (row[r] >= 0) out[(first + r * run) * pieces + piece] = copied[r];
}

template <class Piece>
void run(const Gather& call, int64_t each, void* stream) {
  const int64_t pieces = call.columns / each, step = each > 1 ? 1 : call.column_stride;
  const int64_t threads = ceil_div(call.indices.count, kRows) * pieces;
  launch(copy_rows<Piece>, dim3(unsigned(ceil_div(threads, kThreads))), dim3(kThreads), 0, stream,
         call, pieces, call.row_stride / each, step);
}

}  // namespace

void gather(const Gather& call, void* stream) {
  if (call.indices.count == 0 || call.columns == 0) return;
  const int64_t size = int64_t(dtype_size(call.type));
  const int64_t each = int64_t(sizeof(uint4)) / size;  // elements of a piece
  const auto in_pieces = [&](const void* data, int64_t row) {
    return reinterpret_cast<uintptr_t>(data) % sizeof(uint4) == 0 && row % each == 0;
  };
  if (call.column_stride == 1 && in_pieces(call.table, call.row_stride) &&
      in_pieces(call.out, call.columns))
    run<uint4>(call, each, stream);
  else if (size == 4)
    run<uint32_t>(call, 1, stream);
  else
    run<uint16_t>(call, 1, stream);
}

}  // namespace fastnn::cuda
