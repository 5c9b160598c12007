// Convolutions with all that their results depend on but the input: read from Python once, by the
// short way of one call or for a chain of them.
#pragma once
#include "bind/image_tensors.hpp"
#include "conv/conv.hpp"
#include "conv/inverted.hpp"

namespace fastnn::tensors {

Tensor5 five(const Tensor& t);

// Stride, padding, dilation and groups of filters with `rank` spatial dimensions. False where the
// long way is to say what is wrong, or to compute.
bool read_geometry(PyObject* const* stride_to_groups, int rank, Conv& c);
// The sizes of the result, and whether x, the filters and the geometry suit each other.
bool sizes_of(const Tensor& x, const Tensor& w, const Conv& c, int64_t* out);
// Whether the result of these is channels-last. False where that is for the long way to find out.
bool layout_of(const Tensor& x, const Tensor& w, bool& last);
// Whether t has the strides that a result of this shape and layout is given.
bool as_made(const Tensor& t, const int64_t* shape, int dims, bool last);
void strides_as_made(const int64_t* shape, int dims, bool last, int64_t* strides);

// Arguments weight, bias, stride, padding, dilation, groups, activation, prepared: of `c` all but
// x, y, the residual and the precision. The weight is None where `prepared` has been called with
// it, and `w` then its layout alone.
constexpr int kLayerArguments = 8;
bool read_layer(PyObject* const* arguments, Conv& c, Tensor& w);
double operations_of(const int64_t* out, const Tensor& w);

// Arguments expand, expand_stride, expand_padding, depthwise, stride, project: see inverted.hpp.
// Layers are (weight or None as above, bias or None, activation, prepared), the first None where
// there is none; the depthwise one has padding 1.
constexpr int kInvertedArguments = 6;
bool read_inverted(PyObject* const* arguments, Inverted& c);
// The sizes of the result, (N, C, H, W), and whether x suits the layers.
bool sizes_of(const Tensor& x, const Inverted& c, int64_t* out);
double operations_of(const Tensor& x, const Inverted& c);

}  // namespace fastnn::tensors
