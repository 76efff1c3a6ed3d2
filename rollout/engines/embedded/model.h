/* Inside of the engine: the loaded model, its scratch memory and the layout of a state. */
#ifndef V4_MODEL_H
#define V4_MODEL_H

#include "v4.h"

/* bf16 weights, repacked: groups of four rows; in a group, blocks of 16 columns, row after row;
 * in a block, column i beside column i + 8, so that one 32-byte load gives two vectors of eight. */
enum { V4_GROUP = 4, V4_BLOCK = 16 };

typedef struct {
    uint16_t *data;
    int32_t rows, cols;
} v4_matrix;

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

typedef struct {
    float *streams, *mixed, *post, *comb, *normed, *projected, *query, *attended, *output, *index_query;
    float *low_rank, *routed, *hidden, *gathered, *slots, *route_weights, *scores, *selected, *index_scores, *finals;
    float *logits, *weights, *lanes;
    int32_t *route_ids, *members, *heap;
    v4_chunk *chunks;
    uint32_t *token_ids;
} v4_scratch;

enum { V4_BLOCKS_MAX = 4096 };

struct v4_model {
    v4_config config;
    v4_layer layers[V4_LAYERS_MAX];
    v4_mix head_mix;
    v4_matrix head;
    uint16_t *embedding;
    float *norm, *rope_main, *rope_compress;
    v4_scratch scratch;
    size_t state_floats;
    int32_t heads_width;             /* floats of a token's heads, with empty ones up to a multiple of eight */
    int32_t window_slots, indexed;   /* indexed: contexts can hold more CSA entries than index_topk */
    void *blocks[V4_BLOCKS_MAX];
    size_t blocks_count, block_used, block_bytes;
};

struct v4_state {
    uint32_t position;
    uint32_t reserved[15];           /* keeps the floats on a cache line */
    float floats[];
};

/* arena.c: memory that lives as long as the model; NULL when short. 64-byte aligned, zeroed. */
void *v4_take(v4_model *model, size_t bytes);

/* linear.c */
int v4_matrix_create(v4_model *model, v4_matrix *out, int rows, int cols);
void v4_matrix_put(v4_matrix *matrix, int row, const uint16_t *source, int rows, int source_cols);
void v4_linear(const v4_matrix *weights, int tokens, const float *x, int x_stride, float *y, int y_stride);

/* linear_wide.c: the same on AVX-512; only where the processor has it. */
void v4_linear_wide(const v4_matrix *weights, int tokens, const float *x, int x_stride, float *y, int y_stride);

/* tables.c: double precision functions of our own, and what is built from them. */
double v4_log(double x);
int v4_rope_create(v4_model *model);

/* step.c */
int v4_scratch_create(v4_model *model);

/* Rounded up to a whole number of vectors. */
static inline int v4_padded(int n) { return (n + 7) / 8 * 8; }

/* sample.c: of one token at temperature 1 without cuts; report may be NULL. */
float v4_logprob(v4_model *model, const float *logits, uint32_t token_id, v4_report *report);

/* mix.c */
void v4_mix_read(v4_model *model, const v4_mix *mix, const float *norm, int tokens);
void v4_mix_write(v4_model *model, int tokens);
void v4_mix_head(v4_model *model, int tokens, const float *streams, float *out);
void v4_rms_norm(const float *x, const float *weight, int n, float eps, float *out);

/* compress.c */
void v4_pool_reset(const v4_compressor *pool, float *floats);
void v4_pool_append(const v4_model *model, const v4_compressor *pool, float *floats, const float *row, uint32_t position);
int v4_index_select(v4_model *model, const v4_layer *layer, const float *floats, int token, uint32_t position);

/* attention.c, moe.c: read scratch.normed, write scratch.output. */
void v4_attention(v4_model *model, const v4_layer *layer, const v4_chunk *chunks, int chunks_count, int tokens);
void v4_moe(v4_model *model, const v4_layer *layer, const uint32_t *token_ids, int tokens);
void v4_rotate(float *x, const float *rope, int dim, int rope_dim, float direction);

#endif
