// Rows are worked on in blocks, of which each thread takes a run. What is summed over the rows is
// summed within chunks of them, whose sums are combined in order; chunks and blocks depend on the
// shape alone, so that any number of threads gives the same bits.
#include "norm/layer_norm.hpp"

#include <algorithm>

#include "common/caches.hpp"
#include "common/integers.hpp"
#include "common/kernels_of.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"

namespace fastnn {
namespace {

const RowNormKernels& kernels() { return FASTNN_KERNELS_OF(row_norm); }

constexpr int kOperands = 3;
// What is summed over rows is in float32 for so many of them.
constexpr int64_t kChain = 64;
// Each chunk has sums of its own for every column: they must be few beside its elements.
constexpr int64_t kChunks = 64, kChunkRows = 16;
// Fewer rows than this are not cut into chunks: columns are shared out instead, in tiles.
constexpr int64_t kFewRows = 64, kTile = 1024;

// The operands seen as rows: dimensions that lie densely together in all of them are one.
struct Rows {
  int operands;
  int64_t item;  // bytes
  char* data[kOperands];
  int64_t rows = 1, n = 1;
  int outer = 0, inner = 0;
  int64_t outer_size[kMaxNormDims], outer_stride[kOperands][kMaxNormDims];
  int64_t inner_size[kMaxNormDims], inner_stride[kOperands][kMaxNormDims];
  bool dense[kOperands];  // elements of a row are neighbours
  bool all_dense = true;

  char* row(int o, int64_t r) const {
    int64_t at = 0;
    for (int d = outer - 1; d > 0; d--) {
      at += r % outer_size[d] * outer_stride[o][d];
      r /= outer_size[d];
    }
    if (outer > 0) at += r * outer_stride[o][0];
    return data[o] + at * item;
  }
};

// Dimensions [begin, end) of `shape`, folded; returns how many are left.
int fold(int begin, int end, const int64_t* shape, const NormOperand* operands, int count,
         int64_t* size, int64_t (*stride)[kMaxNormDims]) {
  int kept = 0;
  for (int d = begin; d < end; d++) {
    if (shape[d] == 1) continue;
    bool together = kept > 0;
    for (int o = 0; o < count; o++)
      together = together && stride[o][kept - 1] == operands[o].strides[d] * shape[d];
    if (!together) size[kept++] = 1;
    size[kept - 1] *= shape[d];
    for (int o = 0; o < count; o++) stride[o][kept - 1] = operands[o].strides[d];
  }
  return kept;
}

Rows make_rows(DType type, int dims, int row_dims, const int64_t* shape,
               const NormOperand* operands, int count) {
  Rows l;
  l.operands = count;
  l.item = int64_t(dtype_size(type));
  l.outer = fold(0, dims - row_dims, shape, operands, count, l.outer_size, l.outer_stride);
  l.inner = fold(dims - row_dims, dims, shape, operands, count, l.inner_size, l.inner_stride);
  for (int d = 0; d < l.outer; d++) l.rows *= l.outer_size[d];
  for (int d = 0; d < l.inner; d++) l.n *= l.inner_size[d];
  for (int o = 0; o < count; o++) {
    l.data[o] = static_cast<char*>(operands[o].data);
    l.dense[o] = l.inner == 0 || (l.inner == 1 && l.inner_stride[o][0] == 1);
    l.all_dense = l.all_dense && l.dense[o];
  }
  return l;
}

template <class Item, bool gather>
void copy_rows(const Rows& l, int o, char* const* rows, int64_t count, char* buffer) {
  int64_t index[kMaxNormDims] = {}, at = 0;
  for (int64_t i = 0; i < l.n; i++) {
    for (int64_t r = 0; r < count; r++) {
      Item* there = reinterpret_cast<Item*>(rows[r]) + at;
      Item* here = reinterpret_cast<Item*>(buffer) + r * l.n + i;
      gather ? * here = *there : * there = *here;
    }
    for (int d = l.inner - 1; d >= 0; d--) {
      at += l.inner_stride[o][d];
      if (++index[d] < l.inner_size[d]) break;
      index[d] = 0;
      at -= l.inner_size[d] * l.inner_stride[o][d];
    }
  }
}
// Elements of a row that lie apart go through a buffer in which they are neighbours. Several rows
// at a time, as most often it is those that are neighbours then.
template <bool gather>
void copy(const Rows& l, int o, char* const* rows, int64_t count, char* buffer) {
  l.item == 8   ? copy_rows<uint64_t, gather>(l, o, rows, count, buffer)
  : l.item == 4 ? copy_rows<uint32_t, gather>(l, o, rows, count, buffer)
                : copy_rows<uint16_t, gather>(l, o, rows, count, buffer);
}

// Bytes of buffers that a thread needs.
int64_t buffer_bytes(const Rows& l) {
  int64_t apart = 0;
  for (int o = 0; o < l.operands; o++) apart += !l.dense[o];
  return round_up(apart * RowBlock::kRows * l.n * l.item, 64);
}

// f(block) for the rows [begin, end), `most` at a time. Operand 0 is x, the last one is written,
// and one between them is the gradient.
template <class F>
void for_each_block(const Rows& l, int64_t begin, int64_t end, int64_t most, RowBlock& b,
                    char* buffer, F f) {
  const int last = l.operands - 1;
  for (int64_t first = begin; first < end; first += most) {
    b.rows = std::min(most, end - first);
    b.n = l.n;
    char* rows[kOperands][RowBlock::kRows + RowBlock::kAhead];
    char* at = buffer;
    char* to = nullptr;
    for (int o = 0; o < l.operands; o++) {
      for (int64_t r = 0; r < b.rows + RowBlock::kAhead; r++)
        rows[o][r] = first + r < end ? l.row(o, first + r) : rows[o][r - 1];
      if (l.dense[o]) continue;
      if (o == last) {
        to = at;
      } else {
        copy<true>(l, o, rows[o], b.rows, at);
        for (int64_t r = 0; r < b.rows + RowBlock::kAhead; r++)
          rows[o][r] = at + std::min(r, b.rows - 1) * l.n * l.item;
      }
      at += RowBlock::kRows * l.n * l.item;
    }
    for (int64_t r = 0; r < b.rows + RowBlock::kAhead; r++) {
      b.x[r] = rows[0][r];
      b.grad[r] = rows[last > 1 ? 1 : 0][r];
      if (r < b.rows) b.out[r] = to ? to + r * l.n * l.item : rows[last][r];
    }
    f(b, first);
    if (to) copy<false>(l, last, rows[last], b.rows, to);
  }
}

// Whether results are better written around the caches: as in batch_norm.cpp.
bool around_caches(const Rows& l, int64_t operands) {
  return l.rows * l.n * l.item * operands > last_cache_bytes() / 4;
}

int threads_for(const Rows& l, int64_t operands, int64_t items) {
  constexpr double kWorthAThread = 5e-6, kBytesASecond = 40e9;
  const double seconds = double(l.rows) * double(l.n * l.item * operands) / kBytesASecond;
  return int(
      std::clamp<double>(std::min(seconds / kWorthAThread, double(items)), 1, max_threads()));
}

// Numbers for the columns in the type that is computed in: converted where they are not.
const void* columns(const RowNormKernels& k, const PerChannel& from, DType type, int64_t n,
                    void* memory) {
  const DType wanted = type == DType::f64 ? DType::f64 : DType::f32;
  if (!from.data || (from.type == wanted && (from.stride == 1 || n == 1))) return from.data;
  k.convert[int(type)][int(from.type)](from.data, from.stride, n, memory);
  return memory;
}

}  // namespace

void row_norm(const RowNormForward& call) {
  const NormOperand operands[] = {call.x, call.out};
  const Rows l = make_rows(call.type, call.dims, call.row_dims, call.shape, operands, 2);
  const RowNormKernels& k = kernels();
  RowBlock common;
  char* memory = static_cast<char*>(scratch(Scratch::packed_b, size_t(2 * l.n) * 8));
  common.weight = columns(k, call.weight, call.type, l.n, memory);
  common.bias = columns(k, call.bias, call.type, l.n, memory + 8 * l.n);
  common.eps = call.eps;
  common.around_caches = l.dense[1] && around_caches(l, 2);
  const int64_t blocks = ceil_div(l.rows, RowBlock::kRows), bytes = buffer_bytes(l);
  const int most = threads_for(l, 2, blocks);
  char* buffers = static_cast<char*>(scratch(Scratch::packed_a, size_t(most * bytes)));
  parallel(most, [&](int thread, int threads) {
    const Range r = share_of(l.rows, RowBlock::kRows, thread, threads);
    RowBlock b = common;
    for_each_block(
        l, r.begin, r.end, RowBlock::kRows, b, buffers + thread * bytes,
        [&](const RowBlock& block, int64_t) { k.forward[int(call.type)](block, call.centered); });
    if (common.around_caches) k.end_stream();
  });
  scratch_trim();
}

void row_norm_backward(const RowNormBackward& call) {
  const NormOperand operands[] = {call.x, call.grad, call.grad_x};
  const Rows l = make_rows(call.type, call.dims, call.row_dims, call.shape, operands, 3);
  const RowNormKernels& k = kernels();
  const int type = int(call.type);
  const int64_t number = call.type == DType::f64 ? 8 : 4, n = l.n;
  const bool sums = call.grad_weight || call.grad_bias;
  RowBlock common;
  char* memory = static_cast<char*>(scratch(Scratch::packed_b, size_t(n) * 8));
  common.weight = columns(k, call.weight, call.type, n, memory);
  common.bias = nullptr;
  common.eps = call.eps;
  common.around_caches = l.dense[2] && around_caches(l, 3);
  // A block stays in half of a core's own cache between the passes over it.
  const int64_t fit = core_cache_bytes() / 2 / (2 * n * l.item);
  const int64_t block_rows = std::clamp<int64_t>(fit / 4 * 4, 4, RowBlock::kRows);
  auto clear = [&](double* to, int64_t begin, int64_t end) {
    if (to) std::fill(to + begin, to + end, 0.0);
  };

  if (l.rows < kFewRows && l.all_dense && n >= 2 * kTile) {
    // First what each row's gradient is made with, then, for all rows, columns.
    const int64_t tiles = ceil_div(n, kTile), size = kRowTerms * number;
    const int most = threads_for(l, 5, tiles);
    char* terms =
        static_cast<char*>(scratch(Scratch::misc, size_t(l.rows * size + most * 2 * kTile * 8)));
    char* accumulators = terms + l.rows * size;
    parallel(most, [&](int thread, int threads) {
      RowBlock b = common;
      const Range r = share_of(l.rows, 1, thread, threads);
      for_each_block(l, r.begin, r.end, 1, b, nullptr, [&](const RowBlock& block, int64_t first) {
        k.terms[type](block, call.centered, terms + first * size);
      });
      barrier();
      char* weight_sums = accumulators + thread * 2 * kTile * 8;
      char* bias_sums = weight_sums + kTile * 8;
      std::fill(weight_sums, weight_sums + 2 * kTile * 8, char(0));
      const Range tile = share_of(n, kTile, thread, threads);
      for (int64_t c = tile.begin; c < tile.end; c += kTile) {
        const int64_t columns = std::min(kTile, tile.end - c);
        for_each_block(
            l, 0, l.rows, RowBlock::kRows, b, nullptr, [&](const RowBlock& block, int64_t first) {
              RowBlock part = block;
              part.n = columns;
              if (part.weight) part.weight = static_cast<const char*>(common.weight) + c * number;
              for (int64_t i = 0; i < part.rows + RowBlock::kAhead; i++) {
                part.x[i] += c * l.item, part.grad[i] += c * l.item;
                if (i < part.rows) part.out[i] += c * l.item;
              }
              k.backward[type](part, terms + first * size, call.grad_weight ? weight_sums : nullptr,
                               call.grad_bias ? bias_sums : nullptr);
            });
        clear(call.grad_weight, c, c + columns);
        clear(call.grad_bias, c, c + columns);
        if (call.grad_weight) k.flush[type](weight_sums, columns, call.grad_weight + c);
        if (call.grad_bias) k.flush[type](bias_sums, columns, call.grad_bias + c);
      }
      if (common.around_caches) k.end_stream();
    });
    scratch_trim();
    return;
  }

  const int64_t chunk_rows =
      sums ? round_up(std::max(kChunkRows, ceil_div(l.rows, kChunks)), kChunkRows) : kChunkRows;
  const int64_t chunks = ceil_div(l.rows, chunk_rows);
  const int most = threads_for(l, 5, chunks);
  const int64_t of_thread = round_up(2 * n * number + 64, 64), buffer = buffer_bytes(l);
  double* partial = nullptr;
  if (sums && chunks > 1)
    partial = static_cast<double*>(
        scratch(Scratch::accumulator, size_t(chunks - 1) * size_t(n) * 2 * sizeof(double)));
  char* accumulators =
      static_cast<char*>(scratch(Scratch::misc, sums ? size_t(most * of_thread) : 64));
  char* buffers = static_cast<char*>(scratch(Scratch::packed_a, size_t(most * buffer)));
  // The first chunk's sums lie where those of all will; those of the others follow each other.
  auto sums_of = [&](double* first, int64_t chunk, int64_t which) {
    return !first || chunk == 0 ? first : partial + (2 * (chunk - 1) + which) * n;
  };
  parallel(most, [&](int thread, int threads) {
    RowBlock b = common;
    char* weight_sums = accumulators + (sums ? thread * of_thread : 0);
    char* bias_sums = weight_sums + n * number;
    if (sums) std::fill(weight_sums, weight_sums + 2 * n * number, char(0));
    const Range r = share_of(chunks, 1, thread, threads);
    alignas(64) char terms[RowBlock::kRows * kRowTerms * 8];
    for (int64_t chunk = r.begin; chunk < r.end; chunk++) {
      double* to_weight = sums_of(call.grad_weight, chunk, 0);
      double* to_bias = sums_of(call.grad_bias, chunk, 1);
      clear(to_weight, 0, n);
      clear(to_bias, 0, n);
      const int64_t end = std::min(l.rows, (chunk + 1) * chunk_rows);
      for (int64_t begin = chunk * chunk_rows; begin < end; begin += kChain) {
        for_each_block(l, begin, std::min(end, begin + kChain), block_rows, b,
                       buffers + thread * buffer, [&](const RowBlock& block, int64_t) {
                         k.terms[type](block, call.centered, terms);
                         k.backward[type](block, terms, to_weight ? weight_sums : nullptr,
                                          to_bias ? bias_sums : nullptr);
                       });
        if (to_weight) k.flush[type](weight_sums, n, to_weight);
        if (to_bias) k.flush[type](bias_sums, n, to_bias);
      }
    }
    if (common.around_caches) k.end_stream();
    if (chunks == 1 || !sums) return;
    barrier();
    const Range c = share_of(n, 64, thread, threads);
    for (int64_t chunk = 1; chunk < chunks; chunk++)
      for (int64_t which = 0; which < 2; which++) {
        double* to = which ? call.grad_bias : call.grad_weight;
        if (!to) continue;
        const double* from = sums_of(to, chunk, which);
        for (int64_t i = c.begin; i < c.end; i++) to[i] += from[i];
      }
  });
  scratch_trim();
}

}  // namespace fastnn
