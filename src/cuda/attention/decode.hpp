// Attention of few queries, without dropout: the keys are split over blocks.
#pragma once
#include "attention/attention.hpp"

namespace fastnn::cuda {

bool decodes(const Attention& a);

// Scratch memory that it wants, in floats. `batch_invariant`: how the keys are split does not
// depend on the batch.
int64_t decode_workspace(const Attention& a, bool batch_invariant);
void attention_decode(const AttentionForward& a, float* workspace, bool batch_invariant,
                      void* stream);

}  // namespace fastnn::cuda
