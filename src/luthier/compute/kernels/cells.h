// Small products in float32, of numbers that lie in cells of 32 bits: one float32 each, or, where the processor multiplies and adds
// bfloat16 by pairs, the two numbers that follow each other along the axis that is summed over.
#pragma once

#include "vectors.h"

#ifdef __AVX512BF16__
template <class T> using Operand = T;
#else
template <class T> using Operand = float;
#endif
template <class T> constexpr int64_t CELL = sizeof(float) / sizeof(Operand<T>);  // numbers in a cell

template <int64_t PER_CELL>
INLINE Vec plus_product(Vec sum, const float* a, Vec b) {
#ifdef __AVX512BF16__
    if constexpr (PER_CELL == 2) {
        int32_t pair;
        memcpy(&pair, a, sizeof pair);
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)_mm512_set1_epi32(pair));
    }
#endif
    return sum + *a * b;
}

// c (M, 16 N) = or += a (M, K cells) @ b (K cells, 16 N); a by strides, so that it may be transposed.
template <int64_t PER_CELL, int M, int N>
INLINE void tile(int64_t K, const float* a, int64_t along_m, int64_t along_k, const float* b, int64_t ldb, float* c, int64_t ldc, bool adds) {
    Vec sums[M][N];
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) sums[m][n] = adds ? load(c + m * ldc + n * LANES) : Vec{};
    for (int64_t k = 0; k < K; k++) {
        Vec right[N];
        for (int n = 0; n < N; n++) hold(right[n] = load(b + k * ldb + n * LANES));
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) sums[m][n] = plus_product<PER_CELL>(sums[m][n], a + m * along_m + k * along_k, right[n]);
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) store(c + m * ldc + n * LANES, sums[m][n]);
}

template <int64_t PER_CELL, int N>
INLINE void column(int64_t M, int64_t K, const float* a, int64_t along_m, int64_t along_k, const float* b, int64_t ldb, float* c, int64_t ldc, bool adds) {
    int64_t m = 0;
    for (; m + 4 <= M; m += 4) tile<PER_CELL, 4, N>(K, a + m * along_m, along_m, along_k, b, ldb, c + m * ldc, ldc, adds);
    for (; m < M; m++) tile<PER_CELL, 1, N>(K, a + m * along_m, along_m, along_k, b, ldb, c + m * ldc, ldc, adds);
}

template <class T>
static void product(int64_t M, int64_t padded, int64_t K, const float* a, int64_t along_m, int64_t along_k, const float* b, int64_t ldb, float* c, int64_t ldc, bool adds) {
    const int64_t cells = (K + CELL<T> - 1) / CELL<T>;
    int64_t n = 0;
    for (; n + 2 * LANES <= padded; n += 2 * LANES) column<CELL<T>, 2>(M, cells, a, along_m, along_k, b + n, ldb, c + n, ldc, adds);
    if (n < padded) column<CELL<T>, 1>(M, cells, a, along_m, along_k, b + n, ldb, c + n, ldc, adds);
}

// Matrices of float32 as cells, written to `room` where a cell holds two numbers; where it holds one they are x itself.
// (count, padded), summed over along the width: (count, padded / CELL).
template <class T>
static const float* along(const float* x, int64_t count, int64_t padded, float* room) {
    if (CELL<T> == 1) return x;
    for (int64_t i = 0; i < count * padded; i += LANES) store((Operand<T>*)room + i, load(x + i));
    return room;
}

// (count, padded), summed over along the rows: (count / CELL, padded), with 0 behind a last row that stands alone.
template <class T>
static const float* across(const float* x, int64_t count, int64_t padded, float* room) {
    if (CELL<T> == 1) return x;
    for (int64_t t = 0; t < count; t += 2)
        for (int64_t i = 0; i < padded; i += LANES) {
            const Halves lower = rounded(load(x + t * padded + i)), upper = t + 1 < count ? rounded(load(x + (t + 1) * padded + i)) : Halves{};
            store(room + t / 2 * padded + i, (Vec)(__builtin_convertvector(lower, Bits) | __builtin_convertvector(upper, Bits) << 16));
        }
    return room;
}

// (count, width), summed over along the width, transposed: (width / CELL, columns).
template <class T>
static void below(const float* x, int64_t count, int64_t width, int64_t padded, float* room, float* out, int64_t columns) {
    const float* cells = along<T>(x, count, padded, room);
    for (int64_t i = 0; i * CELL<T> < width; i++)
        for (int64_t t = 0; t < columns; t++) out[i * columns + t] = t < count ? cells[t * padded / CELL<T> + i] : 0;
}
