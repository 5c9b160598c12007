#pragma once
#include "tree/layout.hpp"

namespace fastnn {

// Throws std::bad_alloc.
ExactTree grow(Layout& layout, const TreeTarget& target, const ExactSettings& settings);

}  // namespace fastnn
