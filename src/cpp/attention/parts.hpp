// The ways of attention, and the two products of which all are made.
#pragma once
#include <atomic>
#include <new>

#include "attention/blocks.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"

namespace fastnn::attention_parts {

// Calls one(part, i) for each of so many pieces, on any thread; each has a part, made by `make`,
// with `flags`, what packing noticed in it. False where the tiles cannot represent that, which is
// decided of all pieces together, since threads may get any of them. Throws std::bad_alloc.
template <class Make, class One>
bool run_pieces(const Arithmetic& a, int threads, int64_t pieces, Make make, One one) {
  std::atomic<int64_t> next{0};
  std::atomic<unsigned> flags_a{0}, flags_b{0};
  std::atomic<bool> out_of_memory{false};
  parallel(threads, [&](int, int) {
    const Entered entered(*a.tiles);
    try {
      auto part = make();
      for (int64_t i; (i = next.fetch_add(1)) < pieces;) one(part, i);
      flags_a |= part.flags_a;
      flags_b |= part.flags_b;
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
    scratch_trim();
  });
  if (out_of_memory) throw std::bad_alloc();
  return !split_refused(flags_a, flags_b);
}

// False where packing noticed what the tiles cannot represent: the results are to be computed
// again.
bool forward(const AttentionForward& call, const Arithmetic& a, int threads);
bool backward(const AttentionBackward& call, const Arithmetic& a, int threads);

// Few queries a head of keys: see decode.cpp.
bool decodes(const AttentionForward& call);
void decode(const AttentionForward& call, int threads);

// `count` keys of block b times a panel of lanes, packed, n elements each, the first `used` of
// them: numbers, keys x lanes.
void scores_of(const Arithmetic& a, const Side& keys, const Panels& panels, int64_t b,
               int64_t count, int64_t n, const char* lanes, int used, void* scores);
// The transposed columns of block b times keys x lanes, added to panels.n x lanes of numbers.
void add_columns(const Arithmetic& a, const Side& columns, const Panels& panels, int64_t b,
                 const NumbersAsB& by, int used, void* results);

}  // namespace fastnn::attention_parts
