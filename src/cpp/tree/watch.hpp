// Notices that memory of others was written to, by sums over it that depend on where each word is.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

namespace fastnn {

class TreeWatch {
 public:
  struct Part {
    const void* data;
    int64_t bytes;
  };
  // The parts stay where they are as long as this lives.
  explicit TreeWatch(std::vector<Part> parts);
  // Whether anything is otherwise than it was when this was made.
  bool changed() const;

 private:
  using Sums = std::array<uint64_t, 2>;
  std::vector<Sums> sums() const;

  std::vector<Part> parts_;
  int64_t bytes_ = 0;
  std::vector<Sums> was_;
};

}  // namespace fastnn
