// Winograd's convolutions of float32 maps: the transforms of the input, of the weight and of the result. The products
// between them are matrix products, which BLAS does. See `winograd.h`.
//
// `outputs` is 4 for F(4x4, 3x3) and 2 for F(2x2, 3x3); `doubles` says that a map is convolved after it was doubled.

#include "winograd.h"

namespace {

// y <- matrix m matrix^T + bias + added of all tiles m [P, P] of the products.
template <int M, int P>
void transform_back(const Matrix<M, P> &matrix, Map y, const float *products, const float *bias,
                    Map added, Tiling tiling, int threads) {
    const int64_t tiles = y.B * tiling.rows * tiling.columns, plane = tiles * y.C;
    in_parallel(threads, tiles, [&](int64_t tile) {
        int64_t b = tiling.image(tile), row = tiling.row(tile) * M, column = tiling.column(tile) * M;
        for (int64_t c = 0; c < y.C; c += LANES) {
            int64_t left = y.C - c;
            Vector m[P * P], result[M * M], offset = bias ? load(bias + c, left) : Vector{};
            for (int p = 0; p < P * P; p++) m[p] = load(products + p * plane + tile * y.C + c, left);
            transform(matrix, m, result);
            for (int i = 0; i < M && row + i < y.H; i++)
                for (int j = 0; j < M && column + j < y.W; j++) {
                    Vector value = result[i * M + j] + offset;
                    if (added.values) value += load(added.at(b, row + i, column + j) + c, left);
                    store(y.at(b, row + i, column + j) + c, value, left);
                }
        }
    });
}

}  // namespace

extern "C" {

// V [P^2, T, C] <- B^T d B of x [B, H, W, C], whose tiles begin `top` rows above and one column left of it. `outputs`
// is 4 or 2; `doubles` says that x is convolved after it has been doubled.
void latentcodec_winograd_input(int outputs, int doubles, float *V, const float *x,
                                int64_t image_stride, int64_t row_stride, int64_t B, int64_t H, int64_t W, int64_t C,
                                int64_t tile_rows, int64_t tile_columns, int64_t top, int threads) {
    Map map{const_cast<float *>(x), image_stride, row_stride, B, H, W, C};
    with_kind(outputs, doubles, [&](auto kind) {
        transform_tiles<kind.step>(kind.input, V, map, {tile_rows, tile_columns}, top, 1, threads);
    });
}

// y [B, H, W, O] dense <- A^T m A of the products [P^2, T, O], + bias [O] and added [B, H, W, O] where they are given.
void latentcodec_winograd_output(int outputs, int doubles, float *y, const float *products,
                                 const float *bias, const float *added, int64_t image_stride, int64_t row_stride,
                                 int64_t B, int64_t H, int64_t W, int64_t O, int64_t tile_rows, int64_t tile_columns,
                                 int threads) {
    Map map{y, H * W * O, W * O, B, H, W, O};
    Map residual{const_cast<float *>(added), image_stride, row_stride, B, H, W, O};
    with_kind(outputs, doubles, [&](auto kind) {
        transform_back(kind.output, map, products, bias, residual, {tile_rows, tile_columns}, threads);
    });
}

// U [P^2, C, O] <- G w G^T of w [O, C, 3, 3] with any strides.
void latentcodec_winograd_weight(int outputs, int doubles, float *U, const float *w, int64_t O, int64_t C,
                                 int64_t o_stride, int64_t c_stride, int64_t row_stride, int64_t column_stride,
                                 int threads) {
    with_kind(outputs, doubles, [&](auto kind) {
        constexpr auto matrix = kind.weight;
        constexpr int P = sizeof matrix.at / sizeof matrix.at[0];
        in_parallel(threads, C, [&](int64_t c) {
            for (int64_t o = 0; o < O; o += LANES) {
                Vector taps[9]{}, result[P * P];
                for (int64_t k = 0; k < std::min<int64_t>(LANES, O - o); k++)
                    for (int i = 0; i < 9; i++)
                        taps[i][k] = w[(o + k) * o_stride + c * c_stride + i / 3 * row_stride + i % 3 * column_stride];
                transform(matrix, taps, result);
                for (int p = 0; p < P * P; p++) store(U + (p * C + c) * O + o, result[p], O - o);
            }
        });
    });
}
}
