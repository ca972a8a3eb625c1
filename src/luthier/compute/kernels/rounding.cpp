// What stands around a product of whole numbers: tokens are rounded to 8 bits before it and given their scale after it, each in one pass over memory.
#include "vectors.h"

constexpr float TINY = 1.17549435e-38f;
constexpr float SHIFT = 12582912.0f + 128.0f;  // 1.5 * 2^23, next to which a number is rounded into the lowest bits; 128 stands for 0

static inline uint32_t bits(float x) {
    uint32_t found;
    memcpy(&found, &x, sizeof found);
    return found;
}

static inline float number(uint32_t x) {
    float found;
    memcpy(&found, &x, sizeof found);
    return found;
}

// x (n, d) ~ (whole - 128) * scales
extern "C" void round_rows_float32(int64_t n, int64_t d, const float* x, uint8_t* whole, float* scales) {
#pragma omp parallel for if (n * d > ALONE)
    for (int64_t i = 0; i < n; i++) {
        const float* row = x + i * d;
        uint32_t largest = 0;  // compared as whole numbers, so that NaN is above infinity and shows in the scale
        for (int64_t j = 0; j < d; j++) {
            uint32_t size = bits(row[j]) & 0x7fffffffu;
            largest = size > largest ? size : largest;
        }
        float scale = number(largest) / 127.0f;
        scale = scale < TINY ? TINY : scale;
        const float inverse = 1.0f / scale;
        for (int64_t j = 0; j < d; j++) whole[i * d + j] = (uint8_t)bits(row[j] * inverse + SHIFT);
        scales[i] = scale;
    }
}

// y (n, d) = y * scales + bias
extern "C" void spread_rows_float32(int64_t n, int64_t d, const float* scales, const float* bias, float* y) {
#pragma omp parallel for if (n * d > ALONE)
    for (int64_t i = 0; i < n; i++) {
        float* row = y + i * d;
        const float scale = scales[i];
        if (bias)
            for (int64_t j = 0; j < d; j++) row[j] = row[j] * scale + bias[j];
        else
            for (int64_t j = 0; j < d; j++) row[j] *= scale;
    }
}
