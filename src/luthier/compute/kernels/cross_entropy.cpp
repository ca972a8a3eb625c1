// Cross entropy of many classes with its gradient, each row of logits while it is in the cache.
#include <cmath>

#include "vectors.h"

// logits (rows, classes) -> losses (rows) and, where asked, their gradients (rows, classes), which may be in the memory of the logits
template <class T>
static void cross_entropy(int64_t rows, int64_t classes, const T* logits, const int64_t* labels, float* losses, T* gradients) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T* own = logits + row * classes;
        Vec tops = all(-INFINITY), totals = {};
        for (int64_t i = 0; i + LANES <= classes; i += LANES) tops = larger(tops, load(own + i));
        float top = largest(tops), total = 0;
        const int64_t rest = classes / LANES * LANES;
        for (int64_t i = rest; i < classes; i++) top = std::fmax(top, load(own + i, 1)[0]);
        for (int64_t i = 0; i < rest; i += LANES) totals += exponential(load(own + i) - top);
        for (int64_t i = rest; i < classes; i++) total += exponential(load(own + i, 1) - top)[0];
        total += sum(totals);
        const Vec right = load(own + labels[row], 1);
        losses[row] = std::log(total) + top - right[0];
        if (!gradients) continue;
        T* d = gradients + row * classes;
        for (int64_t i = 0; i < classes; i += LANES) store(d + i, exponential(load(own + i, classes - i) - top) * (1 / total), classes - i);
        store(d + labels[row], exponential(right - top) * (1 / total) - 1, 1);
    }
}

extern "C" void cross_entropy_float32(int64_t rows, int64_t classes, const float* logits, const int64_t* labels, float* losses, float* gradients) {
    cross_entropy(rows, classes, logits, labels, losses, gradients);
}
extern "C" void cross_entropy_bfloat16(int64_t rows, int64_t classes, const bf16* logits, const int64_t* labels, float* losses, bf16* gradients) {
    cross_entropy(rows, classes, logits, labels, losses, gradients);
}
