// Which way a call goes, and the products of which all are made.
#include "attention/attention.hpp"

#include "attention/parts.hpp"
#include "common/integers.hpp"
#include "common/parallel.hpp"
#include "gemm/gemm.hpp"

namespace fastnn {

using namespace attention_parts;

void attention_parts::scores_of(const Arithmetic& a, const Side& keys, const Panels& panels,
                                int64_t b, int64_t count, int64_t n, const char* lanes, int used,
                                void* scores) {
  const int64_t row = a.lanes() * a.number();
  TileArgs t;
  t.words = a.packs ? round_up(n, a.tiles->k_step) / a.tiles->k_word : ceil_div(n, a.tiles->k_word);
  t.packed_a = a.packs;
  t.b = lanes, t.b_word = int64_t(a.tiles->nr) * a.tiles->b_bytes * a.tiles->k_word;
  t.cols = used, t.acc_row = row;
  for (int64_t p = 0; p * panels.size < count; p++) {
    keys.place(t, b, p);
    t.rows = panels.rows(p, count);
    t.acc = static_cast<char*>(scores) + p * panels.size * row;
    a.tiles->tile(t);
  }
}

void attention_parts::add_columns(const Arithmetic& a, const Side& columns, const Panels& panels,
                                  int64_t b, const NumbersAsB& by, int used, void* results) {
  const int64_t row = a.lanes() * a.number();
  TileArgs t;
  t.words = by.words;
  t.packed_a = a.packs;
  t.b = by.data, t.b_word = int64_t(a.tiles->nr) * a.tiles->b_bytes * a.tiles->k_word;
  t.cols = used, t.acc_row = row, t.add = true;
  for (int64_t p = 0; p < panels.count(); p++) {
    columns.place(t, b, p);
    t.rows = panels.rows(p, panels.n);
    t.acc = static_cast<char*>(results) + p * panels.size * row;
    a.tiles->tile(t);
  }
}

namespace {

// Threads are worth waking for about 20 microseconds of work.
int threads_for(const Attention& call, double products) {
  const double work = 2. * products * double(call.batch * call.heads) * double(call.q_length) *
                      double(call.k_length) * double(call.head_size + call.value_size) / 2;
  return work / 1e5 < 20 ? 1 : max_threads();
}

}  // namespace

void attention(const AttentionForward& call) {
  const int threads = threads_for(call, 2);
  if (decodes(call)) {
    count_call("attention decode");
    return decode(call, threads);
  }
  const Arithmetic a = arithmetic_of(call.type, false);
  count_call(a.tiles->name);
  if (attention_parts::forward(call, a, threads)) return;
  const Arithmetic exact = arithmetic_of(call.type, true);
  count_call(exact.tiles->name);
  attention_parts::forward(call, exact, threads);
}

void attention_backward(const AttentionBackward& call) {
  const int threads = threads_for(call, 5);
  const Arithmetic a = arithmetic_of(call.type, false);
  count_call(a.tiles->name);
  if (attention_parts::backward(call, a, threads)) return;
  const Arithmetic exact = arithmetic_of(call.type, true);
  count_call(exact.tiles->name);
  attention_parts::backward(call, exact, threads);
}

const char* attention_path(DType type) { return arithmetic_of(type, false).tiles->name; }

}  // namespace fastnn
