// The gradient of an embedding's table. The places of all indices are sorted by row (sort.cu), so
// that those of one row follow each other, in their order. Work is shared out by places, kChunk at
// a time, whatever rows they are of: a row that half of a text asks for keeps nobody waiting, and
// each gradient is read once. Rows whose places are all in one chunk are written by it. What a
// chunk has of others goes to scratch memory, two rows of sums at most: of the row that it begins
// with, and of the one it ends with. A second kernel adds those up in their order. Nothing is added
// by atomics, so that the same input gives the same bits.
#include "cuda/embedding/embedding.hpp"
#include "cuda/embedding/indices.cuh"
#include "cuda/reduce/rows.cuh"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kThreads = 128, kChunk = 32, kAhead = 4;

__global__ void __launch_bounds__(kThreads)
    make_entries(const Indices indices, const int64_t rows, Entry* const entries) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < indices.count) entries[i] = {uint32_t(index_at(indices, i, rows)), uint32_t(i)};
}

// What the kernels know of a call. `sums`: [chunk][begins, ends][columns].
struct Sums {
  ScatterAdd call;
  const Entry* entries;
  float* sums;
  int64_t pieces;  // of a row
};

template <class T, int each>
__device__ __forceinline__ void write_row(const Sums& s, int64_t row, int64_t piece, int64_t often,
                                          const float (&sum)[each]) {
  if (row == s.call.padding) return;
  const float divisor = s.call.by_frequency ? float(often) : 1.0f;
  T* to = static_cast<T*>(s.call.out) + row * s.call.columns + piece * each;
  if constexpr (each > 1) {
    Pack<T> pack;
#pragma unroll
    for (int e = 0; e < each; e++) pack.element[e] = from_float<T>(sum[e] / divisor);
    *reinterpret_cast<Pack<T>*>(to) = pack;
  } else {
    *to = from_float<T>(sum[0] / divisor);
  }
}
template <int each>
__device__ __forceinline__ float* sums_at(const Sums& s, int64_t chunk, int end, int64_t piece) {
  return s.sums + (2 * chunk + end) * s.call.columns + piece * each;
}

// A row of threads has a chunk, a thread `each` neighbouring columns.
template <class T, int each>
__global__ void __launch_bounds__(kThreads) sum_chunks(const Sums s, const int across) {
  auto* entries = dynamic_shared<Entry>();
  const int64_t count = s.call.indices.count;
  const int chunks = kThreads / across;  // of the block
  const int64_t first_chunk = int64_t(blockIdx.x) * chunks;
  for (int i = int(threadIdx.x); i < chunks * kChunk; i += kThreads) {
    const int64_t at = first_chunk * kChunk + i;
    if (at < count) entries[i] = s.entries[at];
  }
  __syncthreads();
  const int mine = int(threadIdx.x) / across;
  const int64_t chunk = first_chunk + mine, begin = chunk * kChunk;
  const int64_t piece = int64_t(blockIdx.y) * across + threadIdx.x % across;
  if (begin >= count || piece >= s.pieces) return;
  const int n = count - begin < kChunk ? int(count - begin) : kChunk;
  const Entry* of = entries + mine * kChunk;
  // Whether the first row begins before, and the last one goes on behind.
  const bool goes_on = begin > 0 && s.entries[begin - 1].row == of[0].row;
  const bool ends_behind = begin + n < count && s.entries[begin + n].row == of[n - 1].row;

  const auto* grad = static_cast<const T*>(s.call.grad) + piece * each * s.call.grad_step;
  float sum[each] = {};
  int since = 0;  // the place where the row began
  for (int from = 0; from < n; from += kAhead) {
    float next[kAhead][each];
#pragma unroll
    for (int a = 0; a < kAhead; a++)
      if (from + a < n) {
        const T* place = grad + of[from + a].index * s.call.grad_stride;
        if constexpr (each > 1) {
          const auto pack = *reinterpret_cast<const Pack<T>*>(place);
#pragma unroll
          for (int e = 0; e < each; e++) next[a][e] = to_float(pack.element[e]);
        } else {
          next[a][0] = to_float(*place);
        }
      }
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      const int i = from + a;
      if (i >= n) break;
#pragma unroll
      for (int e = 0; e < each; e++) sum[e] += next[a][e];
      if (i + 1 < n && of[i + 1].row == of[i].row) continue;
      // A row ends here, at least for this chunk.
      const bool began_before = since == 0 && goes_on, ends = i + 1 < n || !ends_behind;
      if (!began_before && ends) {
        write_row<T, each>(s, of[i].row, piece, i + 1 - since, sum);
      } else {
        float* to = sums_at<each>(s, chunk, !began_before, piece);
#pragma unroll
        for (int e = 0; e < each; e++) to[e] = sum[e];
      }
#pragma unroll
      for (int e = 0; e < each; e++) sum[e] = 0;
      since = i + 1;
    }
  }
}

// Where a chunk ends with a row that begins there and goes on behind: the sum of what it, and the
// chunks after it, have of that row.
template <class T, int each>
__global__ void __launch_bounds__(kThreads) sum_rows(const Sums s, const int across) {
  const int64_t count = s.call.indices.count;
  const int64_t chunk = int64_t(blockIdx.x) * (kThreads / across) + threadIdx.x / across;
  const int64_t piece = int64_t(blockIdx.y) * across + threadIdx.x % across;
  const int64_t behind = (chunk + 1) * kChunk;
  if (behind >= count || piece >= s.pieces) return;
  const uint32_t row = s.entries[behind].row;
  if (s.entries[behind - 1].row != row) return;
  int64_t begin = behind - 1;
  while (begin > chunk * kChunk && s.entries[begin - 1].row == row) begin--;
  // One that began before is another chunk's.
  if (begin > 0 && s.entries[begin - 1].row == row) return;
  float sum[each];
  const float* first = sums_at<each>(s, chunk, 1, piece);
#pragma unroll
  for (int e = 0; e < each; e++) sum[e] = first[e];
  // Of the chunks that it goes on in several are read at a time.
  int64_t next = chunk + 1;
  const auto goes_on = [&](int64_t c) {
    return (c + 1) * kChunk < count && s.entries[(c + 1) * kChunk].row == row;
  };
  while (true) {
    bool there[kAhead];  // whether it has places in the chunk
    float part[kAhead][each];
#pragma unroll
    for (int a = 0; a < kAhead; a++) there[a] = a == 0 || goes_on(next + a - 1);
#pragma unroll
    for (int a = 0; a < kAhead; a++)
      if (there[a]) {
        const float* from = sums_at<each>(s, next + a, 0, piece);
#pragma unroll
        for (int e = 0; e < each; e++) part[a][e] = from[e];
      }
#pragma unroll
    for (int a = 0; a < kAhead; a++)
      if (there[a])
#pragma unroll
        for (int e = 0; e < each; e++) sum[e] += part[a][e];
    if (!there[kAhead - 1] || !goes_on(next + kAhead - 1)) {
#pragma unroll
      for (int a = 1; a < kAhead; a++) next += there[a];
      break;
    }
    next += kAhead;
  }
  int64_t end = next * kChunk + 1;
  while (end < count && s.entries[end].row == row) end++;
  write_row<T, each>(s, row, piece, end - begin, sum);
}

template <class T, int each>
void run(const Sums& s, void* stream) {
  int across = 1;
  while (across < kThreads && across < s.pieces) across *= 2;
  const int64_t chunks = ceil_div(s.call.indices.count, kChunk);
  const dim3 grid(unsigned(ceil_div(chunks, kThreads / across)),
                  unsigned(ceil_div(s.pieces, across)));
  launch(sum_chunks<T, each>, grid, dim3(kThreads),
         size_t(kThreads / across) * kChunk * sizeof(Entry), stream, s, across);
  if (chunks > 1) launch(sum_rows<T, each>, grid, dim3(kThreads), 0, stream, s, across);
}

int64_t in_sixteens(int64_t bytes) { return ceil_div(bytes, 16) * 16; }
int64_t bytes_of_sums(int64_t count, int64_t columns) {
  return in_sixteens(2 * ceil_div(count, kChunk) * columns * int64_t(sizeof(float)));
}
int64_t bytes_of_entries(int64_t count) { return in_sixteens(count * int64_t(sizeof(Entry))); }

}  // namespace

int64_t scatter_add_workspace(int64_t count, int64_t columns) {
  return bytes_of_sums(count, columns) + 2 * bytes_of_entries(count) +
         in_sixteens(sort_counts(count) * int64_t(sizeof(uint32_t)));
}

void scatter_add(const ScatterAdd& call, void* stream) {
  const int64_t count = call.indices.count;
  if (call.rows == 0 || call.columns == 0) return;
  set_zero(call.out, size_t(call.rows * call.columns) * dtype_size(call.type), stream);
  if (count == 0) return;
  char* memory = static_cast<char*>(call.workspace);
  auto* sums = reinterpret_cast<float*>(memory);
  memory += bytes_of_sums(count, call.columns);
  auto* entries = reinterpret_cast<Entry*>(memory);
  auto* others = reinterpret_cast<Entry*>(memory + bytes_of_entries(count));
  auto* counts = reinterpret_cast<uint32_t*>(memory + 2 * bytes_of_entries(count));
  launch(make_entries, dim3(unsigned(ceil_div(count, kThreads))), dim3(kThreads), 0, stream,
         call.indices, call.rows, entries);
  Sums s{call, sort(entries, others, counts, count, call.rows, stream), sums, call.columns};
  with_float_type("embedding", call.type, [&](auto zero) {
    using T = decltype(zero);
    constexpr int each = Pack<T>::kEach;
    const bool packs = call.columns % each == 0 && call.grad_step == 1 &&
                       HeldRow<T, 32, each>::aligned(static_cast<const T*>(call.grad), 1) &&
                       call.grad_stride % each == 0 &&
                       HeldRow<T, 32, each>::aligned(static_cast<const T*>(call.out), 1);
    if (packs) {
      s.pieces = call.columns / each;
      run<T, each>(s, stream);
    } else {
      run<T, 1>(s, stream);
    }
  });
}

}  // namespace fastnn::cuda
