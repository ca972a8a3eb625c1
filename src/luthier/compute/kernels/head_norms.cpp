// Norms by root mean squares of each head's queries and keys, where they lie beside the values: (tokens, (heads + 2 groups) width).
#include <cmath>
#include <omp.h>

#include "vectors.h"

template <class T>
static void forward(int64_t tokens, int64_t heads, int64_t groups, int64_t width, const T* x, const float* of_queries, const float* of_keys, float eps, T* y, float* inverse) {
    const int64_t normed = heads + groups, all = normed + groups;
#pragma omp parallel for schedule(static) if (tokens * all * width > ALONE)
    for (int64_t token = 0; token < tokens; token++) {
        for (int64_t head = 0; head < normed; head++) {
            const int64_t at = (token * all + head) * width;
            const float* weight = head < heads ? of_queries : of_keys;
            Vec squares = {};
            for (int64_t i = 0; i < width; i += LANES) {
                const Vec own = load(x + at + i, width - i);
                squares += own * own;
            }
            const float scale = 1 / std::sqrt(sum(squares) / width + eps);
            if (inverse) inverse[token * normed + head] = scale;
            for (int64_t i = 0; i < width; i += LANES) store(y + at + i, load(x + at + i, width - i) * scale * load(weight + i, width - i), width - i);
        }
        const int64_t values = (token * all + normed) * width;
        memcpy(y + values, x + values, groups * width * sizeof(T));
    }
}

// From the gradient of y to those of x and of both weights (each may be missing).
template <class T>
static void backward(int64_t tokens, int64_t heads, int64_t groups, int64_t width, const T* d, const T* x, const float* inverse, const float* of_queries, const float* of_keys, T* d_x, float* d_of_queries,
                     float* d_of_keys) {
    const int64_t normed = heads + groups, all = normed + groups;
    const int threads = tokens * all * width > ALONE ? omp_get_max_threads() : 1;
    const ThreadSums sums(width, threads, d_of_queries || d_of_keys);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < tokens; token++) {
            for (int64_t head = 0; head < normed; head++) {
                const int64_t at = (token * all + head) * width;
                const float *weight = head < heads ? of_queries : of_keys, scale = inverse[token * normed + head];
                float* of_weight = sums.of(head < heads ? 0 : 1, omp_get_thread_num());
                Vec along = {};
                for (int64_t i = 0; i < width; i += LANES) {
                    const Vec slope = load(d + at + i, width - i), own = load(x + at + i, width - i) * scale;
                    if (of_weight) store(of_weight + i, load(of_weight + i) + slope * own);
                    along += slope * load(weight + i, width - i) * own;
                }
                const float mean = sum(along) / width;
                for (int64_t i = 0; i < width && d_x; i += LANES)
                    store(d_x + at + i, (load(d + at + i, width - i) * load(weight + i, width - i) - load(x + at + i, width - i) * scale * mean) * scale, width - i);
            }
            const int64_t values = (token * all + normed) * width;
            if (d_x) memcpy(d_x + values, d + values, groups * width * sizeof(T));
        }
    }
    sums.give(d_of_queries, d_of_keys);
}

#define HEAD_NORMS(T, NAME)                                                                                                                                                                      \
    extern "C" void head_norms_forward_##NAME(int64_t tokens, int64_t heads, int64_t groups, int64_t width, const T* x, const float* of_queries, const float* of_keys, double eps, T* y,        \
                                              float* inverse) {                                                                                                                                  \
        forward<T>(tokens, heads, groups, width, x, of_queries, of_keys, eps, y, inverse);                                                                                                       \
    }                                                                                                                                                                                            \
    extern "C" void head_norms_backward_##NAME(int64_t tokens, int64_t heads, int64_t groups, int64_t width, const T* d, const T* x, const float* inverse, const float* of_queries,             \
                                               const float* of_keys, T* d_x, float* d_of_queries, float* d_of_keys) {                                                                            \
        backward<T>(tokens, heads, groups, width, d, x, inverse, of_queries, of_keys, d_x, d_of_queries, d_of_keys);                                                                             \
    }
HEAD_NORMS(float, float32)
HEAD_NORMS(bf16, bfloat16)
