// What will be read, asked for before it is.
#pragma once

#include <algorithm>
#include <cstdint>

#include "schedule.hpp"

namespace {

// Ask for rows of numbers before they are needed. (Where this is a call, compilers see nothing done and leave it out.)
template <class T>
INLINE void fetch(const T* from, int64_t next, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t byte = 0; byte < width * (int64_t)sizeof(T); byte += 64)
            __builtin_prefetch((const char*)(from + r * next) + byte, 0, 2);
}

// Ask for one of as many shares as there are strips of what the next block reads and this one does not: its queries,
// and of its first keys those that come after what this one has of the same.
template <class T>
INLINE void fetch_ahead(const Work& work, const Block& block, const Block& ahead, int64_t batch, int64_t head,
                        int share) {
    const int64_t rows = ahead.rows / STRIPS, key_head = head / work.share;
    fetch(row<T>(work.query, batch, head, ahead.start + share * rows * ahead.step), work.query.row * ahead.step, rows,
          work.width);
    const Run &run = block.runs[0], &next = ahead.runs[0];
    int64_t number = next.outline->high - next.outline->low, first = next.key + next.outline->low * next.step;
    const int64_t top = first + number * next.step, known = run.key + run.outline->high * run.step;
    if (run.step == next.step && (top - known) % next.step == 0 && top > known && first < known)
        number = (top - known) / next.step, first = known;
    number = std::min<int64_t>(number, PIECE);
    const int64_t begin = number * share / STRIPS, end = number * (share + 1) / STRIPS;
    fetch(row<T>(work.key, batch, key_head, first + begin * next.step), work.key.row * next.step, end - begin,
          work.width);
    fetch(row<T>(work.value, batch, key_head, first + begin * next.step), work.value.row * next.step, end - begin,
          work.value_width);
}

}  // namespace
