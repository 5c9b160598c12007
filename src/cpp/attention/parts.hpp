// The ways of attention, and the two products of which all are made.
#pragma once
#include "attention/blocks.hpp"

namespace fastnn::attention_parts {

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
