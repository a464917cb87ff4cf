// The direct convolution of float32 maps: the pixels that a result sees are laid side by side, some results at a time,
// and multiplied by the weight while they are in the cache.
//
// For layers that Winograd's forms do not suit (other strides and sizes, few channels); where k k C is large, oneDNN's
// convolution is faster. A weight is packed as [ceil(O / PANEL), k k C, PANEL], with zeros for outputs that are missing.

#include "panels.h"

namespace {

// A few values; `memcpy` of a size that is not known takes longer.
inline void copy(float *to, const float *from, int64_t count) {
    for (; count >= LANES; count -= LANES, to += LANES, from += LANES) store(to, load(from, LANES), LANES);
    if (LANES > 8 && count & 8) std::memcpy(to, from, 32), to += 8, from += 8;
    if (LANES > 4 && count & 4) std::memcpy(to, from, 16), to += 4, from += 4;
    if (count & 2) std::memcpy(to, from, 8), to += 2, from += 2;
    if (count & 1) *to = *from;
}

// v [k k C] <- what the result at (row, column) of image b sees; zeros left and right of the map.
void gather(float *v, const Map &x, int64_t b, int64_t row, int64_t column, int64_t k) {
    for (int64_t i = 0; i < k; i++, v += k * x.C) {
        int64_t before = std::max<int64_t>(0, -column), after = std::max<int64_t>(0, column + k - x.W);
        if (before) std::memset(v, 0, before * x.C * sizeof(float));
        if (after) std::memset(v + (k - after) * x.C, 0, after * x.C * sizeof(float));
        copy(v + before * x.C, x.at(b, row + i, column + before), (k - before - after) * x.C);
    }
}

// y [C] <- m + bias + added.
void finish(float *y, const float *m, const float *bias, const float *added, int64_t C) {
    for (int64_t c = 0; c < C; c += LANES) {
        int64_t left = C - c;
        if (left < LANES) {
            for (; c < C; c++) y[c] = m[c] + (bias ? bias[c] : 0) + (added ? added[c] : 0);
            return;
        }
        Vector value = load(m + c, LANES);
        if (bias) value += load(bias + c, LANES);
        if (added) value += load(added + c, LANES);
        store(y + c, value, LANES);
    }
}

}  // namespace

extern "C" {

// y [B, H', W', O] dense <- x [B, H, W, C] convolved with a packed weight of k x k taps, + bias [O] and added
// [B, H', W', O] where they are given; `columns` zeros are left of x, and as many as needed right of it. `memory` has
// room for together' (k k C + O') values a thread, together' and O' being `together` rounded up to 14 and O to PANEL.
void latentcodec_convolve(float *y, const float *x, int64_t x_image_stride, int64_t x_row_stride, int64_t B, int64_t H,
                          int64_t W, int64_t C, int64_t y_rows, int64_t y_columns, int64_t O, int64_t k,
                          int64_t stride, int64_t columns, const float *weight, const float *bias, const float *added,
                          int64_t added_image_stride, int64_t added_row_stride, int64_t together, float *memory,
                          int threads) {
    const Map from{const_cast<float *>(x), x_image_stride, x_row_stride, B, H, W, C};
    const Map residual{const_cast<float *>(added), added_image_stride, added_row_stride, B, y_rows, y_columns, O};
    const int64_t seen = k * k * C, padded = (O + PANEL - 1) / PANEL * PANEL, results = B * y_rows * y_columns;
    const int64_t rows = whole_rows(together), own = rows * (seen + padded);
    in_parallel(threads, (results + together - 1) / together, [&](int64_t index) {
        float *V = memory + omp_get_thread_num() * own, *products = V + rows * seen;
        const int64_t first = index * together, count = std::min(together, results - first);
        auto image = [&](int64_t r) { return (first + r) / y_columns / y_rows; };
        auto row = [&](int64_t r) { return (first + r) / y_columns % y_rows; };
        auto column = [&](int64_t r) { return (first + r) % y_columns; };
        for (int64_t r = 0; r < count; r++)
            gather(V + r * seen, from, image(r), row(r) * stride, column(r) * stride - columns, k);
        for (int64_t o = 0; o < padded; o += PANEL)
            for (int64_t r = 0; r < count; r += ROWS) {
                float *m = products + r * padded + o;
                if (O - o > LANES)
                    multiply_panel(m, padded, V + r * seen, weight + o * seen, seen);
                else
                    multiply_panel<1>(m, padded, V + r * seen, weight + o * seen, seen);
            }
        for (int64_t r = 0; r < count; r++)
            finish(y + (first + r) * O, products + r * padded, bias,
                   added ? residual.at(image(r), row(r), column(r)) : nullptr, O);
    });
}
}
