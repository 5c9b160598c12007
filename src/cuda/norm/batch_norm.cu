// The ways through batch and group norm. In planes a unit that fits the registers of a group of
// threads takes one launch, of batch norm's also in the backward. Else there are three: sums of
// chunks, their combination in order in float64, which makes coefficients of them, and the results;
// in group norm's backward a fourth adds up what the images say of weight and bias.
#include "cuda/norm/batch_norm.hpp"

#include <cmath>
#include <stdexcept>

#include "cuda/norm/coefficients.cuh"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kWarps = 4;  // of a block that combines; each has statistics of its own

// Whose statistics: of the images' groups, each of `share` channels; batch norm has one image, and
// as many groups as channels.
struct Sets {
  int64_t images, groups, share;
  int64_t per_channel;    // elements
  bool by_group, across;  // partials are of whole groups; lie chunk by chunk
};

struct Combine {
  Pass pass;
  Sets sets;
  PerChannel given_mean, given_var;
  Pair* totals;  // of each channel of each image: the gradients of weight and bias
};

__device__ inline double over_warp(double sum) {
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  return sum;
}

// Chunk k of unit u of an image's set.
__device__ inline const Pair& partial(const Combine& c, int64_t set, int64_t unit, int64_t k) {
  const int64_t units = c.sets.by_group ? 1 : c.sets.share, chunks = c.pass.chunks;
  if (!c.sets.across) return c.pass.partials[(set * units + unit) * chunks + k];
  const int64_t channels = c.sets.groups * c.sets.share, image = set / c.sets.groups;
  return c.pass.partials[(image * chunks + k) * channels + set % c.sets.groups * units + unit];
}

// Elements of a unit in chunk k.
__device__ inline double count_of(const Combine& c, int64_t k) {
  const int64_t all = c.sets.across ? c.pass.layout.rows : c.pass.layout.per_unit;
  const int64_t rest = all - k * c.pass.chunk;
  return double(rest < c.pass.chunk ? rest : c.pass.chunk);
}

// A warp has a set. Its mean is found first, and then the squares of deviations from that, so that
// no difference of large numbers is taken (Chan, Golub and LeVeque, 1983).
__global__ void __launch_bounds__(kWarps * 32) combine_forward(const Combine c) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t set = int64_t(blockIdx.x) * kWarps + int(threadIdx.x) / 32;
  const Sets& s = c.sets;
  if (set >= s.images * s.groups) return;
  double mean, var;
  if (c.given_mean.data) {
    mean = double(read(c.given_mean, set, 0)), var = double(read(c.given_var, set, 1));
  } else {
    const int64_t units = s.by_group ? 1 : s.share, parts = units * c.pass.chunks;
    const double all = double(s.per_channel) * double(s.share);
    double sum = 0, squares = 0;
    for (int64_t i = lane; i < parts; i += 32) {
      const int64_t k = i / units;
      sum += partial(c, set, i - k * units, k).a * count_of(c, k);
    }
    mean = over_warp(sum) / all;
    for (int64_t i = lane; i < parts; i += 32) {
      const int64_t k = i / units;
      const Pair& p = partial(c, set, i - k * units, k);
      squares += p.b + (p.a - mean) * (p.a - mean) * count_of(c, k);
    }
    var = over_warp(squares) / all;
  }
  if (lane == 0) c.pass.mean[set] = mean, c.pass.var[set] = var;
  const double inverse = inverse_deviation(var, c.pass.eps);
  const int64_t first = set % s.groups * s.share;
  for (int64_t q = lane; q < s.share; q += 32)
    c.pass.coefficients[set * s.share + q] = forward_coefficients(
        mean, inverse, read(c.pass.weight, first + q, 1), read(c.pass.bias, first + q, 0));
}

// A warp has a set: all lanes its one channel's chunks, or each lane some of its channels.
__global__ void __launch_bounds__(kWarps * 32) combine_backward(const Combine c) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t set = int64_t(blockIdx.x) * kWarps + int(threadIdx.x) / 32;
  const Sets& s = c.sets;
  if (set >= s.images * s.groups) return;
  const double mean = c.pass.mean[set], inverse = inverse_deviation(c.pass.var[set], c.pass.eps);
  const double rest = rest_of(mean, float(mean));
  const int64_t first = set % s.groups * s.share;
  double sum = 0, along = 0;  // of the set, times the weight
  if (s.share == 1) {
    for (int64_t k = lane; k < c.pass.chunks; k += 32) {
      const Pair& p = partial(c, set, 0, k);
      sum += p.a, along += p.b;
    }
    sum = over_warp(sum), along = (over_warp(along) - rest * sum) * inverse;
    if (lane == 0) {
      if (c.totals)
        c.totals[set] = {along, sum};
      else
        c.pass.by_weight[set] = along, c.pass.by_bias[set] = sum;
    }
    const double weight = double(read(c.pass.weight, first, 1));
    sum *= weight, along *= weight;
  } else {
    for (int64_t q = lane; q < s.share; q += 32) {
      Pair total{0, 0};
      for (int64_t k = 0; k < c.pass.chunks; k++) {
        const Pair& p = partial(c, set, q, k);
        total.a += p.a, total.b += p.b;
      }
      total = {(total.b - rest * total.a) * inverse, total.a};
      c.totals[set * s.share + q] = total;
      const double weight = double(read(c.pass.weight, first + q, 1));
      sum += weight * total.b, along += weight * total.a;
    }
    sum = over_warp(sum), along = over_warp(along);
  }
  const double n = c.pass.training ? double(s.per_channel) * double(s.share) : INFINITY;
  for (int64_t q = lane; q < s.share; q += 32)
    c.pass.coefficients[set * s.share + q] =
        backward_coefficients(mean, inverse, read(c.pass.weight, first + q, 1), sum / n, along / n);
}

__global__ void __launch_bounds__(kWarps * 32)
    sum_images(const Pair* totals, const int64_t images, const int64_t channels, double* by_weight,
               double* by_bias) {
  const int64_t channel = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (channel >= channels) return;
  Pair sum{0, 0};
  for (int64_t image = 0; image < images; image++) {
    const Pair& p = totals[image * channels + channel];
    sum.a += p.a, sum.b += p.b;
  }
  by_weight[channel] = sum.a, by_bias[channel] = sum.b;
}

__global__ void __launch_bounds__(kWarps * 32)
    update(const PerChannel running_mean, const PerChannel running_var, const int64_t channels,
           const double* mean, const double* var, const double factor, const double momentum) {
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  auto move = [&](const PerChannel& running, double statistic) {
    const double before = double(read(running, c, 0));
    write(running, c, float(before + momentum * (statistic - before)));
  };
  move(running_mean, mean[c]);
  move(running_var, var[c] * factor);
}

// ---- the ways
// ------------------------------------------------------------------------------------------------

int64_t layout_groups(const NormCall& call) { return call.groups ? call.groups : call.shape[1]; }

NormLayout layout_of(const NormCall& call, UnitKind kind, int by) {
  NormLayout l;
  if (!norm_layout(l, kind, layout_groups(call), call.dims, call.shape, call.operands,
                   kNormOperands, by, int64_t(dtype_size(call.type))))
    throw std::invalid_argument(
        "norm: operands: expected strides by which a channel's elements are rows of one stride, in "
        "channels-last one row");
  return l;
}

// How a layout is cut into chunks.
Pass cut(const NormLayout& l, int64_t item, int elements, bool whole) {
  Pass pass{};
  pass.layout = l;
  if (l.across) {
    pass.threads = across_lanes(l.channels, item);
    pass.chunk = kAcrossThreads / pass.threads * kAcrossRows;
  } else {
    auto holds = [&](int threads) { return l.per_unit <= int64_t(threads) * elements; };
    constexpr int64_t kManyUnits = 64;  // fewer leave too much of the device idle
    pass.threads =
        holds(kPlaneThreads[0]) ? kPlaneThreads[0]
        : whole && l.units >= kManyUnits && !holds(kPlaneThreads[1]) && holds(kPlaneThreads[2])
            ? kPlaneThreads[2]
            : kPlaneThreads[1];
    pass.chunk = int64_t(pass.threads) * elements;
  }
  pass.chunks = ceil_div(l.across ? l.rows : l.per_unit, pass.chunk);
  pass.share = float(std::ldexp(1.0, -int(std::ceil(std::log2(double(pass.chunk))))));
  return pass;
}

// All passes of a call, and where in the workspace what they hand on lies.
struct Plan {
  Pass sums, results;
  bool at_once;  // one launch does both
  Sets sets;
  int64_t channels, partials = 0, coefficients = 0, totals = 0;
  int64_t bytes() const {
    return partials * int64_t(sizeof(Pair)) + coefficients * int64_t(sizeof(Coefficients)) +
           totals * int64_t(sizeof(Pair));
  }
};

Plan plan(const NormCall& call, bool backward) {
  Plan p{};
  const int by = backward ? 3 : 2, elements = backward ? kBackwardElements : kForwardElements;
  const int64_t item = int64_t(dtype_size(call.type));
  const UnitKind kind = call.groups ? UnitKind::channel_of_image : UnitKind::channel;
  const NormLayout l = layout_of(call, kind, by);
  p.channels = call.shape[1];
  p.sets.images = l.images, p.sets.groups = layout_groups(call);
  p.sets.share = p.channels / p.sets.groups;
  p.sets.per_channel = l.per_unit;
  p.sets.across = l.across;
  // A plane's statistics are those of whole groups at once.
  p.sets.by_group = call.groups && !backward && !l.across;
  const bool given = call.given_mean.data;
  const NormLayout summed = p.sets.by_group ? layout_of(call, UnitKind::group_of_image, by) : l;
  p.sums = cut(summed, item, elements, !(backward && call.groups));
  p.at_once = !l.across && !given && p.sums.chunks == 1 && !(backward && call.groups);
  p.results = p.at_once ? p.sums : cut(l, item, elements, false);
  for (Pass* pass : {&p.sums, &p.results}) {
    pass->type = call.type;
    pass->weight = call.weight, pass->bias = call.bias;
    pass->channel_share = p.sets.share;
    pass->by_channel = Divisor(l.per_unit > NormLayout::kDivided ? 1 : l.per_unit);
    pass->mean = call.mean, pass->var = call.var, pass->eps = call.eps;
    pass->by_weight = call.by_weight, pass->by_bias = call.by_bias;
    pass->relu = call.relu, pass->training = call.training;
  }
  p.sums.stage = p.at_once ? Stage::both : Stage::sums, p.results.stage = Stage::results;
  if (p.at_once) return p;
  if (!given) p.partials = summed.units * p.sums.chunks;
  p.coefficients = l.units;
  if (backward && call.groups) p.totals = l.units;
  // Blocks of the second pass read their coefficients: where there are plenty, one goes over more.
  if (l.across) {
    const int64_t tiles = ceil_div(l.channels * item, int64_t(p.results.threads) * 16);
    while (p.results.chunks * tiles * l.images > 4096 && p.results.chunk < 4096) {
      p.results.chunk *= 2;
      p.results.chunks = ceil_div(l.rows, p.results.chunk);
    }
  }
  return p;
}

void run(const NormCall& call, bool backward, void* stream) {
  Plan p = plan(call, backward);
  auto* const to_pass = p.sums.layout.across ? (backward ? across_backward : across_forward)
                                             : (backward ? planes_backward : planes_forward);
  if (p.at_once) return to_pass(p.sums, stream);
  auto* const partials = static_cast<Pair*>(call.workspace);
  auto* const coefficients = reinterpret_cast<Coefficients*>(partials + p.partials);
  for (Pass* pass : {&p.sums, &p.results})
    pass->partials = partials, pass->coefficients = coefficients;
  if (p.partials) to_pass(p.sums, stream);
  const Combine c{p.sums, p.sets, call.given_mean, call.given_var,
                  p.totals ? reinterpret_cast<Pair*>(coefficients + p.coefficients) : nullptr};
  launch(backward ? combine_backward : combine_forward,
         dim3(unsigned(ceil_div(p.sets.images * p.sets.groups, kWarps))), dim3(kWarps * 32), 0,
         stream, c);
  to_pass(p.results, stream);
  if (p.totals)
    launch(sum_images, dim3(unsigned(ceil_div(p.channels, kWarps * 32))), dim3(kWarps * 32), 0,
           stream, static_cast<const Pair*>(c.totals), p.sets.images, p.channels, call.by_weight,
           call.by_bias);
}

}  // namespace

int64_t norm_workspace(const NormCall& call) { return plan(call, false).bytes(); }
int64_t norm_backward_workspace(const NormCall& call) { return plan(call, true).bytes(); }
void norm(const NormCall& call, void* stream) { run(call, false, stream); }
void norm_backward(const NormCall& call, void* stream) { run(call, true, stream); }

void update_running(const PerChannel& running_mean, const PerChannel& running_var, int64_t channels,
                    const double* mean, const double* var, double factor, double momentum,
                    void* stream) {
  launch(update, dim3(unsigned(ceil_div(channels, kWarps * 32))), dim3(kWarps * 32), 0, stream,
         running_mean, running_var, channels, mean, var, factor, momentum);
}

}  // namespace fastnn::cuda
