#include "conv/int8_program.hpp"

#include <algorithm>
#include <stdexcept>

namespace fastnn {

uintptr_t Int8Program::place(int64_t base, int64_t offset) {
  if (base < 0 || offset < 0) throw std::invalid_argument("Int8Program: place: expected 0 or more");
  bases_ = std::max(bases_, base + 1);
  places_.push_back({base, offset});
  return places_.size();
}

void Int8Program::run(const std::vector<uintptr_t>& bases) const {
  if (int64_t(bases.size()) < bases_)
    throw std::invalid_argument("Int8Program: bases: expected " + std::to_string(bases_) +
                                " addresses, got " + std::to_string(bases.size()));
  auto found = [&](const void* stands_for) {
    const Place& p = places_.at(size_t(reinterpret_cast<uintptr_t>(stands_for)) - 1);
    return reinterpret_cast<char*>(bases[size_t(p.base)]) + p.offset;
  };
  for (const Step& step : steps_) {
    if (step.convolves) {
      Int8Conv c = step.conv;
      c.x.data = found(c.x.data), c.y.data = found(c.y.data);
      if (c.residual) c.residual = found(c.residual);
      int8_conv(c);
    } else {
      Int8MaxPool p = step.pool;
      p.x = reinterpret_cast<const uint8_t*>(found(p.x));
      p.y = reinterpret_cast<uint8_t*>(found(p.y));
      int8_max_pool(p);
    }
  }
}

}  // namespace fastnn
