// Sixteen numbers at a time, in float32 whatever their type in memory; the compiler makes of them what the processor has.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

constexpr int LANES = 16;
constexpr int64_t ALONE = 1 << 14;  // numbers that are not worth a second thread
typedef float Vec __attribute__((vector_size(64)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

#define INLINE static inline __attribute__((always_inline))

struct bf16 {
    uint16_t bits;
};

INLINE Vec all(float x) { return x - Vec{}; }

INLINE Vec load(const float* p) {
    Vec x;
    memcpy(&x, p, sizeof x);
    return x;
}

INLINE Vec load(const bf16* p) {
    Halves x;
    memcpy(&x, p, sizeof x);
    return (Vec)(__builtin_convertvector(x, Bits) << 16);
}

INLINE void store(float* p, Vec x) { memcpy(p, &x, sizeof x); }

// To the nearest, ties to even; what is not a number stays one.
INLINE Halves rounded(Vec x) {
#ifdef __AVX512BF16__
    return (Halves)_mm512_cvtneps_pbh((__m512)x);  // what is too small for a normal number becomes 0
#else
    Bits bits = (Bits)x;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(x == x ? bits : bits * 0 + 0x7fc0, Halves);
#endif
}

INLINE void store(bf16* p, Vec x) {
    const Halves halves = rounded(x);
    memcpy(p, &halves, sizeof halves);
}

// The last ones of a row, with 0 behind them.
template <class T>
INLINE Vec load(const T* p, int64_t count) {
    if (count >= LANES) return load(p);
    T part[LANES] = {};
    memcpy(part, p, count * sizeof(T));
    return load(part);
}

template <class T>
INLINE void store(T* p, Vec x, int64_t count) {
    if (count >= LANES) return store(p, x);
    T part[LANES];
    store(part, x);
    memcpy(p, part, count * sizeof(T));
}

// In a register, where there is one of this width: compilers else read it from memory again for each of its uses.
INLINE void hold(Vec& x) {
#ifdef __AVX512F__
    asm("" : "+v"(x));
#endif
}

// b where either is not a number. Compilers do not see that one instruction does this.
#ifdef __AVX512F__
INLINE Vec larger(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE Vec smaller(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
#else
INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
INLINE Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
#endif

// One number of all, by halves: in a row, each would wait for the one before.
template <class F>
INLINE float joined(Vec x, F both) {
    Eight eights[2];
    Four fours[2];
    memcpy(eights, &x, sizeof eights);
    const Eight eight = both(eights[0], eights[1]);
    memcpy(fours, &eight, sizeof fours);
    const Four four = both(fours[0], fours[1]);
    return both(both(four[0], four[2]), both(four[1], four[3]));
}

INLINE float sum(Vec x) {
    return joined(x, [](auto a, auto b) { return a + b; });
}

INLINE float largest(Vec x) {
    return joined(x, [](auto a, auto b) { return a > b ? a : b; });
}

// Within 2e-7 of e^x, relatively; 0 below -87.7; what is not a number stays one, so that a training that diverges is noticed.
INLINE Vec exponential(Vec x) {
    x = smaller(all(88.0f), larger(all(-88.0f), x));
    Vec n = x * 1.44269504f + 12582912.0f - 12582912.0f;  // the nearest whole number
    Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;    // ln 2 in two parts, the first of which is exact
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (Vec)((__builtin_convertvector(n, Ints) + 127) << 23);  // of -127, the bits are those of 0
}

// Which elements stay: a function of the seeds and of the element's number, so that the backward pass needs no mask.
struct Dropout {
    uint32_t seeds[2];
    uint32_t dropped;  // of 2^32
    float factor;      // of the others; 0: there is no dropout

    static Dropout of(const uint32_t* seeds, double p) {
        if (!seeds) return {{0, 0}, 0, 0};
        if (p >= 1) return {{seeds[0], seeds[1]}, UINT32_MAX, 0};
        return {{seeds[0], seeds[1]}, (uint32_t)(p * 4294967296.0), (float)(1 / (1 - p))};
    }

    // 0 or the factor, of the elements from `first` on.
    INLINE Vec factors(uint32_t first, const Dropout& given) {
        const Bits steps = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        Bits h = steps + (first + given.seeds[0]);
        h = (h ^ (h >> 16)) * 0x7feb352du;
        h = ((h ^ (h >> 15)) + given.seeds[1]) * 0x846ca68bu;
        h = (h ^ (h >> 16)) * 0x9e3779b1u;
        h ^= h >> 15;
        return (Vec)((Ints)all(given.factor) & (h >= given.dropped));
    }
};

// Sums over the tokens that are shared out among threads, for the gradients of two vectors; nothing where neither is asked for.
class ThreadSums {
    int64_t width, padded;
    int threads;
    float* parts;

  public:
    ThreadSums(int64_t width, int threads, bool asked)
        : width(width), padded(width + LANES), threads(threads), parts(asked ? (float*)calloc(threads * 2 * padded, sizeof(float)) : nullptr) {}
    ~ThreadSums() { free(parts); }

    // Of the first or second vector (0 or 1), a thread's own: width numbers and room for a whole vector; null if nothing is asked for.
    float* of(int which, int thread) const { return parts ? parts + (2 * thread + which) * padded : nullptr; }

    void give(float* first, float* second) const {
        for (int64_t i = 0; parts && i < width; i++) {
            float sums[2] = {};
            for (int thread = 0; thread < threads; thread++)
                for (int which = 0; which < 2; which++) sums[which] += of(which, thread)[i];
            if (first) first[i] = sums[0];
            if (second) second[i] = sums[1];
        }
    }
};
