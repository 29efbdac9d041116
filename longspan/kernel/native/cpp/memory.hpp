// Memory that is taken once and used again.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "sizes.hpp"

namespace {

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

}  // namespace
