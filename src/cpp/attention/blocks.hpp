// What forward and backward have in common: the kernel that multiplies, keys and values in the form
// in which its tiles read them, and queries in lanes.
#pragma once
#include "attention/attention.hpp"
#include "attention/kernels.hpp"
#include "gemm/kernel.hpp"

namespace fastnn::attention_parts {

// How products are computed. Numbers (scores, sums) are float32, or float64 for that.
struct Arithmetic {
  const Kernel* tiles;
  const AttentionKernels* loops;
  DType source;  // of the tensors
  DType type;    // what the tiles read: the source's, or float32 where 16 bits are made that
  bool wide;     // numbers are double
  bool packs;    // tiles read A packed alone
  // Numbers, keys x lanes, as a tile's B: packed with this; else in pairs of keys; else as they
  // are.
  PackFn pack_numbers;
  PackFn pack_numbers_a;  // likewise, rows as A
  bool pairs;

  int64_t number() const { return wide ? 8 : 4; }
  int lanes() const { return tiles->nr; }
  // Bytes of a panel of B with so much of K.
  int64_t panel_b(int64_t k) const;
};
// `exact`: no kernel that may refuse what it packs.
Arithmetic arithmetic_of(DType type, bool exact);

// Keys are worked on in blocks, about as many as tiles and half of L1 hold.
struct KeyBlocks {
  int64_t length, size, count;
  KeyBlocks(const Arithmetic& a, int64_t keys);
  int64_t begin(int64_t block) const { return block * size; }
  int64_t keys(int64_t block) const {
    return length - begin(block) < size ? length - begin(block) : size;
  }
};

// n lanes of A in panels, as even as can be.
struct Panels {
  int64_t n, size;
  Panels(const Arithmetic& a, int64_t lanes);
  int64_t count() const { return (n + size - 1) / size; }
  int rows(int64_t panel, int64_t of) const {
    return int(of - panel * size < size ? of - panel * size : size);
  }
};

// Keys or values as a tile's A: bytes from one block of keys to the next, from panel to panel of
// its lanes, and within a panel from lane to lane and word to word of K.
struct Side {
  const char* data = nullptr;
  int64_t first_block = 0;
  int64_t block = 0, panel = 0, row = 0, word = 0;
  void place(TileArgs& t, int64_t b, int64_t p) const {
    t.a = data + (b - first_block) * block + p * panel;
    t.a_row = row, t.a_word = word;
  }
};

// Of one head, for blocks [first, last): a key a lane, K along its elements; or an element a lane,
// K along the keys. Read in place where that can be, else copied to memory of so many bytes.
// `flags` is what packing noticed.
int64_t rows_bytes(const Arithmetic& a, const KeyBlocks& blocks, int64_t n);
int64_t columns_bytes(const Arithmetic& a, const KeyBlocks& blocks, int64_t n);
Side rows_side(const Arithmetic& a, const KeyBlocks& blocks, const AttentionOperand& x,
               int64_t batch, int64_t head, int64_t n, int64_t first, int64_t last, char* memory,
               unsigned& flags);
Side columns_side(const Arithmetic& a, const KeyBlocks& blocks, const AttentionOperand& x,
                  int64_t batch, int64_t head, int64_t n, int64_t first, int64_t last, char* memory,
                  unsigned& flags);

// The queries in the lanes of a panel: row r of a group of heads that share their keys is query
// r % q_length of the group's head r / q_length.
class Lanes {
 public:
  Lanes(const Attention& call, const Arithmetic& a, int64_t batch, int64_t kv_head, int64_t row);
  int count() const { return count_; }
  // So many lanes are worth computing: half of them where tiles may stop at a vector, of two.
  int used() const { return !a_.packs && count_ <= a_.lanes() / 2 ? a_.lanes() / 2 : a_.lanes(); }
  // What the lanes together may see; none where first >= last.
  int64_t first_key() const { return first_; }
  int64_t last_key() const { return last_; }

  // Calls f(lane, count, head, query) for lanes of one head, whose queries follow each other.
  template <class F>
  void each_head(F f) const {
    for (int l = 0; l < count_;) {
      const int64_t head = (row_ + l) / call_.q_length, query = (row_ + l) % call_.q_length;
      const int64_t left = call_.q_length - query;
      const int n = int(left < count_ - l ? left : count_ - l);
      f(l, n, head0_ + head, query);
      l += n;
    }
  }
  // A tensor's rows of these lanes as a tile's B, K along their n elements. `rows` is memory for
  // lanes() rows of n, padded to words.
  unsigned pack(const AttentionOperand& x, int64_t n, char* to, char* rows) const;
  // Whether keys [begin, end) need a bias, and what it is, keys x lanes, to `to`.
  bool biased(int64_t begin, int64_t end) const;
  void bias(int64_t begin, int64_t end, void* to) const;
  // What dropout multiplies keys [begin, end) with, keys x lanes, to `to`.
  void drop(int64_t begin, int64_t end, void* to) const;
  // A tensor's rows of these lanes, one after the other.
  void copy(const AttentionOperand& x, int64_t n, char* rows) const;
  // Numbers, n x lanes, to the rows of a tensor with n elements, of the call's type or of numbers.
  void store(const void* numbers, int64_t n, const AttentionOperand& to,
             bool as_numbers = false) const;
  // Numbers, keys x lanes from a key on, to (batch, heads, queries, keys) of numbers.
  void store_scores(const void* numbers, int64_t key, int64_t keys,
                    const AttentionOperand& to) const;

 private:
  void store_turned(const char* numbers, int64_t rows, int count, const char* to,
                    int64_t row_stride, int64_t lane_stride, DType type) const;

  const Attention& call_;
  const Arithmetic& a_;
  int64_t batch_, head0_, row_;
  int count_;
  int64_t first_, last_;       // keys that some lane sees
  int64_t all_from_, all_to_;  // keys within every lane's bounds
};

// Numbers, keys x lanes, as a tile's B: in place, or to `to`.
struct NumbersAsB {
  const char* data;
  int64_t words;
  unsigned flags;
};
NumbersAsB numbers_as_b(const Arithmetic& a, const void* numbers, int64_t keys, char* to);

// A kernel's state on this thread, while it is in scope.
class Entered {
 public:
  explicit Entered(const Kernel& k) : kernel_(k) {
    if (k.enter) k.enter();
  }
  ~Entered() {
    if (kernel_.leave) kernel_.leave();
  }

 private:
  const Kernel& kernel_;
};

// Parts of one piece of memory, each on lines of its own.
class Carved {
 public:
  explicit Carved(char* at = nullptr) : begin_(at), at_(at) {}
  char* take(int64_t bytes) {
    char* p = at_;
    at_ += (bytes + 63) / 64 * 64;
    return p;
  }
  int64_t bytes() const { return at_ - begin_; }

 private:
  char *begin_, *at_;
};

}  // namespace fastnn::attention_parts
