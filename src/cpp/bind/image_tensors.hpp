// What the short ways of convolution and pooling have in common: tensors (N, C, *spatial).
#pragma once
#include "bind/tensors.hpp"

namespace fastnn::tensors {

constexpr int kMostSpatial = 3;

// An integer for all `rank` spatial dimensions, or a tuple of one for each. False for anything else
// and for numbers below `least`. No error is left set.
bool numbers(PyObject* object, int rank, int64_t least, int64_t* to);

// c10's is_channels_last_strides, by which torch chooses the layout of a result.
bool like_channels_last(const int64_t* shape, const int64_t* strides, int dims);
// Of a dense tensor with its channels innermost.
void channels_last_strides(const int64_t* shape, int dims, int64_t* strides);

// Uninitialised memory: small as torch makes it, large from `make` (empty_image in backends/cpu/),
// which is called with `like`, the shape, whether it is to be channels-last, and the dtype where
// that is not like's. Null with an error set, or without.
PyObject* new_image(PyObject* make, const Tensor& like, const int64_t* shape, int dims, bool last,
                    DType type, Tensor& out);

}  // namespace fastnn::tensors
