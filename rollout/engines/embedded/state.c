/* States: what a sequence leaves behind, live (fixed size) and packed (only what is in use).
 *
 * A packed state is plain little-endian bytes: a header, then for each layer the used part of its
 * window, its pools and its entries. See docs/formats/engine_state.md.
 */
#include <stdlib.h>
#include <string.h>

#include "model.h"

static const uint32_t MAGIC = 0x32533456; /* "V4S2" */

typedef struct {
    uint32_t magic, position, floats_count, shape;
} header;

/* A digest of everything that decides what the floats mean (FNV-1a over the words of the config). */
static uint32_t shape_of(const v4_model *model) {
    uint32_t digest = 2166136261u, words[sizeof model->config / sizeof(uint32_t)];
    memcpy(words, &model->config, sizeof words);
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) digest = (digest ^ words[i]) * 16777619u;
    return digest;
}

enum { PARTS_MAX = 6 };

/* The parts of a layer in use after `position` tokens: offsets and counts of floats. */
typedef struct {
    size_t offset, count;
} part;

static int pool_parts(const v4_compressor *pool, uint32_t position, part *parts) {
    parts[0] = (part){pool->pools_offset, (size_t)(3 * pool->dim * (1 + pool->overlap))};
    parts[1] = (part){pool->entries_offset, (size_t)(position / (uint32_t)pool->rate) * (size_t)pool->dim};
    return 2;
}

static int layer_parts(const v4_model *model, const v4_layer *layer, uint32_t position, part parts[PARTS_MAX]) {
    uint32_t slots = (uint32_t)model->window_slots, tokens = (uint32_t)model->window_tokens;
    uint32_t used = position < tokens ? position : tokens, first = (position - used) % slots;
    uint32_t straight = used < slots - first ? used : slots - first; /* the ring may begin anew in between */
    size_t dim = (size_t)model->config.head_dim;
    int count = 2;
    parts[0] = (part){layer->window_offset + first * dim, straight * dim};
    parts[1] = (part){layer->window_offset, (used - straight) * dim};
    if (layer->kind != V4_SLIDING) count += pool_parts(&layer->pool, position, parts + count);
    if (layer->kind == V4_CSA && model->indexed) count += pool_parts(&layer->index_pool, position, parts + count);
    return count;
}

static size_t floats_used(const v4_model *model, uint32_t position) {
    size_t total = 0;
    for (int l = 0; l < model->config.layers_count; l++) {
        part parts[PARTS_MAX];
        int count = layer_parts(model, &model->layers[l], position, parts);
        for (int i = 0; i < count; i++) total += parts[i].count;
    }
    return total;
}

v4_state *v4_state_create(const v4_model *model) {
    size_t bytes = (sizeof(v4_state) + model->state_floats * sizeof(float) + 63) / 64 * 64;
    v4_state *state = aligned_alloc(64, bytes);
    if (!state) return NULL;
    memset(state, 0, sizeof *state); /* the floats are written before they are read: what is not used takes no memory */
    v4_state_reset(model, state);
    return state;
}

void v4_state_destroy(v4_state *state) { free(state); }

void v4_state_reset(const v4_model *model, v4_state *state) {
    state->position = 0;
    for (int l = 0; l < model->config.layers_count; l++) {
        const v4_layer *layer = &model->layers[l];
        if (layer->kind != V4_SLIDING) v4_pool_reset(&layer->pool, state->floats);
        if (layer->kind == V4_CSA && model->indexed) v4_pool_reset(&layer->index_pool, state->floats);
    }
}

uint32_t v4_state_position(const v4_state *state) { return state->position; }

size_t v4_packed_bytes(const v4_model *model, uint32_t position) {
    return sizeof(header) + floats_used(model, position) * sizeof(float);
}

void v4_state_pack(const v4_model *model, const v4_state *state, void *packed) {
    header head = {MAGIC, state->position, (uint32_t)floats_used(model, state->position), shape_of(model)};
    char *out = packed;
    memcpy(out, &head, sizeof head);
    out += sizeof head;
    for (int l = 0; l < model->config.layers_count; l++) {
        part parts[PARTS_MAX];
        int count = layer_parts(model, &model->layers[l], state->position, parts);
        for (int i = 0; i < count; i++) {
            memcpy(out, state->floats + parts[i].offset, parts[i].count * sizeof(float));
            out += parts[i].count * sizeof(float);
        }
    }
}

int32_t v4_state_unpack(const v4_model *model, v4_state *state, const void *packed, size_t bytes) {
    header head;
    const char *in = packed;
    if (bytes < sizeof head) return -1;
    memcpy(&head, in, sizeof head);
    if (head.magic != MAGIC || head.shape != shape_of(model)) return -1;
    if (head.position > (uint32_t)model->config.context_tokens_max) return -1;
    if (bytes != v4_packed_bytes(model, head.position) || head.floats_count != floats_used(model, head.position))
        return -1;
    state->position = head.position;
    in += sizeof head;
    for (int l = 0; l < model->config.layers_count; l++) {
        part parts[PARTS_MAX];
        int count = layer_parts(model, &model->layers[l], head.position, parts);
        for (int i = 0; i < count; i++) {
            memcpy(state->floats + parts[i].offset, in, parts[i].count * sizeof(float));
            in += parts[i].count * sizeof(float);
        }
    }
    return 0;
}
