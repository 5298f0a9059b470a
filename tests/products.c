/* Runs the kernels of a library on a matrix from a file, for processors that are only emulated:
 *   products VARIANT < (Matrix, panels, x) > (sums, scales, y)            */
#include "panels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int glm_choose(const char *name);
int64_t glm_panel_bytes(const Matrix *m);
int64_t glm_panel_count(const Matrix *m);
int glm_linear(const Matrix *m, const float *x, int64_t n, int64_t stride, float *y, int64_t y_stride, int threads);
int glm_sums(const Matrix *m, const float *x, int32_t *sums, float *scales);
void *glm_allocate(size_t size);

int main(int count, char **arguments) {
    Matrix m;
    if (count != 2 || glm_choose(arguments[1])) return 3;
    if (fread(&m, sizeof m, 1, stdin) != 1) return 4;
    int64_t size = glm_panel_bytes(&m) * glm_panel_count(&m), chunks = m.columns / m.chunk;
    uint8_t *panels = glm_allocate(size);
    float *x = malloc(m.columns * 4), *y = malloc(m.rows * 4), *scales = malloc(chunks * 4);
    int32_t *sums = malloc(glm_panel_count(&m) * chunks * PANEL * 4);
    if (fread(panels, 1, size, stdin) != (size_t)size || fread(x, 4, m.columns, stdin) != (size_t)m.columns) return 5;
    m.panels = panels;
    m.bias = NULL;
    if (glm_sums(&m, x, sums, scales) || glm_linear(&m, x, 1, m.columns, y, m.rows, 2)) return 6;
    fwrite(sums, 4, glm_panel_count(&m) * chunks * PANEL, stdout);
    fwrite(scales, 4, chunks, stdout);
    fwrite(y, 4, m.rows, stdout);
    return 0;
}
