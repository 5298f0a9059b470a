/* Quantized matrices as panels of 32 rows: one stream of bytes that a thread reads from end to end.
 *
 *   panel = for each group of columns: its codes, then the 32 float16 scales of its rows
 *           (one scale a row: all codes, then the 32 scales)
 *   codes of 8 bits: for each quad of columns: 32 rows x 4 bytes, code + 128
 *   codes of 4 bits: for each two quads:       32 rows x 4 bytes, code + 8; low nibbles the first quad, high the second
 *
 * A lane of a vector is one row, so no product needs a horizontal sum, and everything stays a multiple of 64 bytes.
 *
 * Activations are integers of 16 bits with a float scale for each chunk of columns (the group, or 128 at most):
 * |v| <= 32512, so that a sum over a chunk of 128 with codes of 8 bits fits 32 bits.
 */
#ifndef OPENGLM_PANELS_H
#define OPENGLM_PANELS_H

#include <stddef.h>
#include <stdint.h>

#define PANEL 32   /* rows of a panel */
#define LARGEST 32512.0f
#define TILE 4     /* rows of activations that share one pass over a panel */

typedef struct {
    const uint8_t *panels;
    const float *bias; /* float32 [rows], or NULL */
    int64_t rows;      /* true rows, of all halves */
    int64_t columns;   /* as packed: a multiple of 32 */
    int32_t bits;      /* 8 or 4 */
    int32_t group;     /* columns a scale; 0 = one scale a row */
    int32_t chunk;     /* columns an activation scale: the group, or 32, 64 or 128 */
    int32_t halves;    /* 2: panels of the first and the second half of the rows alternate (GeGLU); else 1 */
} Matrix;

/* Quantized activations of some rows. bytes: 2 a column, in an order that each variant chooses for itself. */
typedef struct {
    int8_t *bytes;    /* [rows][2 * columns] */
    float *scales;    /* [rows][columns / chunk] */
    int32_t *offsets; /* [rows][columns / chunk][2]: what the offset of the codes adds, negated */
    int64_t columns;
    int32_t chunk;
} Activations;

typedef struct {
    Matrix query_key_value, dense, h_to_4h, four_h_to_h;
    const float *input_norm[2], *attention_norm[2]; /* weight, bias: float32 [hidden] */
} Layer;

typedef struct {
    const Layer *layers;
    const float *final_norm[2];
    Matrix head; /* panels NULL: the caller multiplies */
    int64_t num_layers, hidden, inner, heads, head_size, vocabulary;
    float alpha, epsilon;
} Network;

/* One token for each of some rows. */
typedef struct {
    int64_t rows;
    const float *embeddings;         /* [rows][hidden] */
    const float *cosines, *sines;    /* [rows][head_size] */
    void *keys, *values;             /* [layers][rows][heads][capacity][head_size] with these strides, in elements */
    int64_t layer_stride, row_stride, head_stride;
    int32_t cache_type;              /* 0 float32, 1 float16 */
    int32_t pad;
    int64_t length;                  /* columns before this token, the same for all rows */
    const uint8_t *visible;          /* [rows][visible_stride], NULL = all columns may be seen */
    int64_t visible_stride;
    float *normed;                   /* out, [rows][hidden]: what meets the head */
    float *logits;                   /* out, [rows][vocabulary], where there is a head */
} Step;

/* What each variant (one compilation of variant.c) offers. */
typedef struct {
    const char *name;
    /* All return 0, or -1 where memory is out. One call at a time. */
    int (*linear)(const Matrix *, const float *x, int64_t n, int64_t stride, float *y, int64_t y_stride, int threads);
    int (*step)(const Network *, const Step *, int threads);
    int (*sums)(const Matrix *, const float *x, int32_t *sums, float *scales);
} Variant;

static inline int64_t panel_bytes(const Matrix *m) {
    int64_t scales = m->group ? m->columns / m->group : 1;
    return m->columns * PANEL * m->bits / 8 + scales * 2 * PANEL;
}
static inline int64_t half_rows(const Matrix *m) { return m->rows / m->halves; }
static inline int64_t panel_count(const Matrix *m) { return (half_rows(m) + PANEL - 1) / PANEL * m->halves; }
/* First row of a panel, and how many of its rows exist. */
static inline int64_t panel_row(const Matrix *m, int64_t p, int64_t *count) {
    int64_t own = half_rows(m), first = p / m->halves * PANEL;
    *count = own - first < PANEL ? own - first : PANEL;
    return p % m->halves * own + first;
}

#endif
