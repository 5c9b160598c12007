// Maximum pooling of quantized images, which keep their scale and zero point: of bytes whose
// channels are neighbours. Beyond the bounds there is nothing.
#pragma once
#include <cstdint>

namespace fastnn {

struct Int8MaxPool {
  const uint8_t* x;  // (images, height, width, channels), without gaps
  uint8_t* y;        // likewise, of `out` positions
  int64_t images, channels, size[2], out[2];
  int64_t kernel[2], stride[2], padding[2];
};

// Each window has at least one position within the image.
void int8_max_pool(const Int8MaxPool& p);

}  // namespace fastnn
