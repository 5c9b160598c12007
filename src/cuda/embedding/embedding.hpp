// Rows of a table by number, and the sums of gradients that belong to each.
#pragma once
#include <cstdint>

#include "common/dtype.hpp"

namespace fastnn::cuda {

// Contiguous int32 or int64.
struct Indices {
  const void* data = nullptr;
  bool wide = false;
  int64_t count = 0;
};

// out (count, columns), contiguous: row i is the table's row indices[i]. Strides count elements. An
// index that there is no row for is an assertion of the device, as in torch.
struct Gather {
  DType type = DType::f32;  // of any kind: bytes are copied
  const void* table = nullptr;
  int64_t rows = 0, columns = 0, row_stride = 0, column_stride = 0;
  Indices indices;
  void* out = nullptr;
};
void gather(const Gather& call, void* stream);

// out (rows, columns), contiguous: row r is the sum of those rows i of grad whose index is r, in
// the order of i; zero for the row `padding`, unless that is negative. With `by_frequency` it is
// their mean. Strides count elements. At most 2^32 - 1 rows and indices. `workspace`: of
// scatter_add_workspace() bytes, a multiple of 16.
struct ScatterAdd {
  DType type = DType::f32;
  const void* grad = nullptr;
  int64_t grad_stride = 0, grad_step = 0;  // between rows, and between columns
  Indices indices;
  int64_t rows = 0, columns = 0, padding = -1;
  bool by_frequency = false;
  void* out = nullptr;
  void* workspace = nullptr;
};
int64_t scatter_add_workspace(int64_t count, int64_t columns);
void scatter_add(const ScatterAdd& call, void* stream);

// A row of grad and the row of out that it belongs to.
struct alignas(8) Entry {
  uint32_t row, index;
};

// Sorts `count` entries by row, those of a row staying in their order; `rows`: more than the
// largest. Gives the place of the result: `entries` or `others`, which has as much room. `counts`:
// of sort_counts() numbers.
int64_t sort_counts(int64_t count);
Entry* sort(Entry* entries, Entry* others, uint32_t* counts, int64_t count, int64_t rows,
            void* stream);

}  // namespace fastnn::cuda
