/* The forward pass over a batch of chunks, and decoding several sequences together. */
#include "model.h"
#include "simd.h"

enum { LANE_STREAMS_MIN = 4 };       /* with fewer, weights that each thread loads for itself cost more than waiting */

typedef struct {
    void *field;
    size_t bytes;
} need;

static int take_all(v4_model *model, const need *needs, size_t count) {
    for (size_t i = 0; i < count; i++) {
        void *block = v4_take(model, needs[i].bytes);
        if (!block) return -1;
        memcpy(needs[i].field, &block, sizeof block);
    }
    return 0;
}

/* What a thread of its own needs beside the others. */
static int create_bench(v4_model *model, v4_bench *b) {
    const v4_config *c = &model->config;
    size_t f = sizeof(float), dim = (size_t)c->head_dim, vocab = (size_t)c->vocab_count;
    int densest = c->csa_rate < c->hca_rate ? c->csa_rate : c->hca_rate;
    size_t entries = (size_t)(c->context_tokens_max / c->csa_rate) + 1; /* the indexer is CSA's */
    size_t keys = (size_t)model->window_tokens + (size_t)(c->context_tokens_max / densest) + 1;
    size_t chosen = (size_t)c->index_topk < entries ? (size_t)c->index_topk : entries;
    const need needs[] = {
        {&b->scores, (keys + V4_SLACK) * V4_HEADS * f}, {&b->query, dim * V4_HEADS * f}, {&b->index_scores, entries * f},
        {&b->selected, chosen * dim * f}, {&b->weights, vocab * f}, {&b->heap, vocab * sizeof(int32_t)},
    };
    return take_all(model, needs, sizeof needs / sizeof *needs);
}

/* Room for tokens_max tokens in every intermediate of the forward pass. */
int v4_scratch_create(v4_model *model, v4_scratch *s, int tokens_max, int threads_count) {
    const v4_config *c = &model->config;
    size_t n = (size_t)tokens_max, hidden = (size_t)c->hidden_dim, f = sizeof(float), columns = 0;
    size_t width = (size_t)model->heads_width, streams = (size_t)c->streams_count;
    size_t active = n * (size_t)c->experts_active, slots = active + n;
    for (int l = 0; l < c->layers_count; l++)
        if ((size_t)model->layers[l].input.rows > columns) columns = (size_t)model->layers[l].input.rows;
    const need needs[] = {
        {&s->token_ids, n * sizeof(uint32_t)}, {&s->positions, n * sizeof(uint32_t)}, {&s->floats, n * sizeof(float *)},
        {&s->streams, n * streams * hidden * f}, {&s->finals, n * streams * hidden * f},
        {&s->mixed, n * (2 + streams) * streams * f}, {&s->post, n * streams * f},
        {&s->comb, n * (size_t)v4_padded(c->streams_count * c->streams_count) * f}, {&s->normed, n * hidden * f},
        {&s->projected, n * columns * f}, {&s->query, n * width * f}, {&s->attended, n * width * f},
        {&s->output, n * hidden * f}, {&s->index_query, n * (size_t)(c->index_heads * c->index_dim) * f},
        {&s->low_rank, n * (size_t)(c->output_groups * c->output_rank) * f},
        {&s->routed, n * (size_t)v4_padded(c->experts_count) * f}, {&s->route_weights, active * f},
        {&s->route_ids, active * sizeof(int32_t)}, {&s->route_slots, active * sizeof(int32_t)},
        {&s->gathered, slots * hidden * f}, {&s->hidden, slots * 2 * (size_t)c->expert_dim * f},
        {&s->slots, slots * hidden * f}, {&s->products, (size_t)(c->experts_count + 1) * sizeof(v4_product)},
        {&s->logits, n * (size_t)c->vocab_count * f}, {&s->chunks, n * sizeof(v4_chunk)},
        {&s->running, n * sizeof(int32_t)},
    };
    int bad = take_all(model, needs, sizeof needs / sizeof *needs);
    for (int t = 0; t < threads_count && !bad; t++) bad = create_bench(model, &s->benches[t]);
    return bad;
}

/* Token ids to streams (every stream starts as the embedding), and where each token belongs. */
static void embed(v4_model *model, const v4_chunk *chunks, int chunks_count) {
    v4_scratch *scratch = &model->scratch;
    int tokens = 0, dim = model->config.hidden_dim, count = model->config.streams_count;
    for (int c = 0; c < chunks_count; c++)
        for (int i = 0; i < chunks[c].tokens_count; i++, tokens++) {
            uint32_t id = scratch->token_ids[tokens] = chunks[c].token_ids[i];
            const uint16_t *row = model->embedding + (size_t)id * (size_t)dim;
            float *streams = scratch->streams + (size_t)tokens * (size_t)(count * dim);
            scratch->positions[tokens] = chunks[c].state->position + (uint32_t)i;
            scratch->floats[tokens] = chunks[c].state->floats;
            for (int d = 0; d < dim; d++) streams[d] = bf16_to_float(row[d]);
            for (int s = 1; s < count; s++) memcpy(streams + s * dim, streams, (size_t)dim * sizeof(float));
        }
    scratch->batch = chunks;
    scratch->batch_count = chunks_count;
    scratch->tokens_count = tokens;
}

static void collapse(v4_model *model, const v4_layer *layer, int begin, int end, int thread) {
    (void)layer, (void)thread;
    v4_mix_head(model, begin, end);
}

/* Logits of the last tokens of every chunk that asks for them. */
static void project_logits(v4_model *model, const v4_chunk *chunks, int chunks_count) {
    v4_scratch *scratch = &model->scratch;
    int dim = model->config.hidden_dim, vocab = model->config.vocab_count, token = 0, wanted = 0;
    size_t width = (size_t)(model->config.streams_count * dim);
    for (int c = 0; c < chunks_count; c++) {
        size_t count = (size_t)chunks[c].logits_count;
        token += chunks[c].tokens_count;
        memcpy(scratch->finals + (size_t)wanted * width, scratch->streams + ((size_t)token - count) * width,
               count * width * sizeof(float));
        wanted += chunks[c].logits_count;
    }
    if (!wanted) return;
    v4_each(model, NULL, wanted, collapse);
    v4_product head = {&model->head, scratch->normed, scratch->logits, wanted, dim, vocab};
    v4_multiply(model, &head, 1);
    const float *logits = scratch->logits;
    for (int c = 0; c < chunks_count; c++) {
        size_t count = (size_t)chunks[c].logits_count * (size_t)vocab;
        if (count && chunks[c].logits != logits) memcpy(chunks[c].logits, logits, count * sizeof(float));
        logits += count;
    }
}

/* The experts that a layer has just sent the batch's tokens to, to the chunks that want them. */
static void tell_routes(const v4_model *model, int layer, const v4_chunk *chunks, int chunks_count) {
    int active = model->config.experts_active, bytes = model->config.experts_count > 256 ? 2 : 1;
    int row = model->config.layers_count * active * bytes;
    const int32_t *ids = model->scratch.route_ids;
    for (int c = 0; c < chunks_count; c++) {
        uint8_t *to = chunks[c].routes ? chunks[c].routes + layer * active * bytes : NULL;
        for (int i = 0; to && i < chunks[c].tokens_count; i++)
            for (int k = 0; k < active * bytes; k++)
                to[i * row + k] = (uint8_t)(ids[i * active + k / bytes] >> 8 * (k % bytes));
        ids += chunks[c].tokens_count * active;
    }
}

static void begin_layer(v4_model *model, const v4_layer *layer, int begin, int end, int thread) {
    (void)thread;
    v4_mix_read(model, &layer->attention_mix, layer->attention_norm, begin, end);
}

static void attention_to_experts(v4_model *model, const v4_layer *layer, int begin, int end, int thread) {
    (void)thread;
    v4_mix_write(model, begin, end);
    v4_mix_read(model, &layer->ffn_mix, layer->ffn_norm, begin, end);
    v4_route(model, layer, begin, end);
}

static void end_layer(v4_model *model, const v4_layer *layer, int begin, int end, int thread) {
    (void)layer, (void)thread;
    v4_combine(model, begin, end);
    v4_mix_write(model, begin, end);
}

/* In turn: what each token does alone (shared by tokens), and products with weights that all use (shared by rows). */
void v4_step(v4_model *model, const v4_chunk *chunks, int32_t chunks_count) {
    embed(model, chunks, chunks_count);
    int tokens = model->scratch.tokens_count;
    for (int l = 0; l < model->config.layers_count; l++) {
        const v4_layer *layer = &model->layers[l];
        v4_each(model, layer, tokens, begin_layer);
        v4_attention(model, layer, tokens);
        v4_each(model, layer, tokens, attention_to_experts);
        tell_routes(model, l, chunks, chunks_count);
        v4_experts(model, layer, tokens);
        v4_each(model, layer, tokens, end_layer);
    }
    project_logits(model, chunks, chunks_count);
    for (int c = 0; c < chunks_count; c++) chunks[c].state->position += (uint32_t)chunks[c].tokens_count;
}

static int is_stop(const v4_stream *stream) {
    for (int i = 0; i < stream->stops_count; i++)
        if (stream->stop_ids[i] == stream->token_id) return 1;
    return 0;
}

/* What the head was given for row `at` of the batch. */
static void tell_hidden(const v4_model *model, int at, uint16_t *hidden) {
    int dim = model->config.hidden_dim;
    const float *from = model->scratch.normed + (size_t)at * (size_t)dim;
    for (int d = 0; hidden && d < dim; d++) hidden[d] = float_to_bf16(from[d]);
}

typedef struct {
    v4_model *model;
    const uint32_t *token_ids;
    float *logprobs;
    v4_report *reports;
} scoring;

static void score_piece(void *job, int index, int thread) {
    const scoring *s = job;
    const float *logits = s->model->scratch.logits + (size_t)index * (size_t)s->model->config.vocab_count;
    v4_report *report = s->reports ? &s->reports[index] : NULL;
    s->logprobs[index] = v4_logprob(s->model, thread, logits, s->token_ids[index + 1], report);
    if (report) tell_hidden(s->model, index, report->hidden);
}

void v4_score(v4_model *model, v4_state *state, const uint32_t *token_ids, int32_t count, float *logprobs,
              v4_report *reports) {
    v4_chunk chunk = {state, token_ids, model->scratch.logits, count, count, NULL};
    scoring job = {model, token_ids, logprobs, reports};
    v4_step(model, &chunk, 1);
    v4_share(model->pool, count, score_piece, &job);
}

/* What v4_decode was asked for. */
typedef struct {
    v4_model *model;
    v4_stream *streams;
    int count;
    uint32_t *token_ids;
    float *logprobs;
    v4_report *reports;
} decoding;

/* One round of draws, a piece a stream that still runs. */
typedef struct {
    v4_model *model;
    const decoding *of;
    int round;
} drawing;

static v4_report *report_of(const decoding *d, int round, int stream) {
    return d->reports ? &d->reports[round * d->count + stream] : NULL;
}

static void draw_piece(void *job, int index, int thread) {
    const drawing *it = job;
    const v4_scratch *scratch = &it->model->scratch;
    int s = scratch->running[index], row = it->round * it->of->count + s;
    v4_stream *stream = &it->of->streams[s];
    v4_report *report = report_of(it->of, it->round, s);
    stream->token_id = v4_draw(it->model, thread, scratch->chunks[index].logits, &stream->sampling,
                               stream->state->position, &it->of->logprobs[row], report);
    it->of->token_ids[row] = stream->token_id;
    stream->drawn_count++;
    if (report) tell_hidden(it->model, index, report->hidden);
}

/* Streams [begin, end), all together in each round, each until it ends. */
static void draw_all(v4_model *model, const decoding *d, int begin, int end) {
    v4_chunk *chunks = model->scratch.chunks;
    int32_t *running = model->scratch.running, count = end - begin;
    drawing job = {model, d, 0};
    for (int i = 0; i < count; i++) running[i] = begin + i;
    for (; count; job.round++) {
        for (int i = 0; i < count; i++) {
            v4_stream *stream = &d->streams[running[i]];
            v4_report *report = report_of(d, job.round, running[i]);
            float *logits = model->scratch.logits + (size_t)i * (size_t)model->config.vocab_count;
            chunks[i] = (v4_chunk){stream->state, &stream->token_id, logits, 1, 1, report ? report->routes : NULL};
        }
        v4_step(model, chunks, count);
        v4_share(model->pool, count, draw_piece, &job);
        int left = 0;
        for (int i = 0; i < count; i++) {
            const v4_stream *stream = &d->streams[running[i]];
            if (stream->drawn_count < stream->rounds_max && !is_stop(stream)) running[left++] = running[i];
        }
        count = left;
    }
}

static void lane_piece(void *job, int index, int thread) {
    (void)thread;
    const decoding *d = job;
    int lanes = d->model->threads_count;
    draw_all(d->model->lanes[index], d, d->count * index / lanes, d->count * (index + 1) / lanes);
}

/* A few streams share each product among the threads; of many, each thread has some to itself, and waits for nobody. */
void v4_decode(v4_model *model, v4_stream *streams, int32_t streams_count, uint32_t *token_ids, float *logprobs,
               v4_report *reports) {
    decoding job = {model, streams, streams_count, token_ids, logprobs, reports};
    for (int s = 0; s < streams_count; s++) streams[s].drawn_count = 0;
    if (model->threads_count > 1 && streams_count >= LANE_STREAMS_MIN * model->threads_count)
        v4_share(model->pool, model->threads_count, lane_piece, &job);
    else draw_all(model, &job, 0, streams_count);
}
