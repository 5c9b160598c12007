// Fake quantization on a GPU: as quant/fake_quantize.hpp, but that nobody looks at the values of
// scales and zero points. All addresses are of the device, the seed's too.
#pragma once
#include "quant/fake_quantize.hpp"

namespace fastnn::cuda {

void fake_quantize(const FakeQuantize& call, void* stream);
void fake_masked(const FakeMasked& call, void* stream);

// How many float32 fake_gradients() needs beside.
int64_t fake_gradients_workspace(int dims, const int64_t* shape, const int64_t* scale_strides);
// grad, x and out are contiguous: their strides mean nothing.
void fake_gradients(const FakeGradients& call, float* workspace, void* stream);

}  // namespace fastnn::cuda
