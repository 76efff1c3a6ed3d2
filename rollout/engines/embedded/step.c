/* The forward pass over a batch of chunks, and decoding several sequences together. */
#include "model.h"
#include "simd.h"

typedef struct {
    void *field;
    size_t bytes;
} need;

/* Room for batch_tokens_max tokens in every intermediate of the forward pass. */
int v4_scratch_create(v4_model *model) {
    const v4_config *c = &model->config;
    v4_scratch *s = &model->scratch;
    size_t n = (size_t)c->batch_tokens_max, hidden = (size_t)c->hidden_dim, f = sizeof(float), columns = 0;
    size_t width = (size_t)model->heads_width, entries = (size_t)(c->context_tokens_max / c->csa_rate) + 1;
    size_t active = n * (size_t)c->experts_active, vocab = (size_t)c->vocab_count, streams = (size_t)c->streams_count;
    size_t chosen = (size_t)c->index_topk < entries ? (size_t)c->index_topk : entries;
    for (int l = 0; l < c->layers_count; l++)
        if ((size_t)model->layers[l].input.rows > columns) columns = (size_t)model->layers[l].input.rows;
    const need needs[] = {
        {&s->streams, n * streams * hidden * f}, {&s->finals, n * streams * hidden * f},
        {&s->mixed, n * (2 + streams) * streams * f}, {&s->post, n * streams * f},
        {&s->comb, n * (size_t)v4_padded(c->streams_count * c->streams_count) * f}, {&s->normed, n * hidden * f}, {&s->projected, n * columns * f},
        {&s->query, n * width * f}, {&s->attended, n * width * f}, {&s->output, n * hidden * f},
        {&s->index_query, n * (size_t)(c->index_heads * c->index_dim) * f},
        {&s->low_rank, n * (size_t)(c->output_groups * c->output_rank) * f},
        {&s->routed, n * (size_t)v4_padded(c->experts_count) * f}, {&s->hidden, n * 2 * (size_t)c->expert_dim * f},
        {&s->gathered, n * hidden * f}, {&s->slots, n * hidden * f}, {&s->route_weights, active * f},
        {&s->scores, ((size_t)model->window_slots + entries) * 8 * f},
        {&s->selected, chosen * (size_t)c->head_dim * f}, {&s->index_scores, entries * f},
        {&s->logits, n * vocab * f}, {&s->weights, vocab * f}, {&s->lanes, (size_t)c->head_dim * 8 * f},
        {&s->route_ids, active * sizeof(int32_t)}, {&s->members, active * sizeof(int32_t)},
        {&s->heap, vocab * sizeof(int32_t)}, {&s->chunks, n * sizeof(v4_chunk)},
        {&s->token_ids, n * sizeof(uint32_t)},
    };
    for (size_t i = 0; i < sizeof needs / sizeof *needs; i++) {
        void *block = v4_take(model, needs[i].bytes);
        if (!block) return -1;
        memcpy(needs[i].field, &block, sizeof block);
    }
    return 0;
}

/* Token ids to streams (every stream starts as the embedding); returns the number of tokens. */
static int embed(v4_model *model, const v4_chunk *chunks, int chunks_count) {
    v4_scratch *scratch = &model->scratch;
    int tokens = 0, dim = model->config.hidden_dim, count = model->config.streams_count;
    for (int c = 0; c < chunks_count; c++)
        for (int i = 0; i < chunks[c].tokens_count; i++, tokens++) {
            uint32_t id = scratch->token_ids[tokens] = chunks[c].token_ids[i];
            const uint16_t *row = model->embedding + (size_t)id * (size_t)dim;
            float *streams = scratch->streams + (size_t)tokens * (size_t)(count * dim);
            for (int d = 0; d < dim; d++) streams[d] = bf16_to_float(row[d]);
            for (int s = 1; s < count; s++) memcpy(streams + s * dim, streams, (size_t)dim * sizeof(float));
        }
    return tokens;
}

/* Logits of the last tokens of every chunk that asks for them. */
static void project_logits(v4_model *model, const v4_chunk *chunks, int chunks_count) {
    v4_scratch *scratch = &model->scratch;
    size_t width = (size_t)(model->config.streams_count * model->config.hidden_dim), vocab = (size_t)model->config.vocab_count;
    int token = 0, wanted = 0;
    for (int c = 0; c < chunks_count; c++) {
        size_t count = (size_t)chunks[c].logits_count;
        token += chunks[c].tokens_count;
        memcpy(scratch->finals + (size_t)wanted * width, scratch->streams + ((size_t)token - count) * width,
               count * width * sizeof(float));
        wanted += chunks[c].logits_count;
    }
    if (!wanted) return;
    v4_mix_head(model, wanted, scratch->finals, scratch->normed);
    v4_linear(&model->head, wanted, scratch->normed, model->config.hidden_dim, scratch->logits, (int)vocab);
    const float *logits = scratch->logits;
    for (int c = 0; c < chunks_count; c++) {
        size_t count = (size_t)chunks[c].logits_count * vocab;
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

void v4_step(v4_model *model, const v4_chunk *chunks, int32_t chunks_count) {
    int tokens = embed(model, chunks, chunks_count);
    for (int l = 0; l < model->config.layers_count; l++) {
        const v4_layer *layer = &model->layers[l];
        v4_mix_read(model, &layer->attention_mix, layer->attention_norm, tokens);
        v4_attention(model, layer, chunks, chunks_count, tokens);
        v4_mix_write(model, tokens);
        v4_mix_read(model, &layer->ffn_mix, layer->ffn_norm, tokens);
        v4_moe(model, layer, model->scratch.token_ids, tokens);
        tell_routes(model, l, chunks, chunks_count);
        v4_mix_write(model, tokens);
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

void v4_score(v4_model *model, v4_state *state, const uint32_t *token_ids, int32_t count, float *logprobs,
              v4_report *reports) {
    size_t vocab = (size_t)model->config.vocab_count;
    v4_chunk chunk = {state, token_ids, model->scratch.logits, count, count, NULL};
    v4_step(model, &chunk, 1);
    for (int i = 0; i < count; i++) {
        logprobs[i] = v4_logprob(model, chunk.logits + (size_t)i * vocab, token_ids[i + 1], reports ? &reports[i] : NULL);
        if (reports) tell_hidden(model, i, reports[i].hidden);
    }
}

int32_t v4_decode(v4_model *model, v4_stream *streams, int32_t streams_count, int32_t rounds_count,
                  uint32_t *token_ids, float *logprobs, v4_report *reports) {
    v4_chunk *chunks = model->scratch.chunks;
    size_t vocab = (size_t)model->config.vocab_count;
    for (int s = 0; s < streams_count; s++)
        chunks[s] = (v4_chunk){streams[s].state, &streams[s].token_id, model->scratch.logits + (size_t)s * vocab, 1, 1, NULL};
    int stopped = 0, round = 0;
    for (; round < rounds_count && !stopped; round++) {
        for (int s = 0; reports && s < streams_count; s++) chunks[s].routes = reports[round * streams_count + s].routes;
        v4_step(model, chunks, streams_count);
        for (int s = 0; s < streams_count; s++) {
            v4_stream *stream = &streams[s];
            int at = round * streams_count + s;
            stream->token_id = v4_sample(model, chunks[s].logits, &stream->sampling, stream->state->position,
                                         &logprobs[at], reports ? &reports[at] : NULL);
            token_ids[at] = stream->token_id;
            if (reports) tell_hidden(model, s, reports[at].hidden);
            stopped |= is_stop(stream);
        }
    }
    return round;
}
