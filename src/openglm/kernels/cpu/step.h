/* A pass through all layers in one call: a token for each sequence, or whole prompts. The readable twin is GLM130B.forward
 * (tests/test_cpu_kernels.py test_a_pass_is_the_networks_forward, test_no_bit_depends_on_the_company). */

enum {
    FEW_ROWS = 8,       /* up to these each thread norms and quantizes all rows for itself, which is cheaper than a barrier */
    AHEAD = 8192,       /* bytes of the next matrix that are fetched while threads meet and norm */
    FEW_HEADS = 4,      /* heads of a token that a thread takes at a time: it fetches the next while it computes one */
    QUERY_BLOCK = 256,  /* queries that share one copy of the keys */
    WIDTH = 16,         /* floats that are added up side by side */
    PHASES = 10         /* counters of a layer */
};

typedef struct {
    float *normed; /* [rows][hidden] */
    Activations wide, narrow, of_head;
} Rows;

typedef struct {
    const Network *net;
    const Step *step;
    int threads;
    int prompts;  /* nothing is in the cache yet */
    int64_t rows;
    float *x, *qkv, *mixed, *branch, *gated; /* [rows][hidden], 3 hidden, hidden, hidden, inner */
    Rows *own;         /* of each thread, or all the same where there are many rows */
    float **space;     /* of each thread, for attention */
    Counter *counters;
} Pass;

/* Norm (or not) and quantize all rows; the threads share the work where there are many. */
static void prepare(const Pass *job, Rows *own, const float *const *norm, const float *x, int64_t width, const Matrix *m,
                    Activations *a, Counter *counter) {
    int64_t first = 0, end = job->rows;
    const int shared = job->rows > FEW_ROWS;
    while (shared ? next_piece(counter, job->rows, 4, &first, &end) : first < end) {
        for (int64_t row = first; row < end; row++) {
            const float *from = x + row * width;
            if (norm) {
                layer_norm(from, norm, width, job->net->epsilon, own->normed + row * width);
                from = own->normed + row * width;
            }
            quantize_row(m, from, width, a, row);
        }
        if (!shared) return;
    }
    pool_barrier();
}

/* Fetch the beginning of what a thread will read first of a matrix; `pair`: panels that are taken together. */
static inline void fetch_matrix(const Pass *job, const Matrix *m, int64_t pair, int thread) {
    const int64_t bytes = panel_bytes(m), size = piece_size(panel_count(m) / pair, job->threads) * pair;
    const uint8_t *from = m->panels + thread * size * bytes, *end = m->panels + panel_count(m) * bytes;
    for (int64_t k = 0; k < AHEAD && from + k < end; k += 64) __builtin_prefetch(from + k);
}

/* y [rows][m->rows] = product + bias (+ alpha * skip), all panels of a matrix in pieces. */
static void all_panels(const Pass *job, const Matrix *m, const Activations *a, int64_t rows, Counter *counter, float *y,
                       const float *skip, int thread) {
    const int64_t panels = panel_count(m), bytes = panel_bytes(m);
    const float alpha = job->net->alpha;
    int64_t first = -1, end;
    float tile[TILE * PANEL];
    while (next_of_mine(counter, panels, piece_size(panels, job->threads), thread, &first, &end))
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
static void gated_panels(const Pass *job, const Matrix *m, const Activations *a, Counter *counter, int thread) {
    const int64_t pairs = panel_count(m) / 2, bytes = panel_bytes(m), inner = half_rows(m);
    int64_t first = -1, end;
    float u[TILE * PANEL], v[TILE * PANEL];
    while (next_of_mine(counter, pairs, piece_size(pairs, job->threads), thread, &first, &end))
        for (int64_t pair = first; pair < end; pair++) {
            int64_t count, row = panel_row(m, 2 * pair, &count);
            for (int64_t b0 = 0; b0 < job->rows; b0 += TILE) {
                int n = job->rows - b0 < TILE ? (int)(job->rows - b0) : TILE;
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

/* ------------------------------------------------------------------------------------------------------------------------- */
/* Attention */

/* Index of a column of the cache, in columns. */
static int64_t cache_place(const Step *step, int64_t layer, int64_t head, const Place *place, int64_t column) {
    const int64_t at = column < place->shared ? place->prompt + column : place->own + column - place->shared;
    return layer * step->layer_stride + head * step->head_stride + at;
}

/* Codes of 8 bits, the largest number 127; returns what one stands for. */
static float store_codes(const float *x, int8_t *out, int64_t d) {
    float most = 0;
    for (int64_t k = 0; k < d; k++) most = fmaxf(most, fabsf(x[k]));
    const float scale = most / 127;
    for (int64_t k = 0; k < d; k++) out[k] = (int8_t)(scale > 0 ? nearbyintf(x[k] / scale) : 0);
    return scale;
}

static void store(const Step *step, void *cache, float *scales, const float *x, int64_t at, int64_t d) {
    if (step->cache_type == 2) scales[at] = store_codes(x, (int8_t *)cache + at * d, d);
    else if (step->cache_type == 1) store_half(x, (uint16_t *)cache + at * d, d);
    else memcpy((float *)cache + at * d, x, d * sizeof *x);
}

/* Rotate the key of a token and store it with its value; the rotated query, over sqrt(d), goes to `query`. */
static void enter(const Pass *job, int64_t layer, int64_t row, int64_t head, float *query) {
    const Step *step = job->step;
    const int64_t d = job->net->head_size, hidden = job->net->hidden, token = row % step->tokens;
    const Place *place = &step->places[row / step->tokens];
    const float *qkv = job->qkv + row * 3 * hidden + head * 3 * d;
    const float *cosines = step->cosines + step->positions[row] * d, *sines = step->sines + step->positions[row] * d;
    const float factor = 1.0f / sqrtf((float)d);
    float key[MOST_HEAD];
    rotate(qkv, cosines, sines, d, query);
    for (int64_t k = 0; k < d; k++) query[k] *= factor;
    if (token >= place->tokens) return;
    const int64_t at = cache_place(step, layer, head, place, place->length + token);
    rotate(qkv + d, cosines, sines, d, key);
    store(step, step->keys, step->key_scales, key, at, d);
    store(step, step->values, step->value_scales, qkv + 2 * d, at, d);
}

static float dot(const float *x, const float *y, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; k++) sum += x[k] * y[k];
    return sum;
}

static float dot_codes(const int8_t *x, const float *y, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; k++) sum += (float)x[k] * y[k];
    return sum;
}

#define HIDDEN -3e38f /* the score of a column that may not be seen */

/* Scores to weights, in place; returns their sum. */
static float soften(float *scores, int64_t n) {
    float most = HIDDEN, sum = 0;
#pragma omp simd reduction(max : most)
    for (int64_t t = 0; t < n; t++) most = scores[t] > most ? scores[t] : most;
#pragma omp simd reduction(+ : sum)
    for (int64_t t = 0; t < n; t++) {
        float weight = exponential(scores[t] - most);
        scores[t] = scores[t] < 0.5f * HIDDEN ? 0 : weight;
        sum += scores[t];
    }
    return sum;
}

#ifndef OWN_HALVES
/* Scores of columns; what lies at `then` is fetched meanwhile. */
static void score_halves(const uint16_t *keys, const uint16_t *then, int64_t count, const float *query, int64_t d,
                         float *scores) {
    for (int64_t t = 0; t < count; t++) {
        fetch(then + t * d, d);
        scores[t] = dot_half(keys + t * d, query, d);
    }
}

/* out += weights times columns; what lies at `then` is fetched meanwhile, or nothing if it is NULL. */
static void add_halves(const uint16_t *values, const uint16_t *then, int64_t count, const float *weights, int64_t d,
                       float *out) {
    for (int64_t t = 0; t < count; t++) {
        if (then) fetch(then + t * d, d);
        add_half(weights[t], values + t * d, out, d);
    }
}
#endif

/* Scores of columns that lie one behind the other; their values are fetched meanwhile. */
static void score_run(const Step *step, int64_t at, int64_t count, const float *query, int64_t d, float *scores) {
    if (step->cache_type == 2) {
        const int8_t *keys = (const int8_t *)step->keys + at * d;
        for (int64_t t = 0; t < count; t++) scores[t] = step->key_scales[at + t] * dot_codes(keys + t * d, query, d);
    } else if (step->cache_type == 1) {
        score_halves((const uint16_t *)step->keys + at * d, (const uint16_t *)step->values + at * d, count, query, d, scores);
    } else {
        const float *keys = (const float *)step->keys + at * d;
        for (int64_t t = 0; t < count; t++) scores[t] = dot(keys + t * d, query, d);
    }
}

/* out += weights times values of columns that lie one behind the other; with `next`, the keys of the head behind this one are
 * fetched meanwhile. */
static void add_run(const Step *step, int64_t at, int64_t count, const float *weights, int64_t d, float *out, int next) {
    if (step->cache_type == 2) {
        const int8_t *values = (const int8_t *)step->values + at * d;
        for (int64_t t = 0; t < count; t++) {
            const float weight = weights[t] * step->value_scales[at + t];
            for (int64_t k = 0; k < d; k++) out[k] += weight * (float)values[t * d + k];
        }
    } else if (step->cache_type == 1) {
        const uint16_t *keys = (const uint16_t *)step->keys + (at + step->head_stride) * d;
        add_halves((const uint16_t *)step->values + at * d, next ? keys : NULL, count, weights, d, out);
    } else {
        const float *values = (const float *)step->values + at * d;
        for (int64_t t = 0; t < count; t++)
            for (int64_t k = 0; k < d; k++) out[k] += weights[t] * values[t * d + k];
    }
}

/* One token of one head, straight from the cache: it sees all before it. What it computes does not depend on other rows. */
static void attend_one(const Pass *job, int64_t layer, int64_t row, int64_t head, const float *query, float *scores, int next) {
    const Step *step = job->step;
    const Place *place = &step->places[row / step->tokens];
    const int64_t d = job->net->head_size, token = row % step->tokens, columns = place->length + token + 1;
    const int64_t shared = place->shared < columns ? place->shared : columns;
    float *out = job->mixed + row * job->net->hidden + head * d;
    memset(out, 0, d * sizeof *out);
    if (token >= place->tokens) return;
    const int64_t prompt = cache_place(step, layer, head, place, 0), own = cache_place(step, layer, head, place, shared);
    score_run(step, prompt, shared, query, d, scores);
    score_run(step, own, columns - shared, query, d, scores + shared);
    const float sum = soften(scores, columns);
    add_run(step, prompt, shared, scores, d, out, next);
    add_run(step, own, columns - shared, scores + shared, d, out, next);
    for (int64_t k = 0; k < d; k++) out[k] /= sum;
}

static int64_t round_up(int64_t n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

/* Floats that attend_block needs: keys, values, scores, and queries of a tile. */
static size_t block_space(const Pass *job) {
    int64_t columns = round_up(job->step->tokens), d = round_up(job->net->head_size);
    return (size_t)(2 * columns * d + TILE * columns + TILE * d);
}

/* A column of the cache in float32. */
static inline void cache_column(const Step *step, const void *cache, const float *scales, int64_t at, int64_t d, float *out) {
    if (step->cache_type == 2) {
        const int8_t *codes = (const int8_t *)cache + at * d;
        for (int64_t k = 0; k < d; k++) out[k] = scales[at] * (float)codes[k];
    } else if (step->cache_type == 1) {
        memset(out, 0, d * sizeof *out);
        add_half(1.0f, (const uint16_t *)cache + at * d, out, d);
    } else memcpy(out, (const float *)cache + at * d, d * sizeof *out);
}

typedef float Wide __attribute__((vector_size(WIDTH * sizeof(float)), may_alias));

/* out [TILE][16] = weights [TILE][n] times block [n][16]; both strides in floats. */
static inline void weigh(const Wide *block, int64_t n, const float *weights, int64_t stride, Wide *out, int64_t out_stride) {
    Wide a = {0}, b = {0}, c = {0}, d = {0};
    for (int64_t k = 0; k < n; k++) {
        a += weights[k] * block[k];
        b += weights[stride + k] * block[k];
        c += weights[2 * stride + k] * block[k];
        d += weights[3 * stride + k] * block[k];
    }
    out_stride /= WIDTH;
    out[0] = a;
    out[out_stride] = b;
    out[2 * out_stride] = c;
    out[3 * out_stride] = d;
}

/* Some queries of one head of one prompt. Keys are copied as [columns / 16][d][16] and values as [d / 16][columns][16], so
 * that 16 numbers lie side by side wherever they are added up. */
static void attend_block(
    const Pass *job, int64_t layer, int64_t sequence, int64_t head, int64_t first, int64_t end, float *space) {
    const Step *step = job->step;
    const Place *place = &step->places[sequence];
    const int64_t d = job->net->head_size, wide = round_up(d), seen = place->tokens, columns = round_up(seen);
    float *keys = space, *values = keys + columns * wide, *scores = values + columns * wide, *query = scores + TILE * columns;
    float line[MOST_HEAD + WIDTH] = {0};
    memset(keys, 0, 2 * columns * wide * sizeof *keys);
    for (int64_t t = 0; t < seen; t++) {
        const int64_t at = cache_place(step, layer, head, place, t);
        cache_column(step, step->keys, step->key_scales, at, d, line);
        float *to = keys + t / WIDTH * WIDTH * wide + t % WIDTH;
        for (int64_t k = 0; k < d; k++) to[k * WIDTH] = line[k];
        cache_column(step, step->values, step->value_scales, at, d, line);
        for (int64_t k = 0; k < wide; k += WIDTH) memcpy(values + k * columns + t * WIDTH, line + k, WIDTH * sizeof *line);
    }
    for (int64_t q0 = first; q0 < end; q0 += TILE) {
        const int64_t count = end - q0 < TILE ? end - q0 : TILE;
        float sums[TILE] = {0};
        for (int64_t b = 0; b < TILE; b++) { /* a short tile computes its last query again */
            const float *from = job->qkv + (sequence * step->tokens + q0 + (b < count ? b : count - 1)) * 3 * job->net->hidden;
            memcpy(query + b * wide, from + head * 3 * d, d * sizeof *query);
        }
        for (int64_t t0 = 0; t0 < columns; t0 += WIDTH)
            weigh((const Wide *)(keys + t0 * wide), d, query, wide, (Wide *)(scores + t0), columns);
        for (int64_t b = 0; b < count; b++) {
            float *own = scores + b * columns;
            if (step->visible) {
                const uint8_t *visible = step->visible + (sequence * step->tokens + q0 + b) * step->visible_stride;
                for (int64_t t = 0; t < seen; t++) own[t] = visible[t] ? own[t] : HIDDEN;
            } else
                for (int64_t t = q0 + b + 1; t < seen; t++) own[t] = HIDDEN;
            sums[b] = 1 / fmaxf(soften(own, seen), SMALLEST); /* padding sees nothing: 0, for what is not finite spreads */
            for (int64_t t = seen; t < columns; t++) own[t] = 0;
        }
        for (int64_t k0 = 0; k0 < wide; k0 += WIDTH) {
            Wide s[TILE];
            weigh((const Wide *)(values + k0 * columns), seen, scores, columns, s, WIDTH);
            for (int64_t b = 0; b < count; b++) {
                float *out = job->mixed + (sequence * step->tokens + q0 + b) * job->net->hidden + head * d;
                for (int64_t j = 0; j < WIDTH && k0 + j < d; j++) out[k0 + j] = s[b][j] * sums[b];
            }
        }
    }
}

static void attention(const Pass *job, int64_t layer, Counter *counter, float *space) {
    const int64_t heads = job->net->heads, tokens = job->step->tokens, d = job->net->head_size;
    int64_t first, end;
    if (tokens == 1) {
        const int64_t fair = job->rows * heads / (2 * job->threads), few = fair < 1 ? 1 : fair > FEW_HEADS ? FEW_HEADS : fair;
        while (next_piece(counter, job->rows * heads, few, &first, &end))
            for (int64_t item = first; item < end; item++) {
                const int64_t row = item / heads, head = item % heads;
                float query[MOST_HEAD];
                enter(job, layer, row, head, query);
                attend_one(job, layer, row, head, query, space, item + 1 < end && head + 1 < heads);
            }
        return;
    }
    while (next_piece(counter, job->rows, 4, &first, &end))
        for (int64_t row = first; row < end; row++)
            for (int64_t head = 0; head < heads; head++) {
                float query[MOST_HEAD];
                enter(job, layer, row, head, query);
                memcpy(job->qkv + row * 3 * job->net->hidden + head * 3 * d, query, d * sizeof *query);
            }
    pool_barrier();
    if (!job->prompts) {
        while (next_piece(counter + 1, job->rows * heads, 1, &first, &end)) {
            const float *query = job->qkv + first / heads * 3 * job->net->hidden + first % heads * 3 * d;
            attend_one(job, layer, first / heads, first % heads, query, space, 0);
        }
        return;
    }
    const int64_t blocks = (tokens + QUERY_BLOCK - 1) / QUERY_BLOCK;
    while (next_piece(counter + 1, job->step->sequences * heads * blocks, 1, &first, &end)) {
        const int64_t block = first % blocks * QUERY_BLOCK, head = first / blocks % heads;
        const int64_t stop = block + QUERY_BLOCK < tokens ? block + QUERY_BLOCK : tokens;
        attend_block(job, layer, first / blocks / heads, head, block, stop, space);
    }
}

/* ------------------------------------------------------------------------------------------------------------------------- */
/* The pass */

/* A row of a packed matrix in float32. */
static void unpack_row(const Matrix *m, int64_t row, int64_t n, float *out) {
    const uint8_t *p = m->panels + row / PANEL * panel_bytes(m) + row % PANEL * 4;
    const int64_t r = row % PANEL, group_bytes = m->group * PANEL * m->bits / 8;
    for (int64_t start = 0; start < n; start += m->group, p += group_bytes + 2 * PANEL) {
        uint16_t half;
        memcpy(&half, p - 4 * r + group_bytes + 2 * r, 2);
        float scale = 0;
        add_half(1.0f, &half, &scale, 1);
        for (int64_t k = 0; k < m->group && start + k < n; k++) {
            const uint8_t code = m->bits == 8 ? p[k / 4 * 4 * PANEL + k % 4] : p[k / 8 * 4 * PANEL + k % 4];
            const int value = m->bits == 8 ? code - 128 : (k % 8 < 4 ? code & 15 : code >> 4) - 8;
            out[start + k] = (float)value * scale;
        }
    }
}

static void pass_work(void *context, int thread) {
    Pass *job = context;
    const Network *net = job->net;
    const Step *step = job->step;
    const int64_t hidden = net->hidden, rows = job->rows;
    Rows *own = &job->own[thread];
    Counter *counter = job->counters;
    const float *x = step->embeddings;
    int64_t first, end;
    if (step->ids) {
        while (next_piece(counter, rows, 4, &first, &end))
            for (int64_t row = first; row < end; row++) unpack_row(&net->head, step->ids[row], hidden, job->x + row * hidden);
        pool_barrier();
        x = job->x;
    }
    counter += 1;
    for (int64_t n = 0; n < net->num_layers; n++, counter += PHASES) {
        const Layer *layer = &net->layers[n];
        prepare(job, own, layer->input_norm, x, hidden, &layer->query_key_value, &own->narrow, counter);
        all_panels(job, &layer->query_key_value, &own->narrow, rows, counter + 1, job->qkv, NULL, thread);
        pool_barrier();
        fetch_matrix(job, &layer->dense, 1, thread);
        attention(job, n, counter + 2, job->space[thread]);
        pool_barrier();
        prepare(job, own, NULL, job->mixed, hidden, &layer->dense, &own->narrow, counter + 4);
        all_panels(job, &layer->dense, &own->narrow, rows, counter + 5, job->branch, own->normed, thread);
        fetch_matrix(job, &layer->h_to_4h, 2, thread);
        pool_barrier();
        prepare(job, own, layer->attention_norm, job->branch, hidden, &layer->h_to_4h, &own->narrow, counter + 6);
        gated_panels(job, &layer->h_to_4h, &own->narrow, counter + 7, thread);
        fetch_matrix(job, &layer->four_h_to_h, 1, thread);
        pool_barrier();
        prepare(job, own, NULL, job->gated, net->inner, &layer->four_h_to_h, &own->wide, counter + 8);
        all_panels(job, &layer->four_h_to_h, &own->wide, rows, counter + 9, job->x, own->normed, thread);
        const Matrix *next = n + 1 < net->num_layers ? &layer[1].query_key_value : &net->head;
        if (next->panels) fetch_matrix(job, next, 1, thread);
        pool_barrier();
        x = job->x;
    }
    while (next_piece(counter, step->num_picked, 4, &first, &end))
        for (int64_t i = first; i < end; i++) {
            const float *from = x + (step->picked ? step->picked[i] : i) * hidden;
            if (net->ends) layer_norm(from, net->final_norm, hidden, net->epsilon, step->normed + i * hidden);
            else memcpy(step->normed + i * hidden, from, hidden * sizeof *from);
        }
    if (!net->head.panels) return;
    pool_barrier();
    if (thread == 0)
        for (int64_t i = 0; i < step->num_picked; i++)
            quantize_row(&net->head, step->normed + i * hidden, hidden, &job->own->of_head, i);
    pool_barrier();
    all_panels(job, &net->head, &job->own->of_head, step->num_picked, counter + 1, step->logits, NULL, thread);
}

static int step(const Network *net, const Step *given, int threads) {
    const Layer *layer = net->layers;
    const int64_t rows = given->sequences * given->tokens, hidden = net->hidden, count = PHASES * net->num_layers + 3;
    const int copies = rows > FEW_ROWS ? 1 : threads;
    Pass job = {.net = net, .step = given, .threads = threads, .rows = rows};
    int64_t longest = 0;
    for (int64_t row = 0; row < rows; row++)
        if (given->positions[row] < 0 || given->positions[row] >= given->num_positions) return NO_SUCH_POSITION;
    for (int64_t i = 0; i < given->sequences; i++)
        longest = given->places[i].length > longest ? given->places[i].length : longest;
    job.prompts = longest == 0 && given->tokens > 1;
    const size_t of_attention = (job.prompts ? block_space(&job) : (size_t)(longest + given->tokens)) * sizeof(float);
    size_t shared = (size_t)rows * (6 * hidden + net->inner) * 4 + count * sizeof(Counter) + threads * (sizeof(Rows) + 8) + 12 * 64;
    size_t own = (size_t)rows * hidden * 4 + 64 + activation_bytes(&layer->query_key_value, rows) +
                 activation_bytes(&layer->four_h_to_h, rows) + (net->head.panels ? activation_bytes(&net->head, given->num_picked) : 0);
    Space space = space_of(shared + copies * own + threads * (of_attention + 64));
    if (!space.at) return NO_MEMORY;
    job.counters = take(&space, count * sizeof(Counter));
    for (int64_t i = 0; i < count; i++) atomic_init(&job.counters[i].next, 0);
    job.x = take(&space, rows * hidden * 4);
    job.qkv = take(&space, rows * 3 * hidden * 4);
    job.mixed = take(&space, rows * hidden * 4);
    job.branch = take(&space, rows * hidden * 4);
    job.gated = take(&space, rows * net->inner * 4);
    job.own = take(&space, threads * sizeof(Rows));
    job.space = take(&space, threads * sizeof(float *));
    for (int i = 0; i < threads; i++) {
        job.space[i] = take(&space, of_attention);
        if (i >= copies) {
            job.own[i] = job.own[0];
            continue;
        }
        Rows *each = &job.own[i];
        each->normed = take(&space, rows * hidden * 4);
        each->narrow = take_activations(&space, &layer->query_key_value, rows);
        each->wide = take_activations(&space, &layer->four_h_to_h, rows);
        if (net->head.panels && i == 0) each->of_head = take_activations(&space, &net->head, given->num_picked);
        each->narrow.past = each->wide.past = each->of_head.past = net->past;
    }
    pool_run(pass_work, &job, threads);
    return 0;
}
