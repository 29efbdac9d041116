// Rows of tensors as float32 in whole strips, and strips as rows of tensors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "brief.hpp"
#include "transpose.hpp"

namespace {

// Copy rows, wide enough for whole strips, and fill up with 0.
template <class T>
void gather(const T* from, int64_t next, int64_t rows, int64_t width, float factor, float* to, int64_t wide,
            int64_t tall) {
    for (int64_t r = 0; r < rows; r++, from += next) {
        for (int64_t i = 0; i < width; i++) to[r * wide + i] = number(from[i]) * factor;
        for (int64_t i = width; i < wide; i++) to[r * wide + i] = 0;
    }
    for (int64_t i = rows * wide; i < tall * wide; i++) to[i] = 0;
}

template <class T>
float dot(const float* one, const T* other, int64_t width) {
    float sums[STRIP] = {}, sum = 0;
    for (int64_t i = 0; i < width; i++) sums[i % STRIP] += one[i] * number(other[i]);
    for (float part : sums) sum += part;
    return sum;
}

// Rows of a strip of queries as columns, and 0 where there are none.
template <class T>
void columns(const T* from, int64_t next, int64_t rows, int64_t width, float factor, float* spare, float* to) {
    const int64_t wide = whole(width);
    const bool direct = rows >= STRIP && width == wide;
    if (!direct) gather(from, next, std::min<int64_t>(rows, STRIP), width, factor, spare, wide, STRIP);
    for (int64_t i = 0; i < wide; i += LANES)
        for (int64_t r = 0; r < STRIP; r += LANES)
            if (direct)
                transpose(from + r * next + i, next, to + i * STRIP + r, STRIP, factor);
            else
                transpose(spare + r * wide + i, wide, to + i * STRIP + r, STRIP);
}

// Write a strip's columns as rows `next` apart.
template <class T>
void write_rows(const float* columns, int64_t rows, int64_t width, T* to, int64_t next, float* spare, const Rest& rest,
                int64_t query, int64_t step) {
    const int64_t wide = whole(width);
    const bool exact = std::is_same_v<T, float>, direct = exact && rows == STRIP && width == wide;
    for (int64_t i = 0; i < wide; i += LANES)
        for (int64_t r = 0; r < STRIP; r += LANES)
            if (direct)
                transpose(columns + i * STRIP + r, STRIP, (float*)to + r * next + i, next);
            else
                transpose(columns + i * STRIP + r, STRIP, spare + r * wide + i, wide);
    if (direct) return;
    for (int64_t r = 0; r < rows; r++)
        if constexpr (std::is_same_v<T, float>)
            std::memcpy(to + r * next, spare + r * wide, sizeof(float) * width);
        else
            narrow(spare + r * wide, width, to + r * next, rest.row(query + r * step));
}

}  // namespace
