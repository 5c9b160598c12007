// Batch and group norm where the elements of a channel are neighbours. A group of threads holds a
// chunk of a unit in registers, 32 elements a thread (16 of grad and 16 of x): what it finds are
// sums of deviations from the chunk's own mean. A unit of up to 16384 (8192) elements is one chunk,
// read once and finished where it is; of larger ones the sums of all chunks are combined first, and
// a second pass begins with what the first one read last, which L2 still has.
#include "cuda/norm/coefficients.cuh"
#include "cuda/norm/statistics.cuh"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kBlock = 128;   // threads, of groups that are no more than a warp
constexpr int kTogether = 2;  // packs that are written at a time

template <int threads>
constexpr int block_of = threads > 32 ? threads : kBlock;

// Elements [first, first + total) of a unit, dealt out to a group of threads: as HeldRow's, by the
// shape alone.
template <class T, int threads>
struct Piece {
  static constexpr int kEach = Pack<T>::kEach;
  const NormLayout& l;
  int64_t image, channel, row, column;
  int thread, total, count;  // count: of its elements those that are this thread's; they come first

  __device__ Piece(const NormLayout& l, int64_t unit, int64_t first, int64_t end, int thread)
      : l(l), thread(thread), total(int(end - first)) {
    image = l.images > 1 ? unit / l.channels : 0;
    channel = unit - image * l.channels;
    row = first ? first / l.n : 0;
    column = first - row * l.n;
    const int each = l.in_packs ? kEach : 1, rest = total - thread * each;
    count = rest > 0 ? (rest + threads * each - 1) / (threads * each) * each : 0;
  }

  // The piece's element that is this thread's j-th, if j < count.
  __device__ int index(int j) const {
    return l.in_packs ? (j / kEach * threads + thread) * kEach + j % kEach : j * threads + thread;
  }
  __device__ T* begin(int o) const {
    return static_cast<T*>(l.data[o]) + image * l.image[o] + channel * l.channel[o];
  }
  __device__ __forceinline__ int64_t offset(int o, int element) const {
    const int64_t local = column + element;
    const int64_t rows = l.n > NormLayout::kDivided ? local >= l.n : l.by_n.divide(uint32_t(local));
    return (row + rows) * l.row[o] + (local - rows * l.n) * l.step[o];
  }

  // n of this thread's packs, from its `from`-th; zeros behind the end.
  template <int n>
  __device__ __forceinline__ void load(Pack<T> (&to)[n], int o, int from = 0) const {
    const T* data = begin(o);
    if (l.packed[o]) {
#pragma unroll
      for (int p = 0; p < n; p++) {
        if ((from + p) * kEach < count) {
          const int e = ((from + p) * threads + thread) * kEach;
          to[p] = *reinterpret_cast<const Pack<T>*>(data + offset(o, e));
        } else {
#pragma unroll
          for (int k = 0; k < kEach; k++) to[p].element[k] = from_float<T>(0);
        }
      }
    } else {
#pragma unroll
      for (int p = 0; p < n; p++)
#pragma unroll
        for (int k = 0; k < kEach; k++) {
          const int j = (from + p) * kEach + k;
          to[p].element[k] = j < count ? data[offset(o, index(j))] : from_float<T>(0);
        }
    }
  }
  template <int n>
  __device__ __forceinline__ void store(const Pack<T> (&x)[n], int o, int from = 0) const {
    T* data = begin(o);
    if (l.packed[o]) {
#pragma unroll
      for (int p = 0; p < n; p++) {
        if ((from + p) * kEach < count)
          *reinterpret_cast<Pack<T>*>(data + offset(o, ((from + p) * threads + thread) * kEach)) =
              x[p];
      }
    } else {
#pragma unroll
      for (int p = 0; p < n; p++)
#pragma unroll
        for (int k = 0; k < kEach; k++) {
          const int j = (from + p) * kEach + k;
          if (j < count) data[offset(o, index(j))] = x[p].element[k];
        }
    }
  }
};

// Which chunk of which unit a group of threads has. Groups without one go along with the last one's
// and write nothing.
struct Place {
  int64_t unit, chunk, item;
  bool exists;
  __device__ Place(const Pass& pass, int groups, int group) {
    const int64_t items = pass.layout.units * pass.chunks;
    item = int64_t(blockIdx.x) * groups + group;
    exists = item < items;
    if (!exists) item = items - 1;
    if (pass.stage == Stage::results) item = items - 1 - item;
    unit = pass.chunks > 1 ? item / pass.chunks : item;
    chunk = item - unit * pass.chunks;
  }
  __device__ int64_t first(const Pass& pass) const { return chunk * pass.chunk; }
  __device__ int64_t end(const Pass& pass) const {
    const int64_t end = first(pass) + pass.chunk, all = pass.layout.per_unit;
    return end < all ? end : all;
  }
};

template <class T, int threads>
__global__ void __launch_bounds__(block_of<threads>, 512 / block_of<threads>)
    plane_forward(const Pass pass) {
  constexpr int each = Pack<T>::kEach, packs = kForwardElements / each;
  constexpr int groups = block_of<threads> / threads;
  FASTNN_SHARED(typename Group<threads>::Memory, memory);
  Group<threads> group{memory};
  const int thread = int(threadIdx.x) % threads;
  const NormLayout& l = pass.layout;
  const Place place(pass, groups, int(threadIdx.x) / threads);
  const Piece<T, threads> piece(l, place.unit, place.first(pass), place.end(pass), thread);
  Pack<T> x[packs];
  piece.load(x, 0);

  // y = ((x * scale - shift) - off) * factor * w + b
  float scale = 1, shift, off = 0, factor, w = 1, b;
  if (pass.stage == Stage::results) {
    const Coefficients c = pass.coefficients[place.unit];
    shift = c.center, factor = c.scale, b = c.shift;
  } else {
    const float n = float(piece.total);
    const Moments m = moments(group, {n, pass.share, 1 / (n * pass.share)}, sqrtf(float(pass.eps)),
                              true, [&](auto f) {
#pragma unroll
                                for (int j = 0; j < packs * each; j++)
                                  if (j < piece.count) f(to_float(x[j / each].element[j % each]));
                              });
    if (pass.stage == Stage::sums) {
      if (place.exists && thread == 0)
        pass.partials[place.item] = {m.mean(), m.variance() * piece.total};
      return;
    }
    if (place.exists && thread == 0)
      pass.mean[place.unit] = m.mean(), pass.var[place.unit] = m.variance();
    scale = m.scale, shift = m.shift, off = m.off;
    factor = 1 / sqrtf(m.var + float(pass.eps) * scale * scale);
    w = read(pass.weight, piece.channel * pass.channel_share, 1);
    b = read(pass.bias, piece.channel * pass.channel_share, 0);
  }
  if (!place.exists) return;

  const bool groups_channels = pass.stage == Stage::both && pass.channel_share > 1;
  const bool within =
      l.in_packs && pass.by_channel.divisor % each == 0;  // packs are of one channel
#pragma unroll
  for (int from = 0; from < packs; from += kTogether) {
    Pack<T> y[kTogether];
    if (l.data[1]) piece.load(y, 1, from);
#pragma unroll
    for (int p = 0; p < kTogether; p++)
#pragma unroll
      for (int k = 0; k < each; k++) {
        const int j = (from + p) * each + k;
        if (groups_channels && (k == 0 || !within) && j < piece.count) {
          const int64_t c =
              piece.channel * pass.channel_share + pass.by_channel.divide(uint32_t(piece.index(j)));
          w = read(pass.weight, c, 1), b = read(pass.bias, c, 0);
        }
        const float centered = fmaf(to_float(x[from + p].element[k]), scale, -shift) - off;
        float value = centered * (factor * w) + b;
        if (l.data[1]) value += to_float(y[p].element[k]);
        if (pass.relu) value = relu_of(value);
        y[p].element[k] = from_float<T>(value);
      }
    piece.store(y, 2, from);
  }
}

template <class T, int threads>
__global__ void __launch_bounds__(block_of<threads>, 512 / block_of<threads>)
    plane_backward(const Pass pass) {
  constexpr int each = Pack<T>::kEach, packs = kBackwardElements / each;
  constexpr int groups = block_of<threads> / threads;
  FASTNN_SHARED(typename Group<threads>::Memory, memory);
  FASTNN_SHARED(Coefficients, found, [groups]);
  Group<threads> group{memory};
  const int thread = int(threadIdx.x) % threads, index = int(threadIdx.x) / threads;
  const NormLayout& l = pass.layout;
  const Place place(pass, groups, index);
  const Piece<T, threads> piece(l, place.unit, place.first(pass), place.end(pass), thread);
  Pack<T> g[packs], x[packs];
  piece.load(g, 0);
  if (pass.stage != Stage::results || pass.training) piece.load(x, 1);
  if (l.data[2]) {
    Pack<T> out[packs];
    piece.load(out, 2);
#pragma unroll
    for (int j = 0; j < packs * each; j++)
      if (to_float(out[j / each].element[j % each]) <= 0)
        g[j / each].element[j % each] = from_float<T>(0);
  }

  Coefficients c;
  if (pass.stage == Stage::results) {
    c = pass.coefficients[place.unit];
  } else {
    const double mean =
        pass.mean[pass.channel_share > 1 ? place.unit / pass.channel_share : place.unit];
    c.center = float(mean);
    float sum = 0, along = 0;
#pragma unroll
    for (int j = 0; j < packs * each; j++)
      if (j < piece.count) {
        const float grad = to_float(g[j / each].element[j % each]);
        sum += grad, along += grad * (to_float(x[j / each].element[j % each]) - c.center);
      }
    group.template reduce<Add, Add>(sum, along);
    if (pass.stage == Stage::sums) {
      if (place.exists && thread == 0) pass.partials[place.item] = {sum, along};
      return;
    }
    if (thread == 0) {
      const double inverse = inverse_deviation(pass.var[place.unit], pass.eps);
      const double by_weight = (along - rest_of(mean, c.center) * sum) * inverse;
      const float weight = read(pass.weight, place.unit, 1);
      const double share = pass.training ? double(weight) / double(piece.total) : 0;
      found[index] = backward_coefficients(mean, inverse, weight, share * sum, share * by_weight);
      if (place.exists) pass.by_weight[place.unit] = by_weight, pass.by_bias[place.unit] = sum;
    }
    __syncthreads();
    c = found[index];
  }
  if (!place.exists) return;
  if (l.data[4]) piece.store(g, 4);
#pragma unroll
  for (int j = 0; j < packs * each; j++) {
    float value = to_float(g[j / each].element[j % each]) * c.scale;
    if (pass.training)
      value += fmaf(to_float(x[j / each].element[j % each]) - c.center, c.by_x, c.shift);
    g[j / each].element[j % each] = from_float<T>(value);
  }
  piece.store(g, 3);
}

template <bool backward>
void run(const Pass& pass, void* stream) {
  const int groups = pass.threads > 32 ? 1 : kBlock / pass.threads;
  const dim3 grid(unsigned(ceil_div(pass.layout.units * pass.chunks, groups)));
  const dim3 block(unsigned(pass.threads > 32 ? pass.threads : kBlock));
  with_float_type("norm", pass.type, [&](auto zero) {
    using T = decltype(zero);
    auto* const small = backward ? plane_backward<T, 32> : plane_forward<T, 32>;
    auto* const usual = backward ? plane_backward<T, 256> : plane_forward<T, 256>;
    auto* const large = backward ? plane_backward<T, 512> : plane_forward<T, 512>;
    launch(pass.threads == 32    ? small
           : pass.threads == 256 ? usual
                                 : large,
           grid, block, 0, stream, pass);
  });
}

}  // namespace

void planes_forward(const Pass& pass, void* stream) { run<false>(pass, stream); }
void planes_backward(const Pass& pass, void* stream) { run<true>(pass, stream); }

}  // namespace fastnn::cuda
