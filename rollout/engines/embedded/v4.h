/* The C interface of the embedded DeepSeek-V4 decode engine.
 *
 * A model is immutable after v4_create except for its scratch memory: one caller steps it at a
 * time, and the model's own threads help.  A state is one flat buffer that holds everything a sequence leaves behind; it can be
 * copied at any token boundary.  Callers (binding.py) check every id, shape and bound before they
 * call: this side trusts its arguments and fails only for lack of memory.
 *
 * Invariants:
 * 1. Every sum has one order (kernels.h), whatever the batch, and no thread computes a part of one.
 *    So prefill equals decode, and a sequence is independent of its neighbours, bit for bit.
 * 2. No libm function is called but sqrt, which IEEE 754 rounds exactly.
 *
 * See: docs/formats/engine_state.md (packed states), docs/architecture.md, "Engine".
 */
#ifndef V4_H
#define V4_H

#include <stddef.h>
#include <stdint.h>

#define V4_API __attribute__((visibility("default")))

enum { V4_LAYERS_MAX = 128, V4_EXPERTS_MAX = 512, V4_GROUPS_MAX = 16, V4_STREAMS_MAX = 8, V4_PAIRS_MAX = 256 };
enum { V4_STOPS_MAX = 16, V4_THREADS_MAX = 16 };

/* What a layer attends to besides its sliding window. */
enum { V4_SLIDING = 0, V4_CSA = 1, V4_HCA = 2 };

/* What makes a score of a router's logit. */
enum { V4_SQRT_SOFTPLUS = 0, V4_SIGMOID = 1 };

typedef struct {
    int32_t vocab_count, hidden_dim, streams_count, layers_count;
    int32_t heads_count, head_dim, rope_dim_main, rope_dim_compress, query_rank, output_groups, output_rank, window_tokens;
    int32_t index_heads, index_dim, index_topk, csa_rate, hca_rate;
    int32_t experts_count, experts_active, expert_dim, scoring;
    int32_t sinkhorn_rounds, context_tokens_max, batch_tokens_max;
    float norm_eps, mix_eps, swiglu_limit, route_scale;
    float rope_scale_main, rope_scale_compress; /* of sine and cosine */
    float frequencies_main[V4_PAIRS_MAX], frequencies_compress[V4_PAIRS_MAX]; /* radians a position, for each pair */
    int32_t attention_kinds[V4_LAYERS_MAX];
    int32_t hash_routed[V4_LAYERS_MAX];
} v4_config;

/* The tensor table of v4_create: V4_T_COUNT globals, then V4_L_COUNT a layer; NULL where a layer
 * has no such tensor.  bf16, row-major, except the int64 routing table.  checkpoint.py holds the names. */
enum { V4_T_EMBED, V4_T_HEAD, V4_T_NORM, V4_T_MIX, V4_T_MIX_BASE, V4_T_MIX_SCALE, V4_T_COUNT };
enum {
    V4_L_ATTN_MIX, V4_L_ATTN_BASE, V4_L_ATTN_SCALE, V4_L_FFN_MIX, V4_L_FFN_BASE, V4_L_FFN_SCALE,
    V4_L_ATTN_NORM, V4_L_FFN_NORM, V4_L_QA, V4_L_QA_NORM, V4_L_QB, V4_L_KV, V4_L_KV_NORM, V4_L_OA, V4_L_OB, V4_L_SINKS,
    V4_L_COMP_KV, V4_L_COMP_GATE, V4_L_COMP_BIAS, V4_L_COMP_NORM,
    V4_L_INDEX_KV, V4_L_INDEX_GATE, V4_L_INDEX_BIAS, V4_L_INDEX_NORM, V4_L_INDEX_QB, V4_L_INDEX_WEIGHTS,
    V4_L_ROUTER, V4_L_ROUTER_BIAS, V4_L_ROUTER_TABLE, V4_L_EXPERT_GATE_UP, V4_L_EXPERT_DOWN,
    V4_L_SHARED_GATE, V4_L_SHARED_UP, V4_L_SHARED_DOWN, V4_L_COUNT
};

typedef struct v4_model v4_model;
typedef struct v4_state v4_state;

/* One sequence's part of a forward pass: tokens_count ids appended to its state.
 * logits: vocab_count floats for each of the last logits_count of them.
 * routes: NULL, or room for the experts of each token: experts_active ids a layer, ascending, layer after layer;
 * one byte each, or two (little-endian) where there are more than 256 experts. */
typedef struct {
    v4_state *state;
    const uint32_t *token_ids;
    float *logits;
    int32_t tokens_count, logits_count;
    uint8_t *routes;
} v4_chunk;

/* How one token is drawn from logits.  temperature 0 is greedy; top_k 0 and top_p 1 keep all. */
typedef struct {
    uint64_t seed, stream_key;
    double temperature, top_p;
    int32_t top_k;
} v4_sampling;

/* What else to tell of a draw; a NULL is not wanted.  In: top_count, the room in top_ids and top_logprobs;
 * mask_ids has room for vocab_count.  Out: top_count, the likeliest tokens of the distribution, likeliest first;
 * mask_count, the ids that top_k and top_p kept, ascending, or 0 where nothing was cut.  Also, of the token that was
 * read for the draw: hidden, hidden_dim bf16, what the head was given; from v4_decode routes, as a chunk has them. */
typedef struct {
    uint32_t *top_ids, *mask_ids;
    float *top_logprobs;
    int32_t top_count, mask_count;
    uint8_t *routes;
    uint16_t *hidden;
} v4_report;

/* One running sequence of v4_decode.  token_id is drawn but not yet in the state.  In: rounds_max, at least 1, tokens to
 * draw at most; out: drawn_count. */
typedef struct {
    v4_state *state;
    v4_sampling sampling;
    uint32_t token_id;
    int32_t rounds_max, drawn_count;
    int32_t stops_count;
    uint32_t stop_ids[V4_STOPS_MAX];
} v4_stream;

/* Flags of /proc/cpuinfo that the processor must have, or "". Data, so that it can be read before
 * any of our code runs; nothing of ours runs when the library is loaded. */
V4_API extern const char v4_processor_flags[];
V4_API const char *v4_build(void);

/* 1 if none of the bf16 values is infinite or a NaN, else 0. */
V4_API int32_t v4_is_finite(const void *tensor, size_t count);

/* threads_count: 1 to V4_THREADS_MAX, the caller among them; it changes no bit. NULL when memory is short. The tensors
 * may go away afterwards. */
V4_API v4_model *v4_create(const v4_config *config, const void *const *tensors, int32_t threads_count);
V4_API void v4_destroy(v4_model *model);

V4_API v4_state *v4_state_create(const v4_model *model);
V4_API void v4_state_destroy(v4_state *state);
V4_API void v4_state_reset(const v4_model *model, v4_state *state);
V4_API uint32_t v4_state_position(const v4_state *state);
/* Bytes of a packed state after `position` tokens; pack writes exactly that many. */
V4_API size_t v4_packed_bytes(const v4_model *model, uint32_t position);
V4_API void v4_state_pack(const v4_model *model, const v4_state *state, void *packed);
/* 0, or -1 if the bytes are not a packed state of this model (the state is then unchanged). */
V4_API int32_t v4_state_unpack(const v4_model *model, v4_state *state, const void *packed, size_t bytes);

/* Append the chunks' tokens (together at most batch_tokens_max) to their states. */
V4_API void v4_step(v4_model *model, const v4_chunk *chunks, int32_t chunks_count);

/* Draw the token at `position` of a context. Returns its id; *logprob is that of the distribution
 * it was drawn from (greedy: of the softmax at temperature 1), and finite whatever the arguments.
 * report may be NULL. */
V4_API uint32_t v4_sample(v4_model *model, const float *logits, const v4_sampling *sampling, uint32_t position,
                          float *logprob, v4_report *report);

/* Append count ids to a state (at most batch_tokens_max) and tell, for each of the count ids from token_ids[1]
 * on, its logprob at temperature 1 without cuts.  reports: NULL, or one for each. */
V4_API void v4_score(v4_model *model, v4_state *state, const uint32_t *token_ids, int32_t count, float *logprobs,
                     v4_report *reports);

/* Draw tokens for every stream until it has drawn rounds_max or a stop id.  What stream s draws in round r is at
 * [r * streams_count + s], also in reports, which may be NULL. */
V4_API void v4_decode(v4_model *model, v4_stream *streams, int32_t streams_count, uint32_t *token_ids, float *logprobs,
                      v4_report *reports);

#endif
