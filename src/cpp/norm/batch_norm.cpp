// The dimensions other than the channels that lie densely together become one; what is left is cut
// into blocks, and these are shared out in chunks. Blocks and chunks depend on the shape and the
// strides alone, and their sums are combined in order, so that any number of threads gives the same
// bits.
#include "norm/batch_norm.hpp"

#include <algorithm>
#include <cmath>

#include "common/caches.hpp"
#include "common/cpu_features.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"

namespace fastnn {
namespace {

const BatchNormKernels& kernels() {
  switch (active_isa()) {
    case Isa::portable:
      break;
#ifdef FASTNN_HAS_AVX2
    case Isa::avx2:
      return avx2_batch_norm();
#endif
#ifdef FASTNN_HAS_AVX512
    case Isa::avx512:
    case Isa::amx:
    case Isa::amx_emulated:
      return avx512_batch_norm();
#endif
    default:
      break;
  }
  return portable_batch_norm();
}

// A block is what is summed in float32; with what goes with it it fits L1.
constexpr int64_t kPlaneBlock = 4096, kAcrossRows = 128;
// Enough to share out evenly; each has sums of its own for every channel.
constexpr int64_t kChunks = 64;
// Channels of one item of work, where there are few chunks.
constexpr int64_t kTile = 256;
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
Layout make_layout(int dims, const int64_t* shape, const NormOperand* operands, int count, int by,
                   int64_t item) {
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
  l.chunk_blocks = (l.blocks + kChunks - 1) / kChunks;
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

// f(chunk, c, end) for this thread's share of all chunks of all channels; the later pass goes
// backwards, since what was read last may still be in the cache.
template <class F>
void for_each_item(const Layout& l, int thread, int threads, bool backwards, F f) {
  const int64_t width = !l.across                 ? l.together
                        : l.chunks >= 4 * threads ? l.channels
                                                  : std::min(kTile, l.channels);
  const int64_t tiles = (l.channels + width - 1) / width;
  const Range r = share_of(tiles * l.chunks, 1, thread, threads);
  for (int64_t k = r.begin; k < r.end; k++) {
    const int64_t i = backwards ? r.end - 1 - (k - r.begin) : k;
    const int64_t c = i % tiles * width;
    f(i / tiles, c, std::min(c + width, l.channels));
  }
}

// Whether each thread takes whole channels: what it has summed up is then still in its cache when
// it goes over it again.
bool by_channel(const Layout& l, int threads) { return !l.across && l.channels >= 8 * threads; }

// f(c, end, ahead) for groups of this thread's channels. Those of the next group are `ahead`
// channels on, 0 if they are not worth fetching.
template <class F>
void for_each_group(const Layout& l, int thread, int threads, F f) {
  const Range r = share_of(l.channels, 1, thread, threads);
  for (int64_t c = r.begin; c < r.end; c += l.together) {
    const int64_t end = std::min(c + l.together, r.end);
    f(c, end, end < r.end && l.fetch ? l.together : 0);
  }
}

// Channels of a plane are gone over in groups of which both passes find `operands` in half of a
// core's own cache; the other half is for the next group, which is fetched while this one is
// written, be it only into the last cache. The longer the run that the channels of an image make,
// the less often does the hardware have to find out where to fetch next.
void group_channels(Layout& l, int64_t operands) {
  if (l.across) return;
  const int64_t channel = l.per_channel * l.item * operands;
  l.fetch = channel <= last_cache_bytes() / 8;
  // What is cut into pieces lies in order without its neighbours.
  if (l.pieces == 1)
    l.together = std::clamp<int64_t>(core_cache_bytes() / 2 / channel, 1, NormBlock::kMostChannels);
}

// Whether results are better written around the caches: when `operands` as large as x are much of
// the last one, where others run too and which what was before may have filled. Short rows that end
// within a line, which two of them then write, are not. Measured on 1 core for 32x256x14x14, amid
// other work on as much memory: 0.55 ms for 0.72 in channels-last, 1.1 ms for 0.8 in planes.
bool around_caches(const Layout& l, int64_t operands) {
  constexpr int64_t kLine = 64, kLong = 4096;
  const int64_t row = l.n * l.item;
  return l.dense && (row % kLine == 0 || row >= kLong) &&
         l.per_channel * l.channels * l.item * operands > last_cache_bytes() / 4;
}

int threads_for(const Layout& l, int64_t operands) {
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

void read(const BatchNormKernels& k, const PerChannel& from, int64_t n, double otherwise,
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
void wide_statistics(const Layout& l, const BatchNormKernels& k, DType type, int64_t c,
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

}  // namespace

void batch_norm(const BatchNormForward& call) {
  const NormOperand operands[] = {call.x, call.residual, call.out};
  const bool wide = call.type == DType::f64;
  Layout l = make_layout(call.dims, call.shape, operands, 3, 2, int64_t(dtype_size(call.type)));
  l.around_caches = around_caches(l, 2);
  group_channels(l, 1);
  const BatchNormKernels& k = kernels();
  const auto& kernel = (l.across ? k.across : k.plane)[int(call.type)][l.dense];
  const int64_t channels = l.channels;
  const bool given = call.given_mean.data != nullptr;
  const int64_t partial = given ? 0 : l.chunks * channels;
  Arrays arrays(6 * channels + 2 * partial + l.chunks);
  double *weight = arrays.take(channels), *bias = arrays.take(channels);
  Coefficients coef{wide, channels, arrays.take(4 * channels)};
  double *means = arrays.take(partial), *squares = arrays.take(partial);
  double* counts = arrays.take(l.chunks);
  read(k, call.weight, channels, 1, weight);
  read(k, call.bias, channels, 0, bias);

  auto find_coefficients = [&](int64_t c) {
    const double scale = weight[c] / std::sqrt(call.var[c] + call.eps);
    const double rest = coef.rest(call.mean[c]);
    coef.set(0, c, coef.rounded(call.mean[c]));
    coef.set(1, c, scale);
    coef.set(2, c, std::isfinite(scale) ? bias[c] - rest * scale : bias[c]);
  };
  auto find_statistics = [&](int64_t chunk, int64_t c, int64_t end) {
    double *mean = means + chunk * channels + c, *square = squares + chunk * channels + c;
    std::fill(mean, mean + (end - c), 0.0);
    std::fill(square, square + (end - c), 0.0);
    int64_t before = 0;
    for_each_block(l, chunk, c, end, [&](const NormBlock& b, int64_t count) {
      kernel.stats(b, before, mean, square);
      before += count;
    });
    counts[chunk] = double(before);  // the same whoever writes it
  };
  auto combine = [&](int64_t begin, int64_t end) {
    k.combine(l.chunks, counts, means + begin, squares + begin, channels, end - begin,
              call.mean + begin, call.var + begin);
    for (int64_t c = begin; c < end; c++) {
      if (!std::isfinite(call.var[c]) && !wide)
        wide_statistics(l, k, call.type, c, call.mean[c], call.var[c]);
      call.var[c] /= double(l.per_channel);
      find_coefficients(c);
    }
  };
  auto normalize_and_fetch = [&](int64_t chunk, int64_t c, int64_t end, int64_t ahead) {
    const void* at[4];
    coef.at(c, at);
    for_each_block(
        l, chunk, c, end,
        [&](const NormBlock& b, int64_t) {
          kernel.apply(b, at, call.residual.data != nullptr, call.relu);
        },
        ahead);
  };
  auto normalize = [&](int64_t chunk, int64_t c, int64_t end) {
    normalize_and_fetch(chunk, c, end, 0);
  };

  if (given) {
    read(k, call.given_mean, channels, 0, call.mean);
    read(k, call.given_var, channels, 1, call.var);
    for (int64_t c = 0; c < channels; c++) find_coefficients(c);
  }
  parallel(threads_for(l, 2), [&](int thread, int threads) {
    if (!given && by_channel(l, threads)) {
      for_each_group(l, thread, threads, [&](int64_t c, int64_t end, int64_t ahead) {
        for (int64_t chunk = 0; chunk < l.chunks; chunk++) find_statistics(chunk, c, end);
        combine(c, end);
        for (int64_t chunk = 0; chunk < l.chunks; chunk++)
          normalize_and_fetch(chunk, c, end, ahead * l.channel[0]);
      });
      k.end_stream();
      return;
    }
    if (!given) {
      for_each_item(l, thread, threads, false, find_statistics);
      barrier();
      const Range r = share_of(channels, 1, thread, threads);
      combine(r.begin, r.end);
      barrier();
    }
    for_each_item(l, thread, threads, !given, normalize);
    k.end_stream();
  });
  scratch_trim();
}

// With g = grad where the relu let x pass, x^ = (x - mean) / sqrt(var + eps) and n elements:
// grad_weight = sum g x^, grad_bias = sum g, grad_x = weight / sqrt(var + eps) * g where the
// statistics are given, else weight / sqrt(var + eps) * (g - grad_bias / n - x^ grad_weight / n)
// (Ioffe and Szegedy, arXiv:1502.03167).
void batch_norm_backward(const BatchNormBackward& call) {
  const NormOperand operands[] = {call.grad, call.x, call.out, call.grad_x, call.grad_residual};
  const bool wide = call.type == DType::f64, relu = call.out.data != nullptr;
  const bool residual = call.grad_residual.data != nullptr;
  Layout l = make_layout(call.dims, call.shape, operands, 5, 3, int64_t(dtype_size(call.type)));
  l.around_caches = around_caches(l, 3);
  group_channels(l, relu ? 3 : 2);
  const BatchNormKernels& k = kernels();
  const auto& kernel = (l.across ? k.across : k.plane)[int(call.type)][l.dense];
  const int64_t channels = l.channels, partial = l.chunks * channels;
  Arrays arrays(5 * channels + 2 * partial);
  double* weight = arrays.take(channels);
  Coefficients coef{wide, channels, arrays.take(4 * channels)};
  double *sums = arrays.take(partial), *products = arrays.take(partial);
  read(k, call.weight, channels, 1, weight);
  for (int64_t c = 0; c < channels; c++) {
    coef.set(0, c, coef.rounded(call.mean[c]));
    coef.set(1, c, weight[c] / std::sqrt(call.var[c] + call.eps));
  }

  auto sum_block = [&](const NormBlock& b, int64_t chunk, int64_t c, const void* center) {
    kernel.reduce(b, center, relu, sums + chunk * channels + c, products + chunk * channels + c);
  };
  auto clear = [&](int64_t chunk, int64_t c, int64_t end) {
    std::fill(sums + chunk * channels + c, sums + chunk * channels + end, 0.0);
    std::fill(products + chunk * channels + c, products + chunk * channels + end, 0.0);
  };
  auto sum_up = [&](int64_t chunk, int64_t c, int64_t end) {
    const void* at[4];
    coef.at(c, at);
    clear(chunk, c, end);
    for_each_block(l, chunk, c, end,
                   [&](const NormBlock& b, int64_t) { sum_block(b, chunk, c, at[0]); });
  };
  auto combine = [&](int64_t begin, int64_t end) {
    for (int64_t chunk = 1; chunk < l.chunks; chunk++)
      for (int64_t c = begin; c < end; c++) {
        sums[c] += sums[chunk * channels + c];
        products[c] += products[chunk * channels + c];
      }
    const double n = double(l.per_channel);
    for (int64_t c = begin; c < end; c++) {
      const double deviation = 1 / std::sqrt(call.var[c] + call.eps), sum = sums[c];
      const double rest = coef.rest(call.mean[c]);
      const double grad_weight = (products[c] - rest * sum) * deviation;
      call.grad_weight[c] = grad_weight;
      call.grad_bias[c] = sum;
      const double by_x = -weight[c] * deviation * deviation * (grad_weight / n);
      coef.set(2, c, by_x);
      coef.set(3, c, -weight[c] * deviation * (sum / n) - by_x * rest);
    }
  };
  auto find_gradient_and_fetch = [&](int64_t chunk, int64_t c, int64_t end, int64_t ahead) {
    const void* at[4];
    coef.at(c, at);
    for_each_block(
        l, chunk, c, end,
        [&](const NormBlock& b, int64_t) { kernel.backward(b, at, true, residual, relu); }, ahead);
  };
  auto find_gradient = [&](int64_t chunk, int64_t c, int64_t end) {
    find_gradient_and_fetch(chunk, c, end, 0);
  };
  // Statistics that do not depend on x: the gradient of a block needs no sums.
  auto in_one_pass = [&](int64_t chunk, int64_t c, int64_t end) {
    const void* at[4];
    coef.at(c, at);
    clear(chunk, c, end);
    for_each_block(l, chunk, c, end, [&](const NormBlock& b, int64_t) {
      sum_block(b, chunk, c, at[0]);
      kernel.backward(b, at, false, residual, relu);
    });
  };

  parallel(threads_for(l, 3), [&](int thread, int threads) {
    if (call.training && by_channel(l, threads)) {
      for_each_group(l, thread, threads, [&](int64_t c, int64_t end, int64_t ahead) {
        for (int64_t chunk = 0; chunk < l.chunks; chunk++) sum_up(chunk, c, end);
        combine(c, end);
        for (int64_t chunk = 0; chunk < l.chunks; chunk++)
          find_gradient_and_fetch(chunk, c, end, ahead * l.channel[1]);
      });
      k.end_stream();
      return;
    }
    for_each_item(l, thread, threads, false, [&](int64_t chunk, int64_t c, int64_t end) {
      call.training ? sum_up(chunk, c, end) : in_one_pass(chunk, c, end);
    });
    if (!call.training) k.end_stream();
    barrier();
    const Range r = share_of(channels, 1, thread, threads);
    combine(r.begin, r.end);
    if (!call.training) return;
    barrier();
    for_each_item(l, thread, threads, true, find_gradient);
    k.end_stream();
  });
  scratch_trim();
}

void update_running(const PerChannel& running, int64_t channels, const double* statistic,
                    double factor, double momentum) {
  const BatchNormKernels& k = kernels();
  constexpr int64_t kBuffer = 256;
  double buffer[kBuffer];
  for (int64_t c = 0; c < channels; c += kBuffer) {
    const int64_t n = std::min(kBuffer, channels - c);
    char* at =
        static_cast<char*>(running.data) + c * running.stride * int64_t(dtype_size(running.type));
    k.widen[int(running.type)](at, running.stride, n, buffer);
    for (int64_t i = 0; i < n; i++) {
      // As torch.lerp, which is exact at both ends.
      const double from = buffer[i], to = statistic[c + i] * factor, way = to - from;
      buffer[i] = std::abs(momentum) < 0.5 ? from + momentum * way : to - way * (1 - momentum);
    }
    k.narrow[int(running.type)](buffer, n, at, running.stride);
  }
}

void narrow(const double* from, int64_t n, void* to, DType type) {
  kernels().narrow[int(type)](from, n, to, 1);
}

}  // namespace fastnn
