// Attention over lattices of rectangles of pairs, on the instruction set that the compiler is told to use.
//
// A block is up to 64 queries at regular distances. It goes through all of its keys once, with the softmax kept
// online. Queries lie in the lanes of vectors and keys (or numbers of a value) are broadcast, so that maxima and
// sums run down columns and nothing is ever moved between lanes. Forward, each strip of 16 queries goes by itself
// through the stretches of keys that it reads, which are read where they lie unless they are bfloat16 or lie far apart;
// backward, strips go abreast and keys are tiles of a few, of which each strip does those that it reads. Masks are
// words of 64 bits, one bit a query.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <new>
#include <numeric>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

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

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

#define INLINE inline __attribute__((always_inline))

INLINE Vector load(const float* from) {
    Vector made;
    std::memcpy(&made, from, sizeof made);
    return made;
}

INLINE void store(float* to, Vector what) { std::memcpy(to, &what, sizeof what); }

// Less 0 leaves every number as it is, and the compiler knows it.
INLINE Vector all(float number) { return number - Vector{}; }

INLINE float number(float given) { return given; }

INLINE float number(int8_t given) { return given; }

INLINE float number(uint16_t given) {
    const uint32_t wide = (uint32_t)given << 16;
    float made;
    std::memcpy(&made, &wide, 4);
    return made;
}

INLINE Vector spread(const float* from) { return all(*from); }

// A bfloat16 is the upper half of a float32.
INLINE Vector spread(const uint16_t* from) {
#if defined(__AVX512F__)
    return (Vector)_mm512_maskz_broadcastw_epi16(0xAAAAAAAA, _mm_loadu_si16(from));
#else
    return all(number(*from));
#endif
}

// The other where one of them is no number.
INLINE Vector larger(Vector one, Vector other) {
#if defined(__AVX512F__)
    return (Vector)_mm512_max_ps((__m512)one, (__m512)other);
#elif defined(__AVX2__)
    return (Vector)_mm256_max_ps((__m256)one, (__m256)other);
#else
    return one > other ? one : other;
#endif
}

// 2 to the power of numbers that are not above 127, to about one unit in the last place; 0 far below.
INLINE Vector power(Vector x) {
#if defined(__AVX512F__)
    const Vector whole = (Vector)_mm512_roundscale_ps((__m512)x, 8);
#elif defined(__AVX2__)
    x = larger(all(-127.0f), x);
    const Vector whole = (Vector)_mm256_round_ps((__m256)x, 8);
#else
    x = larger(all(-127.0f), x);
    const Vector whole = (x + 12582912.0f) - 12582912.0f;
#endif
    const Vector part = x - whole;
    Vector sum = all(0.0013264727f);
    sum = sum * part + 0.0096715130f;
    sum = sum * part + 0.05550734f;
    sum = sum * part + 0.24022242f;
    sum = sum * part + 0.69314700f;
    sum = sum * part + 1.0f;
#if defined(__AVX512F__)
    return (Vector)_mm512_scalef_ps((__m512)sum, (__m512)whole);
#else
    const Integers shifted = (__builtin_convertvector(whole, Integers) + 127) << 23;
    return sum * (Vector)shifted;
#endif
}

// The natural logarithm of numbers above 0, to about one unit in the last place; what is not finite becomes NaN.
INLINE Vector logarithm(Vector x) {
    const Integers power_of_2 = ((Integers)x - 0x3f3504f3) >> 23;
    const Vector part = (Vector)((Integers)x - (power_of_2 << 23)) - 1.0f, square = part * part;
    Vector sum = all(0.070376836f);
    for (float next : {-0.11514610f, 0.11676999f, -0.12420141f, 0.14249323f, -0.16668058f, 0.20000715f, -0.24999994f,
                       0.33333331f})
        sum = sum * part + next;
    sum = sum * part * square - 0.5f * square + part;
    return __builtin_convertvector(power_of_2, Vector) * 0.69314718f + sum + (x - x);
}

// The numbers whose bits are set, and `otherwise` for the others; bits of one vector.
INLINE Vector choose(uint32_t bits, Vector what, float otherwise) {
#if defined(__AVX512F__)
    return (Vector)_mm512_mask_mov_ps(_mm512_set1_ps(otherwise), (__mmask16)bits, (__m512)what);
#else
    Integers place;
    for (int lane = 0; lane < LANES; lane++) place[lane] = 1 << lane;
    const Integers set = (place & (int32_t)bits) != 0;
    return set ? what : all(otherwise);
#endif
}

// Add to `sums` the product of a matrix of R rows, read number by number at a row and a column distance, and one of
// S strips of columns, read in vectors at a row distance.
template <int R, int S, class T>
INLINE void product(Vector (&sums)[R][S * VECTORS], const T* left, int64_t down, int64_t along,
                    const float* right, int64_t next, int64_t deep) {
    for (int64_t step = 0; step < deep; step++, left += along, right += next) {
        Vector row[S * VECTORS];
        for (int c = 0; c < S * VECTORS; c++) row[c] = load(right + c * LANES);
        for (int r = 0; r < R; r++) {
            const Vector one = spread(left + r * down);
            for (int c = 0; c < S * VECTORS; c++) sums[r][c] += one * row[c];
        }
    }
}

// A function for each height and number of strips of a product, found at run time.
template <template <int, int> class Kernel, class... Given>
INLINE void tile(int height, int strips, Given... given) {
#define WIDE(R)                                                        \
    case R:                                                            \
        if (strips == 1) return Kernel<R, 1>::run(given...);           \
        if constexpr (ABREAST >= 4) {                                  \
            if (strips == 2) return Kernel<R, 2>::run(given...);       \
            if (strips == 3) return Kernel<R, 3>::run(given...);       \
            return Kernel<R, 4>::run(given...);                        \
        }                                                              \
        break;
    switch (height) {
        WIDE(1)
        WIDE(2)
        default:
            if constexpr (TALL >= 6) switch (height) {
                    WIDE(3)
                    WIDE(4)
                    WIDE(5)
                    WIDE(6)
                }
    }
#undef WIDE
}

// Scores of R keys and a strip of queries: products of keys and queries, unread ones struck out, and their maxima.
template <int R>
struct Score {
    static __attribute__((noinline)) void run(const float* key, int64_t down, const float* queries, int64_t width,
                                              const uint32_t* bits, float* scores, float* most) {
        Vector sums[R][VECTORS] = {};
        for (int64_t step = 0; step < width; step++, queries += STRIP) {
            Vector row[VECTORS];
            for (int c = 0; c < VECTORS; c++) row[c] = load(queries + c * LANES);
            const float* four = key++;
            for (int r = 0; r < R; r++) {
                if (r && r % 4 == 0) four += 4 * down;
                // One register for four rows: compilers would rather keep one for each, and have too few.
                if (r % 4 == 0) asm("" : "+r"(four));
                const Vector one = spread(four + r % 4 * down);
                for (int c = 0; c < VECTORS; c++) sums[r][c] += one * row[c];
            }
        }
        for (int c = 0; c < VECTORS; c++) {
            Vector high = load(most + c * LANES);
            for (int r = 0; r < R; r++) {
                if (bits) sums[r][c] = choose(bits[r] >> (c * LANES), sums[r][c], UNREAD);
                high = larger(high, sums[r][c]);
                store(scores + r * STRIP + c * LANES, sums[r][c]);
            }
            store(most + c * LANES, high);
        }
    }
};

// R numbers of the output of a strip of queries: what there is, rescaled, or nothing, plus weights times values.
template <int R>
struct Blend {
    static __attribute__((noinline)) void run(const float* value, int64_t next, const float* weights, int64_t deep,
                                              const float* rescale, float* output) {
        // Added up by themselves first: small sums are rounded by little.
        Vector sums[R][VECTORS] = {};
        product<R, 1>(sums, value, 1, next, weights, STRIP, deep);
        for (int c = 0; c < VECTORS; c++) {
            const Vector factor = rescale ? load(rescale + c * LANES) : Vector{};
            for (int r = 0; r < R; r++) {
                float* place = output + r * STRIP + c * LANES;
                store(place, rescale ? load(place) * factor + sums[r][c] : sums[r][c]);
            }
        }
    }
};

// A function for each height of a product of one strip, found at run time.
template <template <int> class Kernel, int R = ALONE, class... Given>
INLINE void alone(int64_t height, Given... given) {
    if (R == 1 || height == R) return Kernel<R>::run(given...);
    if constexpr (R > 1) alone<Kernel, R - 1>(height, given...);
}

// R numbers of the gradient of S strips of queries: what there is, plus slopes times keys.
template <int R, int S>
struct Weigh {
    template <class T>
    static __attribute__((noinline)) void run(const T* key, int64_t next, const float* slopes, int64_t deep,
                                              float* into) {
        // Added up by themselves first: small sums are rounded by little.
        Vector sums[R][S * VECTORS] = {};
        product<R, S>(sums, key, 1, next, slopes, ROWS, deep);
        for (int r = 0; r < R; r++)
            for (int c = 0; c < S * VECTORS; c++)
                store(into + r * ROWS + c * LANES, load(into + r * ROWS + c * LANES) + sums[r][c]);
    }
};

// Rows weighed and added up, R times: S strips of the numbers of a gradient, or of an output.
template <int R, int S>
struct Collect {
    static __attribute__((noinline)) void run(const float* weights, int64_t down, const float* rows, int64_t width, int64_t deep, float* into, int64_t next) {
        Vector sums[R][S * VECTORS] = {};
        product<R, S>(sums, weights, down, 1, rows, width, deep);
        for (int r = 0; r < R; r++)
            for (int c = 0; c < S * VECTORS; c++)
                store(into + r * next + c * LANES, load(into + r * next + c * LANES) + sums[r][c]);
    }
};

// Weights of R keys and S strips of queries from the log-sum-exps of the queries.
template <int R, int S>
struct Again {
    template <class T>
    static __attribute__((noinline)) void run(const T* key, int64_t down, const float* queries, int64_t width, const uint64_t* bits,
                    const float* lse, const float* rest, float* weights) {
        Vector sums[R][S * VECTORS] = {};
        product<R, S>(sums, key, down, 1, queries, ROWS, width);
        for (int c = 0; c < S * VECTORS; c++) {
            const Vector total = load(lse + c * LANES), little = load(rest + c * LANES);
            for (int r = 0; r < R; r++) {
                Vector score = (sums[r][c] - total) - little;
                if (bits) score = choose((uint32_t)(bits[r] >> (c * LANES)), score, UNREAD);
                store(weights + r * ROWS + c * LANES, power(score));
            }
        }
    }
};

// Gradients of the scores of R keys and S strips of queries.
template <int R, int S>
struct Slope {
    template <class T>
    static __attribute__((noinline)) void run(const T* value, int64_t down, const float* grads, int64_t width, const float* weights,
                    const float* delta, float* slopes) {
        Vector sums[R][S * VECTORS] = {};
        product<R, S>(sums, value, down, 1, grads, ROWS, width);
        for (int c = 0; c < S * VECTORS; c++) {
            const Vector less = load(delta + c * LANES);
            for (int r = 0; r < R; r++)
                store(slopes + r * ROWS + c * LANES,
                      (sums[r][c] - less) * load(weights + r * ROWS + c * LANES));
        }
    }
};

struct Side {
    const void* data;
    int64_t batch, head, row;
};

struct Lattice {
    int64_t start, step, places, outer, inner;
};

struct Part {
    Lattice query, key;
    int64_t outer, inner, causal;
    const uint64_t* bits;
};

// What is asked, as `native.py` lays it out. Strides are counted in numbers.
struct Work {
    Side query, key, value, grad_output, result;
    void* output;
    // Gradients of log-sum-exps are 0 where there are none; learned sinks are one for each head, or there are none.
    float* lse;
    const float *grad_lse, *sinks;
    // Of bfloat16 as they are asked for; of float32 keys and values filled up to whole strips.
    void *grad_query, *grad_key, *grad_value;
    const int64_t* heads;
    const Part* parts;
    int64_t batch, heads_read, heads_all, share, queries, keys, width, value_width, parts_number, brief, threads;
    int64_t splits;
    // Of bfloat16, bytes for all threads together: for gradients of keys, and for what rounding leaves out of rows that are
    // added to later. Where that would take more it is left out indeed, once for each stretch of keys that a row reads.
    int64_t holding, left;
    // Set where a row of the output, or of the gradient of a query, is not finite.
    mutable int64_t odd;
    float scale;
};

struct Outline;

// Keys that a block reads: places from `key` on, and where its masks are.
struct Run {
    int64_t key, step, columns, words, first;
    bool causal;
    const uint64_t* bits;
    const Outline* outline;

    INLINE bool plain(int64_t until) const { return !bits && (!causal || until <= first + 1); }

    // Which rows of the block read a key.
    INLINE uint64_t readers(int64_t place) const {
        if (bits) return bits[place * words];
        const int64_t beyond = place - first;
        return !causal || beyond <= 0 ? ~0ull : beyond >= ROWS ? 0 : ~0ull << beyond;
    }
};

// Keys that a strip of queries reads, from `low` up to `high`, less than `GAP` unread ones in between included; from
// `first` up to `last` all of its queries read all of them.
struct Stretch {
    int64_t low, high, first, last;
};

// The stretches of each strip of a block in one run.
struct Outline {
    std::vector<Stretch> strips[STRIPS];
    int64_t low = 0, high = 0;

    explicit Outline(const Run& run, int64_t rows) {
        for (int s = 0; s * STRIP < rows; s++) {
            std::vector<Stretch>& made = strips[s];
            if (run.bits)
                trace(run, rows, s);
            else if (run.causal)
                made.push_back({0, std::min(run.columns, run.first + (s + 1) * STRIP), 0,
                                std::min(run.columns, run.first + s * STRIP + 1)});
            else
                made.push_back({0, run.columns, 0, run.columns});
            if (made.empty()) continue;
            low = high ? std::min(low, made.front().low) : made.front().low;
            high = std::max(high, made.back().high);
        }
    }

    void trace(const Run& run, int64_t rows, int s) {
        const uint32_t present = rows - s * STRIP >= STRIP ? WHOLE : (1u << (rows - s * STRIP)) - 1;
        int64_t full = 0;
        for (int64_t place = 0; place < run.columns; place++) {
            const uint32_t bits = (run.bits[place * run.words] >> (s * STRIP)) & present;
            full = bits == present ? full + 1 : 0;
            if (!bits) continue;
            if (strips[s].empty() || place - strips[s].back().high >= GAP)
                strips[s].push_back({place, place, place, place});
            Stretch& last = strips[s].back();
            last.high = place + 1;
            if (full > last.last - last.first) last.first = place + 1 - full, last.last = place + 1;
        }
    }
};

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

// Ask the system to lay fresh memory out in large pages: the first touch of a small one costs more than its bytes.
void enlarge(void* start, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = 1 << 21, first = ((uintptr_t)start + page - 1) & ~(page - 1),
                    last = ((uintptr_t)start + bytes) & ~(page - 1);
    if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}

// Memory that grows, whatever is in it, or 0 when it is first taken.
struct Memory {
    void* held = nullptr;
    int64_t bytes = 0;

    Memory() = default;
    Memory(const Memory&) = delete;
    ~Memory() { std::free(held); }

    void* take(int64_t wanted, bool clear = false) {
        if (wanted <= bytes) return held;
        std::free(held);
        bytes = 0;
        held = std::malloc(wanted);
        if (!held) throw std::bad_alloc();
        bytes = wanted;
        if (bytes > MAPPED) enlarge(held, bytes);
        if (clear) std::memset(held, 0, bytes);
        return held;
    }
};

struct Room {
    std::vector<float> held;
    Memory sums, rest;

    float* take(int64_t numbers) {
        held.resize(numbers + 16);
        return (float*)(((uintptr_t)held.data() + 63) & ~(uintptr_t)63);
    }
};

// Exchange, in a pair of rows that lie `H` apart, the lanes in which the upper row belongs to the lower one.
template <int H, int... I>
INLINE void exchange(Vector& upper, Vector& lower, std::integer_sequence<int, I...>) {
    const Vector above = upper, below = lower;
    upper = __builtin_shufflevector(above, below, (I & H ? LANES + I - H : I)...);
    lower = __builtin_shufflevector(above, below, (I & H ? LANES + I : I + H)...);
}

template <int H>
INLINE void exchanges(Vector (&rows)[LANES]) {
    for (int r = 0; r < LANES; r++)
        if (!(r & H)) exchange<H>(rows[r], rows[r + H], std::make_integer_sequence<int, LANES>{});
    if constexpr (H > 1) exchanges<H / 2>(rows);
}

INLINE Vector as_vector(const float* from) { return load(from); }

INLINE Vector as_vector(const uint16_t* from) {
    Halves some;
    std::memcpy(&some, from, sizeof some);
    return (Vector)(__builtin_convertvector(some, Integers) << 16);
}

// Turn a square of numbers.
template <class T>
__attribute__((noinline)) void transpose(const T* from, int64_t down, float* to, int64_t across, float factor = 1) {
    Vector rows[LANES];
    for (int r = 0; r < LANES; r++) rows[r] = as_vector(from + r * down) * factor;
    exchanges<LANES / 2>(rows);
    for (int r = 0; r < LANES; r++) store(to + r * across, rows[r]);
}

template <class T>
const T* row(const Side& side, int64_t batch, int64_t head, int64_t place) {
    return (const T*)side.data + batch * side.batch + head * side.head + place * side.row;
}

// The nearest bfloat16 of numbers, and by how much they are off in units of a 256th of the last place.
INLINE std::pair<Halves, Bytes> narrowed(Vector given) {
    const Words bits = (Words)given, near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Integers number = given == given, off = ((Integers)(bits - (near << 16)) + 128) >> 8;
    const Integers half = number ? (Integers)near : Integers{} + 0x7fc0;
    const Integers less = off > 127 ? Integers{} + 127 : off;
    return {__builtin_convertvector((Words)half, Halves), __builtin_convertvector(less, Bytes)};
}

// Write a row as bfloat16, and to `rest`, where there is one, what that leaves out.
INLINE void narrow(const float* from, int64_t width, uint16_t* to, int8_t* rest) {
    for (int64_t i = 0; i < width; i += LANES) {
        float some[LANES];
        const int64_t there = std::min<int64_t>(LANES, width - i);
        if (there < LANES) std::memcpy(some, from + i, sizeof(float) * there);
        const std::pair<Halves, Bytes> made = narrowed(there < LANES ? load(some) : load(from + i));
        if (there == LANES) {
            std::memcpy(to + i, &made.first, sizeof made.first);
            if (rest) std::memcpy(rest + i, &made.second, sizeof made.second);
            continue;
        }
        std::memcpy(to + i, &made.first, sizeof(uint16_t) * there);
        if (rest) std::memcpy(rest + i, &made.second, there);
    }
}

// Read what was written so. What was never written is 0 whatever the rest.
INLINE void widen(const uint16_t* from, const int8_t* rest, int64_t width, float* to) {
    for (int64_t i = 0; i < width; i++) {
        const uint32_t less = rest ? (uint32_t)(rest[i] * 256) : 0;
        const uint32_t bits = from[i] & 0x7fff ? ((uint32_t)from[i] << 16) + less : 0;
        std::memcpy(to + i, &bits, 4);
    }
}

// What bfloat16 leaves out of rows that are added to later, of some queries that lie next to each other.
struct Rest {
    int8_t* held;
    int64_t queries, width;

    int8_t* row(int64_t query) const { return held ? held + query % queries * width : nullptr; }
};

// Copy rows, wide enough for whole strips, and fill up with 0.
template <class T>
void gather(const T* from, int64_t next, int64_t rows, int64_t width, float factor, float* to, int64_t wide,
            int64_t tall) {
    for (int64_t r = 0; r < rows; r++, from += next) {
        for (int64_t i = 0; i < width; i++) to[r * wide + i] = number(from[i]) * factor;
        for (int64_t i = width; i < wide; i++) to[r * wide + i] = 0;
    }
    for (int64_t i = rows * wide; i < tall * wide; i++) to[i] = 0;
}

template <class T>
float dot(const float* one, const T* other, int64_t width) {
    float sums[STRIP] = {}, sum = 0;
    for (int64_t i = 0; i < width; i++) sums[i % STRIP] += one[i] * number(other[i]);
    for (float part : sums) sum += part;
    return sum;
}

// Turn ROWS rows into columns.
void turn(const float* from, int64_t wide, float* to) {
    for (int64_t r = 0; r < ROWS; r += LANES)
        for (int64_t i = 0; i < wide; i += LANES) transpose(from + r * wide + i, wide, to + i * ROWS + r, ROWS);
}

void turn_back(const float* from, int64_t wide, float* to) {
    for (int64_t i = 0; i < wide; i += LANES)
        for (int64_t r = 0; r < ROWS; r += LANES) transpose(from + i * ROWS + r, ROWS, to + r * wide + i, wide);
}

int64_t whole(int64_t width) { return (width + STRIP - 1) / STRIP * STRIP; }

// What of a chunk of keys each strip of queries reads: places from `low` up to `high`.
struct Live {
    int64_t low[STRIPS], high[STRIPS];

    Live() {
        for (int s = 0; s < STRIPS; s++) low[s] = high[s] = 0;
    }

    // Take in a tile; between tiles that a strip reads, its row is filled with `otherwise`.
    INLINE void add(int from, int to, int64_t place, int64_t height, float* filled, float otherwise) {
        for (int s = from; s < to; s++) {
            if (high[s] == low[s]) low[s] = high[s] = place;
            for (; high[s] < place; high[s]++)
                for (int c = 0; c < VECTORS; c++)
                    store(filled + high[s] * ROWS + s * STRIP + c * LANES, all(otherwise));
            high[s] = place + height;
        }
    }

    // Call with each stretch of places that the same strips read, and with those strips, side by side.
    template <class Action>
    INLINE void each(Action action) const {
        int64_t edges[2 * STRIPS];
        for (int s = 0; s < STRIPS; s++) edges[2 * s] = low[s], edges[2 * s + 1] = high[s];
        std::sort(edges, edges + 2 * STRIPS);
        for (int edge = 1; edge < 2 * STRIPS; edge++) {
            const int64_t first = edges[edge - 1], last = edges[edge];
            if (first == last) continue;
            auto reads = [&](int s) { return low[s] <= first && last <= high[s]; };
            for (int from = 0, to; from < STRIPS; from = to) {
                for (to = from + 1; reads(from) && to < STRIPS && to - from < ABREAST && reads(to);) to++;
                if (reads(from)) action(from, to - from, first, last);
            }
        }
    }
};

// Call with each tile of a chunk: its first place, its height, the strips that read it, and its masks or none.
template <class Action>
INLINE void tiles(const Run& run, uint64_t present, int64_t first, int64_t number, Action action) {
    const int strips = (64 - __builtin_clzll(present) + STRIP - 1) / STRIP;
    const bool plain = run.plain(first + number);
    for (int64_t place = 0; place < number; place += TALL) {
        const int height = (int)std::min<int64_t>(TALL, number - place);
        uint64_t bits[TALL], some = 0, every = ~0ull;
        int from = 0, to = strips;
        bool masked = false;
        if (!plain) {
            for (int r = 0; r < height; r++) {
                bits[r] = run.readers(first + place + r) & present;
                some |= bits[r];
                every &= bits[r];
            }
            if (!some) continue;
            from = __builtin_ctzll(some) / STRIP;
            to = (63 - __builtin_clzll(some)) / STRIP + 1;
            const uint64_t inside = (to == STRIPS ? ~0ull : (1ull << to * STRIP) - 1) & (~0ull << from * STRIP);
            masked = (every ^ present) & inside;
        }
        if (masked)
            for (int r = 0; r < height; r++) bits[r] >>= from * STRIP;
        for (int s = from, next; s < to; s = next) {
            next = std::min(to, s + ABREAST);
            action(place, height, s, next, masked ? bits : nullptr);
            if (masked)
                for (int r = 0; r < height; r++) bits[r] >>= (next - s) * STRIP;
        }
    }
}

// Note that a difference of numbers and themselves is not 0.
void report(const Work& work, Vector odd) {
    for (int lane = 0; lane < LANES; lane++)
        if (odd[lane] != 0.0f || std::isnan(odd[lane])) __atomic_store_n(&work.odd, 1, __ATOMIC_RELAXED);
}

// Rows of a strip of queries as columns, and 0 where there are none.
template <class T>
void columns(const T* from, int64_t next, int64_t rows, int64_t width, float factor, float* spare, float* to) {
    const int64_t wide = whole(width);
    const bool direct = rows >= STRIP && width == wide;
    if (!direct) gather(from, next, std::min<int64_t>(rows, STRIP), width, factor, spare, wide, STRIP);
    for (int64_t i = 0; i < wide; i += LANES)
        for (int64_t r = 0; r < STRIP; r += LANES)
            if (direct)
                transpose(from + r * next + i, next, to + i * STRIP + r, STRIP, factor);
            else
                transpose(spare + r * wide + i, wide, to + i * STRIP + r, STRIP);
}

// Some keys and values, as float32.
struct Keys {
    const float *key, *value;
    int64_t key_next, value_next;
};

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

// Write a strip's columns as rows `next` apart.
template <class T>
void write_rows(const float* columns, int64_t rows, int64_t width, T* to, int64_t next, float* spare, const Rest& rest,
                int64_t query, int64_t step) {
    const int64_t wide = whole(width);
    const bool exact = std::is_same_v<T, float>, direct = exact && rows == STRIP && width == wide;
    for (int64_t i = 0; i < wide; i += LANES)
        for (int64_t r = 0; r < STRIP; r += LANES)
            if (direct)
                transpose(columns + i * STRIP + r, STRIP, (float*)to + r * next + i, next);
            else
                transpose(columns + i * STRIP + r, STRIP, spare + r * wide + i, wide);
    if (direct) return;
    for (int64_t r = 0; r < rows; r++)
        if constexpr (std::is_same_v<T, float>)
            std::memcpy(to + r * next, spare + r * wide, sizeof(float) * width);
        else
            narrow(spare + r * wide, width, to + r * next, rest.row(query + r * step));
}

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

// Do numbered things on some threads; what each of them does is the same on any number of them.
template <class Action>
void share(int64_t number, int64_t threads, Action action) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    auto act = [&] {
        try {
            Room room;
            for (int64_t item; (item = next++) < number;) action(item, room);
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    };
    std::vector<std::thread> others;
    try {
        while ((int64_t)others.size() + 1 < std::min(threads, number)) others.emplace_back(act);
    } catch (const std::exception&) {
        // Fewer threads then.
    }
    act();
    for (std::thread& other : others) other.join();
    if (failed) throw std::bad_alloc();
}

// Call with the row of every unwritten query on every head that is asked for, counted over all heads.
template <class Action>
void fill(const Work& work, const std::vector<int64_t>& unwritten, Action action) {
    for (int64_t row = 0; row < work.batch * work.heads_read; row++) {
        const int64_t head = row / work.heads_read * work.heads_all + work.heads[row % work.heads_read];
        for (int64_t query : unwritten) action(head * work.queries + query);
    }
}

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

// Keys and values that a cache holds in slots, as `slots.py` lays them out. Slots lie in pages of `size`: those that a
// row of `table` lists for each head, or without a table one page for each row of the batch and head.
struct Slots {
    const void *key, *value;
    // Of numbers in eight bits, one factor for each slot.
    const float *key_scale, *value_scale;
    const int64_t* table;
    int64_t batch, heads, share, width, value_width, size, pages;
};

// What is added to scores, and how far apart it lies; distances are 0 where it is the same.
struct Bias {
    const float* data;
    int64_t batch, head, query;
};

// As many of the numbers from a place on as fit into a vector, and 0 for those that are not there.
INLINE Vector load_some(const float* from, int64_t there) {
    if (there >= LANES) return load(from);
    float some[LANES] = {};
    std::memcpy(some, from, sizeof(float) * there);
    return load(some);
}

INLINE Vector as_vector(const int8_t* from) {
#if defined(__AVX512F__)
    return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(__AVX2__)
    return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
    Vector made;
    for (int lane = 0; lane < LANES; lane++) made[lane] = from[lane];
    return made;
#endif
}

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

// Take in one token of every row, `[rows, heads, width]`; in eight bits with a factor for each, the largest over 127.
template <class From, class To>
void put(const From* from, int64_t width, const Slots& slots, const void* held, const float* scale, int64_t slot) {
    for (int64_t at = 0; at < slots.batch * slots.heads; at++, from += width) {
        const int64_t page = slots.table ? slots.table[at * slots.pages + slot / slots.size] : at;
        const int64_t place = page * slots.size + slot % slots.size;
        To* to = (To*)held + place * width;
        if constexpr (std::is_same_v<From, To>) {
            std::memcpy(to, from, sizeof(To) * width);
        } else {
            float most = 0;
            for (int64_t i = 0; i < width; i++) {
                const float size = std::fabs(number(from[i]));
                most = size > most || std::isnan(size) ? size : most;
            }
            const float factor = most / 127, divisor = std::max(std::numeric_limits<float>::min(), factor);
            for (int64_t i = 0; i < width; i++) to[i] = (int8_t)std::nearbyint(number(from[i]) / divisor);
            const_cast<float*>(scale)[place] = factor;
        }
    }
}

template <class From, class To>
void put_both(const Slots& slots, const void* key, const void* value, int64_t slot) {
    put<From, To>((const From*)key, slots.width, slots, slots.key, slots.key_scale, slot);
    put<From, To>((const From*)value, slots.value_width, slots, slots.value, slots.value_scale, slot);
}

template <class Action>
int guarded(Action action) {
    try {
        action();
        return 0;
    } catch (const std::exception&) {
        return 1;
    }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void longspan_large(void* start, int64_t bytes) {
    enlarge(start, bytes);
}

extern "C" __attribute__((visibility("default"))) int longspan_forward(const Work* work) {
    return guarded([&] { work->brief ? forward<uint16_t>(*work) : forward<float>(*work); });
}

extern "C" __attribute__((visibility("default"))) int longspan_backward(const Work* work) {
    return guarded([&] { backward_wide(*work); });
}

// Of bfloat16, for some works that have key heads in common.
extern "C" __attribute__((visibility("default"))) int longspan_backward_brief(const Work* works, int64_t number) {
    return guarded([&] { backward_brief(works, number); });
}

// `kind` says how numbers are held: 0 as float32, 1 as bfloat16, 2 in eight bits.
extern "C" __attribute__((visibility("default"))) int longspan_weigh(
    const Slots* slots, const float* query, const Bias* bias, int64_t begin, int64_t end, float scale, int64_t kind,
    int64_t threads, float* output) {
    return guarded([&] {
        const auto run = kind == 0 ? weigh<float> : kind == 1 ? weigh<uint16_t> : weigh<int8_t>;
        run(*slots, query, *bias, begin, end, scale, output, threads);
    });
}

// `brief` says whether what comes is bfloat16, and `whole` whether it is held in eight bits.
extern "C" __attribute__((visibility("default"))) void longspan_put(
    const Slots* slots, const void* key, const void* value, int64_t slot, int64_t brief, int64_t whole) {
    const auto run = whole ? (brief ? put_both<uint16_t, int8_t> : put_both<float, int8_t>)
                           : (brief ? put_both<uint16_t, uint16_t> : put_both<float, float>);
    run(*slots, key, value, slot);
}
