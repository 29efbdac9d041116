// Numbered things shared out to threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <thread>
#include <vector>

#include "memory.hpp"

namespace {

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

}  // namespace
