// The five loops of GEMM, written once for every kernel.
//
//   K is cut into blocks of kc, A into panels of mr rows, B into panels of nr columns. A block of
//   C (some panels by some panels) belongs to one thread, which walks all of K for it:
//
//       for block of C           shared out among the threads
//         for block of K         packed A (rows x kc) stays in L2, and so does a panel of B
//           for panel of B
//             for panel of A     tile += A panel . B panel, on registers
//       the last block of K also stores: epilogue, conversion, C
//
//   A long chain of additions would err in proportion to its length. A tile of plain float32 sums
//   `fold` elements of K (128) on registers, adds that to its sum of the block, and this, after kc
//   of them (1024), to that of the blocks before: the error grows with fold + kc / fold + K / kc,
//   not with K. Blocks as short as the sums would take a tenth of the time for going to and fro.
//   Where tiles do not fold, blocks are summed by sixteens instead. No element of C depends on how
//   the blocks were shared out: the same bits for any number of threads.
//
//   There are two ways through the loops. `run_blocks` packs both operands first, all threads
//   together. `run_columns` is for an A that stays in the cache: a thread packs each panel of B
//   just before its use, for itself. What one core packed another reads slowly, and what is packed
//   all at once goes to memory and back, so this is faster until A no longer fits.
#include <algorithm>

#include "common/caches.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "gemm/tiles.hpp"
#include "quant/requantize.hpp"

namespace fastnn {

namespace {

constexpr int64_t kPackedLimit = int64_t(64) << 20;  // bytes of an operand packed at a time
constexpr int64_t kBlockBytes = 256 << 10;           // packed A of a block: a share of L2
constexpr int64_t kSumBytes = 384 << 10;             // sums of a block, another
constexpr int kBlockPanelsB = 16;
constexpr int64_t kLeastBlocks = 3, kManyBlocks = 12;    // for each thread
constexpr int64_t kLongBlock = 12;                       // tiles
constexpr int64_t kLittleK = 128;                        // beside what it takes to write C
constexpr int64_t kColumnsBytes = int64_t(4) << 20;      // of A for run_columns: a share of L3,
constexpr int64_t kTileColumnsBytes = int64_t(3) << 19;  // or, where tiles read faster, of L2
constexpr int64_t kColumnsK = 64;                        // more than this
constexpr int64_t kGroup = 8;                            // panels of B packed together,
constexpr int64_t kGroupSumBytes = int64_t(1) << 20;     // with no more than this for their sums,
constexpr int64_t kGroupRows = 16;                       // so many of its rows at a time
constexpr int64_t kColliding = 32;  // panels of B that rows of A which collide are read for
constexpr int64_t kInPlaceBytes = int64_t(1) << 20;  // of A to be read where it lies

}  // namespace

size_t packed_b_bytes(const Kernel& kn, int64_t k, int64_t n) { return layout_b(kn, k, n).total(); }

unsigned pack_all_b(const Kernel& kn, const Matrix& b, int64_t k, int64_t n, char* dst, int thread,
                    int threads) {
  return pack(kn.pack_b, kn.finish_b, kn.k_word, layout_b(kn, k, n), dst, b, b.cs, b.rs, n, thread,
              threads);
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
  s.requantize = g.requantize;
  s.residual_size = dtype_size(g.requantize ? g.requantize->residual_type : g.c.type);
  s.columns = g.columns.length ? &g.columns : nullptr;
  s.plain = g.alpha == 1 && !s.residual && !s.bias && !s.activation && !s.row_scale &&
            !s.col_scale && !s.requantize;
  return s;
}

// Part of the problem: rows [i0, i0+m) and columns [j0, j0+n), with both operands' panels at once
// in the scratch memory.
static void run_blocks(const Kernel& kn, const Gemm& g, const Store& store, int64_t i0, int64_t m,
                       int64_t j0, int64_t n, const Source& a, const Source& b, char* pack_a_to,
                       char* pack_b_to, Flags& flags, int threads) {
  const int64_t mp = a.layout.panels, np = ceil_div(n, kn.nr);
  const bool sum = a.layout.blocks() > 1;

  int64_t block_a = std::max<int64_t>(
      1, kBlockBytes / std::max<int64_t>(1, std::min(a.layout.kc, g.k) * kn.mr * kn.a_bytes));
  int64_t block_b = kBlockPanelsB;
  block_a = std::min(block_a, mp), block_b = std::min(block_b, np);
  // The sums of a block live in L2 as well.
  if (sum)
    block_a = std::min(block_a, std::max<int64_t>(1, kSumBytes / (block_b * tile_bytes(kn))));
  // Enough blocks that threads which finish early find work: some each, and, where they are still
  // long then, more, because no two threads are equally fast. Of each a share that is as large.
  auto blocks = [&] { return ceil_div(mp, block_a) * ceil_div(np, block_b); };
  while (threads > 1 && (block_a > 1 || block_b > 1) &&
         (blocks() < kLeastBlocks * threads ||
          (blocks() < kManyBlocks * threads && block_a * block_b > kLongBlock))) {
    if (block_b > 1 && (block_b * kn.nr >= block_a * kn.mr || block_a <= kLongBlock))
      block_b = ceil_div(block_b, 2);
    else
      block_a = ceil_div(block_a, 2);
  }
  block_a = ceil_div(mp, ceil_div(mp, block_a)), block_b = ceil_div(np, ceil_div(np, block_b));
  const int64_t blocks_m = ceil_div(mp, block_a), blocks_n = ceil_div(np, block_b);
  const Sums sums(kn, a.layout.blocks(), a.layout.kc, block_a * block_b);
  const int64_t own_bytes = round_up(sums.bytes(kn), 64);
  char* own = static_cast<char*>(scratch(Scratch::accumulator, own_bytes * threads));

  Shares shares(blocks_m * blocks_n, threads);
  parallel(threads, [&](int thread, int came) {
    if (pack_a_to) {
      Matrix part = g.a;
      part.data += i0 * g.a.rs * int64_t(dtype_size(g.a.type));
      flags.a |= pack(kn.pack_a, nullptr, kn.k_word, a.layout, pack_a_to, part, g.a.rs, g.a.cs, m,
                      thread, came);
    }
    if (pack_b_to) {
      Matrix part = g.b;
      part.data += j0 * g.b.cs * int64_t(dtype_size(g.b.type));
      flags.b |= pack(kn.pack_b, kn.finish_b, kn.k_word, b.layout, pack_b_to, part, g.b.cs, g.b.rs,
                      n, thread, came);
    }
    if (pack_a_to || pack_b_to) {
      if (came > 1) barrier();
      if (flags.refused(kn)) return;
    }
    if (kn.enter) kn.enter();
    Tiles tiles(kn, store, a, sums, own + own_bytes * thread, m, n, i0, j0);
    for (Range r; (r = shares.take(thread, 1)).begin < r.end;) {
      const int64_t p0 = r.begin % blocks_m * block_a, q0 = r.begin / blocks_m * block_b;
      const int64_t p1 = std::min(mp, p0 + block_a), q1 = std::min(np, q0 + block_b);
      for (int64_t block = 0; block < sums.blocks; block++) {
        tiles.block(block, g.k ? a.layout.padded(block) / kn.k_word : 0);
        const Source::Panels of_a = g.k ? a.panels(block) : Source::Panels{},
                             of_b = g.k ? b.panels(block) : Source::Panels{};
        auto one = [&](int64_t p, int64_t q) {
          tiles.panel(of_b.at(q), b.packed, b.word, q);
          tiles.run(of_a.at(p), p, (q - q0) * block_a + (p - p0));
        };
        if (g.k > kLittleK) {
          // The first panel of B of the thread's next block of tiles, if that has others.
          const int64_t following = r.end / blocks_m * block_b;
          for (int64_t q = q0; q < q1; q++) {
            int64_t next = block, panel = q + 1;
            if (panel == q1) next = block + 1, panel = q0;
            if (next == sums.blocks) next = 0, panel = following == q0 ? np : following;
            Ahead ahead(b.packed && panel < np ? b.at(next, panel) : nullptr,
                        b.layout.panel_bytes(next), p1 - p0);
            for (int64_t p = p0; p < p1; p++) ahead.step(tiles), one(p, q);
          }
        } else {  // little work an element of C: its rows are written through, one by one
          for (int64_t p = p0; p < p1; p++)
            for (int64_t q = q0; q < q1; q++) one(p, q);
        }
      }
    }
    if (kn.leave) kn.leave();
  });
}

// All of the problem, each thread with panels of B that it packs for itself.
static void run_columns(const Kernel& kn, const Gemm& g, const Store& store, const Source& a,
                        char* pack_a_to, Flags& flags, int threads) {
  Layout b = layout_b(kn, g.k, g.n);
  b.segments = a.layout.segments, b.kc = a.layout.kc;
  const int64_t mp = a.layout.panels, np = b.panels, blocks = b.blocks();
  // Whole panels where there are enough of them to go round, else an even share of the tiles.
  const bool whole_panels = np >= 4 * threads;
  const int64_t unit = whole_panels ? mp : 1;
  // Rows of B are read in long pieces, several panels wide: a line from each of many pages is the
  // slowest way through memory. Not by split kernels: what their packing notices is of a whole
  // panel, and slices do not know it.
  const bool grouped = whole_panels && (g.b_panels || g.b.cs == 1) && !kn.split;
  const int64_t wanted = std::min<int64_t>(kGroup, np / (4 * threads));
  const int64_t fitting = kGroupSumBytes / (mp * tile_bytes(kn));
  const int64_t group = grouped ? std::max<int64_t>(1, std::min(wanted, fitting)) : 1;
  const int64_t panel_bytes = round_up(b.panel_bytes(0), 4096);
  const Sums sums(kn, blocks, b.kc, group * mp);
  const int64_t size_b = dtype_size(g.b.type), sums_bytes = round_up(sums.bytes(kn), 4096);
  // A panel made for a kernel that packs it further lies here in between.
  const bool as_packed = kn.k_word == 1 && kn.b_bytes == size_b && !kn.split && !kn.b_extra;
  const int64_t made_bytes =
      g.b_panels && !as_packed ? round_up(std::min(b.kc, g.k) * kn.nr * size_b, 4096) : 0;
  const int64_t own_bytes = group * panel_bytes + sums_bytes + made_bytes;
  char* own = static_cast<char*>(scratch(Scratch::accumulator, own_bytes * threads));
  const int64_t b_word = int64_t(kn.nr) * kn.b_bytes * kn.k_word;

  Shares shares(mp * np / unit, threads);
  parallel(threads, [&](int thread, int came) {
    if (pack_a_to) {
      flags.a |= pack(kn.pack_a, nullptr, kn.k_word, a.layout, pack_a_to, g.a, g.a.rs, g.a.cs, g.m,
                      thread, came, g.a_segment);
      if (came > 1) barrier();
    }
    if (kn.enter) kn.enter();
    char* panels = own + own_bytes * thread;
    char* made = panels + group * panel_bytes + sums_bytes;
    Tiles tiles(kn, store, a, sums, panels + group * panel_bytes, g.m, g.n, 0, 0);
    unsigned seen = 0;
    // Some rows of a panel of B, packed.
    auto pack_rows = [&](char* panel, int64_t block, int64_t q, int64_t k, int64_t rows) {
      char* to = panel + k * kn.nr * kn.b_bytes;
      const int64_t j0 = q * kn.nr, k0 = b.begin(block) + k;
      const int columns = int(std::min<int64_t>(kn.nr, g.n - j0));
      if (!g.b_panels)
        return kn.pack_b(to, g.b.data + (j0 * g.b.cs + k0 * g.b.rs) * size_b, g.b.cs, g.b.rs,
                         columns, rows);
      g.b_panels->fill(as_packed ? to : made, b.segment(block), k0, rows, j0, columns, kn.nr);
      return as_packed ? 0 : kn.pack_b(to, made, 1, kn.nr, columns, rows);
    };
    // Where rows of B lie whose panels are packed after those of block `block` of panels [q0, q1).
    auto rows_after = [&](int64_t block, int64_t q0, int64_t q1) {
      int64_t next = block + 1;
      if (next == sums.blocks) next = 0, q0 = q1, q1 = std::min(q1 + group, np);
      const int64_t j0 = q0 * kn.nr, n = std::min(q1 * kn.nr, g.n) - j0, k0 = b.begin(next);
      if (n <= 0) return MatrixRows{};
      if (g.b_panels) return g.b_panels->rows(b.segment(next), k0, j0, n);
      return MatrixRows{g.b.data + (j0 * g.b.cs + k0 * g.b.rs) * size_b, g.b.rs * size_b,
                        n * size_b};
    };
    for (Range r; (r = shares.take(thread, whole_panels ? group : mp * np)).begin < r.end;) {
      for (int64_t item = r.begin * unit, end = r.end * unit; item < end;) {
        const int64_t q0 = item / mp, p0 = item % mp;
        const int64_t p1 = std::min(mp, p0 + (end - item));
        const int64_t q1 = std::min(q0 + group, ceil_div(end, mp));
        for (int64_t block = 0; block < sums.blocks; block++) {
          const int64_t length = g.k ? b.length(block) : 0,
                        step = group == 1 || g.b_panels ? length
                                                        : std::max<int64_t>(kGroupRows, kn.k_step);
          for (int64_t k = 0; k < length; k += step)
            for (int64_t q = q0; q < q1; q++)
              seen |= pack_rows(panels + (q - q0) * panel_bytes, block, q, k,
                                std::min(step, length - k));
          const int64_t words = g.k ? b.padded(block) / kn.k_word : 0;
          tiles.block(block, words);
          const Source::Panels of_a = words ? a.panels(block) : Source::Panels{};
          const MatrixRows next = group > 1 ? rows_after(block, q0, q1) : MatrixRows{};
          int64_t asked = next.first ? 0 : length;
          for (int64_t q = q0; q < q1; q++) {
            if (kn.finish_b && words) kn.finish_b(panels + (q - q0) * panel_bytes, words);
            tiles.panel(panels + (q - q0) * panel_bytes, true, b_word, q);
            for (int64_t p = p0; p < p1; p++) {
              if (asked < length) asked += tiles.ahead(next, asked, length - asked);
              tiles.run(of_a.at(p), p, (q - q0) * mp + p - p0);
            }
          }
        }
        item += (q1 - q0 - 1) * mp + (p1 - p0);
      }
    }
    flags.b |= seen;
    if (kn.leave) kn.leave();
  });
}

static bool a_collides(const Kernel& kn, const Gemm& g) {
  return g.a.cs == 1 && rows_collide(std::abs(g.a.rs) * int64_t(dtype_size(g.a.type)),
                                     std::min(g.m, int64_t(kn.mr)));
}

// A read in place all the same, in panels of half the rows, which do not. (All rows of a tile of
// matrix units are read at once.)
static void read_thin_panels(const Kernel& kn, const Gemm& g, Source& a) {
  if (!kn.finishes || !a_collides(kn, g)) return;
  a.layout.lanes = ceil_div(kn.mr, 2);
  a.layout.panels = ceil_div(g.m, a.layout.lanes);
}

// The product with a PanelSource: B's panels are made by their user, and A is read in place where
// it can be, unless each of its elements is used so often that packing it is repaid.
bool run_panels(const Kernel& kn, const Gemm& g, int threads) {
  const Store store = make_store(g);
  const int64_t size_a = dtype_size(g.a.type);
  Flags flags;
  Source a{};
  a.layout = layout_a(kn, g.m, g.k);
  a.layout.segments = g.segments, a.layout.kc = even_blocks(kn, g.k);
  const bool whole = g.k % kn.k_step == 0 && (kn.k_step == kn.k_word || g.m % kn.mr == 0);
  const bool direct_a = kn.direct_a && whole && (kn.k_word == 1 || g.a.cs == 1) &&
                        (g.n <= 2 * kn.nr || !a_collides(kn, g));
  char* pack_a_to = nullptr;
  a.packed = !direct_a;
  if (direct_a) {
    a.data = g.a.data;
    a.lane = g.a.rs * size_a, a.k = g.a.cs * size_a, a.word = a.k * kn.k_word;
    a.segment = g.a_segment * size_a;
    read_thin_panels(kn, g, a);
  } else {
    a.word = int64_t(kn.mr) * kn.a_bytes * kn.k_word;
    a.lane = int64_t(kn.a_bytes) * kn.k_word;
    pack_a_to = static_cast<char*>(scratch(Scratch::packed_a, a.layout.total()));
    a.data = pack_a_to;
  }
  run_columns(kn, g, store, a, pack_a_to, flags, threads);
  return !flags.refused(kn);
}

bool run_blocked(const Kernel& kn, const Gemm& g, int threads) {
  const Store store = make_store(g);
  const int64_t size_a = dtype_size(g.a.type), size_b = dtype_size(g.b.type);
  const Layout all_a = layout_a(kn, g.m, g.k), all_b = layout_b(kn, g.k, g.n);
  Flags flags;

  // Reading A in place saves a pass over it. Tiles that ask for its rows ahead of time read them as
  // fast as if they were packed, except where rows collide, which costs more the wider C is. Other
  // tiles do where A stays in the cache, or each element is used little; those of matrix units have
  // no tails, and read in place where there are none.
  const bool whole = g.k % kn.k_step == 0 && (kn.k_step == kn.k_word || g.m % kn.mr == 0);
  const bool collide = a_collides(kn, g);
  const bool little = g.n <= 4 * kn.nr || g.m * g.k * size_a <= kInPlaceBytes;
  const bool ahead = kn.finishes && g.a.cs == 1 && (!collide || g.n <= kColliding * kn.nr);
  const bool widens = kn.acc == DType::s32 && kn.a_bytes != size_a;  // better once, when packed
  const bool direct_a =
      kn.direct_a && whole && !widens && (kn.k_word == 1 || g.a.cs == 1) &&
      (g.n <= 2 * kn.nr || g.m <= kn.mr || ahead || (little && (kn.finishes || !collide)));
  // B is read anew for each panel of A, which is worth it for a few; in blocks of its own, so that
  // sums differ in their last bits.
  const int64_t few = collide && kn.finishes ? 2 : 3;
  const bool direct_b =
      kn.direct_b && !g.packed && !g.batch_invariant && g.b.cs == 1 && g.m <= few * kn.mr;
  const bool columns = !direct_b && !g.packed && g.k > kColumnsK &&
                       all_a.total() <= (kn.enter ? kTileColumnsBytes : kColumnsBytes);

  // Cut the problem so that each operand's packed part stays within the limit.
  int64_t part_m = g.m, part_n = g.n;
  if (!direct_a && all_a.total() > kPackedLimit)
    part_m = std::max<int64_t>(4, kPackedLimit / (all_a.total() / all_a.panels)) * kn.mr;
  if (!direct_b && !g.packed && !columns && all_b.total() > kPackedLimit)
    part_n = std::max<int64_t>(4, kPackedLimit / (all_b.total() / all_b.panels)) * kn.nr;

  for (int64_t j0 = 0; j0 < g.n; j0 += part_n) {
    const int64_t n = std::min(part_n, g.n - j0);
    Source b{};
    b.layout = layout_b(kn, g.k, g.packed ? g.n : n);
    // Rows of B that lie far apart share few sets of L2: short blocks, of a sum each, stay in L1.
    if (direct_b) b.layout.kc = sum_length(kn);
    b.packed = !direct_b;
    b.word = int64_t(kn.nr) * kn.b_bytes * kn.k_word;
    char* pack_b_to = nullptr;
    if (direct_b) {
      b.data = g.b.data + j0 * size_b;
      b.lane = size_b, b.k = g.b.rs * size_b, b.word = b.k * kn.k_word;
    } else if (g.packed) {
      b.data = g.packed->data.get();
      flags.b = g.packed->flags;
    } else if (!columns) {
      pack_b_to = static_cast<char*>(scratch(Scratch::packed_b, b.layout.total()));
      b.data = pack_b_to;
    }
    for (int64_t i0 = 0; i0 < g.m; i0 += part_m) {
      const int64_t m = std::min(part_m, g.m - i0);
      Source a{};
      a.layout = layout_a(kn, m, g.k);
      a.layout.kc = b.layout.kc;
      a.packed = !direct_a;
      a.word = int64_t(kn.mr) * kn.a_bytes * kn.k_word;
      a.lane = int64_t(kn.a_bytes) * kn.k_word;
      char* pack_a_to = nullptr;
      if (direct_a) {
        a.data = g.a.data + i0 * g.a.rs * size_a;
        a.lane = g.a.rs * size_a, a.k = g.a.cs * size_a, a.word = a.k * kn.k_word;
        read_thin_panels(kn, g, a);
      } else {
        pack_a_to = static_cast<char*>(scratch(Scratch::packed_a, a.layout.total()));
        a.data = pack_a_to;
      }
      if (columns)
        run_columns(kn, g, store, a, pack_a_to, flags, threads);
      else
        run_blocks(kn, g, store, i0, m, j0, n, a, b, pack_a_to, i0 == 0 ? pack_b_to : nullptr,
                   flags, threads);
    }
  }
  scratch_trim();
  return !flags.refused(kn);
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
