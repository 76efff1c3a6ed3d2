/* Manifold-constrained hyper-connections: four residual streams, read into one, written back.
 *
 * A block reads a weighted sum of the streams; its output returns to every stream with a weight,
 * and the streams are mixed by a nearly doubly stochastic 4 x 4 matrix (Sinkhorn rounds keep its
 * rows and columns near 1). All weights come from one projection of the streams themselves.
 */
#include "model.h"
#include "simd.h"

enum { STREAMS = V4_STREAMS, PAIRS = STREAMS * STREAMS };

V4_INLINE float root(float x) { return __builtin_sqrtf(x); }

/* out = x / rms(x), times weight unless that is NULL. n a multiple of 8; out may be x. */
void v4_rms_norm(const float *x, const float *weight, int n, float eps, float *out) {
    f8 scale = f8_splat(1.0f / root(f8_dot(x, x, n) / (float)n + eps));
    for (int i = 0; i < n; i += 8) {
        f8 value = f8_load(x + i) * scale;
        f8_store(out + i, weight ? f8_load(weight + i) * value : value);
    }
}

static void normalize_columns(float *comb, float eps) {
    for (int k = 0; k < STREAMS; k++) {
        float sum = ((comb[k] + comb[4 + k]) + (comb[8 + k] + comb[12 + k])) + eps;
        for (int j = 0; j < STREAMS; j++) comb[j * 4 + k] /= sum;
    }
}

static void normalize_rows(float *comb, float eps) {
    for (int j = 0; j < STREAMS; j++) {
        float *row = comb + j * 4, sum = ((row[0] + row[2]) + (row[1] + row[3])) + eps;
        for (int k = 0; k < STREAMS; k++) row[k] /= sum;
    }
}

/* Softmax of each row plus eps, then the Sinkhorn rounds. comb holds the logits, 4 x 4. */
static void sinkhorn(float *comb, int rounds, float eps) {
    for (int j = 0; j < STREAMS; j++) {
        float *row = comb + j * 4, top = row[0];
        for (int k = 1; k < STREAMS; k++) top = row[k] > top ? row[k] : top;
        for (int k = 0; k < STREAMS; k++) row[k] -= top;
    }
    f8_store(comb, f8_exp(f8_load(comb)));
    f8_store(comb + 8, f8_exp(f8_load(comb + 8)));
    normalize_rows(comb, 0.0f);
    for (int i = 0; i < PAIRS; i++) comb[i] += eps;
    normalize_columns(comb, eps);
    for (int round = 1; round < rounds; round++) {
        normalize_rows(comb, eps);
        normalize_columns(comb, eps);
    }
}

static void weighted_sum(const float *streams, const float *weights, int dim, float *out) {
    for (int d = 0; d < dim; d += 8) {
        f8 sum = f8_splat(weights[0]) * f8_load(streams + d);
        for (int s = 1; s < STREAMS; s++) sum = f8_fma(f8_splat(weights[s]), f8_load(streams + s * dim + d), sum);
        f8_store(out + d, sum);
    }
}

/* Streams -> scratch.normed (the block's input, normalised), scratch.post and scratch.comb. */
void v4_mix_read(v4_model *model, const v4_mix *mix, const float *norm, int tokens) {
    const v4_config *config = &model->config;
    v4_scratch *scratch = &model->scratch;
    int dim = config->hidden_dim, width = STREAMS * dim;
    v4_linear(&mix->weights, tokens, scratch->streams, width, scratch->mixed, 2 * STREAMS + PAIRS);
    for (int t = 0; t < tokens; t++) {
        const float *streams = scratch->streams + (size_t)t * (size_t)width;
        const float *mixed = scratch->mixed + t * (2 * STREAMS + PAIRS);
        float *comb = scratch->comb + t * PAIRS, *normed = scratch->normed + (size_t)t * (size_t)dim;
        float rms = 1.0f / root(f8_dot(streams, streams, width) / (float)width + config->norm_eps), gates[8];
        for (int i = 0; i < 2 * STREAMS; i++) gates[i] = mixed[i] * rms * mix->scale[i / STREAMS] + mix->base[i];
        for (int i = 0; i < PAIRS; i++) comb[i] = mixed[8 + i] * rms * mix->scale[2] + mix->base[8 + i];
        f8_store(gates, f8_sigmoid(f8_load(gates)));
        for (int i = 0; i < STREAMS; i++) gates[i] += config->mix_eps;
        for (int i = 0; i < STREAMS; i++) scratch->post[t * STREAMS + i] = 2.0f * gates[STREAMS + i];
        sinkhorn(comb, config->sinkhorn_rounds, config->mix_eps);
        weighted_sum(streams, gates, dim, normed);
        v4_rms_norm(normed, norm, dim, config->norm_eps, normed);
    }
}

/* streams[k] = post[k] * output + sum over j of comb[j][k] * streams[j], in place. */
void v4_mix_write(v4_model *model, int tokens) {
    v4_scratch *scratch = &model->scratch;
    int dim = model->config.hidden_dim;
    for (int t = 0; t < tokens; t++) {
        float *streams = scratch->streams + (size_t)t * (size_t)(STREAMS * dim);
        const float *output = scratch->output + (size_t)t * (size_t)dim;
        const float *post = scratch->post + t * STREAMS, *comb = scratch->comb + t * PAIRS;
        for (int d = 0; d < dim; d += 8) {
            f8 old[STREAMS], out = f8_load(output + d);
            for (int j = 0; j < STREAMS; j++) old[j] = f8_load(streams + j * dim + d);
            for (int k = 0; k < STREAMS; k++) {
                f8 sum = f8_splat(post[k]) * out;
                for (int j = 0; j < STREAMS; j++) sum = f8_fma(f8_splat(comb[j * 4 + k]), old[j], sum);
                f8_store(streams + k * dim + d, sum);
            }
        }
    }
}

/* The last collapse: streams of `tokens` tokens -> normalised hidden vectors for the head. */
void v4_mix_head(v4_model *model, int tokens, const float *streams, float *out) {
    const v4_config *config = &model->config;
    int dim = config->hidden_dim, width = STREAMS * dim;
    v4_linear(&model->head_mix.weights, tokens, streams, width, model->scratch.mixed, STREAMS);
    for (int t = 0; t < tokens; t++) {
        const float *from = streams + (size_t)t * (size_t)width, *mixed = model->scratch.mixed + t * STREAMS;
        float rms = 1.0f / root(f8_dot(from, from, width) / (float)width + config->norm_eps), gates[8] = {0};
        float *to = out + (size_t)t * (size_t)dim;
        for (int i = 0; i < STREAMS; i++)
            gates[i] = mixed[i] * rms * model->head_mix.scale[0] + model->head_mix.base[i];
        f8_store(gates, f8_sigmoid(f8_load(gates)));
        for (int i = 0; i < STREAMS; i++) gates[i] += config->mix_eps;
        weighted_sum(from, gates, dim, to);
        v4_rms_norm(to, model->norm, dim, config->norm_eps, to);
    }
}
