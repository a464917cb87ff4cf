// Normalisation, statistics and their gradients on strips, for float32 and bfloat16: `ops/pointwise.py` in native code.
//
// Every function reads its maps once. Work is shared out by pieces of rows, so that one image of few rows keeps all
// threads busy; sums are added up piece by piece in one order, so that a thread count gives one result.
//
// Shapes: B batch, r rows and W columns of a strip, C channels. A strip is [B, r, W, C] with dense rows; the strides of
// its images and rows are given in values. scale, shift, mean, pivot are [B, C] float32; sums are [2, B, C] float64.

#include <vector>

#include "vector.h"

namespace {

constexpr int64_t PIECE = 8192;            // values that a thread takes at a time
constexpr float SMALLEST_LENGTH = 1e-12f;  // of a pixel, that it is divided by: as torch's `normalize`

template <class T>
struct Strip {
    T *values;
    int64_t image_stride, row_stride;

    T *row(int64_t image, int64_t row) const { return values + image * image_stride + row * row_stride; }
};

// Row `row` of image `image` from pixel `first` on, `pixels` of them.
struct Piece {
    int64_t image, row, first, pixels;
};

// The rows of B images of r x W pixels, cut into pieces.
struct Pieces {
    int64_t rows, columns, per_row, length, count;

    Pieces(int64_t images, int64_t rows, int64_t columns, int64_t channels) : rows(rows), columns(columns) {
        length = std::max<int64_t>(1, PIECE / channels);
        per_row = (columns + length - 1) / length;
        count = images * rows * per_row;
    }

    Piece operator[](int64_t index) const {
        int64_t line = index / per_row, first = index % per_row * length;
        return {line / rows, line % rows, first, std::min(length, columns - first)};
    }
};

template <class T>
void normalise(T *out, const T *x, int64_t pixels, int64_t channels, const float *scale, const float *shift,
               bool activates) {
    for (int64_t i = 0; i < pixels; i++, out += channels, x += channels)
        for (int64_t c = 0; c < channels; c += LANES) {
            int64_t left = channels - c;
            Vector y = load(x + c, left) * load(scale + c, left) + load(shift + c, left);
            store(out + c, activates ? silu(y) : y, left);
        }
}

// Each pixel by its own length over the channels, times gain [C], and SiLU where it activates.
template <class T>
void rms_normalise(T *out, const T *x, int64_t pixels, int64_t channels, const float *gain, bool activates) {
    for (int64_t i = 0; i < pixels; i++, out += channels, x += channels) {
        Vector squares{};
        for (int64_t c = 0; c < channels; c += LANES) {
            Vector value = load(x + c, channels - c);
            squares += value * value;
        }
        float square = 0;
        for (int k = 0; k < LANES; k++) square += squares[k];
        float length = __builtin_sqrtf(square), inverse = 1 / (length < SMALLEST_LENGTH ? SMALLEST_LENGTH : length);
        for (int64_t c = 0; c < channels; c += LANES) {
            int64_t left = channels - c;
            Vector y = load(x + c, left) * inverse * load(gain + c, left);
            store(out + c, activates ? silu(y) : y, left);
        }
    }
}

// sums [2, C] of one image += f(c, i, left): two values of every channel c at each of `pixels` pixels i.
template <class Function>
void add_up(double *sums, double *squares, int64_t pixels, int64_t channels, Function function) {
    constexpr int64_t TOGETHER = 256;  // pixels added in float32 before they are added in float64
    for (int64_t c = 0; c < channels; c += LANES) {
        int64_t left = std::min<int64_t>(LANES, channels - c);
        for (int64_t start = 0; start < pixels; start += TOGETHER) {
            Vector first{}, second{};
            for (int64_t i = start; i < std::min(pixels, start + TOGETHER); i++) function(c, i, left, first, second);
            for (int64_t k = 0; k < left; k++) sums[c + k] += first[k], squares[c + k] += second[k];
        }
    }
}

// sums [2, B, C] += what body(piece, sums of its image, squares of its image) adds, thread by thread.
template <class Body>
void add_up_in_parallel(double *sums, int64_t images, int64_t channels, const Pieces &pieces, int threads, Body body) {
    int64_t size = 2 * images * channels, parts = std::min<int64_t>(threads, pieces.count);
    std::vector<double> partial(parts * size);
    in_parallel(threads, parts, [&](int64_t part) {
        double *own = partial.data() + part * size;
        for (int64_t i = part * pieces.count / parts; i < (part + 1) * pieces.count / parts; i++) {
            double *of_image = own + pieces[i].image * channels;
            body(pieces[i], of_image, of_image + images * channels);
        }
    });
    for (int64_t part = 0; part < parts; part++)
        for (int64_t i = 0; i < size; i++) sums[i] += partial[part * size + i];
}

// What is done to the pixels of a window on the way: a copy of them, a group norm, or each pixel's own.
enum Norm { COPY, GROUP_NORM, RMS_NORM };

// For GROUP_NORM scale and shift are [B, C]; for RMS_NORM scale is the gain [C], and there is no shift.
template <class T>
void window(Strip<T> out, Strip<const T> above, Strip<const T> strip, Strip<const T> below, int64_t B, int64_t r,
            int64_t W, int64_t C, Norm norm, const float *scale, const float *shift, bool activates, int threads) {
    Pieces pieces(B, r + 2, W, C);
    in_parallel(threads, pieces.count, [&](int64_t index) {
        Piece p = pieces[index];
        bool is_inside = p.row > 0 && p.row <= r;
        const Strip<const T> &from = is_inside ? strip : p.row ? below : above;
        T *to = out.row(p.image, p.row) + p.first * C;
        if (!from.values) {
            std::memset((void *)to, 0, p.pixels * C * sizeof(T));
            return;
        }
        const T *x = from.row(p.image, is_inside ? p.row - 1 : 0) + p.first * C;
        if (norm == GROUP_NORM)
            normalise(to, x, p.pixels, C, scale + p.image * C, shift + p.image * C, activates);
        else if (norm == RMS_NORM)
            rms_normalise(to, x, p.pixels, C, scale, activates);
        else
            std::memcpy((void *)to, (const void *)x, p.pixels * C * sizeof(T));
    });
}

template <class T>
void add_moments(double *sums, const float *pivot, Strip<const T> x, int64_t B, int64_t r, int64_t W, int64_t C,
                 int threads) {
    Pieces pieces(B, r, W, C);
    add_up_in_parallel(sums, B, C, pieces, threads, [&](Piece p, double *first, double *second) {
        const T *from = x.row(p.image, p.row) + p.first * C;
        const float *origin = pivot + p.image * C;
        add_up(first, second, p.pixels, C, [=](int64_t c, int64_t i, int64_t left, Vector &sum, Vector &square) {
            Vector distance = load(from + i * C + c, left) - load(origin + c, left);
            sum += distance;
            square += distance * distance;
        });
    });
}

// sums [2, B, C] <- 0, pivot [B, C] <- the mean of the first row of x.
template <class T>
void begin_moments(double *sums, float *pivot, Strip<const T> x, int64_t B, int64_t W, int64_t C) {
    std::fill(sums, sums + 2 * B * C, 0.0);
    for (int64_t b = 0; b < B; b++)
        for (int64_t c = 0; c < C; c += LANES) {
            Vector sum{};
            for (int64_t i = 0; i < W; i++) sum += load(x.row(b, 0) + i * C + c, C - c);
            store(pivot + b * C + c, sum / (float)W, C - c);
        }
}

template <class T>
void gradient_sums(double *sums, const T *dy, const T *x, int64_t B, int64_t n, int64_t C, const float *scale,
                   const float *shift, const float *mean, int threads) {
    Pieces pieces(B, 1, n, C);
    add_up_in_parallel(sums, B, C, pieces, threads, [&](Piece p, double *first, double *second) {
        int64_t at = (p.image * n + p.first) * C;
        const float *a = scale + p.image * C, *b = shift + p.image * C, *m = mean + p.image * C;
        add_up(first, second, p.pixels, C, [=](int64_t c, int64_t i, int64_t left, Vector &sum, Vector &product) {
            Vector value = load(x + at + i * C + c, left);
            Vector g = load(dy + at + i * C + c, left) * silu_slope(load(a + c, left) * value + load(b + c, left));
            sum += g;
            product += g * (value - load(m + c, left));
        });
    });
}

template <class T>
void gradient(T *dx, const T *dy, const T *x, int64_t B, int64_t n, int64_t C, const float *known, int threads) {
    const int64_t size = B * C;  // known [5, B, C]: scale, shift, mean, a, b
    Pieces pieces(B, 1, n, C);
    in_parallel(threads, pieces.count, [&](int64_t index) {
        Piece p = pieces[index];
        const float *of_image = known + p.image * C;
        for (int64_t i = 0; i < p.pixels; i++) {
            int64_t at = (p.image * n + p.first + i) * C;
            for (int64_t c = 0; c < C; c += LANES) {
                int64_t left = C - c;
                auto given = [&](int which) { return load(of_image + which * size + c, left); };
                Vector value = load(x + at + c, left), scale = given(0);
                Vector g = load(dy + at + c, left) * silu_slope(scale * value + given(1));
                store(dx + at + c, scale * g + given(3) + given(4) * (value - given(2)), left);
            }
        }
    });
}

}  // namespace

// ---- what Python calls: `half` says whether maps are bfloat16

extern "C" {

// out [B, r + 2, W, C] dense <- the first row at above, strip and the first row at below, each scale x + shift and then
// SiLU where it activates; null for a neighbour gives zeros, a null scale copies. Without a shift, scale is the gain [C]
// of a norm by the root mean square.
void latentcodec_window(int half, void *out, const void *above, int64_t above_stride, const void *strip,
                        int64_t image_stride, int64_t row_stride, const void *below, int64_t below_stride, int64_t B,
                        int64_t r, int64_t W, int64_t C, const float *scale, const float *shift, int activates,
                        int threads) {
    auto run = [&](auto type) {
        using T = decltype(type);
        window<T>({(T *)out, (r + 2) * W * C, W * C}, {(const T *)above, above_stride, 0},
                  {(const T *)strip, image_stride, row_stride}, {(const T *)below, below_stride, 0}, B, r, W, C,
                  !scale ? COPY : shift ? GROUP_NORM : RMS_NORM, scale, shift, activates, threads);
    };
    half ? run(bfloat16{}) : run(float{});
}

// out [B, n, C] <- x [B, n, C] in the same way, both dense.
void latentcodec_normalise(int half, void *out, const void *x, int64_t B, int64_t n, int64_t C, const float *scale,
                           const float *shift, int activates, int threads) {
    auto run = [&](auto type) {
        using T = decltype(type);
        Pieces pieces(B, 1, n, C);
        in_parallel(threads, pieces.count, [&](int64_t index) {
            Piece p = pieces[index];
            int64_t at = (p.image * n + p.first) * C;
            if (shift)
                normalise((T *)out + at, (const T *)x + at, p.pixels, C, scale + p.image * C, shift + p.image * C,
                          activates);
            else
                rms_normalise((T *)out + at, (const T *)x + at, p.pixels, C, scale, activates);
        });
    };
    half ? run(bfloat16{}) : run(float{});
}

// sums += those of x - pivot and of its square, for x [B, r, W, C]. Where x `is_first`, sums become zero before that,
// and pivot the mean of its first row.
void latentcodec_add_moments(int half, int is_first, double *sums, float *pivot, const void *x, int64_t image_stride,
                             int64_t row_stride, int64_t B, int64_t r, int64_t W, int64_t C, int threads) {
    auto run = [&](auto type) {
        using T = decltype(type);
        if (is_first) begin_moments<T>(sums, pivot, {(const T *)x, image_stride, row_stride}, B, W, C);
        add_moments<T>(sums, pivot, {(const T *)x, image_stride, row_stride}, B, r, W, C, threads);
    };
    half ? run(bfloat16{}) : run(float{});
}

// Group norm with weight and bias [C] of a map of n pixels whose moments are known, as scale and shift; also mean and
// 1 / deviation of each group, [B, groups] float64.
void latentcodec_norm(float *scale, float *shift, double *mean, double *inverse, const double *sums,
                      const float *pivot, const float *weight, const float *bias, int64_t B, int64_t C, int64_t groups,
                      int64_t n, double epsilon) {
    int64_t members = C / groups;
    for (int64_t group = 0; group < B * groups; group++) {
        int64_t first = group * members;  // in [B, C]
        double average = 0, variance = 0;
        for (int64_t i = first; i < first + members; i++) average += (pivot[i] + sums[i] / n) / members;
        for (int64_t i = first; i < first + members; i++) {
            double distance = sums[i] / n, off = pivot[i] + distance - average;
            variance += (sums[B * C + i] / n - distance * distance + off * off) / members;
        }
        mean[group] = average;
        inverse[group] = 1 / __builtin_sqrt(variance + epsilon);
        for (int64_t i = first; i < first + members; i++) {
            double slope = weight[i % C] * inverse[group];
            scale[i] = (float)slope;
            shift[i] = (float)(bias[i % C] - average * slope);
        }
    }
}

// sums += those of g and g (x - mean), with g = dy SiLU'(scale x + shift); dy, x [B, n, C] dense.
void latentcodec_gradient_sums(int half, double *sums, const void *dy, const void *x, int64_t B, int64_t n, int64_t C,
                               const float *scale, const float *shift, const float *mean, int threads) {
    auto run = [&](auto type) {
        using T = decltype(type);
        gradient_sums(sums, (const T *)dy, (const T *)x, B, n, C, scale, shift, mean, threads);
    };
    half ? run(bfloat16{}) : run(float{});
}

// dx <- scale g + a + b (x - mean); known [5, B, C] holds scale, shift, mean, a, b.
void latentcodec_gradient(int half, void *dx, const void *dy, const void *x, int64_t B, int64_t n, int64_t C,
                          const float *known, int threads) {
    auto run = [&](auto type) {
        using T = decltype(type);
        gradient((T *)dx, (const T *)dy, (const T *)x, B, n, C, known, threads);
    };
    half ? run(bfloat16{}) : run(float{});
}
}
