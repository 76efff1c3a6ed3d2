/* y = W x with vectors of sixteen, chosen at run time on processors that have AVX-512.
 *
 * The sixteen lanes of linear.c (two vectors of eight) lie in one register here, and thirty-two
 * registers hold four rows by six tokens: every chain is the same, so every bit is.
 */
#include <stddef.h>

#include "model.h"
#include "simd.h"

#ifdef V4_X86

#define WIDE __attribute__((target("avx512f")))

enum { GROUP = V4_GROUP, BLOCK = V4_BLOCK, TOKENS = 6, AHEAD = 2048 };

/* Where a tile reads and writes: `rows_left` rows of the group exist; strides in floats. */
typedef struct {
    const uint16_t *weights;
    const float *x;
    float *y;
    int cols, x_stride, y_stride, rows_left;
} v4_tile;

WIDE V4_INLINE f8 halves(__m512 v) {
    __m512d doubled = _mm512_castps_pd(v);
    return (f8)_mm512_castps512_ps256(v) + (f8)_mm256_castpd_ps(_mm512_extractf64x4_pd(doubled, 1));
}

WIDE V4_INLINE void wide_tile(int tokens, const v4_tile *tile) {
    const __m512i shift = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 16, 16, 16, 16, 16, 16, 16, 16);
    const __m512i mask = _mm512_set1_epi32((int)0xffff0000u);
    const uint16_t *weights = tile->weights;
    __m512 sums[GROUP][TOKENS];
    for (int r = 0; r < GROUP; r++)
        for (int t = 0; t < tokens; t++) sums[r][t] = _mm512_setzero_ps();
    for (int c = 0; c < tile->cols; c += BLOCK, weights += GROUP * BLOCK) {
        __builtin_prefetch(weights + AHEAD);
        __builtin_prefetch(weights + AHEAD + 32);
        for (int r = 0; r < GROUP; r++) {
            __m512i pair = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(const void *)(weights + r * BLOCK)));
            __m512 w = _mm512_castsi512_ps(_mm512_and_si512(_mm512_sllv_epi32(pair, shift), mask));
            for (int t = 0; t < tokens; t++)
                sums[r][t] = _mm512_fmadd_ps(w, _mm512_loadu_ps(tile->x + (ptrdiff_t)t * tile->x_stride + c), sums[r][t]);
        }
    }
    for (int t = 0; t < tokens; t++) {
        float *y = tile->y + (ptrdiff_t)t * tile->y_stride;
        f4 out = f8_sum4(halves(sums[0][t]), halves(sums[1][t]), halves(sums[2][t]), halves(sums[3][t]));
        if (tile->rows_left >= GROUP) memcpy(y, &out, sizeof out);
        else
            for (int r = 0; r < tile->rows_left; r++) y[r] = out[r];
    }
}

WIDE static void last_tokens(int tokens, const v4_tile *tile) {
    switch (tokens) {
    case 1: wide_tile(1, tile); break;
    case 2: wide_tile(2, tile); break;
    case 3: wide_tile(3, tile); break;
    case 4: wide_tile(4, tile); break;
    case 5: wide_tile(5, tile); break;
    default: break;
    }
}

WIDE void v4_linear_wide(const v4_matrix *m, int tokens, const float *x, int x_stride, float *y, int y_stride) {
    v4_tile tile = {.weights = m->data, .cols = m->cols, .x_stride = x_stride, .y_stride = y_stride};
    for (int row = 0; row < m->rows; row += GROUP, tile.weights += (ptrdiff_t)GROUP * m->cols) {
        int t = 0;
        tile.x = x;
        tile.y = y + row;
        tile.rows_left = m->rows - row;
        for (; t + TOKENS <= tokens; t += TOKENS) {
            wide_tile(TOKENS, &tile);
            tile.x += (ptrdiff_t)TOKENS * x_stride;
            tile.y += (ptrdiff_t)TOKENS * y_stride;
        }
        last_tokens(tokens - t, &tile);
    }
}

#endif
