/* Products, attention and the whole decode step, compiled once for each kind of processor (-DVARIANT=avx512 and so on).
 * The readable twins: quantization/functional.py for the products, models/glm130b.py for the step. */
#include "panels.h"
#include "pool.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define MOST_HEAD 512    /* the largest head */
#define SMALLEST 1e-30f /* activations below are 0: the inverse of their scale would overflow */

/* Integers of 16 bits of a chunk of n <= 128 activations; returns their scale, not a number if one of them is not finite. */
static inline float chunk_values(const float *x, int64_t n, int32_t *values) {
    float largest = 0, bad = 0;
#pragma omp simd reduction(max : largest) reduction(+ : bad)
    for (int64_t k = 0; k < n; k++) {
        float magnitude = fabsf(x[k]);
        largest = magnitude > largest ? magnitude : largest;
        bad += x[k] * 0.0f;
    }
    float inverse = largest < SMALLEST || bad != bad ? 0 : LARGEST / largest;
    for (int64_t k = 0; k < n; k++) values[k] = bad != bad ? 0 : (int32_t)rintf(x[k] * inverse);
    return largest / LARGEST + bad;
}

#if defined(VARIANT_avx512)
#include "product_avx512.h"
#elif defined(VARIANT_avx2)
#include "product_avx2.h"
#elif defined(VARIANT_neon)
#include "product_neon.h"
#else
#include "product_portable.h"
#endif

/* ------------------------------------------------------------------------------------------------------------------------- */
/* Small functions, written so that the compiler makes vectors of the loops round them */

static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504089f);
    float r = x - n * 0.693145751953125f - n * 1.42860682030941723e-6f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    union { int32_t i; float f; } power = {((int32_t)n + 127) << 23};
    return p * power.f;
}

/* Erf GELU; the rational approximation of Abramowitz and Stegun 7.1.26, absolute error below 2e-7. */
static inline float gelu(float x) {
    float z = fabsf(x) * 0.70710678118654752f;
    float t = 1.0f / (1.0f + 0.3275911f * z);
    float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    float tail = p * exponential(-z * z); /* 1 - erf(z) */
    return 0.5f * x * (x >= 0 ? 2.0f - tail : tail);
}

static void layer_norm(const float *x, const float *const *norm, int64_t n, float epsilon, float *y) {
    float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; k++) sum += x[k];
    float mean = sum / (float)n;
#pragma omp simd reduction(+ : squares)
    for (int64_t k = 0; k < n; k++) squares += (x[k] - mean) * (x[k] - mean);
    float factor = 1.0f / sqrtf(squares / (float)n + epsilon);
    for (int64_t k = 0; k < n; k++) y[k] = (x[k] - mean) * factor * norm[0][k] + norm[1][k];
}

/* Turn the pairs (x[k], x[k + d/2]) by the angle of a position. */
static void rotate(const float *x, const float *cosines, const float *sines, int64_t d, float *y) {
    int64_t half = d / 2;
    for (int64_t k = 0; k < half; k++) {
        y[k] = x[k] * cosines[k] - x[k + half] * sines[k];
        y[k + half] = x[k + half] * cosines[k + half] + x[k] * sines[k + half];
    }
}

static void quantize_row(const Matrix *m, const float *x, int64_t width, Activations *a, int64_t row) {
    /* Columns beyond the true ones have codes of 0; whatever meets them counts nothing, but must be finite. */
    const int64_t chunks = m->columns / m->chunk;
    int8_t *bytes = a->bytes + row * 2 * m->columns;
    float last[128];
    for (int64_t c = 0; c < chunks; c++) {
        const float *from = x + c * m->chunk;
        int64_t have = width - c * m->chunk;
        if (have < m->chunk) {
            memset(last, 0, sizeof last);
            if (have > 0) memcpy(last, from, have * sizeof *x);
            from = last;
        }
        quantize_chunk(from, m->chunk, bytes + 2 * c * m->chunk, a->scales + row * chunks + c,
                       a->offsets + (row * chunks + c) * 2, m->bits);
    }
}

/* ------------------------------------------------------------------------------------------------------------------------- */
/* Memory that lasts from call to call */

typedef struct {
    char *at, *end;
} Space;

static char *scratch;
static size_t scratch_size;
/* Called by one thread at a time, under its own lock (library.c). */
static Space space_of(size_t size) {
    if (size > scratch_size) {
        free(scratch);
        scratch_size = (size + (1 << 21)) & ~(size_t)63;
        scratch = aligned_alloc(64, scratch_size);
        if (!scratch) scratch_size = 0;
    }
    return (Space){scratch, scratch ? scratch + scratch_size : NULL};
}

static void *take(Space *space, size_t size) {
    void *taken = space->at;
    space->at += (size + 63) & ~(size_t)63;
    return taken;
}

static size_t activation_bytes(const Matrix *m, int64_t rows) {
    return (size_t)rows * (2 * m->columns + m->columns / m->chunk * 12) + 3 * 64;
}

static Activations take_activations(Space *space, const Matrix *m, int64_t rows) {
    int64_t chunks = m->columns / m->chunk;
    Activations a = {.columns = m->columns, .chunk = m->chunk};
    a.bytes = take(space, rows * 2 * m->columns);
    a.scales = take(space, rows * chunks * 4);
    a.offsets = take(space, rows * chunks * 8);
    return a;
}

/* The next piece of work that nobody has taken; a core that was taken away then costs one piece, not half the work. */
typedef struct {
    atomic_llong next;
    char apart[56];
} Counter;

static inline int next_piece(Counter *counter, int64_t total, int64_t size, int64_t *first, int64_t *end) {
    *first = atomic_fetch_add_explicit(&counter->next, size, memory_order_relaxed);
    *end = *first + size < total ? *first + size : total;
    return *first < total;
}

static inline int64_t piece_size(int64_t total, int threads) {
    int64_t size = total / (threads * 6);
    return threads == 1 ? total : size < 1 ? 1 : size > 16 ? 16 : size;
}

/* ------------------------------------------------------------------------------------------------------------------------- */
/* One product */

typedef struct {
    const Matrix *m;
    const float *x;
    float *y;
    int64_t n, stride, y_stride;
    int threads;
    Activations a;
    Counter rows, panels;
} Linear;

static void add_panel(const Linear *job, int64_t panel) {
    const Matrix *m = job->m;
    int64_t count, row = panel_row(m, panel, &count);
    const uint8_t *p = m->panels + panel * panel_bytes(m);
    float tile[TILE * PANEL];
    for (int64_t first = 0; first < job->n; first += TILE) {
        int rows = job->n - first < TILE ? (int)(job->n - first) : TILE;
        product(p, m, &job->a, first, rows, tile);
        for (int b = 0; b < rows; b++) {
            float *y = job->y + (first + b) * job->y_stride + row;
            for (int64_t r = 0; r < count; r++) y[r] = tile[b * PANEL + r] + (m->bias ? m->bias[row + r] : 0);
        }
    }
}

static void linear_work(void *context, int thread) {
    Linear *job = context;
    int64_t first, end;
    (void)thread;
    while (next_piece(&job->rows, job->n, 4, &first, &end))
        for (int64_t row = first; row < end; row++) quantize_row(job->m, job->x + row * job->stride, job->stride, &job->a, row);
    pool_barrier();
    int64_t panels = panel_count(job->m);
    while (next_piece(&job->panels, panels, piece_size(panels, job->threads), &first, &end))
        for (int64_t panel = first; panel < end; panel++) add_panel(job, panel);
}

static int linear(const Matrix *m, const float *x, int64_t n, int64_t stride, float *y, int64_t y_stride, int threads) {
    Linear job = {.m = m, .x = x, .y = y, .n = n, .stride = stride, .y_stride = y_stride, .threads = threads};
    Space space = space_of(activation_bytes(m, n));
    if (!space.at) return -1;
    job.a = take_activations(&space, m, n);
    pool_run(linear_work, &job, threads);
    return 0;
}

/* For tests: the integer sums of each panel, chunk and row, int32 [panels][chunks][32], of one row of activations. */
static int sums(const Matrix *m, const float *x, int32_t *out, float *scales) {
    Space space = space_of(activation_bytes(m, 1));
    Activations a = take_activations(&space, m, 1);
    int64_t chunks = m->columns / m->chunk;
    quantize_row(m, x, m->columns, &a, 0);
    memcpy(scales, a.scales, chunks * sizeof *scales);
    for (int64_t panel = 0; panel < panel_count(m); panel++)
        product_sums(m->panels + panel * panel_bytes(m), m, &a, out + panel * chunks * PANEL);
    return 0;
}

/* ------------------------------------------------------------------------------------------------------------------------- */
/* One decode step: a token for each row, through all layers, in one call */

typedef struct {
    float *normed;     /* [rows][hidden]: each thread norms all rows for itself, which is cheaper than a barrier */
    float *scores;     /* [length + 1] */
    Activations wide;  /* of inner columns */
    Activations narrow, of_head;
} Own;

typedef struct {
    const Network *net;
    const Step *step;
    int threads;
    float *x, *qkv, *mixed, *branch, *gated; /* shared: [rows][hidden], 3 hidden, hidden, hidden, inner */
    Own *own;
    Counter *counters; /* one for each phase */
} Decode;

/* y [rows][m->rows] = product + bias (+ alpha * skip), all panels of a matrix in pieces. */
static void all_panels(const Decode *job, const Matrix *m, const Activations *a, Counter *counter, float *y, const float *skip) {
    const int64_t rows = job->step->rows, panels = panel_count(m), bytes = panel_bytes(m);
    const float alpha = job->net->alpha;
    int64_t first, end;
    float tile[TILE * PANEL];
    while (next_piece(counter, panels, piece_size(panels, job->threads), &first, &end))
        for (int64_t panel = first; panel < end; panel++) {
            int64_t count, row = panel_row(m, panel, &count);
            for (int64_t b0 = 0; b0 < rows; b0 += TILE) {
                int n = rows - b0 < TILE ? (int)(rows - b0) : TILE;
                product(m->panels + panel * bytes, m, a, b0, n, tile);
                for (int b = 0; b < n; b++) {
                    float *out = y + (b0 + b) * m->rows + row, *t = tile + b * PANEL;
                    if (m->bias)
                        for (int64_t r = 0; r < count; r++) t[r] += m->bias[row + r];
                    if (skip)
                        for (int64_t r = 0; r < count; r++) t[r] += alpha * skip[(b0 + b) * m->rows + row + r];
                    memcpy(out, t, count * sizeof *t);
                }
            }
        }
}

/* gated [rows][inner] = linear half * gelu(other half): a thread makes both panels of the same rows. */
static void gated_panels(const Decode *job, const Matrix *m, const Activations *a, Counter *counter) {
    const int64_t rows = job->step->rows, pairs = panel_count(m) / 2, bytes = panel_bytes(m), inner = half_rows(m);
    int64_t first, end;
    float u[TILE * PANEL], v[TILE * PANEL];
    while (next_piece(counter, pairs, piece_size(pairs, job->threads), &first, &end))
        for (int64_t pair = first; pair < end; pair++) {
            int64_t count, row = panel_row(m, 2 * pair, &count);
            for (int64_t b0 = 0; b0 < rows; b0 += TILE) {
                int n = rows - b0 < TILE ? (int)(rows - b0) : TILE;
                product(m->panels + 2 * pair * bytes, m, a, b0, n, u);
                product(m->panels + (2 * pair + 1) * bytes, m, a, b0, n, v);
                for (int b = 0; b < n; b++) {
                    float *out = job->gated + (b0 + b) * inner + row, *left = u + b * PANEL, *right = v + b * PANEL;
                    if (m->bias)
                        for (int64_t r = 0; r < count; r++) {
                            left[r] += m->bias[row + r];
                            right[r] += m->bias[inner + row + r];
                        }
                    for (int64_t r = 0; r < PANEL; r++) left[r] *= gelu(right[r]);
                    memcpy(out, left, count * sizeof *left);
                }
            }
        }
}

static float dot(const float *x, const float *y, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; k++) sum += x[k] * y[k];
    return sum;
}

/* One head of one row: rotate, store key and value behind the others, attend. */
static void attend(const Decode *job, int64_t layer, int64_t row, int64_t head, float *scores) {
    const Step *step = job->step;
    const int64_t d = job->net->head_size, length = step->length, hidden = job->net->hidden;
    const float *qkv = job->qkv + row * 3 * hidden + head * 3 * d;
    const float *cosines = step->cosines + row * d, *sines = step->sines + row * d;
    const int64_t place = layer * step->layer_stride + row * step->row_stride + head * step->head_stride;
    const uint8_t *visible = step->visible ? step->visible + row * step->visible_stride : NULL;
    float query[MOST_HEAD], key[MOST_HEAD];
    float *out = job->mixed + row * hidden + head * d;
    rotate(qkv, cosines, sines, d, query);
    rotate(qkv + d, cosines, sines, d, key);
    const float factor = 1.0f / sqrtf((float)d);
    for (int64_t k = 0; k < d; k++) query[k] *= factor;
    float most = -3e38f, sum = 0;
    if (step->cache_type) {
        uint16_t *keys = (uint16_t *)step->keys + place;
        store_half(key, keys + length * d, d);
        store_half(qkv + 2 * d, (uint16_t *)step->values + place + length * d, d);
        for (int64_t t = 0; t <= length; t++) scores[t] = visible && !visible[t] ? -3e38f : dot_half(keys + t * d, query, d);
    } else {
        float *keys = (float *)step->keys + place;
        memcpy(keys + length * d, key, d * sizeof *key);
        memcpy((float *)step->values + place + length * d, qkv + 2 * d, d * sizeof *key);
        for (int64_t t = 0; t <= length; t++) scores[t] = visible && !visible[t] ? -3e38f : dot(keys + t * d, query, d);
    }
#pragma omp simd reduction(max : most)
    for (int64_t t = 0; t <= length; t++) most = scores[t] > most ? scores[t] : most;
#pragma omp simd reduction(+ : sum)
    for (int64_t t = 0; t <= length; t++) {
        float weight = exponential(scores[t] - most);
        scores[t] = scores[t] < -2e38f ? 0 : weight;
        sum += scores[t];
    }
    memset(out, 0, d * sizeof *out);
    if (step->cache_type) {
        const uint16_t *values = (const uint16_t *)step->values + place;
        for (int64_t t = 0; t <= length; t++)
            if (scores[t] != 0) add_half(scores[t], values + t * d, out, d);
    } else {
        const float *values = (const float *)step->values + place;
        for (int64_t t = 0; t <= length; t++)
            if (scores[t] != 0)
                for (int64_t k = 0; k < d; k++) out[k] += scores[t] * values[t * d + k];
    }
    for (int64_t k = 0; k < d; k++) out[k] /= sum;
}

static void norm_rows(const Decode *job, const float *x, const float *const *norm, float *y) {
    for (int64_t row = 0; row < job->step->rows; row++)
        layer_norm(x + row * job->net->hidden, norm, job->net->hidden, job->net->epsilon, y + row * job->net->hidden);
}

static void quantize_rows(const Decode *job, const Matrix *m, const float *x, int64_t width, Activations *a) {
    for (int64_t row = 0; row < job->step->rows; row++) quantize_row(m, x + row * width, width, a, row);
}

static void step_work(void *context, int thread) {
    Decode *job = context;
    const Network *net = job->net;
    const int64_t hidden = net->hidden, rows = job->step->rows;
    Own *own = &job->own[thread];
    Counter *counter = job->counters;
    const float *x = job->step->embeddings;
    int64_t first, end;
    for (int64_t n = 0; n < net->num_layers; n++, counter += 5) {
        const Layer *layer = &net->layers[n];
        norm_rows(job, x, layer->input_norm, own->normed);
        quantize_rows(job, &layer->query_key_value, own->normed, hidden, &own->narrow);
        all_panels(job, &layer->query_key_value, &own->narrow, counter, job->qkv, NULL);
        pool_barrier();
        while (next_piece(counter + 1, rows * net->heads, 1, &first, &end))
            attend(job, n, first / net->heads, first % net->heads, own->scores);
        pool_barrier();
        quantize_rows(job, &layer->dense, job->mixed, hidden, &own->narrow);
        all_panels(job, &layer->dense, &own->narrow, counter + 2, job->branch, own->normed);
        pool_barrier();
        norm_rows(job, job->branch, layer->attention_norm, own->normed);
        quantize_rows(job, &layer->h_to_4h, own->normed, hidden, &own->narrow);
        gated_panels(job, &layer->h_to_4h, &own->narrow, counter + 3);
        pool_barrier();
        quantize_rows(job, &layer->four_h_to_h, job->gated, net->inner, &own->wide);
        all_panels(job, &layer->four_h_to_h, &own->wide, counter + 4, job->x, own->normed);
        pool_barrier();
        x = job->x;
    }
    norm_rows(job, x, net->final_norm, own->normed);
    if (thread == 0) memcpy(job->step->normed, own->normed, rows * hidden * sizeof(float));
    if (net->head.panels) {
        quantize_rows(job, &net->head, own->normed, hidden, &own->of_head);
        all_panels(job, &net->head, &own->of_head, counter, job->step->logits, NULL);
    }
}

static int step(const Network *net, const Step *given, int threads) {
    const Layer *layer = net->layers;
    const int64_t rows = given->rows, hidden = net->hidden, phases = 5 * net->num_layers + 1;
    size_t shared = (size_t)rows * (6 * hidden + net->inner) * 4 + phases * sizeof(Counter) + threads * sizeof(Own) + 8 * 64;
    size_t each = (size_t)(rows * hidden + given->length + 1) * 4 + 8 * 64 + activation_bytes(&layer->query_key_value, rows) +
                  activation_bytes(&layer->four_h_to_h, rows) + (net->head.panels ? activation_bytes(&net->head, rows) : 0);
    Space space = space_of(shared + threads * each);
    if (!space.at || net->head_size > MOST_HEAD) return -1;
    Decode job = {.net = net, .step = given, .threads = threads};
    job.counters = take(&space, phases * sizeof(Counter));
    for (int64_t i = 0; i < phases; i++) atomic_init(&job.counters[i].next, 0);
    job.x = take(&space, rows * hidden * 4);
    job.qkv = take(&space, rows * 3 * hidden * 4);
    job.mixed = take(&space, rows * hidden * 4);
    job.branch = take(&space, rows * hidden * 4);
    job.gated = take(&space, rows * net->inner * 4);
    job.own = take(&space, threads * sizeof(Own));
    for (int i = 0; i < threads; i++) {
        Own *own = &job.own[i];
        own->normed = take(&space, rows * hidden * 4);
        own->scores = take(&space, (given->length + 1) * 4);
        own->narrow = take_activations(&space, &layer->query_key_value, rows);
        own->wide = take_activations(&space, &layer->four_h_to_h, rows);
        if (net->head.panels) own->of_head = take_activations(&space, &net->head, rows);
    }
    pool_run(step_work, &job, threads);
    return 0;
}

#define NAME_(variant) variant_##variant
#define NAME(variant) NAME_(variant)
#define TEXT_(variant) #variant
#define TEXT(variant) TEXT_(variant)
const Variant NAME(VARIANT) = {.name = TEXT(VARIANT), .linear = linear, .step = step, .sums = sums};
