// Few rows of x read the weight once, as it lies, and multiply it while it is in registers: what
// counts is the memory's speed. For many, panels of the weight are made into numbers just before
// the matrix product's tiles multiply them: in bfloat16 without their scales, which the sums of a
// group are multiplied with, or in float32 with them.
#include "quant/weight_only.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "common/cpu_features.hpp"
#include "common/kernels_of.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "gemm/tiles.hpp"
#include "quant/scheme.hpp"

namespace fastnn {
namespace {

constexpr int64_t kSegment = 512;    // elements of K in a sum, where a row has one scale
constexpr int64_t kColumns = 64;     // whose sums wait for the epilogue together,
constexpr int64_t kRows = 64;        // with so many rows
constexpr int64_t kShortGroup = 32;  // shorter ones are not summed by tiles
constexpr int64_t kPartRows = 512;   // of x, that a panel of the weight is made for
constexpr int64_t kPanelK = 256;     // elements of K in a panel of 32 columns: half of L1

const WeightOnlyKernels& base_kernels() { return FASTNN_KERNELS_OF(weight_only); }

const WeightOnlyKernels& kernels_for(DType x) {
  (void)x;
#ifdef FASTNN_HAS_AVX512_DOT
  if (x == DType::bf16 && active_isa() >= Isa::avx512 && cpu_features().avx512_bf16 &&
      cpu_features().avx512_vnni)
    return avx512_dot_weight_only();
#endif
  return base_kernels();
}

Limits limits_of(WeightFormat format) {
  return limits(format == WeightFormat::s8   ? Scheme::s8
                : format == WeightFormat::s4 ? Scheme::s4
                                             : Scheme::u4);
}

// Scales and zero points of rows are little beside the rows, and looked at. Those of groups are up
// to a quarter of what is read.
void check(const WeightOnly& c) {
  if (c.groups > 1) return;
  const auto good_zero = [limits = limits_of(c.format)](int32_t zero) {
    return float(zero) >= limits.least && float(zero) <= limits.most;
  };
  bool good = true;
  for (int64_t j = 0; j < c.n; j++) good &= is_scale(c.scale[j]);
  for (int64_t j = 0; c.zero && j < c.n; j++) good &= good_zero(c.zero[j]);
  for (int64_t j = 0; !good && j < c.n; j++) {
    const std::string at = " at " + std::to_string(j);
    if (!is_scale(c.scale[j]))
      throw std::invalid_argument(
          "fastnn.weight_only_linear: scale: expected positive, normal, finite numbers, got " +
          std::to_string(c.scale[j]) + at);
    if (c.zero && !good_zero(c.zero[j]))
      throw std::invalid_argument("fastnn.weight_only_linear: zero_point: expected " +
                                  std::to_string(int(limits_of(c.format).least)) + " to " +
                                  std::to_string(int(limits_of(c.format).most)) + ", got " +
                                  std::to_string(c.zero[j]) + at);
  }
}

int threads_for(const WeightOnly& c) {
  const double microseconds = 2.0 * double(c.m) * double(c.n) * double(c.k) / 1e5 +
                              double(weight_bytes(c.format, c.n * c.k)) / 1.5e4;
  return microseconds < 20 ? 1 : max_threads();
}

Store epilogue(const WeightOnly& c) {
  Gemm g;
  g.c.data = c.out, g.c.type = c.type, g.c.rs = c.n, g.c.cs = 1;
  g.bias = c.bias, g.bias_type = c.bias_type;
  g.bias_axis = c.bias ? BiasAxis::column : BiasAxis::none;
  g.activation = c.activation;
  return make_store(g);
}

// ---- few rows ----------------------------------------------------------------------------------

// False where groups and blocks do not go together, or x has sums that are not finite, from which a
// zero point's part could not be taken away.
bool few_rows(const WeightOnly& c, const WeightOnlyKernels& kernels, int threads) {
  const int64_t group = c.k / c.groups;
  const bool halves = c.format == WeightFormat::s8 && kernels.few_rows[kHalves] && c.m <= 2 &&
                      !c.batch_invariant && group % kernels.block[kHalves] == 0;
  const int format = halves ? kHalves : int(c.format);
  const int64_t block = kernels.block[format];
  FewRows f{};
  f.k = c.k, f.w = c.w, f.w_row = c.w_row;
  f.scale = c.scale, f.zero = c.zero, f.groups = c.groups;
  if (c.groups == 1) {
    f.segment = std::max<int64_t>(1, kSegment / block);
  } else if (group % block == 0) {
    f.way = group == block ? Scales::of_blocks : Scales::of_segments;
    f.segment = group / block, f.scale_step = 1;
  } else if (is_nibble(c.format) && block % group == 0 && group % 8 == 0) {
    f.way = Scales::in_block, f.scale_step = block / group;
    for (int64_t l = 0; l < block / 8; l++) f.index[l] = int32_t(8 * l / group);
  } else {
    return false;
  }
  const int64_t size = dtype_size(c.type);
  const bool in_place = !is_nibble(c.format) && !halves && kernels.x_bytes == size &&
                        c.k % block == 0 && (kernels.x_bytes == 2 || c.type == DType::f32);
  const int64_t sums_bytes = c.zero ? round_up(c.m * c.groups * 4, 64) : 0;
  const int64_t packed_row = ceil_div(c.k, block) * kernels.x_block[format];
  char* memory = static_cast<char*>(
      scratch(Scratch::misc, size_t(sums_bytes + (in_place ? 0 : c.m * packed_row))));
  auto* x_sums = reinterpret_cast<float*>(memory);
  char* packed = memory + sums_bytes;
  if (c.zero) {
    for (int64_t i = 0; i < c.m; i++) {
      float* sums = x_sums + i * c.groups;
      kernels.group_sums(c.x + i * c.x_row * size, c.type, c.groups, group, sums);
      for (int64_t g = 0; g < c.groups; g++)
        if (!std::isfinite(sums[g])) return false;
    }
    f.x_sums = x_sums;
  }
  f.x = in_place ? c.x : packed;
  f.x_row = in_place ? c.x_row * size : packed_row;
  const Store store = epilogue(c);
  const StoreFn finish = tile_kernel(DType::f32, true).store;
  count_call("weight only, few rows");
  parallel(threads, [&](int thread, int came) {
    if (!in_place) {
      const Range rows = share_of(c.m, 1, thread, came);
      for (int64_t i = rows.begin; i < rows.end; i++)
        kernels.pack_x[format](c.x + i * c.x_row * size, c.type, c.k, packed + i * packed_row);
      if (came > 1) barrier();
    }
    alignas(64) float sums[kRows * kColumns];
    const Range mine = share_of(c.n, 16, thread, came);
    for (int64_t j = mine.begin; j < mine.end; j += kColumns) {
      const int columns = int(std::min(kColumns, mine.end - j));
      for (int64_t i = 0; i < c.m; i += kRows) {
        const int rows = int(std::min(kRows, c.m - i));
        kernels.few_rows[format](f, i, rows, j, columns, sums, kColumns);
        finish(sums, int(kColumns), rows, columns, store, i, j);
      }
    }
  });
  scratch_trim();
  return true;
}

// ---- many rows, float32 ------------------------------------------------------------------------

class DecodedPanels final : public PanelSource {
 public:
  DecodedPanels(const WeightOnly& call, const WeightOnlyKernels& kernels)
      : call_(call), kernels_(kernels) {}
  // K in pieces that begin with a group, and with a whole vector of halves of bytes.
  int64_t segment() const {
    for (int64_t k = 160; k >= 64; k -= 32)
      if (call_.k % k == 0) return k;
    return call_.k;
  }
  void fill(void* dst, int64_t index, int64_t k0, int64_t k, int64_t j0, int columns,
            int ld) const override {
    const WeightOnly& c = call_;
    k0 += index * segment();
    kernels_.decode_f32[int(c.format)](
        c.w + j0 * c.w_row, c.w_row, columns, k0, k, c.k / c.groups, c.scale + j0 * c.groups,
        c.zero ? c.zero + j0 * c.groups : nullptr, c.groups, static_cast<float*>(dst), ld);
  }

 private:
  const WeightOnly& call_;
  const WeightOnlyKernels& kernels_;
};

void many_rows_f32(const WeightOnly& c, const WeightOnlyKernels& kernels, int threads) {
  const int64_t size = dtype_size(c.type);
  Gemm g;
  g.m = c.m, g.n = c.n, g.k = c.k;
  g.a.data = const_cast<char*>(c.x), g.a.type = DType::f32, g.a.rs = c.x_row, g.a.cs = 1;
  if (c.type != DType::f32) {
    auto* wide = static_cast<float*>(scratch(Scratch::misc, size_t(c.m * c.k) * 4));
    parallel(threads, [&](int thread, int came) {
      const Range rows = share_of(c.m, 1, thread, came);
      for (int64_t i = rows.begin; i < rows.end; i++)
        kernels.widen(c.x + i * c.x_row * size, c.type, c.k, wide + i * c.k);
    });
    g.a.data = reinterpret_cast<char*>(wide), g.a.rs = c.k;
  }
  g.b.type = DType::f32;
  g.c.data = c.out, g.c.type = c.type, g.c.rs = c.n, g.c.cs = 1;
  g.bias = c.bias, g.bias_type = c.bias_type;
  g.bias_axis = c.bias ? BiasAxis::column : BiasAxis::none;
  g.activation = c.activation;
  // float16 is exactly two bfloat16, and 16 bits of a weight more than the result will have.
  g.precision = c.type == DType::f16 ? Precision::high : c.precision;
  g.batch_invariant = c.batch_invariant;
  const DecodedPanels panels(c, kernels);
  g.b_panels = &panels;
  if (c.k) g.k = g.a_segment = panels.segment(), g.segments = c.k / g.k;
  gemm_panels(g, threads);
  scratch_trim();
}

// ---- many rows, bfloat16 -----------------------------------------------------------------------

// Items of so many rows of x and a panel of the weight: several for a panel where there are few of
// these, or many rows.
int64_t rows_of_part(int64_t m, int64_t panels, int64_t least, int threads) {
  int64_t part = std::min(m, kPartRows);
  while (panels * ceil_div(m, part) < 4 * threads && part > least) part = ceil_div(part, 2);
  return part;
}

// Vectors of 32 columns, x read where it lies: a row's scale, or a group's, multiplies sums that
// are still in registers.
void many_rows_vectors(const WeightOnly& c, const WeightOnlyKernels& kernels, const Kernel& kn,
                       int threads) {
  constexpr int64_t nr = 32;
  const int64_t group = c.k / c.groups, np = ceil_div(c.n, nr);
  // Whole groups, or a part of one.
  const int64_t segment = std::min(group, kPanelK), per_panel = kPanelK / segment;
  const int64_t part = rows_of_part(c.m, np, 16, threads), parts = ceil_div(c.m, part);
  const int64_t panel_bytes = kPanelK * nr * 2, scales_bytes = per_panel * nr * 4;
  const int64_t own_bytes = round_up(2 * panel_bytes + scales_bytes + part * nr * 4, 4096);
  // An odd row ends within a word.
  const int64_t x_row = c.k % 2 ? ceil_div(c.k, 32) * 64 : c.x_row * 2;
  char* copy =
      c.k % 2 ? static_cast<char*>(scratch(Scratch::packed_a, size_t(c.m * x_row))) : nullptr;
  char* own = static_cast<char*>(scratch(Scratch::accumulator, size_t(own_bytes * threads)));
  const Store store = epilogue(c);
  count_call("weight only, avx512 bf16 vdpbf16ps");
  Shares shares(np * parts, threads);
  parallel(threads, [&](int thread, int came) {
    if (copy) {
      const Range rows = share_of(c.m, 1, thread, came);
      for (int64_t i = rows.begin; i < rows.end; i++)
        kernels.pack_x[int(WeightFormat::s8)](c.x + i * c.x_row * 2, c.type, c.k, copy + i * x_row);
      if (came > 1) barrier();
    }
    char* made = own + own_bytes * thread;
    char* panel = made + panel_bytes;
    auto* scales = reinterpret_cast<float*>(panel + panel_bytes);
    float* totals = scales + per_panel * nr;
    for (Range r; (r = shares.take(thread, 1)).begin < r.end;) {
      const int64_t j0 = r.begin / parts * nr, i0 = r.begin % parts * part;
      const int rows = int(std::min(part, c.m - i0)), columns = int(std::min(nr, c.n - j0));
      for (int64_t k = 0; k < c.k;) {
        // Up to the end of a group that is in parts.
        const int64_t within = group <= kPanelK ? c.k - k : group - k % group;
        const int64_t length = std::min(per_panel * segment, within);
        const int64_t segments = group <= kPanelK ? length / group : 1;
        std::memset(scales, 0, size_t(segments * nr) * 4);
        for (int j = 0; j < columns; j++)
          for (int64_t s = 0; s < segments; s++)
            scales[s * nr + j] = c.scale[(j0 + j) * c.groups + k / group + s];
        const int32_t* zero = c.zero ? c.zero + j0 * c.groups : nullptr;
        const uint8_t* w = c.w + j0 * c.w_row;
        if (const auto make = kernels.make_panel[int(c.format)]) {
          make(w, c.w_row, columns, k, length, group, zero, c.groups, panel);
        } else {
          for (int j = 0; j < columns; j++)
            kernels.decode_bf16[int(c.format)](w + j * c.w_row, k, length, group,
                                               zero ? zero + j * c.groups : nullptr,
                                               reinterpret_cast<bf16*>(made) + j * length);
          kn.pack_b(panel, made, length, 1, columns, length);
        }
        // What is made into a panel next comes from rows, each too short to be seen coming.
        const bool more = k + length < c.k;
        const uint8_t* next = w + (more ? weight_bytes(c.format, k + length) : nr * c.w_row);
        const int64_t next_columns = more ? columns : std::min(nr, c.n - j0 - nr);
        for (int64_t j = 0; j < next_columns; j++)
          for (int64_t at = 0; at < weight_bytes(c.format, kPanelK); at += 64)
            __builtin_prefetch(next + j * c.w_row + at, 0, 2);
        const char* x = (copy ? copy : c.x) + i0 * x_row + k * 2;
        kernels.scaled_tile(x, x_row, rows, panel, ceil_div(length / segments, 2), segments, scales,
                            totals, k > 0);
        k += length;
      }
      kn.store(totals, int(nr), rows, columns, store, i0, j0);
    }
  });
  scratch_trim();
}

// A tile for each group of K and panel of x, whose sums are scaled and added to those of the groups
// before it.
void many_rows_tiles(const WeightOnly& c, const WeightOnlyKernels& kernels, const Kernel& kn,
                     int threads) {
  const int64_t group = c.k / c.groups;
  Layout a = layout_a(kn, c.m, group), b = layout_b(kn, group, c.n);
  a.segments = b.segments = c.groups, a.kc = b.kc = even_blocks(kn, group);
  const int64_t blocks = a.blocks(), mp = a.panels, np = b.panels;
  char* packed = static_cast<char*>(scratch(Scratch::packed_a, size_t(a.total())));
  const int64_t part = ceil_div(rows_of_part(c.m, np, 4 * kn.mr, threads), kn.mr);
  const int64_t parts = ceil_div(mp, part);
  const int64_t made_bytes = round_up(a.kc * kn.nr * 2, 4096);
  const int64_t panel_bytes = round_up(b.panel_bytes(0), 4096);
  const int64_t tile = tile_bytes(kn), scales_bytes = round_up(kn.nr * 4, 64);
  const int64_t own_bytes =
      round_up(made_bytes + panel_bytes + scales_bytes + (part + 1) * tile, 4096);
  char* own = static_cast<char*>(scratch(Scratch::accumulator, size_t(own_bytes * threads)));
  Matrix x;
  x.data = const_cast<char*>(c.x), x.type = DType::bf16, x.rs = c.x_row, x.cs = 1;
  const Store store = epilogue(c);
  count_call(kn.name);
  Shares shares(np * parts, threads);
  parallel(threads, [&](int thread, int came) {
    pack(kn.pack_a, nullptr, kn.k_word, a, packed, x, x.rs, 1, c.m, thread, came, group);
    if (came > 1) barrier();
    if (kn.enter) kn.enter();
    char* made = own + own_bytes * thread;
    char* panel = made + made_bytes;
    auto* scales = reinterpret_cast<float*>(panel + panel_bytes);
    char* sums = panel + panel_bytes + scales_bytes;
    char* totals = sums + tile;
    TileArgs t;
    t.a_row = int64_t(kn.a_bytes) * kn.k_word, t.a_word = t.a_row * kn.mr;
    t.b_word = int64_t(kn.nr) * kn.b_bytes * kn.k_word;
    t.b = panel, t.acc = sums, t.acc_row = int64_t(kn.nr) * 4;
    for (Range r; (r = shares.take(thread, 1)).begin < r.end;) {
      const int64_t j0 = r.begin / parts * kn.nr, p0 = r.begin % parts * part;
      const int64_t p1 = std::min(mp, p0 + part);
      const int columns = int(std::min<int64_t>(kn.nr, c.n - j0));
      t.cols = columns;
      for (int64_t block = 0; block < blocks; block++) {
        const int64_t g = a.segment(block), length = a.length(block);
        std::memset(scales, 0, size_t(kn.nr) * 4);
        for (int j = 0; j < columns; j++) {
          const int64_t row = j0 + j;
          scales[j] = c.scale[row * c.groups + g];
          kernels.decode_bf16[int(c.format)](c.w + row * c.w_row, g * group + a.begin(block),
                                             length, group,
                                             c.zero ? c.zero + row * c.groups : nullptr,
                                             reinterpret_cast<bf16*>(made) + j * length);
        }
        kn.pack_b(panel, made, length, 1, columns, length);
        t.words = a.padded(block) / kn.k_word;
        for (int64_t p = p0; p < p1; p++) {
          t.a = packed + a.offset(block, p);
          t.rows = int(std::min<int64_t>(kn.mr, c.m - p * kn.mr));
          kn.tile(t);
          kernels.add_scaled(reinterpret_cast<float*>(totals + (p - p0) * tile),
                             reinterpret_cast<float*>(sums), scales, t.rows, kn.nr, block > 0);
        }
      }
      for (int64_t p = p0; p < p1; p++)
        kn.store(totals + (p - p0) * tile, kn.nr, int(std::min<int64_t>(kn.mr, c.m - p * kn.mr)),
                 columns, store, p * kn.mr, j0);
    }
    if (kn.leave) kn.leave();
  });
  scratch_trim();
}

}  // namespace

void weight_only(const WeightOnly& c) {
  if (c.m == 0 || c.n == 0) return;
  check(c);
  const int threads = threads_for(c);
  const WeightOnlyKernels& kernels = kernels_for(c.type);
  // In either way a row's bits do not depend on how many are multiplied with it; but whether the
  // first one takes them does where there are zero points.
  const bool first = c.batch_invariant ? !c.zero : c.m <= kFewRows;
  if (c.k && first && few_rows(c, kernels, threads)) return;
  const Kernel& tiles = tile_kernel(c.type, false);
  const bool pairs = c.type == DType::bf16 && tiles.k_word == 2;
  const int64_t group = c.k / c.groups;
  if (c.k && pairs && (c.groups == 1 || group % kShortGroup == 0)) {
    const bool vectors = kernels.scaled_tile && tiles.nr == 32 && tiles.k_step == 2;
    return (vectors ? many_rows_vectors : many_rows_tiles)(c, kernels, tiles, threads);
  }
  many_rows_f32(c, base_kernels(), threads);
}

}  // namespace fastnn
