// How keys are walked through, backward, so that gradients of a stretch of them are summed up at once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "schedule.hpp"

namespace {

// How keys are walked through, backward. They are counted residue by residue of `step`, `rows` each, and cut into
// stretches of `size`, whose gradients are summed up by themselves, beside those of `held` keys at either end.
struct Keyed {
    int64_t step = 1, rows = 0, size = 0, held = 0;

    int64_t number() const { return step * rows; }
    int64_t stretches() const { return std::max<int64_t>(1, (number() - 2 * held + size - 1) / size); }
    // Where a key is counted.
    int64_t place(int64_t key) const { return step == 1 ? key : key % step * rows + key / step; }
    int64_t key(int64_t place) const { return step == 1 ? place : place % rows * step + place / rows; }
    // How far apart the keys of a run are counted; a single key may be any distance from itself.
    int64_t apart(int64_t run_step) const { return std::max<int64_t>(1, run_step / step); }
    // How many of places from `first` on, `next` apart, lie before another.
    static int64_t before(int64_t first, int64_t next, int64_t other) {
        return other <= first ? 0 : (other - first + next - 1) / next;
    }
};

// What is summed up of the gradients of keys: of places from `low` up to `high`, and of held ones if `ends` is set.
struct Sums {
    float *key, *value;
    const Keyed& keyed;
    int64_t low, high;
    bool ends;

    // Call with the first and the last of the columns of a run that are summed up, and where the first of them is.
    template <class Action>
    void each(const Run& run, Action action) const {
        const int64_t first = keyed.place(run.key), next = keyed.apart(run.step), held = keyed.held,
                      tail = keyed.number() - held, from = run.outline->low, to = run.outline->high;
        auto part = [&](int64_t begin, int64_t end, int64_t at) {
            const int64_t some = std::max(from, Keyed::before(first, next, begin)),
                          last = std::min(to, Keyed::before(first, next, end));
            if (some < last) action(some, last, at + first - begin);
        };
        if (ends && held) part(0, held, 0);
        part(low, high, 2 * held);
        if (ends && held) part(tail, keyed.number(), held);
    }
};

// A block that reads keys of a stretch, whether held ones are its own there, and whether its queries came before.
struct Visit {
    uint32_t block;
    bool ends, joined;
};

struct Walk {
    Keyed keyed;
    std::vector<std::vector<Visit>> stretches;
    std::vector<int64_t> unwritten;
    int64_t spread = 0;
};

// Call with every stretch that a block reads keys of, in no order and more than once.
template <class Action>
void stretches(const Keyed& keyed, const Block& block, Action action) {
    const int64_t low = keyed.held, high = keyed.number() - keyed.held;
    for (const Run& run : block.runs) {
        const int64_t first = keyed.place(run.key), next = keyed.apart(run.step);
        const int64_t from = std::max(run.outline->low, Keyed::before(first, next, low)),
                      to = std::min(run.outline->high, Keyed::before(first, next, high));
        if (from >= to) continue;
        const int64_t begin = first + from * next - low, end = first + (to - 1) * next - low;
        for (int64_t place = begin; place <= end; place += std::max(next, keyed.size)) action(place / keyed.size);
        action(end / keyed.size);
    }
}

// How often blocks are come by, summed over all of them.
int64_t visits(const Keyed& keyed, const std::vector<Schedule>& schedules) {
    std::vector<int64_t> last(keyed.stretches(), 0);
    int64_t number = 0, at = 0;
    for (const Schedule& schedule : schedules)
        for (const Block& block : schedule.blocks) {
            at++;
            stretches(keyed, block, [&](int64_t stretch) {
                number += last[stretch] != at;
                last[stretch] = at;
            });
        }
    return number;
}

// Choose how to walk through keys so that blocks are come by seldom, and then with little in hand.
Keyed choose_keyed(const Work& work, const std::vector<Schedule>& schedules, int64_t most) {
    int64_t common = 0;
    for (const Schedule& schedule : schedules)
        for (const Block& block : schedule.blocks)
            for (const Run& run : block.runs) common = std::gcd(common, run.step);
    auto made = [&](int64_t step, int64_t size) {
        Keyed one{step, (work.keys + step - 1) / step, size, 0};
        if (one.number() <= size) return one.size = one.number(), one;
        one.held = std::min(HELD, size / 8);
        one.size -= 2 * one.held;
        return one;
    };
    Keyed best = made(1, most);
    int64_t least = visits(best, schedules);
    if (common > 1 && visits(made(common, most), schedules) < least) {
        best = made(common, most);
        least = visits(best, schedules);
    }
    for (int64_t thinner : THINNER) {
        const Keyed one = made(best.step, most / thinner);
        if (one.size >= FEW && visits(one, schedules) <= least + least / 32) return one;
    }
    return best;
}

Walk walk(const Work& work, const Schedule& schedule, const Keyed& keyed) {
    const std::vector<Block>& blocks = schedule.blocks;
    Walk made;
    made.keyed = keyed;
    made.stretches.resize(made.keyed.stretches());
    int64_t before = 0;
    for (uint32_t at = 0; at < blocks.size(); at++) {
        int64_t first = -1;
        stretches(made.keyed, blocks[at], [&](int64_t stretch) {
            std::vector<Visit>& some = made.stretches[stretch];
            if (some.empty() || some.back().block != at) some.push_back({at, false, false});
            if (first < 0 || stretch < first) first = stretch;
        });
        // Held keys are read in passing.
        if (first < 0) made.stretches[first = before].push_back({at, false, false});
        made.stretches[first].back().ends = true;
        before = first;
    }
    std::vector<bool> touched(work.queries, false);
    std::vector<const Block*> order;
    for (std::vector<Visit>& stretch : made.stretches)
        for (Visit& visit : stretch) {
            const Block& block = blocks[visit.block];
            order.push_back(&block);
            for (int64_t r = 0; r < block.rows; r++) visit.joined |= touched[block.start + r * block.step];
            for (int64_t r = 0; r < block.rows; r++) {
                const int64_t query = block.start + r * block.step;
                if (visit.joined && !touched[query]) made.unwritten.push_back(query);
                touched[query] = true;
            }
        }
    for (int64_t query = 0; query < work.queries; query++)
        if (!touched[query]) made.unwritten.push_back(query);
    made.spread = spread(order.data(), order.size(),
                         [](const Block* block) { return std::make_pair(block->start, block->end()); });
    return made;
}

}  // namespace
