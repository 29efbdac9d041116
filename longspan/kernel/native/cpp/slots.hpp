// Keys and values that a cache holds in slots, and tokens taken in.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "vectors.hpp"

namespace {

// Keys and values that a cache holds in slots, as `slots.py` lays them out. Slots lie in pages of `size`: those that a
// row of `table` lists for each head, or without a table one page for each row of the batch and head.
struct Slots {
    const void *key, *value;
    // Of numbers in eight bits, one factor for each slot.
    const float *key_scale, *value_scale;
    const int64_t* table;
    int64_t batch, heads, share, width, value_width, size, pages;
};

// Take in one token of every row, `[rows, heads, width]`; in eight bits with a factor for each, the largest over 127.
template <class From, class To>
void put(const From* from, int64_t width, const Slots& slots, const void* held, const float* scale, int64_t slot) {
    for (int64_t at = 0; at < slots.batch * slots.heads; at++, from += width) {
        const int64_t page = slots.table ? slots.table[at * slots.pages + slot / slots.size] : at;
        const int64_t place = page * slots.size + slot % slots.size;
        To* to = (To*)held + place * width;
        if constexpr (std::is_same_v<From, To>) {
            std::memcpy(to, from, sizeof(To) * width);
        } else {
            float most = 0;
            for (int64_t i = 0; i < width; i++) {
                const float size = std::fabs(number(from[i]));
                most = size > most || std::isnan(size) ? size : most;
            }
            const float factor = most / 127, divisor = std::max(std::numeric_limits<float>::min(), factor);
            for (int64_t i = 0; i < width; i++) to[i] = (int8_t)std::nearbyint(number(from[i]) / divisor);
            const_cast<float*>(scale)[place] = factor;
        }
    }
}

template <class From, class To>
void put_both(const Slots& slots, const void* key, const void* value, int64_t slot) {
    put<From, To>((const From*)key, slots.width, slots, slots.key, slots.key_scale, slot);
    put<From, To>((const From*)value, slots.value_width, slots, slots.value, slots.value_scale, slot);
}

}  // namespace
