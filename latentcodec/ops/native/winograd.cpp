// Winograd's convolutions of float32 maps in one pass: some tiles at a time are transformed, multiplied by the
// transformed weight and transformed back while they are in the cache. The matrices are in `winograd.h`.
//
// `outputs` is 4 for F(4x4, 3x3) and 2 for F(2x2, 3x3); `resizing` says whether a map is doubled before it is
// convolved, or the result of F(4x4, 3x3) is halved, by sums of 2 x 2.
// C and O are multiples of PANEL. A transformed weight is P^2 planes [O / PANEL, C, PANEL], MARGIN values apart: without
// that, powers of two would put all planes into the same few lines of the cache.

#include "winograd.h"

namespace {

// One tile of y at (row, column) <- matrix m matrix^T of m [P^2 planes] + bias + added.
template <int M, int P>
void transform_back(const Matrix<M, P> &matrix, const Map &y, int64_t image, int64_t row, int64_t column,
                    const float *m, int64_t plane, const float *bias, const Map &added) {
    int64_t rows = std::min<int64_t>(M, y.H - row), columns = std::min<int64_t>(M, y.W - column);
    for (int64_t c = 0; c < y.C; c += LANES) {
        Vector products[P * P], result[M * M], offset = bias ? load(bias + c, LANES) : Vector{};
#pragma GCC unroll 36
        for (int p = 0; p < P * P; p++) products[p] = load(m + p * plane + c, LANES);
        transform(matrix, products, result);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < columns; j++) {
                Vector value = result[i * M + j] + offset;
                if (added.values) value += load(added.at(image, row + i, column + j) + c, LANES);
                store(y.at(image, row + i, column + j) + c, value, LANES);
            }
    }
}

// The memory of one thread: transformed tiles and their products, `together` of each, rounded up to ROWS.
struct Block {
    int64_t rows, v_plane, m_plane, size;

    Block(int64_t together, int64_t planes, int64_t C, int64_t O) {
        rows = whole_rows(together);
        v_plane = rows * C + MARGIN;
        m_plane = rows * O + MARGIN;
        size = planes * (v_plane + m_plane) + C;  // and zeros, for what lies outside of the map
    }
};

template <class Kind>
void convolve(Kind kind, const Map &y, const Map &x, const float *U, const float *bias, const Map &added,
              Tiling tiling, int64_t top, int64_t together, float *memory, int threads) {
    constexpr int M = Kind::outputs, P = sizeof kind.input.at / sizeof kind.input.at[0];
    const int64_t C = x.C, O = y.C, tiles = y.B * tiling.rows * tiling.columns;
    const Block block(together, P * P, C, O);
    in_parallel(threads, (tiles + together - 1) / together, [&](int64_t index) {
        float *V = memory + omp_get_thread_num() * block.size, *products = V + P * P * block.v_plane;
        float *zeros = products + P * P * block.m_plane;
        std::memset(zeros, 0, C * sizeof(float));
        const int64_t first = index * together, count = std::min(together, tiles - first);
        for (int64_t t = 0; t < count; t++) {
            int64_t row = tiling.row(first + t) * kind.step - top, column = tiling.column(first + t) * kind.step - 1;
            transform_tile<Kind::input>(V + t * C, block.v_plane, x, tiling.image(first + t), row, column, zeros);
        }
        for (int p = 0; p < P * P; p++)
            for (int64_t o = 0; o < O; o += PANEL)
                for (int64_t t = 0; t < count; t += ROWS)
                    multiply_panel(products + p * block.m_plane + t * O + o, O, V + p * block.v_plane + t * C,
                                   U + p * (C * O + MARGIN) + o * C, C);
        for (int64_t t = 0; t < count; t++)
            transform_back(kind.output, y, tiling.image(first + t), tiling.row(first + t) * M,
                           tiling.column(first + t) * M, products + t * O, block.m_plane, bias, added);
    });
}

}  // namespace

extern "C" {

// y [B, H', W', O] dense <- x [B, H, W, C] convolved with the weight of which U is the transform, + bias [O] and added
// [B, H', W', O] where they are given. Tiles begin `top` rows above and one column left of x. `memory` has room for
// P^2 (together' (C + O) + 2 MARGIN) + C values a thread, together' being `together` rounded up to 14.
void latentcodec_winograd_convolve(int outputs, int resizing, float *y, const float *x, int64_t x_image_stride,
                                   int64_t x_row_stride, int64_t B, int64_t H, int64_t W, int64_t C, int64_t y_rows,
                                   int64_t y_columns, int64_t O, const float *U, const float *bias, const float *added,
                                   int64_t added_image_stride, int64_t added_row_stride, int64_t top,
                                   int64_t together, float *memory, int threads) {
    Map from{const_cast<float *>(x), x_image_stride, x_row_stride, B, H, W, C};
    Map to{y, y_rows * y_columns * O, y_columns * O, B, y_rows, y_columns, O};
    Map residual{const_cast<float *>(added), added_image_stride, added_row_stride, B, y_rows, y_columns, O};
    with_kind(outputs, resizing, [&](auto kind) {
        Tiling tiling{(y_rows + kind.outputs - 1) / kind.outputs, (y_columns + kind.outputs - 1) / kind.outputs};
        convolve(kind, to, from, U, bias, residual, tiling, top, together, memory, threads);
    });
}

// U <- G w G^T of w [O, C, 3, 3] with any strides.
void latentcodec_winograd_weight(int outputs, int resizing, float *U, const float *w, int64_t O, int64_t C,
                                 int64_t o_stride, int64_t c_stride, int64_t row_stride, int64_t column_stride,
                                 int threads) {
    with_kind(outputs, resizing, [&](auto kind) {
        constexpr auto matrix = kind.weight;
        constexpr int P = sizeof matrix.at / sizeof matrix.at[0];
        const int64_t plane = C * O + MARGIN;
        in_parallel(threads, O / LANES, [&](int64_t part) {
            int64_t o = part * LANES;
            float *panel = U + o / PANEL * PANEL * C + o % PANEL;
            for (int64_t c = 0; c < C; c++) {
                Vector taps[9], result[P * P];
                for (int k = 0; k < LANES; k++)
                    for (int i = 0; i < 9; i++)
                        taps[i][k] = w[(o + k) * o_stride + c * c_stride + i / 3 * row_stride + i % 3 * column_stride];
                transform(matrix, taps, result);
                for (int p = 0; p < P * P; p++) store(panel + p * plane + c * PANEL, result[p], LANES);
            }
        });
    });
}
}
