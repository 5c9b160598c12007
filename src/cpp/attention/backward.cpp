// The backward: probabilities again, from the log-sum-exp, and the three gradients.
//
//   for group of panels of queries
//     for block of keys
//       for panel                        a query a lane
//         p = exp(scale K Q^T + bias - log_sum)
//         ds = p (V dO^T - delta)        delta = sum(dO out), of each query
//         dQ^T += K^T ds
//       dV += p dO,  dK += ds Q          over the group's queries
//
// A thread has a head of keys, or some of its blocks, to itself: the gradients of its keys and
// values are sums over all queries in one order. Where heads are split, each part has a gradient of
// the queries of its own, and these are added at the end in order; how, the shape alone decides.
#include <algorithm>
#include <cstring>
#include <limits>

#include "attention/parts.hpp"
#include "common/allocator.hpp"
#include "common/integers.hpp"
#include "common/parallel.hpp"

namespace fastnn {

using namespace attention_parts;

namespace {

constexpr int64_t kPanelsTogether = 4;
// As many pieces of work as that are made by splitting heads, of so many blocks of keys at least.
constexpr int64_t kPieces = 32, kLeastBlocks = 8;

// Gives a block back with its scope.
struct Held {
  explicit Held(const Block& b) : block(b) {}
  ~Held() {
    if (block.data) deallocate(block);
  }
  const Block& block;
};

class Backward {
 public:
  Backward(const AttentionBackward& call, const Arithmetic& a)
      : call_(call),
        a_(a),
        blocks_(a, call.k_length),
        rows_(call.heads / call.kv_heads * call.q_length),
        panels_(ceil_div(rows_, a.lanes())),
        of_keys_(a, blocks_.size),
        of_elements_(a, call.head_size) {
    const int64_t heads = (call.batch_invariant ? 1 : call.batch) * call.kv_heads;
    splits_ = std::clamp<int64_t>(ceil_div(kPieces, heads), 1,
                                  std::max<int64_t>(1, blocks_.count / kLeastBlocks));
    split_blocks_ = ceil_div(blocks_.count, splits_);
    splits_ = ceil_div(blocks_.count, split_blocks_);
    Carved measured;
    carve(measured);
    bytes_ = measured.bytes();
  }

  bool run(int threads) {
    const int64_t heads = call_.batch * call_.kv_heads;
    const int64_t queries = call_.batch * call_.heads * call_.q_length * call_.head_size;
    const Held held(partial_);
    if (splits_ > 1) partial_ = allocate(size_t(splits_ * queries * a_.number()));
    const bool done = run_pieces(
        a_, threads, heads * splits_, [&] { return Part(*this); },
        [&](Part& part, int64_t i) {
          const int64_t head = i / splits_, split = i % splits_;
          part.head(head / call_.kv_heads, head % call_.kv_heads, split);
        });
    if (splits_ > 1 && done) add_partial(threads);
    return done;
  }

 private:
  struct Memory {
    char *rows[2], *lanes[2], *across[2];  // of queries and of the gradient, of a group
    char *scores, *products, *bias, *dropped, *packed, *as_a[2], *by_queries, *log_sum, *delta,
        *factor;
  };
  int64_t column() const { return a_.lanes() * a_.number(); }
  int64_t panel_rows() const { return round_up(blocks_.size, a_.tiles->mr); }
  int64_t size(int i) const { return i ? call_.value_size : call_.head_size; }
  // Of a group, K along its queries: bytes of a panel of elements, and of all.
  int64_t across_panel() const { return a_.panel_b(kPanelsTogether * a_.lanes()); }
  int64_t result_bytes() const { return round_up(call_.head_size, a_.tiles->mr) * column(); }
  int64_t as_a_panel() const {
    const Kernel& k = *a_.tiles;
    if (a_.packs) return panel_rows() * round_up(a_.lanes(), k.k_step) * k.a_bytes;
    return panel_rows() * a_.lanes() * int64_t(dtype_size(a_.type));
  }
  // What keys and values have of numbers, a row of whole panels each.
  int64_t sums_row(int i) const { return round_up(size(i), a_.tiles->nr); }
  int64_t split_keys() const { return split_blocks_ * blocks_.size; }
  int64_t sums_bytes(int i) const {
    return (split_keys() + a_.tiles->mr) * sums_row(i) * a_.number();
  }

  Memory carve(Carved& c) const {
    Memory m;
    const int64_t group = kPanelsTogether * a_.lanes();
    for (int i = 0; i < 2; i++) {
      m.rows[i] = c.take(group * size(i) * int64_t(dtype_size(a_.type)));
      m.lanes[i] = c.take(kPanelsTogether * a_.panel_b(size(i)));
      m.across[i] = c.take(ceil_div(size(i), a_.tiles->nr) * across_panel());
      m.as_a[i] = a_.packs || a_.pairs ? c.take(kPanelsTogether * as_a_panel()) : nullptr;
    }
    m.scores = c.take(kPanelsTogether * panel_rows() * column());
    m.products = c.take(kPanelsTogether * panel_rows() * column());
    m.bias = c.take(blocks_.size * column());
    m.dropped = c.take(call_.dropout > 0 ? blocks_.size * column() : 0);
    m.packed = c.take(a_.panel_b(blocks_.size));
    m.by_queries = c.take(kPanelsTogether * result_bytes());
    m.log_sum = c.take(kPanelsTogether * column());
    m.delta = c.take(kPanelsTogether * column());
    m.factor = c.take(column());
    return m;
  }

  // dQ = the sum of the parts, in order.
  void add_partial(int threads) {
    const int64_t rows = call_.batch * call_.heads * call_.q_length, n = call_.head_size;
    parallel(threads, [&](int thread, int came) {
      const Range mine = share_of(rows, 1, thread, came);
      if (a_.wide)
        add_rows<double>(mine, rows, n);
      else
        add_rows<float>(mine, rows, n);
    });
  }
  template <class T>
  void add_rows(Range mine, int64_t rows, int64_t n) {
    T* sums = static_cast<T*>(partial_.data);
    for (int64_t r = mine.begin; r < mine.end; r++) {
      T* to = sums + r * n;
      for (int64_t s = 1; s < splits_; s++) {
        const T* from = sums + (s * rows + r) * n;
        for (int64_t e = 0; e < n; e++) to[e] += from[e];
      }
      const int64_t query = r % call_.q_length, head = r / call_.q_length;
      store_rows(reinterpret_cast<char*>(to), n, 1, n, call_.grad_q, head / call_.heads,
                 head % call_.heads, query, 1);
    }
  }
  // So many rows of n numbers, `ld` apart, times a factor, to a tensor's.
  void store_rows(const char* numbers, int64_t ld, int64_t rows, int64_t n,
                  const AttentionOperand& to, int64_t batch, int64_t head, int64_t row,
                  double factor) const {
    Store s{};
    s.c = to.data + (batch * to.strides[0] + head * to.strides[1] + row * to.strides[2]) *
                        int64_t(dtype_size(a_.source));
    s.c_rs = to.strides[2], s.c_cs = to.strides[3], s.type = a_.source;
    s.alpha = float(factor), s.alpha64 = factor, s.plain = factor == 1;
    constexpr int64_t kRows = 32, kColumns = 64;
    for (int64_t i = 0; i < rows; i += kRows)
      for (int64_t j = 0; j < n; j += kColumns)
        a_.tiles->store(numbers + (i * ld + j) * a_.number(), int(ld),
                        int(std::min(kRows, rows - i)), int(std::min(kColumns, n - j)), s, i, j);
  }

  class Part {
   public:
    unsigned flags_a = 0, flags_b = 0;

    explicit Part(const Backward& f) : f_(f), call_(f.call_), a_(f.a_) {
      Carved c(static_cast<char*>(scratch(Scratch::misc, size_t(f.bytes_))));
      m_ = f.carve(c);
    }

    void head(int64_t batch, int64_t kv_head, int64_t split) {
      batch_ = batch, kv_head_ = kv_head, split_ = split;
      first_ = split * f_.split_blocks_;
      last_ = std::min(f_.blocks_.count, first_ + f_.split_blocks_);
      const KeyBlocks& blocks = f_.blocks_;
      const int64_t n = call_.head_size, nv = call_.value_size;
      Carved c(static_cast<char*>(
          scratch(Scratch::packed_a, size_t(rows_bytes(a_, blocks, n) + rows_bytes(a_, blocks, nv) +
                                            columns_bytes(a_, blocks, n) + 3 * 64))));
      keys_ = rows_side(a_, blocks, call_.k, batch, kv_head, n, first_, last_,
                        c.take(rows_bytes(a_, blocks, n)), flags_a);
      values_ = rows_side(a_, blocks, call_.v, batch, kv_head, nv, first_, last_,
                          c.take(rows_bytes(a_, blocks, nv)), flags_a);
      elements_ = columns_side(a_, blocks, call_.k, batch, kv_head, n, first_, last_,
                               c.take(columns_bytes(a_, blocks, n)), flags_a);
      Carved s(static_cast<char*>(
          scratch(Scratch::accumulator, size_t(f_.sums_bytes(0) + f_.sums_bytes(1) + 2 * 64))));
      for (int i = 0; i < 2; i++) {
        sums_[i] = s.take(f_.sums_bytes(i));
        std::memset(sums_[i], 0, size_t(f_.sums_bytes(i)));
      }
      for (int64_t p = 0; p < f_.panels_; p += kPanelsTogether)
        group(p, std::min(f_.panels_, p + kPanelsTogether));
      const int64_t begin = blocks.begin(first_);
      const int64_t keys = std::min(blocks.length, blocks.begin(last_)) - begin;
      f_.store_rows(sums_[0], f_.sums_row(0), keys, n, call_.grad_k, batch, kv_head, begin,
                    call_.scale);
      f_.store_rows(sums_[1], f_.sums_row(1), keys, nv, call_.grad_v, batch, kv_head, begin, 1);
    }

   private:
    // Panels [begin, end) of queries and all of this part's keys.
    void group(int64_t begin, int64_t end) {
      const int64_t column = f_.column();
      bool seen = false;
      for (int64_t p = begin; p < end; p++) {
        const Lanes lanes = lanes_of(p);
        seen |= sees(lanes, f_.blocks_.begin(first_), f_.blocks_.begin(last_));
      }
      if (seen) {
        const AttentionOperand* operands[2] = {&call_.q, &call_.grad};
        for (int i = 0; i < 2; i++) gather(begin, end, *operands[i], i);
        for (int64_t p = begin; p < end; p++) {
          statistics(lanes_of(p), m_.log_sum + (p - begin) * column,
                     m_.delta + (p - begin) * column);
          std::memset(m_.by_queries + (p - begin) * f_.result_bytes(), 0,
                      size_t(f_.result_bytes()));
        }
        for (int64_t b = first_; b < last_; b++) block(begin, end, b);
      } else {
        std::memset(m_.by_queries, 0, size_t(kPanelsTogether * f_.result_bytes()));
      }
      for (int l = 0; l < a_.lanes(); l++) {
        if (a_.wide)
          reinterpret_cast<double*>(m_.factor)[l] = call_.scale;
        else
          reinterpret_cast<float*>(m_.factor)[l] = float(call_.scale);
      }
      for (int64_t p = begin; p < end; p++) {
        char* const result = m_.by_queries + (p - begin) * f_.result_bytes();
        a_.loops->scale_columns[a_.wide](result, call_.head_size, a_.lanes(), m_.factor);
        lanes_of(p).store(result, call_.head_size, by_queries(), f_.splits_ > 1);
      }
    }
    Lanes lanes_of(int64_t panel) const {
      return Lanes(call_, a_, batch_, kv_head_, panel * a_.lanes());
    }
    static bool sees(const Lanes& lanes, int64_t begin, int64_t end) {
      return lanes.first_key() < end && lanes.last_key() > begin;
    }
    // Where this part's gradient of the queries goes: the result, or numbers of its own.
    AttentionOperand by_queries() const {
      if (f_.splits_ == 1) return call_.grad_q;
      const int64_t n = call_.head_size, head = call_.q_length * n, batch = call_.heads * head;
      return {static_cast<char*>(f_.partial_.data) + split_ * call_.batch * batch * a_.number(),
              {batch, head, n, 1}};
    }

    // A group's queries, or its rows of the gradient: as lanes, and with K along them.
    void gather(int64_t begin, int64_t end, const AttentionOperand& x, int i) {
      const Kernel& k = *a_.tiles;
      const int64_t n = f_.size(i), size = int64_t(dtype_size(a_.type)), lanes = a_.lanes();
      const int64_t row = n * size;
      int64_t count = 0;
      for (int64_t p = begin; p < end; p++) {
        const Lanes of = lanes_of(p);
        of.copy(x, n, m_.rows[i] + (p - begin) * lanes * row);
        count += of.count();
      }
      const int64_t all = (end - begin) * lanes;
      std::memset(m_.rows[i] + count * row, 0, size_t((all - count) * row));
      for (int64_t p = 0; p < end - begin; p++)
        flags_b |= k.pack_b(m_.lanes[i] + p * a_.panel_b(n), m_.rows[i] + p * lanes * row, n, 1,
                            int(lanes), n);
      for (int64_t e = 0; e < n; e += k.nr)
        flags_b |= k.pack_b(m_.across[i] + e / k.nr * f_.across_panel(), m_.rows[i] + e * size, 1,
                            n, int(std::min<int64_t>(k.nr, n - e)), all);
    }

    void statistics(const Lanes& lanes, char* log_sum, char* delta) {
      if (a_.wide)
        statistics_as(lanes, reinterpret_cast<double*>(log_sum), reinterpret_cast<double*>(delta));
      else
        statistics_as(lanes, reinterpret_cast<float*>(log_sum), reinterpret_cast<float*>(delta));
    }
    template <class T>
    void statistics_as(const Lanes& lanes, T* log_sum, T* delta) {
      for (int l = 0; l < a_.lanes(); l++)
        log_sum[l] = std::numeric_limits<T>::infinity(), delta[l] = 0;
      lanes.each_head([&](int lane, int count, int64_t head, int64_t query) {
        const T* from = static_cast<const T*>(call_.log_sum) +
                        (batch_ * call_.heads + head) * call_.q_length + query;
        std::copy(from, from + count, log_sum + lane);
        a_.loops->row_dots[int(a_.source)](rows_of(call_.grad, head, query, count),
                                           rows_of(call_.out, head, query, count), delta + lane);
      });
    }
    RowCopy rows_of(const AttentionOperand& x, int64_t head, int64_t query, int64_t count) const {
      const char* from =
          x.data + (batch_ * x.strides[0] + head * x.strides[1] + query * x.strides[2]) *
                       int64_t(dtype_size(a_.source));
      return {from, x.strides[2], x.strides[3], nullptr, 0, count, call_.value_size};
    }

    void block(int64_t begin, int64_t end, int64_t b) {
      const int64_t j0 = f_.blocks_.begin(b), keys = f_.blocks_.keys(b);
      const int64_t panel = f_.panel_rows() * f_.column();
      // Of panels that see any of these keys, those that follow each other together.
      int64_t from = begin;
      for (int64_t p = begin; p <= end; p++) {
        if (p < end) {
          const Lanes lanes = lanes_of(p);
          if (sees(lanes, j0, j0 + keys)) {
            one_panel(lanes, b, j0, keys, p - begin, m_.scores + (p - begin) * panel,
                      m_.products + (p - begin) * panel);
            continue;
          }
        }
        if (from < p) {
          add_rows(1, m_.scores, b, keys, from - begin, p - begin);
          add_rows(0, m_.products, b, keys, from - begin, p - begin);
        }
        from = p + 1;
      }
    }

    void one_panel(const Lanes& lanes, int64_t b, int64_t j0, int64_t keys, int64_t slot,
                   char* scores, char* products) {
      scores_of(a_, keys_, f_.of_keys_, b, keys, call_.head_size,
                m_.lanes[0] + slot * a_.panel_b(call_.head_size), a_.lanes(), scores);
      scores_of(a_, values_, f_.of_keys_, b, keys, call_.value_size,
                m_.lanes[1] + slot * a_.panel_b(call_.value_size), a_.lanes(), products);
      if (call_.dropout > 0) {
        lanes.drop(j0, j0 + keys, m_.dropped);
        a_.loops->multiply[a_.wide](products, m_.dropped, keys * a_.lanes());
      }
      const bool biased = lanes.biased(j0, j0 + keys);
      if (biased) lanes.bias(j0, j0 + keys, m_.bias);
      a_.loops->gradients[a_.wide]({scores, products, biased ? m_.bias : nullptr, keys, a_.lanes(),
                                    call_.scale, m_.log_sum + slot * f_.column(),
                                    m_.delta + slot * f_.column()});
      if (call_.dropout > 0) a_.loops->multiply[a_.wide](scores, m_.dropped, keys * a_.lanes());
      // Those of no query are 0 but where a key is not finite, and count among the keys' sums.
      if (lanes.count() < a_.lanes())
        for (char* numbers : {scores, products})
          for (int64_t j = 0; j < keys; j++)
            std::memset(numbers + (j * a_.lanes() + lanes.count()) * a_.number(), 0,
                        size_t((a_.lanes() - lanes.count()) * a_.number()));
      if (call_.grad_scores.data) lanes.store_scores(products, j0, keys, call_.grad_scores);
      const NumbersAsB ds = numbers_as_b(a_, products, keys, m_.packed);
      flags_b |= ds.flags;
      add_columns(a_, elements_, f_.of_elements_, b, ds, a_.lanes(),
                  m_.by_queries + slot * f_.result_bytes());
      as_a(scores, keys, 1, slot);
      as_a(products, keys, 0, slot);
    }
    // Numbers, keys x lanes, as rows of A, where they are not yet.
    void as_a(const char* numbers, int64_t keys, int i, int64_t slot) {
      const Kernel& k = *a_.tiles;
      char* to = m_.as_a[i] + slot * f_.as_a_panel();
      if (a_.packs) {
        const int64_t panel = k.mr * round_up(a_.lanes(), k.k_step) * k.a_bytes;
        for (int64_t j = 0; j < keys; j += k.mr)
          flags_a |=
              a_.pack_numbers_a(to + j / k.mr * panel, numbers + j * a_.lanes() * a_.number(),
                                a_.lanes(), 1, int(std::min<int64_t>(k.mr, keys - j)), a_.lanes());
      } else if (a_.pairs) {
        const int64_t n = keys * a_.lanes();
        a_.loops->copy_rows[int(DType::f32)][int(DType::bf16)]({numbers, n, 1, to, n, 1, n});
      }
    }

    // The sums of keys or values of block b += rows x lanes of panels [from, to) times the queries'
    // rows of the gradient, or the queries.
    void add_rows(int i, const char* numbers, int64_t b, int64_t keys, int64_t from, int64_t to) {
      const Kernel& k = *a_.tiles;
      const int64_t lanes = a_.lanes(), row = f_.sums_row(i) * a_.number();
      const int64_t size = int64_t(dtype_size(a_.type));
      const bool copied = a_.packs || a_.pairs;
      const int64_t panel = copied ? f_.as_a_panel() : f_.panel_rows() * f_.column();
      const char* a = (copied ? m_.as_a[i] : numbers) + from * panel;
      int64_t runs[kPanelsTogether];
      for (int64_t p = 0; p < kPanelsTogether; p++) runs[p] = p * panel;
      const int64_t tile_rows = f_.of_keys_.size;
      const int64_t a_step =
          a_.packs ? k.mr * round_up(lanes, k.k_step) * k.a_bytes : tile_rows * lanes * size;
      TileArgs t;
      t.words = lanes / k.k_word;
      t.packed_a = a_.packs;
      t.a_row = lanes * size, t.a_word = k.k_word * size;
      t.b_word = int64_t(k.nr) * k.b_bytes * k.k_word;
      t.acc_row = row, t.add = true;
      char* const sums = sums_[i] + (b - first_) * f_.blocks_.size * row;
      const int64_t in_panel = round_up(lanes, k.k_step) / k.k_word * t.b_word;
      for (int64_t e = 0; e < f_.size(i); e += k.nr) {
        t.cols = int(std::min<int64_t>(k.nr, f_.size(i) - e));
        for (int64_t p = 0; p * tile_rows < keys; p++) {
          t.rows = f_.of_keys_.rows(p, keys);
          t.acc = sums + p * tile_rows * row + e * a_.number();
          t.a = a + p * a_step;
          t.b = m_.across[i] + e / k.nr * f_.across_panel() + from * in_panel;
          if (k.finishes) {
            t.runs = to - from, t.a_runs = runs;
            k.tile(t);
            continue;
          }
          for (int64_t q = from; q < to; q++, t.a += panel, t.b += in_panel) add_tile(t);
        }
      }
    }
    // Hardware tiles add to 32 columns that lie together.
    void add_tile(TileArgs t) {
      const int64_t row = t.acc_row, width = a_.lanes() * a_.number();
      char* const acc = static_cast<char*>(t.acc);
      alignas(64) float sums[32 * 32];
      t.acc = sums, t.acc_row = width, t.add = false;
      a_.tiles->tile(t);
      for (int r = 0; r < t.rows; r++) {
        float* to = reinterpret_cast<float*>(acc + r * row);
        for (int c = 0; c < a_.tiles->nr; c++) to[c] += sums[r * a_.lanes() + c];
      }
    }

    const Backward& f_;
    const AttentionBackward& call_;
    const Arithmetic& a_;
    Memory m_;
    int64_t batch_ = 0, kv_head_ = 0, split_ = 0, first_ = 0, last_ = 0;
    Side keys_, values_, elements_;
    char* sums_[2];
  };

  const AttentionBackward& call_;
  const Arithmetic& a_;
  const KeyBlocks blocks_;
  const int64_t rows_, panels_;
  const Panels of_keys_, of_elements_;
  int64_t splits_, split_blocks_;
  int64_t bytes_;
  Block partial_{};
};

}  // namespace

bool attention_parts::backward(const AttentionBackward& call, const Arithmetic& a, int threads) {
  return Backward(call, a).run(threads);
}

}  // namespace fastnn
