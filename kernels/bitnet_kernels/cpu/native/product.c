/* A ternary linear layer on the threads of a team, and the operators of Python. */
#include <string.h>

#include "internal.h"

/* The rows and tokens of one thread. Rows are divided among the threads, so that each weight is
 * read and decoded once; if there are too few rows, tokens are divided as well. */
typedef struct {
    int64_t n0, n1, m0, m1;
} share;

static share divide(const bn_team *team, int64_t n, int64_t m) {
    int64_t step = m > 4 ? 16 : 8, units = (n + step - 1) / step, size = team->size;
    int64_t across = m; /* threads on the same rows */
    if (across > size / (units < size ? units : size)) across = size / (units < size ? units : size);
    if (across < 1) across = 1;
    int64_t down = size / across; /* the others have nothing to do */
    share s = {0, 0, 0, 0};
    if (team->index >= down * across) return s;
    bn_share(&(bn_team){(int32_t)(team->index % down), (int32_t)down, NULL}, n, step, &s.n0, &s.n1);
    bn_share(
        &(bn_team){(int32_t)(team->index / down), (int32_t)across, NULL}, m, 1, &s.m0, &s.m1
    );
    return s;
}

/* Calls the product for every block of the share, then rescales into out. If out is NULL, the
 * products themselves are the output. */
static void run_share(
    const bn_team *team, bn_product *family, const bn_ternary *w, const bn_tokens *x, int64_t m,
    float *out, int32_t *products, int64_t ld, bool add, char *scratch
) {
    const bn_products *isa = bn_isa_current()->products;
    int32_t *block = (int32_t *)scratch;
    scratch += sizeof(int32_t) * BN_TOKENS * BN_ROWS;
    share s = divide(team, w->n, m);
    for (int64_t m0 = s.m0; m0 < s.m1; m0 += BN_TOKENS) {
        int64_t m1 = m0 + BN_TOKENS < s.m1 ? m0 + BN_TOKENS : s.m1;
        for (int64_t n0 = s.n0; n0 < s.n1; n0 += BN_ROWS) {
            int64_t n1 = n0 + BN_ROWS < s.n1 ? n0 + BN_ROWS : s.n1, at = m0 * ld + n0;
            if (out == NULL) {
                family(w, x, m0, m1, n0, n1, products + at, ld, scratch);
                continue;
            }
            family(w, x, m0, m1, n0, n1, block, BN_ROWS, scratch);
            isa->rescale(w, x, m0, m1, n0, n1, block, BN_ROWS, add, out + at, ld);
        }
    }
}

void bn_linear_share(
    const bn_team *team, bn_product *family, const bn_ternary *w, const bn_tokens *x, int64_t m,
    float *out, int64_t ld, bool add, void *scratch
) {
    run_share(team, family, w, x, m, out, NULL, ld, add, scratch);
}

size_t bn_linear_scratch(int64_t k) {
    (void)k;
    return sizeof(int32_t) * BN_TOKENS * BN_ROWS + BN_PRODUCT_SCRATCH;
}

/* Operators */

/* The operands of an operator, for all threads. `x` or `codes` holds the tokens. */
typedef struct {
    bool addsub;
    bn_ternary w;
    bn_tokens tokens;
    const float *x; /* [m, k], to be quantized; or NULL */
    const int8_t *codes; /* [m, k] */
    int64_t m;
    float *out; /* [m, n], or NULL: `products` are the output */
    int32_t *products;
    char *scratch; /* bn_linear_scratch per thread */
} operator;

static int64_t align(int64_t bytes) {
    return (bytes + BN_CACHE_LINE - 1) / BN_CACHE_LINE * BN_CACHE_LINE;
}

int64_t bn_ternary_workspace(int32_t threads, int64_t m, int64_t k) {
    int64_t tokens = align(m * 4) * 2 + 2 * m * bn_padded(k);
    return BN_CACHE_LINE + tokens + threads * (int64_t)bn_linear_scratch(k);
}

/* Lay out the workspace, which has bn_ternary_workspace bytes. */
static void lay_out(operator *o, void *workspace) {
    int64_t bytes = o->m * bn_padded(o->w.k);
    char *at = (char *)align((int64_t)(intptr_t)workspace);
    o->tokens = (bn_tokens){.stride = bn_padded(o->w.k), .codes = (int8_t *)at};
    o->tokens.bits = (uint64_t *)(at += bytes);
    o->tokens.scale = (float *)(at += bytes);
    o->tokens.sum = (int32_t *)(at += align(4 * o->m));
    o->scratch = at + align(4 * o->m);
}

/* Prepares token t for the kernels: padded, with its sum. */
static void take_token(const operator *o, int64_t t) {
    int64_t k = o->w.k, stride = o->tokens.stride;
    int8_t *codes = o->tokens.codes + t * stride;
    if (o->x) {
        bn_isa_current()->rows->quant(
            o->x + t * k, k, codes, stride, &o->tokens.scale[t], &o->tokens.sum[t]
        );
        return;
    }
    memcpy(codes, o->codes + t * k, (size_t)k);
    memset(codes + k, 0, (size_t)(stride - k));
    int32_t sum = 0;
    for (int64_t i = 0; i < stride; i++) sum += codes[i];
    o->tokens.sum[t] = sum;
}

static void run_operator(const bn_team *team, void *argument) {
    operator *o = argument;
    const bn_products *isa = bn_isa_current()->products;
    int64_t begin, end;
    bn_share(team, o->m, 1, &begin, &end);
    for (int64_t t = begin; t < end; t++) take_token(o, t);
    if (o->addsub && !o->w.packed) isa->bits(&o->tokens, begin, end);
    bn_wait(team);
    run_share(
        team, o->addsub ? isa->addsub : isa->dot, &o->w, &o->tokens, o->m, o->out, o->products,
        o->w.n, false, o->scratch + team->index * (int64_t)bn_linear_scratch(o->w.k)
    );
}

void bn_ternary_matmul(
    int32_t threads, int32_t addsub, int64_t m, int64_t n, int64_t k, const int8_t *x,
    const uint8_t *packed, const void *planes, int32_t *acc, void *workspace
) {
    operator o = {.addsub = addsub != 0, .m = m, .codes = x, .products = acc};
    o.w = (bn_ternary){.n = n, .k = k, .packed = packed, .planes = planes};
    lay_out(&o, workspace);
    bn_parallel(run_operator, &o, threads);
}

void bn_quantized_linear(
    int32_t threads, int32_t addsub, int64_t m, int64_t n, int64_t k, const int8_t *x,
    const float *s_x, const uint8_t *packed, const void *planes, const float *scale,
    int64_t scale_stride, const float *bias, float *out, void *workspace
) {
    operator o = {.addsub = addsub != 0, .m = m, .codes = x, .out = out};
    o.w = (bn_ternary){n, k, packed, planes, scale, scale_stride, bias};
    lay_out(&o, workspace);
    memcpy(o.tokens.scale, s_x, (size_t)m * sizeof *s_x);
    bn_parallel(run_operator, &o, threads);
}

void bn_ternary_linear(
    int32_t threads, int32_t addsub, int64_t m, int64_t n, int64_t k, const float *x,
    const uint8_t *packed, const void *planes, const float *scale, int64_t scale_stride,
    const float *bias, float *out, void *workspace
) {
    operator o = {.addsub = addsub != 0, .m = m, .x = x, .out = out};
    o.w = (bn_ternary){n, k, packed, planes, scale, scale_stride, bias};
    lay_out(&o, workspace);
    bn_parallel(run_operator, &o, threads);
}

/* Changes of layout */

typedef struct {
    const int8_t *codes;
    uint8_t *packed;
    int64_t n, k;
} to_pack;

static void pack_rows(const bn_team *team, void *argument) {
    const to_pack *p = argument;
    int64_t k = p->k, bytes = bn_padded(k) / 4, whole = k - 3 * bytes, begin, end;
    bn_share(team, p->n, 1, &begin, &end);
    for (int64_t n = begin; n < end; n++) {
        const int8_t *at = p->codes + n * k;
        uint8_t *to = p->packed + n * bytes;
        for (int64_t i = 0; i < whole; i++) /* bytes whose four columns are all inside the row */
            to[i] = (uint8_t)(
                (at[i] + 1) | (at[i + bytes] + 1) << 2 | (at[i + 2 * bytes] + 1) << 4 |
                (at[i + 3 * bytes] + 1) << 6
            );
        for (int64_t i = whole < 0 ? 0 : whole; i < bytes; i++) {
            int byte = 0;
            for (int64_t j = 0; j < 4; j++) {
                int64_t column = i + j * bytes;
                byte |= (column < k ? at[column] + 1 : 1) << 2 * j;
            }
            to[i] = (uint8_t)byte;
        }
    }
}

void bn_pack(int32_t threads, const int8_t *codes, int64_t n, int64_t k, uint8_t *packed) {
    bn_parallel(pack_rows, &(to_pack){codes, packed, n, k}, threads);
}

typedef struct {
    const uint8_t *packed;
    uint8_t *planes;
    int64_t n, bytes;
} relaid;

/* The lowest bit of each byte, side by side. */
static uint8_t low_bits(uint64_t v) {
    v &= 0x0101010101010101;
    v |= v >> 7;
    v |= v >> 14;
    return (uint8_t)(v | (v >> 28));
}

static void lay_out_planes(const bn_team *team, void *argument) {
    const relaid *r = argument;
    int64_t plane = (r->bytes + 31) / 32 * 16, begin, end;
    bn_share(team, r->n, 1, &begin, &end);
    for (int64_t n = begin; n < end; n++) {
        uint8_t *nonzero = r->planes + 2 * n * plane, *negative = nonzero + plane;
        memset(nonzero, 0, (size_t)(2 * plane));
        for (int64_t i = 0; i < r->bytes; i += 8) {
            uint64_t v;
            memcpy(&v, r->packed + n * r->bytes + i, 8);
            for (int64_t j = 0; j < 4; j++, v >>= 2) {
                int64_t at = (j * r->bytes + i) / 8; /* codes 0, 1, 2 are -1, 0, 1 */
                nonzero[at] = low_bits(~v);
                negative[at] = low_bits(~(v | (v >> 1)));
            }
        }
    }
}

void bn_bit_planes(
    int32_t threads, const uint8_t *packed, int64_t n, int64_t bytes, void *planes
) {
    bn_parallel(lay_out_planes, &(relaid){packed, planes, n, bytes}, threads);
}
