// Which algorithm computes a convolution, and how each comes down to a matrix product.
#include "conv/conv.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

#include "common/integers.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "conv/depthwise.hpp"
#include "conv/parts.hpp"
#include "conv/patches.hpp"
#include "conv/phases.hpp"
#include "conv/scatter.hpp"
#include "conv/strips.hpp"
#include "conv/winograd.hpp"
#include "gemm/kernel.hpp"
#include "gemm/prepared.hpp"

namespace fastnn {

namespace {

// How many times as many channels the other image has where turning one round is worth that dw is
// written column by column.
constexpr int64_t kTurned = 2;

void want_filters(const Conv& c) { Prepared::want(c.w.data, c.w.count()); }

double work(const Conv& c) {
  return double(c.y.count()) * double(c.w.size[1]) * double(c.w.spatial());
}

// Rows of channels, or of taps, that lie densely: those in which a weight's (c, t) is one index.
bool channels_outer(const Tensor5& w) {
  int64_t expected = 1;
  for (int d = 4; d >= 1; d--) {
    if (w.size[d] != 1 && w.stride[d] != expected) return false;
    expected *= w.size[d];
  }
  return true;
}
bool channels_inner(const Tensor5& w) {
  if (w.size[1] != 1 && w.stride[1] != 1) return false;
  int64_t expected = w.size[1];
  for (int d = 4; d >= 2; d--) {
    if (w.size[d] != 1 && w.stride[d] != expected) return false;
    expected *= w.size[d];
  }
  return true;
}

// Columns (n, o) of a result whose rows are channels.
void place_columns(Gemm& g, const Tensor5& out) {
  int64_t stride;
  if (flat(out, stride)) {
    g.c.cs = stride;
    if (out.size[0] == 1 || out.stride[0] == stride * out.spatial()) return;
    g.columns.length = out.spatial();
    g.columns.counts[2] = out.size[0];
    g.columns.c[2] = out.stride[0];
  } else {
    g.c.cs = out.stride[4];
    g.columns.length = out.size[4];
    const int from[] = {0, 2, 3};
    for (int d = 0; d < 3; d++)
      g.columns.counts[d] = out.size[from[d]], g.columns.c[d] = out.stride[from[d]];
  }
  std::copy(g.columns.c, g.columns.c + Pieces::kDims, g.columns.residual);
}

// The same by strips: out[(n, o), m] = epilogue(sum over (t, c) of patches[(n, o), (t, c)] a[m, (t,
// c)]). False where there is no kernel for it.
bool correlate_strips(const Patches& p, const char* a, int64_t m, const Conv& c, const Tensor5& out,
                      const Tensor5& whole, int64_t first_channel, Prepared* prepared,
                      int threads) {
  Gemm g;
  g.prepared = prepared, g.prepared_part = first_channel;
  const int64_t step = strips_step(c.type, c.precision, c.batch_invariant);
  g.m = p.images * p.positions(), g.n = m;
  g.k = p.tap_count() * PatchStrips::padded_channels(p, step);
  g.b.data = const_cast<char*>(a);
  g.b.rs = 1, g.b.cs = g.k;
  g.a.type = g.b.type = g.c.type = c.type;
  g.c.data = out.data, g.c.rs = out.stride[4], g.c.cs = out.stride[1];
  g.rows.length = out.size[4];
  const int from[] = {0, 2, 3};
  for (int d = 0; d < 3; d++)
    g.rows.counts[d] = out.size[from[d]], g.rows.c[d] = out.stride[from[d]];
  std::copy(g.rows.c, g.rows.c + Pieces::kDims, g.rows.residual);
  g.precision = c.precision, g.batch_invariant = c.batch_invariant;
  set_epilogue(g, c, whole, first_channel);
  if (g.bias) g.bias_axis = BiasAxis::column;
  const PatchStrips strips(p, step);
  g.a_strips = &strips;
  if (!gemm_strips(g, threads)) return false;
  count_call("strips");
  return true;
}

// Filters (m, c, t), or (m, t, c), as (m, t, c) with the channels padded with zeros.
void taps_outer(const char* w, int64_t m, int64_t channels, int64_t padded, int64_t taps,
                bool channels_inner, int64_t element, char* to, int threads) {
  const ConvKernels& kernels = conv_kernels();
  const int size = size_index(element);
  parallel(threads, [&](int thread, int came) {
    const Range mine = share_of(m, 1, thread, came);
    Lane lanes[16];
    for (int64_t i = mine.begin; i < mine.end; i++) {
      const char* from = w + i * channels * taps * element;
      char* filter = to + i * padded * taps * element;
      if (channels_inner) {
        kernels.copy_rows[size](filter, padded, from, channels, taps, 1, 0, channels, padded);
        continue;
      }
      for (int64_t c0 = 0; c0 < padded; c0 += 16) {
        const int count = int(std::min<int64_t>(16, padded - c0));
        for (int c = 0; c < count; c++)
          lanes[c] = {from + (c0 + c < channels ? (c0 + c) * taps * element : 0), 0,
                      c0 + c < channels ? int32_t(taps) : 0};
        kernels.transpose[size](filter + c0 * element, padded, lanes, count, 1, taps);
      }
    }
  });
}

// A dense matrix of these columns.
Matrix matrix_of(const char* data, int64_t columns) {
  Matrix a;
  a.data = const_cast<char*>(data);
  a.rs = columns, a.cs = 1;
  return a;
}

// out[m, (n, o)] = epilogue(sum over (c, t) of a[m, (c, t)] patches[(c, t), (n, o)])
void correlate(Patches p, const Matrix& a, int64_t m, const Conv& c, const Tensor5& out,
               const Tensor5& whole, int64_t first_channel, int threads) {
  p.join_lines();
  Gemm g;
  g.m = m, g.n = p.images * p.positions(), g.k = p.depth();
  g.a = a;
  g.a.type = g.b.type = g.c.type = c.type;
  g.c.data = out.data, g.c.rs = out.stride[1];
  place_columns(g, out);
  g.precision = c.precision, g.batch_invariant = c.batch_invariant;
  set_epilogue(g, c, whole, first_channel);
  const PatchColumns columns(p);
  g.b_panels = &columns;
  gemm_panels(g, threads);
}

// ---- one tap
// -------------------------------------------------------------------------------------

// Where each position of the input meets one of the output alone, and channels are neighbours, the
// convolution is an ordinary product of (positions, channels) with a matrix.
bool is_pointwise(const Conv& c) {
  if (c.w.spatial() != 1) return false;
  for (int d = 0; d < kSpatial; d++)
    if (c.stride[d] != 1 || c.padding[d] != 0) return false;
  int64_t x_step, y_step;
  return c.x.stride[1] == 1 && c.y.stride[1] == 1 && flat(c.x, x_step) && flat(c.y, y_step);
}

// out (positions, n) = epilogue(in (positions, k) b (k, n)), image by image where they are apart.
void multiply_positions(const Conv& c, const Tensor5& in, const Tensor5& out, const Matrix& b,
                        const Tensor5& whole, int64_t first_channel, Prepared* prepared = nullptr) {
  Gemm g;
  g.m = in.spatial(), g.k = in.size[1], g.n = out.size[1];
  g.batch_dims = 1, g.batch[0] = in.size[0];
  flat(in, g.a.rs);
  flat(out, g.c.rs);
  g.a.data = in.data, g.a.cs = 1, g.a.batch[0] = in.stride[0];
  g.c.data = out.data, g.c.cs = 1, g.c.batch[0] = out.stride[0];
  g.b = b;
  g.a.type = g.b.type = g.c.type = c.type;
  g.precision = c.precision, g.batch_invariant = c.batch_invariant;
  set_epilogue(g, c, whole, first_channel);
  if (g.bias) g.bias_axis = BiasAxis::column;
  // A kernel that splits may compute all rows anew for the sake of one.
  if (prepared && !c.batch_invariant) {
    g.packed = prepared->operand(&exact_kernel(c.type), first_channel * 4 + int(c.precision), [&] {
      Prepared::want(b.data, g.k * g.n);
      return pack_b(b, g.k, g.n, c.precision);
    });
    // Over a residual such a product is not tried: see run_one.
    if (g.packed->kernel->split && c.residual == c.y.data) Prepared::want(b.data, g.k * g.n);
  } else {
    Prepared::want(b.data, g.k * g.n);
  }
  gemm(g);
}

// ---- the input's gradient ----------------------------------------------------------------------

// The convolution by which one phase's share of the input's gradient is made.
struct PhaseOf {
  const Phase* at[kSpatial];
  const Phase* first[kSpatial];  // of all phases
  Patches patches;
  Tensor5 out;
  char* weight;  // its taps of the filters, (c, t, m)
};

// One group's weight with its dimensions exchanged, (c, t, m) from (m, c, t), for all phases at
// once: a filter's taps are neighbours, and go to all of them.
void exchange(const Tensor5& w, DType type, const std::vector<PhaseOf>& phases,
              const int64_t step[kSpatial], int threads) {
  constexpr int64_t kBlock = 16, kRows = 256;
  struct Place {
    int64_t from;  // of the tap, in a filter
    char* to;      // of channel 0
    int64_t row;   // to the next channel
  };
  const int64_t size = int64_t(dtype_size(type)), ms = w.size[0], cs = w.size[1];
  const int64_t taps = w.spatial();
  std::vector<Place> places;
  for (const PhaseOf& phase : phases) {
    const auto& f = phase.at;
    const int64_t n1 = f[1]->taps, n2 = f[2]->taps, count = f[0]->taps * n1 * n2;
    for (int64_t t = 0; t < count; t++)
      places.push_back({(f[0]->first_tap + t / (n1 * n2) * step[0]) * w.stride[2] +
                            (f[1]->first_tap + t / n2 % n1 * step[1]) * w.stride[3] +
                            (f[2]->first_tap + t % n2 * step[2]) * w.stride[4],
                        phase.weight + t * ms * size, count * ms * size});
  }
  const auto transpose = conv_kernels().transpose[size_index(size)];
  const bool filters_dense = channels_outer(w) && taps <= kRows;
  parallel(threads, [&](int thread, int came) {
    const Range mine = share_of(cs, kBlock, thread, came);
    alignas(64) char turned[kRows * kBlock * sizeof(double)];
    Lane lanes[kBlock];
    const int64_t together = filters_dense ? std::min(kBlock, kRows / taps) : kBlock;
    for (int64_t c0 = mine.begin; c0 < mine.end; c0 += together) {
      const int64_t nc = std::min(together, mine.end - c0);
      for (int64_t m0 = 0; m0 < ms; m0 += kBlock) {
        const int64_t nm = std::min(kBlock, ms - m0);
        const char* from = w.data + (m0 * w.stride[0] + c0 * w.stride[1]) * size;
        if (filters_dense) {
          for (int64_t i = 0; i < nm; i++)
            lanes[i] = {from + i * w.stride[0] * size, 0, int32_t(nc * taps)};
          transpose(turned, kBlock, lanes, int(nm), 1, nc * taps);
        }
        for (const Place& place : places) {
          char* to = place.to + c0 * place.row + m0 * size;
          const char* tap = from + place.from * size;
          if (filters_dense) {
            const char* row = turned + place.from * kBlock * size;
            const int64_t bytes = nm * size, row_step = taps * kBlock * size;
            if (bytes == 64)  // a size that is known is no call
              for (int64_t j = 0; j < nc; j++)
                std::memcpy(to + j * place.row, row + j * row_step, 64);
            else
              for (int64_t j = 0; j < nc; j++)
                std::memcpy(to + j * place.row, row + j * row_step, size_t(bytes));
          } else if (w.stride[1] == 1) {
            for (int64_t i = 0; i < nm; i++)
              lanes[i] = {tap + i * w.stride[0] * size, 0, int32_t(nc)};
            transpose(to, place.row / size, lanes, int(nm), 1, nc);
          } else {
            for (int64_t j = 0; j < nc; j++)
              for (int64_t i = 0; i < nm; i++)
                std::memcpy(to + j * place.row + i * size,
                            tap + (i * w.stride[0] + j * w.stride[1]) * size, size_t(size));
          }
        }
      }
    }
  });
}

// Rows of x from those of its phases along the row, which lie densely in `part`, and in the next
// ones of `apart` bytes each: (n, c, row, position), the first phase's positions being the most.
void interleave(const PhaseOf& part, int64_t apart, const Tensor5& x, const Conv& c, int threads) {
  const int64_t size = int64_t(dtype_size(c.type)), stride = c.stride[2], width = x.size[4];
  const int64_t whole = width / stride, channels = part.out.size[1];
  const int64_t d_count = part.out.size[2], h_count = part.out.size[3];
  const ConvKernels& kernels = conv_kernels();
  const int64_t row_stride[] = {x.stride[2] * c.stride[0], x.stride[3] * c.stride[1]};
  const int64_t start =
      (part.at[0] - part.first[0]) * x.stride[2] + (part.at[1] - part.first[1]) * x.stride[3];
  parallel(threads, [&](int thread, int came) {
    std::vector<Lane> lanes(static_cast<size_t>(stride));
    const Range mine = share_of(part.out.size[0] * channels * d_count * h_count, 1, thread, came);
    for (int64_t i = mine.begin; i < mine.end; i++) {
      const int64_t h = i % h_count, d = i / h_count % d_count, line = i / (h_count * d_count);
      char* to = x.data + (start + line / channels * x.stride[0] + line % channels * x.stride[1] +
                           d * row_stride[0] + h * row_stride[1]) *
                              size;
      for (int64_t l = 0; l < stride; l++) {
        const int64_t positions = whole + (l < width % stride);
        lanes[size_t(l)] = {part.out.data + l * apart + i * positions * size, 0, int32_t(whole)};
        if (positions > whole)
          std::memcpy(to + (whole * stride + l) * size, lanes[size_t(l)].src + whole * size,
                      size_t(size));
      }
      if (stride <= kFewLanes)
        kernels.interleave[size_index(size)](to, lanes.data(), int(stride), whole);
      else
        kernels.transpose[size_index(size)](to, stride, lanes.data(), int(stride), 1, whole);
    }
  });
}

// ---- few results -------------------------------------------------------------------------------

// Group by group, with w's dimensions `k` and `m` those of `in` and `out`; the other members of a
// dimension are `set`. False where that does not pay.
template <class Set>
bool scatter_groups(const Conv& c, const Tensor5& in, const Tensor5& out, int k, int m, Set set) {
  Scatter s{.c = c,
            .in = in,
            .out = out,
            .w = c.w.data,
            .w_in = c.w.stride[k],
            .w_out = c.w.stride[m],
            .w_tap = c.w.stride + 2,
            .whole = out};
  for (int d = 0; d < kSpatial; d++) s.taps[d] = c.w.size[2 + d], set(s, d);
  const int64_t size = int64_t(dtype_size(c.type));
  const int64_t depth = in.size[1] / c.groups, results = out.size[1] / c.groups;
  s.in.size[1] = depth, s.out.size[1] = results;
  if (!scatter_pays(s)) return false;
  want_filters(c);
  for (int64_t group = 0; group < c.groups; group++) {
    s.in = channels_from(in, group * depth, depth, c.type);
    s.out = channels_from(out, group * results, results, c.type);
    s.channel = group * results;
    run_scatter(s, threads_for(work(c)));
    s.w += c.w.size[0] / c.groups * c.w.stride[0] * size;
  }
  return true;
}

// y from x with few filters, x's positions one by one.
bool scatter_forward(const Conv& c) {
  for (const int64_t stride : c.stride)
    if (stride != 1) return false;
  return scatter_groups(c, c.x, c.y, 1, 0, [&](Scatter& s, int d) {
    s.step[d] = 1, s.first[d] = c.padding[d], s.delta[d] = -c.dilation[d];
  });
}

// x of few channels from y.
bool scatter_input(const Conv& c) {
  return scatter_groups(c, c.y, c.x, 0, 1, [&](Scatter& s, int d) {
    s.step[d] = c.stride[d], s.first[d] = -c.padding[d], s.delta[d] = c.dilation[d];
  });
}

// ---- the weight's gradient ---------------------------------------------------------------------

// Filters (m, t, c) as they are wanted: dense, (m, c, t) or any other order.
void taps_inner(const char* from, const Patches& p, const Tensor5& w, int64_t element,
                int threads) {
  const auto transpose = conv_kernels().transpose[size_index(element)];
  const int64_t taps = p.tap_count();
  constexpr int64_t kLanes = 16;
  parallel(threads, [&](int thread, int came) {
    const Range mine = share_of(w.size[0], 1, thread, came);
    Lane lanes[kLanes];
    for (int64_t m = mine.begin; m < mine.end; m++)
      for (int64_t t0 = 0; t0 < taps; t0 += kLanes) {
        const int count = int(std::min(kLanes, taps - t0));
        for (int t = 0; t < count; t++)
          lanes[t] = {from + (m * taps + t0 + t) * p.channels * element, 0, int32_t(p.channels)};
        transpose(w.data + (m * w.stride[0] + t0) * element, taps, lanes, count, 1, p.channels);
      }
  });
}

// One group's dw by strips; `p` as for PatchRows. False where there is no kernel for it.
bool weight_strips(Patches p, const Conv& c, const Tensor5& y, const Tensor5& dw, int threads) {
  Gemm g;
  int64_t y_step;
  Tensor5 lines = y;
  const bool neighbours = p.channel_stride == 1 || p.channels == 1;
  if (neighbours && flat(y, y_step) && p.join_lines()) {
    lines.size[4] = p.out[2], lines.size[2] = lines.size[3] = 1;
    lines.stride[4] = y_step;
  }
  const PatchStrips strips(p, 1, PatchStrips::Lines::summed);
  g.a_strips = &strips;
  g.m = p.depth(), g.n = y.size[1], g.k = p.images * p.positions();
  g.b.data = y.data, g.b.rs = lines.stride[4], g.b.cs = lines.stride[1];
  g.rows.length = lines.size[4];
  const int from[] = {0, 2, 3};
  for (int d = 0; d < 3; d++)
    g.rows.counts[d] = lines.size[from[d]], g.rows.c[d] = lines.stride[from[d]];
  g.a.type = g.b.type = g.c.type = c.type;
  g.precision = c.precision, g.batch_invariant = c.batch_invariant;

  const int64_t size = int64_t(dtype_size(c.type)), depth = p.depth();
  const bool in_place = channels_inner(dw);
  char* turned =
      in_place ? nullptr : static_cast<char*>(scratch(Scratch::misc, size_t(g.n * depth * size)));
  g.c.data = in_place ? dw.data : turned;
  g.c.rs = 1, g.c.cs = in_place ? dw.stride[0] : depth;
  if (!gemm_strips_transposed(g, threads)) return false;
  count_call("strips transposed");
  if (turned) taps_inner(turned, p, dw, size, threads);
  return true;
}

}  // namespace

void set_epilogue(Gemm& g, const Conv& c, const Tensor5& out, int64_t first_channel) {
  g.activation = c.activation;
  if (c.bias) {
    g.bias = c.bias + first_channel * int64_t(dtype_size(c.type));
    g.bias_type = c.type, g.bias_axis = BiasAxis::row;
  }
  if (c.residual) {
    g.residual = g.c;
    const char* base = c.residual + (g.c.data - out.data);
    g.residual.data = const_cast<char*>(base);
    g.beta = 1;
  }
}

void conv_forward(const Conv& c) {
  if (c.y.count() == 0) return;
  // These are prepared within threads, or not at all.
  if (c.groups > 1) want_filters(c);
  if (is_depthwise(c)) {
    count_call("depthwise");
    return depthwise_forward(c);
  }
  const int64_t channels = c.w.size[1], rows = c.w.size[0] / c.groups;
  const int64_t size = int64_t(dtype_size(c.type));
  if (is_pointwise(c)) {
    for (int64_t group = 0; group < c.groups; group++) {
      Matrix w;
      w.data = c.w.data + group * rows * c.w.stride[0] * size;
      w.rs = c.w.stride[1], w.cs = c.w.stride[0], w.type = c.type;
      multiply_positions(c, channels_from(c.x, group * channels, channels, c.type),
                         channels_from(c.y, group * rows, rows, c.type), w, c.y, group * rows,
                         c.prepared);
    }
    return;
  }
  if (scatter_forward(c)) return;
  if (winograd_forward(c)) return;
  const bool outer = channels_outer(c.w);
  const bool apart = c.w.size[0] > 1 && c.w.stride[0] != channels * c.w.spatial();
  if (apart || (!outer && !channels_inner(c.w)))
    throw std::invalid_argument("conv: w: expected dense filters, contiguous or channels-last");
  for_groups(c.groups, work(c), [&](int64_t group, int threads) {
    Patches p =
        patches_of(channels_from(c.x, group * channels, channels, c.type), channels, c.type);
    for (int d = 0; d < kSpatial; d++) {
      p.out[d] = c.y.size[2 + d], p.step[d] = c.stride[d];
      p.taps[d] = c.w.size[2 + d], p.first[d] = -c.padding[d], p.delta[d] = c.dilation[d];
    }
    p.channels_inner = !outer;
    const Tensor5 y = channels_from(c.y, group * rows, rows, c.type);
    const char* w = c.w.data + group * rows * p.depth() * size;
    const int64_t step = strips_step(c.type, c.precision, c.batch_invariant);
    if (step && PatchStrips::pays(p, rows, c.batch_invariant, c.prepared)) {
      const char* a = w;
      const int64_t taps = p.tap_count(), padded = PatchStrips::padded_channels(p, step);
      if ((outer && taps > 1 && channels > 1) || padded != channels) {
        const size_t bytes = size_t(rows * taps * padded * size);
        auto turn = [&](char* to) {
          want_filters(c);
          taps_outer(w, rows, channels, padded, taps, !outer, size, to, threads);
        };
        if (c.prepared) {
          a = c.prepared->get("taps outer", nullptr, padded, group, bytes, turn);
        } else {
          char* turned = static_cast<char*>(scratch(Scratch::misc, bytes));
          turn(turned);
          a = turned;
        }
      }
      if (correlate_strips(p, a, rows, c, y, c.y, group * rows, c.prepared, threads)) return;
    }
    want_filters(c);
    if (SplitRows::pays(p)) SplitRows::apply(p, threads);
    correlate(p, matrix_of(w, p.depth()), rows, c, y, c.y, group * rows, threads);
  });
}

bool conv_takes_its_own_residual(const Conv& c) {
  // Winograd's way may find that the call is to be computed otherwise, from the start.
  return !is_depthwise(c) && !is_winograd(c);
}

void conv_input(const Conv& c) {
  if (c.x.count() == 0) return;
  if (is_depthwise(c)) {
    count_call("depthwise");
    return depthwise_input(c);
  }
  const int64_t channels = c.w.size[1], rows = c.w.size[0] / c.groups;
  const int64_t size = int64_t(dtype_size(c.type));
  if (is_pointwise(c)) {
    for (int64_t group = 0; group < c.groups; group++) {
      Matrix w;
      w.data = c.w.data + group * rows * c.w.stride[0] * size;
      w.rs = c.w.stride[0], w.cs = c.w.stride[1];
      multiply_positions(c, channels_from(c.y, group * rows, rows, c.type),
                         channels_from(c.x, group * channels, channels, c.type), w, c.x,
                         group * channels);
    }
    return;
  }
  if (scatter_input(c)) return;
  if (winograd_input(c)) return;
  Phases phases[kSpatial];
  for (int d = 0; d < kSpatial; d++)
    phases[d] =
        phases_of(c.x.size[2 + d], c.w.size[2 + d], c.stride[d], c.padding[d], c.dilation[d]);
  const int64_t step[] = {phases[0].tap_step, phases[1].tap_step, phases[2].tap_step};
  for_groups(c.groups, work(c), [&](int64_t group, int threads) {
    Tensor5 w = c.w;
    w.data += group * rows * w.stride[0] * size;
    w.size[0] = rows;
    const Tensor5 y = channels_from(c.y, group * rows, rows, c.type);
    const Tensor5 x = channels_from(c.x, group * channels, channels, c.type);
    // Every other element of a row is slow to write: rows of neighbours are made first.
    const bool in_rows = c.stride[2] > 1 && x.size[4] >= c.stride[2] && x.stride[4] == 1 &&
                         x.stride[1] != 1 && !c.residual;
    const int64_t most_positions =
        phases[0].of[0].positions * phases[1].of[0].positions * phases[2].of[0].positions;
    const int64_t rows_bytes =
        in_rows ? round_up(x.size[0] * channels * most_positions * size, 64) : 0;
    char* weight = static_cast<char*>(scratch(
        Scratch::misc, size_t(rows_bytes * c.stride[2] + std::max<int64_t>(1, w.count() * size))));
    char* dense_rows = weight;
    weight += rows_bytes * c.stride[2];
    std::vector<PhaseOf> parts;
    for (size_t i0 = 0; i0 < phases[0].of.size(); i0++)
      for (size_t i1 = 0; i1 < phases[1].of.size(); i1++)
        for (size_t i2 = 0; i2 < phases[2].of.size(); i2++) {
          const size_t at[] = {i0, i1, i2};
          PhaseOf part{{}, {}, patches_of(y, rows, c.type), x, weight};
          Patches& p = part.patches;
          for (int d = 0; d < kSpatial; d++) {
            const Phase& f = *(part.at[d] = &phases[d].of[at[d]]);
            part.first[d] = phases[d].of.data();
            p.out[d] = f.positions, p.step[d] = 1;
            p.taps[d] = f.taps, p.first[d] = f.first, p.delta[d] = f.delta;
            part.out.size[2 + d] = f.positions;
            if (in_rows) continue;
            part.out.data += int64_t(at[d]) * x.stride[2 + d] * size;
            part.out.stride[2 + d] = x.stride[2 + d] * c.stride[d];
          }
          if (in_rows) {
            part.out.data = dense_rows + int64_t(i2) * rows_bytes;
            for (int64_t d = 4, dense = 1; d >= 0; dense *= part.out.size[d--])
              part.out.stride[d] = dense;
          }
          p.channels_inner = true;
          weight += channels * p.depth() * size;
          parts.push_back(part);
        }
    const int64_t filter_step = strips_step(c.type, c.precision, c.batch_invariant);
    auto pays = [&](const PhaseOf& part) {
      return filter_step && rows % filter_step == 0 &&
             PatchStrips::pays(part.patches, channels, c.batch_invariant);
    };
    // Filters of one tap are read as they lie, with their dimensions exchanged.
    Matrix turned;
    turned.data = w.data, turned.rs = w.stride[1], turned.cs = w.stride[0];
    const bool one_tap = w.spatial() == 1 && std::none_of(parts.begin(), parts.end(), pays);
    if (!one_tap) exchange(w, c.type, parts, step, threads);
    for (const PhaseOf& part : parts) {
      const Patches& p = part.patches;
      const bool by_strips = !one_tap && pays(part) &&
                             correlate_strips(p, part.weight, channels, c, part.out, c.x,
                                              group * channels, nullptr, threads);
      if (!by_strips)
        correlate(p, one_tap ? turned : matrix_of(part.weight, p.depth()), channels, c, part.out,
                  c.x, group * channels, threads);
      if (in_rows && part.at[2] == &phases[2].of.back()) {
        PhaseOf first = part;
        first.out.data = dense_rows;
        interleave(first, rows_bytes, x, c, threads);
      }
    }
  });
}

void conv_weight(const Conv& c) {
  if (c.w.count() == 0) return;
  if (is_depthwise(c)) {
    count_call("depthwise");
    return depthwise_weight(c);
  }
  if (winograd_weight(c)) return;
  const int64_t channels = c.w.size[1], rows = c.w.size[0] / c.groups;
  const int64_t size = int64_t(dtype_size(c.type));
  for_groups(c.groups, work(c), [&](int64_t group, int threads) {
    const Tensor5 y = channels_from(c.y, group * rows, rows, c.type);
    Patches p =
        patches_of(channels_from(c.x, group * channels, channels, c.type), channels, c.type);
    for (int d = 0; d < kSpatial; d++) {
      p.out[d] = c.y.size[2 + d], p.step[d] = c.stride[d];
      p.taps[d] = c.w.size[2 + d], p.first[d] = -c.padding[d], p.delta[d] = c.dilation[d];
    }
    Tensor5 dw = c.w;
    dw.data += group * rows * c.w.stride[0] * size, dw.size[0] = rows;
    const bool dense = channels_inner(c.w) || channels_outer(c.w);
    if (dense && PatchStrips::pays_summed(p, rows) && weight_strips(p, c, y, dw, threads)) return;
    if (SplitRows::pays(p)) SplitRows::apply(p, threads);
    const bool lines = p.join_lines();
    Gemm g;
    g.a.type = g.b.type = g.c.type = c.type;
    g.precision = c.precision, g.batch_invariant = c.batch_invariant;
    if (c.y.count()) g.k = p.positions(), g.segments = c.y.size[0];  // else zeros
    g.c.data = c.w.data + group * rows * c.w.stride[0] * size;
    int64_t y_step;
    if (!flat(y, y_step) && c.y.count())
      throw std::invalid_argument("conv: y: expected evenly spaced positions");
    // Of the two images one is read as it lies, and the other turned round: that of fewer channels.
    if (lines && p.stride[2] == 1 && y_step == 1 && rows * kTurned <= channels) {
      Patches turned = patches_of(y, rows, c.type);
      for (int d = 0; d < kSpatial; d++) {
        turned.out[d] = y.size[2 + d], turned.step[d] = turned.taps[d] = turned.delta[d] = 1;
        turned.first[d] = 0;
      }
      turned.join_lines();
      g.m = channels, g.n = rows;
      g.a.data = const_cast<char*>(p.data), g.a.rs = p.channel_stride, g.a.cs = 1;
      g.a_segment = p.image_stride;
      g.c.rs = c.w.stride[1], g.c.cs = c.w.stride[0];
      const PatchRows patches(turned);
      g.b_panels = &patches;
      return gemm_panels(g, threads);
    }
    // Channels are copied as they lie where they are neighbours, and so are the pieces of dw then.
    p.channels_inner = (p.channel_stride == 1 && channels > 1) || !channels_outer(c.w);
    g.m = rows, g.n = p.depth();
    g.a.data = y.data, g.a.rs = y.stride[1], g.a.cs = y_step, g.a_segment = y.stride[0];
    g.c.rs = c.w.stride[0], g.c.cs = 1;
    if (p.channels_inner && p.tap_count() > 1) {
      g.c.cs = c.w.stride[1];
      g.columns.length = channels;
      for (int d = 0; d < kSpatial; d++)
        g.columns.counts[d] = c.w.size[2 + d], g.columns.c[d] = c.w.stride[2 + d];
    } else if (p.channels_inner) {
      g.c.cs = c.w.stride[1];
    }
    const PatchRows patches(p);
    g.b_panels = &patches;
    gemm_panels(g, threads);
  });
}

}  // namespace fastnn
