// The dimensions other than the channels that lie densely together become one; what is left is cut
// into blocks, and these are shared out in chunks. Blocks and chunks depend on the shape and the
// strides alone, and their sums are combined in order, so that any number of threads gives the same
// bits.
#include "norm/batch_norm.hpp"

#include <algorithm>
#include <cmath>

#include "common/caches.hpp"
#include "common/kernels_of.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "norm/blocks.hpp"

namespace fastnn {
const BatchNormKernels& batch_norm_kernels() { return FASTNN_KERNELS_OF(batch_norm); }

namespace {

using namespace norm;

// Channels of one item of work, where there are few chunks.
constexpr int64_t kTile = 256;
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

}  // namespace

void batch_norm(const BatchNormForward& call) {
  const NormOperand operands[] = {call.x, call.residual, call.out};
  const bool wide = call.type == DType::f64;
  Layout l = make_layout(call.dims, call.shape, operands, 3, 2, int64_t(dtype_size(call.type)));
  l.around_caches = around_caches(l, 2);
  group_channels(l, 1);
  const BatchNormKernels& k = batch_norm_kernels();
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
  const BatchNormKernels& k = batch_norm_kernels();
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
  const BatchNormKernels& k = batch_norm_kernels();
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
  batch_norm_kernels().narrow[int(type)](from, n, to, 1);
}

}  // namespace fastnn
