// The order of blocks, so that those of one level have no query in common.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <limits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "outline.hpp"
#include "work.hpp"

namespace {

struct Block {
    int64_t start, step, rows;
    int level;
    // Blocks go by sections of this, and in them by their levels: where a query has several, in the order of their levels.
    int64_t order;
    std::vector<Run> runs;

    uint64_t present() const { return rows == ROWS ? ~0ull : (1ull << rows) - 1; }
    int64_t end() const { return start + (rows - 1) * step + 1; }
};

struct Schedule {
    // Blocks in sections that have no query in common, level by level in each; those of one level have none either.
    std::vector<Block> blocks;
    // Where in `blocks` each section begins, and where the last one ends.
    std::vector<size_t> sections{0};
    // The blocks of each level.
    std::vector<std::vector<const Block*>> levels;
    // Queries that no block of the first level has: what they are added to is 0 before.
    std::vector<int64_t> unwritten;
    // Queries between which all those lie, in one section, that have come and will come again.
    int64_t spread = 0;
    std::deque<Outline> outlines;
};

// How far apart at most what has come lies that is to come again, where things come one after the other; `ends` gives
// the first of a thing and what is behind its last.
template <class Thing, class Ends>
int64_t spread(const Thing* things, size_t number, Ends ends) {
    std::vector<int64_t> least(number + 1, std::numeric_limits<int64_t>::max());
    for (size_t at = number; at--;) least[at] = std::min(least[at + 1], ends(things[at]).first);
    int64_t most = 0, widest = 0;
    for (size_t at = 0; at < number; at++) {
        most = std::max(most, ends(things[at]).second);
        widest = std::max(widest, most - least[at]);
    }
    return widest;
}

Schedule schedule(const Work& work) {
    Schedule made;
    std::vector<Block>& blocks = made.blocks;
    std::deque<Outline>& outlines = made.outlines;
    std::unordered_map<int64_t, std::vector<size_t>> known;
    for (int64_t number = 0; number < work.parts_number; number++) {
        const Part& part = work.parts[number];
        const int64_t words = (part.query.places + ROWS - 1) / ROWS, outlined = outlines.size();
        for (int64_t i = 0; i < part.outer; i++)
            for (int64_t j = 0; j < part.inner; j++)
                for (int64_t word = 0; word < words; word++) {
                    const int64_t first = word * ROWS, rows = std::min<int64_t>(ROWS, part.query.places - first);
                    const int64_t start =
                        part.query.start + i * part.query.outer + j * part.query.inner + first * part.query.step;
                    const int64_t key = part.key.start + i * part.key.outer + j * part.key.inner;
                    const int64_t columns = part.causal ? std::min(part.key.places, first + rows) : part.key.places;
                    Block* block = nullptr;
                    for (size_t at : known[start])
                        if (blocks[at].step == part.query.step && blocks[at].rows == rows) block = &blocks[at];
                    if (!block) {
                        known[start].push_back(blocks.size());
                        blocks.push_back({start, part.query.step, rows, 0, start, {}});
                        block = &blocks.back();
                    }
                    Run run{key, part.key.step, columns, words, first, part.causal != 0,
                            part.bits ? part.bits + word : nullptr, nullptr};
                    if ((int64_t)outlines.size() == outlined + word) outlines.emplace_back(run, rows);
                    run.outline = &outlines[outlined + word];
                    block->runs.push_back(run);
                }
    }
    std::vector<int> touched(work.queries, 0);
    std::vector<int64_t> orders(work.queries, 0);
    for (Block& block : blocks) {
        for (int64_t r = 0; r < block.rows; r++) {
            block.level = std::max(block.level, touched[block.start + r * block.step]);
            block.order = std::max(block.order, orders[block.start + r * block.step]);
        }
        for (int64_t r = 0; r < block.rows; r++) {
            int& level = touched[block.start + r * block.step];
            if (block.level && !level) made.unwritten.push_back(block.start + r * block.step);
            level = block.level + 1;
            orders[block.start + r * block.step] = block.order;
        }
    }
    for (int64_t query = 0; query < work.queries; query++)
        if (!touched[query]) made.unwritten.push_back(query);

    std::stable_sort(blocks.begin(), blocks.end(),
                     [](const Block& one, const Block& other) { return one.start < other.start; });
    for (size_t first = 0, last = 0; first < blocks.size(); first = last) {
        int64_t end = 0;
        while (last < blocks.size() && (blocks[last].start < end || end < blocks[first].start + SECTION))
            end = std::max(end, blocks[last].end()), last++;
        std::stable_sort(blocks.begin() + first, blocks.begin() + last,
                         [](const Block& one, const Block& other) {
                             const int64_t before = one.order / SECTION, after = other.order / SECTION;
                             return before != after ? before < after : one.level < other.level;
                         });
        made.spread = std::max(made.spread, spread(blocks.data() + first, last - first, [](const Block& block) {
                                   return std::make_pair(block.start, block.end());
                               }));
        made.sections.push_back(last);
    }
    for (const Block& block : blocks) {
        if (block.level >= (int)made.levels.size()) made.levels.resize(block.level + 1);
        made.levels[block.level].push_back(&block);
    }
    return made;
}

}  // namespace
