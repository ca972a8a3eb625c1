// Functions of single numbers, alone or as the gate of another number, and their gradients.
#include "vectors.h"

// Each gives f(x) and, where asked, f'(x).
struct Gelu {
    INLINE Vec of(Vec x, Vec* slope) {
        Vec size = larger(x, -x) * 0.70710678f;
        Vec bell = exponential(-size * size);
        Vec t = 1.0f / (size * 0.3275911f + 1.0f);  // Abramowitz and Stegun 7.1.26
        Vec tail = t * 1.061405429f - 1.453152027f;
        tail = tail * t + 1.421413741f;
        tail = tail * t - 0.284496736f;
        tail = (tail * t + 0.254829592f) * t * bell * 0.5f;  // P(X > |x|) of a normal X
        Vec below = x > Vec{} ? 1.0f - tail : tail;
        if (slope) *slope = below + x * bell * 0.39894228f;
        return x * below;
    }
};

struct GeluTanh {
    INLINE Vec of(Vec x, Vec* slope) {
        Vec inner = x * (x * x * 0.044715f + 1.0f) * 1.59576912f;
        Vec below = 1.0f / (1.0f + exponential(-inner));  // (1 + tanh(u)) / 2 = sigmoid(2 u)
        if (slope) *slope = below + x * below * (1.0f - below) * (x * x * 0.134145f + 1.0f) * 1.59576912f;
        return x * below;
    }
};

struct Relu {
    INLINE Vec of(Vec x, Vec* slope) {
        if (slope) *slope = x <= Vec{} ? Vec{} : all(1);
        return x <= Vec{} ? Vec{} : x;
    }
};

struct Silu {
    INLINE Vec of(Vec x, Vec* slope) {
        Vec below = 1.0f / (1.0f + exponential(-x));
        if (slope) *slope = below * (1.0f + x * (1.0f - below));
        return x * below;
    }
};

// The slopes, where asked for, are all that the way back needs.
template <class T, class F>
static void alone(int64_t count, const T* x, T* y, T* slopes) {
#pragma omp parallel for schedule(static) if (count > ALONE)
    for (int64_t i = 0; i < count; i += LANES) {
        Vec slope;
        store(y + i, F::of(load(x + i, count - i), slopes ? &slope : nullptr), count - i);
        if (slopes) store(slopes + i, slope, count - i);
    }
}

// x (rows, 2 width): gates, then what passes through them. Backward where d is given, else forward.
template <class T, class F>
static void gated(int64_t rows, int64_t width, const T* x, const T* d, T* out) {
#pragma omp parallel for schedule(static) if (rows * width > ALONE)
    for (int64_t row = 0; row < rows; row++) {
        const T *gate = x + row * 2 * width, *up = gate + width;
        for (int64_t i = 0; i < width; i += LANES) {
            Vec slope, open = F::of(load(gate + i, width - i), d ? &slope : nullptr), passing = load(up + i, width - i);
            if (!d) {
                store(out + row * width + i, open * passing, width - i);
                continue;
            }
            Vec own = load(d + row * width + i, width - i);
            store(out + row * 2 * width + i, own * passing * slope, width - i);
            store(out + row * 2 * width + width + i, own * open, width - i);
        }
    }
}

#define ACTIVATION(T, TYPE, F, NAME)                                                                                                                     \
    extern "C" void NAME##_##TYPE(int64_t count, const T* x, T* y, T* slopes) { alone<T, F>(count, x, y, slopes); }                                      \
    extern "C" void gated_##NAME##_##TYPE(int64_t rows, int64_t width, const T* x, const T* d, T* out) { gated<T, F>(rows, width, x, d, out); }
#define BOTH(F, NAME) ACTIVATION(float, float32, F, NAME) ACTIVATION(bf16, bfloat16, F, NAME)
BOTH(Gelu, gelu)
BOTH(GeluTanh, gelu_tanh)
BOTH(Relu, relu)
BOTH(Silu, silu)
