// Attention over lattices of rectangles of pairs, on the instruction set that the compiler is told to use.
//
// A block is up to 64 queries at regular distances. It goes through all of its keys once, with the softmax kept
// online. Queries lie in the lanes of vectors and keys (or numbers of a value) are broadcast, so that maxima and
// sums run down columns and nothing is ever moved between lanes. Forward, each strip of 16 queries goes by itself
// through the stretches of keys that it reads, which are read where they lie unless they are bfloat16 or lie far apart;
// backward, strips go abreast and keys are tiles of a few, of which each strip does those that it reads. Masks are
// words of 64 bits, one bit a query.
//
// This file is all that a compiler is given: it includes the others, so that everything can be inlined everywhere.
#include <exception>

#include "backward.hpp"
#include "forward.hpp"
#include "weigh.hpp"

namespace {

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
