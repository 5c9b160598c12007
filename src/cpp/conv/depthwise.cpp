#include "conv/depthwise.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/integers.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "conv/axis.hpp"
#include "conv/depthwise_parts.hpp"
#include "conv/depthwise_window.hpp"
#include "conv/kernels.hpp"
#include "conv/phases.hpp"
#include "elementwise/elementwise.hpp"

#define FASTNN_TARGET portable
#define FASTNN_TARGET_ID 0
#include "isa/vec.hpp"

namespace fastnn {

namespace {

double element(const char* p, DType type) {
  switch (type) {
    case DType::f64:
      return *reinterpret_cast<const double*>(p);
    case DType::bf16:
      return portable::to_f32(*reinterpret_cast<const bf16*>(p));
    case DType::f16:
      return portable::to_f32(*reinterpret_cast<const f16*>(p));
    default:
      return *reinterpret_cast<const float*>(p);
  }
}

// ---- planes: positions are neighbours -----------------------------------------------------------

// to[i * stride] = from[i]
void scatter(char* to, int64_t stride, const char* from, int64_t n, int64_t size) {
  if (size == 4)
    for (int64_t i = 0; i < n; i++)
      reinterpret_cast<uint32_t*>(to)[i * stride] = reinterpret_cast<const uint32_t*>(from)[i];
  else
    for (int64_t i = 0; i < n; i++)
      std::memcpy(to + i * stride * size, from + i * size, size_t(size));
}

// out (one plane) = epilogue(start + the correlation of `planes` planes of `in` with a filter each)
struct PlaneJob {
  const Conv& c;
  const Tensor5& in;
  const Tensor5& out;
  const Axis* axis;
  int64_t planes;            // of `in` that a plane of `out` is made of
  int64_t planes_shared;     // planes of `out` that are made of one of `in`
  const int64_t* first_tap;  // of the filter
  const int64_t* tap_step;
};

void run_planes(const PlaneJob& j) {
  const Conv& c = j.c;
  const ConvKernels& kernels = conv_kernels();
  const DepthwiseKernels& dw = kernels.depthwise[int(c.type)];
  const int64_t size = size_of(c);
  const Axis* a = j.axis;
  const int64_t rows = rows_at_once(a, size, j.planes);
  const Window window(a, size, rows);
  const int64_t taps = a[0].taps * a[1].taps * a[2].taps, all_taps = j.planes * taps;
  const int64_t window_bytes = (j.planes * window.elements() * size + 63) / 64 * 64 + 64;
  const int64_t row_bytes = (a[2].out * size + 63) / 64 * 64 + 64;
  const int threads = threads_for(c);
  char* scratch_memory =
      static_cast<char*>(scratch(Scratch::misc, size_t((window_bytes + row_bytes) * threads)));
  parallel(threads, [&](int thread, int came) {
    char* memory = scratch_memory + (window_bytes + row_bytes) * thread;
    char* row_memory = memory + window_bytes;
    std::vector<int64_t> offset(static_cast<size_t>(all_taps));
    std::vector<char> filter(static_cast<size_t>(all_taps * sum_size(c)));
    const Range mine = share_of(j.out.size[0] * j.out.size[1], 1, thread, came);
    for (int64_t unit = mine.begin; unit < mine.end; unit++) {
      const int64_t n = unit / j.out.size[1], channel = unit % j.out.size[1];
      size_t at = 0;
      for (int64_t p = 0; p < j.planes; p++) {
        // The filter of output channel m of the convolution.
        const int64_t m = j.planes > 1 || j.planes_shared == 1 ? channel * j.planes + p : channel;
        const char* w = c.w.data + m * c.w.stride[0] * size;
        for (int64_t t0 = 0; t0 < a[0].taps; t0++)
          for (int64_t t1 = 0; t1 < a[1].taps; t1++)
            for (int64_t t2 = 0; t2 < a[2].taps; t2++, at++) {
              offset[at] = p * window.elements() + window.offset(t0, t1, t2);
              const double value =
                  element(w + ((j.first_tap[0] + t0 * j.tap_step[0]) * c.w.stride[2] +
                               (j.first_tap[1] + t1 * j.tap_step[1]) * c.w.stride[3] +
                               (j.first_tap[2] + t2 * j.tap_step[2]) * c.w.stride[4]) *
                                  size,
                          c.type);
              if (c.type == DType::f64)
                reinterpret_cast<double*>(filter.data())[at] = value;
              else
                reinterpret_cast<float*>(filter.data())[at] = float(value);
            }
      }
      const double start = c.bias ? element(c.bias + channel * size, c.type) : 0;
      for (int64_t o0 = 0; o0 < a[0].out; o0++)
        for (int64_t o1 = 0; o1 < a[1].out; o1 += rows) {
          const int64_t count = std::min(rows, a[1].out - o1);
          for (int64_t p = 0; p < j.planes; p++) {
            const int64_t from = channel * j.planes / j.planes_shared + p;
            window.load(kernels, j.in.data + (n * j.in.stride[0] + from * j.in.stride[1]) * size,
                        j.in.stride + 2, o0, o1, count, memory + p * window.elements() * size);
          }
          char* to = j.out.data + (n * j.out.stride[0] + channel * j.out.stride[1] +
                                   o0 * j.out.stride[2] + o1 * j.out.stride[3]) *
                                      size;
          const int64_t length = a[2].out, x_row = a[1].step * window.row_stride;
          const bool direct = j.out.stride[4] == 1 || length == 1;
          if (direct)
            dw.rows(memory, x_row, offset.data(), filter.data(), int(all_taps), start, to,
                    j.out.stride[3], count, length);
          for (int64_t r = 0; r < count && (!direct || c.activation); r++) {
            char* out_row = to + r * j.out.stride[3] * size;
            char* row = direct ? out_row : row_memory;
            if (!direct)
              dw.rows(memory + r * x_row * size, x_row, offset.data(), filter.data(), int(all_taps),
                      start, row, 0, 1, length);
            if (c.activation) activate_row(c.activation, c.type, row, length);
            if (!direct) scatter(out_row, j.out.stride[4], row, length, size);
          }
        }
    }
  });
}

// ---- positions: channels are neighbours
// ----------------------------------------------------------

// The filters as (tap, channel).
std::vector<char> turned_filters(const Conv& c) {
  const int64_t size = size_of(c), channels = c.w.size[0], taps = c.w.spatial();
  std::vector<char> out(static_cast<size_t>(c.w.count() * size));
  const bool dense = c.w.stride[4] == 1 && (c.w.size[3] == 1 || c.w.stride[3] == c.w.size[4]) &&
                     (c.w.size[2] == 1 || c.w.stride[2] == c.w.size[3] * c.w.size[4]);
  if (dense) {
    constexpr int64_t kLanes = 64;
    Lane lanes[kLanes];
    for (int64_t m = 0; m < channels; m += kLanes) {
      const int count = int(std::min(kLanes, channels - m));
      for (int l = 0; l < count; l++)
        lanes[l] = {c.w.data + (m + l) * c.w.stride[0] * size, 0, int32_t(taps)};
      conv_kernels().transpose[size_index(size)](out.data() + m * size, channels, lanes, count, 1,
                                                 taps);
    }
    return out;
  }
  int64_t t = 0;
  for (int64_t t0 = 0; t0 < c.w.size[2]; t0++)
    for (int64_t t1 = 0; t1 < c.w.size[3]; t1++)
      for (int64_t t2 = 0; t2 < c.w.size[4]; t2++, t++)
        for (int64_t m = 0; m < channels; m++)
          std::memcpy(out.data() + (t * channels + m) * size,
                      c.w.data + (m * c.w.stride[0] + t0 * c.w.stride[2] + t1 * c.w.stride[3] +
                                  t2 * c.w.stride[4]) *
                                     size,
                      size_t(size));
  return out;
}

struct PositionJob {
  const Conv& c;
  const Tensor5& in;
  const Tensor5& out;
  const Axis* axis;
  const char* filters;  // (tap, channel)
  const int64_t* first_tap;
  const int64_t* tap_step;
};

void run_positions(const PositionJob& j) {
  const Conv& c = j.c;
  const DepthwiseKernels& dw = conv_kernels().depthwise[int(c.type)];
  const Axis* a = j.axis;
  const int64_t size = size_of(c), channels = j.out.size[1];
  if (window_fits(a, channels, c.type)) {
    const int64_t row = j.tap_step[1] * c.w.size[4], column = j.tap_step[2];
    const int64_t first =
        (j.first_tap[0] * c.w.size[3] + j.first_tap[1]) * c.w.size[4] + j.first_tap[2];
    run_window(
        {c, j.in, j.out, a, j.filters + first * channels * size, row * channels, column * channels},
        threads_for(c));
    return;
  }
  const size_t taps = size_t(a[0].taps * a[1].taps * a[2].taps);
  const int64_t per_image = a[0].out * a[1].out;
  parallel(threads_for(c), [&](int thread, int came) {
    std::vector<int64_t> offset(taps);
    std::vector<int> tap(taps);
    const Range mine = share_of(j.out.size[0] * per_image, 1, thread, came);
    for (int64_t unit = mine.begin; unit < mine.end; unit++) {
      const int64_t n = unit / per_image, o0 = unit % per_image / a[1].out, o1 = unit % a[1].out;
      const char* image = j.in.data + n * j.in.stride[0] * size;
      char* row =
          j.out.data + (n * j.out.stride[0] + o0 * j.out.stride[2] + o1 * j.out.stride[3]) * size;
      // The taps that are inside at a position, their offsets counted from those of o2 = 0.
      auto list = [&](int64_t o2) {
        int count = 0;
        for (int64_t t0 = 0; t0 < a[0].taps; t0++) {
          if (!a[0].sees(o0, t0)) continue;
          for (int64_t t1 = 0; t1 < a[1].taps; t1++) {
            if (!a[1].sees(o1, t1)) continue;
            for (int64_t t2 = 0; t2 < a[2].taps; t2++) {
              if (!a[2].sees(o2, t2)) continue;
              const int64_t at[] = {o0 * a[0].step + a[0].first + t0 * a[0].delta,
                                    o1 * a[1].step + a[1].first + t1 * a[1].delta,
                                    a[2].first + t2 * a[2].delta};
              offset[size_t(count)] =
                  at[0] * j.in.stride[2] + at[1] * j.in.stride[3] + at[2] * j.in.stride[4];
              tap[size_t(count++)] = int(((j.first_tap[0] + t0 * j.tap_step[0]) * c.w.size[3] +
                                          j.first_tap[1] + t1 * j.tap_step[1]) *
                                             c.w.size[4] +
                                         j.first_tap[2] + t2 * j.tap_step[2]);
            }
          }
        }
        return count;
      };
      int64_t inner_begin = 0, inner_end = a[2].out;
      for (int64_t t2 = 0; t2 < a[2].taps; t2++) {
        inner_begin = std::max(inner_begin, a[2].begin(t2));
        inner_end = std::min(inner_end, a[2].end(t2));
      }
      // Positions one by one at the sides, and all of the inside at once.
      for (int64_t o2 = 0, run = 1; o2 < a[2].out; o2 += run) {
        const int count = list(o2);
        run = o2 >= inner_begin && o2 < inner_end ? inner_end - o2 : 1;
        char* to = row + o2 * j.out.stride[4] * size;
        dw.positions(image + o2 * a[2].step * j.in.stride[4] * size, a[2].step * j.in.stride[4],
                     offset.data(), j.filters, channels, tap.data(), count, c.bias, to,
                     j.out.stride[4], run, channels);
        if (c.activation)
          for (int64_t i = 0; i < run; i++)
            activate_row(c.activation, c.type, to + i * j.out.stride[4] * size, channels);
      }
    }
  });
}

// ---- narrow planes: turned ----------------------------------------------------------------------

// Planes whose rows do not fill a vector are computed as channels-last images, into which they are
// turned, and the result back.
bool is_narrow(const Conv& c, const Tensor5& out) {
  const int64_t width = conv_kernels().depthwise[int(c.type)].width;
  return !channels_last(c) && multiplier(c) == 1 && c.w.size[0] >= width && out.size[4] <= width &&
         c.x.size[2] == 1 && c.y.size[2] == 1 && is_even(c.x) && is_even(c.y) &&
         out.stride[out.size[4] > 1 ? 4 : 3] == 1 && out.size[3] * out.size[4] > 1;
}

Tensor5 turned(const Tensor5& t, int64_t size, Scratch slot) {
  Tensor5 to = t;
  to.stride[1] = 1, to.stride[4] = t.size[1], to.stride[3] = t.size[4] * t.size[1];
  to.stride[0] = to.stride[2] = t.spatial() * t.size[1];
  to.data = static_cast<char*>(scratch(slot, size_t(t.count() * size)));
  return to;
}

constexpr int64_t kTurned = 64;  // channels, or positions, at a time

// `to` = `from`, of which one has its channels innermost and the other its positions.
void turn(const Tensor5& from, const Tensor5& to, int64_t size, int threads) {
  auto position = [](const Tensor5& t) { return t.size[4] > 1 ? t.stride[4] : t.stride[3]; };
  // What are neighbours in `to` are lanes.
  const bool last = to.stride[1] == 1;
  const int64_t lanes = last ? from.size[1] : from.spatial(),
                n = last ? from.spatial() : from.size[1],
                lane = last ? from.stride[1] : position(from),
                step = last ? position(from) : from.stride[1],
                ld = last ? position(to) : to.stride[1];
  const int64_t blocks = ceil_div(lanes, kTurned);
  parallel(threads, [&](int thread, int came) {
    Lane some[kTurned];
    const Range mine = share_of(from.size[0] * blocks, 1, thread, came);
    for (int64_t i = mine.begin; i < mine.end; i++) {
      const int64_t image = i / blocks, first = i % blocks * kTurned;
      const int count = int(std::min(kTurned, lanes - first));
      for (int l = 0; l < count; l++)
        some[l] = {from.data + (image * from.stride[0] + (first + l) * lane) * size, 0, int32_t(n)};
      conv_kernels().transpose[size_index(size)](to.data + (image * to.stride[0] + first) * size,
                                                 ld, some, count, step, n);
    }
  });
}

}  // namespace

bool is_depthwise(const Conv& c) {
  return c.groups > 1 && c.w.size[1] == 1 && c.groups == c.x.size[1] && !c.residual;
}

void depthwise_forward(const Conv& c) {
  if (is_narrow(c, c.y)) {
    count_call("depthwise turned");
    Conv last = c;
    last.x = turned(c.x, size_of(c), Scratch::packed_a);
    last.y = turned(c.y, size_of(c), Scratch::packed_b);
    turn(c.x, last.x, size_of(c), threads_for(c));
    depthwise_forward(last);
    turn(last.y, c.y, size_of(c), threads_for(c));
    return scratch_trim();
  }
  Axis axis[kSpatial];
  set_forward_axes(c, axis);
  const int64_t first[] = {0, 0, 0}, step[] = {1, 1, 1};
  if (channels_last(c)) {
    const std::vector<char> filters = turned_filters(c);
    run_positions({c, c.x, c.y, axis, filters.data(), first, step});
  } else {
    run_planes({c, c.x, c.y, axis, 1, multiplier(c), first, step});
  }
}

void depthwise_input(const Conv& c) {
  if (is_narrow(c, c.x)) {
    count_call("depthwise turned");
    Conv last = c;
    last.y = turned(c.y, size_of(c), Scratch::packed_a);
    last.x = turned(c.x, size_of(c), Scratch::packed_b);
    turn(c.y, last.y, size_of(c), threads_for(c));
    depthwise_input(last);
    turn(last.x, c.x, size_of(c), threads_for(c));
    return scratch_trim();
  }
  Phases phases[kSpatial];
  for (int d = 0; d < kSpatial; d++)
    phases[d] =
        phases_of(c.x.size[2 + d], c.w.size[2 + d], c.stride[d], c.padding[d], c.dilation[d]);
  const int64_t step[] = {phases[0].tap_step, phases[1].tap_step, phases[2].tap_step};
  const bool last = channels_last(c);
  std::vector<char> filters;
  if (last) filters = turned_filters(c);
  for (size_t i0 = 0; i0 < phases[0].of.size(); i0++)
    for (size_t i1 = 0; i1 < phases[1].of.size(); i1++)
      for (size_t i2 = 0; i2 < phases[2].of.size(); i2++) {
        const size_t at[] = {i0, i1, i2};
        Axis axis[kSpatial];
        int64_t first[kSpatial];
        Tensor5 out = c.x;
        for (int d = 0; d < kSpatial; d++) {
          const Phase& f = phases[d].of[at[d]];
          axis[d] = {c.y.size[2 + d], f.positions, 1, f.taps, f.first, f.delta};
          first[d] = f.first_tap;
          out.data += int64_t(at[d]) * c.x.stride[2 + d] * size_of(c);
          out.stride[2 + d] *= c.stride[d];
        }
        if (last)
          run_positions({c, c.y, out, axis, filters.data(), first, step});
        else
          run_planes({c, c.y, out, axis, multiplier(c), 1, first, step});
      }
}

}  // namespace fastnn
