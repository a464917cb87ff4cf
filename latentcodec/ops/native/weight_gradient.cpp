// The gradient of a 3x3 convolution's weight, float32, from the map x that it saw and the gradient dy of its result: by
// Winograd's F(4x4, 3x3) read backwards, with a quarter of the multiplications of the direct sum. The matrices are in
// `winograd.h`.
//
//     dw = G^T [ sum over tiles of (A dy A^T) (B^T d B) ] G     for every output and input channel
//
// A thread has a run of tiles and sums of its own, to which some tiles at a time are added; then the sums of all threads
// are added up in their order, so that a number of threads has one result, to the last bit. The gradient of the bias is added up on the way.
//
// Shapes: B batch, H W rows and columns, C channels, O output channels, both multiples of PANEL, P = 6 points on an axis.
// x is [B, H, W, C], dy [B, H, W, O]. Sums are P^2 planes [C / PANEL, O, PANEL], MARGIN values apart.

#include <vector>

#include "winograd.h"

namespace {

constexpr int POINTS = 36;
constexpr auto A = Plain4::output.transposed();
constexpr auto G_T = Plain4::weight.transposed();
// Outputs whose sums are in registers at a time: as many as there are registers for.
#if defined(__AVX512F__)
constexpr int OUTPUTS = 16;
#elif defined(__AVX2__)
constexpr int OUTPUTS = 4;
#else
constexpr int OUTPUTS = 2;
#endif

// sums [OUTPUTS, PANEL] += d [count, OUTPUTS]^T v [count, PANEL], of rows with O and C values.
inline void add_products(float *sums, const float *d, int64_t O, const float *v, int64_t C, int64_t count) {
    Vector own[OUTPUTS][WIDTH]{};
    for (int64_t t = 0; t < count; t++, d += O, v += C) {
        Vector values[WIDTH];
#pragma GCC unroll 4
        for (int j = 0; j < WIDTH; j++) values[j] = load(v + j * LANES, LANES);
#pragma GCC unroll 16
        for (int i = 0; i < OUTPUTS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < WIDTH; j++) own[i][j] += d[i] * values[j];
    }
#pragma GCC unroll 16
    for (int i = 0; i < OUTPUTS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < WIDTH; j++) {
            float *at = sums + i * PANEL + j * LANES;
            store(at, load(at, LANES) + own[i][j], LANES);
        }
}

// sums [O] += the pixels of dy's tile at (row, column): those of one tile in float32, which are then added in float64.
void add_pixels(double *sums, const Map &dy, int64_t image, int64_t row, int64_t column) {
    const int64_t rows = std::min<int64_t>(4, dy.H - row), columns = std::min<int64_t>(4, dy.W - column);
    for (int64_t o = 0; o < dy.C; o += LANES) {
        Vector sum{};
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < columns; j++) sum += load(dy.at(image, row + i, column + j) + o, LANES);
        for (int k = 0; k < LANES; k++) sums[o + k] += sum[k];
    }
}

// What one thread works with: its sums, then `together` transformed tiles of x and of dy, then zeros.
struct Own {
    float *sums, *V, *D, *zeros;
    int64_t plane, v_plane, d_plane;

    Own(float *memory, int64_t part, int64_t together, int64_t C, int64_t O) {
        plane = C * O + MARGIN, v_plane = together * C + MARGIN, d_plane = together * O + MARGIN;
        sums = memory + part * (POINTS * (plane + v_plane + d_plane) + std::max(C, O));
        V = sums + POINTS * plane, D = V + POINTS * v_plane, zeros = D + POINTS * d_plane;
    }
};

// The sums of one thread += what tiles `first` to `first + count` give; pixels [O] likewise.
void add_tiles(const Own &own, double *pixels, const Map &dy, const Map &x, Tiling tiling, int64_t first,
               int64_t count) {
    for (int64_t t = 0; t < count; t++) {
        const int64_t image = tiling.image(first + t), row = tiling.row(first + t) * 4;
        const int64_t column = tiling.column(first + t) * 4;
        transform_tile<Plain4::input>(own.V + t * x.C, own.v_plane, x, image, row - 1, column - 1, own.zeros);
        transform_tile<A>(own.D + t * dy.C, own.d_plane, dy, image, row, column, own.zeros);
        add_pixels(pixels, dy, image, row, column);
    }
    for (int p = 0; p < POINTS; p++)
        for (int64_t c = 0; c < x.C; c += PANEL)
            for (int64_t o = 0; o < dy.C; o += OUTPUTS)
                add_products(own.sums + p * own.plane + c * dy.C + o * PANEL, own.D + p * own.d_plane + o, dy.C,
                             own.V + p * own.v_plane + c, x.C, count);
}

// dw[o] [C, 3, 3] <- G^T m G of the sums m of all threads.
template <class Store>
void transform_sums(const float *memory, int64_t together, int64_t C, int64_t O, int64_t o, int threads, Store put) {
    for (int64_t c = 0; c < C; c += LANES) {
        Vector sums[POINTS]{}, taps[9];
        for (int64_t part = 0; part < threads; part++) {
            const Own own(const_cast<float *>(memory), part, together, C, O);
            const float *at = own.sums + c / PANEL * PANEL * O + o * PANEL + c % PANEL;
            for (int p = 0; p < POINTS; p++) sums[p] += load(at + p * own.plane, LANES);
        }
        transform(G_T, sums, taps);
        for (int i = 0; i < 9; i++)
            for (int k = 0; k < LANES; k++) put(c + k, i / 3, i % 3, taps[i][k]);
    }
}

}  // namespace

extern "C" {

// dw [O, C, 3, 3] with any strides and db [O] <- the gradients of the weight and of the bias that take x [B, H, W, C]
// to y [B, H, W, O], zeros around x. Strides of images and rows of dy and x are any. `memory` has room for
// 36 (C O + together (C + O) + 3 MARGIN) + max(C, O) values a thread.
void latentcodec_weight_gradient(float *dw, int64_t o_stride, int64_t c_stride, int64_t row_stride,
                                 int64_t column_stride, float *db, const float *dy, int64_t dy_image_stride,
                                 int64_t dy_row_stride, const float *x, int64_t x_image_stride, int64_t x_row_stride,
                                 int64_t B, int64_t H, int64_t W, int64_t C, int64_t O, int64_t together,
                                 float *memory, int threads) {
    const Map from{const_cast<float *>(x), x_image_stride, x_row_stride, B, H, W, C};
    const Map result{const_cast<float *>(dy), dy_image_stride, dy_row_stride, B, H, W, O};
    const Tiling tiling{(H + 3) / 4, (W + 3) / 4};
    const int64_t tiles = B * tiling.rows * tiling.columns;
    std::vector<double> pixels(threads * O);
    in_parallel(threads, threads, [&](int64_t part) {
        const Own own(memory, part, together, C, O);
        std::memset(own.sums, 0, POINTS * own.plane * sizeof(float));
        std::memset(own.zeros, 0, std::max(C, O) * sizeof(float));
        const int64_t end = (part + 1) * tiles / threads;
        for (int64_t first = part * tiles / threads; first < end; first += together)
            add_tiles(own, pixels.data() + part * O, result, from, tiling, first, std::min(together, end - first));
    });
    in_parallel(threads, O, [&](int64_t o) {
        transform_sums(memory, together, C, O, o, threads, [&](int64_t c, int64_t row, int64_t column, float value) {
            dw[o * o_stride + c * c_stride + row * row_stride + column * column_stride] = value;
        });
        double sum = 0;
        for (int64_t part = 0; part < threads; part++) sum += pixels[part * O + o];
        db[o] = (float)sum;
    });
}
}
