// Where a sublayer's answer y joins what it was given, x: t = x + dropout(y), then perhaps a norm of t. Rows are tokens.
#include <cmath>
#include <omp.h>

#include "vectors.h"

template <class T>
static void forward(int64_t rows, int64_t width, const float* x, const T* y, Dropout dropout, bool drops, const float* weight, const float* bias, float eps, bool centred,
                    float* total, float* out, T* copy, float* mean, float* inverse) {
#pragma omp parallel for schedule(static) if (rows * width > ALONE)
    for (int64_t row = 0; row < rows; row++) {
        const int64_t at = row * width;
        float* t = total ? total + at : out + at;
        const float* read = x + at;
        Vec added = {};
        if (y) {
            for (int64_t i = 0; i < width; i += LANES) {
                Vec own = load(y + at + i, width - i);
                if (drops) own *= Dropout::factors(at + i, dropout);
                Vec both = load(x + at + i, width - i) + own;
                store(t + i, both, width - i);
                added += both;
            }
            read = t;
        } else if (weight && centred) {
            for (int64_t i = 0; i < width; i += LANES) added += load(read + i, width - i);
        }
        if (!weight) continue;
        const float middle = centred ? sum(added) / width : 0;
        Vec squares = {};
        for (int64_t i = 0; i < width; i += LANES) {
            Vec apart = load(read + i, width - i) - middle;
            if (width - i < LANES)
                for (int64_t lane = width - i; lane < LANES; lane++) apart[lane] = 0;
            squares += apart * apart;
        }
        const float scale = 1 / std::sqrt(sum(squares) / width + eps);
        if (mean) mean[row] = middle, inverse[row] = scale;
        for (int64_t i = 0; i < width; i += LANES) {
            Vec normed = (load(read + i, width - i) - middle) * scale * load(weight + i, width - i);
            if (bias) normed += load(bias + i, width - i);
            if (out) store(out + at + i, normed, width - i);
            if (copy) store(copy + at + i, normed, width - i);
        }
    }
}

// From the gradients of t itself, of the norm and of its copy (each may be missing) to those of x and y.
template <class T>
static void backward(int64_t rows, int64_t width, const float* d_total, const float* d_out, const T* d_copy, const float* total, const float* mean, const float* inverse, const float* weight, bool centred,
                     Dropout dropout, bool drops, float* d_x, T* d_y, float* d_weight, float* d_bias) {
    const int threads = rows * width > ALONE ? omp_get_max_threads() : 1;
    const ThreadSums sums(width, threads, d_weight || d_bias);
#pragma omp parallel num_threads(threads)
    {
        float *of_weight = sums.of(0, omp_get_thread_num()), *of_bias = sums.of(1, omp_get_thread_num());
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const int64_t at = row * width;
            auto of_normed = [&](int64_t i) __attribute__((always_inline)) {
                Vec d = d_out ? load(d_out + at + i, width - i) : Vec{};
                return d_copy ? d + load(d_copy + at + i, width - i) : d;
            };
            float along_all = 0, along_own = 0;
            if (weight) {
                Vec all_sum = {}, own_sum = {};
                for (int64_t i = 0; i < width; i += LANES) {
                    Vec d = of_normed(i), normed = (load(total + at + i, width - i) - mean[row]) * inverse[row];
                    if (of_weight) {
                        store(of_weight + i, load(of_weight + i) + d * normed);
                        store(of_bias + i, load(of_bias + i) + d);
                    }
                    d *= load(weight + i, width - i);
                    all_sum += d;
                    own_sum += d * normed;
                }
                along_all = centred ? sum(all_sum) / width : 0;
                along_own = sum(own_sum) / width;
            }
            if (!d_x && !d_y) continue;
            for (int64_t i = 0; i < width; i += LANES) {
                Vec d = d_total ? load(d_total + at + i, width - i) : Vec{};
                if (weight) {
                    Vec normed = (load(total + at + i, width - i) - mean[row]) * inverse[row];
                    d += (of_normed(i) * load(weight + i, width - i) - along_all - normed * along_own) * inverse[row];
                } else {
                    d += of_normed(i);
                }
                if (d_x) store(d_x + at + i, d, width - i);
                if (d_y) store(d_y + at + i, drops ? d * Dropout::factors(at + i, dropout) : d, width - i);
            }
        }
    }
    sums.give(d_weight, d_bias);
}

#define JOIN(T, NAME)                                                                                                                                                                                   \
    extern "C" void join_forward_##NAME(int64_t rows, int64_t width, const float* x, const T* y, const uint32_t* seeds, double p, const float* weight, const float* bias, double eps, int64_t centred, \
                                        float* total, float* out, T* copy, float* mean, float* inverse) {                                                                                              \
        forward<T>(rows, width, x, y, Dropout::of(seeds, p), seeds, weight, bias, eps, centred, total, out, copy, mean, inverse);                                                                      \
    }                                                                                                                                                                                                   \
    extern "C" void join_backward_##NAME(int64_t rows, int64_t width, const float* d_total, const float* d_out, const T* d_copy, const float* total, const float* mean, const float* inverse,           \
                                         const float* weight, int64_t centred, const uint32_t* seeds, double p, float* d_x, T* d_y, float* d_weight, float* d_bias) {                                  \
        backward<T>(rows, width, d_total, d_out, d_copy, total, mean, inverse, weight, centred, Dropout::of(seeds, p), seeds, d_x, d_y, d_weight, d_bias);                                             \
    }
JOIN(float, float32)
JOIN(bf16, bfloat16)
