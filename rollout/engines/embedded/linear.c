/* y = W x: the only place where weights meet activations.
 *
 * A tile computes some rows for some tokens. Its size only decides how often a weight is loaded;
 * each element is always the same chain: 16 lanes over the columns, halves added, then f8_sum.
 * Tiles differ because one token is bound by memory (four rows keep enough chains in flight) and
 * many tokens are bound by arithmetic (two rows by three tokens fill the sixteen registers of
 * AVX2). Processors with AVX-512 take linear_wide.c: the same chains, twice as wide.
 */
#include <stddef.h>

#include "model.h"
#include "simd.h"

enum { GROUP = V4_GROUP, BLOCK = V4_BLOCK, AHEAD = 2048 };

int v4_matrix_create(v4_model *model, v4_matrix *out, int rows, int cols) {
    size_t padded = (size_t)(rows + GROUP - 1) / GROUP * GROUP;
    out->rows = rows;
    out->cols = cols;
    out->data = v4_take(model, padded * (size_t)cols * sizeof(uint16_t));
    return out->data ? 0 : -1;
}

/* Copy `rows` rows of a plain row-major matrix into place, from row `row` on. */
void v4_matrix_put(v4_matrix *matrix, int row, const uint16_t *source, int rows, int source_cols) {
    size_t group_size = (size_t)GROUP * (size_t)matrix->cols;
    for (int r = 0; r < rows; r++) {
        int at = row + r;
        uint16_t *group = matrix->data + (size_t)(at / GROUP) * group_size + (size_t)(at % GROUP) * BLOCK;
        const uint16_t *values = source + (size_t)r * (size_t)source_cols;
        for (int c = 0; c < matrix->cols; c += BLOCK, group += GROUP * BLOCK)
            for (int i = 0; i < BLOCK / 2; i++) {
                group[2 * i] = values[c + i];
                group[2 * i + 1] = values[c + i + BLOCK / 2];
            }
    }
}

V4_INLINE void tile(int rows, int tokens, const uint16_t *weights, int cols, const float *x, int x_stride, float *y,
                    int y_stride, int rows_left) {
    f8 low[4][3], high[4][3];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) low[r][t] = high[r][t] = f8_splat(0.0f);
    for (int c = 0; c < cols; c += BLOCK, weights += GROUP * BLOCK) {
        __builtin_prefetch(weights + AHEAD);
        __builtin_prefetch(weights + AHEAD + 32);
        for (int r = 0; r < rows; r++) {
            u8 pair;
            memcpy(&pair, weights + r * BLOCK, sizeof pair);
            f8 w_low = (f8)(pair << 16), w_high = (f8)(pair & 0xffff0000u);
            for (int t = 0; t < tokens; t++) {
                const float *values = x + (ptrdiff_t)t * x_stride + c;
                low[r][t] = f8_fma(w_low, f8_load(values), low[r][t]);
                high[r][t] = f8_fma(w_high, f8_load(values + BLOCK / 2), high[r][t]);
            }
        }
    }
    if (rows == GROUP && tokens == 1 && rows_left >= GROUP) {
        f4 sums = f8_sum4(low[0][0] + high[0][0], low[1][0] + high[1][0], low[2][0] + high[2][0], low[3][0] + high[3][0]);
        memcpy(y, &sums, sizeof sums);
        return;
    }
    for (int r = 0; r < rows && r < rows_left; r++)
        for (int t = 0; t < tokens; t++) y[(ptrdiff_t)t * y_stride + r] = f8_sum(low[r][t] + high[r][t]);
}

static void linear_narrow(const v4_matrix *m, int tokens, const float *x, int x_stride, float *y, int y_stride) {
    const uint16_t *group = m->data;
    for (int row = 0; row < m->rows; row += GROUP, group += (ptrdiff_t)GROUP * m->cols) {
        int t = 0, left = m->rows - row;
        for (; t + 3 <= tokens; t += 3) {
            const float *from = x + (ptrdiff_t)t * x_stride;
            float *to = y + (ptrdiff_t)t * y_stride + row;
            tile(2, 3, group, m->cols, from, x_stride, to, y_stride, left);
            tile(2, 3, group + 2 * BLOCK, m->cols, from, x_stride, to + 2, y_stride, left - 2);
        }
        const float *from = x + (ptrdiff_t)t * x_stride;
        float *to = y + (ptrdiff_t)t * y_stride + row;
        if (tokens - t == 2) {
            tile(2, 2, group, m->cols, from, x_stride, to, y_stride, left);
            tile(2, 2, group + 2 * BLOCK, m->cols, from, x_stride, to + 2, y_stride, left - 2);
        } else if (tokens - t == 1) {
            tile(4, 1, group, m->cols, from, x_stride, to, y_stride, left);
        }
    }
}

/* `tokens` rows of x, each cols floats at stride x_stride, to rows of y. Strides in floats. */
void v4_linear(const v4_matrix *m, int tokens, const float *x, int x_stride, float *y, int y_stride) {
#if defined(V4_X86) && !defined(V4_NARROW)
    if (__builtin_cpu_supports("avx512f")) {
        v4_linear_wide(m, tokens, x, x_stride, y, y_stride);
        return;
    }
#endif
    linear_narrow(m, tokens, x, x_stride, y, y_stride);
}
