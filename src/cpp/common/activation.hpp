// The activations by number; shared with python/fastnn/backends/cpu/.
#pragma once

namespace fastnn {

enum ActivationKind : int {
  kNone = 0,
  kRelu = 1,
  kGelu = 2,
  kGeluTanh = 3,
  kSilu = 4,
  kSigmoid = 5,
  kTanh = 6,
  kRelu6 = 7,
  // not activations: the functions they are made of, which the tests measure
  kExp = 8,
  kErf = 9
};
constexpr int kActivations = 8;  // none included; what has a gradient
constexpr int kUnaryKinds = 10;  // and exp, erf

// Whether the gradient needs no more than the output (SAVES_OUTPUT in backends/cpu/).
constexpr bool saves_output(int kind) {
  return kind != kGelu && kind != kGeluTanh && kind != kSilu;
}

}  // namespace fastnn
