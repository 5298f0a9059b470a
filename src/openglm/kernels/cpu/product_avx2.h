/* Panels times activations with AVX2: a register holds 8 rows.
 *
 * Codes of 4 bits times bytes fit the 16-bit sums of vpmaddubsw; codes of 8 bits would saturate them, so they are widened and
 * meet activations of 16 bits. Both give the same integers as VNNI does. */
#include <immintrin.h>

static inline void quantize_chunk(const float *x, int64_t n, int8_t *bytes, float *scale, int32_t *offsets, int bits) {
    int32_t values[128];
    *scale = chunk_values(x, n, values);
    int32_t sum_high = 0, sum_low = 0;
    if (bits == 8) {
        int16_t *wide = (int16_t *)bytes;
        for (int64_t k = 0; k < n; k++) {
            wide[k] = (int16_t)values[k];
            sum_low += values[k];
        }
    } else {
        for (int64_t k = 0; k < n; k++) {
            int32_t high = (values[k] + 128) >> 8, low = values[k] - 256 * high;
            bytes[8 * (k / 4) + k % 4] = (int8_t)high;
            bytes[8 * (k / 4) + 4 + k % 4] = (int8_t)low;
            sum_high += high;
            sum_low += low;
        }
    }
    int offset = bits == 8 ? 128 : 8;
    offsets[0] = -offset * sum_high;
    offsets[1] = -offset * sum_low;
}

/* What will be read 4 KB later. */
#define FETCH(p) _mm_prefetch((const char *)(p) + 4096, _MM_HINT_T0)

/* 32 sums over one chunk of one row of activations; returns what follows the codes. */
static inline const uint8_t *chunk_sums(
    const uint8_t *p, const Matrix *m, const int8_t *bytes, const int32_t *offsets, __m256i *s) {
    if (m->bits == 8) {
        const int16_t *v = (const int16_t *)bytes;
        __m256i sums[8];
        for (int i = 0; i < 8; i++) sums[i] = _mm256_setzero_si256();
        for (int64_t k = 0; k < m->chunk; k += 4, p += 128) {
            int64_t four;
            memcpy(&four, v + k, 8);
            __m256i x = _mm256_set1_epi64x(four);
            FETCH(p);
            FETCH(p + 64);
            for (int i = 0; i < 8; i++) {
                __m256i w = _mm256_cvtepu8_epi16(_mm_load_si128((const __m128i *)p + i));
                sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(w, x));
            }
        }
        for (int i = 0; i < 4; i++) { /* two columns' sums of a row lie side by side */
            __m256i pairs = _mm256_hadd_epi32(sums[2 * i], sums[2 * i + 1]);
            s[i] = _mm256_add_epi32(_mm256_permute4x64_epi64(pairs, 0xd8), _mm256_set1_epi32(offsets[1]));
        }
    } else {
        const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
        __m256i h[4], l[4];
        for (int i = 0; i < 4; i++) {
            h[i] = _mm256_set1_epi32(offsets[0]);
            l[i] = _mm256_set1_epi32(offsets[1]);
        }
        for (int64_t k = 0; k < m->chunk; k += 8, p += 128, bytes += 16) {
            int32_t four[4];
            memcpy(four, bytes, 16);
            __m256i high = _mm256_set1_epi32(four[0]), low = _mm256_set1_epi32(four[1]);
            __m256i next_high = _mm256_set1_epi32(four[2]), next_low = _mm256_set1_epi32(four[3]);
            FETCH(p);
            FETCH(p + 64);
            for (int i = 0; i < 4; i++) {
                __m256i both = _mm256_load_si256((const __m256i *)p + i);
                __m256i w = _mm256_and_si256(both, nibble), v = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
                __m256i sum_high = _mm256_add_epi16(_mm256_maddubs_epi16(w, high), _mm256_maddubs_epi16(v, next_high));
                __m256i sum_low = _mm256_add_epi16(_mm256_maddubs_epi16(w, low), _mm256_maddubs_epi16(v, next_low));
                h[i] = _mm256_add_epi32(h[i], _mm256_madd_epi16(sum_high, ones));
                l[i] = _mm256_add_epi32(l[i], _mm256_madd_epi16(sum_low, ones));
            }
        }
        for (int i = 0; i < 4; i++) s[i] = _mm256_add_epi32(_mm256_slli_epi32(h[i], 8), l[i]);
    }
    return p;
}

static inline void load_scales(const uint8_t *p, __m256 *scales) {
    for (int i = 0; i < 4; i++) scales[i] = _mm256_cvtph_ps(_mm_load_si128((const __m128i *)p + i));
}

static void product(const uint8_t *panel, const Matrix *m, const Activations *a, int64_t first, int count, float *y) {
    const int64_t chunks = m->columns / m->chunk, of_group = m->group / m->chunk;
    for (int b = 0; b < count; b++, y += PANEL) {
        const uint8_t *p = panel;
        const int8_t *bytes = a->bytes + (first + b) * 2 * m->columns;
        const int32_t *offsets = a->offsets + (first + b) * chunks * 2;
        const float *own = a->scales + (first + b) * chunks;
        __m256 total[4], scales[4];
        for (int i = 0; i < 4; i++) total[i] = _mm256_setzero_ps();
        for (int64_t c = 0; c < chunks; c += of_group) {
            __m256 sums[4];
            for (int i = 0; i < 4; i++) sums[i] = _mm256_setzero_ps();
            for (int64_t j = c; j < c + of_group; j++, bytes += 2 * m->chunk) {
                __m256i s[4];
                p = chunk_sums(p, m, bytes, offsets + 2 * j, s);
                for (int i = 0; i < 4; i++)
                    sums[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s[i]), _mm256_set1_ps(own[j]), sums[i]);
            }
            load_scales(p, scales);
            FETCH(p);
            p += 2 * PANEL;
            for (int i = 0; i < 4; i++) total[i] = _mm256_fmadd_ps(sums[i], scales[i], total[i]);
        }
        for (int i = 0; i < 4; i++) _mm256_storeu_ps(y + 8 * i, total[i]);
    }
}

static void product_sums(const uint8_t *p, const Matrix *m, const Activations *a, int32_t *sums) {
    for (int64_t c = 0; c < m->columns / m->chunk; c++, sums += PANEL) {
        __m256i s[4];
        p = chunk_sums(p, m, a->bytes + c * 2 * m->chunk, a->offsets + 2 * c, s);
        if ((c + 1) * m->chunk % m->group == 0) p += 2 * PANEL;
        for (int i = 0; i < 4; i++) _mm256_storeu_si256((__m256i *)sums + i, s[i]);
    }
}

static inline float dot_half(const uint16_t *x, const float *y, int64_t n) {
    __m256 sum = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + 8 <= n; k += 8)
        sum = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + k))), _mm256_loadu_ps(y + k), sum);
    float parts[8], total = 0;
    _mm256_storeu_ps(parts, sum);
    for (int i = 0; i < 8; i++) total += parts[i];
    for (; k < n; k++) total += _cvtsh_ss(x[k]) * y[k];
    return total;
}

static inline void add_half(float factor, const uint16_t *x, float *y, int64_t n) {
    int64_t k = 0;
    for (; k + 8 <= n; k += 8) {
        __m256 v = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + k)));
        _mm256_storeu_ps(y + k, _mm256_fmadd_ps(_mm256_set1_ps(factor), v, _mm256_loadu_ps(y + k)));
    }
    for (; k < n; k++) y[k] += factor * _cvtsh_ss(x[k]);
}

static inline void store_half(const float *x, uint16_t *y, int64_t n) {
    for (int64_t k = 0; k < n; k++) y[k] = _cvtss_sh(x[k], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
