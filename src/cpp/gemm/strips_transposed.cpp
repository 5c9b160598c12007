// The loops for C = transposed(A) B with a StripSource A: K is the rows of A, line by line. The
// gradient of a convolution's filters is one: a sum over positions of outer products.
//
//       part of C, or of C and K           shared out among the threads
//         for block of K                   some lines; A's strips and the packed B stay in L2
//           for panel of A's columns       packed, some together; stays in L1
//             for panel of B               tile += transposed(A) . B, on registers
//
// Sums are kept from block to block, as in run_columns.
#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "common/scratch.hpp"
#include "gemm/tiles.hpp"

namespace fastnn {

namespace {

constexpr int64_t kPanelBytes = 16 << 10;    // of A, over a block of K: a share of L1
constexpr int64_t kStripsBytes = 256 << 10;  // of strips held at a time: a share of L2
constexpr int64_t kTilesOfChunks = 256;      // the most whose sums are kept
constexpr int64_t kGroupBytes = 128 << 10;  // of A's panels that are packed together, a share of L2
constexpr int64_t kRows = 16;               // so many rows of all of them at a time
constexpr int64_t kPackCycles = 3;          // for a vector of a row

// How K is cut. It does not depend on the number of threads, and neither do the sums.
struct LineBlocks {
  int64_t lines, part;      // of a block: whole lines, or one part of a line
  int64_t in_line, blocks;  // parts of a line; all blocks
  int64_t in_group;         // blocks whose lines go together, where a group is not one block
  int64_t strip, strips;    // lines of a strip; strips held at a time

  LineBlocks(const Kernel& kn, const StripSource& s) {
    const int64_t most = std::max<int64_t>(kn.k_word, kPanelBytes / (kn.mr * kn.a_bytes));
    const int64_t together = s.lines_together, groups = s.lines / together;
    lines = 1, part = s.line, in_line = 1, in_group = together, strip = together, strips = 1;
    if (s.line > most) {
      in_line = ceil_div(s.line, most);
      part = round_up(ceil_div(s.line, in_line), kn.k_word);
      in_line = ceil_div(s.line, part);
    } else if (s.line * together <= most) {  // whole groups
      strips = std::min(groups, most / (s.line * together));
      while (strips > 1 && strips * s.bytes(together) > kStripsBytes) strips--;
      strips = ceil_div(groups, ceil_div(groups, strips));
      lines = strips * together;
    } else {
      lines = ceil_div(together, ceil_div(together, most / s.line));
    }
    if (lines < together) {
      in_group = ceil_div(together, lines);
      strip = std::min(together, in_group * lines);
      while (strip > lines && s.bytes(strip) > kStripsBytes)
        strip = round_up(ceil_div(strip, 2), lines);
    }
    blocks = lines >= together ? ceil_div(s.lines, lines) * in_line : groups * in_group * in_line;
  }
};

// One block: `count` lines from `first` on, or elements [begin, begin + length) of one.
struct Block {
  int64_t first, count, begin, length;
  Block(const LineBlocks& k, const StripSource& s, int64_t index) {
    const int64_t in = index / k.in_line;
    begin = index % k.in_line * k.part, length = std::min(k.part, s.line - begin);
    if (k.lines >= s.lines_together) {
      first = in * k.lines, count = std::min(k.lines, s.lines - first);
    } else {
      const int64_t within = in % k.in_group * k.lines;
      first = in / k.in_group * s.lines_together + within;
      count = std::min(k.lines, s.lines_together - within);
    }
  }
};

// The strips that a thread holds, and where their lines are.
class Held {
 public:
  // `at` has room for k.strips.
  Held(const StripSource& s, const LineBlocks& k, char* memory, const char** at)
      : s_(s), k_(k), memory_(memory), at_(at) {}
  // Strips for a block's lines, unless they are held already.
  void hold(const Block& b) {
    const int64_t together = s_.lines_together, group = b.first / together,
                  within = b.first % together / k_.strip * k_.strip;
    const int64_t first = group * together + within;
    if (first == first_) return;
    first_ = first;
    for (int64_t i = 0; i < k_.strips && first + i * together < s_.lines; i++)
      at_[i] = s_.fill(memory_ + i * s_.bytes(k_.strip), first + i * together,
                       std::min(k_.strip, together - within));
  }
  const char* line(int64_t index, int64_t size) const {
    const int64_t from = index - first_;
    return k_.strips > 1 ? at_[from / k_.strip] + from % k_.strip * s_.line_step * size
                         : at_[0] + from * s_.line_step * size;
  }

 private:
  const StripSource& s_;
  const LineBlocks& k_;
  char* memory_;
  const char** at_;
  int64_t first_ = -1;
};

// K in chunks of some blocks, each with sums of its own that are added up at the end: where C has
// few tiles, threads share K, and each packs its own part of it. The sums do not depend on how many
// threads there are.
struct Chunks {
  int64_t all, count;
  Chunks(int64_t blocks, int64_t tiles)
      : all(blocks), count(std::min({blocks / 4, kTilesOfChunks / tiles, int64_t(32)})) {
    count = count < 4 ? 1 : count / 4 * 4;
  }
  Range blocks(int64_t chunk) const { return {all * chunk / count, all * (chunk + 1) / count}; }
  int64_t most() const { return ceil_div(all, count); }
};

// to += from, neither with more than `n` elements.
void add(DType type, char* to, const char* from, int64_t n) {
  auto sum = [&](auto* a, const auto* b) {
    for (int64_t i = 0; i < n; i++) a[i] += b[i];
  };
  if (type == DType::f64)
    sum(reinterpret_cast<double*>(to), reinterpret_cast<const double*>(from));
  else
    sum(reinterpret_cast<float*>(to), reinterpret_cast<const float*>(from));
}

// C in parts: the grid of its tiles with the least work for the largest part, in cycles or so for a
// position: a tile's rows, and what is packed for them.
struct Grid {
  int64_t across, down;
  Grid(int64_t panels, int64_t np, int parts, const Kernel& kn) : across(1), down(parts) {
    int64_t least = std::numeric_limits<int64_t>::max();
    for (int64_t q = 1; q <= parts; q++) {
      if (parts % q) continue;
      const int64_t own_q = ceil_div(np, q), own_p = ceil_div(panels, parts / q);
      const int64_t cycles = own_q * own_p * kn.mr + kPackCycles * (own_p + 2 * own_q);
      if (cycles < least) least = cycles, across = q, down = parts / q;
    }
  }
};

// Some panels of a block of B; each line is padded to whole words.
void pack_lines(const Kernel& kn, const Gemm& g, const Block& b, const Range& panels, char* to,
                int64_t panel_bytes) {
  const int64_t size = dtype_size(g.b.type);
  const int64_t line_bytes = ceil_div(b.length, kn.k_word) * kn.k_word * kn.nr * kn.b_bytes;
  for (int64_t i = 0; i < b.count; i++) {
    int64_t at, none;
    g.rows.find(b.first + i, at, none);
    const char* line = g.b.data + (at + b.begin * g.b.rs) * size;
    // Some rows of all panels: a piece from each of many pages is the slowest way through memory.
    const int64_t step = g.b.cs == 1 ? kRows : b.length;
    for (int64_t k = 0; k < b.length; k += step)
      for (int64_t q = panels.begin; q < panels.end; q++)
        kn.pack_b(to + (q - panels.begin) * panel_bytes + i * line_bytes + k * kn.nr * kn.b_bytes,
                  line + (k * g.b.rs + q * kn.nr * g.b.cs) * size, g.b.cs, g.b.rs,
                  int(std::min<int64_t>(kn.nr, g.n - q * kn.nr)), std::min(step, b.length - k));
  }
}

// Some panels of a block of A, likewise, from its first line on.
void pack_panels(const Kernel& kn, const StripSource& s, const Block& b, const char* first,
                 const int64_t* lines, int64_t in_run, const Range& panels, char* to,
                 int64_t panel_bytes) {
  const int64_t size = dtype_size(kn.a), lanes = ceil_div(s.run, in_run);
  const int64_t line_bytes = ceil_div(b.length, kn.k_word) * kn.k_word * kn.mr * kn.a_bytes;
  for (int64_t i = 0; i < b.count; i++)
    for (int64_t k = 0; k < b.length; k += kRows)
      for (int64_t p = panels.begin; p < panels.end; p++) {
        const int64_t lane = p % in_run * lanes;
        kn.pack_a(to + (p - panels.begin) * panel_bytes + i * line_bytes + k * kn.mr * kn.a_bytes,
                  first + lines[i] + (s.runs[size_t(p / in_run)] + lane + k * s.row_step) * size, 1,
                  s.row_step, int(std::min(lanes, s.run - lane)), std::min(kRows, b.length - k));
      }
}

}  // namespace

void run_strips_transposed(const Kernel& kn, const Gemm& g, int threads) {
  const StripSource& s = *g.a_strips;
  const Store store = make_store(g);
  const int64_t size = dtype_size(g.a.type);
  const LineBlocks k(kn, s);
  const int64_t in_run = ceil_div(s.run, kn.mr), panels = int64_t(s.runs.size()) * in_run;
  const int64_t np = ceil_div(g.n, kn.nr);
  // Words of K that a line takes in packed panels, and a block.
  const int64_t line_words = ceil_div(k.part, kn.k_word), words = k.lines * line_words,
                length = words * kn.k_word;
  const int64_t a_bytes = round_up(words * kn.mr * kn.a_bytes * kn.k_word, 64),
                b_bytes = round_up(words * kn.nr * kn.b_bytes * kn.k_word, 64);

  const Chunks chunks(k.blocks, panels * np);
  const int cells = threads / int(std::gcd(int64_t(threads), chunks.count));
  const Grid grid(panels, np, cells, kn);
  const int64_t most_p = ceil_div(panels, grid.down), most_q = ceil_div(np, grid.across);
  Source a{};
  a.packed = true;
  a.layout = layout_a(kn, s.run, 1);
  a.layout.lanes = ceil_div(s.run, in_run);  // even panels rather than a thin last one
  const int64_t group = std::min(most_p, std::max<int64_t>(1, kGroupBytes / a_bytes));

  // A chunk's sums as a matrix of their own.
  const int64_t ld = np * kn.nr, chunk_bytes = g.m * ld * dtype_size(kn.acc);
  Store partial{};
  partial.type = kn.acc, partial.c_rs = ld, partial.c_cs = 1, partial.plain = true;
  partial.alpha = 1, partial.alpha64 = 1;
  if (chunks.count > 1)
    partial.c = static_cast<char*>(scratch(Scratch::packed_a, size_t(chunks.count * chunk_bytes)));

  const int64_t sums_bytes =
                    round_up(Sums(kn, chunks.most(), length, most_p * most_q).bytes(kn), 4096),
                strips_bytes = round_up(k.strips * s.bytes(k.strip), 4096),
                panels_bytes = round_up(most_q * b_bytes, 4096);
  const int64_t own_bytes = sums_bytes + strips_bytes + panels_bytes + group * a_bytes;
  char* own = static_cast<char*>(scratch(Scratch::accumulator, size_t(own_bytes * threads)));
  const int64_t b_word = int64_t(kn.nr) * kn.b_bytes * kn.k_word;

  // Of each thread: how far lines are from a block's first, and the strips that it holds.
  std::vector<int64_t> all_runs(size_t(k.lines * threads));
  std::vector<const char*> all_strips(size_t(k.strips * threads));
  Shares shares(cells * chunks.count, threads);
  parallel(threads, [&](int thread, int came) {
    char* sum_memory = own + own_bytes * thread;
    char* strip_memory = sum_memory + sums_bytes;
    char* packed_b = strip_memory + strips_bytes;
    char* packed_a = packed_b + panels_bytes;
    int64_t* runs = &all_runs[size_t(thread * k.lines)];
    for (Range item; (item = shares.take(thread, 1)).begin < item.end;) {
      const int64_t cell = item.begin / chunks.count, chunk = item.begin % chunks.count;
      const Range p = share_of(panels, 1, int(cell % grid.down), int(grid.down)),
                  q = share_of(np, 1, int(cell / grid.down), int(grid.across));
      const Range blocks = chunks.blocks(chunk);
      if (p.begin == p.end || q.begin == q.end) continue;
      Store to = store;
      if (chunks.count > 1) to = partial, to.c += chunk * chunk_bytes;
      const Sums sums(kn, blocks.end - blocks.begin, length, most_p * most_q);
      Tiles tiles(kn, to, a, sums, sum_memory, s.run, g.n, 0, 0);
      Held held(s, k, strip_memory, &all_strips[size_t(thread * k.strips)]);
      for (int64_t index = blocks.begin; index < blocks.end; index++) {
        const Block b(k, s, index);
        pack_lines(kn, g, b, q, packed_b, b_bytes);
        held.hold(b);
        const char* first = held.line(b.first, size) + b.begin * s.row_step * size;
        for (int64_t i = 0; i < b.count; i++)
          runs[i] = held.line(b.first + i, size) - held.line(b.first, size);
        tiles.block(index - blocks.begin, b.count * ceil_div(b.length, kn.k_word));
        // Long lines take little more time to multiply than to read: those of the next block come
        // while this one is multiplied.
        const bool long_lines = k.in_line > 1 && index + 1 < blocks.end;
        const Block next(k, s, long_lines ? index + 1 : index);
        const int64_t tiles_of_block = (p.end - p.begin) * (q.end - q.begin);
        int64_t at_b, none;
        g.rows.find(next.first, at_b, none);
        Ahead ahead_b(long_lines && g.b.cs == 1
                          ? g.b.data + (at_b + next.begin * g.b.rs + q.begin * kn.nr) * size
                          : nullptr,
                      next.length * g.b.rs * size, tiles_of_block);
        Ahead ahead_a(long_lines && s.bytes(1) == 0
                          ? s.fill(nullptr, next.first, 1) + next.begin * s.row_step * size
                          : nullptr,
                      next.length * s.row_step * size, tiles_of_block);
        for (int64_t panel = p.begin; panel < p.end; panel++) {
          if ((panel - p.begin) % group == 0)
            pack_panels(kn, s, b, first, runs, in_run, {panel, std::min(p.end, panel + group)},
                        packed_a, a_bytes);
          tiles.line(panel / in_run * s.run * to.c_rs, 0);
          for (int64_t j = q.begin; j < q.end; j++) {
            ahead_a.step(), ahead_b.step();
            tiles.panel(packed_b + (j - q.begin) * b_bytes, true, b_word, j);
            tiles.run(packed_a + (panel - p.begin) % group * a_bytes, panel % in_run,
                      (panel - p.begin) * (q.end - q.begin) + j - q.begin);
          }
        }
      }
    }
    if (chunks.count == 1) return;
    if (came > 1) barrier();
    // The chunks' sums added up in their order, a row of C's after the other.
    const Range mine = share_of(ceil_div(g.m, kn.mr), 1, thread, came);
    for (int64_t panel = mine.begin; panel < mine.end; panel++) {
      const int64_t i = panel * kn.mr;
      const int rows = int(std::min<int64_t>(kn.mr, g.m - i));
      const int64_t row_bytes = ld * int64_t(dtype_size(kn.acc));
      char* total = partial.c + i * row_bytes;
      for (int64_t chunk = 1; chunk < chunks.count; chunk++)
        for (int64_t row = 0; row < rows * row_bytes; row += row_bytes)
          add(kn.acc, total + row, total + row + chunk * chunk_bytes, g.n);
      for (int64_t j = 0; j < g.n; j += kn.nr)
        kn.store(total + j * dtype_size(kn.acc), int(ld), rows,
                 int(std::min<int64_t>(kn.nr, g.n - j)), store, i, j);
    }
  });
}

}  // namespace fastnn
