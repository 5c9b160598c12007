// Fake quantization on a GPU: as quant/fake_quantize.hpp, but that nobody looks at the values of
// scales and zero points, and that random numbers' `seed` is on the device; null: to nearest.
// `random` and `seed` of the grid mean nothing here.
#pragma once
#include "quant/fake_quantize.hpp"

namespace fastnn::cuda {

void fake_quantize(const FakeQuantize& call, const uint64_t* seed, void* stream);
void fake_masked(const FakeMasked& call, void* stream);

// How many float32 fake_gradients() needs beside.
int64_t fake_gradients_workspace(int dims, const int64_t* shape, const int64_t* scale_strides);
// grad, x and out are contiguous: their strides mean nothing.
void fake_gradients(const FakeGradients& call, const uint64_t* seed, float* workspace,
                    void* stream);

}  // namespace fastnn::cuda
