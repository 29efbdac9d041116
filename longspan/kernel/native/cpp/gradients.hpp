// Gradients of a block of queries, and of the keys that it reads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "memory.hpp"
#include "products.hpp"
#include "rows.hpp"
#include "tiles.hpp"
#include "walk.hpp"

namespace {

template <class T>
void backward_block(const Work& work, const Block& block, int64_t batch, int64_t head, bool joined, const Sums& sums,
                    const Rest& rest, Room& room) {
    const int64_t width = work.width, wide = whole(width), value_width = work.value_width,
                  value_wide = whole(value_width);
    float* rows = room.take(ROWS * (3 * wide + 2 * value_wide + 2 * CHUNK + 3));
    float *queries = rows + ROWS * wide, *into = queries + ROWS * wide, *grad_rows = into + ROWS * wide,
          *grads = grad_rows + ROWS * value_wide, *weights = grads + ROWS * value_wide,
          *slopes = weights + ROWS * CHUNK, *lse = slopes + ROWS * CHUNK, *delta = lse + ROWS,
          *little = delta + ROWS;
    const T* query = row<T>(work.query, batch, head, block.start);
    gather(query, work.query.row * block.step, block.rows, width, (float)(work.scale * LOG2E), rows, wide, ROWS);
    turn(rows, wide, queries);
    gather(query, work.query.row * block.step, block.rows, width, work.scale, rows, wide, ROWS);
    gather(row<T>(work.grad_output, batch, head, block.start), work.grad_output.row * block.step, block.rows,
           value_width, 1.0f, grad_rows, value_wide, ROWS);
    turn(grad_rows, value_wide, grads);
    const T* result = row<T>(work.result, batch, head, block.start);
    const int64_t at = (batch * work.heads_all + head) * work.queries + block.start;
    for (int64_t r = 0; r < ROWS; r++) {
        const bool present = r < block.rows;
        // A row that read nothing has only masked scores, so any finite number serves it.
        const bool silent = present && work.lse[at + r * block.step] == -std::numeric_limits<float>::infinity();
        const double total = !present ? -UNREAD : silent ? 0 : work.lse[at + r * block.step] * LOG2E;
        lse[r] = (float)total;
        little[r] = (float)(total - lse[r]);
        delta[r] = present && !silent && work.grad_lse ? -work.grad_lse[at + r * block.step] : 0;
        if (present) delta[r] += dot(grad_rows + r * value_wide, result + r * work.result.row * block.step, value_width);
    }
    std::memset(into, 0, sizeof(float) * ROWS * wide);

    const uint64_t present = block.present();
    const int64_t key_head = head / work.share;
    auto chunk = [&](const Run& run, int64_t first, int64_t number, float* grad_key, float* grad_value, int64_t next) {
            const int64_t key_next = work.key.row * run.step, value_next = work.value.row * run.step;
            const T* key = row<T>(work.key, batch, key_head, run.key + first * run.step);
            const T* value = row<T>(work.value, batch, key_head, run.key + first * run.step);
            Live live;
            tiles(run, present, first, number, [&](int64_t place, int height, int from, int to, uint64_t* bits) {
                live.add(from, to, place, height, slopes, 0.0f);
                const int64_t corner = place * ROWS + from * STRIP;
                tile<Again>(height, to - from, key + place * key_next, key_next, (const float*)queries + from * STRIP,
                            width, (const uint64_t*)bits, (const float*)lse + from * STRIP,
                            (const float*)little + from * STRIP, weights + corner);
                tile<Slope>(height, to - from, value + place * value_next, value_next,
                            (const float*)grads + from * STRIP, value_width, (const float*)weights + corner,
                            (const float*)delta + from * STRIP, slopes + corner);
                const int64_t deep = (to - from) * STRIP;
                for (int64_t i = 0; i < value_wide; i += STRIP * ABREAST)
                    tile<Collect>(height, (int)std::min<int64_t>(ABREAST, (value_wide - i) / STRIP),
                                  (const float*)weights + corner, (int64_t)ROWS, (const float*)grad_rows + from * STRIP * value_wide + i,
                                  value_wide, deep, grad_value + place * next * value_wide + i, next * value_wide);
                for (int64_t i = 0; i < wide; i += STRIP * ABREAST)
                    tile<Collect>(height, (int)std::min<int64_t>(ABREAST, (wide - i) / STRIP),
                                  (const float*)slopes + corner, (int64_t)ROWS, (const float*)rows + from * STRIP * wide + i, wide, deep,
                                  grad_key + place * next * wide + i, next * wide);
            });
            live.each([&](int from, int strips, int64_t low, int64_t top) {
                for (int64_t i = 0; i < width; i += TALL)
                    tile<Weigh>((int)std::min<int64_t>(TALL, width - i), strips, key + low * key_next + i, key_next,
                                (const float*)slopes + low * ROWS + from * STRIP, top - low,
                                into + i * ROWS + from * STRIP);
            });
    };
    for (const Run& run : block.runs)
        sums.each(run, [&](int64_t from, int64_t to, int64_t at) {
            const int64_t next = sums.keyed.apart(run.step);
            for (int64_t first = from; first < to; first += CHUNK)
                chunk(run, first, std::min<int64_t>(CHUNK, to - first), sums.key + (at + first * next) * wide,
                      sums.value + (at + first * next) * value_wide, next);
        });

    Vector odd = {};
    for (int64_t i = 0; i < width * ROWS; i += LANES) odd += load(into + i) - load(into + i);
    report(work, odd);
    turn_back(into, wide, rows);
    T* out = (T*)work.grad_query + at * width;
    for (int64_t r = 0; r < block.rows; r++) {
        T* place = out + r * block.step * width;
        float* made = rows + r * wide;
        if constexpr (std::is_same_v<T, float>) {
            for (int64_t i = 0; i < width; i++) place[i] = (joined ? place[i] : 0) + work.scale * made[i];
        } else {
            int8_t* less = rest.row(block.start + r * block.step);
            float before[STRIP];
            for (int64_t i = 0; i < width; i += STRIP) {
                const int64_t there = std::min<int64_t>(STRIP, width - i);
                if (joined) widen(place + i, less ? less + i : nullptr, there, before);
                for (int64_t n = 0; n < there; n++)
                    made[i + n] = (joined ? before[n] : 0) + work.scale * made[i + n];
            }
            narrow(made, width, place, less);
        }
    }
}

}  // namespace
