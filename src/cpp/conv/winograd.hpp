// Winograd's convolution F(2 x 2, 3 x 3): 16 products of matrices for every 36 multiplications.
//
//   Y = A^T [sum over c of (G g G^T) * (B^T d B)] A
//
// for tiles d of 4 x 4 inputs and Y of 2 x 2 outputs (Lavin and Gray 2016, arXiv:1509.09308). Its
// matrices hold 0, 1 and 1/2 alone, so that it loses about as little as the sums of a direct
// convolution do; winograd.cpp says when it would lose more, and then it is not used.
#pragma once
#include "conv/conv.hpp"

namespace fastnn {

// Whether it can compute the convolution or its input's gradient from `in` to `out`, and is faster.
bool is_winograd(const Conv& c, const Tensor5& in, const Tensor5& out);
// y from x, x from y. False where the numbers are such that the result is to be computed otherwise.
bool winograd_forward(const Conv& c);
bool winograd_input(const Conv& c);

}  // namespace fastnn
