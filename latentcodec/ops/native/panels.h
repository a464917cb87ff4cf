// The matrix product that every convolution here ends in: some rows of values, one register at a time, times a panel of
// the weight. A panel holds PANEL outputs of every input: [inputs, PANEL].

#pragma once

#include "vector.h"

constexpr int PANEL = 16;            // outputs that are summed up at a time
constexpr int WIDTH = PANEL / LANES;  // the same in registers
#if defined(__AVX512F__)
constexpr int ROWS = 14;  // rows that are summed up at a time: as many as there are registers for
#else
constexpr int ROWS = 6;
#endif

inline int64_t whole_rows(int64_t count) { return (count + ROWS - 1) / ROWS * ROWS; }

// m [ROWS, REGISTERS * LANES] <- v [ROWS, C] u [C, PANEL], whose other outputs are left out; rows of m lie `stride`
// apart.
template <int REGISTERS = WIDTH>
inline void multiply_panel(float *m, int64_t stride, const float *v, const float *u, int64_t C) {
    Vector sums[ROWS][REGISTERS]{};
    for (int64_t c = 0; c < C; c++, u += PANEL) {
        Vector weights[REGISTERS];
#pragma GCC unroll 4
        for (int j = 0; j < REGISTERS; j++) weights[j] = load(u + j * LANES, LANES);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < REGISTERS; j++) sums[i][j] += v[i * C + c] * weights[j];
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < REGISTERS; j++) store(m + i * stride + j * LANES, sums[i][j], LANES);
}

// A map [B, H, W, C] with dense rows; the strides of its images and rows are given in values.
struct Map {
    float *values;
    int64_t image_stride, row_stride;
    int64_t B, H, W, C;

    float *at(int64_t b, int64_t row, int64_t column) const {
        return values + b * image_stride + row * row_stride + column * C;
    }
};
