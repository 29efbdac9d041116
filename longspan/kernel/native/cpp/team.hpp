// Blocks that go through the same keys together, forward.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "fetch.hpp"
#include "memory.hpp"
#include "rows.hpp"
#include "strip.hpp"

namespace {

// Neighbours in a schedule whose runs begin at the same keys, or a single block.
struct Team {
    const Block* blocks = nullptr;
    int number = 0;
};

// The teams of some blocks.
std::vector<Team> teams(const Block* blocks, size_t number) {
    std::vector<Team> made;
    for (size_t at = 0; at < number; at++) {
        const Block& block = blocks[at];
        bool joins = !made.empty() && made.back().number < TEAM;
        if (joins) {
            const Block& first = *made.back().blocks;
            joins = first.level == block.level && first.runs.size() == block.runs.size() && first.step == block.step &&
                    std::equal(first.runs.begin(), first.runs.end(), block.runs.begin(),
                               [](const Run& one, const Run& other) {
                                   return one.key == other.key && one.step == other.step;
                               });
        }
        if (joins)
            made.back().number++;
        else
            made.push_back({&block, 1});
    }
    return made;
}

// `ahead` is the team that is next, or nothing.
template <class T>
void forward_team(const Work& work, const Team& team, const Team* ahead, int64_t batch, int64_t head, Room& room,
                  const Rest& rest) {
    const int64_t width = work.width, wide = whole(width), value_width = work.value_width,
                  value_wide = whole(value_width), widest = std::max(wide, value_wide);
    float* queries =
        room.take(TEAM * ROWS * (wide + value_wide + 2) + STRIP * (2 * widest + DEPTH) + PIECE * (wide + value_wide));
    float *output = queries + TEAM * ROWS * wide, *most = output + TEAM * ROWS * value_wide,
          *total = most + TEAM * ROWS, *spare = total + TEAM * ROWS, *known = spare + STRIP * widest,
          *scores = known + STRIP * widest, *near_keys = scores + STRIP * DEPTH, *near_values = near_keys + PIECE * wide;
    // All blocks of a team have one level and one distance between queries.
    const Block& block = *team.blocks;
    const int64_t row_of_head = (batch * work.heads_all + head) * work.queries;
    const int64_t out_next = block.step * value_width, query_next = work.query.row * block.step;

    Strip strips[TEAM * STRIPS];
    int number = 0, counts[TEAM] = {};
    Vector odd[2] = {};
    // A learned sink is a key of value 0, the first that is read.
    const bool sunk = work.sinks && !block.level && work.sinks[head] > UNREAD;
    std::fill_n(most, TEAM * ROWS, sunk ? (float)(work.sinks[head] * LOG2E) : UNREAD);
    std::fill_n(total, TEAM * ROWS, sunk ? 1.0f : 0.0f);
    for (int member = 0; member < team.number; member++) {
        const Block& own = team.blocks[member];
        T* out = (T*)work.output + (row_of_head + own.start) * value_width;
        for (int64_t first = 0; first < own.rows; first += STRIP, counts[member]++) {
            Strip& strip = strips[number];
            const int64_t at = STRIP * number++;
            strip = {queries + at * wide, output + at * value_wide, most + at, total + at, first,
                     std::min<int64_t>(STRIP, own.rows - first), false};
            if (block.level) fetch(out + first * out_next, out_next, strip.rows, value_width);
            columns(row<T>(work.query, batch, head, own.start) + first * query_next, query_next, strip.rows, width,
                    (float)(work.scale * LOG2E), spare, strip.queries);
            // An infinite query whose scores are all minus infinity leaves no trace in the output.
            for (int64_t i = 0; i < wide * STRIP; i += 2 * LANES)
                for (int n = 0; n < 2; n++) {
                    const Vector one = load(strip.queries + i + n * LANES);
                    odd[n] += one - one;
                }
        }
    }

    const int64_t key_head = head / work.share;
    bool fetched = !ahead;
    for (size_t at = 0; at < block.runs.size(); at++) {
        const Run& first_run = block.runs[at];
        int64_t lowest = first_run.outline->low, highest = first_run.outline->high;
        for (int member = 1; member < team.number; member++) {
            const Outline& outline = *team.blocks[member].runs[at].outline;
            if (!outline.high) continue;
            lowest = highest ? std::min(lowest, outline.low) : outline.low;
            highest = std::max(highest, outline.high);
        }
        const int64_t deep = highest - lowest, pieces = (deep + PIECE - 1) / PIECE;
        const int64_t key_next = work.key.row * first_run.step, value_next = work.value.row * first_run.step;
        for (int64_t piece = 0; piece < pieces; piece++) {
            const int64_t begin = lowest + deep * piece / pieces, end = lowest + deep * (piece + 1) / pieces;
            const T* key = row<T>(work.key, batch, key_head, first_run.key + begin * first_run.step);
            const T* value = row<T>(work.value, batch, key_head, first_run.key + begin * first_run.step);
            Keys keys{near_keys, near_values, wide, value_wide};
            // Rows that lie far apart crowd each other out of the processor's cache.
            if (std::is_same_v<T, float> && key_next <= CLOSE && value_next <= CLOSE) {
                keys = {(const float*)key, (const float*)value, key_next, value_next};
            } else {
                gather(key, key_next, end - begin, width, 1.0f, near_keys, wide, end - begin);
                gather(value, value_next, end - begin, value_width, 1.0f, near_values, value_wide, end - begin);
            }
            Strip* strip = strips;
            for (int member = 0; member < team.number; member++) {
                const Run& run = team.blocks[member].runs[at];
                for (int s = 0; s < counts[member]; s++, strip++) {
                    if (!fetched && member < ahead->number)
                        fetch_ahead<T>(work, member ? ahead->blocks[member - 1] : team.blocks[team.number - 1],
                                       ahead->blocks[member], batch, head, s);
                    for (const Stretch& stretch : run.outline->strips[s]) {
                        const int64_t low = std::max(begin, stretch.low), high = std::min(end, stretch.high);
                        if (low >= high) continue;
                        const int64_t chunks = (high - low + DEPTH - 1) / DEPTH,
                                      chunk = ((high - low + chunks - 1) / chunks + ALONE - 1) / ALONE * ALONE;
                        for (int64_t place = low; place < high; place += chunk)
                            strip->take(run, stretch, place, std::min(chunk, high - place),
                                        {keys.key + (place - begin) * keys.key_next,
                                         keys.value + (place - begin) * keys.value_next, keys.key_next,
                                         keys.value_next},
                                        width, value_width, scores);
                    }
                }
            }
            fetched = true;
        }
    }

    Strip* next = strips;
    for (int member = 0; member < team.number; member++) {
        const Block& own = team.blocks[member];
        T* out = (T*)work.output + (row_of_head + own.start) * value_width;
        float* lse = work.lse + row_of_head + own.start;
        for (int s = 0; s < counts[member]; s++, next++) {
            Strip& strip = *next;
            float known_lse[STRIP];
            std::fill_n(known_lse, STRIP, UNREAD);
            if (block.level) {
                const T* before = out + strip.first * out_next;
                if constexpr (std::is_same_v<T, float>) {
                    columns(before, out_next, strip.rows, value_width, 1.0f, spare, known);
                } else {
                    std::fill_n(spare, STRIP * value_wide, 0.0f);
                    for (int64_t r = 0; r < strip.rows; r++)
                        widen(before + r * out_next, rest.row(own.start + (strip.first + r) * block.step), value_width,
                              spare + r * value_wide);
                    columns((const float*)spare, value_wide, STRIP, value_wide, 1.0f, (float*)nullptr, known);
                }
                for (int64_t r = 0; r < strip.rows; r++) known_lse[r] = lse[(strip.first + r) * block.step];
            }
            odd[0] += strip.close(block.level ? known : nullptr, known_lse, value_width);
            strip.write_lse(lse + strip.first * block.step, block.step);
            write_rows(strip.output, strip.rows, value_width, out + strip.first * out_next, out_next, spare, rest,
                       own.start + strip.first * block.step, block.step);
        }
    }
    report(work, odd[0] + odd[1]);
}

}  // namespace
