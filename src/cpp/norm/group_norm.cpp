// The kernels are those of batch norm: an image is an array whose batch is 1, and what they give
// for each channel, or for each group where that is one run of memory, becomes what belongs to a
// group. Blocks and chunks depend on an image's shape and strides alone, and their sums are
// combined in order, so that any number of threads, and of images, gives the same bits.
#include "norm/group_norm.hpp"

#include "common/integers.hpp"
#include "norm/blocks.hpp"

namespace fastnn {
namespace {

using namespace norm;

// Of an image. Only images with few groups are shared out by chunks.
constexpr int64_t kImageChunks = 16;

// The operands of all images, and the layout of one of them.
struct Images {
  int count;
  int64_t images, channels, groups, share;  // share: channels of a group
  char* base[NormBlock::kMost];
  int64_t step[NormBlock::kMost];  // bytes to the next image
  Layout layout;

  void go_to(Layout& l, int64_t image) const {
    for (int o = 0; o < count; o++)
      if (base[o]) l.data[o] = base[o] + image * step[o];
  }
};

// by: the operand whose strides decide; grouped: a group's channels are one of the dimensions
// within it, and groups take the place of channels.
Images make_images(DType type, int dims, const int64_t* shape, int64_t groups,
                   const NormOperand* operands, int count, int by, bool grouped) {
  Images all;
  all.count = count;
  all.images = shape[0], all.channels = shape[1], all.groups = groups;
  all.share = shape[1] / groups;
  const int64_t item = int64_t(dtype_size(type));
  int64_t sizes[kMaxNormDims + 1], strides[NormBlock::kMost][kMaxNormDims + 1];
  NormOperand seen[NormBlock::kMost];
  auto put = [&](int d, int64_t size, auto stride_of) {
    sizes[d] = size;
    for (int o = 0; o < count; o++)
      strides[o][d] = operands[o].data ? stride_of(operands[o].strides) : 0;
  };
  int used = 0;
  put(used++, 1, [](const int64_t*) { return int64_t(0); });
  put(used++, grouped ? groups : all.channels,
      [&](const int64_t* s) { return grouped ? s[1] * all.share : s[1]; });
  if (grouped) put(used++, all.share, [](const int64_t* s) { return s[1]; });
  for (int d = 2; d < dims; d++) put(used++, shape[d], [d](const int64_t* s) { return s[d]; });
  for (int o = 0; o < count; o++) {
    seen[o] = {operands[o].data, strides[o]};
    all.base[o] = static_cast<char*>(operands[o].data);
    all.step[o] = operands[o].data ? operands[o].strides[0] * item : 0;
  }
  all.layout = make_layout(used, sizes, seen, count, by, item, kImageChunks);
  Layout& l = all.layout;
  if (!l.across && l.pieces == 1) l.together = NormBlock::kMostChannels;
  return all;
}

// f(c, end) for as many of the channels [begin, end) as a block may have.
template <class F>
void for_each_range(const Layout& l, int64_t begin, int64_t end, F f) {
  const int64_t most = l.across ? end - begin : l.together;
  for (int64_t c = begin; c < end; c += most) f(c, std::min(c + most, end));
}

// Of groups that one thread goes over at a time, so that later passes find them in its cache. Rows
// across all channels are not cut.
int64_t groups_together(const Layout& channels, int64_t groups, int64_t operands) {
  if (channels.across) return groups;
  const int64_t bytes = channels.per_channel * channels.channels / groups * channels.item;
  return std::clamp<int64_t>(core_cache_bytes() / 2 / (bytes * operands), 1, groups);
}

// Items are (image, groups) where there are enough of them for the threads: then each is finished
// while it is in the cache. Otherwise chunks of images are shared out, pass by pass. Either way the
// sums are the same.
//   sums(l, image, chunk, g, end), combine(l, image, g, end), write(l, image, chunk, g, end)
template <class Sums, class Combine, class Write>
void run_passes(const Images& all, Layout& l, int64_t chunks, int64_t together, int thread,
                int threads, Sums sums, Combine combine, Write write) {
  const int64_t tiles = ceil_div(all.groups, together), items = all.images * tiles;
  const int64_t pieces = l.chunks;
  if (items >= 2 * threads || (chunks == 1 && pieces == 1)) {
    const Range r = share_of(items, 1, thread, threads);
    for (int64_t i = r.begin; i < r.end; i++) {
      const int64_t image = i / tiles, g = i % tiles * together;
      const int64_t end = std::min(g + together, all.groups);
      for (int64_t chunk = 0; chunk < chunks; chunk++) sums(image, chunk, g, end);
      combine(image, g, end);
      for (int64_t chunk = 0; chunk < pieces; chunk++) write(image, chunk, g, end);
    }
    return;
  }
  const Range s = share_of(all.images * chunks, 1, thread, threads);
  for (int64_t i = s.begin; i < s.end; i++) sums(i / chunks, i % chunks, 0, all.groups);
  barrier();
  const Range c = share_of(all.images * all.groups, 1, thread, threads);
  for (int64_t i = c.begin; i < c.end; i++)
    combine(i / all.groups, i % all.groups, i % all.groups + 1);
  barrier();
  const Range w = share_of(all.images * pieces, 1, thread, threads);
  for (int64_t i = w.begin; i < w.end; i++) write(i / pieces, i % pieces, 0, all.groups);
}

}  // namespace

void group_norm(const GroupNormForward& call) {
  // In the order in which the kernel that writes wants them.
  const NormOperand operands[] = {call.x, {}, call.out};
  const BatchNormKernels& k = batch_norm_kernels();
  const int type = int(call.type);
  const bool wide = call.type == DType::f64;
  Images all = make_images(call.type, call.dims, call.shape, call.groups, operands, 3, 2, false);
  Layout& channels_layout = all.layout;
  const int64_t channels = all.channels, groups = all.groups, share = all.share;
  // A plane's statistics are those of whole groups at once.
  const bool by_group = !channels_layout.across;
  const Images summed =
      by_group ? make_images(call.type, call.dims, call.shape, groups, operands, 3, 2, true) : all;
  const Layout& sums_layout = summed.layout;
  const int64_t chunks = sums_layout.chunks, units = by_group ? groups : channels;
  const int64_t per_unit = sums_layout.per_channel;
  channels_layout.around_caches = around_caches(channels_layout, 2 * all.images);
  const int64_t together = groups_together(channels_layout, groups, 1);
  const int most = threads_for(channels_layout, 2 * all.images);

  const int64_t partial = all.images * chunks * units;
  Arrays arrays(2 * channels + 2 * partial + chunks + most * 6 * channels);
  double *weight = arrays.take(channels), *bias = arrays.take(channels);
  double *means = arrays.take(partial), *squares = arrays.take(partial);
  double *counts = arrays.take(chunks), *own = arrays.take(most * 6 * channels);
  read(k, call.weight, channels, 1, weight);
  read(k, call.bias, channels, 0, bias);
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    counts[chunk] = 0;
    for_each_block(sums_layout, chunk, 0, 1,
                   [&](const NormBlock&, int64_t count) { counts[chunk] += double(count); });
  }
  const auto& statistics = (sums_layout.across ? k.across : k.plane)[type][sums_layout.dense].stats;
  const auto& apply =
      (channels_layout.across ? k.across : k.plane)[type][channels_layout.dense].apply;

  parallel(most, [&](int thread, int threads) {
    Layout from = sums_layout, l = channels_layout;
    double* mine = own + thread * 6 * channels;
    double *unit_mean = mine, *unit_squares = mine + channels;
    Coefficients coef{wide, channels, mine + 2 * channels};
    auto find = [&](int64_t image, int64_t chunk, int64_t g, int64_t end) {
      summed.go_to(from, image);
      const int64_t scale = by_group ? 1 : share;
      for_each_range(from, g * scale, end * scale, [&](int64_t u, int64_t last) {
        double* mean = means + (image * chunks + chunk) * units + u;
        double* square = squares + (image * chunks + chunk) * units + u;
        std::fill(mean, mean + (last - u), 0.0);
        std::fill(square, square + (last - u), 0.0);
        int64_t before = 0;
        for_each_block(from, chunk, u, last, [&](const NormBlock& b, int64_t count) {
          statistics(b, before, mean, square);
          before += count;
        });
      });
    };
    // Merges what is known of units of equal size (see Merge in sums.inl).
    auto merge = [&](int64_t n, double& mean, double& var) {
      mean = unit_mean[0];
      double square = unit_squares[0];
      for (int64_t u = 1; u < n; u++) {
        const double delta = unit_mean[u] - mean, part = 1 / double(u + 1);
        mean += delta * part;
        square += unit_squares[u] + delta * delta * (double(per_unit) * double(u) * part);
      }
      var = square / (double(per_unit) * double(n));
    };
    auto combine = [&](int64_t image, int64_t g, int64_t end) {
      const int64_t each = by_group ? 1 : share;
      for (; g < end; g++) {
        const int64_t at = image * chunks * units + g * each, to = image * groups + g;
        k.combine(chunks, counts, means + at, squares + at, units, each, unit_mean, unit_squares);
        merge(each, call.mean[to], call.var[to]);
        if (std::isfinite(call.var[to]) || wide) continue;
        summed.go_to(from, image);
        for (int64_t u = 0; u < each; u++)
          wide_statistics(from, k, call.type, g * each + u, unit_mean[u], unit_squares[u]);
        merge(each, call.mean[to], call.var[to]);
      }
    };
    auto write = [&](int64_t image, int64_t chunk, int64_t g, int64_t end) {
      all.go_to(l, image);
      for (int64_t i = g; i < end; i++) {
        const double mean = call.mean[image * groups + i], rest = coef.rest(mean);
        const double inverse = 1 / std::sqrt(call.var[image * groups + i] + call.eps);
        for (int64_t c = i * share; c < (i + 1) * share; c++) {
          const double scale = weight[c] * inverse;
          coef.set(0, c, coef.rounded(mean));
          coef.set(1, c, scale);
          coef.set(2, c, std::isfinite(scale) ? bias[c] - rest * scale : bias[c]);
        }
      }
      for_each_range(l, g * share, end * share, [&](int64_t c, int64_t last) {
        const void* at[4];
        coef.at(c, at);
        for_each_block(l, chunk, c, last,
                       [&](const NormBlock& b, int64_t) { apply(b, at, false, false); });
      });
    };
    run_passes(all, l, chunks, together, thread, threads, find, combine, write);
    k.end_stream();
  });
  scratch_trim();
}

// With g = grad, x^ = (x - mean) / sqrt(var + eps) and n elements in a group: grad_weight = sum(g
// x^) and grad_bias = sum(g), over images too; grad_x = (weight g - sum(weight g) / n - x^
// sum(weight g x^) / n) / sqrt(var + eps), these sums over the group (Wu and He, arXiv:1803.08494).
void group_norm_backward(const GroupNormBackward& call) {
  const NormOperand operands[] = {call.grad, call.x, {}, call.grad_x, {}};
  const BatchNormKernels& k = batch_norm_kernels();
  const bool wide = call.type == DType::f64;
  Images all = make_images(call.type, call.dims, call.shape, call.groups, operands, 5, 3, false);
  Layout& layout = all.layout;
  const int64_t channels = all.channels, groups = all.groups, share = all.share;
  const int64_t chunks = layout.chunks;
  layout.around_caches = around_caches(layout, 3 * all.images);
  const int64_t together = groups_together(layout, groups, 2);
  const int most = threads_for(layout, 3 * all.images);
  const auto& kernel = (layout.across ? k.across : k.plane)[int(call.type)][layout.dense];

  const int64_t partial = all.images * chunks * channels;
  Arrays arrays(channels + 2 * partial + most * 4 * channels);
  double *weight = arrays.take(channels), *sums = arrays.take(partial);
  double *products = arrays.take(partial), *own = arrays.take(most * 4 * channels);
  read(k, call.weight, channels, 1, weight);

  parallel(most, [&](int thread, int threads) {
    Layout l = layout;
    Coefficients coef{wide, channels, own + thread * 4 * channels};
    auto find = [&](int64_t image, int64_t chunk, int64_t g, int64_t end) {
      all.go_to(l, image);
      for (int64_t c = g * share; c < end * share; c++)
        coef.set(0, c, coef.rounded(call.mean[image * groups + c / share]));
      for_each_range(l, g * share, end * share, [&](int64_t c, int64_t last) {
        const void* at[4];
        coef.at(c, at);
        double* sum = sums + (image * chunks + chunk) * channels + c;
        double* product = products + (image * chunks + chunk) * channels + c;
        std::fill(sum, sum + (last - c), 0.0);
        std::fill(product, product + (last - c), 0.0);
        for_each_block(l, chunk, c, last, [&](const NormBlock& b, int64_t) {
          kernel.reduce(b, at[0], false, sum, product);
        });
      });
    };
    // The sums of all chunks, in the place of the first one's: of g, and of g x^.
    auto combine = [&](int64_t image, int64_t g, int64_t end) {
      for (; g < end; g++) {
        const double rest = coef.rest(call.mean[image * groups + g]);
        const double inverse = 1 / std::sqrt(call.var[image * groups + g] + call.eps);
        for (int64_t c = g * share; c < (g + 1) * share; c++) {
          double* sum = sums + image * chunks * channels + c;
          double* product = products + image * chunks * channels + c;
          for (int64_t chunk = 1; chunk < chunks; chunk++) {
            *sum += sum[chunk * channels];
            *product += product[chunk * channels];
          }
          *product = (*product - rest * *sum) * inverse;
        }
      }
    };
    auto write = [&](int64_t image, int64_t chunk, int64_t g, int64_t end) {
      all.go_to(l, image);
      for (int64_t i = g; i < end; i++) {
        const double mean = call.mean[image * groups + i];
        const double inverse = 1 / std::sqrt(call.var[image * groups + i] + call.eps);
        double sum = 0, product = 0;
        for (int64_t c = i * share; c < (i + 1) * share; c++) {
          sum += weight[c] * sums[image * chunks * channels + c];
          product += weight[c] * products[image * chunks * channels + c];
        }
        const double n = double(l.per_channel) * double(share);
        const double by_x = -inverse * inverse * (product / n);
        const double rest = -inverse * (sum / n) - by_x * coef.rest(mean);
        for (int64_t c = i * share; c < (i + 1) * share; c++) {
          coef.set(0, c, coef.rounded(mean));
          coef.set(1, c, weight[c] * inverse);
          coef.set(2, c, by_x);
          coef.set(3, c, rest);
        }
      }
      for_each_range(l, g * share, end * share, [&](int64_t c, int64_t last) {
        const void* at[4];
        coef.at(c, at);
        for_each_block(l, chunk, c, last, [&](const NormBlock& b, int64_t) {
          kernel.backward(b, at, true, false, false);
        });
      });
    };
    run_passes(all, l, chunks, together, thread, threads, find, combine, write);
    k.end_stream();
    barrier();
    const Range r = share_of(channels, 8, thread, threads);
    for (int64_t c = r.begin; c < r.end; c++) {
      double by_weight = 0, by_bias = 0;
      for (int64_t image = 0; image < all.images; image++) {
        by_weight += products[image * chunks * channels + c];
        by_bias += sums[image * chunks * channels + c];
      }
      call.grad_weight[c] = by_weight, call.grad_bias[c] = by_bias;
    }
  });
  scratch_trim();
}

}  // namespace fastnn
