/* Panels times activations with AVX-512 VNNI: a register holds 16 rows, four columns of each in a lane. */
#include <immintrin.h>

/* Activations lie as [4 high][4 low] bytes for each quad of columns. */
static inline void quantize_chunk(const float *x, int64_t n, int8_t *bytes, float *scale, int32_t *offsets, int bits) {
    __m512 most = _mm512_setzero_ps(), bad = _mm512_setzero_ps();
    for (int64_t k = 0; k < n; k += 16) {
        __m512 v = _mm512_loadu_ps(x + k);
        most = _mm512_max_ps(most, _mm512_abs_ps(v));
        bad = _mm512_fmadd_ps(v, _mm512_setzero_ps(), bad); /* not a number once any is none, or is infinite */
    }
    float largest = _mm512_reduce_max_ps(most);
    *scale = largest / LARGEST + _mm512_reduce_add_ps(bad);
    __m512 inverse = _mm512_set1_ps(largest < SMALLEST ? 0 : LARGEST / largest);
    __m512i sum_high = _mm512_setzero_si512(), sum_low = _mm512_setzero_si512();
    for (int64_t k = 0; k < n; k += 16, bytes += 32) {
        __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), inverse));
        __m512i high = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
        __m512i low = _mm512_sub_epi32(v, _mm512_slli_epi32(high, 8));
        sum_high = _mm512_add_epi32(sum_high, high);
        sum_low = _mm512_add_epi32(sum_low, low);
        __m128i h = _mm512_cvtepi32_epi8(high), l = _mm512_cvtepi32_epi8(low);
        _mm_storeu_si128((__m128i *)bytes, _mm_unpacklo_epi32(h, l));
        _mm_storeu_si128((__m128i *)(bytes + 16), _mm_unpackhi_epi32(h, l));
    }
    int offset = bits == 8 ? 128 : 8;
    offsets[0] = -offset * _mm512_reduce_add_epi32(sum_high);
    offsets[1] = -offset * _mm512_reduce_add_epi32(sum_low);
}

/* The bytes of quad q of some row's chunk, in every lane. */
#define QUAD(bytes, q) _mm512_set1_epi32(*(const int32_t *)(bytes + 8 * (q)))
/* Fetch what will be read 4 KB later, the lines of the scales too: with huge pages this doubles the speed of one thread. What
 * is read once, and too large to be kept, need not push everything else out of the caches. */
#define FETCH(p, past)                                                     \
    do {                                                                   \
        if (past) _mm_prefetch((const char *)(p) + 4096, _MM_HINT_NTA);    \
        else _mm_prefetch((const char *)(p) + 4096, _MM_HINT_T0);          \
    } while (0)

/* Sums over one chunk, high << 8 plus low, for TILE or fewer rows of activations: s[row][half of the panel]. */
static inline __attribute__((always_inline)) const uint8_t *chunk_sums(
    const uint8_t *p, const int count, const int bits, const int past, int64_t quads, const int8_t *const *bytes,
    const int32_t *const *offsets,
    __m512i (*s)[2]) {
    __m512i h0[TILE], h1[TILE], l0[TILE], l1[TILE];
    for (int b = 0; b < count; b++) {
        h0[b] = h1[b] = _mm512_set1_epi32(offsets[b][0]);
        l0[b] = l1[b] = _mm512_set1_epi32(offsets[b][1]);
    }
    if (bits == 8) {
        for (int64_t q = 0; q < quads; q++, p += 128) {
            __m512i w0 = _mm512_load_si512(p), w1 = _mm512_load_si512(p + 64);
            FETCH(p, past);
            FETCH(p + 64, past);
            for (int b = 0; b < count; b++) {
                __m512i high = QUAD(bytes[b], q), low = QUAD(bytes[b] + 4, q);
                h0[b] = _mm512_dpbusd_epi32(h0[b], w0, high);
                h1[b] = _mm512_dpbusd_epi32(h1[b], w1, high);
                l0[b] = _mm512_dpbusd_epi32(l0[b], w0, low);
                l1[b] = _mm512_dpbusd_epi32(l1[b], w1, low);
            }
        }
    } else {
        const __m512i nibble = _mm512_set1_epi8(15);
        for (int64_t q = 0; q < quads; q += 2, p += 128) {
            __m512i both0 = _mm512_load_si512(p), both1 = _mm512_load_si512(p + 64);
            FETCH(p, past);
            FETCH(p + 64, past);
            __m512i w0 = _mm512_and_si512(both0, nibble), w1 = _mm512_and_si512(both1, nibble);
            __m512i v0 = _mm512_and_si512(_mm512_srli_epi16(both0, 4), nibble);
            __m512i v1 = _mm512_and_si512(_mm512_srli_epi16(both1, 4), nibble);
            for (int b = 0; b < count; b++) {
                __m512i high = QUAD(bytes[b], q), low = QUAD(bytes[b] + 4, q);
                __m512i next_high = QUAD(bytes[b], q + 1), next_low = QUAD(bytes[b] + 4, q + 1);
                h0[b] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(h0[b], w0, high), v0, next_high);
                h1[b] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(h1[b], w1, high), v1, next_high);
                l0[b] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(l0[b], w0, low), v0, next_low);
                l1[b] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(l1[b], w1, low), v1, next_low);
            }
        }
    }
    for (int b = 0; b < count; b++) {
        s[b][0] = _mm512_add_epi32(_mm512_slli_epi32(h0[b], 8), l0[b]);
        s[b][1] = _mm512_add_epi32(_mm512_slli_epi32(h1[b], 8), l1[b]);
    }
    return p;
}

static inline __attribute__((always_inline)) void product_tile(
    const uint8_t *p, const Matrix *m, const Activations *a, int64_t first, const int count, const int bits, const int past,
    float *y) {
    const int64_t chunks = m->columns / m->chunk, of_group = m->group / m->chunk;
    const int8_t *bytes[TILE];
    const int32_t *offsets[TILE];
    const float *scales[TILE];
    __m512 y0[TILE], y1[TILE];
    for (int b = 0; b < count; b++) {
        bytes[b] = a->bytes + (first + b) * 2 * m->columns;
        offsets[b] = a->offsets + (first + b) * chunks * 2;
        scales[b] = a->scales + (first + b) * chunks;
        y0[b] = y1[b] = _mm512_setzero_ps();
    }
    for (int64_t c = 0; c < chunks; c += of_group) {
        __m512 sum0[TILE], sum1[TILE];
        for (int b = 0; b < count; b++) sum0[b] = sum1[b] = _mm512_setzero_ps();
        for (int64_t i = 0; i < of_group; i++) {
            __m512i s[TILE][2];
            p = chunk_sums(p, count, bits, past, m->chunk / 4, bytes, offsets, s);
            for (int b = 0; b < count; b++) {
                __m512 own = _mm512_set1_ps(scales[b][c + i]);
                sum0[b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s[b][0]), own, sum0[b]);
                sum1[b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s[b][1]), own, sum1[b]);
                bytes[b] += 2 * m->chunk;
                offsets[b] += 2;
            }
        }
        __m512 scale0 = _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)p));
        __m512 scale1 = _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)(p + 32)));
        FETCH(p, past);
        p += 2 * PANEL;
        for (int b = 0; b < count; b++) {
            y0[b] = _mm512_fmadd_ps(sum0[b], scale0, y0[b]);
            y1[b] = _mm512_fmadd_ps(sum1[b], scale1, y1[b]);
        }
    }
    for (int b = 0; b < count; b++) {
        _mm512_storeu_ps(y + b * PANEL, y0[b]);
        _mm512_storeu_ps(y + b * PANEL + 16, y1[b]);
    }
}

/* y [count][32] = one panel times the rows first .. first + count of the activations; count is at most TILE. */
static void product(const uint8_t *p, const Matrix *m, const Activations *a, int64_t first, int count, float *y) {
#define CASE(n, past) \
    case n: \
        if (m->bits == 8) product_tile(p, m, a, first, n, 8, past, y); \
        else product_tile(p, m, a, first, n, 4, past, y); \
        return;
    if (a->past)
        switch (count) { CASE(1, 1) }
    switch (count) { CASE(1, 0) CASE(2, 0) CASE(3, 0) CASE(4, 0) }
#undef CASE
}

static void product_sums(const uint8_t *p, const Matrix *m, const Activations *a, int32_t *sums) {
    const int8_t *bytes[1] = {a->bytes};
    const int32_t *offsets[1] = {a->offsets};
    for (int64_t c = 0; c < m->columns / m->chunk; c++, sums += PANEL) {
        __m512i s[1][2];
        if (m->bits == 8) p = chunk_sums(p, 1, 8, 0, m->chunk / 4, bytes, offsets, s);
        else p = chunk_sums(p, 1, 4, 0, m->chunk / 4, bytes, offsets, s);
        if ((c + 1) * m->chunk % m->group == 0) p += 2 * PANEL;
        _mm512_storeu_si512(sums, s[0][0]);
        _mm512_storeu_si512(sums + 16, s[0][1]);
        bytes[0] += 2 * m->chunk;
        offsets[0] += 2;
    }
}

/* Numbers k to k + 16 of n. */
static inline __m512 halves_at(const uint16_t *x, int64_t k, int64_t n) {
    if (k + 16 <= n) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(x + k)));
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((1u << (n - k)) - 1, x + k));
}

/* The four sums of 16 numbers each. */
static inline __m128 four_sums(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 both = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
}

/* Four columns at a time; a column's sum does not depend on the others. */
#define OWN_HALVES
static void score_halves(const uint16_t *keys, const uint16_t *then, int64_t count, const float *query, int64_t d,
                         float *scores) {
    for (int64_t t = 0; t < count; t += 4) {
        const int64_t last = count - 1 - t < 3 ? count - 1 - t : 3;
        const uint16_t *x[4];
        __m512 s[4];
        for (int i = 0; i < 4; i++) {
            x[i] = keys + (t + (i < last ? i : last)) * d;
            s[i] = _mm512_setzero_ps();
        }
        fetch(then + t * d, (last + 1) * d);
        for (int64_t k = 0; k < d; k += 16) {
            const __m512 q = k + 16 <= d ? _mm512_loadu_ps(query + k) : _mm512_maskz_loadu_ps((1u << (d - k)) - 1, query + k);
            for (int i = 0; i < 4; i++) s[i] = _mm512_fmadd_ps(halves_at(x[i], k, d), q, s[i]);
        }
        float found[4];
        _mm_storeu_ps(found, four_sums(s[0], s[1], s[2], s[3]));
        memcpy(scores + t, found, (last + 1) * sizeof *found);
    }
}

static void add_halves(const uint16_t *values, const uint16_t *then, int64_t count, const float *weights, int64_t d,
                       float *out) {
    for (int64_t k = 0; k < d; k += 64) { /* sums of 64 numbers stay in registers */
        float part[64] = {0};
        const int64_t n = d - k < 64 ? d - k : 64;
        memcpy(part, out + k, n * sizeof *part);
        __m512 s[4];
        for (int i = 0; i < 4; i++) s[i] = _mm512_loadu_ps(part + 16 * i);
        for (int64_t t = 0; t < count; t++) {
            const uint16_t *x = values + t * d + k;
            const __m512 w = _mm512_set1_ps(weights[t]);
            if (then) fetch(then + t * d + k, n);
            if (n == 64)
                for (int i = 0; i < 4; i++) s[i] = _mm512_fmadd_ps(w, halves_at(x, 16 * i, 64), s[i]);
            else
                for (int i = 0; 16 * i < n; i++) s[i] = _mm512_fmadd_ps(w, halves_at(x, 16 * i, n), s[i]);
        }
        for (int i = 0; i < 4; i++) _mm512_storeu_ps(part + 16 * i, s[i]);
        memcpy(out + k, part, n * sizeof *part);
    }
}

static inline void add_half(float factor, const uint16_t *x, float *y, int64_t n) {
    __m512 f = _mm512_set1_ps(factor);
    for (int64_t k = 0; k < n; k += 16) {
        __mmask16 m = n - k < 16 ? (1u << (n - k)) - 1 : 0xffff;
        __m512 v = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, x + k));
        _mm512_mask_storeu_ps(y + k, m, _mm512_fmadd_ps(f, v, _mm512_maskz_loadu_ps(m, y + k)));
    }
}

static inline void store_half(const float *x, uint16_t *y, int64_t n) {
    for (int64_t k = 0; k < n; k += 16) {
        __mmask16 m = n - k < 16 ? (1u << (n - k)) - 1 : 0xffff;
        __m256i v = _mm512_cvtps_ph(_mm512_maskz_loadu_ps(m, x + k), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_mask_storeu_epi16(y + k, m, v);
    }
}
