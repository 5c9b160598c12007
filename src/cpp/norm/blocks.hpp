// An array (N, C, ...) seen as blocks of rows, which the kernels of batch norm go over.
#pragma once
#include <algorithm>
#include <cmath>

#include "common/caches.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "norm/batch_norm.hpp"

namespace fastnn {

const BatchNormKernels& batch_norm_kernels();  // of the instruction set in use

namespace norm {

// A block is what is summed in float32; with what goes with it it fits L1.
constexpr int64_t kPlaneBlock = 4096, kAcrossRows = 128;
// Enough to share out evenly; each has sums of its own for every channel.
constexpr int64_t kChunks = 64;
// The operands seen as blocks of rows. Either the elements of a row belong to one channel (plane),
// or element i to channel i (across).
struct Layout {
  int operands;
  int64_t item;  // bytes
  char* data[NormBlock::kMost];
  bool across, dense = true;
  int64_t channels, channel[NormBlock::kMost];
  int outer = 0;
  int64_t size[kMaxNormDims], stride[NormBlock::kMost][kMaxNormDims];
  int64_t rows = 1, row[NormBlock::kMost] = {};
  int64_t n = 1, inner[NormBlock::kMost] = {};
  int64_t per_channel = 1;  // elements
  // Blocks: `groups` of rows and `pieces` of a row for each index of the outer dimensions.
  int64_t group_rows, groups, piece, pieces, blocks, chunk_blocks, chunks;
  int64_t together = 1;  // channels of a block
  bool fetch = false;    // the next channels while these are written
  bool around_caches = false;
};

// The strides of operand `by`, which is dense, decide the order of the dimensions.
inline Layout make_layout(int dims, const int64_t* shape, const NormOperand* operands, int count,
                          int by, int64_t item, int64_t most_chunks = kChunks) {
  Layout l;
  l.operands = count;
  l.item = item;
  l.channels = shape[1];
  int order[kMaxNormDims], used = 0;
  for (int d = 0; d < dims; d++) {
    if (d == 1) continue;
    l.per_channel *= shape[d];
    if (shape[d] != 1) order[used++] = d;
  }
  // A missing operand has no address and is never moved from it.
  auto stride_of = [&](int o, int d) { return operands[o].data ? operands[o].strides[d] : 0; };
  for (int o = 0; o < count; o++) {
    l.data[o] = static_cast<char*>(operands[o].data);
    l.channel[o] = stride_of(o, 1);
  }
  std::stable_sort(order, order + used,
                   [&](int a, int b) { return operands[by].strides[a] > operands[by].strides[b]; });
  int kept = 0;
  for (int i = 0; i < used; i++) {
    const int d = order[i];
    bool together = kept > 0;
    for (int o = 0; o < count; o++)
      together = together && l.stride[o][kept - 1] == stride_of(o, d) * shape[d];
    if (!together) l.size[kept++] = 1;
    l.size[kept - 1] *= shape[d];
    for (int o = 0; o < count; o++) l.stride[o][kept - 1] = stride_of(o, d);
  }
  l.across = l.channels > 1 && l.channel[by] == 1;
  auto take = [&](int64_t& n, int64_t* strides) {
    if (kept == 0) return;
    n = l.size[--kept];
    for (int o = 0; o < count; o++) strides[o] = l.stride[o][kept];
  };
  if (l.across) {
    l.n = l.channels;
    std::copy(l.channel, l.channel + count, l.inner);
  } else {
    take(l.n, l.inner);
  }
  take(l.rows, l.row);
  l.outer = kept;
  for (int o = 0; o < count; o++) l.dense = l.dense && (l.n == 1 || l.inner[o] == 1 || !l.data[o]);
  l.piece = l.across ? l.n : std::min(l.n, kPlaneBlock);
  l.pieces = l.across ? 1 : (l.n + l.piece - 1) / l.piece;
  l.group_rows = std::min(l.rows, l.across ? kAcrossRows : kPlaneBlock / l.piece);
  l.groups = (l.rows + l.group_rows - 1) / l.group_rows;
  l.blocks = l.groups * l.pieces;
  for (int d = 0; d < l.outer; d++) l.blocks *= l.size[d];
  l.chunk_blocks = (l.blocks + most_chunks - 1) / most_chunks;
  l.chunks = (l.blocks + l.chunk_blocks - 1) / l.chunk_blocks;
  return l;
}

// f(block, elements a channel) for each block of a chunk, in order, of the channels [c, end).
template <class F>
void for_each_block(const Layout& l, int64_t chunk, int64_t c, int64_t end, F f,
                    int64_t ahead = 0) {
  const int64_t last = std::min(l.blocks, (chunk + 1) * l.chunk_blocks);
  for (int64_t b = chunk * l.chunk_blocks; b < last; b++) {
    NormBlock block;
    block.ahead = ahead;
    block.around_caches = l.around_caches;
    const int64_t piece = b % l.pieces * l.piece;
    const int64_t first = b / l.pieces % l.groups * l.group_rows;
    block.rows = std::min(l.group_rows, l.rows - first);
    block.channels = l.across ? 1 : end - c;
    block.n = l.across ? end - c : std::min(l.piece, l.n - piece);
    for (int o = 0; o < NormBlock::kMost; o++) {
      block.at[o] = nullptr;
      block.row[o] = block.channel[o] = block.inner[o] = 0;
    }
    for (int o = 0; o < l.operands; o++) {
      if (!l.data[o]) continue;
      int64_t at = c * l.channel[o] + piece * l.inner[o] + first * l.row[o];
      int64_t outer = b / l.pieces / l.groups;
      for (int d = l.outer - 1; d >= 0; d--) {
        at += outer % l.size[d] * l.stride[o][d];
        outer /= l.size[d];
      }
      block.at[o] = l.data[o] + at * l.item;
      block.row[o] = l.row[o];
      block.channel[o] = l.channel[o];
      block.inner[o] = l.inner[o];
    }
    f(block, l.across ? block.rows : block.rows * block.n);
  }
}

// Whether results are better written around the caches: when `operands` as large as x are much of
// the last one, where others run too and which what was before may have filled. Short rows that end
// within a line, which two of them then write, are not. Measured on 1 core for 32x256x14x14, amid
// other work on as much memory: 0.55 ms for 0.72 in channels-last, 1.1 ms for 0.8 in planes.
inline bool around_caches(const Layout& l, int64_t operands) {
  constexpr int64_t kLine = 64, kLong = 4096;
  const int64_t row = l.n * l.item;
  return l.dense && (row % kLine == 0 || row >= kLong) &&
         l.per_channel * l.channels * l.item * operands > last_cache_bytes() / 4;
}

inline int threads_for(const Layout& l, int64_t operands) {
  constexpr double kWorthAThread = 10e-6, kBytesASecond = 40e9;  // a region costs about 5 us
  const double seconds =
      double(l.per_channel) * double(l.channels * l.item * operands) / kBytesASecond;
  return int(std::clamp<double>(seconds / kWorthAThread, 1, max_threads()));
}

// Arrays in this thread's scratch memory, one after the other.
class Arrays {
 public:
  explicit Arrays(int64_t doubles)
      : at_(static_cast<double*>(scratch(Scratch::misc, size_t(doubles) * sizeof(double)))) {}
  double* take(int64_t n) {
    double* p = at_;
    at_ += n;
    return p;
  }

 private:
  double* at_;
};

inline void read(const BatchNormKernels& k, const PerChannel& from, int64_t n, double otherwise,
                 double* to) {
  if (from.data)
    k.widen[int(from.type)](from.data, from.stride, n, to);
  else
    std::fill(to, to + n, otherwise);
}

// Coefficients are kept in the type that the kernels compute in.
struct Coefficients {
  bool wide;  // float64
  int64_t n;
  double* memory;  // four arrays of n
  void set(int which, int64_t c, double value) {
    if (wide)
      memory[which * n + c] = value;
    else
      reinterpret_cast<float*>(memory)[which * n + c] = float(value);
  }
  // What (x - mean) becomes once the mean is rounded: the rest of the mean goes into another term.
  double rounded(double mean) const { return wide ? mean : double(float(mean)); }
  double rest(double mean) const { return std::isfinite(mean) ? mean - rounded(mean) : 0; }
  // The four arrays from channel c on.
  void at(int64_t c, const void** out) const {
    for (int which = 0; which < 4; which++)
      out[which] = wide ? static_cast<const void*>(memory + which * n + c)
                        : reinterpret_cast<const float*>(memory) + which * n + c;
  }
};

// The statistics of one channel in float64, two passes: where the squares are beyond float32.
inline void wide_statistics(const Layout& l, const BatchNormKernels& k, DType type, int64_t c,
                            double& mean, double& squares) {
  constexpr int64_t kBuffer = 256;
  double buffer[kBuffer];
  const double count = double(l.per_channel);
  auto sum = [&](auto f) {
    double total = 0;
    for (int64_t chunk = 0; chunk < l.chunks; chunk++)
      for_each_block(l, chunk, c, c + 1, [&](const NormBlock& b, int64_t) {
        double block = 0;
        for (int64_t r = 0; r < b.rows; r++)
          for (int64_t i = 0; i < b.n; i += kBuffer) {
            const int64_t n = std::min(kBuffer, b.n - i);
            k.widen[int(type)](b.at[0] + (r * b.row[0] + i * b.inner[0]) * l.item, b.inner[0], n,
                               buffer);
            for (int64_t j = 0; j < n; j++) block += f(buffer[j]);
          }
        total += block;
      });
    return total;
  };
  mean = sum([](double x) { return x; }) / count;
  squares = sum([&](double x) { return (x - mean) * (x - mean); });
}

}  // namespace norm
}  // namespace fastnn
