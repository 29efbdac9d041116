// Vectors of float32 by whatever instructions there are: how they are loaded, widened, chosen and raised.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "sizes.hpp"

namespace {

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

// As many of the numbers from a place on as fit into a vector, and 0 for those that are not there.
INLINE Vector load_some(const float* from, int64_t there) {
    if (there >= LANES) return load(from);
    float some[LANES] = {};
    std::memcpy(some, from, sizeof(float) * there);
    return load(some);
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

INLINE Vector as_vector(const float* from) { return load(from); }

INLINE Vector as_vector(const uint16_t* from) {
    Halves some;
    std::memcpy(&some, from, sizeof some);
    return (Vector)(__builtin_convertvector(some, Integers) << 16);
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

}  // namespace
