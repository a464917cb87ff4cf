// Memory that is copied or summed without a look at what its values mean, for every type of them.
//
// Shapes: B batch, r rows and W columns of a strip, C channels.

#include "vector.h"

extern "C" {

// out [B, r + 1, (W + 1) C] dense <- strip [B, r, W C], the first row at below or zeros, and zeros right of them. Sizes
// and strides are in bytes: `pixel` is that of C values, `row` that of W C values.
void latentcodec_halving_window(int64_t pixel, void *out, const void *strip, int64_t image_stride, int64_t row_stride,
                                const void *below, int64_t below_stride, int64_t B, int64_t r, int64_t row,
                                int threads) {
    in_parallel(threads, B * (r + 1), [&](int64_t index) {
        int64_t b = index / (r + 1), i = index % (r + 1);
        const char *from = i < r ? (const char *)strip + b * image_stride + i * row_stride
                                 : below ? (const char *)below + b * below_stride : nullptr;
        char *to = (char *)out + index * (row + pixel);
        if (from)
            std::memcpy(to, from, row);
        else
            std::memset(to, 0, row);
        std::memset(to + row, 0, pixel);
    });
}

// sum <- the sum of what lies at every table[3 i] + 4 j table[3 i + 1] as integers, j < table[3 i + 2]: values from all
// over some weights.
void latentcodec_checksum(int64_t count, const int64_t *table, int64_t *sum) {
    uint64_t total = 0;
    for (int64_t i = 0; i < count; i++, table += 3) {
        const char *at = (const char *)table[0];
        for (int64_t j = 0; j < table[2]; j++, at += 4 * table[1]) {
            uint32_t value;
            std::memcpy(&value, at, 4);
            total = total * 31 + value;
        }
    }
    *sum = (int64_t)total;
}
}
