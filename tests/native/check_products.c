/* Ternary products of both families, the bit planes of tokens, and the rescaling. */
#include "check.h"

/* Random tokens and a random ternary matrix, packed in either layout, and their exact products. */
typedef struct {
    int64_t m, n, k;
    int8_t *codes; /* [n, k], -1, 0, 1 */
    bn_ternary packed, planes;
    bn_tokens x;
    int32_t *acc; /* [m, n] */
} linear;

static linear new_linear(int64_t most_tokens, int64_t most_rows) {
    linear l = {size_up_to(most_tokens), size_up_to(most_rows), size_up_to(2100), NULL, {0}, {0},
                {0}, NULL};
    while (l.m * l.n * l.k > 3000000) l.n = (l.n + 1) / 2; /* in bounded time */
    int64_t stride = bn_padded(l.k), words = bn_plane_words(l.k), kind = below(5);
    l.codes = NEW(int8_t, l.n * l.k);
    uint8_t *packed = NEW(uint8_t, l.n * stride / 4);
    uint32_t *planes = NEW(uint32_t, l.n * 2 * words);
    memset(packed, 0x55, (size_t)(l.n * stride / 4)); /* code 0 is the digit 1 */
    memset(planes, 0, (size_t)(l.n * 2 * words) * sizeof *planes);
    for (int64_t n = 0; n < l.n; n++)
        for (int64_t k = 0; k < l.k; k++) {
            int code = kind == 0 ? 1 : kind == 1 ? -1 : (int)below(3) - 1;
            l.codes[n * l.k + k] = (int8_t)code;
            int64_t part = k / (stride / 4), column = k % (stride / 4);
            packed[n * (stride / 4) + column] ^= (uint8_t)(((code + 1) ^ 1) << (2 * part));
            uint32_t bit = (uint32_t)1 << (k % 32);
            if (code != 0) planes[n * 2 * words + k / 32] |= bit;
            if (code < 0) planes[(n * 2 + 1) * words + k / 32] |= bit;
        }
    int64_t per_row = below(2), biased = below(2);
    float *scale = NEW(float, per_row ? l.n : 1), *bias = biased ? NEW(float, l.n) : NULL;
    for (int64_t n = 0; n < (per_row ? l.n : 1); n++) scale[n] = fabsf(uniform());
    if (biased) fill(bias, l.n);
    l.packed = (bn_ternary){l.n, l.k, packed, NULL, scale, per_row, bias};
    l.planes = (bn_ternary){l.n, l.k, NULL, planes, scale, per_row, bias};

    l.x.stride = stride;
    l.x.codes = NEW(int8_t, l.m * stride);
    l.x.scale = NEW(float, l.m);
    l.x.sum = NEW(int32_t, l.m);
    l.x.bits = NEW(uint64_t, l.m * stride / 8);
    for (int64_t m = 0; m < l.m; m++) {
        int8_t *row = l.x.codes + m * stride;
        fill_codes(row, l.k);
        memset(row + l.k, 0, (size_t)(stride - l.k));
        l.x.scale[m] = below(20) ? fabsf(uniform()) : NAN;
        l.x.sum[m] = 0;
        for (int64_t k = 0; k < l.k; k++) l.x.sum[m] += row[k];
    }
    l.acc = NEW(int32_t, l.m * l.n);
    for (int64_t m = 0; m < l.m; m++)
        for (int64_t n = 0; n < l.n; n++) {
            int32_t sum = 0;
            for (int64_t k = 0; k < l.k; k++)
                sum += l.codes[n * l.k + k] * l.x.codes[m * stride + k];
            l.acc[m * l.n + n] = sum;
        }
    return l;
}

static int check_bits(const bn_products *table, const linear *l) {
    int64_t words = l->m * l->x.stride / 8;
    uint64_t *expected = NEW(uint64_t, words);
    memset(expected, 0, (size_t)words * sizeof *expected);
    for (int64_t i = 0; i < l->m * l->x.stride; i++)
        for (int b = 0; b < 8; b++)
            expected[i / 64 * 8 + b] |= (uint64_t)((uint8_t)l->x.codes[i] >> b & 1) << (i % 64);
    int64_t middle = below(l->m + 1); /* in two calls */
    table->bits(&l->x, 0, middle);
    table->bits(&l->x, middle, l->m);
    return differ_bytes("bits", l->x.bits, expected, (size_t)words * sizeof *expected);
}

/* A block [m0, m1) x [n0, n1) within a larger one; what is around it must stay. */
static int check_block(
    const char *what, bn_product *product, const bn_ternary *w, const linear *l
) {
    int64_t m0 = below(l->m), m1 = m0 + 1 + below(l->m - m0);
    int64_t n0 = below(l->n), n1 = n0 + 1 + below(l->n - n0);
    if (below(2)) m0 = n0 = 0, m1 = l->m, n1 = l->n;
    if (m1 - m0 > BN_TOKENS) m1 = m0 + BN_TOKENS;
    if (n1 - n0 > BN_ROWS) n1 = n0 + BN_ROWS;
    int64_t ld = n1 - n0 + below(3), count = (m1 - m0 - 1) * ld + n1 - n0;
    int32_t *got = NEW(int32_t, count), *expected = NEW(int32_t, count);
    for (int64_t m = m0; m < m1; m++)
        for (int64_t n = n0; n < n1; n++)
            expected[(m - m0) * ld + n - n0] = l->acc[m * l->n + n];
    product(w, &l->x, m0, m1, n0, n1, got, ld, memory(BN_PRODUCT_SCRATCH, 64));
    if (!differ_bytes(what, got, expected, (size_t)count * sizeof *got)) return 0;
    printf(
        "tokens %lld to %lld of %lld, rows %lld to %lld of %lld, %lld columns\n", (long long)m0,
        (long long)m1, (long long)l->m, (long long)n0, (long long)n1, (long long)l->n,
        (long long)l->k
    );
    return 1;
}

/* y of token m and row n, in the order of bitnet_kernels.reference.rescale. */
static float rescaled(const linear *l, int64_t m, int64_t n) {
    const bn_ternary *w = &l->packed;
    float y = (float)l->acc[m * l->n + n] * l->x.scale[m];
    y *= w->scale[n * w->scale_stride];
    return w->bias ? y + w->bias[n] : y;
}

static int check_rescale(const bn_products *table, const linear *l) {
    int64_t m0 = below(l->m), n0 = below(l->n), n1 = n0 + 1 + below(l->n - n0);
    if (n1 - n0 > BN_ROWS) n1 = n0 + BN_ROWS;
    int64_t ld = n1 - n0 + below(3), count = (l->m - m0 - 1) * ld + n1 - n0;
    bool add = below(2);
    float *got = NEW(float, count), *expected = NEW(float, count);
    int32_t *acc = NEW(int32_t, (l->m - m0 - 1) * BN_ROWS + n1 - n0);
    for (int64_t m = m0; m < l->m; m++)
        for (int64_t n = n0; n < n1; n++) {
            int64_t at = (m - m0) * ld + n - n0;
            float y = rescaled(l, m, n);
            acc[(m - m0) * BN_ROWS + n - n0] = l->acc[m * l->n + n];
            if (add) got[at] = uniform();
            expected[at] = add ? got[at] + y : y;
        }
    table->rescale(&l->packed, &l->x, m0, l->m, n0, n1, acc, BN_ROWS, add, got, ld);
    return differ("rescale", got, expected, count);
}

int check_products(const bn_products *table) {
    linear l = new_linear(below(2) ? 5 : 140, 80);
    return check_bits(table, &l) || check_block("dot of packed", table->dot, &l.packed, &l) ||
           check_block("dot of planes", table->dot, &l.planes, &l) ||
           check_block("addsub", table->addsub, &l.planes, &l) ||
           (table->addsub_packed &&
            check_block("addsub of packed", table->addsub, &l.packed, &l)) ||
           check_rescale(table, &l);
}

/* A whole layer, on one to five threads. */
typedef struct {
    const linear *l;
    const bn_ternary *w;
    bn_product *family;
    float *out;
    int64_t ld;
    bool add;
    char *scratch; /* [5, bn_linear_scratch(k)] */
} call;

static void share(const bn_team *team, void *argument) {
    call *c = argument;
    bn_linear_share(
        team, c->family, c->w, &c->l->x, c->l->m, c->out, c->ld, c->add,
        c->scratch + (size_t)team->index * bn_linear_scratch(c->l->k)
    );
}

int check_share(const bn_products *table) {
    linear l = new_linear(below(2) ? 5 : 300, 200);
    bool dot = below(2);
    const bn_ternary *w = (dot || table->addsub_packed) && below(2) ? &l.packed : &l.planes;
    int64_t ld = l.n + below(3), count = (l.m - 1) * ld + l.n;
    float *got = NEW(float, count), *expected = NEW(float, count);
    call c = {&l, w, dot ? table->dot : table->addsub, got, ld, below(2),
              memory(5 * bn_linear_scratch(l.k), 64)};
    for (int64_t m = 0; m < l.m; m++)
        for (int64_t n = 0; n < l.n; n++) {
            float y = rescaled(&l, m, n);
            if (c.add) got[m * ld + n] = uniform();
            expected[m * ld + n] = c.add ? got[m * ld + n] + y : y;
        }
    table->bits(&l.x, 0, l.m);
    bn_parallel(share, &c, (int32_t)(1 + below(5)));
    return differ(dot ? "layer, dot" : "layer, addsub", got, expected, count);
}
