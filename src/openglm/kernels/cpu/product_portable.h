/* Panels times activations in plain C, for any processor: the same integers, slowly. */
static inline float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    uint32_t bits;
    if (exponent == 31) bits = sign | 0x7f800000 | fraction << 13;
    else if (exponent) bits = sign | (exponent + 112) << 23 | fraction << 13;
    else {
        float small = (float)fraction * 5.9604644775390625e-8f; /* 2^-24 */
        return sign ? -small : small;
    }
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

static inline uint16_t float_to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* rounds to infinity */
    if (magnitude < 0x38800000) { /* denormal: let the addition of 0.5 round to a multiple of 2^-24 */
        float shifted;
        memcpy(&shifted, &magnitude, 4);
        shifted += 0.5f;
        memcpy(&magnitude, &shifted, 4);
        return (uint16_t)(sign | (magnitude - 0x3f000000));
    }
    magnitude += 0xfff + (magnitude >> 13 & 1); /* to nearest, ties to even */
    return (uint16_t)(sign | (magnitude - 0x38000000) >> 13);
}

static inline void quantize_chunk(const float *x, int64_t n, int8_t *bytes, float *scale, int32_t *offsets, int bits) {
    int32_t values[128], sum = 0;
    int16_t *wide = (int16_t *)bytes;
    *scale = chunk_values(x, n, values);
    for (int64_t k = 0; k < n; k++) {
        wide[k] = (int16_t)values[k];
        sum += values[k];
    }
    offsets[0] = -(bits == 8 ? 128 : 8) * sum;
    offsets[1] = 0;
}

static const uint8_t *chunk_sums(const uint8_t *p, const Matrix *m, const int16_t *v, int32_t offset, int32_t *sums) {
    for (int r = 0; r < PANEL; r++) sums[r] = offset;
    if (m->bits == 8) {
        for (int64_t k = 0; k < m->chunk; k += 4, p += 4 * PANEL)
            for (int r = 0; r < PANEL; r++)
                for (int j = 0; j < 4; j++) sums[r] += p[4 * r + j] * v[k + j];
    } else {
        for (int64_t k = 0; k < m->chunk; k += 8, p += 4 * PANEL)
            for (int r = 0; r < PANEL; r++)
                for (int j = 0; j < 4; j++) sums[r] += (p[4 * r + j] & 15) * v[k + j] + (p[4 * r + j] >> 4) * v[k + 4 + j];
    }
    return p;
}

static void product(const uint8_t *panel, const Matrix *m, const Activations *a, int64_t first, int count, float *y) {
    const int64_t chunks = m->columns / m->chunk, of_group = m->group / m->chunk;
    for (int b = 0; b < count; b++, y += PANEL) {
        const uint8_t *p = panel;
        const int16_t *values = (const int16_t *)(a->bytes + (first + b) * 2 * m->columns);
        for (int r = 0; r < PANEL; r++) y[r] = 0;
        for (int64_t c = 0; c < chunks; c += of_group) {
            float group[PANEL] = {0};
            for (int64_t j = c; j < c + of_group; j++) {
                int32_t sums[PANEL];
                int64_t place = (first + b) * chunks + j;
                p = chunk_sums(p, m, values + j * m->chunk, a->offsets[2 * place], sums);
                for (int r = 0; r < PANEL; r++) group[r] += (float)sums[r] * a->scales[place];
            }
            for (int r = 0; r < PANEL; r++) y[r] += group[r] * half_to_float(((const uint16_t *)p)[r]);
            p += 2 * PANEL;
        }
    }
}

static void product_sums(const uint8_t *p, const Matrix *m, const Activations *a, int32_t *sums) {
    for (int64_t c = 0; c < m->columns / m->chunk; c++, sums += PANEL) {
        p = chunk_sums(p, m, (const int16_t *)a->bytes + c * m->chunk, a->offsets[2 * c], sums);
        if ((c + 1) * m->chunk % m->group == 0) p += 2 * PANEL;
    }
}

static inline float dot_half(const uint16_t *x, const float *y, int64_t n) {
    float sum = 0;
    for (int64_t k = 0; k < n; k++) sum += half_to_float(x[k]) * y[k];
    return sum;
}
static inline void add_half(float factor, const uint16_t *x, float *y, int64_t n) {
    for (int64_t k = 0; k < n; k++) y[k] += factor * half_to_float(x[k]);
}
static inline void store_half(const float *x, uint16_t *y, int64_t n) {
    for (int64_t k = 0; k < n; k++) y[k] = float_to_half(x[k]);
}
