// Sizes: of vectors, by instruction set, and of what goes together.
#pragma once

#include <cstdint>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, TALL = 6, ABREAST = 4, ALONE = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8, TALL = 6, ABREAST = 1, ALONE = 6;
#elif defined(__aarch64__)
constexpr int LANES = 4, TALL = 6, ABREAST = 1, ALONE = 6;
#else
constexpr int LANES = 4, TALL = 2, ABREAST = 1, ALONE = 2;
#endif
// Queries in a block, queries in a strip (what is skipped or computed as one), and vectors in a strip.
constexpr int ROWS = 64, STRIP = 16, STRIPS = ROWS / STRIP, VECTORS = STRIP / LANES;
// Blocks that go through the same keys together, forward.
constexpr int TEAM = 2;
// Keys between two looks at the maximum, forward and backward; keys that all strips of a block go through one strip
// after the other.
constexpr int DEPTH = 144, CHUNK = 96, PIECE = 2 * DEPTH;
// Unread keys that end a stretch.
constexpr int GAP = 16;
// Rows whose numbers begin further apart than this are copied together.
constexpr int64_t CLOSE = 128;
// Queries that one thread does all levels of, at least.
constexpr int64_t SECTION = 2048;
// Keys at both ends of a text whose gradients are held as long as there are any, since all may read them.
constexpr int64_t HELD = 256;
// Parts of what room there is for gradients of keys, taken where they do as well, and the fewest keys of such a part.
constexpr int64_t THINNER[] = {64, 16, 4}, FEW = 4096;
// Memory above this is laid out in large pages.
constexpr int64_t MAPPED = 1 << 25;
// Scores of pairs that are not read, and what maxima below which nothing was read.
constexpr float UNREAD = -1e38f, SILENT = -1e37f;
// Bits of a strip of which all is read.
constexpr uint32_t WHOLE = (1u << STRIP) - 1;
constexpr double LOG2E = 1.4426950408889634;

int64_t whole(int64_t width) { return (width + STRIP - 1) / STRIP * STRIP; }

}  // namespace
