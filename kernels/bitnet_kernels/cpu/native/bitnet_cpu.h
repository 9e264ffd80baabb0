/* The ABI of the native CPU library: everything that Python calls.
 *
 * Plain C, without Python.h and torch. Python checks shapes, dtypes and pointers before a call;
 * the library trusts them. Matrices are row-major. M tokens, K in_features, N out_features.
 *
 * `threads` is the number of threads to run on, including the caller; fewer may take part.
 */
#ifndef BITNET_CPU_H
#define BITNET_CPU_H

#include <stdint.h>

#if defined(_WIN32)
#define BN_API __declspec(dllexport)
#else
#define BN_API __attribute__((visibility("default")))
#endif

/* Increases with every change of the ABI; native.py refuses a library of another version. */
#define BN_ABI 10

BN_API int32_t bn_abi(void);

/* Instruction sets (isa.c) */

/* The name of number i, best first, or NULL past the last one that this CPU runs. */
BN_API const char *bn_isa_name(int32_t i);
/* Use the instruction set of that name from now on; 0 if this CPU does not run it. */
BN_API int32_t bn_isa_use(const char *name);
/* The name of the instruction set in use. */
BN_API const char *bn_isa_used(void);
/* Whether addsub takes packed weights on the instruction set in use. */
BN_API int32_t bn_families_share_layout(void);

/* Threads (threads.c) */

/* Hand over the OpenMP runtime of the process: the addresses of GOMP_parallel,
 * omp_get_thread_num and omp_get_num_threads. Until then everything runs on one thread. */
BN_API void bn_use_openmp(void *parallel, void *thread_num, void *num_threads);

/* Memory (read.c) */

/* The sum, modulo 2^64, of the bytes / 8 words at `memory`, which is aligned to 8: a plain read. */
BN_API uint64_t bn_read(const void *memory, int64_t bytes, int32_t threads);

/* Ternary products (product.c)
 *
 * `packed` [N, ceil(K/64) * 16], or `planes` [N, 2, words] if `packed` is NULL. `addsub`: 1 for the
 * kernel without multiplications, which needs planes unless bn_families_share_layout(); 0 for dot,
 * which takes either. */

/* Bytes of the workspace of these operators. */
BN_API int64_t bn_ternary_workspace(int32_t threads, int64_t m, int64_t k);

/* acc [M, N] = x [M, K] times the codes, int32 */
BN_API void bn_ternary_matmul(
    int32_t threads, int32_t addsub, int64_t m, int64_t n, int64_t k, const int8_t *x,
    const uint8_t *packed, const void *planes, int32_t *acc, void *workspace
);
/* out [M, N] = ((acc * s_x[m]) * scale[n * scale_stride]) + bias[n]; bias may be NULL */
BN_API void bn_quantized_linear(
    int32_t threads, int32_t addsub, int64_t m, int64_t n, int64_t k, const int8_t *x,
    const float *s_x, const uint8_t *packed, const void *planes, const float *scale,
    int64_t scale_stride, const float *bias, float *out, void *workspace
);
/* The same for fp32 tokens [M, K], which it quantizes. */
BN_API void bn_ternary_linear(
    int32_t threads, int32_t addsub, int64_t m, int64_t n, int64_t k, const float *x,
    const uint8_t *packed, const void *planes, const float *scale, int64_t scale_stride,
    const float *bias, float *out, void *workspace
);
/* packed [n, ceil(k/64) * 16] of codes [n, k] */
BN_API void bn_pack(
    int32_t threads, const int8_t *codes, int64_t n, int64_t k, uint8_t *packed
);
/* planes [n, 2, words] of packed [n, bytes] */
BN_API void bn_bit_planes(
    int32_t threads, const uint8_t *packed, int64_t n, int64_t bytes, void *planes
);

/* How a matrix is stored. This decides which kernel multiplies by it. */
enum {
    BN_MATRIX_F32,
    BN_MATRIX_BF16,
    BN_MATRIX_F16,
    BN_MATRIX_I8, /* with a scale per row */
    BN_MATRIX_PACKED, /* ternary, quarter-planes: family dot */
    BN_MATRIX_ADDSUB, /* ternary, bit planes: family addsub */
    BN_MATRIX_PACKED_ADDSUB /* the same: family addsub, if bn_families_share_layout */
};

/* Token by token (rows.c)
 *
 * In fp32, by the formulas of bitnet_kernels/reference.py. A quantized token is its codes [K], its
 * scale and the sum of its codes. */

/* x [M, K] */
BN_API void bn_quant(
    const float *x, int64_t m, int64_t k, int8_t *codes, float *scale, int32_t *sum, int32_t threads
);
/* x, y [M, K], which may be the same; weight [K] or NULL */
BN_API void bn_rmsnorm(
    const float *x, const float *weight, float eps, int64_t m, int64_t k, float *y, int32_t threads
);
BN_API void bn_rmsnorm_quant(
    const float *x, const float *weight, float eps, int64_t m, int64_t k, int8_t *codes,
    float *scale, int32_t *sum, int32_t threads
);
/* h = x + residual [M, K] is stored, then normalized and quantized */
BN_API void bn_add_rmsnorm_quant(
    const float *x, const float *residual, const float *weight, float eps, int64_t m, int64_t k,
    int8_t *codes, float *scale, int32_t *sum, float *h, int32_t threads
);
/* of relu(gate)^2 * up */
BN_API void bn_relu2_mul_rmsnorm_quant(
    const float *gate, const float *up, const float *weight, float eps, int64_t m, int64_t k,
    int8_t *codes, float *scale, int32_t *sum, int32_t threads
);
/* y = silu(gate) * up, or relu(gate)^2 * up if `relu2` is not 0; [count] each, may be the same */
BN_API void bn_gate_mul(
    const float *gate, const float *up, int32_t relu2, int64_t count, float *y, int32_t threads
);
/* x [M, K] times a matrix [N, K] of kind BN_MATRIX_F32, _BF16 or _F16 -> y [M, N] */
BN_API void bn_dense_linear(
    const float *x, int64_t m, int64_t k, const void *weight, int64_t kind, int64_t n, float *y,
    int32_t threads
);
/* Quantized tokens, codes [M, stride] with stride = ceil(K/64) * 64 and zeros from K on, times
 * int8 weights [N, K] with a scale per row: y [M, N] = (acc * s_x) * scale */
BN_API void bn_int8_linear(
    const int8_t *codes, const float *s_x, const int32_t *sum, int64_t m, int64_t k,
    const int8_t *weight, const float *scale, int64_t n, float *y, int32_t threads
);

/* The cache of a layer: keys and values [S, G, L, E] of kind BN_MATRIX_F32, _BF16, _F16 or _I8;
 * _I8 has scales [S, G, L]. E <= 256 is even. */
typedef struct {
    int64_t kind, g, columns, e;
    void *k, *v;
    float *k_scale, *v_scale;
} bn_layer_cache;

/* reference.rope_append of qkv [B, T, (H + 2G) * E]; queries -> q [B, T, H, E] */
BN_API void bn_rope_append(
    const bn_layer_cache *cache, const float *qkv, const float *cos, const float *sin,
    const int64_t *lengths, const int64_t *n_valid, int64_t b, int64_t t, int64_t h, float *q,
    int32_t threads
);
/* reference.decode_attention of q [B, T, H, E] -> y [B, T, H * E]. `scratch`: `threads` times
 * bn_decode_attention_scratch bytes, aligned to 64. */
BN_API void bn_decode_attention(
    const bn_layer_cache *cache, const float *q, const int64_t *lengths, int64_t b, int64_t t,
    int64_t h, float *y, void *scratch, int32_t threads
);
BN_API int64_t bn_decode_attention_scratch(int64_t columns);

/* A language model and its rows: one call per step (step.c)
 *
 * bitnet/engine/state.py has the same layout. S rows, L columns, D d_model, H query heads, G
 * key-value heads, E head_dim, F d_ff, V vocabulary. */

/* An RMSNorm; weight is NULL if the model does not have this norm. */
typedef struct {
    const float *weight; /* [k] */
    float eps;
} bn_norm;

typedef struct {
    int64_t n, k;
    int64_t kind; /* BN_MATRIX_... */
    const void *weight; /* [n, k]; packed: [n, ceil(k/64) * 16] bytes; planes: [n, 2, words] */
    const float *scale; /* of int8 and ternary matrices */
    int64_t scale_stride; /* 0: one scale for all rows; 1: one per row */
} bn_matrix;

typedef struct {
    bn_norm input_norm, q_norm, k_norm, attn_norm, mlp_norm, ffn_norm;
    bn_matrix q, k, v, o, gate, up, down;
} bn_layer;

typedef struct {
    int64_t n_layers, d_model, n_heads, n_kv_heads, head_dim, d_ff, vocab;
    int64_t relu2; /* 1: relu(gate)^2 * up; 0: silu(gate) * up */
    int64_t embedding_kind; /* BN_MATRIX_F32, _BF16 or _F16 */
    const void *embedding; /* [V, D] */
    const bn_layer *layers;
    bn_norm norm;
    bn_matrix head; /* [V, D] */

    int64_t rows, columns, max_len; /* S, L > max_len, most tokens of a row */
    int64_t cache_kind; /* BN_MATRIX_F32, _BF16, _F16 or _I8 */
    void *kv; /* [n_layers, 2, S, G, L, E] */
    float *kv_scale; /* [n_layers, 2, S, G, L] of an int8 cache */
    const float *cos, *sin; /* [L, E] */
    int64_t *tokens; /* [S], the next input of each row */
    int32_t *lengths; /* [S], columns filled */
    const int32_t *active; /* [S], 1 where a step advances the row */
    float *logits; /* [S, V] */
    int64_t *chosen; /* [S], argmax of the logits; -1 if their maximum is not finite */

    int64_t most; /* tokens at a time that the workspace has room for */
    int64_t threads; /* threads that it has room for */
    void *workspace; /* bn_workspace(this) bytes */
} bn_model;

/* Tokens of one row: n of them from column `start` on. */
typedef struct {
    int64_t row, start, n;
} bn_piece;

/* Bytes of the workspace for `most` tokens and `threads` threads, which must be set. */
BN_API int64_t bn_workspace(const bn_model *model);

/* Feed the next token of each of the first `batch` rows (at most `most`): append its keys and
 * values, write logits, chosen and the next tokens, and advance the active rows. Returns -1, or a
 * row whose token is not in the vocabulary; in that case nothing was done. */
BN_API int64_t bn_step(const bn_model *model, int64_t batch, int32_t threads);

/* Append tokens to rows: `tokens` holds those of the pieces one after another (at most `most`).
 * Write the logits, chosen and next token after the last token of each piece. Lengths are not
 * advanced. Returns -1 or, as bn_step, the index of a token that is not in the vocabulary. */
BN_API int64_t bn_prefill(
    const bn_model *model, const int64_t *tokens, const bn_piece *pieces, int64_t n_pieces,
    int32_t threads
);

/* Training (train.c), in fp32 */

/* The gradients dx [m, k] and dw [k] of RMSNorm, r [m] = 1 / sqrt(mean(x^2) + eps); `scratch` has ceil(m / 32) * k floats. */
BN_API void bn_train_norm_backward(
    const float *dy, const float *x, const float *weight, const float *r, int64_t m, int64_t k,
    float *dx, float *dw, float *scratch, int32_t threads
);
/* The gradients of relu(gate)^2 * up of n numbers. */
BN_API void bn_train_gate_backward(
    const float *dy, const float *gate, const float *up, int64_t n, float *dgate, float *dup,
    int32_t threads
);
/* int32 acc [m, n] to fp32 ((acc * s) * scale) (+ bias), in place. s [m]; scale: one number
 * (stride 0) or [n] (stride 1); bias [n] or NULL. */
BN_API void bn_train_rescale(
    void *acc, const float *s, const float *scale, int64_t scale_stride, const float *bias,
    int64_t m, int64_t n, int32_t threads
);
/* bitnet.quant.absmean_ternary of a whole weight of n >= 1 numbers: codes [n], gamma. */
BN_API void bn_absmean(
    const float *weight, int64_t n, float alpha, int8_t *codes, float *gamma, int32_t threads
);
/* bitnet.quant.stochastic_int8 of x [m, n]: codes [m, n], scale [m] */
BN_API void bn_stochastic(
    const float *x, int64_t m, int64_t n, uint64_t seed, int8_t *codes, float *scale,
    int32_t threads
);
/* The same for the columns of x [m, n] times s [m]: codes [n, m], scale [n] */
BN_API void bn_stochastic_columns(
    const float *x, const float *s, int64_t m, int64_t n, uint64_t seed, int8_t *codes,
    float *scale, int32_t threads
);
/* The columns of x [m, n] times s [m] as integers below 2^22 with scale [n], in three digits of
 * base 256, lowest first: codes [3, n, m]. */
BN_API void bn_digits_columns(
    const float *x, const float *s, int64_t m, int64_t n, int8_t *codes, float *scale,
    int32_t threads
);
/* y [m, n] from the products of the three digits: acc int32 [3, m, n], scale [m]. */
BN_API void bn_sum_of_digits(
    const int32_t *acc, const float *scale, int64_t m, int64_t n, float *y, int32_t threads
);

/* Cross-entropy of each of m tokens, in place: logits z [m, n] become the softmax minus 1 at the
 * target; loss [m] = logsumexp(z) - z[target]. */
BN_API void bn_cross_entropy(
    float *z, const int64_t *target, int64_t m, int64_t n, float *loss, int32_t threads
);

/* Products of fp32 numbers and small integers on the matrix tiles of Intel's AMX (tiles.c), if
 * bn_has_tiles() is not 0. `scratch` has bn_tiles_scratch(threads) bytes, aligned to 64. */
BN_API int32_t bn_has_tiles(void);
BN_API int64_t bn_tiles_scratch(int32_t threads);
/* dx [m, k] = (dy * gamma) @ codes: dy [m, n], codes [n, k], gamma one number (stride 0) or [n]
 * (1). */
BN_API void bn_input_gradient(
    const float *dy, const int8_t *codes, const float *gamma, int64_t gamma_stride, int64_t m,
    int64_t n, int64_t k, float *dx, void *scratch, int32_t threads
);
/* dw [n, k] = (dy * s_x).T @ x_q: dy [m, n], x_q int8 [m, k] of any values, s_x [m]. */
BN_API void bn_weight_gradient(
    const float *dy, const int8_t *x_q, const float *s_x, int64_t m, int64_t n, int64_t k, float *dw,
    void *scratch, int32_t threads
);

/* bn_input_gradient by additions alone (lookup.c), if bn_has_lookup() is not 0. `scratch` has
 * bn_lookup_scratch(n, k, threads) bytes, aligned to 64. */
BN_API int32_t bn_has_lookup(void);
BN_API int64_t bn_lookup_scratch(int64_t n, int64_t k, int32_t threads);
BN_API void bn_lookup_gradient(
    const float *dy, const int8_t *codes, const float *gamma, int64_t gamma_stride, int64_t m,
    int64_t n, int64_t k, float *dx, void *scratch, int32_t threads
);

#endif
