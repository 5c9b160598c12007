// What numpy.random.RandomState(seed) draws, for the few draws that a forest makes of each seed.
#pragma once
#include <cstdint>

namespace fastnn {

// RandomState(seed).randint(0, below), the first of it. 2 <= below <= 2^32.
int64_t first_draw(uint32_t seed, int64_t below);

// counts[i]: how often i is among RandomState(seed).randint(0, rows, draws). 1 <= rows < 2^32.
void bootstrap_counts(uint32_t seed, int64_t rows, int64_t draws, double* counts);

}  // namespace fastnn
