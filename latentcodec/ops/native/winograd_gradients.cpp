// The adjoints of the transforms in `winograd.cpp`, for the gradient of the weight.

#include "winograd.h"

extern "C" {

// The adjoint of latentcodec_winograd_output: [P^2, T, O] <- A dy A^T of dy [B, H, W, O].
void latentcodec_winograd_output_gradient(int outputs, int doubles, float *products, const float *dy,
                                          int64_t image_stride, int64_t row_stride, int64_t B, int64_t H, int64_t W,
                                          int64_t O, int64_t tile_rows, int64_t tile_columns, int threads) {
    Map map{const_cast<float *>(dy), image_stride, row_stride, B, H, W, O};
    with_kind(outputs, doubles, [&](auto kind) {
        transform_tiles<kind.outputs>(kind.output.transposed(), products, map, {tile_rows, tile_columns}, 0, 0,
                                      threads);
    });
}

// The adjoint of latentcodec_winograd_weight: dw [C, 9, O] <- G^T dU G of dU [P^2, C, O].
void latentcodec_winograd_weight_gradient(int outputs, int doubles, float *dw, const float *dU, int64_t O, int64_t C,
                                          int threads) {
    with_kind(outputs, doubles, [&](auto kind) {
        constexpr auto matrix = kind.weight.transposed();
        constexpr int P = sizeof matrix.at[0] / sizeof(float);
        in_parallel(threads, C, [&](int64_t c) {
            for (int64_t o = 0; o < O; o += LANES) {
                Vector gradients[P * P], taps[9];
                for (int p = 0; p < P * P; p++) gradients[p] = load(dU + (p * C + c) * O + o, O - o);
                transform(matrix, gradients, taps);
                for (int i = 0; i < 9; i++) store(dw + (c * 9 + i) * O + o, taps[i], O - o);
            }
        });
    });
}
}
