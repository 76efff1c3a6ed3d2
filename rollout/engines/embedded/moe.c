/* Mixture of experts: routing, then each expert once for all the tokens that chose it, then a sum for each token. */
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

/* The experts of tokens [begin, end), and their weights. */
void v4_route(v4_model *model, const v4_layer *layer, int begin, int end) {
    const v4_config *config = &model->config;
    v4_scratch *scratch = &model->scratch;
    int count = config->experts_count, active = config->experts_active, dim = config->hidden_dim;
    float *routed = scratch->routed + begin * v4_padded(count);
    v4_product router = {&layer->router, scratch->normed + (size_t)begin * (size_t)dim, routed, end - begin, dim,
                         v4_padded(count)};
    model->kernels->linear(&router, 0, count);
    for (int t = begin; t < end; t++) {
        float scores[V4_EXPERTS_MAX], sum = 0.0f;
        int32_t *ids = scratch->route_ids + t * active;
        float *weights = scratch->route_weights + t * active;
        score_experts(scratch->routed + t * v4_padded(count), count, config->scoring, scores);
        if (layer->router_table)
            for (int k = 0; k < active; k++)
                ids[k] = layer->router_table[scratch->token_ids[t] * (uint32_t)active + (uint32_t)k];
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

static void activate_slots(v4_model *model, const v4_layer *layer, int begin, int end, int thread) {
    (void)layer, (void)thread;
    int dim = model->config.expert_dim;
    for (int slot = begin; slot < end; slot++)
        activate(model->scratch.hidden + (size_t)slot * (size_t)(2 * dim), dim, model->config.swiglu_limit);
}

/* Give every token a slot with each of its experts and with the shared one; returns how many experts have any. Of these
 * products.m is set to the expert's number in `experts`, and products.tokens to its slots. */
static int fill_slots(v4_model *model, int tokens, int32_t *experts) {
    const v4_config *config = &model->config;
    v4_scratch *s = &model->scratch;
    int active = config->experts_active, routed = tokens * active, used = 0, next = 0;
    size_t row = (size_t)config->hidden_dim;
    int32_t firsts[V4_EXPERTS_MAX + 1] = {0};
    for (int i = 0; i < routed; i++) firsts[s->route_ids[i]]++;
    firsts[config->experts_count] = tokens;
    for (int e = 0; e <= config->experts_count; e++) {
        int count = firsts[e];
        firsts[e] = next;
        if (!count) continue;
        experts[used] = e;
        s->products[used++].tokens = count;
        next += count;
    }
    for (int i = 0; i < routed; i++) {
        int slot = s->route_slots[i] = firsts[s->route_ids[i]]++;
        memcpy(s->gathered + (size_t)slot * row, s->normed + (size_t)(i / active) * row, row * sizeof(float));
    }
    memcpy(s->gathered + (size_t)routed * row, s->normed, (size_t)tokens * row * sizeof(float));
    return used;
}

/* Every expert of all the tokens that chose it: scratch.slots. */
void v4_experts(v4_model *model, const v4_layer *layer, int tokens) {
    v4_scratch *s = &model->scratch;
    int hidden = model->config.hidden_dim, inner = model->config.expert_dim, slots = tokens * (model->config.experts_active + 1);
    int32_t experts[V4_EXPERTS_MAX + 1];
    int used = fill_slots(model, tokens, experts);
    for (int i = 0, slot = 0; i < used; slot += s->products[i++].tokens)
        s->products[i] = (v4_product){&layer->gate_up[experts[i]], s->gathered + (size_t)slot * (size_t)hidden,
                                      s->hidden + (size_t)slot * (size_t)(2 * inner), s->products[i].tokens, hidden, 2 * inner};
    v4_multiply(model, s->products, used);
    v4_each(model, layer, slots, activate_slots);
    for (int i = 0, slot = 0; i < used; slot += s->products[i++].tokens)
        s->products[i] = (v4_product){&layer->down[experts[i]], s->hidden + (size_t)slot * (size_t)(2 * inner),
                                      s->slots + (size_t)slot * (size_t)hidden, s->products[i].tokens, 2 * inner, hidden};
    v4_multiply(model, s->products, used);
}

static void add_scaled(float *to, const float *from, float weight, int dim) {
    for (int d = 0; d < dim; d += 8) f8_store(to + d, f8_fma(f8_splat(weight), f8_load(from + d), f8_load(to + d)));
}

/* scratch.slots of tokens [begin, end) to scratch.output: experts in the order of their ids, then the shared one, so that
 * a token's sum has one order whichever tokens share the batch. */
void v4_combine(v4_model *model, int begin, int end) {
    v4_scratch *s = &model->scratch;
    int active = model->config.experts_active, dim = model->config.hidden_dim;
    int shared = active * s->tokens_count;
    for (int t = begin; t < end; t++) {
        float *out = s->output + (size_t)t * (size_t)dim;
        memset(out, 0, (size_t)dim * sizeof *out);
        for (int i = t * active; i < (t + 1) * active; i++)
            add_scaled(out, s->slots + (size_t)s->route_slots[i] * (size_t)dim, s->route_weights[i], dim);
        add_scaled(out, s->slots + (size_t)(shared + t) * (size_t)dim, 1.0f, dim);
    }
}
