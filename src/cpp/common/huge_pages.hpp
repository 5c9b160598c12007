// Memory that kernels walk again and again, in large strides: in huge pages as far as it fills
// them, so that its addresses stay in the TLB and the hardware fetches ahead past 4 KB.
#pragma once
#include <cstddef>

namespace fastnn {

constexpr size_t kHugePage = size_t(2) << 20;

// Page-aligned and uninitialised, for std::free. Throws std::bad_alloc.
void* paged_memory(size_t bytes);

}  // namespace fastnn
