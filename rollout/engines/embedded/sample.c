/* Drawing a token from logits: no state, so nothing to save and nothing to lose.
 *
 * The noise is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)
 * under the key `seed` at the counter (position, stream_key): the draw at a position is the same
 * whether or not the tokens before it were drawn by this process. The draw inverts the cumulative
 * distribution; after a cut, over tokens by falling probability (equal ones by id).
 *
 * Logits count as finite: an infinite one as the largest of its sign, a NaN as the smallest. So the
 * token and its logprob are defined, and the logprob is finite, for all bits that can come in.
 */
#include <float.h>
#include <stdlib.h>

#include "model.h"
#include "simd.h"

/* A number in [0, 1) with 53 random bits. */
static double uniform(uint64_t seed, uint64_t stream_key, uint32_t position) {
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    uint32_t x[4] = {position, 0, (uint32_t)stream_key, (uint32_t)(stream_key >> 32)};
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)x[0] * 0xd2511f53u, b = (uint64_t)x[2] * 0xcd9e8d57u;
        uint32_t next[4] = {(uint32_t)(b >> 32) ^ x[1] ^ key[0], (uint32_t)b, (uint32_t)(a >> 32) ^ x[3] ^ key[1],
                            (uint32_t)a};
        memcpy(x, next, sizeof x);
        key[0] += 0x9e3779b9u;
        key[1] += 0xbb67ae85u;
    }
    return ((double)(x[0] >> 5) * 67108864.0 + (double)(x[1] >> 6)) / 9007199254740992.0;
}

static float bounded(float logit) {
    float above = logit > -FLT_MAX ? logit : -FLT_MAX; /* not fmaxf: false for a NaN */
    return above < FLT_MAX ? above : FLT_MAX;
}

static f8 bounded8(f8 logits) { return f8_min(f8_max(logits, f8_splat(-FLT_MAX)), f8_splat(FLT_MAX)); }

/* The first of the largest. */
static int argmax(const float *logits, int count) {
    f8 tops = f8_splat(-FLT_MAX);
    for (int i = 0; i < count; i += 8) tops = f8_max(bounded8(f8_load(logits + i)), tops);
    float top = -FLT_MAX;
    int best = 0;
    for (int i = 0; i < 8; i++) top = tops[i] > top ? tops[i] : top;
    while (!i8_any(bounded8(f8_load(logits + best)) == f8_splat(top))) best += 8;
    while (bounded(logits[best]) != top) best++;
    return best;
}

/* 1 / temperature as a float that is neither 0 nor infinite: 0 times a distance beyond all floats is a NaN. */
static float inverse(double temperature) {
    double scale = temperature > 0.0 ? 1.0 / temperature : 1.0;
    return (float)(scale < (double)FLT_MIN ? (double)FLT_MIN : scale > (double)FLT_MAX ? (double)FLT_MAX : scale);
}

static int before(const float *weights, int32_t a, int32_t b) {
    return weights[a] > weights[b] || (weights[a] == weights[b] && a < b);
}

static void sift(const float *weights, int32_t *heap, int count, int at) {
    for (int child; (child = 2 * at + 1) < count; at = child) {
        if (child + 1 < count && before(weights, heap[child + 1], heap[child])) child++;
        if (!before(weights, heap[child], heap[at])) return;
        int32_t swap = heap[at];
        heap[at] = heap[child];
        heap[child] = swap;
    }
}

/* Tokens by falling weight until `keep` of them or a share `mass` of `total`: moved to the end of
 * heap, the heaviest last.  Returns their count, and their weight in *kept. */
static int take_heaviest(const float *weights, int32_t *heap, int count, int keep, double mass, double *kept) {
    int taken = 0;
    *kept = 0.0;
    for (int i = 0; i < count; i++) heap[i] = i;
    for (int i = count / 2 - 1; i >= 0; i--) sift(weights, heap, count, i);
    while (taken < keep && (taken == 0 || *kept < mass)) {
        int32_t best = heap[0];
        int last = count - 1 - taken++;
        heap[0] = heap[last];
        heap[last] = best;
        sift(weights, heap, last, 0);
        *kept += (double)weights[best];
    }
    return taken;
}

/* The processed distribution as an order of ids (NULL: all, by id), its size and its total weight. */
static int cut(const v4_bench *bench, int count, const v4_sampling *sampling, double *total, int32_t **order) {
    int kept_count = count;
    int32_t *heap = bench->heap;
    const float *weights = bench->weights;
    int top_k = sampling->top_k > 0 && sampling->top_k < count ? sampling->top_k : count;
    if (top_k == count && sampling->top_p >= 1.0) return count;
    double mass = top_k == count ? sampling->top_p * *total : *total * 2.0; /* beyond the total: top_k alone decides */
    kept_count = take_heaviest(weights, heap, count, top_k, mass, total);
    if (top_k < count && sampling->top_p < 1.0) {
        double limit = sampling->top_p * *total, sum = 0.0;
        int shorter = 0;
        while (shorter < kept_count && (shorter == 0 || sum < limit)) sum += (double)weights[heap[count - 1 - shorter++]];
        kept_count = shorter;
        *total = sum;
    }
    *order = heap + count - kept_count;
    return kept_count;
}

/* One distribution: its weights are on the bench; order and kept as `cut` has them. */
typedef struct {
    const v4_bench *bench;
    const float *logits;
    int count;
    double total;
    float top, scale;
    int32_t *order;
    int kept;
} distribution;

static float logprob_of(const distribution *d, int32_t id) {
    return (float)((double)((bounded(d->logits[id]) - d->top) * d->scale) - v4_log(d->total));
}

static int ascending(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* Fill in the report.  Without an order the heap is free, so the likeliest are found in it. */
static void tell(const distribution *d, v4_report *report) {
    if (report->mask_ids) {
        report->mask_count = d->order ? d->kept : 0;
        for (int i = 0; i < report->mask_count; i++) report->mask_ids[i] = (uint32_t)d->order[i];
        qsort(report->mask_ids, (size_t)report->mask_count, sizeof *report->mask_ids, ascending);
    }
    if (!report->top_ids) return;
    if (report->top_count > d->kept) report->top_count = d->kept;
    const int32_t *last = d->order ? d->order + d->kept : d->bench->heap + d->count;
    double sum;
    if (!d->order) take_heaviest(d->bench->weights, d->bench->heap, d->count, report->top_count, d->total * 2.0, &sum);
    for (int i = 0; i < report->top_count; i++) {
        report->top_ids[i] = (uint32_t)last[-1 - i];
        report->top_logprobs[i] = logprob_of(d, last[-1 - i]);
    }
}

/* All tokens by the softmax at this scale; *best is the likeliest. */
static distribution whole(const v4_model *model, int thread, const float *logits, float scale, int *best) {
    const v4_bench *bench = &model->scratch.benches[thread];
    int count = model->config.vocab_count;
    *best = argmax(logits, count);
    float top = bounded(logits[*best]);
    double total = model->kernels->exponentiate(logits, top, scale, count, bench->weights);
    return (distribution){bench, logits, count, total, top, scale, NULL, count};
}

/* Where the running sum of weights, in the distribution's order, passes `target`; or the last token of any weight. */
static int find(const distribution *d, double target, int likeliest) {
    const float *weights = d->bench->weights;
    int found = likeliest, i = 0;
    double sum = 0.0;
    for (; !d->order && i < d->count; i += 8) { /* eight at a time, as long as they do not reach it */
        double next = sum + (double)f8_sum(f8_load(weights + i));
        if (next > target) break;
        sum = next;
    }
    for (; i < d->kept; i++) {
        int id = d->order ? d->order[d->kept - 1 - i] : i;
        if (weights[id] == 0.0f) continue;
        found = id;
        if ((sum += (double)weights[id]) > target) break;
    }
    return found;
}

float v4_logprob(v4_model *model, int thread, const float *logits, uint32_t token_id, v4_report *report) {
    int best;
    distribution d = whole(model, thread, logits, 1.0f, &best);
    if (report) tell(&d, report);
    return logprob_of(&d, (int32_t)token_id);
}

uint32_t v4_draw(v4_model *model, int thread, const float *logits, const v4_sampling *sampling, uint32_t position,
                 float *logprob, v4_report *report) {
    int drawn;
    distribution d = whole(model, thread, logits, inverse(sampling->temperature), &drawn);
    if (sampling->temperature > 0.0) {
        d.kept = cut(d.bench, d.count, sampling, &d.total, &d.order);
        drawn = find(&d, uniform(sampling->seed, sampling->stream_key, position) * d.total, drawn);
    }
    if (report) tell(&d, report);
    *logprob = logprob_of(&d, drawn);
    return (uint32_t)drawn;
}

uint32_t v4_sample(v4_model *model, const float *logits, const v4_sampling *sampling, uint32_t position,
                   float *logprob, v4_report *report) {
    return v4_draw(model, 0, logits, sampling, position, logprob, report);
}
