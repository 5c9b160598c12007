// Depthwise convolution: as many groups as channels, each output channel from one input channel.
// There is no matrix product in it; planes (or, channels-last, positions) are computed one by one.
#pragma once
#include "conv/conv.hpp"

namespace fastnn {

bool is_depthwise(const Conv& c);
void depthwise_forward(const Conv& c);
void depthwise_input(const Conv& c);
void depthwise_weight(const Conv& c);

}  // namespace fastnn
