// What is asked: tensors, parts of a pattern, and where results go.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vectors.hpp"

namespace {

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

template <class T>
const T* row(const Side& side, int64_t batch, int64_t head, int64_t place) {
    return (const T*)side.data + batch * side.batch + head * side.head + place * side.row;
}

// Note that a difference of numbers and themselves is not 0.
void report(const Work& work, Vector odd) {
    for (int lane = 0; lane < LANES; lane++)
        if (odd[lane] != 0.0f || std::isnan(odd[lane])) __atomic_store_n(&work.odd, 1, __ATOMIC_RELAXED);
}

// Call with the row of every unwritten query on every head that is asked for, counted over all heads.
template <class Action>
void fill(const Work& work, const std::vector<int64_t>& unwritten, Action action) {
    for (int64_t row = 0; row < work.batch * work.heads_read; row++) {
        const int64_t head = row / work.heads_read * work.heads_all + work.heads[row % work.heads_read];
        for (int64_t query : unwritten) action(head * work.queries + query);
    }
}

}  // namespace
