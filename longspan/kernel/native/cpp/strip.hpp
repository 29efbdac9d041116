// A strip of queries on its way through its keys, forward: the softmax, kept online.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "outline.hpp"
#include "products.hpp"

namespace {

// Some keys and values, as float32.
struct Keys {
    const float *key, *value;
    int64_t key_next, value_next;
};

// A strip of queries on its way through its keys: numbers of a query, and of its output, in columns.
struct Strip {
    float *queries, *output, *most, *total;
    // The first query in the block, and how many there are.
    int64_t first, rows;
    bool begun;

    // Take in keys of a stretch, not more than `DEPTH`, the first of them at `place` in the run.
    INLINE void take(const Run& run, const Stretch& stretch, int64_t place, int64_t number, const Keys& keys,
                     int64_t width, int64_t value_width, float* scores) {
        float highest[STRIP], rescale[STRIP];
        std::fill_n(highest, STRIP, UNREAD);
        for (int64_t n = 0; n < number; n += ALONE) {
            const int64_t height = std::min<int64_t>(ALONE, number - n), at = place + n;
            uint32_t bits[ALONE], every = WHOLE;
            if (at < stretch.first || at + height > stretch.last)
                for (int64_t r = 0; r < height; r++)
                    every &= bits[r] = (uint32_t)(run.readers(at + r) >> first) & WHOLE;
            alone<Score>(height, keys.key + n * keys.key_next, keys.key_next, (const float*)queries, width,
                         every == WHOLE ? nullptr : (const uint32_t*)bits, scores + n * STRIP, highest);
        }
        for (int c = 0; c < STRIP; c += LANES) {
            const Vector before = load(most + c), now = larger(before, load(highest + c));
            const Integers silent = now < SILENT;
            const Vector less = silent ? Vector{} : now, factor = power(before - now);
            Vector sum = {};
            for (float* score = scores + c; score < scores + number * STRIP; score += STRIP) {
                const Vector weight = power(load(score) - less);
                store(score, weight);
                sum += weight;
            }
            store(total + c, load(total + c) * factor + sum);
            store(most + c, now);
            store(rescale + c, factor);
        }
        for (int64_t i = 0; i < value_width; i += ALONE)
            alone<Blend>(std::min<int64_t>(ALONE, value_width - i), keys.value + i, keys.value_next,
                         (const float*)scores, number, begun ? (const float*)rescale : (const float*)nullptr,
                         output + i * STRIP);
        begun = true;
    }

    // Join what was found with what other blocks have found before, an output in `known` and its log-sum-exps, and
    // divide the output by the weights. Returns what is not 0 where an output is not finite.
    INLINE Vector close(const float* known, const float* known_lse, int64_t value_width) {
        if (!begun) std::memset(output, 0, sizeof(float) * STRIP * whole(value_width));
        Vector all_odd = {};
        for (int c = 0; c < STRIP; c += LANES) {
            Vector odd[4] = {};
            Vector high = load(most + c), sum = load(total + c), factor = all(1.0f), other = {};
            if (known) {
                const Vector lse = load(known_lse + c);
                const Integers there = lse > SILENT, number = lse == lse;
                const Vector before = there ? lse * (float)LOG2E : all(UNREAD), now = larger(high, before);
                factor = power(high - now);
                other = there ? power(before - now) : number ? Vector{} : lse;
                sum = sum * factor + other;
                high = now;
            }
            const Vector share = sum == 0.0f ? Vector{} : 1.0f / sum;
            factor *= share;
            other *= share;
            for (int64_t i = 0; i < value_width; i++) {
                float* place = output + i * STRIP + c;
                Vector mean = load(place) * factor;
                if (known) mean += load(known + i * STRIP + c) * other;
                store(place, mean);
                odd[i % 4] += mean - mean;
            }
            store(most + c, high);
            store(total + c, sum);
            // Where there is no query, 0 times infinity is no concern of anyone.
            all_odd += choose((uint32_t)((1u << rows) - 1) >> c, (odd[0] + odd[1]) + (odd[2] + odd[3]), 0.0f);
        }
        return all_odd;
    }

    // Write log-sum-exps `next` apart.
    INLINE void write_lse(float* lse, int64_t next) const {
        float logs[STRIP];
        for (int c = 0; c < STRIP; c += LANES) store(logs + c, logarithm(load(total + c)));
        for (int64_t r = 0; r < rows; r++)
            lse[r * next] = total[r] == 0 ? -std::numeric_limits<float>::infinity()
                                          : (float)(most[r] / LOG2E + logs[r]);
    }
};

}  // namespace
