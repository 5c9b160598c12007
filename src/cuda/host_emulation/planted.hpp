// What the files of planted kernels have in common.
#pragma once
#include <functional>
#include <map>
#include <string>

namespace planted {

std::string wrong_result(int element, float is, float expected);

// Kernel -> a run of it with the seed that is set: what was wrong with its results, or nothing.
extern const std::map<std::string, std::function<std::string()>> kSm90;

}  // namespace planted
