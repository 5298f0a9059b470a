/* Small functions, written so that the compiler makes vectors of the loops round them. */
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
