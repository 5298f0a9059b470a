/* Panels times activations with NEON and its dot products (ARMv8.2 and later): a register holds 4 rows. */
#include <arm_neon.h>

static inline void quantize_chunk(const float *x, int64_t n, int8_t *bytes, float *scale, int32_t *offsets, int bits) {
    int32_t values[128];
    *scale = chunk_values(x, n, values);
    int32_t sum_high = 0, sum_low = 0;
    for (int64_t k = 0; k < n; k++) {
        int32_t high = (values[k] + 128) >> 8, low = values[k] - 256 * high;
        bytes[8 * (k / 4) + k % 4] = (int8_t)high;
        bytes[8 * (k / 4) + 4 + k % 4] = (int8_t)low;
        sum_high += high;
        sum_low += low;
    }
    int offset = bits == 8 ? 0 : 8; /* codes of 8 bits are made signed again before the product */
    offsets[0] = -offset * sum_high;
    offsets[1] = -offset * sum_low;
}

static inline int8x16_t quad(const int8_t *bytes) {
    int32_t four;
    memcpy(&four, bytes, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

/* What will be read 4 KB later. */
#define FETCH(p) __builtin_prefetch((p) + 4096)

/* 32 sums over one chunk of one row of activations; returns what follows the codes. */
static inline const uint8_t *chunk_sums(
    const uint8_t *p, const Matrix *m, const int8_t *bytes, const int32_t *offsets, int32x4_t *s) {
    int32x4_t h[8], l[8];
    for (int i = 0; i < 8; i++) {
        h[i] = vdupq_n_s32(offsets[0]);
        l[i] = vdupq_n_s32(offsets[1]);
    }
    if (m->bits == 8) {
        const uint8x16_t sign = vdupq_n_u8(0x80);
        for (int64_t k = 0; k < m->chunk; k += 4, p += 128, bytes += 8) {
            int8x16_t high = quad(bytes), low = quad(bytes + 4);
            FETCH(p);
            FETCH(p + 64);
            for (int i = 0; i < 8; i++) {
                int8x16_t w = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p + 16 * i), sign));
                h[i] = vdotq_s32(h[i], w, high);
                l[i] = vdotq_s32(l[i], w, low);
            }
        }
    } else {
        const uint8x16_t nibble = vdupq_n_u8(15);
        for (int64_t k = 0; k < m->chunk; k += 8, p += 128, bytes += 16) {
            int8x16_t high = quad(bytes), low = quad(bytes + 4), next_high = quad(bytes + 8), next_low = quad(bytes + 12);
            FETCH(p);
            FETCH(p + 64);
            for (int i = 0; i < 8; i++) {
                uint8x16_t both = vld1q_u8(p + 16 * i);
                int8x16_t w = vreinterpretq_s8_u8(vandq_u8(both, nibble)), v = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
                h[i] = vdotq_s32(vdotq_s32(h[i], w, high), v, next_high);
                l[i] = vdotq_s32(vdotq_s32(l[i], w, low), v, next_low);
            }
        }
    }
    for (int i = 0; i < 8; i++) s[i] = vaddq_s32(vshlq_n_s32(h[i], 8), l[i]);
    return p;
}

static inline void load_scales(const uint8_t *p, float32x4_t *scales) {
    for (int i = 0; i < 8; i++) scales[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)p + 4 * i)));
}

static void product(const uint8_t *panel, const Matrix *m, const Activations *a, int64_t first, int count, float *y) {
    const int64_t chunks = m->columns / m->chunk, of_group = m->group / m->chunk;
    for (int b = 0; b < count; b++, y += PANEL) {
        const uint8_t *p = panel;
        const int8_t *bytes = a->bytes + (first + b) * 2 * m->columns;
        const int32_t *offsets = a->offsets + (first + b) * chunks * 2;
        const float *own = a->scales + (first + b) * chunks;
        float32x4_t total[8], scales[8];
        for (int i = 0; i < 8; i++) total[i] = vdupq_n_f32(0);
        for (int64_t c = 0; c < chunks; c += of_group) {
            float32x4_t sums[8];
            for (int i = 0; i < 8; i++) sums[i] = vdupq_n_f32(0);
            for (int64_t j = c; j < c + of_group; j++, bytes += 2 * m->chunk) {
                int32x4_t s[8];
                p = chunk_sums(p, m, bytes, offsets + 2 * j, s);
                for (int i = 0; i < 8; i++) sums[i] = vfmaq_n_f32(sums[i], vcvtq_f32_s32(s[i]), own[j]);
            }
            load_scales(p, scales);
            FETCH(p);
            p += 2 * PANEL;
            for (int i = 0; i < 8; i++) total[i] = vfmaq_f32(total[i], sums[i], scales[i]);
        }
        for (int i = 0; i < 8; i++) vst1q_f32(y + 4 * i, total[i]);
    }
}

static void product_sums(const uint8_t *p, const Matrix *m, const Activations *a, int32_t *sums) {
    for (int64_t c = 0; c < m->columns / m->chunk; c++, sums += PANEL) {
        int32x4_t s[8];
        p = chunk_sums(p, m, a->bytes + c * 2 * m->chunk, a->offsets + 2 * c, s);
        if ((c + 1) * m->chunk % m->group == 0) p += 2 * PANEL;
        for (int i = 0; i < 8; i++) vst1q_s32(sums + 4 * i, s[i]);
    }
}

static inline float dot_half(const uint16_t *x, const float *y, int64_t n) {
    float32x4_t sum = vdupq_n_f32(0);
    int64_t k = 0;
    for (; k + 4 <= n; k += 4) sum = vfmaq_f32(sum, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x + k))), vld1q_f32(y + k));
    float total = vaddvq_f32(sum);
    for (; k < n; k++) total += (float)*(const __fp16 *)(x + k) * y[k];
    return total;
}

static inline void add_half(float factor, const uint16_t *x, float *y, int64_t n) {
    for (int64_t k = 0; k < n; k++) y[k] += factor * (float)*(const __fp16 *)(x + k);
}

static inline void store_half(const float *x, uint16_t *y, int64_t n) {
    for (int64_t k = 0; k < n; k++) *(__fp16 *)(y + k) = (__fp16)x[k];
}
