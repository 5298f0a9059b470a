/* Quantized matrices as panels of 32 rows: one stream of bytes that a thread reads from end to end.
 *
 *   panel = for each group of columns: its codes, then the 32 float16 scales of its rows
 *           (one scale a row: one group of all columns)
 *   codes of 8 bits: for each quad of columns: 32 rows x 4 bytes, code + 128
 *   codes of 4 bits: for each two quads:       32 rows x 4 bytes, code + 8; low nibbles the first quad, high the second
 *
 * A lane of a vector is one row, so no product needs a horizontal sum, and everything stays a multiple of 64 bytes.
 *
 * Activations are integers of 16 bits with a float scale for each chunk of columns (a group, or a part of one):
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
    int32_t group;     /* columns a scale */
    int32_t chunk;     /* columns an activation scale: 32, 64 or 128, a divisor of the group */
    int32_t halves;    /* 2: panels of the first and the second half of the rows alternate (GeGLU); else 1 */
} Matrix;

/* Quantized activations of some rows. bytes: 2 a column, in an order that each variant chooses for itself. */
typedef struct {
    int8_t *bytes;    /* [rows][2 * columns] */
    float *scales;    /* [rows][columns / chunk] */
    int32_t *offsets; /* [rows][columns / chunk][2]: what the offset of the codes adds, negated */
    int64_t columns;
    int32_t chunk;
    int32_t past;     /* as in Network; only AVX-512 heeds it */
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
    int32_t ends;        /* 0: other layers follow; out is what the last one here gives, without norm and head */
    int32_t past;        /* the weights of all layers and the head are larger than the caches: fetch them past these */
} Network;

/* Where a sequence lies in the cache: its columns 0 to `shared` from `prompt` on, the others from `own` on. */
typedef struct {
    int64_t prompt, shared, own;
    int64_t length;                /* columns that are there already */
    int64_t tokens;                /* of this pass; what is beyond them is padding, on the right */
} Place;

/* A pass: a token, or some, for each of some sequences, or a prompt for each. Rows are tokens, sequence by sequence. */
typedef struct {
    int64_t sequences, tokens;     /* tokens of each sequence, padding included */
    const Place *places;           /* [sequences] */
    const int64_t *ids;            /* [rows], where the head is packed: it is the embedding too */
    const float *embeddings;       /* [rows][hidden], where it is not */
    const int64_t *positions;      /* [rows], below num_positions */
    const float *cosines, *sines;  /* [num_positions][head_size] */
    int64_t num_positions;
    void *keys, *values;           /* [layers][heads][columns][head_size] with these strides, in columns */
    float *key_scales, *value_scales; /* [layers][heads][columns], for 8 bits */
    int64_t layer_stride, head_stride;
    int64_t cache_type;            /* 0 float32, 1 float16, 2 codes of 8 bits */
    const uint8_t *visible;        /* [rows][visible_stride] over a prompt's columns; NULL = each sees what is before it */
    int64_t visible_stride;
    const int64_t *picked;         /* rows whose outcome is wanted; NULL = all */
    int64_t num_picked;
    float *normed;                 /* out, [picked][hidden]: what meets the head */
    float *logits;                 /* out, [picked][vocabulary], where the head is packed */
} Step;

/* Why a call did nothing. */
enum Failure { NO_MEMORY = -1, NO_SUCH_POSITION = -2 /* step: one that is not in the tables */ };

/* What each variant (one compilation of variant.c) offers. */
typedef struct {
    const char *name;
    /* All return 0 or a Failure. One call at a time. */
    int (*linear)(const Matrix *, const float *x, int64_t n, int64_t stride, float *y, int64_t y_stride, int threads);
    int (*step)(const Network *, const Step *, int threads);
    int (*sums)(const Matrix *, const float *x, int32_t *sums, float *scales);
} Variant;

static inline int64_t panel_bytes(const Matrix *m) {
    return m->columns * PANEL * m->bits / 8 + m->columns / m->group * 2 * PANEL;
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
