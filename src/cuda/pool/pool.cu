// Pooling: a thread computes one element, of 16 bytes of channels where they lie together; averages
// of large windows, such as whole images, are shared by the threads of a block. The gradients
// gather: each element of the input asks the windows that contain it, in their order, so that no
// sum needs atomics.
#include "cuda/pool/pool.hpp"

#include <algorithm>

#include "cuda/conv/lanes.cuh"
#include "cuda/divisor.cuh"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMostBlocks = 65535;
constexpr int64_t kLarge = 256;  // elements of a window from which on a block has it

// The windows along one axis. kernel: how many taps the largest has. Of adaptive ones the product
// of both sizes is below 2^32: divisions of 64 bits would be calls.
struct Windows {
  int in, out, kernel, stride, padding, dilation;
  bool adaptive;
};

// Of one window: where tap 0 lies, and its taps inside of the input.
struct Window {
  int begin, first, end;
};

__host__ __device__ __forceinline__ Window window_of(const Windows& w, int o) {
  if (w.adaptive) {
    const int begin = int(unsigned(o) * unsigned(w.in) / unsigned(w.out));
    return {begin, 0,
            int((unsigned(o + 1) * unsigned(w.in) + w.out - 1) / unsigned(w.out)) - begin};
  }
  const int begin = o * w.stride - w.padding;
  const int beyond = begin < w.in ? (w.in - begin + w.dilation - 1) / w.dilation : 0;
  return {begin, begin < 0 ? (-begin + w.dilation - 1) / w.dilation : 0,
          beyond < w.kernel ? beyond : w.kernel};
}

// What the axis adds to the number that an average's sum is divided by.
__device__ __forceinline__ int count_of(const Windows& w, const Window& window,
                                        bool include_padding) {
  if (w.adaptive || !include_padding) return window.end - window.first;
  const int end = window.begin + w.kernel, most = w.in + w.padding;
  return (end < most ? end : most) - window.begin;
}

// The windows that contain element i: from `first` to `end`, those of which a tap meets it.
struct Users {
  int first, end;
};

__device__ __forceinline__ Users users_of(const Windows& w, int i) {
  if (w.adaptive)
    return {int(unsigned(i) * unsigned(w.out) / unsigned(w.in)),
            int((unsigned(i + 1) * unsigned(w.out) + w.in - 1) / unsigned(w.in))};
  const int at = i + w.padding, before = at - (w.kernel - 1) * w.dilation;
  const int end = at / w.stride + 1;
  return {before > 0 ? (before + w.stride - 1) / w.stride : 0, end < w.out ? end : w.out};
}

// The tap of window o that meets element i, or -1.
__device__ __forceinline__ int tap_at(const Windows& w, int o, int i) {
  const int from = i - window_of(w, o).begin;
  return from % w.dilation ? -1 : from / w.dilation;
}

struct Call {
  Windows axis[3];
  PoolTensor x, out, codes;
  bool wide_codes, include_padding;
  float divisor;
  // A thread's number: channels fastest, or elements. Each is the number of what follows it.
  bool channels_first;
  Divisor pieces, columns, lines, planes;
  unsigned threads;  // of an image
  int64_t images;
};

// The element of a thread: the first of its channels, and its place.
struct Mine {
  int channel, at[3];
};

__device__ __forceinline__ Mine mine_of(const Call& c, unsigned rest, int lanes) {
  Mine m;
  unsigned piece;
  if (c.channels_first) {
    m.at[0] = int(c.planes.take(rest)), m.at[1] = int(c.lines.take(rest));
    m.at[2] = int(c.columns.take(rest)), piece = rest;
  } else {
    piece = c.pieces.take(rest);
    m.at[0] = int(c.planes.take(rest)), m.at[1] = int(c.lines.take(rest)), m.at[2] = int(rest);
  }
  m.channel = int(piece) * lanes;
  return m;
}

__device__ __forceinline__ int64_t element(const PoolTensor& t, int64_t image, int channel) {
  return image * t.stride[0] + channel * t.stride[1];
}
__device__ __forceinline__ int64_t element(const PoolTensor& t, int64_t image, const Mine& m) {
  return element(t, image, m.channel) + m.at[0] * t.stride[2] + m.at[1] * t.stride[3] +
         m.at[2] * t.stride[4];
}

template <int lanes>
__device__ __forceinline__ void read_codes(int (&to)[lanes], const Call& c, int64_t at) {
  if (c.wide_codes) {
    const auto codes = Lanes<int, lanes>::at(c.codes.data, at);
#pragma unroll
    for (int e = 0; e < lanes; e++) to[e] = codes.lane[e];
  } else {
    const auto codes = Lanes<uint8_t, lanes>::at(c.codes.data, at);
#pragma unroll
    for (int e = 0; e < lanes; e++) to[e] = codes.lane[e];
  }
}

template <int lanes, class Code>
__device__ __forceinline__ void write_codes(const int (&codes)[lanes], const Call& c, int64_t at) {
  Lanes<Code, lanes> out;
#pragma unroll
  for (int e = 0; e < lanes; e++) out.lane[e] = Code(codes[e]);
  *reinterpret_cast<Lanes<Code, lanes>*>(static_cast<Code*>(c.codes.data) + at) = out;
}

// Element of window m.at: the maximum with its code, or the average.
template <class T, int lanes, bool maximum>
__device__ __forceinline__ void reduce(const Call& c, const Mine& m, int64_t image) {
  Window w[3];
  float divisor = 1;
#pragma unroll
  for (int d = 0; d < 3; d++) {
    w[d] = window_of(c.axis[d], m.at[d]);
    divisor *= float(count_of(c.axis[d], w[d], c.include_padding));
  }
  if (c.divisor != 0) divisor = c.divisor;
  float found[lanes];
  int codes[lanes];
  const int start = (w[0].first * c.axis[1].kernel + w[1].first) * c.axis[2].kernel + w[2].first;
#pragma unroll
  for (int e = 0; e < lanes; e++) found[e] = maximum ? -INFINITY : 0, codes[e] = start;
  const int64_t from = element(c.x, image, m.channel);
  for (int i = w[0].first; i < w[0].end; i++)
    for (int j = w[1].first; j < w[1].end; j++) {
      const int64_t line = from + (w[0].begin + i * c.axis[0].dilation) * c.x.stride[2] +
                           (w[1].begin + j * c.axis[1].dilation) * c.x.stride[3];
      const int code = (i * c.axis[1].kernel + j) * c.axis[2].kernel;
#pragma unroll 4
      for (int k = w[2].first; k < w[2].end; k++) {
        const auto x = Lanes<T, lanes>::at(
            c.x.data, line + (w[2].begin + k * c.axis[2].dilation) * c.x.stride[4]);
#pragma unroll
        for (int e = 0; e < lanes; e++) {
          const float value = to_float(x.lane[e]);
          if constexpr (!maximum)
            found[e] += value;
          else if (value > found[e] || value != value)  // the first, or the last NaN
            found[e] = value, codes[e] = code + k;
        }
      }
    }
  Lanes<T, lanes> out;
#pragma unroll
  for (int e = 0; e < lanes; e++)
    out.lane[e] = from_float<T>(maximum ? found[e] : found[e] / divisor);
  *reinterpret_cast<Lanes<T, lanes>*>(static_cast<T*>(c.out.data) + element(c.out, image, m)) = out;
  if (!maximum || !c.codes.data) return;
  const int64_t at = element(c.codes, image, m);
  c.wide_codes ? write_codes<lanes, int>(codes, c, at) : write_codes<lanes, uint8_t>(codes, c, at);
}

// Element m.at of the input: the sum of what the windows that contain it have to give.
template <class T, int lanes, bool maximum>
__device__ __forceinline__ void gather_gradient(const Call& c, const Mine& m, int64_t image) {
  Users users[3];
#pragma unroll
  for (int d = 0; d < 3; d++) users[d] = users_of(c.axis[d], m.at[d]);
  float sums[lanes] = {};
  for (int i = users[0].first; i < users[0].end; i++)
    for (int j = users[1].first; j < users[1].end; j++)
      for (int k = users[2].first; k < users[2].end; k++) {
        const Mine user{m.channel, {i, j, k}};
        int tap[3];
#pragma unroll
        for (int d = 0; d < 3; d++) tap[d] = tap_at(c.axis[d], user.at[d], m.at[d]);
        if (tap[0] < 0 || tap[1] < 0 || tap[2] < 0) continue;
        const auto grad = Lanes<T, lanes>::at(c.out.data, element(c.out, image, user));
        if constexpr (maximum) {
          const int mine = (tap[0] * c.axis[1].kernel + tap[1]) * c.axis[2].kernel + tap[2];
          int codes[lanes];
          read_codes(codes, c, element(c.codes, image, user));
#pragma unroll
          for (int e = 0; e < lanes; e++)
            if (codes[e] == mine) sums[e] += to_float(grad.lane[e]);
        } else {
          float divisor = c.divisor;
          if (divisor == 0) {
            divisor = 1;
#pragma unroll
            for (int d = 0; d < 3; d++)
              divisor *=
                  float(count_of(c.axis[d], window_of(c.axis[d], user.at[d]), c.include_padding));
          }
#pragma unroll
          for (int e = 0; e < lanes; e++) sums[e] += to_float(grad.lane[e]) / divisor;
        }
      }
  Lanes<T, lanes> out;
#pragma unroll
  for (int e = 0; e < lanes; e++) out.lane[e] = from_float<T>(sums[e]);
  *reinterpret_cast<Lanes<T, lanes>*>(static_cast<T*>(c.x.data) + element(c.x, image, m)) = out;
}

// What the code of window m.at points at: its place in the plane, or the input's element there.
// A code that no window has points at the nearest element.
template <class T, bool indices>
__device__ __forceinline__ void follow(const Call& c, const Mine& m, int64_t image) {
  int code[1], at[3];
  read_codes(code, c, element(c.codes, image, m));
  int rest = code[0] < 0 ? 0 : code[0];
#pragma unroll
  for (int d = 2; d >= 0; d--) {
    const Windows& w = c.axis[d];
    const int place = window_of(w, m.at[d]).begin + rest % w.kernel * w.dilation;
    rest /= w.kernel;
    at[d] = place < 0 ? 0 : place < w.in ? place : w.in - 1;
  }
  const int64_t to = element(c.out, image, m);
  if constexpr (indices) {
    static_cast<int64_t*>(c.out.data)[to] =
        (int64_t(at[0]) * c.axis[1].in + at[1]) * c.axis[2].in + at[2];
  } else {
    static_cast<T*>(c.out.data)[to] = static_cast<const T*>(
        c.x.data)[element(c.x, image, Mine{m.channel, {at[0], at[1], at[2]}})];
  }
}

// Without the number of blocks the compiler takes 64 registers for the limit, and spills.
template <PoolJob job, class T, int lanes>
__global__ void __launch_bounds__(kThreads, 5) pool_elements(const Call c) {
  const unsigned index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= c.threads) return;
  const Mine m = mine_of(c, index, lanes);
  for (int64_t image = blockIdx.y; image < c.images; image += gridDim.y) {
    if constexpr (job == kPoolMax || job == kPoolAvg)
      reduce<T, lanes, job == kPoolMax>(c, m, image);
    else if constexpr (job == kPoolScatter || job == kPoolAvgBackward)
      gather_gradient<T, lanes, job == kPoolScatter>(c, m, image);
    else
      follow<T, job == kPoolIndices>(c, m, image);
  }
}

// Averages of large windows: `across` threads have neighbouring pieces of channels, those behind
// them other elements of the window; what they find is added up in a fixed order.
template <class T, int lanes, int across>
__global__ void __launch_bounds__(kThreads) large_averages(const Call c, const int pieces) {
  constexpr int kRows = kThreads / across, kWidth = across * lanes;
  FASTNN_SHARED(float, found, [kRows * kWidth]);
  const int row = int(threadIdx.x) / across, piece = int(threadIdx.x) % across;
  unsigned rest = blockIdx.x;
  const Mine m{int(c.pieces.take(rest) * across + piece) * lanes,
               {int(c.planes.take(rest)), int(c.lines.take(rest)), int(rest)}};
  Window w[3];
  float divisor = 1;
#pragma unroll
  for (int d = 0; d < 3; d++) {
    w[d] = window_of(c.axis[d], m.at[d]);
    divisor *= float(count_of(c.axis[d], w[d], c.include_padding));
  }
  if (c.divisor != 0) divisor = c.divisor;
  const int depth = w[0].end - w[0].first, height = w[1].end - w[1].first,
            width = w[2].end - w[2].first;
  for (int64_t image = blockIdx.y; image < c.images; image += gridDim.y) {
    float sums[lanes] = {};
    if (m.channel < pieces * lanes) {
      const int64_t from = element(c.x, image, m.channel);
#pragma unroll 4
      for (int i = row; i < depth * height * width; i += kRows) {
        const int line = i / width;
        const int at[3] = {w[0].begin + (w[0].first + line / height) * c.axis[0].dilation,
                           w[1].begin + (w[1].first + line % height) * c.axis[1].dilation,
                           w[2].begin + (w[2].first + i % width) * c.axis[2].dilation};
        const auto x = Lanes<T, lanes>::at(
            c.x.data, from + at[0] * c.x.stride[2] + at[1] * c.x.stride[3] + at[2] * c.x.stride[4]);
#pragma unroll
        for (int e = 0; e < lanes; e++) sums[e] += to_float(x.lane[e]);
      }
    }
#pragma unroll
    for (int e = 0; e < lanes; e++) found[row * kWidth + piece * lanes + e] = sums[e];
    for (int half = kRows / 2; half > 0; half /= 2) {
      __syncthreads();
      for (int i = int(threadIdx.x); i < half * kWidth; i += kThreads)
        found[i] += found[half * kWidth + i];
    }
    __syncthreads();
    if (row == 0 && m.channel < pieces * lanes) {
      Lanes<T, lanes> out;
#pragma unroll
      for (int e = 0; e < lanes; e++)
        out.lane[e] = from_float<T>(found[piece * lanes + e] / divisor);
      *reinterpret_cast<Lanes<T, lanes>*>(static_cast<T*>(c.out.data) + element(c.out, image, m)) =
          out;
    }
    __syncthreads();  // before the next image's sums
  }
}

// Whether 16 bytes of a tensor's channels lie together, or as many codes.
bool has_lanes(const PoolTensor& t, int64_t lanes, int64_t size) {
  if (!t.data) return true;
  bool yes = t.stride[1] == 1 && reinterpret_cast<uintptr_t>(t.data) % (lanes * size) == 0;
  for (const int d : {0, 2, 3, 4}) yes = yes && t.stride[d] % lanes == 0;
  return yes;
}

Windows windows_of(const PoolAxis& a) {
  if (a.in < 1 || a.out < 1 || a.kernel < 0 || a.stride < 1 || a.padding < 0 || a.dilation < 1)
    throw std::invalid_argument("pool: windows: expected positive sizes");
  constexpr int64_t most = int64_t(1) << 30;
  if (a.in + a.padding >= most || a.out * std::max<int64_t>(a.stride, 1) >= most ||
      a.kernel * a.dilation >= most)
    throw std::invalid_argument("pool: windows: expected sizes below 2^30");
  Windows w{int(a.in),      int(a.out),      int(a.kernel), int(a.stride),
            int(a.padding), int(a.dilation), false};
  if (a.kernel == 0 && a.in % a.out == 0) {
    w.kernel = w.stride = int(a.in / a.out), w.padding = 0, w.dilation = 1;
  } else if (a.kernel == 0) {
    if ((a.in + 1) * (a.out + 1) >= int64_t(1) << 32)
      throw std::invalid_argument("pool: windows: expected adaptive ones of sizes below 2^16");
    w.adaptive = true, w.padding = 0, w.stride = w.dilation = 1;
  }
  int most_taps = 0;
  for (int o = 0; o < w.out; o++) {
    const Window window = window_of(w, o);
    if (window.end <= window.first)
      throw std::invalid_argument("pool: windows: one without any element");
    most_taps = std::max(most_taps, window.end);
  }
  if (w.adaptive) w.kernel = most_taps;
  return w;
}

template <PoolJob job, class T, int lanes>
void run(Call& c, const PoolCall& call, void* stream) {
  constexpr bool of_input = job == kPoolScatter || job == kPoolAvgBackward;
  const PoolTensor& to = of_input ? c.x : c.out;
  const int64_t pieces = call.channels / lanes;
  int64_t size[3];
  for (int d = 0; d < 3; d++) size[d] = of_input ? c.axis[d].in : c.axis[d].out;
  const int64_t threads = pieces * size[0] * size[1] * size[2];
  if (threads >= int64_t(1) << 31)
    throw std::invalid_argument("pool: x: expected images of fewer than 2^31 elements");
  if (threads == 0 || c.images == 0) return;
  c.threads = unsigned(threads);
  c.channels_first = lanes > 1 || to.stride[1] == 1;
  if (c.channels_first) {
    c.planes = Divisor(size[1] * size[2] * pieces), c.lines = Divisor(size[2] * pieces);
    c.columns = Divisor(pieces);
  } else {
    c.pieces = Divisor(size[0] * size[1] * size[2]), c.planes = Divisor(size[1] * size[2]);
    c.lines = Divisor(size[2]);
  }
  launch(pool_elements<job, T, lanes>,
         dim3(unsigned(ceil_div(threads, kThreads)), unsigned(std::min(c.images, kMostBlocks))),
         dim3(kThreads), 0, stream, c);
}

template <class T, int lanes>
void run_large_averages(Call& c, const PoolCall& call, void* stream) {
  constexpr int across = lanes > 1 ? 4 : 1;
  const int64_t pieces = call.channels / lanes, size1 = c.axis[1].out, size2 = c.axis[2].out;
  const int64_t blocks = ceil_div(pieces, across) * c.axis[0].out * size1 * size2;
  if (blocks >= int64_t(1) << 31)
    throw std::invalid_argument("pool: x: expected images of fewer than 2^31 elements");
  if (blocks == 0 || c.images == 0) return;
  c.pieces = Divisor(c.axis[0].out * size1 * size2), c.planes = Divisor(size1 * size2);
  c.lines = Divisor(size2);
  launch(large_averages<T, lanes, across>,
         dim3(unsigned(blocks), unsigned(std::min(c.images, kMostBlocks))), dim3(kThreads), 0,
         stream, c, int(pieces));
}

}  // namespace

void pool(PoolJob job, const PoolCall& call, void* stream) {
  Call c{};
  for (int d = 0; d < 3; d++) c.axis[d] = windows_of(call.axis[d]);
  int64_t taps = 1;
  for (const Windows& w : c.axis) taps *= w.kernel;
  if (taps > kMostTaps)
    throw std::invalid_argument("pool: windows: expected at most 2^24 elements in each");
  c.x = call.x, c.out = call.out, c.codes = call.codes;
  c.wide_codes = call.wide_codes, c.include_padding = call.include_padding;
  c.divisor = float(call.divisor), c.images = call.batch;
  if (job == kPoolIndices) return run<kPoolIndices, float, 1>(c, call, stream);
  with_float_type("pool", call.type, [&](auto zero) {
    using T = decltype(zero);
    constexpr int lanes = kLanes<T>;
    if (job == kPoolGather) return run<kPoolGather, T, 1>(c, call, stream);
    const bool wide = call.channels % lanes == 0 && has_lanes(c.x, lanes, sizeof(T)) &&
                      has_lanes(c.out, lanes, sizeof(T)) &&
                      has_lanes(c.codes, lanes, c.wide_codes ? 4 : 1);
    switch (job) {
      case kPoolMax:
        return wide ? run<kPoolMax, T, lanes>(c, call, stream)
                    : run<kPoolMax, T, 1>(c, call, stream);
      case kPoolScatter:
        return wide ? run<kPoolScatter, T, lanes>(c, call, stream)
                    : run<kPoolScatter, T, 1>(c, call, stream);
      case kPoolAvg:
        if (taps >= kLarge)
          return wide ? run_large_averages<T, lanes>(c, call, stream)
                      : run_large_averages<T, 1>(c, call, stream);
        return wide ? run<kPoolAvg, T, lanes>(c, call, stream)
                    : run<kPoolAvg, T, 1>(c, call, stream);
      default:
        return wide ? run<kPoolAvgBackward, T, lanes>(c, call, stream)
                    : run<kPoolAvgBackward, T, 1>(c, call, stream);
    }
  });
}

}  // namespace fastnn::cuda
