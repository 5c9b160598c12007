// Work is shared out among the threads: rows of the result in gathering and turning; in summing,
// columns, or rows of the result where those are few. What an element is made of, and in which
// order, depends on none of this.
#include "embedding/embedding.hpp"

#include <algorithm>

#include "common/caches.hpp"
#include "common/kernels_of.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"

namespace fastnn {
namespace {

const EmbeddingKernels& kernels() { return FASTNN_KERNELS_OF(embedding); }

// 10 us of copying: a parallel region costs about 5.
constexpr int64_t kBytesWorthAThread = 128 << 10;
int threads_for(int64_t bytes) {
  const int64_t shares = bytes / kBytesWorthAThread;
  return shares < 2 ? 1 : int(std::min<int64_t>(shares, max_threads()));
}

bool all_within(const Indices& indices, int64_t rows) {
  // Without a branch in the loop, so that it runs in lanes.
  uint64_t beyond = 0;
  if (indices.wide) {
    const auto* p = static_cast<const uint64_t*>(indices.data);
    for (int64_t i = 0; i < indices.count; i++) beyond |= p[i] >= uint64_t(rows);
  } else {
    const auto* p = static_cast<const int32_t*>(indices.data);
    for (int64_t i = 0; i < indices.count; i++) beyond |= uint64_t(int64_t(p[i])) >= uint64_t(rows);
  }
  return !beyond;
}

// The entries by row, those of a row in order: a stable sort by one digit of 11 bits after the
// other.
const Entry* sorted(const Indices& indices, int64_t rows) {
  constexpr int bits = 11, digits = 1 << bits;
  const int64_t n = indices.count;
  auto* from = static_cast<Entry*>(scratch(Scratch::misc, size_t(2 * n) * sizeof(Entry)));
  Entry* to = from + n;
  for (int64_t i = 0; i < n; i++) from[i] = {uint32_t(indices[i]), uint32_t(i)};
  for (int shift = 0; shift < 32 && (uint64_t(rows - 1) >> shift); shift += bits) {
    int64_t place[digits] = {}, sum = 0;
    for (int64_t i = 0; i < n; i++) place[from[i].row >> shift & (digits - 1)]++;
    for (int64_t& p : place) {
      const int64_t count = p;
      p = sum;
      sum += count;
    }
    for (int64_t i = 0; i < n; i++) to[place[from[i].row >> shift & (digits - 1)]++] = from[i];
    std::swap(from, to);
  }
  return from;
}

int64_t first_of(const Entry* entries, int64_t n, int64_t row) {
  return std::lower_bound(entries, entries + n, row,
                          [](const Entry& e, int64_t r) { return int64_t(e.row) < r; }) -
         entries;
}

// The row before which `work` of the work lies: one for a row, and one for each of its entries.
int64_t row_of(const Entry* entries, int64_t n, int64_t rows, int64_t work) {
  int64_t low = 0, high = rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (middle + first_of(entries, n, middle) < work)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

}  // namespace

bool gather(const Gather& call) {
  const Indices& indices = call.indices;
  if (!all_within(indices, call.rows)) return false;
  const int64_t item = int64_t(dtype_size(call.type)), bytes = call.columns * item;
  const int64_t total = indices.count * bytes;
  if (total == 0) return true;
  const auto* table = static_cast<const char*>(call.table);
  auto* out = static_cast<char*>(call.out);
  const EmbeddingKernels& k = kernels();
  const bool stream = total > last_cache_bytes();
  parallel(threads_for(total), [&](int thread, int threads) {
    const Range r = share_of(indices.count, 4, thread, threads);
    if (call.column_stride == 1 || call.columns == 1)
      return k.gather(table, call.row_stride * item, bytes, indices, r.begin, r.end, out, stream);
    for (int64_t i = r.begin; i < r.end; i++) {
      const char* from = table + indices[i] * call.row_stride * item;
      char* to = out + i * bytes;
      for (int64_t c = 0; c < call.columns; c++)
        __builtin_memcpy(to + c * item, from + c * call.column_stride * item, size_t(item));
    }
  });
  return true;
}

bool scatter_add(const ScatterAdd& call) {
  const int64_t n = call.indices.count;
  if (!all_within(call.indices, call.rows)) return false;
  const int64_t item = int64_t(dtype_size(call.type)), total = call.rows * call.columns * item;
  if (total == 0) return true;
  const Entry* entries = sorted(call.indices, call.rows);
  const EmbeddingKernels& k = kernels();
  const auto sum = k.sum[int(call.type)];
  const bool stream = total > last_cache_bytes();
  const int threads = threads_for(total + n * call.columns * item);
  // Shares of whole cache lines.
  const bool by_columns = call.columns * item >= 256 * int64_t(threads);
  parallel(threads, [&](int thread, int count) {
    Range columns{0, call.columns}, rows{0, call.rows};
    if (by_columns) {
      columns = share_of(call.columns, 64, thread, count);
    } else {
      const int64_t work = call.rows + n;
      rows = {row_of(entries, n, call.rows, work * thread / count),
              row_of(entries, n, call.rows, work * (thread + 1) / count)};
      if (thread + 1 == count) rows.end = call.rows;
    }
    const auto* grad = static_cast<const char*>(call.grad) + columns.begin * item;
    auto* out = static_cast<char*>(call.out) + columns.begin * item;
    const int64_t width = columns.end - columns.begin;
    if (width == 0) return;
    int64_t entry = first_of(entries, n, rows.begin);
    for (int64_t row = rows.begin; row < rows.end;) {
      char* to = out + row * call.columns * item;
      int64_t end = entry;
      while (end < n && int64_t(entries[end].row) == row) end++;
      if (end > entry && row != call.padding) {
        const double divisor = call.by_frequency ? double(end - entry) : 1;
        sum(grad, call.grad_stride, entries + entry, end - entry, width, divisor, to, stream);
        entry = end, row++;
        continue;
      }
      // Zeros: up to the next row with an entry at once, where they are neighbours.
      entry = end;
      int64_t until = entry < n ? std::min<int64_t>(entries[entry].row, rows.end) : rows.end;
      if (width < call.columns) until = row + 1;
      sum(grad, 0, nullptr, 0, (until - row) * width, 1, to, stream);
      row = until;
    }
    if (stream) k.end_stream();
  });
  scratch_trim();
  return true;
}

void rotary(const Rotary& call) {
  const int last = call.dims - 1, inner = last - 1;
  const int64_t item = int64_t(dtype_size(call.type));
  const int64_t table_item = int64_t(dtype_size(call.table_type));
  int64_t rows = 1;
  for (int d = 0; d < last; d++) rows *= call.shape[d];
  const int64_t pairs = call.shape[last] / 2;
  if (rows * pairs == 0) return;
  const auto turn = kernels().turn[int(call.type)][call.table_type != call.type][call.paired]
                                  [call.interleaved][call.transposed];
  // The last but one dimension is the kernel's loop.
  const int64_t length = inner >= 0 ? call.shape[inner] : 1;
  auto step = [inner](const int64_t* strides) { return inner >= 0 ? strides[inner] : 0; };
  parallel(threads_for(2 * rows * pairs * item), [&](int thread, int threads) {
    const Range share = share_of(rows, 4, thread, threads);
    for (int64_t begin = share.begin; begin < share.end;) {
      int64_t rest = begin / length;
      const int64_t within = begin - rest * length;
      const int64_t n = std::min(length - within, share.end - begin);
      int64_t x = within * step(call.x_strides), out = within * step(call.out_strides);
      int64_t cos = within * step(call.cos_strides), sin = within * step(call.sin_strides);
      for (int d = inner - 1; d >= 0; d--) {
        const int64_t index = rest % call.shape[d];
        rest /= call.shape[d];
        x += index * call.x_strides[d], out += index * call.out_strides[d];
        cos += index * call.cos_strides[d], sin += index * call.sin_strides[d];
      }
      turn(static_cast<const char*>(call.x) + x * item, step(call.x_strides),
           static_cast<char*>(call.out) + out * item, step(call.out_strides),
           static_cast<const char*>(call.cos) + cos * table_item, step(call.cos_strides),
           static_cast<const char*>(call.sin) + sin * table_item, step(call.sin_strides), n, pairs);
      begin += n;
    }
  });
}

}  // namespace fastnn
