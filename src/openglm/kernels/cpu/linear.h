/* Memory that lasts from call to call, work in pieces, and one product. */
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

/* The same, but each thread begins with the piece of its own number, so that it can fetch what it will read first; *first < 0
 * begins. */
static inline int next_of_mine(Counter *counter, int64_t total, int64_t size, int thread, int64_t *first, int64_t *end) {
    if (*first < 0) *first = thread * size;
    else *first = pool_threads() * size + atomic_fetch_add_explicit(&counter->next, size, memory_order_relaxed);
    *end = *first + size < total ? *first + size : total;
    return *first < total;
}

static inline int64_t piece_size(int64_t total, int threads) {
    int64_t size = total / (threads * 6);
    return threads == 1 ? total : size < 1 ? 1 : size > 16 ? 16 : size;
}

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
    if (!space.at) return NO_MEMORY;
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
