/* Attention over a sliding window and compressed entries, one shared key-value head.
 *
 * Vector lanes are heads: a key is read once for eight heads, and no sum crosses lanes. Keys are
 * visited in the order of their slots, then entries oldest first: an order that depends on the
 * position alone, so decode, prefill and a rebuilt context agree bit for bit.
 */
#include "model.h"
#include "simd.h"

enum { TILE = 8, LANES = 8, LINE = 16 };

/* Rotate pairs of the last rope_dim floats; direction -1 undoes it. rope: cos, sin pairs of a position.
 * Fused by name: left as a product and a sum, GCC 12's vectoriser fuses them even where contraction is off. */
void v4_rotate(float *x, const float *rope, int dim, int rope_dim, float direction) {
    x += dim - rope_dim;
    for (int i = 0; i < rope_dim; i += 2) {
        float even = x[i], odd = x[i + 1], cosine = rope[i], sine = direction * rope[i + 1];
        x[i] = __builtin_fmaf(even, cosine, -(odd * sine));
        x[i + 1] = __builtin_fmaf(odd, cosine, even * sine);
    }
}

/* The same for eight heads at once; x holds dim rows of eight lanes. */
static void rotate_lanes(float *x, const float *rope, int dim, int rope_dim, float direction) {
    x += (dim - rope_dim) * LANES;
    for (int i = 0; i < rope_dim; i += 2) {
        f8 even = f8_load(x + i * LANES), odd = f8_load(x + (i + 1) * LANES);
        f8 cosine = f8_splat(rope[i]), sine = f8_splat(direction * rope[i + 1]);
        f8_store(x + i * LANES, f8_fma(even, cosine, -(odd * sine)));
        f8_store(x + (i + 1) * LANES, f8_fma(odd, cosine, even * sine));
    }
}

/* What one token attends to, and its rotation. */
typedef struct {
    const float *window, *entries, *rope;
    int window_count, entries_count, rope_dim;
} v4_view;

/* Eight heads of one query: to lanes, divided by each head's rms, rotated. */
static void load_query(const float *heads, const v4_view *view, const v4_config *config, float *lanes) {
    int dim = config->head_dim;
    f8 squares = f8_splat(0.0f);
    for (int d = 0; d < dim; d++) {
        f8 value;
        for (int h = 0; h < LANES; h++) value[h] = heads[h * dim + d];
        squares = f8_fma(value, value, squares);
        f8_store(lanes + d * LANES, value);
    }
    f8 scale, mean = squares / (float)dim + config->norm_eps;
    for (int h = 0; h < LANES; h++) scale[h] = 1.0f / __builtin_sqrtf(mean[h]);
    for (int d = 0; d < dim; d++) f8_store(lanes + d * LANES, f8_load(lanes + d * LANES) * scale);
    rotate_lanes(lanes, view->rope, dim, view->rope_dim, 1.0f);
}

V4_INLINE void score_tile(int keys, const float *query, const float *rows, int dim, f8 scale, float *scores) {
    f8 sums[TILE];
    for (int k = 0; k < keys; k++) sums[k] = f8_splat(0.0f);
    for (int d = 0; d < dim; d++) {
        f8 q = f8_load(query + d * LANES);
        if (d % LINE == 0 && keys > 1) /* the next tile's keys: far apart, so the processor does not foresee them */
            for (int k = 0; k < keys; k++) __builtin_prefetch(rows + (ptrdiff_t)(k + keys) * dim + d);
        for (int k = 0; k < keys; k++) sums[k] = f8_fma(q, f8_splat(rows[(ptrdiff_t)k * dim + d]), sums[k]);
    }
    for (int k = 0; k < keys; k++) f8_store(scores + k * LANES, sums[k] * scale);
}

static void score_rows(const float *query, const float *rows, int count, int dim, f8 scale, float *scores) {
    int k = 0;
    for (; k + TILE <= count; k += TILE)
        score_tile(TILE, query, rows + (ptrdiff_t)k * dim, dim, scale, scores + (ptrdiff_t)k * LANES);
    for (; k < count; k++)
        score_tile(1, query, rows + (ptrdiff_t)k * dim, dim, scale, scores + (ptrdiff_t)k * LANES);
}

/* out[d] += sum over rows of shares[row] * rows[row][d], rows in order. */
static void add_rows(const float *shares, const float *rows, int count, int dim, float *out) {
    for (int d = 0; d < dim; d += TILE) {
        f8 sums[TILE];
        for (int i = 0; i < TILE; i++) sums[i] = f8_load(out + (d + i) * LANES);
        for (int k = 0; k < count; k++) {
            f8 share = f8_load(shares + (ptrdiff_t)k * LANES);
            const float *row = rows + (ptrdiff_t)k * dim + d;
            for (int i = 0; i < TILE; i++) sums[i] = f8_fma(share, f8_splat(row[i]), sums[i]);
        }
        for (int i = 0; i < TILE; i++) f8_store(out + (d + i) * LANES, sums[i]);
    }
}

/* Softmax with a sink: scores become shares that are not yet divided by the returned total. */
static f8 exponentiate(float *scores, int count, f8 sink) {
    f8 top = sink;
    for (int k = 0; k < count; k++) top = f8_max(top, f8_load(scores + (ptrdiff_t)k * LANES));
    f8 total = f8_exp(sink - top);
    for (int k = 0; k < count; k++) {
        f8 share = f8_exp(f8_load(scores + (ptrdiff_t)k * LANES) - top);
        total += share;
        f8_store(scores + (ptrdiff_t)k * LANES, share);
    }
    return total;
}

static void attend(v4_model *model, const v4_layer *layer, const v4_view *view, const float *query, float *out) {
    const v4_config *config = &model->config;
    int dim = config->head_dim;
    float *scores = model->scratch.scores, *entry_scores = scores + (ptrdiff_t)view->window_count * LANES;
    float *lanes = model->scratch.lanes;
    f8 scale = f8_splat(1.0f / __builtin_sqrtf((float)dim));
    for (int first = 0; first < config->heads_count; first += LANES) {
        load_query(query + first * dim, view, config, lanes);
        score_rows(lanes, view->window, view->window_count, dim, scale, scores);
        score_rows(lanes, view->entries, view->entries_count, dim, scale, entry_scores);
        f8 total = exponentiate(scores, view->window_count + view->entries_count, f8_load(layer->sinks + first));
        memset(lanes, 0, (size_t)(dim * LANES) * sizeof(float));
        add_rows(scores, view->window, view->window_count, dim, lanes);
        add_rows(entry_scores, view->entries, view->entries_count, dim, lanes);
        for (int d = 0; d < dim; d++) f8_store(lanes + d * LANES, f8_load(lanes + d * LANES) / total);
        rotate_lanes(lanes, view->rope, dim, view->rope_dim, -1.0f);
        for (int h = 0; h < LANES; h++)
            for (int d = 0; d < dim; d++) out[(first + h) * dim + d] = lanes[d * LANES + h];
    }
}

/* One token: its key joins the window, its pools advance, then it attends. `token` indexes the batch. */
static void advance(v4_model *model, const v4_layer *layer, float *floats, int token, uint32_t position) {
    const v4_config *config = &model->config;
    v4_scratch *scratch = &model->scratch;
    int dim = config->head_dim, width = model->heads_width;
    const float *row = scratch->projected + (size_t)token * (size_t)layer->input.rows;
    uint32_t slots = (uint32_t)model->window_slots;
    float *window = floats + layer->window_offset, *key = window + (size_t)(position % slots) * (size_t)dim;
    v4_view view = {.window = window, .window_count = (int)(position < slots ? position + 1 : slots)};
    view.rope_dim = layer->rope_dim;
    view.rope = layer->rope + (size_t)position * (size_t)layer->rope_dim;
    v4_rms_norm(row + config->query_rank, layer->kv_norm, dim, config->norm_eps, key);
    v4_rotate(key, view.rope, dim, layer->rope_dim, 1.0f);
    if (layer->kind != V4_SLIDING) {
        v4_pool_append(model, &layer->pool, floats, row, position);
        view.entries = floats + layer->pool.entries_offset;
        view.entries_count = (int)((position + 1) / (uint32_t)layer->pool.rate);
    }
    if (layer->kind == V4_CSA && model->indexed) {
        v4_pool_append(model, &layer->index_pool, floats, row, position);
        int selected = v4_index_select(model, layer, floats, token, position);
        if (selected) view.entries = scratch->selected, view.entries_count = selected;
    }
    attend(model, layer, &view, scratch->query + (size_t)token * (size_t)width,
           scratch->attended + (size_t)token * (size_t)width);
}

void v4_attention(v4_model *model, const v4_layer *layer, const v4_chunk *chunks, int chunks_count, int tokens) {
    const v4_config *config = &model->config;
    v4_scratch *scratch = &model->scratch;
    int columns = layer->input.rows, width = model->heads_width, token = 0;
    int groups = config->output_groups, rank = config->output_rank;
    int per_group = config->heads_count * config->head_dim / groups;
    v4_linear(&layer->input, tokens, scratch->normed, config->hidden_dim, scratch->projected, columns);
    for (int t = 0; t < tokens; t++) {
        float *row = scratch->projected + (size_t)t * (size_t)columns;
        v4_rms_norm(row, layer->query_norm, config->query_rank, config->norm_eps, row);
    }
    v4_linear(&layer->query, tokens, scratch->projected, columns, scratch->query, width);
    if (layer->kind == V4_CSA && model->indexed)
        v4_linear(&layer->index_query, tokens, scratch->projected, columns, scratch->index_query,
                  config->index_heads * config->index_dim);
    for (int c = 0; c < chunks_count; c++)
        for (int i = 0; i < chunks[c].tokens_count; i++)
            advance(model, layer, chunks[c].state->floats, token++, chunks[c].state->position + (uint32_t)i);
    for (int g = 0; g < groups; g++)
        v4_linear(&layer->output_a[g], tokens, scratch->attended + g * per_group, width,
                  scratch->low_rank + g * rank, groups * rank);
    v4_linear(&layer->output_b, tokens, scratch->low_rank, groups * rank, scratch->output, config->hidden_dim);
}
