// Dropout by itself. The same seeds drop the same elements, so the backward pass needs no mask; x and out may be the same memory.
#include "vectors.h"

template <class T>
static void drop(int64_t count, const T* x, const Dropout& given, T* out) {
#pragma omp parallel for if (count > ALONE)
    for (int64_t i = 0; i < count; i += LANES) store(out + i, load(x + i, count - i) * Dropout::factors(i, given), count - i);
}

extern "C" void drop_float32(int64_t count, const float* x, const uint32_t* seeds, double p, float* out) { drop(count, x, Dropout::of(seeds, p), out); }
extern "C" void drop_bfloat16(int64_t count, const bf16* x, const uint32_t* seeds, double p, bf16* out) { drop(count, x, Dropout::of(seeds, p), out); }
