// Tiles of a few keys, backward, and which strips read them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "outline.hpp"

namespace {

// What of a chunk of keys each strip of queries reads: places from `low` up to `high`.
struct Live {
    int64_t low[STRIPS], high[STRIPS];

    Live() {
        for (int s = 0; s < STRIPS; s++) low[s] = high[s] = 0;
    }

    // Take in a tile; between tiles that a strip reads, its row is filled with `otherwise`.
    INLINE void add(int from, int to, int64_t place, int64_t height, float* filled, float otherwise) {
        for (int s = from; s < to; s++) {
            if (high[s] == low[s]) low[s] = high[s] = place;
            for (; high[s] < place; high[s]++)
                for (int c = 0; c < VECTORS; c++)
                    store(filled + high[s] * ROWS + s * STRIP + c * LANES, all(otherwise));
            high[s] = place + height;
        }
    }

    // Call with each stretch of places that the same strips read, and with those strips, side by side.
    template <class Action>
    INLINE void each(Action action) const {
        int64_t edges[2 * STRIPS];
        for (int s = 0; s < STRIPS; s++) edges[2 * s] = low[s], edges[2 * s + 1] = high[s];
        std::sort(edges, edges + 2 * STRIPS);
        for (int edge = 1; edge < 2 * STRIPS; edge++) {
            const int64_t first = edges[edge - 1], last = edges[edge];
            if (first == last) continue;
            auto reads = [&](int s) { return low[s] <= first && last <= high[s]; };
            for (int from = 0, to; from < STRIPS; from = to) {
                for (to = from + 1; reads(from) && to < STRIPS && to - from < ABREAST && reads(to);) to++;
                if (reads(from)) action(from, to - from, first, last);
            }
        }
    }
};

// Call with each tile of a chunk: its first place, its height, the strips that read it, and its masks or none.
template <class Action>
INLINE void tiles(const Run& run, uint64_t present, int64_t first, int64_t number, Action action) {
    const int strips = (64 - __builtin_clzll(present) + STRIP - 1) / STRIP;
    const bool plain = run.plain(first + number);
    for (int64_t place = 0; place < number; place += TALL) {
        const int height = (int)std::min<int64_t>(TALL, number - place);
        uint64_t bits[TALL], some = 0, every = ~0ull;
        int from = 0, to = strips;
        bool masked = false;
        if (!plain) {
            for (int r = 0; r < height; r++) {
                bits[r] = run.readers(first + place + r) & present;
                some |= bits[r];
                every &= bits[r];
            }
            if (!some) continue;
            from = __builtin_ctzll(some) / STRIP;
            to = (63 - __builtin_clzll(some)) / STRIP + 1;
            const uint64_t inside = (to == STRIPS ? ~0ull : (1ull << to * STRIP) - 1) & (~0ull << from * STRIP);
            masked = (every ^ present) & inside;
        }
        if (masked)
            for (int r = 0; r < height; r++) bits[r] >>= from * STRIP;
        for (int s = from, next; s < to; s = next) {
            next = std::min(to, s + ABREAST);
            action(place, height, s, next, masked ? bits : nullptr);
            if (masked)
                for (int r = 0; r < height; r++) bits[r] >>= (next - s) * STRIP;
        }
    }
}

}  // namespace
