/* Inside of the engine: the loaded model, its scratch memory and the layout of a state. */
#ifndef V4_MODEL_H
#define V4_MODEL_H

#include "v4.h"

/* Kernels work on units of sixteen rows and on eight heads; `score` may write the scores of so many keys too many. */
enum { V4_UNIT = 16, V4_HEADS = 8, V4_SLACK = 8 };

/* bf16 weights, repacked: units of sixteen rows (the last one padded); in a unit, pairs of columns; in a pair, a word a
 * row, the even column in its lower half. So one 64-byte load gives two columns of sixteen rows. */
typedef struct {
    uint32_t *data;
    int32_t rows, cols;
} v4_matrix;

/* y = W x for `tokens` rows of x; strides in floats. */
typedef struct {
    const v4_matrix *m;
    const float *x;
    float *y;
    int32_t tokens, x_stride, y_stride;
} v4_product;

/* kernels.h: what the arguments are, and the order of every sum. */
typedef struct {
    void (*linear)(const v4_product *product, int begin, int end);
    void (*score)(const float *query, const float *keys, int count, int dim, float scale, float *scores);
    void (*share_out)(float *scores, int count, const float *sinks, float *totals);
    void (*gather)(const float *shares, const float *rows, const float *ahead, int count, int dim, float *out);
    double (*exponentiate)(const float *logits, float top, float scale, int count, float *weights);
} v4_kernels;

extern const v4_kernels v4_kernels_narrow, v4_kernels_wide;

typedef struct v4_pool v4_pool;
typedef void v4_piece(void *job, int index, int thread);

/* One hyper-connection: how the residual streams are read, written and mixed. */
typedef struct {
    v4_matrix weights;
    float *base, *scale;
} v4_mix;

/* A compressor: softmax-weighted pooling of `rate` tokens into one entry of `dim` floats. */
typedef struct {
    float *bias, *norm;
    int32_t dim, rate, overlap;      /* overlap: 1 where a window also pools its predecessor (CSA) */
    int32_t source;                  /* column of its kv rows in the input projection, gates follow */
    size_t pools_offset, entries_offset; /* in floats, from the state's floats */
} v4_compressor;

typedef struct {
    v4_mix attention_mix, ffn_mix;
    float *attention_norm, *ffn_norm, *query_norm, *kv_norm, *sinks, *router_bias;
    v4_matrix input;                 /* query_a | kv | compressor kv, gate | indexer kv, gate, weights */
    v4_matrix query, index_query, output_a[V4_GROUPS_MAX], output_b, router;
    v4_matrix gate_up[V4_EXPERTS_MAX + 1], down[V4_EXPERTS_MAX + 1]; /* the shared expert comes last */
    uint16_t *router_table;          /* hash routing: experts_active ids a token id, ascending */
    v4_compressor pool, index_pool;
    int32_t kind, index_weights;     /* index_weights: column in the input projection */
    size_t window_offset;
    const float *rope;               /* cos, sin pairs: [position][rope_dim / 2][2] */
    int32_t rope_dim;
} v4_layer;

/* What a thread needs for itself: of attention, of the indexer, of sampling. */
typedef struct {
    float *scores, *query, *index_scores, *selected, *weights;
    int32_t *heap;
} v4_bench;

/* One row a token unless said otherwise. A routed token has a slot for each of its experts, sorted by expert, and then
 * one for the shared expert. */
typedef struct {
    const v4_chunk *batch;           /* what the step was given */
    int32_t batch_count, tokens_count;
    uint32_t *token_ids, *positions;
    float **floats;                  /* of the state that the token belongs to */
    int32_t *running;                /* which streams v4_decode still draws for */
    float *streams, *mixed, *post, *comb, *normed, *projected, *query, *attended, *output, *index_query, *low_rank;
    float *routed, *route_weights, *finals, *logits;
    int32_t *route_ids, *route_slots;
    float *gathered, *hidden, *slots; /* one row a slot */
    v4_product *products;
    v4_chunk *chunks;
    v4_bench benches[V4_THREADS_MAX];
} v4_scratch;

/* Memory of a model (arena.c). */
typedef struct {
    void **blocks;
    size_t blocks_count;
    char *next;                      /* what is left of the block that is being shared out */
    size_t left;
} v4_arena;

struct v4_model {
    v4_config config;
    v4_layer layers[V4_LAYERS_MAX];
    v4_mix head_mix;
    v4_matrix head;
    uint16_t *embedding;
    float *norm, *rope_main, *rope_compress;
    v4_scratch scratch;
    v4_pool *pool;                   /* NULL: the caller's thread alone */
    int32_t threads_count;
    v4_model *lanes[V4_THREADS_MAX]; /* the same model for one thread each, with scratch memory of its own; or NULL */
    const v4_kernels *kernels;
    size_t state_floats;
    int32_t heads_width;             /* floats of a token's heads, with empty ones up to a multiple of eight */
    int32_t indexed;                 /* contexts can hold more CSA entries than index_topk */
    int32_t window_tokens, window_slots; /* slots: room for the keys of a batch beside those that its first token sees */
    v4_arena arena;
};

struct v4_state {
    uint32_t position;
    uint32_t reserved[15];           /* keeps the floats on a cache line */
    float floats[];
};

/* arena.c: memory that lives as long as the model; NULL when short. 64-byte aligned, zeroed. */
void *v4_take(v4_model *model, size_t bytes);
void v4_arena_free(v4_arena *arena);

/* threads.c: pieces 0 to count - 1 of a job, by whichever threads are free; back when all are done. */
v4_pool *v4_pool_create(int threads_count);
void v4_pool_destroy(v4_pool *pool);
void v4_share(v4_pool *pool, int count, v4_piece *piece, void *job);

/* linear.c */
int v4_matrix_create(v4_model *model, v4_matrix *out, int rows, int cols);
void v4_matrix_put(v4_matrix *matrix, int row, const uint16_t *source, int rows, int source_cols);
const v4_kernels *v4_kernels_here(void); /* the widest that this processor has */
void v4_multiply(v4_model *model, const v4_product *products, int count); /* shared by rows */

/* Something that is done for each of `count` tokens (or chunks) by itself, shared by ranges of them. */
typedef void v4_range(v4_model *model, const v4_layer *layer, int begin, int end, int thread);
void v4_each(v4_model *model, const v4_layer *layer, int count, v4_range *range);

/* tables.c: double precision functions of our own, and what is built from them. */
double v4_log(double x);
int v4_rope_create(v4_model *model);

/* step.c */
int v4_scratch_create(v4_model *model, v4_scratch *scratch, int tokens_max, int threads_count);

/* Rounded up to a whole number of vectors. */
static inline int v4_padded(int n) { return (n + 7) / 8 * 8; }

/* sample.c: a draw by one thread; and the logprob of one token at temperature 1 without cuts. report may be NULL. */
uint32_t v4_draw(v4_model *model, int thread, const float *logits, const v4_sampling *sampling, uint32_t position,
                 float *logprob, v4_report *report);
float v4_logprob(v4_model *model, int thread, const float *logits, uint32_t token_id, v4_report *report);

/* mix.c: tokens [begin, end). */
void v4_mix_read(v4_model *model, const v4_mix *mix, const float *norm, int begin, int end);
void v4_mix_write(v4_model *model, int begin, int end);
void v4_mix_head(v4_model *model, int begin, int end);
void v4_rms_norm(const float *x, const float *weight, int n, float eps, float *out);

/* compress.c */
void v4_pool_reset(const v4_compressor *pool, float *floats);
void v4_pool_append(const v4_model *model, const v4_compressor *pool, float *floats, const float *row, uint32_t position);
int v4_index_select(const v4_model *model, const v4_layer *layer, int token, const v4_bench *bench);

/* attention.c, moe.c: read scratch.normed; scratch.output is written by v4_attention and v4_combine. */
void v4_attention(v4_model *model, const v4_layer *layer, int tokens);
void v4_route(v4_model *model, const v4_layer *layer, int begin, int end);
void v4_experts(v4_model *model, const v4_layer *layer, int tokens);
void v4_combine(v4_model *model, int begin, int end);
void v4_rotate(float *x, const float *rope, int dim, int rope_dim, float direction);

#endif
