// One register of float32 values, and what every function here does with it: load, store, exp, SiLU; loops on threads.
//
// The vector types are those of GCC and Clang, so the same source runs on AVX2, AVX-512, SSE and NEON. bfloat16 is
// widened as it is loaded and rounded to nearest even as it is stored: all arithmetic is in float32.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct bfloat16 {
    uint16_t bits;
};

inline Vector fill(float value) { return value - Vector{}; }

// ---- memory: `count` values, of which at most LANES are moved and missing ones read as zero

inline Vector widen(Halves x) { return (Vector)(__builtin_convertvector(x, Integers) << 16); }

inline Halves narrow(Vector x) {
    Integers bits = (Integers)x;
    Integers rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Integers quiet = (bits >> 16) | 0x40;  // a NaN stays one
    return __builtin_convertvector((x == x) ? rounded : quiet, Halves);
}

template <class Register, class T>
inline Register read(const T *from, int64_t count) {
    Register x{};
    if (count >= LANES)
        std::memcpy(&x, from, sizeof x);
    else
        std::memcpy(&x, from, count * sizeof(T));
    return x;
}

template <class Register, class T>
inline void write(T *to, Register x, int64_t count) {
    if (count >= LANES)
        std::memcpy(to, &x, sizeof x);
    else
        std::memcpy(to, &x, count * sizeof(T));
}

inline Vector load(const float *from, int64_t count) { return read<Vector>(from, count); }
inline Vector load(const bfloat16 *from, int64_t count) { return widen(read<Halves>(from, count)); }
inline void store(float *to, Vector x, int64_t count) { write(to, x, count); }
inline void store(bfloat16 *to, Vector x, int64_t count) { write(to, narrow(x), count); }

// ---- functions

// e^x to two units in the last place: 2^n e^r, with |r| <= ln 2 / 2 and a polynomial for e^r. Infinite above 88, and at
// least e^-87. A NaN gives a finite value: callers multiply by what was NaN.
inline Vector exponential(Vector given) {
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the lowest bits
    Vector x = given > -87.0f ? given : fill(-87.0f);
    x = x < 88.0f ? x : fill(88.0f);
    Vector shifted = x * 1.442695041f + shift;
    Vector n = shifted - shift;
    Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts, the first one exact
    Vector p = r * 1.38888889e-3f + 8.33333333e-3f;        // 1/6!, 1/5!, ...
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    Integers exponent = ((Integers)shifted - (Integers)fill(shift) + 127) << 23;
    return given > 88.0f ? fill(__builtin_inff()) : p * (Vector)exponent;
}

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }
inline Vector silu(Vector x) { return x / (1.0f + exponential(-x)); }
inline Vector silu_slope(Vector x) {
    Vector s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
}

// ---- threads

// body(i) for every i below `count`, on `threads` threads of torch's OpenMP runtime; each takes one run of neighbours.
template <class Body>
inline void in_parallel(int threads, int64_t count, Body body) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count > 1)
    for (int64_t i = 0; i < count; i++) body(i);
}
