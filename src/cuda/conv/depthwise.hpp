// Convolutions of which each channel has one filter: there is nothing to share between channels, so
// that memory, not tensor cores, is what limits them.
#pragma once
#include "cuda/conv/conv.hpp"

namespace fastnn::cuda {

// Whether each channel of y comes from one of x, and no other does.
inline bool is_depthwise(const Conv& c) { return c.w.size[1] == 1 && c.w.size[0] == c.groups; }

// y from x, or x from y (transposed), with c's epilogue.
void depthwise(const Conv& c, bool transposed, const Allocate& allocate, void* stream);
// w from x and y.
void depthwise_weight(const Conv& c, const Allocate& allocate, void* stream);

}  // namespace fastnn::cuda
