// The pooling kernels of one instruction set. Included once by each file in kernels/, which defines
// FASTNN_TARGET; see isa/vec.hpp for why nothing here may be shared between targets.
#include "pool/channels.inl"
#include "pool/planes.inl"

namespace fastnn::FASTNN_TARGET {

// The gradient of a maximum, outputs one by one.
template <class T>
static void scatter(const PoolPlan& p, char* x_, char* out_, char* codes, int64_t channels,
                    char* sums_) {
  using C = typename Compute<T>::V::T;
  T* x = reinterpret_cast<T*>(x_);
  const T* out = reinterpret_cast<const T*>(out_);
  C* sums = reinterpret_cast<C*>(sums_);
  const PoolWindows &wz = p.axis[0], &wy = p.axis[1], &wx = p.axis[2];
  const int64_t elements = wz.in * wy.in * wx.in;
  fill(sums, elements * channels, C(0));
  for (int64_t z = 0; z < wz.out; z++)
    for (int64_t y = 0; y < wy.out; y++)
      for (int64_t o = 0; o < wx.out; o++) {
        const int64_t corner = (wz.begin[z] * wy.in + wy.begin[y]) * wx.in + wx.begin[o];
        const T* g = out + z * p.out[2] + y * p.out[3] + o * p.out[4];
        const int64_t place = z * p.code[2] + y * p.code[3] + o * p.code[4];
        for (int64_t c = 0; c < channels; c++) {
          const int64_t code = code_at(codes, p.wide_codes, place + c * p.code[1]);
          // Codes are an argument of the op: what is none of its own must not lead out of memory.
          if (uint64_t(code) >= uint64_t(p.taps)) continue;
          const int64_t at = corner + p.tap_position[code];
          if (uint64_t(at) < uint64_t(elements)) sums[at * channels + c] += wide(g[c * p.out[1]]);
        }
      }
  for (int64_t z = 0; z < wz.in; z++)
    for (int64_t y = 0; y < wy.in; y++) {
      T* to = x + z * p.x[2] + y * p.x[3];
      const C* from = sums + (z * wy.in + y) * wx.in * channels;
      if (channels == 1)
        store_row(from, to, p.x[4], wx.in);
      else
        for (int64_t i = 0; i < wx.in; i++)
          store_row(from + i * channels, to + i * p.x[4], p.x[1], channels);
    }
}

template <class T>
static constexpr PoolKernels::OfType kernels_of = {forward_planes<T, kMax>,
                                                   forward_planes<T, kMaxCodes>,
                                                   forward_planes<T, kSum>,
                                                   backward_planes<T, true>,
                                                   backward_planes<T, false>,
                                                   forward_channels<T, kMax>,
                                                   forward_channels<T, kMaxCodes>,
                                                   forward_channels<T, kSum>,
                                                   backward_channels<T, true>,
                                                   backward_channels<T, false>,
                                                   scatter<T>};
static const PoolKernels table = {
    {kernels_of<float>, kernels_of<double>, kernels_of<bf16>, kernels_of<f16>}};

}  // namespace fastnn::FASTNN_TARGET
