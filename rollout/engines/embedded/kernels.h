/* The kernels where the time goes, for vectors of LANES floats: 8, or 16 where the processor has AVX-512.
 *
 * The order of every sum is fixed here, whatever the width, the tile and the batch:
 * - a product (y = W x, a query's match with a key) is two chains of fused multiply-adds, one over the even
 *   columns and one over the odd ones, both ascending, added at the end;
 * - a weighted sum of rows is one chain of fused multiply-adds, in the order of the rows;
 * - a softmax over keys has four chains, one for every fourth key; one over a vocabulary sums eight in f8_sum's order,
 *   and then these in double precision.
 * Lanes are outputs (rows of W, heads, dimensions), so no sum crosses lanes, and a tile's size only decides how
 * often a value is loaded. One token is bound by memory, many are bound by arithmetic: tiles fill the registers.
 */
#include <float.h>
#include <stddef.h>

#include "model.h"
#include "simd.h"

#if LANES == 16
#define V4_KERNELS v4_kernels_wide
enum { UNITS = 2, TOKENS = 6, KEYS = 8, SLICES = 2 };
typedef float fv __attribute__((vector_size(64)));
typedef uint32_t uv __attribute__((vector_size(64)));
typedef int32_t iv __attribute__((vector_size(64)));
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
V4_INLINE fv splat(float x) { return (fv)_mm512_set1_ps(x); }
V4_INLINE fv fused(fv a, fv b, fv c) { return (fv)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
V4_INLINE fv splat_pair(double x) { return (fv)_mm512_set1_pd(x); }
V4_INLINE fv larger(fv a, fv b) { return (fv)_mm512_max_ps((__m512)a, (__m512)b); }
V4_INLINE fv smaller(fv a, fv b) { return (fv)_mm512_min_ps((__m512)a, (__m512)b); }
V4_INLINE f8 eight(fv v, int index) { /* of its two halves */
    return index ? __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)
                 : __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
}
V4_INLINE fv repeat(f8 v) {
    return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
V4_DEFINE_EXP(exponential, fv, iv, splat, fused, larger, smaller)
#else
#define V4_KERNELS v4_kernels_narrow
enum { UNITS = 1, TOKENS = 3, KEYS = 4, SLICES = 1 };
typedef f8 fv;
typedef u8 uv;
typedef i8 iv;
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
V4_INLINE fv splat(float x) { return f8_splat(x); }
V4_INLINE fv fused(fv a, fv b, fv c) { return f8_fma(a, b, c); }
V4_INLINE fv splat_pair(double x) {
    double pairs[4] = {x, x, x, x};
    fv v;
    memcpy(&v, pairs, sizeof v);
    return v;
}
V4_INLINE fv larger(fv a, fv b) { return f8_max(a, b); }
V4_INLINE fv smaller(fv a, fv b) { return f8_min(a, b); }
V4_INLINE f8 eight(fv v, int index) { return (void)index, v; }
V4_INLINE fv repeat(f8 v) { return v; }
V4_INLINE fv exponential(fv x) { return f8_exp(x); }
#endif

enum { UNIT = V4_UNIT, VECTORS = V4_UNIT / LANES, HEADS = V4_HEADS, CHAINS = 4 };
enum { NEAR_FLOATS = 6144, LINE_FLOATS = 16, SECOND_CACHE = 2 };

V4_INLINE fv load(const float *p) {
    fv v;
    memcpy(&v, p, sizeof v);
    return v;
}

V4_INLINE void store(float *p, fv v) { memcpy(p, &v, sizeof v); }

/* Where a tile of y = W x reads and writes: `rows` rows of its units exist; strides in elements. */
typedef struct {
    const uint32_t *weights;
    const float *x;
    float *y;
    ptrdiff_t unit_stride, x_stride, y_stride;
    int pairs, rows;
} v4_tile;

V4_INLINE void linear_tile(int units, int tokens, const v4_tile *tile) {
    const uint32_t *weights = tile->weights;
    const float *x = tile->x;
    fv even[UNITS * VECTORS][TOKENS], odd[UNITS * VECTORS][TOKENS];
    for (int v = 0; v < units * VECTORS; v++)
        for (int t = 0; t < tokens; t++) even[v][t] = odd[v][t] = splat(0.0f);
    for (int pair = 0; pair < tile->pairs; pair++, weights += UNIT, x += 2) {
        fv low[UNITS * VECTORS], high[UNITS * VECTORS];
        for (int v = 0; v < units * VECTORS; v++) {
            const uint32_t *at = weights + v / VECTORS * tile->unit_stride;
            uv words;
            if (v % VECTORS == 0) __builtin_prefetch(at + units * tile->unit_stride); /* the next tile */
            memcpy(&words, at + v % VECTORS * LANES, sizeof words);
            low[v] = (fv)(words << 16);
            high[v] = (fv)(words & 0xffff0000u);
        }
        for (int t = 0; t < tokens; t++) {
            fv first = splat(x[t * tile->x_stride]), second = splat(x[t * tile->x_stride + 1]);
            for (int v = 0; v < units * VECTORS; v++) {
                even[v][t] = fused(low[v], first, even[v][t]);
                odd[v][t] = fused(high[v], second, odd[v][t]);
            }
        }
    }
    for (int t = 0; t < tokens; t++) {
        float *y = tile->y + t * tile->y_stride, sums[UNITS * UNIT];
        int is_whole = tile->rows >= units * UNIT;
        for (int v = 0; v < units * VECTORS; v++) store((is_whole ? y : sums) + v * LANES, even[v][t] + odd[v][t]);
        if (!is_whole) memcpy(y, sums, (size_t)tile->rows * sizeof *sums);
    }
}

/* In as few tiles as can be, of about equal sizes: one of a single token would load each weight for it alone. */
V4_INLINE void linear_tokens(int units, int tokens, v4_tile tile) {
    for (int tiles = (tokens + TOKENS - 1) / TOKENS; tiles; tiles--) {
        int some = tokens / tiles;
        switch (some) {
        case 1: linear_tile(units, 1, &tile); break;
        case 2: linear_tile(units, 2, &tile); break;
        case 3: linear_tile(units, 3, &tile); break;
#if LANES == 16
        case 4: linear_tile(units, 4, &tile); break;
        case 5: linear_tile(units, 5, &tile); break;
        case 6: linear_tile(units, 6, &tile); break;
#endif
        default: break;
        }
        tokens -= some;
        tile.x += some * tile.x_stride;
        tile.y += some * tile.y_stride;
    }
}

/* Rows [begin, end) of y, begin a multiple of UNIT, for so many tokens at a time as stay in the nearest cache. */
static void linear(const v4_product *p, int begin, int end) {
    int cols = p->m->cols, near = NEAR_FLOATS / cols / TOKENS * TOKENS, block = near > TOKENS ? near : TOKENS;
    ptrdiff_t unit_stride = (ptrdiff_t)UNIT * cols / 2;
    for (int first = 0; first < p->tokens; first += block) {
        int count = p->tokens - first < block ? p->tokens - first : block;
        const float *x = p->x + (ptrdiff_t)first * p->x_stride;
        float *y = p->y + (ptrdiff_t)first * p->y_stride;
        for (int row = begin; row < end;) {
            v4_tile tile = {p->m->data + row / UNIT * unit_stride, x, y + row, unit_stride, p->x_stride, p->y_stride,
                            cols / 2, end - row};
            int is_full = end - row > (UNITS - 1) * UNIT;
            if (is_full) linear_tokens(UNITS, count, tile);
            else linear_tokens(1, count, tile);
            row += (is_full ? UNITS : 1) * UNIT;
        }
    }
}

/* scores[key][head] = scale * match of the head's query with the key, for HEADS heads. query: [pair of dimensions][head]
 * [2]. Scores of up to V4_SLACK - 1 keys more than `count` are written, and mean nothing. */
static void score(const float *query, const float *keys, int count, int dim, float scale, float *scores) {
    enum { PARTS = 2 * HEADS / LANES };
    fv scales = splat(scale);
    for (int first = 0; first < count; first += KEYS, scores += KEYS * HEADS) {
        const float *rows[KEYS];
        fv sums[KEYS * PARTS];
        for (int k = 0; k < KEYS; k++) {
            rows[k] = keys + (ptrdiff_t)(first + k < count ? first + k : count - 1) * dim;
            for (int part = 0; part < PARTS; part++) sums[k * PARTS + part] = splat(0.0f);
        }
        for (int d = 0; d < dim; d += 2) {
            fv q[PARTS];
            for (int part = 0; part < PARTS; part++) q[part] = load(query + d * HEADS + part * LANES);
            for (int k = 0; k < KEYS; k++) {
                double pair;
                memcpy(&pair, rows[k] + d, sizeof pair);
                if (d % LINE_FLOATS == 0) __builtin_prefetch(rows[k] + KEYS * dim + d);
                fv value = splat_pair(pair);
                for (int part = 0; part < PARTS; part++)
                    sums[k * PARTS + part] = fused(q[part], value, sums[k * PARTS + part]);
            }
        }
        for (int i = 0; i < KEYS * PARTS; i += 2) {
            fv even = __builtin_shufflevector(sums[i], sums[i + 1], EVEN);
            fv odd = __builtin_shufflevector(sums[i], sums[i + 1], ODD);
            store(scores + i / 2 * LANES, (even + odd) * scales);
        }
    }
}

/* `lanes` dimensions (a multiple of LANES, or fewer) of HEADS weighted sums. */
V4_INLINE void gather_tile(int lanes, const float *shares, const float *rows, const float *ahead, int count, int dim,
                           float *out) {
    enum { MOST = SLICES };
    int slices = lanes < LANES ? 1 : lanes / LANES;
    size_t bytes = (size_t)(lanes < LANES ? lanes : LANES) * sizeof(float);
    fv sums[HEADS][MOST];
    for (int h = 0; h < HEADS; h++)
        for (int i = 0; i < slices; i++) {
            sums[h][i] = splat(0.0f);
            memcpy(&sums[h][i], out + h * dim + i * LANES, bytes);
        }
    for (int k = 0; k < count; k++, rows += dim, ahead += dim, shares += HEADS) {
        fv row[MOST];
        for (int i = 0; i < lanes; i += LINE_FLOATS) __builtin_prefetch(ahead + i, 0, SECOND_CACHE);
        for (int i = 0; i < slices; i++) {
            row[i] = splat(0.0f);
            memcpy(&row[i], rows + i * LANES, bytes);
        }
        for (int h = 0; h < HEADS; h++) {
            fv share = splat(shares[h]);
            for (int i = 0; i < slices; i++) sums[h][i] = fused(share, row[i], sums[h][i]);
        }
    }
    for (int h = 0; h < HEADS; h++)
        for (int i = 0; i < slices; i++) memcpy(out + h * dim + i * LANES, &sums[h][i], bytes);
}

/* out[head][dimension] += sum over rows of shares[row][head] * rows[row][dimension]. Meanwhile as many rows from `ahead`
 * on, any address at all, come nearer: this is bound by arithmetic, and the scores of the next token would wait. */
static void gather(const float *shares, const float *rows, const float *ahead, int count, int dim, float *out) {
    int d = 0;
    for (; d + SLICES * LANES <= dim; d += SLICES * LANES)
        gather_tile(SLICES * LANES, shares, rows + d, ahead + d, count, dim, out + d);
    for (; d + LANES <= dim; d += LANES) gather_tile(LANES, shares, rows + d, ahead + d, count, dim, out + d);
    if (d < dim) gather_tile(8, shares, rows + d, ahead + d, count, dim, out + d);
}

/* scores[key][head] become shares that are not yet divided by totals[head], the sink's share among it. Up to CHAINS - 1
 * keys more than `count` are written. */
static void share_out(float *scores, int count, const float *sinks, float *totals) {
    enum { WIDTH = CHAINS * HEADS, PARTS = WIDTH / LANES };
    f8 sink = f8_load(sinks), top = sink, sums[CHAINS];
    fv tops[PARTS], chains[PARTS];
    for (int i = count * HEADS; i % WIDTH; i++) scores[i] = -FLT_MAX; /* whose share is lost beside the 1 of the top */
    for (int i = 0; i < PARTS; i++) tops[i] = repeat(sink), chains[i] = splat(0.0f);
    for (int k = 0; k < count * HEADS; k += WIDTH)
        for (int i = 0; i < PARTS; i++) tops[i] = larger(tops[i], load(scores + k + i * LANES));
    for (int c = 0; c < CHAINS; c++) top = f8_max(top, eight(tops[c * HEADS / LANES], c * HEADS % LANES / 8));
    for (int i = 0; i < PARTS; i++) tops[i] = repeat(top);
    for (int k = 0; k < count * HEADS; k += WIDTH)
        for (int i = 0; i < PARTS; i++) {
            fv share = exponential(load(scores + k + i * LANES) - tops[i]);
            chains[i] += share;
            store(scores + k + i * LANES, share);
        }
    for (int c = 0; c < CHAINS; c++) sums[c] = eight(chains[c * HEADS / LANES], c * HEADS % LANES / 8);
    f8_store(totals, ((sums[0] + sums[1]) + (sums[2] + sums[3])) + f8_exp(sink - top));
}

V4_INLINE fv weight(fv logits, float top, float scale) {
    fv x = (smaller(larger(logits, splat(-FLT_MAX)), splat(FLT_MAX)) - splat(top)) * splat(scale);
    return (fv)((iv)exponential(x) & (x >= splat(-87.0f)));
}

/* weights[i] = e^((logits[i] - top) * scale), 0 where that is below e^-87; returns their sum. `count` is a multiple of
 * eight; a NaN counts as the smallest logit, and infinite ones as the largest. */
static double exponentiate(const float *logits, float top, float scale, int count, float *weights) {
    double total = 0.0;
    int i = 0;
    for (; i + LANES <= count; i += LANES) {
        fv some = weight(load(logits + i), top, scale);
        store(weights + i, some);
        for (int part = 0; part < LANES / 8; part++) total += (double)f8_sum(eight(some, part));
    }
    for (; i < count; i += 8) {
        f8 last = eight(weight(repeat(f8_load(logits + i)), top, scale), 0);
        f8_store(weights + i, last);
        total += (double)f8_sum(last);
    }
    return total;
}

const v4_kernels V4_KERNELS = {linear, score, share_out, gather, exponentiate};
