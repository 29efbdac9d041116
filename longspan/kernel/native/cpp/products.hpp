// Products of small matrices, a function for each height: scores, weights, outputs and gradients.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.hpp"

namespace {

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

}  // namespace
