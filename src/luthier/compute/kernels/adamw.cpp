// A step of AdamW over many tensors in one pass over memory: the scale of the gradients, both moments, decay and the change. And before it the norm of all gradients.
// Gradients are float32, or bfloat16 where `narrow` says so of a tensor.
#include <omp.h>

#include <cmath>
#include <vector>

#include "vectors.h"

constexpr int64_t CHUNK = 1 << 12;  // numbers whose squares are added in float32

template <class D>
static float squares(const D* x, int64_t count) {
    Vec found = {};
    for (int64_t i = 0; i < count; i += LANES) {
        const Vec part = load(x + i, count - i);
        found += part * part;
    }
    return sum(found);
}

// The sum of squares of all tensors; with as many threads the same bits again.
extern "C" void squares_float32(int64_t count, const int64_t* sizes, void** tensors, const uint8_t* narrow, double* total) {
    std::vector<double> parts(omp_get_max_threads());
#pragma omp parallel
    {
        double own = 0;
        for (int64_t k = 0; k < count; k++) {
#pragma omp for schedule(static) nowait
            for (int64_t first = 0; first < sizes[k]; first += CHUNK) {
                const int64_t some = sizes[k] - first < CHUNK ? sizes[k] - first : CHUNK;
                own += narrow[k] ? squares((const bf16*)tensors[k] + first, some) : squares((const float*)tensors[k] + first, some);
            }
        }
        parts[omp_get_thread_num()] = own;
    }
    *total = 0;
    for (double part : parts) *total += part;
}

INLINE float number(float x) { return x; }
INLINE float number(bf16 x) {
    const uint32_t bits = (uint32_t)x.bits << 16;
    float found;
    memcpy(&found, &bits, sizeof found);
    return found;
}

template <class D>
static bool nothing(const D* x, int64_t count) {
    bool found = false;
    for (int64_t i = 0; i < count; i++) found |= number(x[i]) != 0;
    return !found;
}

enum RowState : uint8_t { UNKNOWN, MOVES, RESTS };

struct Row {
    RowState& state;
    int64_t width;
    float *value, *mean, *square;
};

// gradient: null if it is 0. A row without gradient or moments is decayed and no more: of a table of embeddings that is most, and its moments need not be read.
template <class D>
static bool rests(const Row& row, const D* gradient) {
    if (row.state == MOVES) return false;
    if (gradient && !nothing(gradient, row.width))
        row.state = MOVES;
    else if (row.state == UNKNOWN)
        row.state = nothing(row.mean, row.width) && nothing(row.square, row.width) ? RESTS : MOVES;
    return row.state == RESTS;
}

struct Step {
    float kept, of_mean, of_square, scale, eps, size, root;

    template <class D>
    void take(const Row& row, const D* gradient) const {
        float *__restrict value = row.value, *__restrict mean = row.mean, *__restrict square = row.square;
        if (rests(row, gradient)) {
            for (int64_t i = 0; i < row.width && kept != 1; i++) value[i] *= kept;
            return;
        }
        for (int64_t i = 0; i < row.width; i++) {
            const float d = gradient ? number(gradient[i]) * scale : 0;
            mean[i] += (d - mean[i]) * of_mean;
            square[i] += (d * d - square[i]) * of_square;
            value[i] = value[i] * kept - size * mean[i] / (std::sqrt(square[i]) * root + eps);
        }
    }
};

// places: of each row, where among those of the gradient its own is, or -1; null where all are there
extern "C" void adamw_float32(int64_t count, const int64_t* rows, const int64_t* widths, float** values, void** gradients, const uint8_t* narrow, int32_t** places, float** means, float** squares,
                              float** steps, RowState** states, double lr, double decay, double beta1, double beta2, double eps, double scale) {
    for (int64_t k = 0; k < count; k++) *steps[k] += 1;
#pragma omp parallel
    for (int64_t k = 0; k < count; k++) {
        const Step step = {(float)(1 - lr * decay), (float)(1 - beta1), (float)(1 - beta2), (float)scale, (float)eps, (float)(lr / (1 - std::pow(beta1, *steps[k]))), (float)(1 / std::sqrt(1 - std::pow(beta2, *steps[k])))};
#pragma omp for schedule(static) nowait
        for (int64_t row = 0; row < rows[k]; row++) {
            const int64_t at = row * widths[k], place = places[k] ? places[k][row] : row, from = place * widths[k];
            const Row own = {states[k][row], widths[k], values[k] + at, means[k] + at, squares[k] + at};
            if (narrow[k])
                step.take(own, place < 0 ? nullptr : (const bf16*)gradients[k] + from);
            else
                step.take(own, place < 0 ? nullptr : (const float*)gradients[k] + from);
        }
    }
}
