/* Mixture of experts: routing, then each expert once for all the tokens that chose it.
 *
 * Experts run in the order of their ids and add to their tokens' outputs as they go, the shared
 * expert last: a token's sum has one order whichever tokens share the batch.
 */
#include "model.h"
#include "simd.h"

/* scores[i] = sqrt(softplus(logits[i])), or its sigmoid; both hold experts_count floats rounded up to eight. */
static void score_experts(const float *logits, int count, int scoring, float *scores) {
    for (int e = 0; e < count; e += 8) {
        if (scoring == V4_SIGMOID) {
            f8_store(scores + e, f8_sigmoid(f8_load(logits + e)));
            continue;
        }
        f8 value = f8_softplus(f8_load(logits + e));
        for (int i = 0; i < 8; i++) scores[e + i] = __builtin_sqrtf(value[i]);
    }
}

/* The `active` experts of the highest score plus bias, ids ascending; of equals the lower id wins. */
static void choose_experts(const float *scores, const float *bias, int count, int active, int32_t *ids) {
    uint8_t taken[V4_EXPERTS_MAX] = {0};
    for (int k = 0; k < active; k++) {
        int best = -1;
        for (int e = 0; e < count; e++)
            if (!taken[e] && (best < 0 || scores[e] + bias[e] > scores[best] + bias[best])) best = e;
        taken[best] = 1;
    }
    for (int e = 0, k = 0; e < count; e++)
        if (taken[e]) ids[k++] = e;
}

static void route(v4_model *model, const v4_layer *layer, const uint32_t *token_ids, int tokens) {
    const v4_config *config = &model->config;
    v4_scratch *scratch = &model->scratch;
    int count = config->experts_count, active = config->experts_active;
    v4_linear(&layer->router, tokens, scratch->normed, config->hidden_dim, scratch->routed, v4_padded(count));
    for (int t = 0; t < tokens; t++) {
        float scores[V4_EXPERTS_MAX], sum = 0.0f;
        int32_t *ids = scratch->route_ids + t * active;
        float *weights = scratch->route_weights + t * active;
        score_experts(scratch->routed + t * v4_padded(count), count, config->scoring, scores);
        if (layer->router_table)
            for (int k = 0; k < active; k++) ids[k] = layer->router_table[token_ids[t] * (uint32_t)active + (uint32_t)k];
        else
            choose_experts(scores, layer->router_bias, count, active, ids);
        for (int k = 0; k < active; k++) sum += scores[ids[k]];
        for (int k = 0; k < active; k++) weights[k] = scores[ids[k]] / (sum + 1e-20f) * config->route_scale;
    }
}

/* hidden (gate | up) -> its first half: silu(min(gate, limit)) * clamp(up). */
static void activate(float *hidden, int dim, float limit) {
    f8 high = f8_splat(limit), low = f8_splat(-limit);
    for (int i = 0; i < dim; i += 8) {
        f8 gate = f8_min(f8_load(hidden + i), high), up = f8_max(f8_min(f8_load(hidden + dim + i), high), low);
        f8_store(hidden + i, gate * f8_sigmoid(gate) * up);
    }
}

/* `expert` of `count` rows at x (hidden_dim floats each) to scratch.slots. */
static void run_expert(v4_model *model, const v4_layer *layer, int expert, const float *x, int count) {
    const v4_config *config = &model->config;
    v4_scratch *scratch = &model->scratch;
    int dim = config->expert_dim;
    v4_linear(&layer->gate_up[expert], count, x, config->hidden_dim, scratch->hidden, 2 * dim);
    for (int t = 0; t < count; t++) activate(scratch->hidden + (size_t)t * (size_t)(2 * dim), dim, config->swiglu_limit);
    v4_linear(&layer->down[expert], count, scratch->hidden, 2 * dim, scratch->slots, config->hidden_dim);
}

static void add_scaled(float *to, const float *from, float weight, int dim) {
    for (int d = 0; d < dim; d += 8) f8_store(to + d, f8_fma(f8_splat(weight), f8_load(from + d), f8_load(to + d)));
}

void v4_moe(v4_model *model, const v4_layer *layer, const uint32_t *token_ids, int tokens) {
    const v4_config *config = &model->config;
    v4_scratch *scratch = &model->scratch;
    int active = config->experts_active, shared = config->experts_count;
    size_t dim = (size_t)config->hidden_dim;
    route(model, layer, token_ids, tokens);
    memset(scratch->output, 0, (size_t)tokens * dim * sizeof(float));
    for (int e = 0; e < shared; e++) {
        int count = 0;
        for (int i = 0; i < tokens * active; i++) {
            if (scratch->route_ids[i] != e) continue;
            memcpy(scratch->gathered + (size_t)count * dim, scratch->normed + (size_t)(i / active) * dim,
                   dim * sizeof(float));
            scratch->members[count++] = i;
        }
        if (!count) continue;
        run_expert(model, layer, e, scratch->gathered, count);
        for (int m = 0; m < count; m++)
            add_scaled(scratch->output + (size_t)(scratch->members[m] / active) * dim,
                       scratch->slots + (size_t)m * dim, scratch->route_weights[scratch->members[m]], (int)dim);
    }
    run_expert(model, layer, shared, scratch->normed, tokens);
    for (int t = 0; t < tokens; t++)
        add_scaled(scratch->output + (size_t)t * dim, scratch->slots + (size_t)t * dim, 1.0f, (int)dim);
}
