// Numbers as bfloat16, and what that leaves out of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "vectors.hpp"

namespace {

// The nearest bfloat16 of numbers, and by how much they are off in units of a 256th of the last place.
INLINE std::pair<Halves, Bytes> narrowed(Vector given) {
    const Words bits = (Words)given, near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Integers number = given == given, off = ((Integers)(bits - (near << 16)) + 128) >> 8;
    const Integers half = number ? (Integers)near : Integers{} + 0x7fc0;
    const Integers less = off > 127 ? Integers{} + 127 : off;
    return {__builtin_convertvector((Words)half, Halves), __builtin_convertvector(less, Bytes)};
}

// Write a row as bfloat16, and to `rest`, where there is one, what that leaves out.
INLINE void narrow(const float* from, int64_t width, uint16_t* to, int8_t* rest) {
    for (int64_t i = 0; i < width; i += LANES) {
        float some[LANES];
        const int64_t there = std::min<int64_t>(LANES, width - i);
        if (there < LANES) std::memcpy(some, from + i, sizeof(float) * there);
        const std::pair<Halves, Bytes> made = narrowed(there < LANES ? load(some) : load(from + i));
        if (there == LANES) {
            std::memcpy(to + i, &made.first, sizeof made.first);
            if (rest) std::memcpy(rest + i, &made.second, sizeof made.second);
            continue;
        }
        std::memcpy(to + i, &made.first, sizeof(uint16_t) * there);
        if (rest) std::memcpy(rest + i, &made.second, there);
    }
}

// Read what was written so. What was never written is 0 whatever the rest.
INLINE void widen(const uint16_t* from, const int8_t* rest, int64_t width, float* to) {
    for (int64_t i = 0; i < width; i++) {
        const uint32_t less = rest ? (uint32_t)(rest[i] * 256) : 0;
        const uint32_t bits = from[i] & 0x7fff ? ((uint32_t)from[i] << 16) + less : 0;
        std::memcpy(to + i, &bits, 4);
    }
}

// What bfloat16 leaves out of rows that are added to later, of some queries that lie next to each other.
struct Rest {
    int8_t* held;
    int64_t queries, width;

    int8_t* row(int64_t query) const { return held ? held + query % queries * width : nullptr; }
};

}  // namespace
