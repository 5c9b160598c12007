// The kernels of binning and histograms, avx2.
#define FASTNN_TARGET avx2
#define FASTNN_TARGET_ID 1
#include "tree/binning.inl"
// After it.
#include "isa/math.hpp"
#include "tree/gradients.inl"
#include "tree/histogram.inl"

namespace fastnn {
const BinningKernels& avx2_binning() { return avx2::binning_table; }
const HistogramKernels& avx2_histogram() { return avx2::histogram_table; }
}  // namespace fastnn
