// Attention by the copy engine and the warpgroups of sm_90a.
#pragma once
#include <cstdint>

#include "cuda/attention/attention.hpp"

namespace fastnn::cuda {

// Computes it if this kernel has what it asks for and tensor maps can describe the operands; else
// does nothing and returns false.
bool attention_on_hopper(const AttentionForward& a, void* stream);

// How many it has computed: tests ask which kernel did.
int64_t attentions_on_hopper();

}  // namespace fastnn::cuda
