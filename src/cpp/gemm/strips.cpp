// The loops for a StripSource: A's strips are made by their user and read in place, B is packed.
//
//       for strip of A, some panels of B     shared out among the threads; the strip stays in L2
//         for group of panels of B           more than one where they are short
//           for block of K                   the group's blocks stay in L1
//             for line of the strip
//               for panel of its rows
//                 for panel of the group     tile += A . B, on registers
#include "common/scratch.hpp"
#include "gemm/prepared.hpp"
#include "gemm/tiles.hpp"

namespace fastnn {

namespace {

constexpr int64_t kStripBytes = 512 << 10;  // a share of L2
constexpr int64_t kGroupBytes = 16 << 10;   // a share of L1
constexpr int64_t kLeastTiles = 8;          // of a strip, that a block of B be worth loading

// How the rows are cut into strips, and strips and panels of B into items for the threads.
struct Cut {
  int64_t lines;          // of a strip
  int64_t in_group;       // strips of lines that go together
  int64_t strips;         // all
  int64_t panels, parts;  // panels of B that go with a strip; parts of B
  Cut(const StripSource& s, int64_t line_bytes, int64_t tiles_in_line, int64_t np, int threads) {
    const int64_t together = s.lines_together, groups = s.lines / together;
    auto bytes = [&](int64_t count) { return std::max(s.bytes(count), count * line_bytes); };
    lines = together;
    while (lines > 1 && bytes(lines) > kStripBytes) lines = ceil_div(lines, 2);
    const int64_t wanted = threads > 1 ? 4 * threads : 1;
    while (lines > 1 && groups * ceil_div(together, lines) < wanted &&
           ceil_div(lines, 2) * tiles_in_line >= kLeastTiles)
      lines = ceil_div(lines, 2);
    in_group = ceil_div(together, lines);
    lines = ceil_div(together, in_group);
    strips = groups * in_group;
    panels = ceil_div(np, std::min(np, ceil_div(wanted, strips)));
    parts = ceil_div(np, panels);
  }
  int64_t first(int64_t strip, int64_t together) const {
    return strip / in_group * together + strip % in_group * lines;
  }
  int64_t count(int64_t strip, int64_t together) const {
    return std::min(lines, together - strip % in_group * lines);
  }
};

// Blocks of K: some whole runs, or even parts of one.
struct RunBlocks {
  Layout b;
  bool parts;                       // of a run
  int64_t runs = 1;                 // in a block
  std::vector<int64_t> from_first;  // how far each run is from its block's first, in bytes
  RunBlocks(const Kernel& kn, const StripSource& s, int64_t n, int64_t size)
      : b(layout_b(kn, s.run, n)) {
    const int64_t most = kn.kc + kn.kc / 4, count = int64_t(s.runs.size());
    parts = s.run > most;
    if (parts) {
      b.segments = count, b.kc = even_blocks(kn, s.run);
    } else {
      runs = ceil_div(count, ceil_div(count, most / s.run));
      b.k = count * s.run, b.kc = runs * s.run;
    }
    for (size_t r = 0; r < s.runs.size(); r++)
      from_first.push_back((s.runs[r] - s.runs[r - r % size_t(runs)]) * size);
  }
  int64_t first_run(int64_t block) const { return parts ? b.segment(block) : block * runs; }
  // Where the block begins within that run, and how much of each run it has.
  int64_t begin(int64_t block) const { return parts ? b.begin(block) : 0; }
  int64_t length(int64_t block) const { return parts ? b.length(block) : b.kc / runs; }
};

}  // namespace

void run_strips(const Kernel& kn, const Gemm& g, int threads) {
  const StripSource& s = *g.a_strips;
  const Store store = make_store(g);
  const int64_t size = dtype_size(g.a.type);
  const RunBlocks k(kn, s, g.n, size);
  const int64_t tiles_in_line = ceil_div(s.line, kn.mr), blocks = k.b.blocks();

  Source a{};
  a.packed = false;
  a.layout = layout_a(kn, s.line, g.k);
  a.layout.lanes = ceil_div(s.line, tiles_in_line);  // even panels rather than a thin last one
  a.lane = s.row_step * size, a.word = int64_t(kn.k_word) * size;

  const Cut cut(s, s.line_step * size, tiles_in_line, k.b.panels, threads);
  const Sums sums(kn, blocks, k.b.kc, cut.lines * tiles_in_line);
  const int64_t sums_bytes = round_up(sums.bytes(kn), 4096);
  const int64_t own_bytes = sums_bytes + round_up(s.bytes(cut.lines), 4096);
  char* own = static_cast<char*>(scratch(Scratch::accumulator, size_t(own_bytes * threads)));
  auto pack_all = [&](char* to, int thread, int came) {
    pack(kn.pack_b, nullptr, kn.k_word, k.b, to, g.b, g.b.cs, g.b.rs, g.n, thread, came,
         s.run * g.b.rs);
  };
  char* memory_of_b = nullptr;
  const char* packed;
  if (g.prepared)
    packed =
        g.prepared->get("strips", &kn, s.run, g.prepared_part, size_t(k.b.total()), [&](char* to) {
          Prepared::want(g.b.data, g.k * g.n);
          parallel(threads, [&](int thread, int came) { pack_all(to, thread, came); });
        });
  else
    packed = memory_of_b = static_cast<char*>(scratch(Scratch::packed_b, size_t(k.b.total())));
  const int64_t b_word = int64_t(kn.nr) * kn.b_bytes * kn.k_word;
  // What neighbouring columns of C and of the residual share, lines and pages, is then used at
  // once.
  const int64_t group = blocks == 1 ? std::max<int64_t>(1, kGroupBytes / k.b.panel_bytes(0)) : 1;

  Shares shares(cut.strips * cut.parts, threads);
  parallel(threads, [&](int thread, int came) {
    if (memory_of_b) {
      pack_all(memory_of_b, thread, came);
      if (came > 1) barrier();
    }
    if (kn.enter) kn.enter();
    char* memory = own + own_bytes * thread;
    Tiles tiles(kn, store, a, sums, memory, s.line, g.n, 0, 0);
    const char* rows = nullptr;
    int64_t held = -1;
    for (Range r; (r = shares.take(thread, 1)).begin < r.end;) {
      const int64_t strip = r.begin / cut.parts, q0 = r.begin % cut.parts * cut.panels;
      const int64_t first = cut.first(strip, s.lines_together),
                    count = cut.count(strip, s.lines_together);
      if (strip != held) rows = s.fill(memory + sums_bytes, first, count), held = strip;
      const int64_t q1 = std::min(k.b.panels, q0 + cut.panels);
      for (int64_t q = q0; q < q1; q += group)
        for (int64_t block = 0; block < blocks; block++) {
          const int64_t some = std::min(group, q1 - q);
          const int64_t run = k.first_run(block);
          const char* from = rows + (s.runs[size_t(run)] + k.begin(block)) * size;
          tiles.block(block, k.length(block) / kn.k_word);
          tiles.runs(std::min(k.runs, int64_t(s.runs.size()) - run), &k.from_first[size_t(run)]);
          const char* panel = packed + k.b.offset(block, q);
          const int64_t panel_bytes = k.b.panel_bytes(block);
          // Panels lie one after the other within a block, and the next block after them.
          const int64_t left = k.b.panels - (q + some);
          Ahead ahead(block + 1 < blocks ? packed + k.b.offset(block + 1, q)
                      : left > 0         ? packed + k.b.offset(0, q + some)
                                         : nullptr,
                      panel_bytes * (blocks > 1 ? 1 : std::min(group, left)),
                      count * tiles_in_line);
          for (int64_t line = 0; line < count; line++) {
            int64_t c, residual;
            g.rows.find(first + line, c, residual);
            tiles.line(c, residual);
            for (int64_t p = 0; p < tiles_in_line; p++) {
              ahead.step(tiles);
              for (int64_t i = 0; i < some; i++) {
                tiles.panel(panel + i * panel_bytes, true, b_word, q + i);
                tiles.run(from + (line * s.line_step + p * a.layout.lanes * s.row_step) * size, p,
                          line * tiles_in_line + p);
              }
            }
          }
        }
    }
    if (kn.leave) kn.leave();
  });
}

}  // namespace fastnn
