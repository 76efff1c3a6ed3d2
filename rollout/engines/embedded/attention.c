/* Attention over a sliding window and compressed entries, one shared key-value head.
 *
 * All keys of a batch join their windows first, then every token attends by itself: a window is a ring with room for a
 * batch more than a token sees. Keys are visited oldest first, then entries oldest first: an order that depends on the
 * position alone, so decode, prefill and a rebuilt context agree bit for bit.
 */
#include "model.h"
#include "simd.h"

enum { HEADS = V4_HEADS };

/* Rotate pairs of the last rope_dim floats; direction -1 undoes it. rope: cos, sin pairs of a position.
 * Fused by name: left as a product and a sum, GCC 12's vectoriser fuses them even where contraction is off. */
void v4_rotate(float *x, const float *rope, int dim, int rope_dim, float direction) {
    const f8 sign = {-direction, direction, -direction, direction, -direction, direction, -direction, direction};
    int i = 0;
    x += dim - rope_dim;
    for (; i + 8 <= rope_dim; i += 8) {
        f8 value = f8_load(x + i), angle = f8_load(rope + i);
        f8 swapped = __builtin_shufflevector(value, value, 1, 0, 3, 2, 5, 4, 7, 6);
        f8 cosine = __builtin_shufflevector(angle, angle, 0, 0, 2, 2, 4, 4, 6, 6);
        f8 sine = __builtin_shufflevector(angle, angle, 1, 1, 3, 3, 5, 5, 7, 7) * sign;
        f8_store(x + i, f8_fma(value, cosine, swapped * sine));
    }
    for (; i < rope_dim; i += 2) {
        float even = x[i], odd = x[i + 1], cosine = rope[i], sine = direction * rope[i + 1];
        x[i] = __builtin_fmaf(even, cosine, -(odd * sine));
        x[i + 1] = __builtin_fmaf(odd, cosine, even * sine);
    }
}

/* Eight heads of a query, each divided by its rms and rotated, as `score` wants them. */
static void load_query(const v4_model *model, const v4_layer *layer, const float *rope, float *heads, float *query) {
    int dim = model->config.head_dim;
    for (int h = 0; h < HEADS; h++) {
        v4_rms_norm(heads + h * dim, NULL, dim, model->config.norm_eps, heads + h * dim);
        v4_rotate(heads + h * dim, rope, dim, layer->rope_dim, 1.0f);
    }
    for (int d = 0; d < dim; d += 2)
        for (int h = 0; h < HEADS; h++) memcpy(query + d * HEADS + 2 * h, heads + h * dim + d, 2 * sizeof *query);
}

/* Rows of keys that follow each other in memory. */
typedef struct {
    const float *rows;
    int count;
} v4_run;

/* What a token sees of its window: two runs, where the ring begins anew. */
static void look_back(const v4_model *model, const v4_layer *layer, int token, v4_run runs[2]) {
    uint32_t position = model->scratch.positions[token], slots = (uint32_t)model->window_slots;
    uint32_t tokens = (uint32_t)model->window_tokens, seen = position < tokens ? position + 1 : tokens;
    uint32_t first = (position + 1 - seen) % slots, straight = seen < slots - first ? seen : slots - first;
    const float *window = model->scratch.floats[token] + layer->window_offset;
    runs[0] = (v4_run){window + (size_t)first * (size_t)model->config.head_dim, (int)straight};
    runs[1] = (v4_run){window, (int)(seen - straight)};
}

/* What a token sees: its window, then the entries. */
static void look(const v4_model *model, const v4_layer *layer, int token, const v4_bench *bench, v4_run runs[3]) {
    uint32_t position = model->scratch.positions[token];
    look_back(model, layer, token, runs);
    runs[2] = (v4_run){runs[0].rows, 0};
    if (layer->kind == V4_SLIDING) return;
    const float *entries = model->scratch.floats[token] + layer->pool.entries_offset;
    runs[2] = (v4_run){entries, (int)((position + 1) / (uint32_t)layer->pool.rate)};
    if (layer->kind != V4_CSA || !model->indexed) return;
    int selected = v4_index_select(model, layer, token, bench);
    if (selected) runs[2] = (v4_run){bench->selected, selected};
}

static void attend(v4_model *model, const v4_layer *layer, int begin, int end, int thread) {
    const v4_config *config = &model->config;
    const v4_kernels *kernels = model->kernels;
    const v4_bench *bench = &model->scratch.benches[thread];
    int dim = config->head_dim;
    float scale = 1.0f / __builtin_sqrtf((float)dim), totals[HEADS];
    for (int token = begin; token < end; token++) {
        const float *rope = layer->rope + (size_t)model->scratch.positions[token] * (size_t)layer->rope_dim;
        size_t row = (size_t)token * (size_t)model->heads_width;
        v4_run runs[3], next[3];
        look(model, layer, token, bench, runs);
        look_back(model, layer, token + 1 < model->scratch.tokens_count ? token + 1 : token, next);
        next[2] = runs[2];
        int seen = runs[0].count + runs[1].count + runs[2].count;
        for (int first = 0; first < config->heads_count; first += HEADS) {
            float *out = model->scratch.attended + row + (size_t)(first * dim), *scores = bench->scores;
            load_query(model, layer, rope, model->scratch.query + row + first * dim, bench->query);
            for (int i = 0; i < 3; scores += runs[i++].count * HEADS)
                kernels->score(bench->query, runs[i].rows, runs[i].count, dim, scale, scores);
            kernels->share_out(bench->scores, seen, layer->sinks + first, totals);
            memset(out, 0, (size_t)(HEADS * dim) * sizeof *out);
            scores = bench->scores;
            for (int i = 0; i < 3; scores += runs[i++].count * HEADS)
                kernels->gather(scores, runs[i].rows, next[i].rows, runs[i].count, dim, out);
            for (int h = 0; h < HEADS; h++) {
                for (int d = 0; d < dim; d += 8) f8_store(out + h * dim + d, f8_load(out + h * dim + d) / totals[h]);
                v4_rotate(out + h * dim, rope, dim, layer->rope_dim, -1.0f);
            }
        }
    }
}

/* The tokens of some chunks: their keys join the windows, their pools advance. */
static void take_in(v4_model *model, const v4_layer *layer, int begin, int end, int thread) {
    (void)thread;
    const v4_config *config = &model->config;
    int dim = config->head_dim, token = 0;
    for (int c = 0; c < begin; c++) token += model->scratch.batch[c].tokens_count;
    for (int c = begin; c < end; c++)
        for (int i = 0; i < model->scratch.batch[c].tokens_count; i++, token++) {
            uint32_t position = model->scratch.positions[token];
            float *row = model->scratch.projected + (size_t)token * (size_t)layer->input.rows;
            float *floats = model->scratch.floats[token];
            float *key = floats + layer->window_offset + position % (uint32_t)model->window_slots * (uint32_t)dim;
            v4_rms_norm(row, layer->query_norm, config->query_rank, config->norm_eps, row);
            v4_rms_norm(row + config->query_rank, layer->kv_norm, dim, config->norm_eps, key);
            v4_rotate(key, layer->rope + (size_t)position * (size_t)layer->rope_dim, dim, layer->rope_dim, 1.0f);
            if (layer->kind != V4_SLIDING) v4_pool_append(model, &layer->pool, floats, row, position);
            if (layer->kind == V4_CSA && model->indexed)
                v4_pool_append(model, &layer->index_pool, floats, row, position);
        }
}

void v4_attention(v4_model *model, const v4_layer *layer, int tokens) {
    const v4_config *config = &model->config;
    v4_scratch *s = &model->scratch;
    int columns = layer->input.rows, width = model->heads_width, groups = config->output_groups;
    int rank = config->output_rank, per_group = config->heads_count * config->head_dim / groups;
    v4_product input = {&layer->input, s->normed, s->projected, tokens, config->hidden_dim, columns};
    v4_multiply(model, &input, 1);
    v4_each(model, layer, s->batch_count, take_in);
    v4_product queries[2] = {
        {&layer->query, s->projected, s->query, tokens, columns, width},
        {&layer->index_query, s->projected, s->index_query, tokens, columns, config->index_heads * config->index_dim},
    };
    v4_multiply(model, queries, layer->kind == V4_CSA && model->indexed ? 2 : 1);
    v4_each(model, layer, tokens, attend);
    v4_product lower[V4_GROUPS_MAX];
    for (int g = 0; g < groups; g++)
        lower[g] = (v4_product){&layer->output_a[g], s->attended + g * per_group, s->low_rank + g * rank, tokens, width,
                                groups * rank};
    v4_multiply(model, lower, groups);
    v4_product output = {&layer->output_b, s->low_rank, s->output, tokens, groups * rank, config->hidden_dim};
    v4_multiply(model, &output, 1);
}
