// Rows turned into columns, and back.
#pragma once

#include <cstdint>
#include <utility>

#include "vectors.hpp"

namespace {

// Exchange, in a pair of rows that lie `H` apart, the lanes in which the upper row belongs to the lower one.
template <int H, int... I>
INLINE void exchange(Vector& upper, Vector& lower, std::integer_sequence<int, I...>) {
    const Vector above = upper, below = lower;
    upper = __builtin_shufflevector(above, below, (I & H ? LANES + I - H : I)...);
    lower = __builtin_shufflevector(above, below, (I & H ? LANES + I : I + H)...);
}

template <int H>
INLINE void exchanges(Vector (&rows)[LANES]) {
    for (int r = 0; r < LANES; r++)
        if (!(r & H)) exchange<H>(rows[r], rows[r + H], std::make_integer_sequence<int, LANES>{});
    if constexpr (H > 1) exchanges<H / 2>(rows);
}

// Turn a square of numbers.
template <class T>
__attribute__((noinline)) void transpose(const T* from, int64_t down, float* to, int64_t across, float factor = 1) {
    Vector rows[LANES];
    for (int r = 0; r < LANES; r++) rows[r] = as_vector(from + r * down) * factor;
    exchanges<LANES / 2>(rows);
    for (int r = 0; r < LANES; r++) store(to + r * across, rows[r]);
}

// Turn ROWS rows into columns.
void turn(const float* from, int64_t wide, float* to) {
    for (int64_t r = 0; r < ROWS; r += LANES)
        for (int64_t i = 0; i < wide; i += LANES) transpose(from + r * wide + i, wide, to + i * ROWS + r, ROWS);
}

void turn_back(const float* from, int64_t wide, float* to) {
    for (int64_t i = 0; i < wide; i += LANES)
        for (int64_t r = 0; r < ROWS; r += LANES) transpose(from + i * ROWS + r, ROWS, to + r * wide + i, wide);
}

}  // namespace
