/* Products, attention and the whole decode step, compiled once for each kind of processor (-DVARIANT=avx512 and so on).
 * The readable twins: panels.py and quantization/functional.py for the products (tests/test_cpu_kernels.py
 * test_products_are_the_twins, on every variant), models/glm130b.py for the step (test_a_pass_is_the_networks_forward). */
#include "panels.h"
#include "pool.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define MOST_HEAD 512    /* the largest head; MOST_HEAD of network.py keeps larger ones away */
#define SMALLEST 1e-30f /* activations below are 0: the inverse of their scale would overflow */

/* Fetch numbers of 16 bits before they are read. */
static inline void fetch(const uint16_t *from, int64_t count) {
    for (int64_t k = 0; k < count; k += 32) __builtin_prefetch(from + k);
}

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

#include "arithmetic.h"
#include "linear.h"
#include "step.h"

#define NAME_(variant) variant_##variant
#define NAME(variant) NAME_(variant)
#define TEXT_(variant) #variant
#define TEXT(variant) TEXT_(variant)
const Variant NAME(VARIANT) = {.name = TEXT(VARIANT), .linear = linear, .step = step, .sums = sums};
