// The matrices of Winograd's convolutions F(4x4, 3x3) and F(2x2, 3x3) in float32 (Lavin & Gray 2016,
// arXiv:1509.09308), and where the tiles of a map lie.
//
//     Y = A^T [ (B^T d B) * (G w G^T) ] A     for every tile d of the input, summed over its channels
//
// B^T, G and A^T follow from the points at which polynomials are evaluated (Toom-Cook). Of symmetric points,
// 0, +-5/8, +-3/2 and infinity have half the error of the usual 0, +-1, +-2.
//
// Where a map is first doubled (nearest neighbour), neighbours are equal, and the row of B^T for the point -1 gives zero
// for points 0, +-1, +-p: it is left out with its column of A^T, so 25 products instead of 36 make 16 values, and the
// tile is read from the map as it was before doubling. On the way back, the gradient of a doubled map is added up by
// twos, and again the point -1 gives zero: 25 products for 2 x 2 sums.
//
// Shapes: B batch, H W rows and columns, C channels, O output channels, T = B * tile rows * tile columns tiles,
// P points on an axis (6, 4; doubled 5, 3). Maps are [B, H, W, C].

#pragma once

#include "panels.h"

template <int ROWS, int COLUMNS>
struct Matrix {
    float at[ROWS][COLUMNS]{};

    constexpr Matrix<COLUMNS, ROWS> transposed() const {
        Matrix<COLUMNS, ROWS> result;
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < COLUMNS; j++) result.at[j][i] = at[i][j];
        return result;
    }

    constexpr Matrix<ROWS - 1, COLUMNS> without_row(int row) const {
        Matrix<ROWS - 1, COLUMNS> result;
        for (int i = 0; i < ROWS - 1; i++)
            for (int j = 0; j < COLUMNS; j++) result.at[i][j] = at[i + (i >= row)][j];
        return result;
    }
};

// The matrices of F(M x M, 3 x 3) from M + 1 points; infinity is the last one.
template <int M>
struct Transforms {
    Matrix<M + 2, M + 2> input;  // B^T
    Matrix<M + 2, 3> weight;     // G
    Matrix<M, M + 2> output;     // A^T

    constexpr Transforms(const double (&points)[M + 1]) : input(), weight(), output() {
        for (int i = 0; i <= M + 1; i++) {
            double product[M + 2] = {1}, scale = 1, power = 1;  // of (x - p) over all other points p
            int degree = 0;
            for (int j = 0; j <= M; j++) {
                if (j == i) continue;
                for (int k = ++degree; k >= 0; k--) product[k] = (k ? product[k - 1] : 0) - points[j] * product[k];
                if (i <= M) scale *= points[i] - points[j];
            }
            for (int k = 0; k <= M + 1; k++) input.at[i][k] = product[k];
            for (int k = 0; k < (M > 3 ? M : 3); k++) {
                if (k < 3) weight.at[i][k] = i <= M ? power / scale : k == 2;
                if (k < M) output.at[k][i] = i <= M ? power : k == M - 1;
                if (i <= M) power *= points[i];
            }
        }
    }
};

constexpr Transforms<4> PLAIN4({0, 0.625, -0.625, 1.5, -1.5});
constexpr Transforms<4> DOUBLED4({0, 1, -1, 0.625, -0.625});
constexpr Transforms<2> PLAIN2({0, 1, -1});
constexpr int VANISHING = 2;  // the place of -1 among the points of DOUBLED4 and PLAIN2

// B^T for tiles that are read before they are doubled: pixels 0, 1 1, 2 2, 3.
template <int M>
constexpr Matrix<M + 1, M / 2 + 2> before_doubling(const Transforms<M> &transforms) {
    Matrix<M + 1, M / 2 + 2> result;
    Matrix<M + 1, M + 2> input = transforms.input.without_row(VANISHING);
    for (int i = 0; i < M + 1; i++)
        for (int j = 0; j < M + 2; j++) result.at[i][(j + 1) / 2] += input.at[i][j];
    return result;
}

template <int M>
constexpr Matrix<M, M + 1> after_doubling(const Transforms<M> &transforms) {
    return transforms.output.transposed().without_row(VANISHING).transposed();
}

// A^T for results that are added up by twos.
template <int M>
constexpr Matrix<M / 2, M + 1> before_halving(const Transforms<M> &transforms) {
    Matrix<M / 2, M + 1> result;
    Matrix<M, M + 1> output = after_doubling(transforms);
    for (int i = 0; i < M; i++)
        for (int j = 0; j < M + 1; j++) result.at[i / 2][j] += output.at[i][j];
    return result;
}

// What is known of a convolution at compile time: it makes `outputs` rows of a tile, and tiles begin `step` rows apart.
struct Plain4 {
    static constexpr int outputs = 4, step = 4;
    static constexpr auto input = PLAIN4.input;
    static constexpr auto weight = PLAIN4.weight;
    static constexpr auto output = PLAIN4.output;
};
struct Plain2 {
    static constexpr int outputs = 2, step = 2;
    static constexpr auto input = PLAIN2.input;
    static constexpr auto weight = PLAIN2.weight;
    static constexpr auto output = PLAIN2.output;
};
struct Doubled4 {
    static constexpr int outputs = 4, step = 2;
    static constexpr auto input = before_doubling(DOUBLED4);
    static constexpr auto weight = DOUBLED4.weight.without_row(VANISHING);
    static constexpr auto output = after_doubling(DOUBLED4);
};
struct Doubled2 {
    static constexpr int outputs = 2, step = 1;
    static constexpr auto input = before_doubling(PLAIN2);
    static constexpr auto weight = PLAIN2.weight.without_row(VANISHING);
    static constexpr auto output = after_doubling(PLAIN2);
};

struct Halved4 {
    static constexpr int outputs = 2, step = 4;
    static constexpr auto input = DOUBLED4.input.without_row(VANISHING);
    static constexpr auto weight = Doubled4::weight;
    static constexpr auto output = before_halving(DOUBLED4);
};

enum Resizing { NONE, DOUBLES, HALVES };  // as Python has it

// body(kind) for the transforms of F(outputs x outputs, 3 x 3).
template <class Body>
void with_kind(int outputs, int resizing, Body body) {
    if (resizing == HALVES)
        body(Halved4{});
    else if (outputs == 4)
        resizing == DOUBLES ? body(Doubled4{}) : body(Plain4{});
    else
        resizing == DOUBLES ? body(Doubled2{}) : body(Plain2{});
}

// to[i] = sum over j of matrix[i][j] from[j], for vectors `stride` apart; zeros of the matrix cost nothing.
template <int ROWS, int COLUMNS>
inline void multiply(const Matrix<ROWS, COLUMNS> &matrix, const Vector *from, int from_stride, Vector *to,
                     int to_stride) {
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
        Vector sum{};
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++)
            if (matrix.at[i][j] != 0) sum += matrix.at[i][j] * from[j * from_stride];
        to[i * to_stride] = sum;
    }
}

// to [R, R] = matrix from [K, K] matrix^T.
template <int R, int K>
inline void transform(const Matrix<R, K> &matrix, const Vector *from, Vector *to) {
    Vector half[R * K];
#pragma GCC unroll 8
    for (int j = 0; j < K; j++) multiply(matrix, from + j, K, half + j, K);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) multiply(matrix, half + i * K, 1, to + i * R, 1);
}

struct Tiling {
    int64_t rows, columns;  // of tiles in an image

    int64_t image(int64_t tile) const { return tile / columns / rows; }
    int64_t row(int64_t tile) const { return tile / columns % rows; }
    int64_t column(int64_t tile) const { return tile % columns; }
};

constexpr int MARGIN = 16;  // values between planes, which else would fall into the same few lines of the cache

// V [P^2 planes] <- MATRIX d MATRIX^T of one tile d [K, K] of x, which begins at (row, column); zeros outside the map.
// The matrix is a parameter of the template, since its zeros cost something where the compiler does not see them.
template <const auto &MATRIX>
void transform_tile(float *V, int64_t plane, const Map &x, int64_t image, int64_t row, int64_t column,
                    const float *zeros) {
    constexpr int P = sizeof MATRIX.at / sizeof MATRIX.at[0], K = sizeof MATRIX.at[0] / sizeof(float);
    const float *pixels[K * K];
    for (int i = 0; i < K; i++)
        for (int j = 0; j < K; j++) {
            int64_t y = row + i, z = column + j;
            bool is_inside = y >= 0 && y < x.H && z >= 0 && z < x.W;
            pixels[i * K + j] = is_inside ? x.at(image, y, z) : zeros;
        }
    for (int64_t c = 0; c < x.C; c += LANES) {
        Vector d[K * K], result[P * P];
#pragma GCC unroll 36
        for (int k = 0; k < K * K; k++) d[k] = load(pixels[k] + c, LANES);
        transform(MATRIX, d, result);
#pragma GCC unroll 36
        for (int p = 0; p < P * P; p++) store(V + p * plane + c, result[p], LANES);
    }
}
