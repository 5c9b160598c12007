// The dropout kernels of one instruction set. Included once by each file in kernels/, which defines
// FASTNN_TARGET; see isa/vec.hpp for why nothing here may be shared between targets.
#include "dropout/dropout.hpp"
#include "isa/philox.hpp"
#include "isa/stream.hpp"

namespace fastnn::FASTNN_TARGET {

template <class T>
struct LanesOf {
  using V = VecF32;
};
template <>
struct LanesOf<double> {
  using V = VecF64;
};

// Words are made for so many elements at a time, and read back from L1.
constexpr int64_t kWords = 1024;

// A product and not a choice between x and 0: what is dropped of an infinity or a NaN is NaN, and
// zeros keep their sign, as in torch.
template <class T, class V>
static FASTNN_INLINE void scale_run(const T* x, T* out, int64_t n, const uint32_t* words,
                                    uint32_t threshold, V scale, bool around_caches) {
  fill<T, V>(out, n, around_caches, [=](int64_t i, int lanes) __attribute__((always_inline)) {
    if (lanes == V::width)
      return V::load(x + i) * select(keeps(words + i, threshold, V()), scale, V::zero());
    const auto kept = keeps_partial(words + i, lanes, threshold, V());
    return V::load_partial(x + i, lanes) * select(kept, scale, V::zero());
  });
}

template <class T>
static void run(const void* x_, int64_t xs, void* out_, int64_t os, int64_t n, uint64_t seed,
                uint64_t first, uint64_t threshold, double scale_, bool around_caches) {
  using V = typename LanesOf<T>::V;
  const T* x = static_cast<const T*>(x_);
  T* out = static_cast<T*>(out_);
  // Where no word reaches the threshold everything is multiplied by 0.
  const bool none = threshold > 0xffffffffu;
  const V scale = none ? V::zero() : V::set1(typename V::T(scale_));
  const uint32_t least = none ? 0xffffffffu : uint32_t(threshold);
  uint32_t words[kWords];
  T in[kWords], result[kWords];
  for (int64_t i = 0; i < n; i += kWords) {
    const int64_t count = n - i < kWords ? n - i : kWords;
    philox_words(seed, first + uint64_t(i), count, words);
    const T* from = x + i * xs;
    if (xs != 1) {
      for (int64_t j = 0; j < count; j++) in[j] = from[j * xs];
      from = in;
    }
    if (os == 1) {
      scale_run<T, V>(from, out + i, count, words, least, scale, around_caches);
    } else {
      scale_run<T, V>(from, result, count, words, least, scale, false);
      for (int64_t j = 0; j < count; j++) out[(i + j) * os] = result[j];
    }
  }
  if (around_caches) end_stream();
}

static void words(uint64_t seed, uint64_t first, int64_t n, uint32_t* out) {
  philox_words(seed, first, n, out);
}

static const DropoutKernels table = {{run<float>, run<double>, run<bf16>, run<f16>}, words};

}  // namespace fastnn::FASTNN_TARGET
