/* From a table of bf16 tensors to a model: repacked weights, tables and scratch memory. */
#include <stdlib.h>
#include <string.h>

#include "model.h"
#include "simd.h"

#ifndef V4_BUILD
#define V4_BUILD "unnamed"
#endif

#ifdef V4_X86
const char v4_processor_flags[] = "avx avx2 fma bmi1 bmi2 f16c movbe abm"; /* -march=x86-64-v3 */
#else
const char v4_processor_flags[] = "";
#endif

const char *v4_build(void) { return V4_BUILD; }

int32_t v4_is_finite(const void *tensor, size_t count) {
    const uint16_t *words = tensor;
    uint16_t is_odd = 0;
    for (size_t i = 0; i < count; i++) is_odd |= (words[i] & 0x7f80) == 0x7f80;
    return !is_odd;
}

static float *floats_of(v4_model *model, const uint16_t *source, int count) {
    float *out = v4_take(model, (size_t)count * sizeof(float));
    for (int i = 0; out && i < count; i++) out[i] = bf16_to_float(source[i]);
    return out;
}

static int matrix_of(v4_model *model, v4_matrix *out, const uint16_t *source, int rows, int cols) {
    if (v4_matrix_create(model, out, rows, cols)) return -1;
    v4_matrix_put(out, 0, source, rows, cols);
    return 0;
}

static int load_mix(v4_model *model, v4_mix *mix, const void *const *tensors, int rows, int scales) {
    mix->base = floats_of(model, tensors[1], rows);
    mix->scale = floats_of(model, tensors[2], scales);
    if (!mix->base || !mix->scale) return -1;
    return matrix_of(model, &mix->weights, tensors[0], rows, model->config.streams_count * model->config.hidden_dim);
}

static int load_compressor(v4_model *model, v4_compressor *pool, const void *const *tensors, int kind, int dim) {
    pool->overlap = kind == V4_CSA;
    pool->rate = kind == V4_CSA ? model->config.csa_rate : model->config.hca_rate;
    pool->dim = dim;
    pool->bias = floats_of(model, tensors[2], pool->rate * dim * (1 + pool->overlap));
    pool->norm = floats_of(model, tensors[3], dim);
    return pool->bias && pool->norm ? 0 : -1;
}

/* All projections of the layer's input stacked into one matrix, so that it is read once. */
static int load_input(v4_model *model, v4_layer *layer, const void *const *tensors) {
    const v4_config *config = &model->config;
    int row = config->query_rank + config->head_dim, indexed = layer->kind == V4_CSA && model->indexed;
    int width = config->head_dim * (1 + layer->pool.overlap), index_width = 2 * config->index_dim;
    if (layer->kind != V4_SLIDING) layer->pool.source = row, row += 2 * width;
    if (indexed) layer->index_pool.source = row, row += 2 * index_width;
    if (indexed) layer->index_weights = row, row += config->index_heads;
    if (v4_matrix_create(model, &layer->input, row, config->hidden_dim)) return -1;
    int dim = config->hidden_dim;
    v4_matrix_put(&layer->input, 0, tensors[V4_L_QA], config->query_rank, dim);
    v4_matrix_put(&layer->input, config->query_rank, tensors[V4_L_KV], config->head_dim, dim);
    if (layer->kind != V4_SLIDING) {
        v4_matrix_put(&layer->input, layer->pool.source, tensors[V4_L_COMP_KV], width, dim);
        v4_matrix_put(&layer->input, layer->pool.source + width, tensors[V4_L_COMP_GATE], width, dim);
    }
    if (indexed) {
        v4_matrix_put(&layer->input, layer->index_pool.source, tensors[V4_L_INDEX_KV], index_width, dim);
        v4_matrix_put(&layer->input, layer->index_pool.source + index_width, tensors[V4_L_INDEX_GATE], index_width, dim);
        v4_matrix_put(&layer->input, layer->index_weights, tensors[V4_L_INDEX_WEIGHTS], config->index_heads, dim);
    }
    return 0;
}

static int load_attention(v4_model *model, v4_layer *layer, const void *const *tensors) {
    const v4_config *config = &model->config;
    int width = config->heads_count * config->head_dim, groups = config->output_groups, rank = config->output_rank;
    int per_group = width / groups, bad = 0;
    const uint16_t *output_a = tensors[V4_L_OA];
    if (layer->kind != V4_SLIDING)
        bad |= load_compressor(model, &layer->pool, tensors + V4_L_COMP_KV, layer->kind, config->head_dim);
    if (layer->kind == V4_CSA && model->indexed) {
        bad |= load_compressor(model, &layer->index_pool, tensors + V4_L_INDEX_KV, V4_CSA, config->index_dim);
        bad |= matrix_of(model, &layer->index_query, tensors[V4_L_INDEX_QB], config->index_heads * config->index_dim,
                         config->query_rank);
    }
    if (bad || load_input(model, layer, tensors)) return -1;
    bad |= matrix_of(model, &layer->query, tensors[V4_L_QB], width, config->query_rank);
    for (int g = 0; g < groups; g++)
        bad |= matrix_of(model, &layer->output_a[g], output_a + (size_t)g * (size_t)rank * (size_t)per_group, rank,
                         per_group);
    bad |= matrix_of(model, &layer->output_b, tensors[V4_L_OB], config->hidden_dim, groups * rank);
    layer->query_norm = floats_of(model, tensors[V4_L_QA_NORM], config->query_rank);
    layer->kv_norm = floats_of(model, tensors[V4_L_KV_NORM], config->head_dim);
    layer->sinks = floats_of(model, tensors[V4_L_SINKS], config->heads_count);
    layer->rope = layer->kind == V4_SLIDING ? model->rope_main : model->rope_compress;
    layer->rope_dim = layer->kind == V4_SLIDING ? config->rope_dim_main : config->rope_dim_compress;
    return bad || !layer->query_norm || !layer->kv_norm || !layer->sinks ? -1 : 0;
}

static int load_router_table(v4_model *model, v4_layer *layer, const int64_t *source) {
    int active = model->config.experts_active;
    layer->router_table = v4_take(model, (size_t)model->config.vocab_count * (size_t)active * sizeof(uint16_t));
    if (!layer->router_table) return -1;
    for (int token = 0; token < model->config.vocab_count; token++) {
        uint16_t *ids = layer->router_table + (size_t)token * (size_t)active;
        for (int k = 0; k < active; k++) {
            uint16_t id = (uint16_t)source[(size_t)token * (size_t)active + (size_t)k];
            int at = k;
            for (; at > 0 && ids[at - 1] > id; at--) ids[at] = ids[at - 1];
            ids[at] = id;
        }
    }
    return 0;
}

static int load_experts(v4_model *model, v4_layer *layer, const void *const *tensors, int hashed) {
    const v4_config *config = &model->config;
    int dim = config->hidden_dim, inner = config->expert_dim, shared = config->experts_count, bad = 0;
    size_t size = (size_t)inner * (size_t)dim;
    const uint16_t *gate_up = tensors[V4_L_EXPERT_GATE_UP], *down = tensors[V4_L_EXPERT_DOWN];
    bad |= matrix_of(model, &layer->router, tensors[V4_L_ROUTER], shared, dim);
    if (hashed) bad |= load_router_table(model, layer, tensors[V4_L_ROUTER_TABLE]);
    else bad |= !(layer->router_bias = floats_of(model, tensors[V4_L_ROUTER_BIAS], shared));
    for (int e = 0; e < shared && !bad; e++) {
        bad |= matrix_of(model, &layer->gate_up[e], gate_up + (size_t)e * 2 * size, 2 * inner, dim);
        bad |= matrix_of(model, &layer->down[e], down + (size_t)e * size, dim, inner);
    }
    if (bad || v4_matrix_create(model, &layer->gate_up[shared], 2 * inner, dim)) return -1;
    v4_matrix_put(&layer->gate_up[shared], 0, tensors[V4_L_SHARED_GATE], inner, dim);
    v4_matrix_put(&layer->gate_up[shared], inner, tensors[V4_L_SHARED_UP], inner, dim);
    return matrix_of(model, &layer->down[shared], tensors[V4_L_SHARED_DOWN], dim, inner);
}

static int load_layer(v4_model *model, int index, const void *const *tensors) {
    const v4_config *config = &model->config;
    v4_layer *layer = &model->layers[index];
    int rows = (2 + config->streams_count) * config->streams_count;
    layer->kind = config->attention_kinds[index];
    layer->attention_norm = floats_of(model, tensors[V4_L_ATTN_NORM], config->hidden_dim);
    layer->ffn_norm = floats_of(model, tensors[V4_L_FFN_NORM], config->hidden_dim);
    if (!layer->attention_norm || !layer->ffn_norm) return -1;
    if (load_mix(model, &layer->attention_mix, tensors + V4_L_ATTN_MIX, rows, 3)) return -1;
    if (load_attention(model, layer, tensors)) return -1;
    if (load_mix(model, &layer->ffn_mix, tensors + V4_L_FFN_MIX, rows, 3)) return -1;
    return load_experts(model, layer, tensors, config->hash_routed[index]);
}

static size_t place_pool(v4_compressor *pool, size_t offset, int context) {
    pool->pools_offset = offset;
    offset += (size_t)(3 * pool->dim * (1 + pool->overlap));
    pool->entries_offset = offset;
    return offset + (size_t)(context / pool->rate) * (size_t)pool->dim;
}

static void place_state(v4_model *model) {
    size_t offset = 0;
    for (int l = 0; l < model->config.layers_count; l++) {
        v4_layer *layer = &model->layers[l];
        layer->window_offset = offset;
        offset += (size_t)model->window_slots * (size_t)model->config.head_dim;
        if (layer->kind != V4_SLIDING) offset = place_pool(&layer->pool, offset, model->config.context_tokens_max);
        if (layer->kind == V4_CSA && model->indexed)
            offset = place_pool(&layer->index_pool, offset, model->config.context_tokens_max);
    }
    model->state_floats = offset;
}

/* The finished model once more, for one thread: what is its own is the scratch memory, from the model's blocks. */
static int create_lane(v4_model *model, int index) {
    int threads = model->threads_count, tokens_max = (model->config.batch_tokens_max + threads - 1) / threads;
    v4_scratch scratch = {0};
    if (v4_scratch_create(model, &scratch, tokens_max, 1)) return -1;
    v4_model *lane = model->lanes[index] = malloc(sizeof *lane);
    if (!lane) return -1;
    *lane = *model;
    lane->scratch = scratch;
    lane->pool = NULL;
    lane->arena = (v4_arena){0};
    lane->threads_count = 1;
    return 0;
}

v4_model *v4_create(const v4_config *config, const void *const *tensors, int32_t threads_count) {
    v4_model *model = calloc(1, sizeof *model);
    if (!model) return NULL;
    int context = config->context_tokens_max, hidden = config->hidden_dim;
    size_t embedding_bytes = (size_t)config->vocab_count * (size_t)hidden * sizeof(uint16_t);
    model->config = *config;
    model->heads_width = v4_padded(config->heads_count) * config->head_dim;
    model->window_tokens = config->window_tokens < context ? config->window_tokens : context;
    model->window_slots = model->window_tokens + config->batch_tokens_max - 1;
    if (model->window_slots > context) model->window_slots = context;
    model->kernels = v4_kernels_here();
    model->threads_count = threads_count;
    model->indexed = context / config->csa_rate > config->index_topk;
    int bad = v4_rope_create(model);
    for (int l = 0; l < config->layers_count && !bad; l++)
        bad = load_layer(model, l, tensors + V4_T_COUNT + (ptrdiff_t)l * V4_L_COUNT);
    bad = bad || load_mix(model, &model->head_mix, tensors + V4_T_MIX, config->streams_count, 1);
    bad = bad || matrix_of(model, &model->head, tensors[V4_T_HEAD], config->vocab_count, hidden);
    bad = bad || !(model->norm = floats_of(model, tensors[V4_T_NORM], hidden));
    bad = bad || !(model->embedding = v4_take(model, embedding_bytes));
    if (!bad) memcpy(model->embedding, tensors[V4_T_EMBED], embedding_bytes);
    bad = bad || v4_scratch_create(model, &model->scratch, config->batch_tokens_max, threads_count);
    bad = bad || !(model->pool = v4_pool_create(threads_count));
    if (!bad) place_state(model); /* of layers that are whole: the others have no rates yet */
    for (int i = 0; i < threads_count && threads_count > 1 && !bad; i++) bad = create_lane(model, i);
    if (bad) {
        v4_destroy(model);
        return NULL;
    }
    return model;
}

void v4_destroy(v4_model *model) {
    if (!model) return;
    v4_pool_destroy(model->pool);
    for (int i = 0; i < V4_THREADS_MAX; i++) free(model->lanes[i]);
    v4_arena_free(&model->arena);
    free(model);
}
