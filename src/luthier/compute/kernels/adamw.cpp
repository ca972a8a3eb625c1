// A step of AdamW over many tensors in one pass over memory: the scale of the gradients, both moments, decay and the change. And before it the norm of all gradients.
#include <omp.h>

#include <cmath>
#include <vector>

#include "vectors.h"

constexpr int64_t CHUNK = 1 << 12;  // numbers whose squares are added in float32

// The sum of squares of all tensors; with as many threads the same bits again.
extern "C" void squares_float32(int64_t count, const int64_t* sizes, float** tensors, double* total) {
    std::vector<double> parts(omp_get_max_threads());
#pragma omp parallel
    {
        double own = 0;
        for (int64_t k = 0; k < count; k++) {
#pragma omp for schedule(static) nowait
            for (int64_t first = 0; first < sizes[k]; first += CHUNK) {
                Vec found = {};
                const int64_t end = sizes[k] - first < CHUNK ? sizes[k] : first + CHUNK;
                for (int64_t i = first; i < end; i += LANES) {
                    const Vec x = load(tensors[k] + i, end - i);
                    found += x * x;
                }
                own += sum(found);
            }
        }
        parts[omp_get_thread_num()] = own;
    }
    *total = 0;
    for (double part : parts) *total += part;
}

enum RowState : uint8_t { UNKNOWN, MOVES, RESTS };

static bool nothing(const float* x, int64_t count) {
    uint32_t found = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        found |= bits;
    }
    return !found;
}

// gradient: null if it is 0. A row without gradient or moments is decayed and no more: of a table of embeddings that is most, and its moments need not be read.
static bool rests(RowState& row, const float* gradient, const float* mean, const float* square, int64_t width) {
    if (row == MOVES) return false;
    if (gradient && !nothing(gradient, width))
        row = MOVES;
    else if (row == UNKNOWN)
        row = nothing(mean, width) && nothing(square, width) ? RESTS : MOVES;
    return row == RESTS;
}

// places: of each row, where among those of the gradient its own is, or -1; null where all are there
extern "C" void adamw_float32(int64_t count, const int64_t* rows, const int64_t* widths, float** values, float** gradients, int32_t** places, float** means, float** squares, float** steps, RowState** states,
                              double lr, double decay, double beta1, double beta2, double eps, double scale) {
    for (int64_t k = 0; k < count; k++) *steps[k] += 1;
    const float kept = 1 - lr * decay, of_mean = 1 - beta1, of_square = 1 - beta2, by = scale, apart = eps;
#pragma omp parallel
    for (int64_t k = 0; k < count; k++) {
        const float size = lr / (1 - std::pow(beta1, *steps[k])), root = 1 / std::sqrt(1 - std::pow(beta2, *steps[k]));
        const int64_t width = widths[k];
#pragma omp for schedule(static) nowait
        for (int64_t row = 0; row < rows[k]; row++) {
            float *value = values[k] + row * width, *mean = means[k] + row * width, *square = squares[k] + row * width;
            const int64_t place = places[k] ? places[k][row] : row;
            const float* gradient = place < 0 ? nullptr : gradients[k] + place * width;
            if (rests(states[k][row], gradient, mean, square, width)) {
                for (int64_t i = 0; i < width && kept != 1; i++) value[i] *= kept;
                continue;
            }
            for (int64_t i = 0; i < width; i++) {
                const float d = gradient ? gradient[i] * by : 0;
                mean[i] += (d - mean[i]) * of_mean;
                square[i] += (d * d - square[i]) * of_square;
                value[i] = value[i] * kept - size * mean[i] / (std::sqrt(square[i]) * root + apart);
            }
        }
    }
}
