/* Matrices as the kernels want them, and what of a step is shared out among threads: rows, or tokens. */
#include "model.h"
#include "simd.h"

enum { UNIT = V4_UNIT, STEP = 2 * V4_UNIT, PIECES = 4, WORTH = 1 << 14, RANGE_MIN = 4, RANGE_MAX = 6 };

int v4_matrix_create(v4_model *model, v4_matrix *out, int rows, int cols) {
    size_t padded = (size_t)(rows + UNIT - 1) / UNIT * UNIT;
    out->rows = rows;
    out->cols = cols;
    out->data = v4_take(model, padded * (size_t)cols * sizeof(uint16_t));
    return out->data ? 0 : -1;
}

/* Copy `rows` rows of a plain row-major matrix into place, from row `row` on. */
void v4_matrix_put(v4_matrix *matrix, int row, const uint16_t *source, int rows, int source_cols) {
    size_t pairs = (size_t)matrix->cols / 2;
    for (int r = 0; r < rows; r++, source += source_cols) {
        int at = row + r;
        uint32_t *words = matrix->data + (size_t)(at / UNIT) * pairs * UNIT + at % UNIT;
        for (size_t pair = 0; pair < pairs; pair++)
            words[pair * UNIT] = source[2 * pair] | (uint32_t)source[2 * pair + 1] << 16;
    }
}

const v4_kernels *v4_kernels_here(void) {
#if defined(V4_X86) && !defined(V4_NARROW)
    if (__builtin_cpu_supports("avx512f")) return &v4_kernels_wide;
#endif
    return &v4_kernels_narrow;
}

/* Rows in a piece: some pieces a thread, so that none waits long for another, but none too small to be worth a claim. */
static int rows_apiece(const v4_model *model, const v4_product *p) {
    int rows = p->m->rows / (PIECES * model->threads_count), least = WORTH / (p->m->cols * p->tokens);
    rows = rows > least ? rows : least;
    return rows < STEP ? STEP : (rows + STEP - 1) / STEP * STEP;
}

typedef struct {
    v4_model *model;
    const v4_product *products;
    int count;
} work;

static void multiply_piece(void *job, int index, int thread) {
    (void)thread;
    const work *it = job;
    for (int i = 0; i < it->count; i++) {
        const v4_product *p = &it->products[i];
        int rows = rows_apiece(it->model, p), pieces = (p->m->rows + rows - 1) / rows, begin = index * rows;
        if (index < pieces) {
            it->model->kernels->linear(p, begin, begin + rows < p->m->rows ? begin + rows : p->m->rows);
            return;
        }
        index -= pieces;
    }
}

void v4_multiply(v4_model *model, const v4_product *products, int count) {
    work job = {model, products, count};
    int pieces = 0;
    for (int i = 0; i < count; i++) {
        int rows = rows_apiece(model, &products[i]);
        pieces += (products[i].m->rows + rows - 1) / rows;
    }
    v4_share(model->pool, pieces, multiply_piece, &job);
}

typedef struct {
    v4_model *model;
    const v4_layer *layer;
    v4_range *range;
    int count, block;
} ranges;

static void range_piece(void *job, int index, int thread) {
    const ranges *r = job;
    int begin = index * r->block, end = begin + r->block < r->count ? begin + r->block : r->count;
    r->range(r->model, r->layer, begin, end, thread);
}

void v4_each(v4_model *model, const v4_layer *layer, int count, v4_range *range) {
    int threads = model->threads_count, block = count / (PIECES * threads), fair = (count + threads - 1) / threads;
    if (block < RANGE_MIN) block = fair < RANGE_MIN ? fair : RANGE_MIN; /* weights are loaded once a range */
    if (block > RANGE_MAX) block = RANGE_MAX;
    ranges job = {model, layer, range, count, block};
    v4_share(model->pool, (count + block - 1) / block, range_piece, &job);
}
