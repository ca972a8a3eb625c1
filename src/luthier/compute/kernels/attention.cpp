// Attention on packed rows: every row's tokens see those of their own row. A head's keys and values stay in the second-level cache
// while blocks of queries go by; weights are never stored, the backward pass computes them again from the queries' normalisers.
#include <cmath>
#include <cstdlib>
#include <omp.h>

#include "cells.h"

constexpr int64_t QUERIES = 32;  // that go by together

static int64_t whole(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// One row of the batch: its keys are tokens first .. first + length - 1; its queries are `asked` tokens from `query` on, whose answers go to rows `answer` on.
// before: weights of one head, in whole vectors, of the rows before it
struct Row {
    int64_t first, length, query, asked, answer, before;
};

// Queries lie side by side, and so do keys and behind them values, each group of keys serving heads / groups heads of queries: rows of memory that may be the same ones.
struct Layout {
    int64_t heads, groups, width, causal;
    double scale;
    const float *cosines, *sines;  // (tokens, width) of rotary positions, or null
    int64_t reach;                 // tokens of a row that distances are known for
    const float* distances;        // (heads, span): what is added to a score by how far the key is behind the query, from 1 - reach on; or null
    int64_t q_stride, kv_stride;   // between tokens

    int64_t key(int64_t group) const { return group * width; }
    int64_t value(int64_t group) const { return (groups + group) * width; }
    int64_t span() const { return 2 * reach - 1 + LANES; }  // whole vectors may be read from any distance on
    int64_t distance(int64_t head, int64_t query) const { return head * span() + reach - 1 - query; }  // of a query, counted in its row, and the first key
};

// A head's numbers of some tokens, in float32, (count, padded).
template <class T>
static void fetch(const T* x, int64_t stride, int64_t count, int64_t width, int64_t padded, float* out) {
    for (int64_t t = 0; t < count; t++)
        for (int64_t i = 0; i < padded; i += LANES) store(out + t * padded + i, width > i ? load(x + t * stride + i, width - i) : Vec{});
}

template <class T>
static void put(const float* x, int64_t count, int64_t width, int64_t padded, T* out, int64_t stride) {
    for (int64_t t = 0; t < count; t++)
        for (int64_t i = 0; i < width; i += LANES) store(out + t * stride + i, load(x + t * padded + i), width - i);
}

// Turn pairs (i, i + width / 2) of each token by its angles, or back.
static void turn(float* x, int64_t first, int64_t count, int64_t padded, const Layout& as, bool back) {
    if (!as.cosines) return;
    const int64_t half = as.width / 2;
    for (int64_t t = 0; t < count; t++) {
        float *a = x + t * padded, *b = a + half;
        const float *cosine = as.cosines + (first + t) * as.width, *sine = as.sines + (first + t) * as.width;
        for (int64_t i = 0; i < half; i++) {
            const float u = a[i], v = b[i];
            a[i] = back ? u * cosine[i] + v * sine[half + i] : u * cosine[i] - v * sine[i];
            b[i] = back ? v * cosine[half + i] - u * sine[i] : v * cosine[half + i] + u * sine[half + i];
        }
    }
}

// The number, for dropout, of the first weight of one of a row's queries: each weight of a batch has its own.
static uint32_t number(const Layout& as, const Row& row, int64_t query, int64_t head) { return (uint32_t)(row.before * as.heads + (query * as.heads + head) * whole(row.length)); }

// Add what belongs to the distances of one query's keys, and give the factor that is left to be applied: none.
static float shift(float* scores, int64_t wide, const Layout& as, int64_t head, int64_t query) {
    if (!as.distances) return (float)as.scale;
    const float* added = as.distances + as.distance(head, query);
    for (int64_t j = 0; j < wide; j += LANES) store(scores + j, load(scores + j) * (float)as.scale + load(added + j));
    return 1;
}

static int64_t seen(const Layout& as, const Row& row, int64_t query) { return as.causal ? row.query - row.first + query + 1 : row.length; }

class Memory {
    float* start;

  public:
    explicit Memory(int64_t count) : start((float*)aligned_alloc(64, whole(count) * sizeof(float))) {}
    ~Memory() { free(start); }
    operator float*() const { return start; }
};

template <class T>
static void forward(int64_t rows, const Row* row, const Layout& as, const T* q, const T* kv, Dropout dropout, bool drops, T* out, float* normaliser) {
    int64_t longest = 1;
    for (int64_t r = 0; r < rows; r++) longest = row[r].length > longest ? row[r].length : longest;
    const int64_t padded = whole(as.width), share = as.heads / as.groups;
#pragma omp parallel
    {
        const int64_t most = whole(longest);
        Memory fetched(most * padded), room(most * padded), k_below(most * padded), v_across(most * padded), q_fetched(QUERIES * padded), q_along(QUERIES * padded), answers(QUERIES * padded);
        Memory scores(QUERIES * most), weights(QUERIES * most);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t group = 0; group < as.groups; group++) {
                const Row& at = row[r];
                const int64_t columns = whole(at.length);
                const T* tokens = kv + at.first * as.kv_stride;
                fetch(tokens + as.key(group), as.kv_stride, at.length, as.width, padded, fetched);
                turn(fetched, at.first, at.length, padded, as, false);
                below<T>(fetched, at.length, as.width, padded, room, k_below, columns);
                fetch(tokens + as.value(group), as.kv_stride, at.length, as.width, padded, fetched);
                const float* values = across<T>(fetched, at.length, padded, v_across);
                for (int64_t head = group * share; head < (group + 1) * share; head++)
                    for (int64_t from = 0; from < at.asked; from += QUERIES) {
                        const int64_t count = at.asked - from < QUERIES ? at.asked - from : QUERIES, keys = seen(as, at, from + count - 1), wide = whole(keys);
                        float totals[QUERIES];
                        fetch(q + (at.query + from) * as.q_stride + head * as.width, as.q_stride, count, as.width, padded, q_fetched);
                        turn(q_fetched, at.query + from, count, padded, as, false);
                        product<T>(count, wide, as.width, along<T>(q_fetched, count, padded, q_along), padded / CELL<T>, 1, k_below, columns, scores, columns, false);
                        for (int64_t i = 0; i < count; i++) {
                            float* s = scores + i * columns;
                            Operand<T>* w = (Operand<T>*)(float*)weights + i * columns;
                            const int64_t last = seen(as, at, from + i);
                            const float scale = shift(s, wide, as, head, at.query - at.first + from + i);
                            for (int64_t j = last; j < wide; j++) s[j] = -INFINITY;
                            Vec top = all(-INFINITY);
                            for (int64_t j = 0; j < wide; j += LANES) top = larger(top, load(s + j));
                            const float highest = largest(top) * scale;
                            Vec total = {};
                            const uint32_t start = drops ? number(as, at, from + i, head) : 0;
                            for (int64_t j = 0; j < wide; j += LANES) {
                                Vec e = exponential(load(s + j) * scale - highest);
                                total += e;
                                store(w + j, drops ? e * Dropout::factors(start + j, dropout) : e);
                            }
                            totals[i] = sum(total);
                            if (normaliser) normaliser[(at.answer + from + i) * as.heads + head] = highest + std::log(totals[i]);
                        }
                        product<T>(count, padded, keys, weights, columns / CELL<T>, 1, values, padded, answers, padded, false);
                        for (int64_t i = 0; i < count; i++)
                            for (int64_t j = 0; j < padded; j += LANES) store(answers + i * padded + j, load(answers + i * padded + j) * (1 / totals[i]));
                        put<T>(answers, count, as.width, padded, out + (at.answer + from) * as.heads * as.width + head * as.width, as.heads * as.width);
                    }
            }
    }
}

template <class T>
static void backward(int64_t rows, const Row* row, const Layout& as, const T* q, const T* kv, const T* d, const float* normaliser, Dropout dropout, bool drops, T* d_q, T* d_kv, float* d_distances) {
    int64_t longest = 1;
    for (int64_t r = 0; r < rows; r++) longest = row[r].length > longest ? row[r].length : longest;
    const int64_t padded = whole(as.width), share = as.heads / as.groups;
#pragma omp parallel
    {
        const int64_t most = whole(longest);
        Memory fetched(most * padded), room(most * padded), k_across(most * padded), k_below(most * padded), v_below(most * padded), d_k(most * padded), d_v(most * padded);
        Memory q_fetched(QUERIES * padded), q_along(QUERIES * padded), q_across(QUERIES * padded), g_fetched(QUERIES * padded), g_along(QUERIES * padded), g_across(QUERIES * padded), d_queries(QUERIES * padded);
        Memory weights(QUERIES * most), w_across(QUERIES * most), slopes(QUERIES * most), s_along(QUERIES * most), s_across(QUERIES * most);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t group = 0; group < as.groups; group++) {
                const Row& at = row[r];
                const int64_t columns = whole(at.length);
                const T* tokens = kv + at.first * as.kv_stride;
                fetch(tokens + as.value(group), as.kv_stride, at.length, as.width, padded, fetched);
                below<T>(fetched, at.length, as.width, padded, room, v_below, columns);
                fetch(tokens + as.key(group), as.kv_stride, at.length, as.width, padded, fetched);
                turn(fetched, at.first, at.length, padded, as, false);
                below<T>(fetched, at.length, as.width, padded, room, k_below, columns);
                const float* k = across<T>(fetched, at.length, padded, k_across);
                memset(d_k, 0, at.length * padded * sizeof(float));
                memset(d_v, 0, at.length * padded * sizeof(float));
                for (int64_t head = group * share; head < (group + 1) * share; head++) {
                    for (int64_t from = 0; from < at.asked; from += QUERIES) {
                        const int64_t count = at.asked - from < QUERIES ? at.asked - from : QUERIES, keys = seen(as, at, from + count - 1), wide = whole(keys);
                        fetch(q + (at.query + from) * as.q_stride + head * as.width, as.q_stride, count, as.width, padded, q_fetched);
                        turn(q_fetched, at.query + from, count, padded, as, false);
                        fetch(d + (at.answer + from) * as.heads * as.width + head * as.width, as.heads * as.width, count, as.width, padded, g_fetched);
                        product<T>(count, wide, as.width, along<T>(q_fetched, count, padded, q_along), padded / CELL<T>, 1, k_below, columns, weights, columns, false);
                        product<T>(count, wide, as.width, along<T>(g_fetched, count, padded, g_along), padded / CELL<T>, 1, v_below, columns, slopes, columns, false);
                        for (int64_t i = 0; i < count; i++) {
                            float *w = weights + i * columns, *s = slopes + i * columns;
                            const int64_t last = seen(as, at, from + i);
                            const float level = normaliser[(at.answer + from + i) * as.heads + head];
                            const uint32_t start = drops ? number(as, at, from + i, head) : 0;
                            const float scale = shift(w, wide, as, head, at.query - at.first + from + i);
                            for (int64_t j = last; j < wide; j++) w[j] = -INFINITY;
                            Vec total = {};
                            for (int64_t j = 0; j < wide; j += LANES) {
                                Vec weight = exponential(load(w + j) * scale - level), slope = load(s + j);
                                if (drops) slope *= Dropout::factors(start + j, dropout);
                                total += weight * slope;
                                store(w + j, weight);
                                store(s + j, slope);
                            }
                            const float mean = sum(total);
                            float* added = d_distances ? d_distances + r * as.heads * as.span() + as.distance(head, at.query - at.first + from + i) : nullptr;
                            for (int64_t j = 0; j < wide; j += LANES) {
                                Vec weight = load(w + j);
                                const Vec slope = weight * (load(s + j) - mean);
                                if (added) store(added + j, load(added + j) + slope);
                                store(s + j, slope * (float)as.scale);
                                if (drops) store(w + j, weight * Dropout::factors(start + j, dropout));
                            }
                        }
                        const float *queries = across<T>(q_fetched, count, padded, q_across), *g = across<T>(g_fetched, count, padded, g_across);
                        product<T>(count, padded, keys, along<T>(slopes, count, columns, s_along), columns / CELL<T>, 1, k, padded, d_queries, padded, false);
                        product<T>(keys, padded, count, across<T>(slopes, count, columns, s_across), 1, columns, queries, padded, d_k, padded, true);
                        product<T>(keys, padded, count, across<T>(weights, count, columns, w_across), 1, columns, g, padded, d_v, padded, true);
                        turn(d_queries, at.query + from, count, padded, as, true);
                        put<T>(d_queries, count, as.width, padded, d_q + (at.query + from) * as.q_stride + head * as.width, as.q_stride);
                    }
                }
                turn(d_k, at.first, at.length, padded, as, true);
                put<T>(d_k, at.length, as.width, padded, d_kv + at.first * as.kv_stride + as.key(group), as.kv_stride);
                put<T>(d_v, at.length, as.width, padded, d_kv + at.first * as.kv_stride + as.value(group), as.kv_stride);
            }
    }
}

#define ATTENTION(T, NAME)                                                                                                                                                                      \
    extern "C" void attention_forward_##NAME(int64_t rows, const Row* row, int64_t heads, int64_t groups, int64_t width, int64_t causal, double scale, const float* cosines, const float* sines, \
                                             int64_t reach, const float* distances, const T* q, int64_t q_stride, const T* kv, int64_t kv_stride, const uint32_t* seeds, double p, T* out,      \
                                             float* normaliser) {                                                                                                                               \
        const Layout as{heads, groups, width, causal, scale, cosines, sines, reach, distances, q_stride, kv_stride};                                                                             \
        forward<T>(rows, row, as, q, kv, Dropout::of(seeds, p), seeds, out, normaliser);                                                                                                        \
    }                                                                                                                                                                                           \
    extern "C" void attention_backward_##NAME(int64_t rows, const Row* row, int64_t heads, int64_t groups, int64_t width, int64_t causal, double scale, const float* cosines, const float* sines, \
                                              int64_t reach, const float* distances, const T* q, int64_t q_stride, const T* kv, int64_t kv_stride, const uint32_t* seeds, double p, const T* d, \
                                              const float* normaliser, T* d_q, T* d_kv, float* d_distances) {                                                                                   \
        const Layout as{heads, groups, width, causal, scale, cosines, sines, reach, distances, q_stride, kv_stride};                                                                             \
        backward<T>(rows, row, as, q, kv, d, normaliser, Dropout::of(seeds, p), seeds, d_q, d_kv, d_distances);                                                                                  \
    }
ATTENTION(float, float32)
ATTENTION(bf16, bfloat16)
