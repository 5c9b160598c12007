// What the loops over a product's tiles are made of: where panels lie, how sums over K are kept,
// and one tile's way to C. driver.cpp has the loops.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

#include "common/activation.hpp"
#include "common/integers.hpp"
#include "common/parallel.hpp"
#include "gemm/kernel.hpp"
#include "quant/requantize.hpp"

namespace fastnn {

// Items [0, n), each to be done by some thread: first those of a thread's own share, which it had
// in the last call too, so that its caches may still hold them; then what others have not begun.
class Shares {
 public:
  Shares(int64_t n, int threads)
      : count_(threads), others_(threads > 1 ? new Own[size_t(threads) - 1] : nullptr) {
    for (int t = 0; t < threads; t++) {
      const Range r = share_of(n, 1, t, threads);
      own(t).next = r.begin;
      own(t).end = r.end;
    }
  }
  // The next `most` items or fewer; empty when all are taken.
  Range take(int thread, int64_t most) {
    for (int i = 0; i < count_; i++) {
      Own& o = own((thread + i) % count_);
      if (o.next.load(std::memory_order_relaxed) >= o.end) continue;
      const int64_t begin = o.next.fetch_add(most, std::memory_order_relaxed);
      if (begin < o.end) return {begin, std::min(o.end, begin + most)};
    }
    return {0, 0};
  }

 private:
  struct alignas(64) Own {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  Own& own(int t) { return t ? others_[size_t(t) - 1] : first_; }
  int count_;
  Own first_;  // a call on one thread allocates nothing
  std::unique_ptr<Own[]> others_;
};

// Where the panels of one packed operand lie: blocks of K first, panels within them. K may be some
// segments of k, which blocks do not cross.
struct Layout {
  int64_t k, segments, kc, k_step, panels, lanes, bytes, extra;

  int64_t blocks_in_segment() const { return ceil_div(k, kc); }
  int64_t blocks() const { return segments * blocks_in_segment(); }
  int64_t segment(int64_t block) const { return k ? block / blocks_in_segment() : 0; }
  int64_t begin(int64_t block) const { return k ? block % blocks_in_segment() * kc : 0; }
  int64_t length(int64_t block) const { return std::min(kc, k - begin(block)); }  // elements of K
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

inline Layout layout_a(const Kernel& kn, int64_t m, int64_t k) {
  return {k, 1, kn.kc, kn.k_step, ceil_div(m, kn.mr), kn.mr, kn.a_bytes, 0};
}
inline Layout layout_b(const Kernel& kn, int64_t k, int64_t n) {
  return {k, 1, kn.kc, kn.k_step, ceil_div(n, kn.nr), kn.nr, kn.b_bytes, kn.b_extra};
}
// Elements of K that a tile adds up before it begins another sum.
inline int64_t sum_length(const Kernel& kn) { return kn.fold ? kn.fold : kn.kc; }
// Where K may be anything (the taps of a filter times its channels), in blocks of one length, which
// may be a quarter longer than kc, rather than with a short one at the end.
inline int64_t even_blocks(const Kernel& kn, int64_t k) {
  const int64_t blocks = std::max<int64_t>(1, ceil_div(k, kn.kc + kn.kc / 4));
  return std::max<int64_t>(kn.k_step, round_up(ceil_div(k, blocks), kn.k_step));
}

// Packs panels [first, last) of all blocks of K, this thread's share of them.
inline unsigned pack(PackFn fn, FinishFn finish, int k_word, const Layout& l, char* dst,
                     const Matrix& src, int64_t lane_stride, int64_t k_stride, int64_t lanes_total,
                     int thread, int threads, int64_t segment_stride = 0) {
  const int64_t size = dtype_size(src.type);
  const Range mine = share_of(l.blocks() * l.panels, 1, thread, threads);
  unsigned flags = 0;
  for (int64_t item = mine.begin; item < mine.end; item++) {
    const int64_t block = item / l.panels, panel = item % l.panels;
    const int lanes = int(std::min(l.lanes, lanes_total - panel * l.lanes));
    flags |= fn(dst + l.offset(block, panel),
                src.data + (panel * l.lanes * lane_stride + l.segment(block) * segment_stride +
                            l.begin(block) * k_stride) *
                               size,
                lane_stride, k_stride, lanes, l.length(block));
    if (finish) finish(dst + l.offset(block, panel), l.padded(block) / k_word);
  }
  return flags;
}

// One operand as the tile loop reads it.
struct Source {
  const char* data;
  bool packed;
  Layout layout;
  int64_t lane, word, k, segment;  // strides in bytes where it is read in place
  const char* at(int64_t block, int64_t panel) const {
    return packed ? data + layout.offset(block, panel)
                  : data + panel * layout.lanes * lane + layout.segment(block) * segment +
                        layout.begin(block) * k;
  }
  // All panels of a block: finding each takes a multiplication, where `at` divides.
  struct Panels {
    const char* first;
    int64_t step;
    const char* at(int64_t panel) const { return first + panel * step; }
  };
  Panels panels(int64_t block) const {
    return {at(block, 0), packed ? layout.panel_bytes(block) : layout.lanes * lane};
  }
};

// What packing noticed of both operands.
struct Flags {
  std::atomic<unsigned> a{0}, b{0};
  bool refused(const Kernel& kn) const { return kn.split && split_refused(a, b); }
};

inline int64_t tile_bytes(const Kernel& kn) { return int64_t(kn.mr) * kn.nr * dtype_size(kn.acc); }

constexpr int64_t kBlocksInSum = 16;  // of kernels whose tiles do not fold

// Which blocks of K a tile's sum begins and ends with.
struct Sums {
  int64_t blocks, count;  // blocks of K; tiles whose sums are kept until the last
  int64_t in_sum;         // blocks that are added up before they are added to those before
  bool two_levels;        // float32 alone needs it

  // Blocks of `length` elements.
  Sums(const Kernel& kn, int64_t k_blocks, int64_t length, int64_t tiles)
      : blocks(std::max<int64_t>(1, k_blocks)),
        count(blocks > 1 ? tiles : 1),
        in_sum(kn.fold ? std::max<int64_t>(1, kn.kc / std::max<int64_t>(1, length)) : kBlocksInSum),
        two_levels(kn.acc == DType::f32 && in_sum > 1 && blocks > in_sum) {}
  int64_t bytes(const Kernel& kn) const { return count * (two_levels ? 2 : 1) * tile_bytes(kn); }
};

// One tile over one block of K, and its way to C after the last.
class Tiles {
 public:
  // `sums` has room for sums.bytes(kn).
  Tiles(const Kernel& kn, const Store& store, const Source& a, const Sums& sums, char* memory,
        int64_t m, int64_t n, int64_t i0, int64_t j0)
      : kn_(kn),
        store_(store),
        sums_(sums),
        memory_(memory),
        mr_(a.layout.lanes),
        m_(m),
        n_(n),
        i0_(i0),
        j0_(j0) {
    // A whole tile that needs nothing done to it is summed in C.
    straight_ = store.plain && store.type == kn.acc && store.c_cs == 1 && sums.blocks == 1;
    finishes_ =
        kn.finishes && !store.requantize && !sums.two_levels && short_epilogue(store, kn.acc);
    requantizes_ = kn.requantizes && store.requantize && store.requantize->small &&
                   store.type == DType::u8 &&
                   (!store.residual || store.requantize->residual_type == DType::u8);
    acc_row_ = int64_t(kn.nr) * dtype_size(kn.acc);
    size_ = int64_t(dtype_size(store.type));
    if (finishes_ || requantizes_) finish_all();
    t_.packed_a = a.packed;
    t_.a_row = a.lane, t_.a_word = a.word;
  }
  // For the tiles to come: a panel of B, and which block of K it is.
  void panel(const char* b, bool packed, int64_t b_word, int64_t q) {
    t_.b = b, t_.packed_b = packed, t_.b_word = b_word;
    t_.cols = int(std::min<int64_t>(kn_.nr, n_ - q * kn_.nr));
    // Where it lies in C, which many tiles ask: column j_, in one piece if it is.
    j_ = j0_ + q * kn_.nr;
    c_ = r_ = within_ = j_, whole_ = true;
    if (store_.columns) {
      piece(j_, c_, r_);
      within_ = j_ % store_.columns->length;
      c_ += within_, r_ += within_;
      whole_ = within_ + t_.cols <= store_.columns->length;
    }
    if (finishes_ || requantizes_) finish_columns();
  }
  // For the tiles to come: rows that begin so far from C's first, and the residual's.
  void line(int64_t c, int64_t residual) {
    store_.c += (c - line_c_) * size_;
    if (store_.residual) store_.residual += (residual - line_r_) * store_.residual_size;
    line_c_ = c, line_r_ = residual;
  }
  // For the tiles to come: A's words of K lie in `runs` pieces, at these distances in bytes.
  void runs(int64_t count, const int64_t* at) {
    t_.runs = count, t_.a_runs = at;
    count_lines();
  }
  void block(int64_t index, int64_t words) {
    block_ = index;
    t_.words = words;
    count_lines();
    t_.add = index % (sums_.two_levels ? sums_.in_sum : sums_.blocks) != 0;
  }
  // The next tile asks for what a later one reads.
  void ahead(const char* from, int64_t bytes) {
    if (kn_.finishes) {
      t_.ahead = from, t_.ahead_lines = ceil_div(ceil_div(bytes, 64), lines_), t_.ahead_skip = 0;
      asks_ = true;
    } else {
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
    }
  }
  // The same of rows that lie apart. Returns how many of them it asks for.
  int64_t ahead(const MatrixRows& rows, int64_t first, int64_t count) {
    if (!kn_.finishes || lines_ > count) return count;  // the last few are left
    t_.ahead = rows.first + first * rows.step;
    t_.ahead_lines = ceil_div(rows.bytes, 64), t_.ahead_skip = rows.step - t_.ahead_lines * 64;
    asks_ = true;
    return lines_;
  }
  // `slot` says which of the sums is this tile's.
  void run(const char* a, int64_t p, int64_t slot) {
    t_.a = a;
    t_.rows = int(std::min<int64_t>(mr_, m_ - p * mr_));
    if (!std::exchange(asks_, false)) t_.ahead_lines = t_.ahead_skip = 0;
    const int64_t i = i0_ + p * mr_;
    if (straight_ && whole_ && t_.rows == kn_.mr && t_.cols == kn_.nr) {
      t_.acc = store_.c + (i * store_.c_rs + c_) * size_;
      t_.acc_row = store_.c_rs * size_;
      fetch(static_cast<char*>(t_.acc), t_.acc_row, size_);
      kn_.tile(t_);
      return;
    }
    char* acc = memory_ + (sums_.count > 1 ? slot * tile_bytes(kn_) : 0);
    if (t_.add && sums_.count > 1)  // they may be no nearer than the last cache
      for (int64_t at = 0; at < tile_bytes(kn_); at += 64) __builtin_prefetch(acc + at, 1);
    t_.acc = acc, t_.acc_row = acc_row_;
    const bool last = block_ + 1 == sums_.blocks;
    const bool finishes = requantizes_ ? t_.cols == kn_.nr : finishes_ && whole_;
    if (last && finishes && t_.words) {
      const Finish& finish = *(t_.finish = finish_rows(i));
      fetch(finish.c, finish.c_row, size_);
      if (finish.residual) fetch(finish.residual, finish.residual_row, store_.residual_size);
      kn_.tile(t_);
      t_.finish = nullptr;
      return;
    }
    if (last && store_.requantize) {
      fetch(store_.c + (i * store_.c_rs + j_) * size_, store_.c_rs * size_, size_);
      if (store_.residual) fetch(store_.residual + i * store_.r_rs + j_, store_.r_rs, 1);
    }
    if (t_.words)
      kn_.tile(t_);
    else
      std::memset(acc, 0, size_t(acc_row_) * kn_.mr);  // an empty sum
    if (sums_.two_levels && (last || (block_ + 1) % sums_.in_sum == 0)) acc = add_up(acc);
    if (!last) return;
    if (store_.columns)
      store_pieces(acc, i);
    else
      kn_.store(acc, kn_.nr, t_.rows, t_.cols, store_, i, j_);
  }

 private:
  // Lines of words of K in a tile.
  void count_lines() {
    const int64_t line = 64 / (kn_.b_bytes * kn_.k_word);
    lines_ = t_.runs * std::max<int64_t>(1, ceil_div(t_.words, line));
  }
  // What a Finish can do.
  static bool short_epilogue(const Store& s, DType acc) {
    const bool activation =
        s.activation == kNone || s.activation == kRelu || s.activation == kRelu6;
    if (acc == DType::s32) {
      const bool bias =
          s.bias_axis == BiasAxis::none || (s.bias_axis == BiasAxis::column && s.bias_stride == 1);
      return s.type != acc && activation && bias && s.c_cs == 1 && s.alpha64 == 1 && s.row_scale &&
             s.col_scale && !s.residual;
    }
    const bool type = s.type == acc || (s.type == DType::bf16 && acc == DType::f32);
    const bool bias =
        s.bias_axis == BiasAxis::none ||
        (s.bias_type == s.type && (s.bias_axis == BiasAxis::row || s.bias_stride == 1));
    return type && activation && bias && s.c_cs == 1 && s.alpha64 == 1 && !s.row_scale &&
           !s.col_scale && (!s.residual || (s.beta64 == 1 && s.r_cs == 1));
  }
  // The parts of a Finish that are the same for all tiles, for those of a panel of B, and for those
  // of some rows: of a product with a short K, to write and clear all of it for each tile is 2 %.
  void finish_all() {
    const Store& s = store_;
    finish_.type = s.type, finish_.c_row = s.c_rs * size_;
    finish_.residual_row = s.r_rs * s.residual_size;
    if (requantizes_) {
      finish_.requantize = s.requantize;
      return;
    }
    finish_.bias_type = s.bias_type;
    finish_.row_bias_step = s.bias_stride * size_;
    finish_.bounded = s.activation != kNone;
    finish_.low = 0;
    finish_.high = s.activation == kRelu6 ? 6 : std::numeric_limits<float>::infinity();
  }
  void finish_columns() {
    const Store& s = store_;
    finish_.column = j_;
    if (requantizes_) return;
    if (s.bias_axis == BiasAxis::column)
      finish_.column_bias = s.bias + within_ * int64_t(dtype_size(s.bias_type));
    if (kn_.acc != DType::s32) return;
    finish_.column_scale = s.col_scale + within_;
    if (s.row_zero) finish_.column_sum = s.col_sum + within_;
  }
  const Finish* finish_rows(int64_t i) {
    const Store& s = store_;
    finish_.c = s.c + (i * s.c_rs + c_) * size_;
    if (s.residual) finish_.residual = s.residual + (i * s.r_rs + r_) * s.residual_size;
    if (requantizes_) return &finish_;
    if (s.bias_axis == BiasAxis::row) finish_.row_bias = s.bias + i * s.bias_stride * size_;
    if (kn_.acc != DType::s32) return &finish_;
    finish_.row_scale = s.row_scale + i;
    if (s.row_zero) finish_.row_zero = s.row_zero + i;
    return &finish_;
  }
  // Asks for the lines of C that a tile is about to write, or the residual's that it will read:
  // short pieces of rows, which the hardware does not see coming, so that each would be waited for.
  void fetch(const char* c, int64_t row, int64_t size) const {
    for (int i = 0; i < t_.rows; i++, c += row)
      for (int64_t at = 0; at < t_.cols * size; at += 64) __builtin_prefetch(c + at, 0, 2);
  }
  // How far column j's piece is from C's first, and the residual's.
  void piece(int64_t j, int64_t& c, int64_t& residual) const {
    store_.columns->find(j / store_.columns->length, c, residual);
  }
  // Column j of the product is column j % length of its piece.
  void store_pieces(const char* acc, int64_t i) {
    const int64_t length = store_.columns->length;
    for (int done = 0; done < t_.cols;) {
      const int64_t within = (j_ + done) % length;
      const int n = int(std::min<int64_t>(t_.cols - done, length - within));
      int64_t c, r;
      piece(j_ + done, c, r);
      Store s = store_;
      s.c += c * size_;
      if (s.residual) s.residual += r * size_;
      kn_.store(acc + done * dtype_size(kn_.acc), kn_.nr, t_.rows, n, s, i, within);
      done += n;
    }
  }

  // Adds the sum of some blocks to the sum of sums, and returns that.
  char* add_up(char* acc) {
    char* total = acc + sums_.count * tile_bytes(kn_);
    auto* from = reinterpret_cast<const float*>(acc);
    auto* to = reinterpret_cast<float*>(total);
    const int count = t_.rows * kn_.nr;
    if (block_ < sums_.in_sum)
      std::memcpy(to, from, size_t(count) * sizeof(float));
    else
      for (int e = 0; e < count; e++) to[e] += from[e];
    return total;
  }

  const Kernel& kn_;
  Store store_;
  const Sums sums_;
  char* memory_;
  int64_t mr_, m_, n_, i0_, j0_, block_ = 0, acc_row_, size_, lines_ = 1;
  int64_t j_ = 0, c_ = 0, r_ = 0, within_ = 0, line_c_ = 0, line_r_ = 0;
  bool straight_, finishes_, requantizes_, whole_ = true, asks_ = false;
  TileArgs t_;
  Finish finish_{};
};

// Fetches the panel of B that is needed next while the tiles of this one are computed, a part with
// each: packed panels are read once, often from memory, and a tile alone would wait for it.
class Ahead {
 public:
  Ahead(const char* next, int64_t bytes, int64_t tiles)
      : next_(next),
        end_(next ? next + bytes : nullptr),
        part_(round_up(ceil_div(bytes, tiles), 64)) {}
  // Before each tile: within it, where there is nothing else that it asks for.
  void step(Tiles& tiles) {
    const char* to = std::min(end_, next_ + part_);
    tiles.ahead(next_, to - next_);
    next_ = to;
  }
  void step() {
    for (const char* to = std::min(end_, next_ + part_); next_ < to; next_ += 64)
      __builtin_prefetch(next_, 0, 2);
  }

 private:
  const char *next_, *end_;
  int64_t part_;
};

}  // namespace fastnn
