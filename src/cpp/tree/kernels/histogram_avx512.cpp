// The kernels of binning and histograms, avx512.
#define FASTNN_TARGET avx512
#define FASTNN_TARGET_ID 2
#include "tree/binning.inl"
// After it.
#include "isa/math.hpp"
#include "tree/gradients.inl"
#include "tree/histogram.inl"

namespace fastnn {
const BinningKernels& avx512_binning() { return avx512::binning_table; }
const HistogramKernels& avx512_histogram() { return avx512::histogram_table; }
}  // namespace fastnn
