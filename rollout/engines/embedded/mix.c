/* Manifold-constrained hyper-connections: a few residual streams, read into one, written back.
 *
 * A block reads a weighted sum of the streams; its output returns to every stream with a weight,
 * and the streams are mixed by a nearly doubly stochastic matrix (Sinkhorn rounds keep its
 * rows and columns near 1). All weights come from one projection of the streams themselves.
 */
#include "model.h"
#include "simd.h"

V4_INLINE float root(float x) { return __builtin_sqrtf(x); }

/* out = x / rms(x), times weight unless that is NULL. n a multiple of 8; out may be x. */
void v4_rms_norm(const float *x, const float *weight, int n, float eps, float *out) {
    f8 scale = f8_splat(1.0f / root(f8_dot(x, x, n) / (float)n + eps));
    for (int i = 0; i < n; i += 8) {
        f8 value = f8_load(x + i) * scale;
        f8_store(out + i, weight ? f8_load(weight + i) * value : value);
    }
}

V4_INLINE void normalize_columns(float *comb, int n, float eps) {
    float sums[V4_STREAMS_MAX] = {0};
    for (int j = 0; j < n; j++)
        for (int k = 0; k < n; k++) sums[k] += comb[j * n + k];
    for (int j = 0; j < n; j++)
        for (int k = 0; k < n; k++) comb[j * n + k] /= sums[k] + eps;
}

V4_INLINE void normalize_rows(float *comb, int n, float eps) {
    for (int j = 0; j < n; j++) {
        float *row = comb + j * n, sum = 0.0f;
        for (int k = 0; k < n; k++) sum += row[k];
        for (int k = 0; k < n; k++) row[k] /= sum + eps;
    }
}

/* Softmax of each row plus eps, then the Sinkhorn rounds. comb holds the logits, n x n, and room up to a vector. */
V4_INLINE void sinkhorn(float *comb, int n, int rounds, float eps) {
    for (int j = 0; j < n; j++) {
        float *row = comb + j * n, top = row[0];
        for (int k = 1; k < n; k++) top = row[k] > top ? row[k] : top;
        for (int k = 0; k < n; k++) row[k] -= top;
    }
    for (int i = 0; i < n * n; i += 8) f8_store(comb + i, f8_exp(f8_load(comb + i)));
    normalize_rows(comb, n, 0.0f);
    for (int i = 0; i < n * n; i++) comb[i] += eps;
    normalize_columns(comb, n, eps);
    for (int round = 1; round < rounds; round++) {
        normalize_rows(comb, n, eps);
        normalize_columns(comb, n, eps);
    }
}

V4_INLINE void weighted_sum(const float *streams, const float *weights, int n, int dim, float *out) {
    for (int d = 0; d < dim; d += 8) {
        f8 sum = f8_splat(weights[0]) * f8_load(streams + d);
        for (int s = 1; s < n; s++) sum = f8_fma(f8_splat(weights[s]), f8_load(streams + s * dim + d), sum);
        f8_store(out + d, sum);
    }
}

/* gates = sigmoid(gates), n of them, and room up to a vector. */
V4_INLINE void open_gates(float *gates, int n) {
    for (int i = 0; i < n; i += 8) f8_store(gates + i, f8_sigmoid(f8_load(gates + i)));
}

V4_INLINE void read_streams(v4_model *model, const v4_mix *mix, const float *norm, int begin, int end, int n) {
    const v4_config *config = &model->config;
    v4_scratch *scratch = &model->scratch;
    int dim = config->hidden_dim, width = n * dim, rows = (2 + n) * n, pairs = n * n;
    v4_product product = {&mix->weights, scratch->streams + (size_t)begin * (size_t)width, scratch->mixed + begin * rows,
                          end - begin, width, rows};
    model->kernels->linear(&product, 0, rows);
    for (int t = begin; t < end; t++) {
        const float *streams = scratch->streams + (size_t)t * (size_t)width, *mixed = scratch->mixed + t * rows;
        float *comb = scratch->comb + t * v4_padded(pairs), *normed = scratch->normed + (size_t)t * (size_t)dim;
        float rms = 1.0f / root(f8_dot(streams, streams, width) / (float)width + config->norm_eps);
        float gates[2 * V4_STREAMS_MAX] = {0};
        for (int i = 0; i < 2 * n; i++) gates[i] = mixed[i] * rms * mix->scale[i / n] + mix->base[i];
        for (int i = 0; i < pairs; i++) comb[i] = mixed[2 * n + i] * rms * mix->scale[2] + mix->base[2 * n + i];
        open_gates(gates, 2 * n);
        for (int i = 0; i < n; i++) gates[i] += config->mix_eps;
        for (int i = 0; i < n; i++) scratch->post[t * n + i] = 2.0f * gates[n + i];
        sinkhorn(comb, n, config->sinkhorn_rounds, config->mix_eps);
        weighted_sum(streams, gates, n, dim, normed);
        v4_rms_norm(normed, norm, dim, config->norm_eps, normed);
    }
}

V4_INLINE void write_streams(v4_model *model, int begin, int end, int n) {
    v4_scratch *scratch = &model->scratch;
    int dim = model->config.hidden_dim;
    for (int t = begin; t < end; t++) {
        float *streams = scratch->streams + (size_t)t * (size_t)(n * dim);
        const float *output = scratch->output + (size_t)t * (size_t)dim;
        const float *post = scratch->post + t * n, *comb = scratch->comb + t * v4_padded(n * n);
        for (int d = 0; d < dim; d += 8) {
            f8 old[V4_STREAMS_MAX], out = f8_load(output + d);
            for (int j = 0; j < n; j++) old[j] = f8_load(streams + j * dim + d);
            for (int k = 0; k < n; k++) {
                f8 sum = f8_splat(post[k]) * out;
                for (int j = 0; j < n; j++) sum = f8_fma(f8_splat(comb[j * n + k]), old[j], sum);
                f8_store(streams + k * dim + d, sum);
            }
        }
    }
}

/* Four streams, the number of all models so far, are unrolled. */
void v4_mix_read(v4_model *model, const v4_mix *mix, const float *norm, int begin, int end) {
    int n = model->config.streams_count;
    if (n == 4) read_streams(model, mix, norm, begin, end, 4);
    else read_streams(model, mix, norm, begin, end, n);
}

/* streams[k] = post[k] * output + sum over j of comb[j][k] * streams[j], in place. */
void v4_mix_write(v4_model *model, int begin, int end) {
    int n = model->config.streams_count;
    if (n == 4) write_streams(model, begin, end, 4);
    else write_streams(model, begin, end, n);
}

/* The last collapse: scratch.finals [begin, end) -> normalised hidden vectors for the head. */
void v4_mix_head(v4_model *model, int begin, int end) {
    const v4_config *config = &model->config;
    v4_scratch *scratch = &model->scratch;
    int n = config->streams_count, dim = config->hidden_dim, width = n * dim;
    v4_product product = {&model->head_mix.weights, scratch->finals + (size_t)begin * (size_t)width,
                          scratch->mixed + begin * n, end - begin, width, n};
    model->kernels->linear(&product, 0, n);
    for (int t = begin; t < end; t++) {
        const float *from = scratch->finals + (size_t)t * (size_t)width, *mixed = scratch->mixed + t * n;
        float rms = 1.0f / root(f8_dot(from, from, width) / (float)width + config->norm_eps);
        float gates[V4_STREAMS_MAX] = {0}, *to = scratch->normed + (size_t)t * (size_t)dim;
        for (int i = 0; i < n; i++) gates[i] = mixed[i] * rms * model->head_mix.scale[0] + model->head_mix.base[i];
        open_gates(gates, n);
        for (int i = 0; i < n; i++) gates[i] += config->mix_eps;
        weighted_sum(from, gates, n, dim, to);
        v4_rms_norm(to, model->norm, dim, config->norm_eps, to);
    }
}
