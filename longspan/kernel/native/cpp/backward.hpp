// Attention backward, over all heads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "gradients.hpp"
#include "threads.hpp"

namespace {

// Heads that share keys follow one another and are done by one thread, so that nothing is added to from two sides. Returns
// where those of each key head begin, and where the last ones end.
std::vector<int64_t> shared(const Work& work) {
    std::vector<int64_t> starts;
    for (int64_t n = 0; n < work.heads_read; n++)
        if (!n || work.heads[n] / work.share != work.heads[n - 1] / work.share) starts.push_back(n);
    starts.push_back(work.heads_read);
    return starts;
}

// In float32, gradients of keys are summed up where they are asked for.
void backward_wide(const Work& work) {
    const std::vector<int64_t> starts = shared(work);
    const int64_t groups = starts.size() - 1, key_heads = work.heads_all / work.share;
    const int64_t key_size = work.keys * whole(work.width), value_size = work.keys * whole(work.value_width);
    const Schedule made = schedule(work);
    const Keyed keyed{1, work.keys, work.keys, 0};
    fill(work, made.unwritten,
         [&](int64_t at) { std::fill_n((float*)work.grad_query + at * work.width, work.width, 0.0f); });
    auto run = [&](const Block& block, int64_t batch, int64_t head, int64_t split, Room& room) {
        const int64_t at = (split * work.batch + batch) * key_heads + head / work.share;
        const Sums sums{(float*)work.grad_key + at * key_size, (float*)work.grad_value + at * value_size, keyed, 0,
                        work.keys, false};
        backward_block<float>(work, block, batch, head, block.level, sums, {nullptr, 1, 0}, room);
    };
    if (work.splits == 1) {
        share(work.batch * groups, work.threads, [&](int64_t item, Room& room) {
            const int64_t group = item % groups;
            for (int64_t n = starts[group]; n < starts[group + 1]; n++)
                for (const Block& block : made.blocks) run(block, item / groups, work.heads[n], 0, room);
        });
        return;
    }
    for (const std::vector<const Block*>& level : made.levels)
        share(work.batch * groups * work.splits, work.threads, [&](int64_t item, Room& room) {
            const int64_t split = item % work.splits, group = item / work.splits % groups,
                          batch = item / work.splits / groups;
            const size_t first = level.size() * split / work.splits, last = level.size() * (split + 1) / work.splits;
            for (int64_t n = starts[group]; n < starts[group + 1]; n++)
                for (size_t at = first; at < last; at++) run(*level[at], batch, work.heads[n], split, room);
        });
}

// Write sums of some places as bfloat16 and clear them; those of further threads lie `apart`.
void give(const Keyed& keyed, int64_t first, int64_t number, int64_t keys, float* sums, int64_t width, int64_t splits,
          int64_t apart, uint16_t* to) {
    const int64_t wide = whole(width);
    for (int64_t n = 0; n < number; n++, sums += wide) {
        const int64_t key = keyed.key(first + n);
        for (int64_t split = 1; split < splits; split++)
            for (int64_t i = 0; i < width; i++) sums[i] += sums[split * apart + i];
        if (key < keys) narrow(sums, width, to + key * width, nullptr);
        for (int64_t split = 0; split < splits; split++) std::fill_n(sums + split * apart, wide, 0.0f);
    }
}

// In bfloat16, gradients of keys are summed up stretch by stretch beside what is asked for. All works that have a key head
// in common are done together: they differ in their heads and parts alone.
void backward_brief(const Work* works, int64_t number) {
    const Work& work = works[0];
    const int64_t wide = whole(work.width), value_wide = whole(work.value_width);
    const int64_t key_heads = work.heads_all / work.share;
    // Which heads of which works read each key head.
    struct Reader {
        int64_t work, head;
    };
    std::vector<std::vector<Reader>> readers(key_heads);
    std::vector<int64_t> read;
    // Where they lie is pointed to.
    std::vector<Schedule> made;
    made.reserve(number);
    size_t levels = 0, most_heads = 1;
    for (int64_t at = 0; at < number; at++) {
        for (int64_t n = 0; n < works[at].heads_read; n++) {
            std::vector<Reader>& some = readers[works[at].heads[n] / work.share];
            if (some.empty()) read.push_back(works[at].heads[n] / work.share);
            some.push_back({at, works[at].heads[n]});
            most_heads = std::max(most_heads, some.size());
        }
        made.push_back(schedule(works[at]));
        levels = std::max(levels, made.back().levels.size());
    }
    const int64_t groups = read.size(), items = work.batch * groups;
    const int64_t threads = std::max<int64_t>(1, work.threads);
    const Keyed keyed = choose_keyed(
        work, made, std::max<int64_t>(STRIP, work.holding / (4 * (wide + value_wide) * threads)));
    std::vector<Walk> walks;
    int64_t spread = 1;
    for (int64_t at = 0; at < number; at++) {
        walks.push_back(walk(works[at], made[at], keyed));
        fill(works[at], walks[at].unwritten,
             [&](int64_t row) { std::fill_n((uint16_t*)work.grad_query + row * work.width, work.width, 0); });
        spread = std::max(spread, walks[at].spread);
    }
    const int64_t places = 2 * keyed.held + keyed.size, key_size = places * wide, size = places * (wide + value_wide);
    const int64_t stretches = keyed.stretches();
    // What is left out of gradients of queries; of all heads that share keys, where they take turns.
    bool rests = levels > 1 || stretches > 1;
    if (stretches == 1) most_heads = 1;
    const int64_t left_bytes = most_heads * spread * wide, all_left_bytes = most_heads * work.queries * wide;
    // Where there are too few heads for all threads, or too little room, each thread sums up its own of every head.
    const bool crowded = rests && left_bytes * threads > work.left && all_left_bytes <= work.left;
    const int64_t splits = items < threads || (threads > 1 && crowded) ? threads : 1;
    rests = rests && (splits == 1 ? left_bytes * std::min(items, threads) : all_left_bytes) <= work.left;
    auto sums = [&](float* held, int64_t stretch) {
        const int64_t low = keyed.held + stretch * keyed.size,
                      high = std::min(low + keyed.size, keyed.number() - keyed.held);
        return Sums{held, held + key_size, keyed, low, high, false};
    };
    auto give_both = [&](int64_t item, int64_t first, int64_t some, float* held, int64_t at) {
        const int64_t head = item / groups * key_heads + read[item % groups];
        give(keyed, first, some, work.keys, held + at * wide, work.width, splits, size,
             (uint16_t*)work.grad_key + head * work.keys * work.width);
        give(keyed, first, some, work.keys, held + key_size + at * value_wide, work.value_width, splits, size,
             (uint16_t*)work.grad_value + head * work.keys * work.value_width);
    };
    auto give_stretch = [&](int64_t item, int64_t stretch, float* held) {
        const Sums some = sums(held, stretch);
        give_both(item, some.low, some.high - some.low, held, 2 * keyed.held);
        if (stretch + 1 < stretches) return;
        give_both(item, 0, keyed.held, held, 0);
        give_both(item, keyed.number() - keyed.held, keyed.held, held, keyed.held);
    };
    auto run = [&](const Reader& reader, const Visit& visit, Sums some, int64_t batch, const Rest& rest, Room& room) {
        some.ends = visit.ends;
        backward_block<uint16_t>(works[reader.work], made[reader.work].blocks[visit.block], batch, reader.head,
                                 visit.joined, some, rest, room);
    };
    if (splits == 1) {
        share(items, threads, [&](int64_t item, Room& room) {
            float* held = (float*)room.sums.take(sizeof(float) * size, true);
            int8_t* left = rests ? (int8_t*)room.rest.take(left_bytes) : nullptr;
            for (int64_t stretch = 0; stretch < stretches; stretch++) {
                int64_t turn = 0;
                for (const Reader& reader : readers[read[item % groups]]) {
                    const Rest rest{left ? left + turn++ % most_heads * spread * wide : nullptr, spread, wide};
                    for (const Visit& visit : walks[reader.work].stretches[stretch])
                        run(reader, visit, sums(held, stretch), item / groups, rest, room);
                }
                give_stretch(item, stretch, held);
            }
        });
        return;
    }
    Memory all_sums, all_rest;
    float* held = (float*)all_sums.take(sizeof(float) * size * splits, true);
    int8_t* left = rests ? (int8_t*)all_rest.take(all_left_bytes) : nullptr;
    for (int64_t item = 0; item < items; item++)
        for (int64_t stretch = 0; stretch < stretches; stretch++) {
            int64_t turn = 0;
            for (const Reader& reader : readers[read[item % groups]]) {
                const Rest rest{left ? left + turn++ % most_heads * work.queries * wide : nullptr, work.queries, wide};
                std::vector<std::vector<const Visit*>> by_level(levels);
                for (const Visit& visit : walks[reader.work].stretches[stretch])
                    by_level[made[reader.work].blocks[visit.block].level].push_back(&visit);
                for (const std::vector<const Visit*>& level : by_level)
                    share(splits, threads, [&](int64_t split, Room& room) {
                        const size_t first = level.size() * split / splits, last = level.size() * (split + 1) / splits;
                        for (size_t at = first; at < last; at++)
                            run(reader, *level[at], sums(held + split * size, stretch), item / groups, rest, room);
                    });
            }
            give_stretch(item, stretch, held);
        }
}

}  // namespace
