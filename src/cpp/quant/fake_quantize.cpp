// Dimensions that lie densely together become one, in row-major order, which is that of the mask's
// bits and of the random words. The last of what is left is a row: of one scale, or of one scale an
// element. Elements, or what sums are made of, are shared out among the threads.
#include "quant/fake_quantize.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "common/caches.hpp"
#include "common/integers.hpp"
#include "common/kernels_of.hpp"
#include "common/parallel.hpp"

namespace fastnn {
namespace {

const FakeQuantizeKernels& kernels() { return FASTNN_KERNELS_OF(fake_quantize); }

constexpr int64_t kWorthAThread = 16384;  // elements: about 10 us
constexpr int64_t kPiece = 1024;          // of a row, with a sum of its own
constexpr int64_t kRowBlocks = 32;        // of columns' sums, at most

int threads_for(int64_t elements) {
  const int64_t shares = elements / kWorthAThread;
  return shares < 2 ? 1 : int(std::min<int64_t>(shares, max_threads()));
}

// As in elementwise.cpp: results that will have left the caches before anyone reads them.
bool goes_around_caches(DType type, int64_t elements, const void* out, const void* in) {
  const int64_t item = int64_t(dtype_size(type));
  return item >= 4 && out != in && elements * item > last_cache_bytes();
}

// What lies in a call's memory, one stride each.
enum Operand { kX, kGrad, kOut, kScale, kOperands };

// Shape and strides with as few dimensions as there can be, at least two: rows, and what is in one.
struct Loop {
  int dims = 0;
  int64_t size[kMaxFakeDims + 2], stride[kOperands][kMaxFakeDims + 2];
  int64_t elements = 1;

  // Null: an operand that is not there.
  Loop(int count, const int64_t* shape, const int64_t* const (&strides)[kOperands]) {
    const auto of = [&](int operand, int d) { return strides[operand] ? strides[operand][d] : 0; };
    for (int d = 0; d < count; d++) {
      const int64_t n = shape[d];
      elements *= n;
      if (n == 1) continue;
      bool merges = dims > 0;
      for (int k = 0; k < kOperands && merges; k++) merges = stride[k][dims - 1] == of(k, d) * n;
      dims += !merges;
      size[dims - 1] = merges ? size[dims - 1] * n : n;
      for (int k = 0; k < kOperands; k++) stride[k][dims - 1] = of(k, d);
    }
    if (dims >= 2) return;
    // One row; or one element.
    size[1] = dims ? size[0] : 1, size[0] = 1;
    for (int k = 0; k < kOperands; k++)
      stride[k][1] = dims ? stride[k][0] : k != kScale, stride[k][0] = 0;
    dims = 2;
  }

  int64_t inner() const { return size[dims - 1]; }
  int64_t rows() const { return size[dims - 2]; }
  int64_t all_rows() const { return elements / inner(); }
  bool own_scales() const { return stride[kScale][dims - 1] != 0; }

  // Where row `row` of all begins.
  void offsets(int64_t row, int64_t (&at)[kOperands]) const {
    for (int64_t& offset : at) offset = 0;
    for (int d = dims - 2; d >= 0; d--) {
      const int64_t index = row % size[d];
      row /= size[d];
      for (int k = 0; k < kOperands; k++) at[k] += index * stride[k][d];
    }
  }
};

struct Memory {
  const void* x;
  const void* grad;
  void* out;
  const float* scale;
  const void* zero_point;
  int64_t item;
};

const void* advance(const void* p, int64_t bytes) {
  return p ? static_cast<const char*>(p) + bytes : nullptr;
}

// `count` rows from row `row` of all, each from `within`, n elements long. They lie in one block.
FakeRows rows_of(const Loop& loop, const Memory& memory, int64_t row, int64_t count, int64_t within,
                 int64_t n) {
  int64_t at[kOperands];
  loop.offsets(row, at);
  const int last = loop.dims - 1;
  for (int k = 0; k < kOperands; k++) at[k] += within * loop.stride[k][last];
  FakeRows rows;
  rows.x = advance(memory.x, at[kX] * memory.item);
  rows.grad = advance(memory.grad, at[kGrad] * memory.item);
  rows.out = static_cast<char*>(memory.out) + at[kOut] * memory.item;
  rows.x_stride = loop.stride[kX][last], rows.x_row = loop.stride[kX][last - 1];
  rows.grad_stride = loop.stride[kGrad][last], rows.grad_row = loop.stride[kGrad][last - 1];
  rows.out_stride = loop.stride[kOut][last], rows.out_row = loop.stride[kOut][last - 1];
  rows.rows = count, rows.n = n;
  rows.first = uint64_t(row * loop.inner() + within);
  rows.scale = memory.scale ? memory.scale + at[kScale] : nullptr;
  // Integers and numbers have four bytes each.
  rows.zero_point = advance(memory.zero_point, at[kScale] * 4);
  rows.scale_stride = loop.stride[kScale][last], rows.scale_row = loop.stride[kScale][last - 1];
  return rows;
}

// work(rows) for the elements from begin to end: the end of a row, whole rows, and the begin of
// one.
template <class Work>
void over_elements(const Loop& loop, const Memory& memory, Range share, Work work) {
  const int64_t inner = loop.inner();
  for (int64_t begin = share.begin; begin < share.end;) {
    const int64_t row = begin / inner, within = begin - row * inner;
    const int64_t left = share.end - begin;
    if (within || left < inner) {
      const int64_t n = std::min(inner - within, left);
      work(rows_of(loop, memory, row, 1, within, n));
      begin += n;
    } else {
      const int64_t count = std::min(left / inner, loop.rows() - row % loop.rows());
      work(rows_of(loop, memory, row, count, 0, inner));
      begin += count * inner;
    }
  }
}

// Shares end with whole bytes of the mask.
constexpr int64_t kGrain = 1024;

// Sums of rows of one scale each: a row in pieces, whatever the threads are.
void gradients_of_rows(const FakeGradients& call, const Loop& loop, const Memory& memory,
                       bool stream, double* by_scale, double* by_zero) {
  const auto kernel = kernels().row_gradients[int(call.type)];
  const int64_t inner = loop.inner(), pieces = ceil_div(inner, kPiece);
  const int64_t items = loop.all_rows() * pieces;
  std::vector<double> sums(size_t(2 * items));
  parallel(threads_for(loop.elements), [&](int thread, int count) {
    const Range share = share_of(items, 1, thread, count);
    for (int64_t item = share.begin; item < share.end;) {
      const int64_t row = item / pieces, piece = item - row * pieces;
      int64_t many = 1;
      if (pieces == 1) many = std::min(share.end - item, loop.rows() - row % loop.rows());
      const int64_t within = piece * kPiece, n = std::min(inner - within, kPiece);
      kernel(rows_of(loop, memory, row, many, within, n), call.grid, call.mask, stream,
             sums.data() + 2 * item);
      item += many;
    }
  });
  int64_t at[kOperands];
  for (int64_t row = 0, item = 0; item < items; row++) {
    loop.offsets(row, at);
    for (int64_t piece = 0; piece < pieces; piece++, item++) {
      by_scale[at[kScale]] += sums[size_t(2 * item)];
      by_zero[at[kScale]] += sums[size_t(2 * item + 1)];
    }
  }
}

// Sums of columns of one scale each: over blocks of rows.
void gradients_of_columns(const FakeGradients& call, const Loop& loop, const Memory& memory,
                          bool stream, double* by_scale, double* by_zero) {
  const auto kernel = kernels().column_gradients[int(call.type)];
  const int64_t inner = loop.inner(), rows = loop.rows();
  // Where rows have scales of their own a block is one row.
  const bool shared = loop.stride[kScale][loop.dims - 2] == 0;
  const int64_t block = shared ? std::max<int64_t>(16, ceil_div(rows, kRowBlocks)) : 1;
  const int64_t blocks = ceil_div(rows, block), items = loop.all_rows() / rows * blocks;
  std::vector<double> sums(size_t(2 * items * inner));
  parallel(threads_for(loop.elements), [&](int thread, int count) {
    const Range share = share_of(items, 1, thread, count);
    for (int64_t item = share.begin; item < share.end; item++) {
      const int64_t outer = item / blocks, start = (item - outer * blocks) * block;
      const FakeRows part =
          rows_of(loop, memory, outer * rows + start, std::min(block, rows - start), 0, inner);
      kernel(part, call.grid, call.mask, stream, sums.data() + 2 * item * inner);
    }
  });
  int64_t at[kOperands];
  const int64_t step = loop.stride[kScale][loop.dims - 1];
  for (int64_t item = 0; item < items; item++) {
    loop.offsets(item / blocks * rows + item % blocks * block, at);
    const double* part = sums.data() + 2 * item * inner;
    for (int64_t i = 0; i < inner; i++) {
      by_scale[at[kScale] + i * step] += part[i];
      by_zero[at[kScale] + i * step] += part[inner + i];
    }
  }
}

}  // namespace

BadGrid fake_quantize(const FakeQuantize& call) {
  const Loop loop(call.dims, call.shape,
                  {call.x_strides, nullptr, call.out_strides, call.grid.strides});
  if (call.mask)
    std::memset(call.mask + loop.elements / 8, 0,
                size_t(fake_mask_bytes(loop.elements) - loop.elements / 8));
  if (loop.elements == 0) return BadGrid::none;
  const Memory memory{call.x,
                      nullptr,
                      call.out,
                      call.grid.scale,
                      call.grid.zero_point,
                      int64_t(dtype_size(call.type))};
  const auto kernel = kernels().forward[int(call.type)];
  const bool stream = goes_around_caches(call.type, loop.elements, call.out, call.x);
  std::atomic<int> bad{0};
  parallel(threads_for(loop.elements), [&](int thread, int count) {
    const Range share = share_of(loop.elements, kGrain, thread, count);
    over_elements(loop, memory, share, [&](const FakeRows& rows) {
      const BadGrid found = kernel(rows, call.grid, call.mask, stream);
      if (found != BadGrid::none) bad.fetch_or(int(found), std::memory_order_relaxed);
    });
  });
  return bad & int(BadGrid::scale) ? BadGrid::scale : BadGrid(bad.load());
}

void fake_masked(const FakeMasked& call) {
  const Loop loop(call.dims, call.shape, {nullptr, call.grad_strides, call.out_strides, nullptr});
  if (loop.elements == 0) return;
  const Memory memory{nullptr, call.grad, call.out,
                      nullptr, nullptr,   int64_t(dtype_size(call.type))};
  const auto kernel = kernels().masked[int(call.type)];
  const bool stream = goes_around_caches(call.type, loop.elements, call.out, call.grad);
  parallel(threads_for(loop.elements), [&](int thread, int count) {
    const Range share = share_of(loop.elements, kGrain, thread, count);
    over_elements(loop, memory, share,
                  [&](const FakeRows& rows) { kernel(rows, call.mask, stream); });
  });
}

void fake_gradients(const FakeGradients& call) {
  const Loop loop(call.dims, call.shape,
                  {call.x_strides, call.grad_strides, call.out_strides, call.grid.strides});
  std::vector<double> by_scale(size_t(call.count)), by_zero(size_t(call.count));
  if (loop.elements) {
    const Memory memory{call.x,
                        call.grad,
                        call.out,
                        call.grid.scale,
                        call.grid.zero_point,
                        int64_t(dtype_size(call.type))};
    const bool stream = goes_around_caches(call.type, loop.elements, call.out, call.grad);
    if (loop.own_scales())
      gradients_of_columns(call, loop, memory, stream, by_scale.data(), by_zero.data());
    else
      gradients_of_rows(call, loop, memory, stream, by_scale.data(), by_zero.data());
  }
  for (int64_t i = 0; i < call.count; i++) {
    call.by_scale[i] = float(by_scale[size_t(i)] * call.factor);
    if (call.by_zero_point)
      call.by_zero_point[i] = float(-double(call.grid.scale[i]) * by_zero[size_t(i)] * call.factor);
  }
}

}  // namespace fastnn
