// The five loops of GEMM, written once for every kernel.
//
//   K is cut into blocks of kc, A into panels of mr rows, B into panels of nr columns. A block of
//   C (some panels by some panels) belongs to one thread, which walks all of K for it:
//
//       for block of C           taken in turn by the threads
//         for block of K         packed A (rows x kc) stays in L2, a panel of B in L1
//           for panel of B
//             for panel of A     tile += A panel . B panel, on registers
//       the last block of K also stores: epilogue, conversion, C
//
//   Each tile starts from zero in each block of K and is added to the sum, so long sums are
//   blocked (error grows with K/kc + kc, not K), and no element of C depends on how the blocks were
//   shared out: the same bits for any number of threads.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "gemm/kernel.hpp"

namespace fastnn {

namespace {

constexpr int64_t kPackedLimit = int64_t(64) << 20;  // bytes of an operand packed at a time
constexpr int64_t kBlockBytes = 256 << 10;           // packed A of a block: a share of L2
constexpr int64_t kSumBytes = 384 << 10;             // sums of a block, another
constexpr int kBlockPanelsB = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Where the panels of one packed operand lie: blocks of K first, panels within them.
struct Layout {
  int64_t k, kc, k_step, panels, lanes, bytes, extra;

  int64_t blocks() const { return ceil_div(k, kc); }
  int64_t length(int64_t block) const { return std::min(kc, k - block * kc); }  // in elements of K
  int64_t padded(int64_t block) const { return round_up(length(block), k_step); }
  int64_t panel_bytes(int64_t block) const {
    return round_up(padded(block) * lanes * bytes + extra, 64);
  }
  int64_t block_offset(int64_t block) const { return block * panels * panel_bytes(0); }
  int64_t offset(int64_t block, int64_t panel) const {
    return block_offset(block) + panel * panel_bytes(block);
  }
  int64_t total() const {
    const int64_t last = blocks() - 1;
    return last < 0 ? 0 : block_offset(last) + panels * panel_bytes(last);
  }
};

Layout layout_a(const Kernel& kn, int64_t m, int64_t k) {
  return {k, kn.kc, kn.k_step, ceil_div(m, kn.mr), kn.mr, kn.a_bytes, 0};
}
Layout layout_b(const Kernel& kn, int64_t k, int64_t n) {
  return {k, kn.kc, kn.k_step, ceil_div(n, kn.nr), kn.nr, kn.b_bytes, kn.b_extra};
}

// Packs panels [first, last) of all blocks of K, this thread's share of them.
unsigned pack(PackFn fn, const Layout& l, char* dst, const Matrix& src, int64_t lane_stride,
              int64_t k_stride, int64_t lanes_total, int thread, int threads) {
  const int64_t size = dtype_size(src.type);
  const Range mine = share_of(l.blocks() * l.panels, 1, thread, threads);
  unsigned flags = 0;
  for (int64_t item = mine.begin; item < mine.end; item++) {
    const int64_t block = item / l.panels, panel = item % l.panels;
    const int lanes = int(std::min(l.lanes, lanes_total - panel * l.lanes));
    flags |= fn(dst + l.offset(block, panel),
                src.data + (panel * l.lanes * lane_stride + block * l.kc * k_stride) * size,
                lane_stride, k_stride, lanes, l.length(block));
  }
  return flags;
}

// One operand as the tile loop reads it.
struct Source {
  const char* data;
  bool packed;
  Layout layout;
  int64_t lane, word, k;  // strides in bytes where it is read in place
  const char* at(int64_t block, int64_t panel) const {
    return packed ? data + layout.offset(block, panel)
                  : data + panel * layout.lanes * lane + block * layout.kc * k;
  }
};

}  // namespace

size_t packed_b_bytes(const Kernel& kn, int64_t k, int64_t n) { return layout_b(kn, k, n).total(); }

unsigned pack_all_b(const Kernel& kn, const Matrix& b, int64_t k, int64_t n, char* dst, int thread,
                    int threads) {
  return pack(kn.pack_b, layout_b(kn, k, n), dst, b, b.cs, b.rs, n, thread, threads);
}

bool split_refused(unsigned a, unsigned b) {
  // Products below 2^-126 are flushed: the low parts of a product of 2^-90 are still whole.
  return ((a | b) & (kNonFinite | kVeryTiny)) || ((a & kTiny) && (b & kTiny));
}

Store make_store(const Gemm& g) {
  Store s{};
  s.c = g.c.data, s.c_rs = g.c.rs, s.c_cs = g.c.cs, s.type = g.c.type;
  s.alpha = float(g.alpha), s.beta = float(g.beta), s.alpha64 = g.alpha, s.beta64 = g.beta;
  // beta = 0 ignores the residual, NaN included, as BLAS and torch do.
  s.residual = g.beta != 0 ? g.residual.data : nullptr;
  s.r_rs = g.residual.rs, s.r_cs = g.residual.cs;
  s.bias = g.bias_axis == BiasAxis::none ? nullptr : g.bias;
  s.bias_type = g.bias_type, s.bias_axis = g.bias_axis, s.bias_stride = g.bias_stride;
  s.activation = g.activation;
  s.row_scale = g.row_scale, s.col_scale = g.col_scale;
  s.plain = g.alpha == 1 && !s.residual && !s.bias && !s.activation && !s.row_scale && !s.col_scale;
  return s;
}

// Part of the problem: rows [i0, i0+m) and columns [j0, j0+n), with both operands' panels at once
// in the scratch memory.
static unsigned run_part(const Kernel& kn, const Gemm& g, const Store& store, int64_t i0, int64_t m,
                         int64_t j0, int64_t n, const Source& a, const Source& b, char* pack_a_to,
                         char* pack_b_to, int threads) {
  const int64_t mp = ceil_div(m, kn.mr), np = ceil_div(n, kn.nr), blocks = a.layout.blocks();
  const bool sum = blocks > 1;

  int64_t block_a = std::max<int64_t>(
      1, kBlockBytes / std::max<int64_t>(1, std::min(kn.kc, g.k) * kn.mr * kn.a_bytes));
  int64_t block_b = kBlockPanelsB;
  const int64_t tile_bytes = int64_t(kn.mr) * kn.nr * dtype_size(kn.acc);
  block_a = std::min(block_a, mp), block_b = std::min(block_b, np);
  // The sums of a block live in L2 as well.
  if (sum) block_a = std::min(block_a, std::max<int64_t>(1, kSumBytes / (block_b * tile_bytes)));
  // Enough blocks that threads which finish early find work.
  while (ceil_div(mp, block_a) * ceil_div(np, block_b) < 3 * threads && threads > 1 &&
         (block_a > 1 || block_b > 1)) {
    if (block_b * kn.nr >= block_a * kn.mr && block_b > 1)
      block_b = ceil_div(block_b, 2);
    else if (block_a > 1)
      block_a = ceil_div(block_a, 2);
    else
      block_b = ceil_div(block_b, 2);
  }
  const int64_t blocks_m = ceil_div(mp, block_a), blocks_n = ceil_div(np, block_b);
  const int64_t acc_bytes = (sum ? block_a * block_b : 1) * tile_bytes;
  char* accumulators = static_cast<char*>(scratch(Scratch::accumulator, acc_bytes * threads));

  std::atomic<int64_t> next{0};
  std::atomic<unsigned> flags_a{0}, flags_b{0};
  parallel(threads, [&](int thread, int came) {
    if (pack_a_to) {
      Matrix part = g.a;
      part.data += i0 * g.a.rs * int64_t(dtype_size(g.a.type));
      flags_a |= pack(kn.pack_a, a.layout, pack_a_to, part, g.a.rs, g.a.cs, m, thread, came);
    }
    if (pack_b_to) {
      Matrix part = g.b;
      part.data += j0 * g.b.cs * int64_t(dtype_size(g.b.type));
      flags_b |= pack(kn.pack_b, b.layout, pack_b_to, part, g.b.cs, g.b.rs, n, thread, came);
    }
    if (pack_a_to || pack_b_to) {
      if (came > 1) barrier();
      const unsigned fb = g.packed ? g.packed->flags : flags_b.load();
      if (kn.split && split_refused(flags_a.load(), fb)) return;
    }
    if (kn.enter) kn.enter();
    char* acc = accumulators + acc_bytes * thread;
    TileArgs t{};
    t.packed_a = a.packed, t.packed_b = b.packed;
    t.a_row = a.lane;
    for (;;) {
      const int64_t item = next.fetch_add(1, std::memory_order_relaxed);
      if (item >= blocks_m * blocks_n) break;
      const int64_t p0 = item % blocks_m * block_a, q0 = item / blocks_m * block_b;
      const int64_t p1 = std::min(mp, p0 + block_a), q1 = std::min(np, q0 + block_b);
      for (int64_t block = 0; block < std::max<int64_t>(blocks, 1); block++) {
        t.words = g.k ? a.layout.padded(block) / kn.k_word : 0;
        t.add = block > 0;
        t.a_word = a.word, t.b_word = b.word;
        for (int64_t q = q0; q < q1; q++) {
          t.b = g.k ? b.at(block, q) : nullptr;
          t.cols = int(std::min<int64_t>(kn.nr, n - q * kn.nr));
          for (int64_t p = p0; p < p1; p++) {
            t.a = g.k ? a.at(block, p) : nullptr;
            t.rows = int(std::min<int64_t>(kn.mr, m - p * kn.mr));
            t.acc = sum ? acc + ((q - q0) * block_a + (p - p0)) * tile_bytes : acc;
            if (g.k)
              kn.tile(t);
            else
              std::memset(t.acc, 0, tile_bytes);  // an empty sum
            if (block + 1 >= blocks)
              kn.store(t.acc, kn.nr, t.rows, t.cols, store, i0 + p * kn.mr, j0 + q * kn.nr);
          }
        }
      }
    }
    if (kn.leave) kn.leave();
  });
  return flags_a.load() | (flags_b.load() << 8);
}

unsigned run_blocked(const Kernel& kn, const Gemm& g, int threads) {
  const Store store = make_store(g);
  const int64_t size_a = dtype_size(g.a.type), size_b = dtype_size(g.b.type);

  // Reading an operand in place saves a pass over it, and pays where each element is used little.
  // Tiles have no tails: they are read in place where there are none.
  const bool whole = g.k % kn.k_step == 0 && (kn.k_step == kn.k_word || g.m % kn.mr == 0);
  const bool direct_a =
      kn.direct_a && whole && (kn.k_word == 1 || g.a.cs == 1) && (g.n <= 2 * kn.nr || g.m <= kn.mr);
  const bool direct_b = kn.direct_b && !g.packed && g.b.cs == 1 && g.m <= 3 * kn.mr;

  const Layout all_a = layout_a(kn, g.m, g.k), all_b = layout_b(kn, g.k, g.n);
  // Cut the problem so that each operand's packed part stays within the limit.
  int64_t part_m = g.m, part_n = g.n;
  if (!direct_a && all_a.total() > kPackedLimit)
    part_m = std::max<int64_t>(4, kPackedLimit / (all_a.total() / all_a.panels)) * kn.mr;
  if (!direct_b && !g.packed && all_b.total() > kPackedLimit)
    part_n = std::max<int64_t>(4, kPackedLimit / (all_b.total() / all_b.panels)) * kn.nr;

  unsigned flags = 0;
  for (int64_t j0 = 0; j0 < g.n; j0 += part_n) {
    const int64_t n = std::min(part_n, g.n - j0);
    Source b{};
    b.layout = layout_b(kn, g.k, g.packed ? g.n : n);
    b.packed = !direct_b;
    b.word = int64_t(kn.nr) * kn.b_bytes * kn.k_word;
    char* pack_b_to = nullptr;
    if (direct_b) {
      b.data = g.b.data + j0 * size_b;
      b.lane = size_b, b.k = g.b.rs * size_b, b.word = b.k * kn.k_word;
    } else if (g.packed) {
      b.data = g.packed->data.get();
    } else {
      pack_b_to = static_cast<char*>(scratch(Scratch::packed_b, b.layout.total()));
      b.data = pack_b_to;
    }
    for (int64_t i0 = 0; i0 < g.m; i0 += part_m) {
      const int64_t m = std::min(part_m, g.m - i0);
      Source a{};
      a.layout = layout_a(kn, m, g.k);
      a.packed = !direct_a;
      a.word = int64_t(kn.mr) * kn.a_bytes * kn.k_word;
      a.lane = int64_t(kn.a_bytes) * kn.k_word;
      char* pack_a_to = nullptr;
      if (direct_a) {
        a.data = g.a.data + i0 * g.a.rs * size_a;
        a.lane = g.a.rs * size_a, a.k = g.a.cs * size_a, a.word = a.k * kn.k_word;
      } else {
        pack_a_to = static_cast<char*>(scratch(Scratch::packed_a, a.layout.total()));
        a.data = pack_a_to;
      }
      flags |= run_part(kn, g, store, i0, m, j0, n, a, b, pack_a_to, i0 == 0 ? pack_b_to : nullptr,
                        threads);
    }
  }
  scratch_trim();
  const unsigned fb = g.packed ? g.packed->flags : flags >> 8;
  return kn.split && split_refused(flags & 0xff, fb) ? 1 : 0;
}

void run_dot(const Kernel& kn, const Gemm& g, int threads) {
  const Store store = make_store(g);
  const int64_t size_a = dtype_size(g.a.type), size_b = dtype_size(g.b.type);
  parallel(threads, [&](int thread, int came) {
    alignas(64) char acc[kDotRows * kDotCols * 8];
    const Range mine = share_of(g.n, kDotCols, thread, came);
    for (int64_t j = mine.begin; j < mine.end; j += kDotCols) {
      const int cols = int(std::min<int64_t>(kDotCols, mine.end - j));
      for (int64_t i = 0; i < g.m; i += kDotRows) {
        const int rows = int(std::min<int64_t>(kDotRows, g.m - i));
        kn.dot(g.a.data + i * g.a.rs * size_a, g.a.rs, rows, g.b.data + j * g.b.cs * size_b, g.b.cs,
               cols, g.k, acc);
        kn.store(acc, kDotCols, rows, cols, store, i, j);
      }
    }
  });
}

}  // namespace fastnn
