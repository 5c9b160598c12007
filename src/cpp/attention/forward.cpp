// The forward: softmax(scale Q K^T + bias) V, block of keys after block of keys.
//
//   for block of keys                    K and V of it stay in L2
//     for panel of queries               a lane each
//       scores = K Q^T                   keys x lanes, in L1
//       probabilities = exp(scale scores + bias - largest so far)
//       result = result * factor + V^T probabilities
//   result / sum
#include <cmath>
#include <cstring>
#include <limits>

#include "attention/blocks.hpp"
#include "attention/parts.hpp"
#include "common/integers.hpp"

namespace fastnn {

using namespace attention_parts;

namespace {

// Panels that share a block of keys while it is in L2.
constexpr int64_t kPanelsTogether = 4;

class Forward {
 public:
  Forward(const AttentionForward& call, const Arithmetic& a)
      : call_(call),
        a_(a),
        blocks_(a, call.k_length),
        rows_(call.heads / call.kv_heads * call.q_length),
        panels_(ceil_div(rows_, a.lanes())),
        of_keys_(a, blocks_.size),
        of_values_(a, call.value_size) {
    Carved measured;
    carve(measured);
    bytes_ = measured.bytes();
  }

  // False where packing noticed what the tiles cannot represent.
  bool run(int threads) {
    const int64_t heads = call_.batch * call_.kv_heads;
    // Enough pieces that the threads end together; a result does not depend on its piece.
    const int64_t pieces = threads == 1 ? 1
                                        : std::min(ceil_div(panels_, kPanelsTogether),
                                                   ceil_div(int64_t(8) * threads, heads));
    // The last queries first: where later ones see more keys, they take longest.
    return run_pieces(
        a_, threads, heads * pieces, [&] { return Part(*this); },
        [&](Part& part, int64_t i) {
          const int64_t head = i % heads, piece = pieces - 1 - i / heads;
          part.head(head / call_.kv_heads, head % call_.kv_heads, panels_ * piece / pieces,
                    panels_ * (piece + 1) / pieces);
        });
  }

 private:
  struct Memory {
    char *queries, *rows, *scores, *packed, *bias, *results, *max, *sum, *factor;
  };
  Memory carve(Carved& c) const {
    const int64_t column = a_.lanes() * a_.number();
    Memory m;
    m.queries = c.take(kPanelsTogether * a_.panel_b(call_.head_size));
    m.rows = c.take(a_.lanes() * call_.head_size * int64_t(dtype_size(a_.type)));
    // Hardware tiles are stored whole.
    m.scores = c.take(round_up(blocks_.size, a_.tiles->mr) * column);
    m.packed = c.take(a_.panel_b(blocks_.size));
    m.bias = c.take(blocks_.size * column);
    m.results = c.take(kPanelsTogether * result_bytes());
    m.max = c.take(kPanelsTogether * column);
    m.sum = c.take(kPanelsTogether * column);
    m.factor = c.take(column);
    return m;
  }
  int64_t result_bytes() const {
    return round_up(call_.value_size, a_.tiles->mr) * a_.lanes() * a_.number();
  }

  // What one thread does.
  class Part {
   public:
    unsigned flags_a = 0, flags_b = 0;

    explicit Part(const Forward& f) : f_(f), call_(f.call_), a_(f.a_) {
      Carved c(static_cast<char*>(scratch(Scratch::misc, size_t(f.bytes_))));
      m_ = f.carve(c);
    }

    void head(int64_t batch, int64_t kv_head, int64_t begin, int64_t end) {
      // The keys that these panels may see.
      int64_t first = f_.blocks_.count, last = 0;
      for (int64_t p = begin; p < end; p++) {
        const Lanes lanes(call_, a_, batch, kv_head, p * a_.lanes());
        if (lanes.first_key() >= lanes.last_key()) continue;
        first = std::min(first, lanes.first_key() / f_.blocks_.size);
        last = std::max(last, ceil_div(lanes.last_key(), f_.blocks_.size));
      }
      if (first < last) {
        keys_ = rows_side(a_, f_.blocks_, call_.k, batch, kv_head, call_.head_size, first, last,
                          memory(Scratch::packed_a, rows_bytes(a_, f_.blocks_, call_.head_size)),
                          flags_a);
        values_ = columns_side(
            a_, f_.blocks_, call_.v, batch, kv_head, call_.value_size, first, last,
            memory(Scratch::packed_b, columns_bytes(a_, f_.blocks_, call_.value_size)), flags_a);
      }
      for (; begin < end; begin += kPanelsTogether)
        panels(batch, kv_head, begin, std::min(end, begin + kPanelsTogether), first, last);
    }

   private:
    static char* memory(Scratch slot, int64_t bytes) {
      return static_cast<char*>(scratch(slot, size_t(bytes)));
    }

    void panels(int64_t batch, int64_t kv_head, int64_t begin, int64_t end, int64_t first,
                int64_t last) {
      const int64_t column = a_.lanes() * a_.number(), panel_b = a_.panel_b(call_.head_size);
      for (int64_t p = begin; p < end; p++) {
        const Lanes lanes(call_, a_, batch, kv_head, p * a_.lanes());
        flags_b |=
            lanes.pack(call_.q, call_.head_size, m_.queries + (p - begin) * panel_b, m_.rows);
        start(m_.max + (p - begin) * column, m_.sum + (p - begin) * column);
        std::memset(m_.results + (p - begin) * f_.result_bytes(), 0, size_t(f_.result_bytes()));
      }
      for (int64_t b = first; b < last; b++)
        for (int64_t p = begin; p < end; p++) {
          const Lanes lanes(call_, a_, batch, kv_head, p * a_.lanes());
          const int64_t j0 = f_.blocks_.begin(b);
          const int64_t j1 = std::min(j0 + f_.blocks_.keys(b), lanes.last_key());
          if (j1 <= std::max(j0, lanes.first_key())) continue;
          block(lanes, b, j0, j1, p - begin);
        }
      for (int64_t p = begin; p < end; p++)
        finish(Lanes(call_, a_, batch, kv_head, p * a_.lanes()), batch, p - begin);
    }

    // One block of keys for one panel.
    void block(const Lanes& lanes, int64_t b, int64_t j0, int64_t j1, int64_t slot) {
      const int64_t column = a_.lanes() * a_.number(), keys = j1 - j0;
      char* const result = m_.results + slot * f_.result_bytes();
      scores_of(a_, keys_, f_.of_keys_, b, keys, call_.head_size,
                m_.queries + slot * a_.panel_b(call_.head_size), lanes.used(), m_.scores);
      const bool biased = lanes.biased(j0, j1);
      if (biased) lanes.bias(j0, j1, m_.bias);
      const bool in_pairs = a_.pairs && call_.dropout == 0;
      const bool scale = a_.loops->probabilities[a_.wide](
          {m_.scores, biased ? m_.bias : nullptr, keys, a_.lanes(), lanes.used(), call_.scale,
           in_pairs ? m_.packed : nullptr, m_.max + slot * column, m_.sum + slot * column,
           m_.factor});
      if (scale) a_.loops->scale_columns[a_.wide](result, call_.value_size, a_.lanes(), m_.factor);
      if (call_.dropout > 0) {
        lanes.drop(j0, j1, m_.bias);
        a_.loops->multiply[a_.wide](m_.scores, m_.bias, keys * a_.lanes());
      }
      const NumbersAsB p = in_pairs ? NumbersAsB{m_.packed, (keys + 1) / 2, 0}
                                    : numbers_as_b(a_, m_.scores, keys, m_.packed);
      flags_b |= p.flags;
      add_columns(a_, values_, f_.of_values_, b, p, lanes.used(), result);
    }

    void start(char* max, char* sum) const {
      for (int l = 0; l < a_.lanes(); l++) {
        if (a_.wide) {
          reinterpret_cast<double*>(max)[l] = -std::numeric_limits<double>::infinity();
          reinterpret_cast<double*>(sum)[l] = 0;
        } else {
          reinterpret_cast<float*>(max)[l] = -std::numeric_limits<float>::infinity();
          reinterpret_cast<float*>(sum)[l] = 0;
        }
      }
    }

    void finish(const Lanes& lanes, int64_t batch, int64_t slot) {
      const int64_t column = a_.lanes() * a_.number();
      char *max = m_.max + slot * column, *sum = m_.sum + slot * column;
      a_.wide ? finish_as<double>(lanes, batch, max, sum)
              : finish_as<float>(lanes, batch, max, sum);
      char* const result = m_.results + slot * f_.result_bytes();
      a_.loops->scale_columns[a_.wide](result, call_.value_size, a_.lanes(), m_.factor);
      lanes.store(result, call_.value_size, call_.out);
    }
    template <class T>
    void finish_as(const Lanes& lanes, int64_t batch, const char* max_, const char* sum_) {
      const T *max = reinterpret_cast<const T*>(max_), *sum = reinterpret_cast<const T*>(sum_);
      T* const factor = reinterpret_cast<T*>(m_.factor);
      for (int l = 0; l < a_.lanes(); l++) factor[l] = sum[l] == 0 ? T(0) : T(1) / sum[l];
      if (!call_.log_sum) return;
      lanes.each_head([&](int lane, int count, int64_t head, int64_t query) {
        T* to = static_cast<T*>(call_.log_sum) + (batch * call_.heads + head) * call_.q_length;
        for (int i = 0; i < count; i++)
          to[query + i] = sum[lane + i] == 0
                              ? std::numeric_limits<T>::infinity()
                              // Rounded once: the backward's probabilities err as much as this.
                              : T(double(max[lane + i]) * 0x1.62e42fefa39efp-1 +
                                  std::log(double(sum[lane + i])));
      });
    }

    const Forward& f_;
    const AttentionForward& call_;
    const Arithmetic& a_;
    Memory m_;
    Side keys_, values_;
  };

  const AttentionForward& call_;
  const Arithmetic& a_;
  const KeyBlocks blocks_;
  const int64_t rows_, panels_;
  const Panels of_keys_, of_values_;
  int64_t bytes_;
};

}  // namespace

bool attention_parts::forward(const AttentionForward& call, const Arithmetic& a, int threads) {
  return Forward(call, a).run(threads);
}

}  // namespace fastnn
