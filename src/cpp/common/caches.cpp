#include "common/caches.hpp"

#include <cstdio>

namespace fastnn {
namespace {

int64_t level_bytes(int level, int64_t otherwise) {
  char path[80];
  for (int index = 0; index < 8; index++) {
    auto read = [&](const char* what, const char* format, auto*... values) {
      std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/%s", index,
                    what);
      std::FILE* file = std::fopen(path, "r");
      if (!file) return false;
      const bool read = std::fscanf(file, format, values...) == int(sizeof...(values));
      std::fclose(file);
      return read;
    };
    int found;
    long long size;
    char unit = 0;
    if (!read("level", "%d", &found) || found != level || !read("size", "%lld%c", &size, &unit))
      continue;
    const int shift = unit == 'K' ? 10 : unit == 'M' ? 20 : unit == 'G' ? 30 : 0;
    if (size > 0) return int64_t(size) << shift;
  }
  return otherwise;
}

}  // namespace

int64_t core_cache_bytes() {
  static const int64_t bytes = level_bytes(2, int64_t(1) << 20);
  return bytes;
}

int64_t last_cache_bytes() {
  static const int64_t bytes = level_bytes(3, int64_t(32) << 20);
  return bytes;
}

}  // namespace fastnn
