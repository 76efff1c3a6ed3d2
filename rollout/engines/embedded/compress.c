/* Compressors: many tokens pooled into one entry (CSA every 4 tokens, HCA every 128), and the
 * indexer that picks which CSA entries a token attends to.
 *
 * An entry is a softmax-weighted mean, dimension by dimension. It is kept as a running maximum,
 * sum and weighted sum, in token order, so the tail of a sequence is three rows instead of the
 * window's tokens, and a chunk boundary cannot change it. CSA windows overlap: a token's first
 * series goes to the next window's entry, its second to this one's.
 */
#include "model.h"
#include "simd.h"

static const float EMPTY = -1e30f; /* maximum of an empty pool; its sums are 0, so any scale of them is 0 */

static void pool_clear(float *pool, int dim) {
    for (int d = 0; d < dim; d++) pool[d] = EMPTY;
    memset(pool + dim, 0, (size_t)dim * 2 * sizeof(float));
}

static void pool_add(float *pool, const float *values, const float *gates, const float *bias, int dim) {
    float *sum = pool + dim, *mean = sum + dim;
    const f8 one = f8_splat(1.0f);
    for (int d = 0; d < dim; d += 8) {
        f8 top = f8_load(pool + d), gate = f8_load(gates + d) + f8_load(bias + d);
        i8 rises = gate > top;
        f8 ratio = f8_exp(f8_select(rises, top - gate, gate - top));
        f8 keep = f8_select(rises, ratio, one), share = f8_select(rises, one, ratio);
        f8_store(pool + d, f8_select(rises, gate, top));
        f8_store(sum + d, f8_fma(f8_load(sum + d), keep, share));
        f8_store(mean + d, f8_fma(f8_load(mean + d), keep, share * f8_load(values + d)));
    }
}

void v4_pool_reset(const v4_compressor *pool, float *floats) {
    for (int i = 0; i <= pool->overlap; i++)
        pool_clear(floats + pool->pools_offset + (size_t)(3 * i * pool->dim), pool->dim);
}

/* Take the token at `position` in (row: its input projection); emit an entry when its window closes. */
void v4_pool_append(const v4_model *model, const v4_compressor *pool, float *floats, const float *row,
                    uint32_t position) {
    const v4_config *config = &model->config;
    int dim = pool->dim, width = dim * (1 + pool->overlap), own = dim * pool->overlap;
    uint32_t slot = position % (uint32_t)pool->rate, entry = position / (uint32_t)pool->rate;
    const float *values = row + pool->source, *gates = values + width, *bias = pool->bias + slot * (uint32_t)width;
    float *current = floats + pool->pools_offset, *next = current + 3 * dim;
    pool_add(current, values + own, gates + own, bias + own, dim);
    if (pool->overlap) pool_add(next, values, gates, bias, dim);
    if (slot + 1 < (uint32_t)pool->rate) return;
    float *out = floats + pool->entries_offset + (size_t)entry * (size_t)dim;
    for (int d = 0; d < dim; d += 8) f8_store(out + d, f8_load(current + 2 * dim + d) / f8_load(current + dim + d));
    v4_rms_norm(out, pool->norm, dim, config->norm_eps, out);
    size_t start = (size_t)entry * (size_t)pool->rate;
    v4_rotate(out, model->rope_compress + start * (size_t)config->rope_dim_compress, dim, config->rope_dim_compress, 1.0f);
    if (pool->overlap) {
        memcpy(current, next, (size_t)(3 * dim) * sizeof(float));
        pool_clear(next, dim);
    } else {
        pool_clear(current, dim);
    }
}

/* Floats as integers of the same order. */
static uint32_t ordered(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* The k-th largest of n scores, by fixing its bits from the top. */
static uint32_t kth_largest(const float *scores, int n, int k) {
    uint32_t threshold = 0;
    for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
        int count = 0;
        for (int i = 0; i < n; i++) count += ordered(scores[i]) >= (threshold | bit);
        if (count >= k) threshold |= bit;
    }
    return threshold;
}

static void score_entries(const v4_model *model, const v4_layer *layer, int n, int token, float *scores) {
    const v4_config *config = &model->config;
    const v4_scratch *scratch = &model->scratch;
    int dim = config->index_dim, heads = config->index_heads;
    const float *entries = scratch->floats[token] + layer->index_pool.entries_offset;
    const float *query = scratch->index_query + (size_t)token * (size_t)(heads * dim);
    const float *weights = scratch->projected + (size_t)token * (size_t)layer->input.rows + layer->index_weights;
    float scale = 1.0f / (__builtin_sqrtf((float)dim) * __builtin_sqrtf((float)heads));
    for (int i = 0; i < n; i++) {
        float score = 0.0f;
        for (int h = 0; h < heads; h++) {
            float match = f8_dot(query + h * dim, entries + (ptrdiff_t)i * dim, dim);
            score += (match > 0.0f ? match : 0.0f) * weights[h] * scale;
        }
        scores[i] = score;
    }
}

/* Copy the index_topk best CSA entries before the token's next position to bench.selected, oldest first; of
 * equal scores the older wins.  Returns their count, or 0 when all entries are to be attended. */
int v4_index_select(const v4_model *model, const v4_layer *layer, int token, const v4_bench *bench) {
    const v4_config *config = &model->config;
    uint32_t position = model->scratch.positions[token];
    int n = (int)((position + 1) / (uint32_t)config->csa_rate), k = config->index_topk, kept = 0, dim = config->head_dim;
    if (n <= k) return 0;
    float *query = model->scratch.index_query + (size_t)token * (size_t)(config->index_heads * config->index_dim);
    const float *rope = model->rope_compress + (size_t)position * (size_t)config->rope_dim_compress;
    for (int h = 0; h < config->index_heads; h++)
        v4_rotate(query + h * config->index_dim, rope, config->index_dim, config->rope_dim_compress, 1.0f);
    score_entries(model, layer, n, token, bench->index_scores);
    uint32_t threshold = kth_largest(bench->index_scores, n, k);
    const float *entry = model->scratch.floats[token] + layer->pool.entries_offset;
    int ties = k;
    for (int i = 0; i < n; i++) ties -= ordered(bench->index_scores[i]) > threshold;
    for (int i = 0; i < n; i++, entry += dim) {
        uint32_t score = ordered(bench->index_scores[i]);
        if (score < threshold || (score == threshold && ties-- <= 0)) continue;
        memcpy(bench->selected + (ptrdiff_t)kept++ * dim, entry, (size_t)dim * sizeof(float));
    }
    return kept;
}
