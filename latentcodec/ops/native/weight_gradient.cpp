// The gradient of a 3x3 convolution's weight, float32, from the map x that it saw and the gradient dy of its result: by
// Winograd's F(4x4, 3x3) read backwards, with a quarter of the multiplications of the direct sum. The matrices are in
// `winograd.h`.
//
//     dw = G^T [ sum over tiles of (A dy A^T) (B^T d B) ] G     for every output and input channel
//
// A thread has a run of tiles and sums of its own, to which some tiles at a time are added; then the sums of all
// threads are added up in their order, so that a number of threads has one result, to the last bit. The gradient of the
// bias is added up on the way.
//
// Where x was doubled before it was convolved, dy has twice its rows and columns, and tiles d are read before doubling.
//
// Shapes: B batch, H W rows and columns of dy, C channels, O output channels, both multiples of PANEL, P points on an
// axis (6; doubled 5). x is [B, H', W', C], dy [B, H, W, O]. Sums are P^2 planes [C / PANEL, O, PANEL], MARGIN values
// apart.

#include <vector>

#include "winograd.h"

namespace {

template <class Kind>
constexpr auto A = Kind::output.transposed();
template <class Kind>
constexpr auto G_T = Kind::weight.transposed();
template <class Kind>
constexpr int PRODUCTS = sizeof A<Kind>.at / sizeof A<Kind>.at[0] * (sizeof A<Kind>.at / sizeof A<Kind>.at[0]);

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

    Own(float *memory, int64_t part, int64_t products, int64_t together, int64_t C, int64_t O) {
        plane = C * O + MARGIN, v_plane = together * C + MARGIN, d_plane = together * O + MARGIN;
        sums = memory + part * (products * (plane + v_plane + d_plane) + std::max(C, O));
        V = sums + products * plane, D = V + products * v_plane, zeros = D + products * d_plane;
    }
};

// The sums of one thread += what tiles `first` to `first + count` give; pixels [O] likewise.
template <class Kind>
void add_tiles(const Own &own, double *pixels, const Map &dy, const Map &x, Tiling tiling, int64_t first,
               int64_t count) {
    for (int64_t t = 0; t < count; t++) {
        const int64_t image = tiling.image(first + t), i = tiling.row(first + t), j = tiling.column(first + t);
        transform_tile<Kind::input>(own.V + t * x.C, own.v_plane, x, image, i * Kind::step - 1, j * Kind::step - 1,
                                    own.zeros);
        transform_tile<A<Kind>>(own.D + t * dy.C, own.d_plane, dy, image, i * 4, j * 4, own.zeros);
        add_pixels(pixels, dy, image, i * 4, j * 4);
    }
    for (int p = 0; p < PRODUCTS<Kind>; p++)
        for (int64_t c = 0; c < x.C; c += PANEL)
            for (int64_t o = 0; o < dy.C; o += OUTPUTS)
                add_products(own.sums + p * own.plane + c * dy.C + o * PANEL, own.D + p * own.d_plane + o, dy.C,
                             own.V + p * own.v_plane + c, x.C, count);
}

// dw[o] [C, 3, 3] <- G^T m G of the sums m of all threads.
template <class Kind, class Store>
void transform_sums(const float *memory, int64_t together, int64_t C, int64_t O, int64_t o, int threads, Store put) {
    for (int64_t c = 0; c < C; c += LANES) {
        Vector sums[PRODUCTS<Kind>]{}, taps[9];
        for (int64_t part = 0; part < threads; part++) {
            const Own own(const_cast<float *>(memory), part, PRODUCTS<Kind>, together, C, O);
            const float *at = own.sums + c / PANEL * PANEL * O + o * PANEL + c % PANEL;
            for (int p = 0; p < PRODUCTS<Kind>; p++) sums[p] += load(at + p * own.plane, LANES);
        }
        transform(G_T<Kind>, sums, taps);
        for (int i = 0; i < 9; i++)
            for (int k = 0; k < LANES; k++) put(c + k, i / 3, i % 3, taps[i][k]);
    }
}

// dw [O, C, 3, 3] with strides [4] and db [O] <- the gradients.
template <class Kind>
void weight_gradient(float *dw, const int64_t *strides, float *db, const Map &dy, const Map &x, int64_t together,
                     float *memory, int threads) {
    const Tiling tiling{(dy.H + 3) / 4, (dy.W + 3) / 4};
    const int64_t tiles = dy.B * tiling.rows * tiling.columns, C = x.C, O = dy.C;
    std::vector<double> pixels(threads * O);
    in_parallel(threads, threads, [&](int64_t part) {
        const Own own(memory, part, PRODUCTS<Kind>, together, C, O);
        std::memset(own.sums, 0, PRODUCTS<Kind> * own.plane * sizeof(float));
        std::memset(own.zeros, 0, std::max(C, O) * sizeof(float));
        const int64_t end = (part + 1) * tiles / threads;
        for (int64_t first = part * tiles / threads; first < end; first += together)
            add_tiles<Kind>(own, pixels.data() + part * O, dy, x, tiling, first, std::min(together, end - first));
    });
    in_parallel(threads, O, [&](int64_t o) {
        float *to = dw + o * strides[0];
        transform_sums<Kind>(memory, together, C, O, o, threads, [&](int64_t c, int row, int column, float value) {
            to[c * strides[1] + row * strides[2] + column * strides[3]] = value;
        });
        double sum = 0;
        for (int64_t part = 0; part < threads; part++) sum += pixels[part * O + o];
        db[o] = (float)sum;
    });
}

}  // namespace

extern "C" {

// dw [O, C, 3, 3] with any strides and db [O] <- the gradients of the weight and of the bias that take x [B, H', W', C]
// to y [B, H, W, O], zeros around x, which is doubled first where `doubles` says so. Images and rows of dy and x may have
// any strides. `memory` has room for P^2 (C O + together (C + O) + 3 MARGIN) + max(C, O) values a thread.
void latentcodec_weight_gradient(int doubles, float *dw, int64_t o_stride, int64_t c_stride, int64_t row_stride,
                                 int64_t column_stride, float *db, const float *dy, int64_t dy_image_stride,
                                 int64_t dy_row_stride, const float *x, int64_t x_image_stride, int64_t x_row_stride,
                                 int64_t B, int64_t x_rows, int64_t x_columns, int64_t C, int64_t O,
                                 int64_t together, float *memory, int threads) {
    const int64_t times = doubles ? 2 : 1, strides[] = {o_stride, c_stride, row_stride, column_stride};
    const Map from{const_cast<float *>(x), x_image_stride, x_row_stride, B, x_rows, x_columns, C};
    const Map result{const_cast<float *>(dy), dy_image_stride, dy_row_stride, B, x_rows * times, x_columns * times, O};
    const auto run = doubles ? weight_gradient<Doubled4> : weight_gradient<Plain4>;
    run(dw, strides, db, result, from, together, memory, threads);
}
}
