/* A tiny random model through every path of the engine; prints a digest of all bits it computed.
 * Arguments: the number of threads, and at will what the host has too little of.
 *
 * The window wraps, entries of both kinds appear, the indexer has to choose, sampling cuts. Built
 * with sanitizers and with other instructions, the digest must stay the same.
 *
 * "helpers N": only N helpers can be started, "unwatched": nor can forks be watched; the digest stays the same, too.
 * "short": each allocation of loading fails in turn. "deep": many small blocks. Both print nothing.
 */
#define _DEFAULT_SOURCE
#include <errno.h>
#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "v4.h"

enum { VOCAB = 64, LAYERS = 3, CONTEXT = 64, BATCH = 16, WORDS = 1 << 15, TOKENS = 50, HIDDEN = 32, ROUTES = LAYERS * 2 };
enum { STREAMS = 12, ROUNDS = 8, DRAWS = STREAMS * ROUNDS };

static v4_config config = {
    .vocab_count = VOCAB, .hidden_dim = HIDDEN, .streams_count = 4, .layers_count = LAYERS, .heads_count = 8,
    .head_dim = 16, .rope_dim_main = 4, .rope_dim_compress = 8,
    .query_rank = 16, .output_groups = 2, .output_rank = 16, .window_tokens = 12, .index_heads = 3, .index_dim = 8,
    .index_topk = 3, .csa_rate = 4, .hca_rate = 8, .experts_count = 8, .experts_active = 2, .expert_dim = 16,
    .sinkhorn_rounds = 3, .context_tokens_max = CONTEXT, .batch_tokens_max = BATCH, .norm_eps = 1e-6f,
    .mix_eps = 1e-6f, .swiglu_limit = 10.0f, .route_scale = 1.5f, .rope_scale_main = 1.0f, .rope_scale_compress = 1.25f,
    .frequencies_main = {1.0f, 0.01f}, .frequencies_compress = {1.0f, 0.1f, 0.01f, 0.0f},
    .attention_kinds = {V4_SLIDING, V4_CSA, V4_HCA}, .hash_routed = {1, 0, 0},
};

static uint64_t digest = 14695981039346656037ULL;

static void absorb(const void *bytes, size_t count) {
    const unsigned char *in = bytes;
    for (size_t i = 0; i < count; i++) digest = (digest ^ in[i]) * 1099511628211ULL;
}

static void expect(int holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "broken: %s\n", what);
    exit(1);
}

/* How many allocations, helpers and watches of forks there is room for; -1: for all. The linker calls these functions
 * (--wrap) where the engine, and we, call those of the C library. */
static int allocations_left = -1, helpers_left = -1, watches_left = -1, stays_short;

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t bytes);
void *__real_realloc(void *memory, size_t bytes);
void *__real_aligned_alloc(size_t alignment, size_t bytes);
int __real_pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*run)(void *), void *argument);
int __real_pthread_atfork(void (*before)(void), void (*parent)(void), void (*child)(void));

static int has_room(int *left) { return *left < 0 || (*left > 0 && (*left)--); }

static int has_memory(void) {
    if (has_room(&allocations_left)) return 1;
    if (!stays_short) allocations_left = -1;
    return 0;
}

void *__wrap_malloc(size_t bytes) { return has_memory() ? __real_malloc(bytes) : NULL; }

void *__wrap_calloc(size_t count, size_t bytes) { return has_memory() ? __real_calloc(count, bytes) : NULL; }

void *__wrap_realloc(void *memory, size_t bytes) { return has_memory() ? __real_realloc(memory, bytes) : NULL; }

void *__wrap_aligned_alloc(size_t alignment, size_t bytes) {
    return has_memory() ? __real_aligned_alloc(alignment, bytes) : NULL;
}

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*run)(void *), void *argument) {
    return has_room(&helpers_left) ? __real_pthread_create(thread, how, run, argument) : EAGAIN;
}

int __wrap_pthread_atfork(void (*before)(void), void (*parent)(void), void (*child)(void)) {
    return has_room(&watches_left) ? __real_pthread_atfork(before, parent, child) : ENOMEM;
}

/* +- 1/16 to 1/2 */
static uint16_t *random_words(int count) {
    uint16_t *words = malloc((size_t)count * sizeof *words);
    uint32_t noise = 7;
    for (int i = 0; i < count; i++) {
        noise = noise * 1664525u + 1013904223u;
        words[i] = (uint16_t)((noise >> 31) << 15 | (0x3d80 + ((noise >> 16) & 0x17f)));
    }
    return words;
}

/* NULL if loading needs more than so many allocations; -1: it may have all. */
static v4_model *random_model(int threads_count, int allocations_max) {
    static const void *tensors[V4_T_COUNT + LAYERS * V4_L_COUNT];
    uint16_t *words = random_words(WORDS);
    int64_t *routes = malloc(VOCAB * 2 * sizeof *routes);
    for (int i = 0; i < VOCAB * 2; i++) routes[i] = i % 2 ? 7 - i % 3 : i % 4;
    for (int i = 0; i < V4_T_COUNT + LAYERS * V4_L_COUNT; i++) {
        int slot = i - V4_T_COUNT;
        tensors[i] = slot >= 0 && slot % V4_L_COUNT == V4_L_ROUTER_TABLE ? (void *)routes : (void *)(words + i * 131);
    }
    allocations_left = allocations_max;
    v4_model *model = v4_create(&config, tensors, threads_count);
    expect(allocations_left == (model ? allocations_max < 0 ? -1 : 0 : stays_short - 1), "what fails is not passed over");
    allocations_left = -1;
    free(words);
    free(routes);
    return model;
}

/* Feed all tokens in chunks of `size`, and compare or set the logits after each chunk's last token. */
static void feed(v4_model *model, v4_state *state, const uint32_t *ids, int size, float (*logits)[VOCAB], int compare) {
    static uint8_t seen[TOKENS * ROUTES];
    for (int begin = 0; begin < TOKENS; begin += size) {
        float out[VOCAB];
        int count = begin + size < TOKENS ? size : TOKENS - begin, last = begin + count - 1;
        uint8_t routes[TOKENS * ROUTES];
        v4_chunk chunk = {state, ids + begin, out, count, 1, compare && begin % 2 ? NULL : routes};
        v4_step(model, &chunk, 1);
        for (int i = 0; chunk.routes && i < count * ROUTES; i++) {
            expect(routes[i] < config.experts_count && (i % 2 == 0 || routes[i - 1] < routes[i]), "two experts a layer");
            expect(!compare || routes[i] == seen[begin * ROUTES + i], "routes do not depend on chunks");
            seen[begin * ROUTES + i] = routes[i];
        }
        if (compare) expect(!memcmp(out, logits[last], sizeof out), "a chunked prefill equals single tokens");
        else memcpy(logits[last], out, sizeof out);
    }
}

/* So many that each of three threads has some to itself. */
static void decode(v4_model *model, v4_state **states, const uint8_t *packed, size_t packed_bytes) {
    uint32_t ids[DRAWS];
    float logprobs[DRAWS];
    v4_stream streams[STREAMS];
    const v4_sampling how[3] = {{.seed = 1, .temperature = 0}, {.seed = 2, .stream_key = 9, .temperature = 1, .top_k = 5, .top_p = 0.9},
                                {.seed = 3, .temperature = 0.7, .top_p = 1}};
    for (int s = 0; s < STREAMS; s++) {
        expect(!v4_state_unpack(model, states[s], packed, packed_bytes), "a packed state is taken back");
        streams[s] = (v4_stream){.state = states[s], .sampling = how[s % 3], .token_id = 1, .rounds_max = ROUNDS - s / 3};
    }
    static uint32_t tops[DRAWS][5], masks[DRAWS][VOCAB];
    static float top_logprobs[DRAWS][5];
    v4_report reports[DRAWS];
    static uint8_t routes[DRAWS][ROUTES];
    static uint16_t hidden[DRAWS][HIDDEN];
    for (int i = 0; i < DRAWS; i++)
        reports[i] = (v4_report){tops[i], masks[i], top_logprobs[i], 1 + i % 5, 0, i % 3 ? routes[i] : NULL,
                                 i % 2 ? hidden[i] : NULL};
    v4_decode(model, streams, STREAMS, ids, logprobs, reports);
    for (int s = 0; s < STREAMS; s++) expect(streams[s].drawn_count == ROUNDS - s / 3, "each draws what it may");
    for (int i = 0; i < DRAWS; i++) {
        if (i / STREAMS >= streams[i % STREAMS].drawn_count) continue;
        expect(reports[i].top_count >= 1 && reports[i].top_count <= 5, "the likeliest are told");
        expect(reports[i].mask_count == 0 || i % 3 == 1, "only what cuts has a mask");
        for (int t = 0; t < reports[i].top_count; t++)
            expect(tops[i][t] != ids[i] || top_logprobs[i][t] == logprobs[i], "a token has one logprob");
        absorb(tops[i], (size_t)reports[i].top_count * sizeof **tops);
        absorb(masks[i], (size_t)reports[i].mask_count * sizeof **masks);
        absorb(routes[i], sizeof routes[i]);
        absorb(hidden[i], sizeof hidden[i]);
        absorb(&ids[i], sizeof ids[i]);
        absorb(&logprobs[i], sizeof logprobs[i]);
    }
}

/* Teacher forcing in chunks equals teacher forcing at once. */
static void score(v4_model *model, v4_state **states, const uint32_t *ids) {
    float whole[BATCH], parts[BATCH];
    for (int s = 0; s < 2; s++) v4_state_reset(model, states[s]);
    v4_score(model, states[0], ids, BATCH, whole, NULL);
    v4_score(model, states[1], ids, 5, parts, NULL);
    v4_score(model, states[1], ids + 5, BATCH - 5, parts + 5, NULL);
    expect(!memcmp(whole, parts, sizeof whole), "scores do not depend on chunks");
    absorb(whole, sizeof whole);
}

/* Numbers that no check of a caller would let through, in logits and in how to sample. */
static void sample_extremes(v4_model *model) {
    static const double odd[] = {(double)NAN, (double)INFINITY, -(double)INFINITY, 5e-324, 1e-39, 1e39, 1e308, -1.0, 0.5};
    enum { ODD = sizeof odd / sizeof *odd };
    float logits[VOCAB], logprob = NAN, top_logprobs[9];
    uint32_t tops[9], mask[VOCAB];
    for (int shift = 0; shift < ODD; shift++) {
        for (int i = 0; i < VOCAB; i++) {
            double value = odd[(i * (1 + shift / 3) + shift) % ODD];
            logits[i] = fabs(value) < 1e38 || !isfinite(value) ? (float)value : FLT_MAX;
        }
        for (int how = 0; how < ODD * ODD; how++) {
            v4_sampling sampling = {.seed = 3, .temperature = odd[how % ODD], .top_p = odd[how / ODD], .top_k = how % 7 - 2};
            v4_report report = {tops, mask, top_logprobs, 1 + how % 9, 0, NULL, NULL};
            uint32_t id = v4_sample(model, logits, &sampling, (uint32_t)how, &logprob, how % 2 ? &report : NULL);
            expect(id < VOCAB && isfinite(logprob), "any floats give a token and a finite logprob");
            absorb(&id, sizeof id);
            absorb(&logprob, sizeof logprob);
        }
    }
}

/* Nobody helps the child of a fork; it gets on, and ends. */
static void score_in_a_child(v4_model *model, v4_state **states, const uint32_t *ids) {
    float here[BATCH], there[BATCH];
    int ends[2], status = -1;
    expect(pipe(ends) == 0, "a pipe is made");
    v4_state_reset(model, states[0]);
    pid_t child = fork();
    v4_score(model, states[0], ids, BATCH, here, NULL);
    if (child == 0) {
        v4_destroy(model);
        _exit(write(ends[1], here, sizeof here) != sizeof here);
    }
    expect(child > 0 && read(ends[0], there, sizeof there) == sizeof there, "the child gets on");
    expect(waitpid(child, &status, 0) == child && status == 0, "the child ends");
    expect(!memcmp(here, there, sizeof here), "the child computes the same");
    close(ends[0]);
    close(ends[1]);
}

static void run(int threads_count) {
    static float logits[TOKENS][VOCAB];
    v4_model *model = random_model(threads_count, -1);
    v4_state *states[STREAMS];
    expect(model != NULL, "a model is created");
    uint32_t ids[TOKENS];
    for (int s = 0; s < STREAMS; s++) expect((states[s] = v4_state_create(model)) != NULL, "a state is created");
    for (int i = 0; i < TOKENS; i++) ids[i] = (uint32_t)(i * i + 3 * i) % VOCAB;
    feed(model, states[0], ids, 1, logits, 0);
    feed(model, states[1], ids, 7, logits, 1);
    feed(model, states[2], ids, BATCH, logits, 1);
    absorb(logits, sizeof logits);
    size_t bytes = v4_packed_bytes(model, TOKENS);
    uint8_t *packed = malloc(bytes);
    v4_state_pack(model, states[0], packed);
    absorb(packed, bytes);
    expect(v4_state_unpack(model, states[1], packed, bytes - 1) == -1, "a short state is refused");
    decode(model, states, packed, bytes);
    score(model, states, ids);
    score_in_a_child(model, states, ids);
    free(packed);
    expect(v4_is_finite(ids, 2) && !v4_is_finite("\x00\x00\x80\x7f", 2), "an infinity is seen");
    sample_extremes(model);
    for (int s = 0; s < STREAMS; s++) v4_state_destroy(states[s]);
    v4_destroy(model);
}

/* Memory ends with the first allocation, with the second, ...: for that one alone, or for all that follow. */
static void load_in_too_little(int threads_count) {
    int failures = 0;
    v4_model *model;
    while (!(model = random_model(threads_count, failures))) failures++;
    expect(failures > LAYERS * V4_L_COUNT, "each tensor is allocated by itself");
    allocations_left = 0;
    expect(!v4_state_create(model), "a state without memory is none");
    allocations_left = -1;
    v4_state *state = v4_state_create(model);
    expect(state != NULL, "with memory there is one");
    v4_state_destroy(state);
    v4_destroy(model);
}

static void load_short(int threads_count) {
    for (int first = 0; first < LAYERS; first++)
        for (stays_short = 0; stays_short < 2; stays_short++) {
            for (int l = 0; l < LAYERS; l++) config.attention_kinds[l] = (first + l) % LAYERS;
            config.hash_routed[0] = first != V4_CSA;
            load_in_too_little(threads_count);
        }
}

/* As many layers and experts as DeepSeek-V4-Flash has. */
static void load_deep(int threads_count) {
    enum { DEEP = 43, WIDE = 256, DIM = 16 };
    static const void *tensors[V4_T_COUNT + DEEP * V4_L_COUNT];
    uint16_t *words = random_words(WIDE * 2 * DIM * DIM);
    for (int i = 0; i < V4_T_COUNT + DEEP * V4_L_COUNT; i++) tensors[i] = words;
    config.layers_count = DEEP, config.experts_count = WIDE, config.hidden_dim = config.expert_dim = DIM;
    for (int l = 0; l < DEEP; l++) config.attention_kinds[l] = l % LAYERS, config.hash_routed[l] = 0;
    v4_model *model = v4_create(&config, tensors, threads_count);
    expect(model != NULL, "a model of many blocks is created");
    v4_state *state = v4_state_create(model);
    uint32_t ids[BATCH + 1] = {0};
    float logprobs[BATCH];
    v4_score(model, state, ids, BATCH, logprobs, NULL);
    for (int i = 0; i < BATCH; i++) expect(isfinite(logprobs[i]) && logprobs[i] < 0, "and computes");
    v4_state_destroy(state);
    v4_destroy(model);
    free(words);
}

int main(int count, char **arguments) {
    int threads_count = count > 1 ? atoi(arguments[1]) : 1;
    const char *lacking = count > 2 ? arguments[2] : "";
    if (!strcmp(lacking, "short")) return load_short(threads_count), 0;
    if (!strcmp(lacking, "deep")) return load_deep(threads_count), 0;
    if (!strcmp(lacking, "helpers")) helpers_left = atoi(arguments[3]);
    if (!strcmp(lacking, "unwatched")) watches_left = 0;
    run(threads_count);
    config.streams_count = 3, config.heads_count = 6, config.experts_count = 11, config.scoring = V4_SIGMOID;
    run(threads_count); /* nothing a multiple of a vector */
    config.csa_rate = 8, config.hca_rate = 2;
    run(threads_count); /* more entries of HCA than of CSA */
    printf("%016llx\n", (unsigned long long)digest);
    return 0;
}
