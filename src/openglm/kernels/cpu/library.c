/* What Python calls: memory, packing, and the best variant that this processor runs. */
#define _GNU_SOURCE
#include "panels.h"
#include "pool.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#define EXPORT __attribute__((visibility("default")))

extern const Variant variant_portable;
#ifdef HAS_avx512
extern const Variant variant_avx512;
#endif
#ifdef HAS_avx2
extern const Variant variant_avx2;
#endif
#ifdef HAS_neon
extern const Variant variant_neon;
#endif

/* The variants that run here, best first; returns how many. */
static int found_variants(const Variant **found) {
    int count = 0;
#ifdef HAS_avx512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
        found[count++] = &variant_avx512;
#endif
#ifdef HAS_avx2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        found[count++] = &variant_avx2;
#endif
#ifdef HAS_neon
#ifdef __linux__
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP)
#endif
        found[count++] = &variant_neon;
#endif
    found[count++] = &variant_portable;
    return count;
}

static const Variant *chosen;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Name of the i-th variant that runs here, best first; NULL behind the last. */
EXPORT const char *glm_variant(int i) {
    const Variant *found[8];
    return i < found_variants(found) ? found[i]->name : NULL;
}

/* Use this one from now on. Returns -1 if it does not run here. */
EXPORT int glm_choose(const char *name) {
    const Variant *found[8];
    int count = found_variants(found);
    for (int i = 0; i < count; i++)
        if (!strcmp(found[i]->name, name)) {
            chosen = found[i];
            return 0;
        }
    return -1;
}

/* Sizes of the structures, for the caller to compare with its own. */
EXPORT void glm_sizes(int64_t *sizes) {
    sizes[0] = sizeof(Matrix);
    sizes[1] = sizeof(Layer);
    sizes[2] = sizeof(Network);
    sizes[3] = sizeof(Step);
}

EXPORT int64_t glm_panel_bytes(const Matrix *m) { return panel_bytes(m); }
EXPORT int64_t glm_panel_count(const Matrix *m) { return panel_count(m); }

/* Memory in huge pages where the system has them: reading is up to 1.5 times as fast. NULL if there is none. */
EXPORT void *glm_allocate(size_t size) {
    const size_t huge = (size_t)1 << 21;
    size = (size + huge - 1) & ~(huge - 1);
    char *at = mmap(NULL, size + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) return NULL;
    char *begin = (char *)(((uintptr_t)at + huge - 1) & ~(uintptr_t)(huge - 1));
    if (begin > at) munmap(at, begin - at);
    if (begin + size < at + size + huge) munmap(begin + size, at + huge - begin);
#ifdef MADV_HUGEPAGE
    madvise(begin, size, MADV_HUGEPAGE);
#endif
    return begin;
}

EXPORT void glm_free(void *at, size_t size) {
    const size_t huge = (size_t)1 << 21;
    munmap(at, (size + huge - 1) & ~(huge - 1));
}

/* Codes int8 [count][columns] of the rows of one panel, and their scales float16 [count][groups], into its bytes.
 * m->columns may be more than `columns`: codes of 0 fill the rest, as they fill the rows that do not exist. */
static void pack_panel(
    const Matrix *m, const int8_t *codes, int64_t columns, const uint16_t *scales, int64_t count, uint8_t *out) {
    const int64_t group = m->group, groups = m->columns / group;
    const int offset = m->bits == 8 ? 128 : 8;
    for (int64_t g = 0; g < groups; g++) {
        for (int64_t k = g * group; k < (g + 1) * group; k += m->bits == 8 ? 4 : 8, out += 4 * PANEL)
            for (int64_t r = 0; r < PANEL; r++)
                for (int64_t j = 0; j < 4; j++) {
                    int64_t at = k + j, next = k + 4 + j;
                    int code = r < count && at < columns ? codes[r * columns + at] : 0;
                    if (m->bits == 4) {
                        int second = r < count && next < columns ? codes[r * columns + next] : 0;
                        code = (code + offset) | (second + offset) << 4;
                    } else code += offset;
                    out[4 * r + j] = (uint8_t)code;
                }
        uint16_t own[PANEL];
        for (int64_t r = 0; r < PANEL; r++) own[r] = r < count ? scales[r * groups + g] : 0;
        memcpy(out, own, sizeof own);
        out += sizeof own;
    }
}

/* Rows first .. first + n of a matrix, codes int8 [n][columns] and scales float16 [n][groups], into m->panels. `first` is
 * the first row of a panel, and n whole panels or up to the end of a half. */
EXPORT void glm_pack(const Matrix *m, int64_t first, int64_t n, const int8_t *codes, int64_t columns, const uint16_t *scales) {
    const int64_t groups = m->columns / m->group, own = half_rows(m);
    for (int64_t r = 0; r < n; r += PANEL) {
        int64_t row = first + r, half = row / own, panel = row % own / PANEL * m->halves + half;
        int64_t count = n - r < PANEL ? n - r : PANEL;
        pack_panel(m, codes + r * columns, columns, scales + r * groups, count, (uint8_t *)m->panels + panel * panel_bytes(m));
    }
}

EXPORT int glm_linear(const Matrix *m, const float *x, int64_t n, int64_t stride, float *y, int64_t y_stride, int threads) {
    pthread_mutex_lock(&lock);
    int result = chosen->linear(m, x, n, stride, y, y_stride, threads);
    pthread_mutex_unlock(&lock);
    return result;
}

EXPORT int glm_step(const Network *net, const Step *step, int threads) {
    pthread_mutex_lock(&lock);
    int result = chosen->step(net, step, threads);
    pthread_mutex_unlock(&lock);
    return result;
}

EXPORT int glm_sums(const Matrix *m, const float *x, int32_t *sums, float *scales) {
    pthread_mutex_lock(&lock);
    int result = chosen->sums(m, x, sums, scales);
    pthread_mutex_unlock(&lock);
    return result;
}

typedef struct {
    const uint8_t *at;
    size_t size;
    uint64_t sums[256];
} Reading;

static void read_work(void *context, int thread) {
    Reading *job = context;
    const size_t lines = job->size / 64, threads = pool_threads(); /* that run, be they fewer than were asked for */
    const uint8_t *p = job->at + lines * thread / threads * 64, *end = job->at + lines * (thread + 1) / threads * 64;
    uint64_t sums[8] = {0};
    for (size_t k = 0; p + k < end; k += 64) {
        __builtin_prefetch(p + k + 4096);
        const uint64_t *line = (const uint64_t *)(p + k);
        for (int i = 0; i < 8; i++) sums[i] += line[i];
    }
    for (int i = 0; i < 8; i++) job->sums[thread] += sums[i];
}

/* Read memory once from end to end, as the kernels read weights: what their speed is compared with. */
EXPORT uint64_t glm_read(const void *at, size_t size, int threads) {
    Reading job = {.at = at, .size = size};
    uint64_t sum = 0;
    if (threads > 256) return 0;
    pthread_mutex_lock(&lock);
    pool_run(read_work, &job, threads);
    pthread_mutex_unlock(&lock);
    for (int i = 0; i < threads; i++) sum += job.sums[i];
    return sum;
}
