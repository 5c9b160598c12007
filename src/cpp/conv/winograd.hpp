// Winograd's convolution: 16 products of matrices for every 36 multiplications by 3 x 3 filters,
// 25 for as many at stride 2, and 49 for every 100 by 5 x 5 filters.
//
//   Y = A^T [sum over c of (G g G^T) * (B^T d B)] A
//
// for tiles d of inputs and Y of 2 x 2 outputs (Lavin and Gray 2016, arXiv:1509.09308). Its
// matrices hold 0, 1 and 1/2 alone, so that it loses about as little as the sums of a direct
// convolution do; winograd.cpp says when it would lose more, and then it is not used.
#pragma once
#include "conv/conv.hpp"

namespace fastnn {

// y from x, x from y, w from both. False, with nothing done but perhaps to the result, where
// another way is faster, or the numbers are such that the result is to be computed otherwise.
bool winograd_forward(const Conv& c);
bool winograd_input(const Conv& c);
bool winograd_weight(const Conv& c);
// Whether winograd_forward may compute c.
bool is_winograd(const Conv& c);

}  // namespace fastnn
