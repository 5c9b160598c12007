// The loops of the int8 linear layer:
//
//       rows of x to uint8        shared out among the threads; few of them each thread's own
//       for block of rows         shared out too; it stays in L2
//         for panel of w          its columns, packed
//           for panel of rows     sum in registers over all of K, correction, scales, bias: y
//
// K is not cut into blocks: integers need no short sums, and a panel of w is read from L2 as fast
// as it is multiplied. A weight that is not packed is packed first, unless the rows are so few that
// dot products along K are done sooner.
#include "quant/int8_linear.hpp"

#include <cstring>
#include <stdexcept>
#include <string>

#include "common/caches.hpp"
#include "common/scratch.hpp"
#include "gemm/tiles.hpp"
#include "quant/quantize.hpp"

namespace fastnn {
namespace {

constexpr int64_t kFewElements = 16 << 10;  // of x, which each thread quantizes for itself
constexpr int64_t kShares = 8;              // pieces of w a thread, at least
constexpr int64_t kFewRows = 4;             // that are multiplied with w as it lies
constexpr int64_t kAheadTiles = 4;          // of a panel of w, while which the next one is fetched

// ---- the packed weight -------------------------------------------------------------------------

// What a packed weight begins with; then the sums of w's rows, and its panels.
struct Header {
  uint64_t kernel;  // a hash of its name
  int64_t n, k;
  char unused[40];
};
static_assert(sizeof(Header) == 64);

uint64_t hash(const char* name) {  // FNV-1a
  uint64_t h = 0xcbf29ce484222325;
  for (; *name; name++) h = (h ^ uint8_t(*name)) * 0x100000001b3;
  return h;
}
// All of K is one block.
Layout panels_of(const Kernel& kn, int64_t n, int64_t k) {
  Layout layout = layout_b(kn, k, n);
  layout.kc = std::max<int64_t>(kn.k_step, round_up(k, kn.k_step));
  return layout;
}
int64_t sums_bytes(int64_t n) { return round_up(n * int64_t(sizeof(int32_t)), 64); }

// Some panels, and the sums of their columns: a row of ones times the panel.
class Packing {
 public:
  Packing(const Kernel& kn, const int8_t* w, int64_t n, int64_t k, int64_t row, int64_t col,
          int32_t* sums, char* panels)
      : kn_(kn), layout_(panels_of(kn, n, k)), n_(n), sums_(sums), panels_(panels) {
    w_.data = reinterpret_cast<char*>(const_cast<int8_t*>(w)), w_.type = DType::s8;
    w_.rs = col, w_.cs = row;
  }
  // Bytes of memory that `run` needs.
  int64_t bytes() const {
    const int64_t a = layout_.kc * kn_.mr * kn_.a_bytes;
    return round_up(tile_bytes(kn_), 64) + round_up(layout_.k, 64) + round_up(a, 64);
  }
  void run(int thread, int threads, char* memory) const {
    char* acc = memory;
    char* ones = acc + round_up(tile_bytes(kn_), 64);
    char* row = ones + round_up(layout_.k, 64);
    std::memset(ones, 1, size_t(layout_.k));
    if (layout_.k) kn_.pack_a(row, ones, layout_.k, 1, 1, layout_.k);
    TileArgs t;
    t.words = layout_.kc / kn_.k_word;
    t.a = row, t.a_row = int64_t(kn_.a_bytes) * kn_.k_word, t.a_word = t.a_row * kn_.mr;
    t.b_word = int64_t(kn_.nr) * kn_.b_bytes * kn_.k_word;
    t.rows = 1, t.acc = acc, t.acc_row = int64_t(kn_.nr) * int64_t(sizeof(int32_t));
    const Range mine = share_of(layout_.panels, 1, thread, threads);
    for (int64_t q = mine.begin; q < mine.end; q++) {
      char* panel = panels_ + layout_.offset(0, q);
      t.cols = int(std::min<int64_t>(kn_.nr, n_ - q * kn_.nr));
      const size_t length = size_t(t.cols) * sizeof(int32_t);
      if (layout_.k) {
        std::memset(panel + layout_.panel_bytes(0) - 64, 0, 64);  // what lies behind it as well
        kn_.pack_b(panel, w_.data + q * kn_.nr * w_.cs, w_.cs, w_.rs, t.cols, layout_.k);
        t.b = panel;
        kn_.tile(t);
        std::memcpy(sums_ + q * kn_.nr, acc, length);
      } else {
        std::memset(sums_ + q * kn_.nr, 0, length);
      }
    }
  }

 private:
  const Kernel& kn_;
  Layout layout_;
  int64_t n_;
  int32_t* sums_;
  char* panels_;
  Matrix w_;
};

// ---- checks ------------------------------------------------------------------------------------

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("fastnn.int8_linear: " + what);
}
void check(const Int8Linear& c) {
  if (c.k > kInt8MostColumns)
    refuse("weight: expected at most " + std::to_string(kInt8MostColumns) +
           " columns, whose sums fit into 32 bits, got " + std::to_string(c.k));
  bool good = true;
  const int64_t scales = c.one_scale ? 1 : c.n;
  for (int64_t j = 0; j < scales; j++) good &= is_scale(c.w_scale[j]);
  for (int64_t j = 0; !good; j++)
    if (!is_scale(c.w_scale[j]))
      refuse("weight_scale: expected positive normal finite numbers, got " +
             std::to_string(c.w_scale[j]) + " at " + std::to_string(j));
  if (!c.fixed) return;
  if (!is_scale(c.x_scale))
    refuse("input_scale: expected a positive normal finite number, got " +
           std::to_string(c.x_scale));
  if (c.x_zero < 0 || c.x_zero > 255)
    refuse("input_zero_point: expected 0 to 255, got " + std::to_string(c.x_zero));
}

// ---- rows of x ---------------------------------------------------------------------------------

// x as the tiles read it: rows that lie apart, or packed panels of them.
class Input {
 public:
  Input(const Kernel& kn, const Int8Linear& c) : kn_(kn), c_(c) {
    source.layout = layout_a(kn, c.m, c.k);
    source.layout.kc = std::max<int64_t>(kn.k_step, round_up(c.k, kn.k_step));
    source.packed = !kn.direct_a || kn.a_bytes > 1;  // wider when packed: once is better
    // At multiples of 1024 bytes rows of a panel share few sets of L1.
    row_ = round_up(std::max<int64_t>(c.k, 1), 64);
    if (row_ % 1024 == 0) row_ += 64;
    if (!source.packed) {
      // Even panels, rather than a thin last one; matrix units read all rows of theirs.
      if (kn.k_step == kn.k_word) source.layout.lanes = ceil_div(c.m, source.layout.panels);
      source.lane = row_, source.k = 1, source.word = kn.k_word;
    } else {
      source.lane = int64_t(kn.a_bytes) * kn.k_word, source.word = source.lane * kn.mr;
    }
  }
  Source source{};

  int64_t row() const { return row_; }  // where they lie apart, so many bytes
  int64_t bytes() const {
    return source.packed ? source.layout.total()
                         : row_ * source.layout.panels * source.layout.lanes;
  }
  // Of memory that `run` needs besides.
  int64_t own_bytes() const { return source.packed ? row_ * kn_.mr : 0; }
  // Panels [begin, end) to `to`, with their scales and zero points.
  void run(int64_t begin, int64_t end, char* to, float* scales, int32_t* zeros, char* own) const {
    const int64_t lanes = source.layout.lanes;
    for (int64_t p = begin; p < end; p++) {
      const int64_t first = p * lanes, count = std::min(lanes, c_.m - first);
      char* rows = source.packed ? own : to + first * row_;
      quantize(first, count, rows, scales + first, zeros + first);
      if (source.packed && c_.k)
        kn_.pack_a(to + source.layout.offset(0, p), rows, row_, 1, int(count), c_.k);
    }
  }

 private:
  void quantize(int64_t first, int64_t count, char* to, float* scales, int32_t* zeros) const {
    std::fill(scales, scales + count, c_.x_scale);
    std::fill(zeros, zeros + count, c_.x_zero);
    if (!c_.k) return;
    const char* x = c_.x + first * c_.x_row * int64_t(dtype_size(c_.type));
    quantize_rows({c_.type, x, c_.x_row, c_.x_col, c_.k, Scheme::u8, false, c_.fixed, to, row_,
                   scales, zeros},
                  0, count);
    // K is a multiple of k_step to the tiles; what stands there is multiplied by zeros.
    const int64_t rest = round_up(c_.k, kn_.k_step) - c_.k;
    for (int64_t i = 0; rest && i < count; i++) std::memset(to + i * row_ + c_.k, 0, size_t(rest));
  }

  const Kernel& kn_;
  const Int8Linear& c_;
  int64_t row_;
};

// The way of the sums to y.
Store store_of(const Int8Linear& c, const float* scales, const int32_t* zeros, const float* w_scale,
               const int32_t* sums) {
  Store store{};
  store.c = c.y, store.c_rs = c.y_row, store.c_cs = 1, store.type = c.type;
  store.alpha = 1, store.alpha64 = 1;
  if (c.bias) {
    store.bias = c.bias, store.bias_type = c.bias_type;
    store.bias_axis = BiasAxis::column, store.bias_stride = 1;
  }
  store.activation = c.activation;
  store.row_scale = scales, store.col_scale = w_scale;
  store.row_zero = zeros, store.col_sum = sums;
  return store;
}

// Scales and zero points, of `copies` times all rows, and the scales of w's rows.
class Scales {
 public:
  Scales(const Int8Linear& c, int64_t copies) : per_row_(round_up(c.m * 4, 64)) {
    const int64_t columns = c.one_scale ? c.n : 0;
    rows_ = static_cast<char*>(
        scratch(Scratch::misc, size_t(2 * per_row_ * copies + columns * int64_t(sizeof(float)))));
    auto* filled = reinterpret_cast<float*>(rows_ + 2 * per_row_ * copies);
    std::fill(filled, filled + columns, c.w_scale[0]);
    of_w = c.one_scale ? filled : c.w_scale;
  }
  const float* of_w;
  float* scales(int64_t copy) const {
    return reinterpret_cast<float*>(rows_ + 2 * per_row_ * copy);
  }
  int32_t* zeros(int64_t copy) const {
    return reinterpret_cast<int32_t*>(rows_ + 2 * per_row_ * copy + per_row_);
  }

 private:
  int64_t per_row_;
  char* rows_;
};

// Few rows, and one of ones for the sums of w's, times w as it lies.
void run_few(const Kernel& kn, const Int8Linear& c, int threads) {
  count_call(kn.dot_name);
  const Input input(kn, c);
  const int64_t row = input.row(), a_bytes = (c.m + 1) * row;
  char* a = static_cast<char*>(scratch(Scratch::packed_a, size_t(a_bytes * threads)));
  auto* sums = static_cast<int32_t*>(scratch(Scratch::packed_b, size_t(c.n) * sizeof(int32_t)));
  const Scales scales(c, threads);
  parallel(threads, [&](int thread, int came) {
    char* mine = a + thread * a_bytes;
    input.run(0, input.source.layout.panels, mine, scales.scales(thread), scales.zeros(thread),
              nullptr);
    std::memset(mine + c.m * row, 1, size_t(c.k));
    const Store store = store_of(c, scales.scales(thread), scales.zeros(thread), scales.of_w, sums);
    alignas(64) int32_t acc[kDotRows * kDotCols];
    const Range share = share_of(c.n, kDotCols, thread, came);
    for (int64_t j = share.begin; j < share.end; j += kDotCols) {
      const int cols = int(std::min<int64_t>(kDotCols, share.end - j));
      // The row of ones is the last, and wanted first.
      for (int64_t i = c.m / kDotRows * kDotRows; i >= 0; i -= kDotRows) {
        const int rows = int(std::min<int64_t>(kDotRows, c.m + 1 - i));
        kn.dot(mine + i * row, row, rows, c.w + j * c.w_row, c.w_row, cols, c.k, acc);
        const bool last = i + rows == c.m + 1;
        if (last)
          std::memcpy(sums + j, acc + (rows - 1) * kDotCols, size_t(cols) * sizeof(int32_t));
        kn.store(acc, kDotCols, rows - last, cols, store, i, j);
      }
    }
  });
}

}  // namespace

int64_t packed_int8_bytes(int64_t n, int64_t k) {
  return int64_t(sizeof(Header)) + sums_bytes(n) +
         panels_of(integer_kernel(DType::u8), n, k).total();
}

void pack_int8(const int8_t* w, int64_t n, int64_t k, int64_t w_row, int64_t w_col, char* to) {
  const Kernel& kn = integer_kernel(DType::u8);
  const Header header{hash(kn.name), n, k, {}};
  std::memset(to, 0, sizeof(header) + size_t(sums_bytes(n)));
  std::memcpy(to, &header, sizeof(header));
  auto* sums = reinterpret_cast<int32_t*>(to + sizeof(header));
  const Packing packing(kn, w, n, k, w_row, w_col, sums, to + sizeof(header) + sums_bytes(n));
  const int threads = n * k < (1 << 16) ? 1 : max_threads();
  const int64_t own_bytes = packing.bytes();
  char* own = static_cast<char*>(scratch(Scratch::accumulator, size_t(own_bytes * threads)));
  parallel(threads, [&](int thread, int came) {
    if (kn.enter) kn.enter();
    packing.run(thread, came, own + thread * own_bytes);
    if (kn.leave) kn.leave();
  });
  scratch_trim();
}

void int8_linear(const Int8Linear& c) {
  check(c);
  if (c.m == 0 || c.n == 0) return;
  const Kernel& kn = integer_kernel(DType::u8);
  const Layout b = panels_of(kn, c.n, c.k);
  const int64_t head = int64_t(sizeof(Header)) + sums_bytes(c.n);

  // Threads are worth waking for about 20 microseconds of work.
  const double microseconds = 2.0 * double(c.m) * double(c.n) * double(c.k) / 4e5 +
                              double(c.n) * double(c.k) / 1.5e4 + double(c.m) * double(c.k) / 1e4;
  const int threads = microseconds < 20 ? 1 : max_threads();

  // What was packed for another kernel is packed again.
  bool packed = false;
  if (c.packed && c.packed_bytes == head + b.total() &&
      reinterpret_cast<uintptr_t>(c.packed) % sizeof(int32_t) == 0) {
    Header header;
    std::memcpy(&header, c.packed, sizeof(header));
    packed = header.kernel == hash(kn.name) && header.n == c.n && header.k == c.k;
  }
  if (!packed && kn.dot && c.m <= kFewRows && c.k && c.w_col == 1) return run_few(kn, c, threads);
  count_call(kn.name);
  const Input input(kn, c);
  char* weight = packed ? const_cast<char*>(c.packed)
                        : static_cast<char*>(scratch(Scratch::packed_b, size_t(head + b.total())));
  auto* sums = reinterpret_cast<int32_t*>(weight + sizeof(Header));
  char* panels = weight + head;
  const Packing packing(kn, c.w, c.n, c.k, c.w_row, c.w_col, sums, panels);

  // Of each thread: sums of a tile, and what packing needs.
  const int64_t tile = round_up(tile_bytes(kn), 64);
  const int64_t own_bytes =
      tile + round_up(std::max(input.own_bytes(), packed ? 0 : packing.bytes()), 64);
  char* own = static_cast<char*>(scratch(Scratch::accumulator, size_t(own_bytes * threads)));

  // Few rows are quantized by each thread, instead of waiting for one.
  const bool alone = packed && c.m * c.k <= kFewElements;
  const int64_t copies = alone ? threads : 1;
  const int64_t a_bytes = round_up(input.bytes(), 64);
  char* a = static_cast<char*>(scratch(Scratch::packed_a, size_t(a_bytes * copies)));
  const Scales scales(c, copies);

  const int64_t mp = input.source.layout.panels, np = b.panels;
  const int64_t most =
      std::max<int64_t>(1, core_cache_bytes() / 2 / std::max<int64_t>(1, input.bytes() / mp));
  // Even blocks, as many for each thread: none reads the weight for a few rows.
  const int64_t enough = ceil_div(mp, most);
  const int64_t block = ceil_div(mp, enough > 1 ? std::min(mp, round_up(enough, threads)) : 1);
  const int64_t blocks = ceil_div(mp, block);
  // Pieces of few tiles together, so that taking them is little beside their work.
  const int64_t at_once = std::max<int64_t>(1, np * blocks / (kShares * threads * block));
  const int64_t b_word = int64_t(kn.nr) * kn.b_bytes * kn.k_word;
  Shares shares(np * blocks, threads);
  parallel(threads, [&](int thread, int came) {
    char* mine = own + thread * own_bytes;
    if (kn.enter) kn.enter();
    const int64_t copy = alone ? thread : 0;
    char* my_a = a + copy * a_bytes;
    const Range share = alone ? Range{0, mp} : share_of(mp, 1, thread, came);
    input.run(share.begin, share.end, my_a, scales.scales(copy), scales.zeros(copy), mine + tile);
    if (!packed) packing.run(thread, came, mine + tile);
    if (came > 1 && !alone) barrier();

    const Store store = store_of(c, scales.scales(copy), scales.zeros(copy), scales.of_w, sums);
    Source source = input.source;
    source.data = my_a;
    Tiles tiles(kn, store, source, Sums(kn, 1, c.k, 1), mine, c.m, c.n, 0, 0);
    tiles.block(0, c.k ? b.kc / kn.k_word : 0);
    const Source::Panels of_a = source.panels(0);
    for (Range r; (r = shares.take(thread, at_once)).begin < r.end;)
      for (int64_t item = r.begin; item < r.end; item++) {
        const int64_t q = item % np, p0 = item / np * block, p1 = std::min(mp, p0 + block);
        const char* panel = panels + q * b.panel_bytes(0);
        tiles.panel(panel, true, b_word, q);
        // Weights often come from memory, and few tiles hide too little of the way (measured: 2 to
        // 5 percent gained with 128 rows and more, 8 lost with 16).
        const bool fetch = p1 - p0 >= kAheadTiles && q + 1 < np;
        Ahead ahead(fetch ? panel + b.panel_bytes(0) : nullptr, b.panel_bytes(0), p1 - p0);
        for (int64_t p = p0; p < p1; p++) {
          ahead.step();
          tiles.run(of_a.at(p), p, 0);
        }
      }
    if (kn.leave) kn.leave();
  });
  scratch_trim();
}

}  // namespace fastnn
