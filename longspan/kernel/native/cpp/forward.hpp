// Attention forward, over all heads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "team.hpp"
#include "threads.hpp"

namespace {

template <class T>
void forward(const Work& work) {
    const Schedule made = schedule(work);
    fill(work, made.unwritten, [&](int64_t at) {
        std::fill_n((T*)work.output + at * work.value_width, work.value_width, T{});
        work.lse[at] = work.sinks ? work.sinks[at / work.queries % work.heads_all]
                                  : -std::numeric_limits<float>::infinity();
    });
    const int64_t rows = work.batch * work.heads_read, sections = made.sections.size() - 1;
    const int64_t wide = whole(work.value_width);
    const bool rests = std::is_same_v<T, uint16_t> && made.levels.size() > 1;
    auto room_for = [&](int64_t bytes) { return rests && bytes <= work.left ? bytes : 0; };
    // Those of each section follow one another.
    std::vector<Team> made_teams;
    std::vector<size_t> starts{0};
    std::vector<std::vector<const Team*>> levels(made.levels.size());
    for (int64_t section = 0; section < sections; section++) {
        const size_t first = made.sections[section], last = made.sections[section + 1];
        for (const Team& team : teams(made.blocks.data() + first, last - first)) made_teams.push_back(team);
        starts.push_back(made_teams.size());
    }
    for (const Team& team : made_teams) levels[team.blocks->level].push_back(&team);
    auto run = [&](const Team& team, const Team* ahead, int64_t row, Room& room, const Rest& rest) {
        forward_team<T>(work, team, ahead, row / work.heads_read, work.heads[row % work.heads_read], room, rest);
    };
    // All levels of one stretch of one head while it lies in the processor's cache, where that keeps all threads busy.
    if (levels.size() <= 1 || rows * sections >= work.threads) {
        const int64_t bytes = room_for(made.spread * wide * std::min(rows * sections, work.threads));
        share(rows * sections, work.threads, [&](int64_t item, Room& room) {
            const Rest rest{bytes ? (int8_t*)room.rest.take(made.spread * wide) : nullptr, made.spread, wide};
            for (size_t at = starts[item % sections]; at < starts[item % sections + 1]; at++)
                run(made_teams[at], at + 1 < made_teams.size() ? &made_teams[at + 1] : nullptr, item / sections, room,
                    rest);
        });
        return;
    }
    Memory whole_rest;
    const int64_t bytes = room_for(rows * work.queries * wide);
    int8_t* held = bytes ? (int8_t*)whole_rest.take(bytes) : nullptr;
    for (const std::vector<const Team*>& level : levels)
        share(rows * level.size(), work.threads, [&](int64_t item, Room& room) {
            const int64_t row = item / level.size();
            run(*level[item % level.size()], nullptr, row, room,
                {held ? held + row * work.queries * wide : nullptr, work.queries, wide});
        });
}

}  // namespace
