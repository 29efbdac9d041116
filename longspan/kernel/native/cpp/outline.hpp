// Which keys each strip of a block reads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "vectors.hpp"

namespace {

struct Outline;

// Keys that a block reads: places from `key` on, and where its masks are.
struct Run {
    int64_t key, step, columns, words, first;
    bool causal;
    const uint64_t* bits;
    const Outline* outline;

    INLINE bool plain(int64_t until) const { return !bits && (!causal || until <= first + 1); }

    // Which rows of the block read a key.
    INLINE uint64_t readers(int64_t place) const {
        if (bits) return bits[place * words];
        const int64_t beyond = place - first;
        return !causal || beyond <= 0 ? ~0ull : beyond >= ROWS ? 0 : ~0ull << beyond;
    }
};

// Keys that a strip of queries reads, from `low` up to `high`, less than `GAP` unread ones in between included; from
// `first` up to `last` all of its queries read all of them.
struct Stretch {
    int64_t low, high, first, last;
};

// The stretches of each strip of a block in one run.
struct Outline {
    std::vector<Stretch> strips[STRIPS];
    int64_t low = 0, high = 0;

    explicit Outline(const Run& run, int64_t rows) {
        for (int s = 0; s * STRIP < rows; s++) {
            std::vector<Stretch>& made = strips[s];
            if (run.bits)
                trace(run, rows, s);
            else if (run.causal)
                made.push_back({0, std::min(run.columns, run.first + (s + 1) * STRIP), 0,
                                std::min(run.columns, run.first + s * STRIP + 1)});
            else
                made.push_back({0, run.columns, 0, run.columns});
            if (made.empty()) continue;
            low = high ? std::min(low, made.front().low) : made.front().low;
            high = std::max(high, made.back().high);
        }
    }

    void trace(const Run& run, int64_t rows, int s) {
        const uint32_t present = rows - s * STRIP >= STRIP ? WHOLE : (1u << (rows - s * STRIP)) - 1;
        int64_t full = 0;
        for (int64_t place = 0; place < run.columns; place++) {
            const uint32_t bits = (run.bits[place * run.words] >> (s * STRIP)) & present;
            full = bits == present ? full + 1 : 0;
            if (!bits) continue;
            if (strips[s].empty() || place - strips[s].back().high >= GAP)
                strips[s].push_back({place, place, place, place});
            Stretch& last = strips[s].back();
            last.high = place + 1;
            if (full > last.last - last.first) last.first = place + 1 - full, last.last = place + 1;
        }
    }
};

}  // namespace
