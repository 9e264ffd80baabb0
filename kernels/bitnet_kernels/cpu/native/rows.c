/* Entry points of the operators on single tokens: the threads share the tokens. */
#include "internal.h"

/* Numbers for which it is worthwhile to wake a second thread: the work of a core in some 10
 * microseconds. */
#define WORTH 32768

static int32_t worth(int64_t numbers, int32_t threads) {
    int64_t most = numbers / WORTH;
    return most < 1 ? 1 : most < threads ? (int32_t)most : threads;
}

typedef struct {
    const bn_rows *rows;
    const float *x, *up, *weight;
    float eps;
    int64_t m, k;
    int8_t *codes;
    float *scale;
    int32_t *sum;
    float *y;
} token_job;

static void quant_task(const bn_team *team, void *argument) {
    const token_job *job = argument;
    int64_t m, end, k = job->k;
    for (bn_share(team, job->m, 1, &m, &end); m < end; m++)
        job->rows->quant(
            job->x + m * k, k, job->codes + m * k, k, job->scale + m, job->sum + m
        );
}

void bn_quant(
    const float *x, int64_t m, int64_t k, int8_t *codes, float *scale, int32_t *sum, int32_t threads
) {
    token_job job = {
        .rows = bn_isa_current()->rows, .x = x, .m = m, .k = k, .codes = codes, .scale = scale,
        .sum = sum,
    };
    bn_parallel(quant_task, &job, worth(m * k, threads));
}

static void rmsnorm_task(const bn_team *team, void *argument) {
    const token_job *job = argument;
    int64_t m, end, k = job->k;
    for (bn_share(team, job->m, 1, &m, &end); m < end; m++)
        job->rows->rmsnorm(job->x + m * k, job->weight, job->eps, k, job->y + m * k);
}

void bn_rmsnorm(
    const float *x, const float *weight, float eps, int64_t m, int64_t k, float *y, int32_t threads
) {
    token_job job = {
        .rows = bn_isa_current()->rows, .x = x, .weight = weight, .eps = eps, .m = m, .k = k,
        .y = y,
    };
    bn_parallel(rmsnorm_task, &job, worth(m * k, threads));
}

/* With y: of h = x + up, which is stored in y. */
static void rmsnorm_quant_task(const bn_team *team, void *argument) {
    const token_job *job = argument;
    int64_t m, end, k = job->k;
    for (bn_share(team, job->m, 1, &m, &end); m < end; m++) {
        const float *x = job->x + m * k;
        if (job->y != NULL) {
            const float *restrict residual = job->up + m * k;
            float *restrict h = job->y + m * k;
            for (int64_t i = 0; i < k; i++) h[i] = x[i] + residual[i];
            x = h;
        }
        job->rows->rmsnorm_quant(
            x, job->weight, job->eps, k, job->codes + m * k, k, job->scale + m, job->sum + m
        );
    }
}

void bn_rmsnorm_quant(
    const float *x, const float *weight, float eps, int64_t m, int64_t k, int8_t *codes,
    float *scale, int32_t *sum, int32_t threads
) {
    bn_add_rmsnorm_quant(x, NULL, weight, eps, m, k, codes, scale, sum, NULL, threads);
}

void bn_add_rmsnorm_quant(
    const float *x, const float *residual, const float *weight, float eps, int64_t m, int64_t k,
    int8_t *codes, float *scale, int32_t *sum, float *h, int32_t threads
) {
    token_job job = {
        bn_isa_current()->rows, x, residual, weight, eps, m, k, codes, scale, sum, h,
    };
    bn_parallel(rmsnorm_quant_task, &job, worth(m * k, threads));
}

static void relu2_mul_rmsnorm_quant_task(const bn_team *team, void *argument) {
    const token_job *job = argument;
    int64_t m, end, k = job->k;
    for (bn_share(team, job->m, 1, &m, &end); m < end; m++)
        job->rows->relu2_mul_rmsnorm_quant(
            job->x + m * k, job->up + m * k, job->weight, job->eps, k, job->codes + m * k, k,
            job->scale + m, job->sum + m
        );
}

void bn_relu2_mul_rmsnorm_quant(
    const float *gate, const float *up, const float *weight, float eps, int64_t m, int64_t k,
    int8_t *codes, float *scale, int32_t *sum, int32_t threads
) {
    token_job job = {
        bn_isa_current()->rows, gate, up, weight, eps, m, k, codes, scale, sum, NULL,
    };
    bn_parallel(relu2_mul_rmsnorm_quant_task, &job, worth(2 * m * k, threads));
}

typedef struct {
    void (*mul)(const float *gate, const float *up, int64_t k, float *y);
    const float *gate, *up;
    int64_t count;
    float *y;
} gate_job;

static void gate_task(const bn_team *team, void *argument) {
    const gate_job *job = argument;
    int64_t i, end;
    bn_share(team, job->count, 64, &i, &end);
    job->mul(job->gate + i, job->up + i, end - i, job->y + i);
}

void bn_gate_mul(
    const float *gate, const float *up, int32_t relu2, int64_t count, float *y, int32_t threads
) {
    const bn_rows *rows = bn_isa_current()->rows;
    gate_job job = {relu2 ? rows->relu2_mul : rows->silu_mul, gate, up, count, y};
    bn_parallel(gate_task, &job, worth(count, threads));
}

typedef struct {
    const bn_rows *rows;
    bn_dense w;
    const float *x;
    bn_tokens tokens;
    int64_t m;
    float *y;
} dense_job;

static void dense_task(const bn_team *team, void *argument) {
    const dense_job *job = argument;
    const bn_dense *w = &job->w;
    int64_t n, end;
    bn_share(team, w->n, 8, &n, &end);
    if (n == end) return;
    if (w->dtype == BN_I8)
        job->rows->dense_int8(w, &job->tokens, job->m, n, end, job->y + n, w->n);
    else
        job->rows->dense(w, job->x, w->k, job->m, n, end, job->y + n, w->n);
}

void bn_dense_linear(
    const float *x, int64_t m, int64_t k, const void *weight, int64_t kind, int64_t n, float *y,
    int32_t threads
) {
    dense_job job = {
        .rows = bn_isa_current()->rows, .w = {n, k, (bn_dtype)kind, weight, NULL}, .x = x, .m = m,
        .y = y,
    };
    bn_parallel(dense_task, &job, worth(n * k, threads));
}

void bn_int8_linear(
    const int8_t *codes, const float *s_x, const int32_t *sum, int64_t m, int64_t k,
    const int8_t *weight, const float *scale, int64_t n, float *y, int32_t threads
) {
    dense_job job = {
        .rows = bn_isa_current()->rows, .w = {n, k, BN_I8, weight, scale},
        .tokens = {bn_padded(k), (int8_t *)codes, (float *)s_x, (int32_t *)sum, NULL}, .m = m,
        .y = y,
    };
    bn_parallel(dense_task, &job, worth(n * k / 4, threads));
}

typedef struct {
    const bn_rows *rows;
    const bn_layer_cache *cache;
    const float *x, *cos, *sin;
    const int64_t *lengths, *n_valid;
    int64_t b, t, h;
    float *y;
    char *scratch;
} cache_job;

/* Keys and values of row b and head g. */
static bn_cache head_of(const bn_layer_cache *cache, int64_t b, int64_t g) {
    static const int64_t bytes[] = {[BN_F32] = 4, [BN_BF16] = 2, [BN_F16] = 2, [BN_I8] = 1};
    int64_t at = (b * cache->g + g) * cache->columns;
    int64_t bytes_at = at * cache->e * bytes[cache->kind];
    bn_cache head = {
        (bn_dtype)cache->kind, cache->e, (char *)cache->k + bytes_at, (char *)cache->v + bytes_at,
        NULL, NULL,
    };
    if (cache->kind == BN_I8)
        head.k_scale = cache->k_scale + at, head.v_scale = cache->v_scale + at;
    return head;
}

static void rope_append_task(const bn_team *team, void *argument) {
    const cache_job *job = argument;
    const bn_layer_cache *cache = job->cache;
    int64_t i, end, e = cache->e, g = cache->g, h = job->h;
    for (bn_share(team, job->b * job->t, 1, &i, &end); i < end; i++) {
        int64_t row = i / job->t, step = i % job->t, length = job->lengths[row];
        /* A length may have any value: the clamp covers every int64. */
        int64_t column = length > INT64_MAX - step ? INT64_MAX : length + step;
        bool written = step < job->n_valid[row] && column >= 0 && column < cache->columns;
        column = column < 0 ? 0 : column < cache->columns ? column : cache->columns - 1;
        const float *cos = job->cos + column * e, *sin = job->sin + column * e;
        const float *from = job->x + i * (h + 2 * g) * e;
        for (int64_t j = 0; j < h; j++, from += e)
            job->rows->rotate(from, cos, sin, e, job->y + (i * h + j) * e);
        for (int64_t j = 0; written && j < g; j++, from += e) {
            float key[BN_HEAD];
            bn_cache head = head_of(cache, row, j);
            job->rows->rotate(from, cos, sin, e, key);
            job->rows->append(&head, column, key, from + g * e);
        }
    }
}

void bn_rope_append(
    const bn_layer_cache *cache, const float *qkv, const float *cos, const float *sin,
    const int64_t *lengths, const int64_t *n_valid, int64_t b, int64_t t, int64_t h, float *q,
    int32_t threads
) {
    cache_job job = {
        .rows = bn_isa_current()->rows, .cache = cache, .x = qkv, .cos = cos, .sin = sin,
        .lengths = lengths, .n_valid = n_valid, .b = b, .t = t, .h = h, .y = q,
    };
    bn_parallel(rope_append_task, &job, worth(b * t * (h + 2 * cache->g) * cache->e, threads));
}

size_t bn_attend_scratch(int64_t columns, int64_t count) {
    int64_t few = count < BN_ATTEND_FEW ? count : BN_ATTEND_FEW, many = 0;
    few = 2 * BN_ATTEND_FEW * BN_HEAD + few * ((columns + 15) / 16 * 16);
    if (count > BN_ATTEND_FEW) /* at most 32 of them side by side */
        many = 2 * 32 * BN_HEAD + BN_ATTEND_TILE * (BN_HEAD + 32);
    return (size_t)(few > many ? few : many) * 4;
}

/* A thread's share of rows, tokens and heads. It takes together the heads of a token that share
 * keys and values, or all tokens of a head. */
static void attention_task(const bn_team *team, void *argument) {
    const cache_job *job = argument;
    const bn_layer_cache *cache = job->cache;
    int64_t e = cache->e, g = cache->g, h = job->h, t = job->t, together = h / g, i, end;
    size_t bytes = bn_attend_scratch(cache->columns, INT64_MAX);
    char *scratch = job->scratch + (size_t)team->index * bytes;
    int64_t last[BN_TOKENS];
    bool one = t == 1;
    for (bn_share(team, job->b * (one ? g : h), 1, &i, &end); i < end; i++) {
        int64_t row = i / (one ? g : h), head = one ? i % g * together : i % h;
        int64_t length = job->lengths[row] < 0 ? 0 : job->lengths[row];
        bn_cache kv = head_of(cache, row, head / together);
        int64_t count = one ? together : t, stride = one ? e : h * e;
        for (int64_t from = 0; from < count; from += BN_TOKENS) {
            int64_t n = count - from < BN_TOKENS ? count - from : BN_TOKENS;
            for (int64_t j = 0; j < n; j++) {
                int64_t step = one ? 0 : from + j;
                last[j] = length < cache->columns - step ? length + step : cache->columns - 1;
            }
            int64_t at = (row * t * h + head) * e + from * stride;
            job->rows->attend(&kv, job->x + at, stride, last, n, job->y + at, stride, scratch);
        }
    }
}

int64_t bn_decode_attention_scratch(int64_t columns) {
    return (int64_t)bn_attend_scratch(columns, INT64_MAX);
}

void bn_decode_attention(
    const bn_layer_cache *cache, const float *q, const int64_t *lengths, int64_t b, int64_t t,
    int64_t h, float *y, void *scratch, int32_t threads
) {
    cache_job job = {
        .rows = bn_isa_current()->rows, .cache = cache, .x = q, .lengths = lengths, .b = b, .t = t,
        .h = h, .y = y, .scratch = scratch,
    };
    int64_t columns = 0; /* columns that are read */
    for (int64_t row = 0; row < b; row++) {
        int64_t length = lengths[row] < 0 ? 0 : lengths[row];
        columns += (length < cache->columns ? length : cache->columns) + t;
    }
    bn_parallel(attention_task, &job, worth(columns * h * cache->e * t, threads));
}
