// Few queries against what a cache holds.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "products.hpp"
#include "rows.hpp"
#include "slots.hpp"
#include "threads.hpp"
#include "transpose.hpp"

namespace {

// What is added to scores, and how far apart it lies; distances are 0 where it is the same.
struct Bias {
    const float* data;
    int64_t batch, head, query;
};

// Some keys or values as float32 in whole vectors, where they lie if that is what they are.
template <class T>
INLINE const float* as_rows(const T* from, int64_t rows, int64_t width, int64_t wide, float* room) {
    if (width != wide)
        gather(from, width, rows, width, 1.0f, room, wide, rows);
    else if constexpr (std::is_same_v<T, float>)
        return from;
    else
        for (int64_t i = 0; i < rows * wide; i += LANES) store(room + i, as_vector(from + i));
    return room;
}

// Add up each of as many rows as there are lanes, whose sums become the lanes of the first.
template <int H = LANES / 2>
INLINE void fold(Vector (&rows)[LANES]) {
    for (int r = 0; r < H; r++) {
        exchange<H>(rows[r], rows[r + H], std::make_integer_sequence<int, LANES>{});
        rows[r] += rows[r + H];
    }
    if constexpr (H > 1) fold<H / 2>(rows);
}

// Products of one query and up to as many keys as there are lanes.
template <int WIDE>
INLINE Vector products(const float* query, const float* keys, int64_t given, int64_t number) {
    const int64_t wide = WIDE ? WIDE : given;
    Vector sums[LANES];
    for (int64_t k = 0; k < LANES; k++) {
        sums[k] = Vector{};
        if (k < number)
            for (int64_t i = 0; i < wide; i += LANES) sums[k] += load(query + i) * load(keys + k * wide + i);
    }
    fold(sums);
    return sums[0];
}

// What the queries that share one key head of one row of the batch read in the slots from `begin` up to `end`.
template <class T>
void weigh_head(const Slots& slots, const float* query, const Bias& bias, int64_t begin, int64_t end, float scale,
                float* output, int64_t batch, int64_t head, Room& room) {
    const int64_t width = slots.width, wide = whole(width), value_width = slots.value_width,
                  value_wide = whole(value_width), share = slots.share, length = whole(end - begin);
    const int64_t at = batch * slots.heads + head;
    float* queries = room.take(share * (wide + length + value_wide) + CHUNK * std::max(wide, value_wide));
    float *scores = queries + share * wide, *sums = scores + share * length, *rows = sums + share * value_wide;
    gather(query + at * share * width, width, share, width, (float)(scale * LOG2E), queries, wide, share);
    std::fill(sums, sums + share * value_wide, 0.0f);

    // Call with stretches of slots that lie in a row, each with the number of its first slot among all pages.
    const int64_t* table = slots.table + (slots.table ? at * slots.pages : 0);
    // What is read next is fetched at the same time: one stream alone keeps memory waiting.
    auto stretches = [&](const T* from, int64_t across, int64_t most, const T* later, int64_t later_across,
                         int64_t later_head, auto action) {
        for (int64_t slot = begin, number; slot < end; slot += number) {
            const int64_t place = slot % slots.size, page = slots.table ? table[slot / slots.size] : at;
            int64_t in_row = slots.size - place, next = slot / slots.size + 1;
            while (slots.table && in_row < most && slot + in_row < end && table[next] == table[next - 1] + 1)
                in_row += slots.size, next++;
            number = std::min({most, end - slot, in_row});
            // No processor guesses where a page lies that is not the one behind.
            if (slots.table && number == in_row && slot + number < end && table[next] != table[next - 1] + 1) {
                const char* ahead = (const char*)(from + table[next] * slots.size * across);
                for (int64_t byte = 0; byte < slots.size * across * (int64_t)sizeof(T); byte += 64)
                    __builtin_prefetch(ahead + byte);
            }
            if (later_head < slots.batch * slots.heads) {
                const int64_t other = slots.table ? slots.table[later_head * slots.pages + slot / slots.size] : later_head;
                const char* ahead = (const char*)(later + (other * slots.size + place) * later_across);
                for (int64_t byte = 0; byte < number * later_across * (int64_t)sizeof(T); byte += 64)
                    __builtin_prefetch(ahead + byte, 0, 2);
            }
            action(slot, page * slots.size + place, number);
        }
    };

    stretches((const T*)slots.key, width, LANES, (const T*)slots.value, value_width, at, [&](int64_t slot, int64_t place, int64_t number) {
        const float* keys = as_rows((const T*)slots.key + place * width, number, width, wide, rows);
        for (int64_t r = 0; r < share; r++) {
            const float* one = queries + r * wide;
            Vector score = number < LANES ? products<0>(one, keys, wide, number)
                           : wide == 32   ? products<32>(one, keys, wide, LANES)
                           : wide == 64   ? products<64>(one, keys, wide, LANES)
                           : wide == 128  ? products<128>(one, keys, wide, LANES)
                                          : products<0>(one, keys, wide, LANES);
            if (slots.key_scale) score *= load_some(slots.key_scale + place, number);
            if (bias.data) {
                const Vector added = load_some(bias.data + batch * bias.batch + head * bias.head + r * bias.query +
                                                   slot - begin, number);
                // Whatever lies in a slot that is not read.
                score = added < SILENT ? added : score + (float)LOG2E * added;
            }
            // What lies after the last is written over by the next.
            float some[LANES];
            store(some, score);
            std::memcpy(scores + r * length + slot - begin, some, sizeof(float) * number);
        }
    });

    for (int64_t r = 0; r < share; r++) {
        float* score = scores + r * length;
        const float unread = -std::numeric_limits<float>::infinity();
        std::fill(score + (end - begin), score + length, unread);
        Vector most = all(unread), total = {};
        for (int64_t i = 0; i < length; i += LANES) most = larger(load(score + i), most);
        float high = unread, sum = 0;
        for (int lane = 0; lane < LANES; lane++) high = most[lane] > high ? most[lane] : high;
        // Of a query that reads nothing all weights are 0.
        if (high == unread) high = 0;
        for (int64_t i = 0; i < length; i += LANES) {
            const Vector less = load(score + i) - high;
            // What is no number stays none.
            const Vector weight = less == less ? power(less) : less;
            store(score + i, weight);
            total += weight;
        }
        for (int lane = 0; lane < LANES; lane++) sum += total[lane];
        const float part = sum == 0 ? 0 : 1 / sum;
        for (int64_t i = 0; i < length; i += LANES) store(score + i, load(score + i) * part);
    }

    stretches((const T*)slots.value, value_width, CHUNK, (const T*)slots.key, width, at + 1, [&](int64_t slot, int64_t place, int64_t number) {
        const float* values = as_rows((const T*)slots.value + place * value_width, number, value_width, value_wide, rows);
        float* weights = scores + slot - begin;
        for (int64_t r = 0; r < share && slots.value_scale; r++)
            for (int64_t k = 0; k < number; k++) weights[r * length + k] *= slots.value_scale[place + k];
        for (int64_t r = 0; r < share; r += TALL)
            for (int64_t i = 0; i < value_wide; i += STRIP * ABREAST)
                tile<Collect>((int)std::min<int64_t>(TALL, share - r),
                              (int)std::min<int64_t>(ABREAST, (value_wide - i) / STRIP),
                              (const float*)weights + r * length, length, values + i, value_wide, number,
                              sums + r * value_wide + i, value_wide);
    });
    for (int64_t r = 0; r < share; r++)
        std::memcpy(output + (at * share + r) * value_width, sums + r * value_wide, sizeof(float) * value_width);
}

template <class T>
void weigh(const Slots& slots, const float* query, const Bias& bias, int64_t begin, int64_t end, float scale,
           float* output, int64_t threads) {
    share(slots.batch * slots.heads, threads, [&](int64_t item, Room& room) {
        weigh_head<T>(slots, query, bias, begin, end, scale, output, item / slots.heads, item % slots.heads, room);
    });
}

}  // namespace
