/* fp32 numbers times ternary codes without a multiplication: a table of sums of three (AVX-512).
 *
 * Three numbers a, b, c have 27 sums with coefficients -1, 0 and 1. They fit two registers, from
 * which one instruction takes the sums of 16 columns by the columns' codes (vpermi2ps). So a
 * look-up and an addition do the work of three multiplications and three additions. Only additions
 * of fp32 numbers are left, in a different order from a matrix product's. That order does not
 * depend on the number of threads.
 *
 * A sum's index follows from s = c0 + 3 c1 + 9 c2 of its codes: it is s + 13 for s <= 0. The sum
 * for s > 0 is the negative of the sum for -s, at 16 + 13 - s.
 */
#include <string.h>

#include "internal.h"

#if defined(__x86_64__)
#include <immintrin.h>

enum {
    THREE = 3, /* rows of codes per look-up */
    TABLE = 16, /* floats: the sums of three numbers, without the negatives */
    TOKENS = 4, /* tokens at a time */
    LANES = 16,
    VECTORS = 4, /* of columns at a time */
    COLUMNS = VECTORS * LANES,
    NEAR = 32, /* look-ups whose tables stay in the L1 cache */
};

int32_t bn_has_lookup(void) { return bn_isa_current()->training == &bn_training_avx512; }

typedef struct {
    const float *dy, *gamma;
    const int8_t *codes;
    int64_t gamma_stride, m, n, k;
    float *dx;
    uint8_t *index; /* [blocks of columns, groups, COLUMNS] */
    char *own; /* `own_bytes` per thread */
    int64_t own_bytes;
} job;

static int64_t groups_of(int64_t n) { return (n + THREE - 1) / THREE; }
static int64_t blocks_of(int64_t k) { return (k + COLUMNS - 1) / COLUMNS; }
static int64_t index_bytes(int64_t n, int64_t k) { return groups_of(n) * blocks_of(k) * COLUMNS; }

/* A thread's scratch: gradients, tables, sums. */
static int64_t rows_bytes(int64_t n) {
    return (groups_of(n) * THREE * TOKENS * 4 + BN_CACHE_LINE - 1) / BN_CACHE_LINE * BN_CACHE_LINE;
}
static int64_t sums_bytes(int64_t k) { return blocks_of(k) * COLUMNS * TOKENS * 4; }
enum { TABLES_BYTES = NEAR * TOKENS * TABLE * 4 };

int64_t bn_lookup_scratch(int64_t n, int64_t k, int32_t threads) {
    return index_bytes(n, k) + threads * (rows_bytes(n) + TABLES_BYTES + sums_bytes(k));
}

BN_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl")

/* The indices of a group of rows. */
static void pack(const job *job, int64_t group) {
    int64_t row = group * THREE, rows = job->n - row < THREE ? job->n - row : THREE;
    const __m512i weight[THREE] = {_mm512_set1_epi8(1), _mm512_set1_epi8(3), _mm512_set1_epi8(9)};
    for (int64_t b = 0; b < blocks_of(job->k); b++) {
        int64_t column = b * COLUMNS, some = job->k - column;
        __mmask64 mask = some >= COLUMNS ? ~(__mmask64)0 : ((__mmask64)1 << some) - 1;
        __m512i s = _mm512_setzero_si512();
        for (int64_t r = 0; r < rows; r++) { /* adds the weight, or its negative */
            const int8_t *from = job->codes + (row + r) * job->k + column;
            __m512i code = _mm512_maskz_loadu_epi8(mask, from);
            __mmask64 above = _mm512_cmpgt_epi8_mask(code, _mm512_setzero_si512());
            s = _mm512_mask_add_epi8(s, above, s, weight[r]);
            s = _mm512_mask_sub_epi8(s, _mm512_movepi8_mask(code), s, weight[r]);
        }
        __mmask64 above = _mm512_cmpgt_epi8_mask(s, _mm512_setzero_si512());
        __m512i index = _mm512_add_epi8(s, _mm512_set1_epi8(13));
        index = _mm512_mask_sub_epi8(index, above, _mm512_set1_epi8(16 + 13), s);
        _mm512_storeu_si512(job->index + (b * groups_of(job->n) + group) * COLUMNS, index);
    }
}

/* The tables of `count` groups of numbers of one token; those of a group's tokens are adjacent. */
static void tabulate(const float *x, int64_t count, float *table) {
    const __m512 c0 = _mm512_setr_ps(-1, 0, 1, -1, 0, 1, -1, 0, 1, -1, 0, 1, -1, 0, 0, 0);
    const __m512 c1 = _mm512_setr_ps(-1, -1, -1, 0, 0, 0, 1, 1, 1, -1, -1, -1, 0, 0, 0, 0);
    const __m512 c2 = _mm512_setr_ps(-1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0);
    for (int64_t g = 0; g < count; g++, x += THREE, table += TOKENS * TABLE) {
        __m512 sum = _mm512_mul_ps(c0, _mm512_set1_ps(x[0]));
        sum = _mm512_fmadd_ps(c1, _mm512_set1_ps(x[1]), sum);
        sum = _mm512_fmadd_ps(c2, _mm512_set1_ps(x[2]), sum);
        _mm512_store_ps(table, sum);
    }
}

/* Adds the look-ups of `count` groups to the sums of a block of columns. */
static void add(const float *table, const uint8_t *index, int64_t count, float *sums) {
    __m512 sum[TOKENS][VECTORS], one = _mm512_set1_ps(1);
    const __m512 sign = _mm512_set1_ps(-0.0f);
    __asm__("" : "+v"(one)); /* else the compiler turns x * 1 + y into x + y */
    for (int t = 0; t < TOKENS; t++)
        for (int v = 0; v < VECTORS; v++)
            sum[t][v] = _mm512_load_ps(sums + t * COLUMNS + v * LANES);
    for (int64_t g = 0; g < count; g++, index += COLUMNS, table += TOKENS * TABLE) {
        __m512 low[TOKENS], high[TOKENS];
        for (int t = 0; t < TOKENS; t++) {
            low[t] = _mm512_load_ps(table + t * TABLE);
            high[t] = _mm512_xor_ps(low[t], sign);
        }
        for (int v = 0; v < VECTORS; v++) {
            const __m128i *from = (const __m128i *)(index + v * LANES);
            __m512i i = _mm512_cvtepu8_epi32(_mm_load_si128(from));
            for (int t = 0; t < TOKENS; t++) {
                __m512 term = _mm512_permutex2var_ps(low[t], i, high[t]);
                if (t % 2) /* both kinds of units add; the bits are the same */
                    sum[t][v] = _mm512_add_ps(sum[t][v], term);
                else
                    sum[t][v] = _mm512_fmadd_ps(term, one, sum[t][v]);
            }
        }
    }
    for (int t = 0; t < TOKENS; t++)
        for (int v = 0; v < VECTORS; v++)
            _mm512_store_ps(sums + t * COLUMNS + v * LANES, sum[t][v]);
}

static void share(const bn_team *team, void *argument) {
    const job *job = argument;
    int64_t m = job->m, n = job->n, k = job->k, groups = groups_of(n), begin, end;
    char *own = job->own + team->index * job->own_bytes;
    float *rows = (float *)own, *tables = (float *)(own + rows_bytes(n));
    float *sums = tables + TABLES_BYTES / 4;
    bn_share(team, groups, 1, &begin, &end);
    for (; begin < end; begin++) pack(job, begin);
    bn_wait(team);
    bn_share(team, m, TOKENS, &begin, &end);
    memset(rows, 0, (size_t)rows_bytes(n)); /* so what follows the last column is 0 */
    for (int64_t i = begin; i < end; i += TOKENS) {
        int64_t tokens = end - i < TOKENS ? end - i : TOKENS;
        for (int64_t t = 0; t < tokens; t++) {
            const float *from = job->dy + (i + t) * n;
            float *to = rows + t * groups * THREE, one = *job->gamma;
            if (job->gamma_stride)
                for (int64_t j = 0; j < n; j++) to[j] = from[j] * job->gamma[j];
            else
                for (int64_t j = 0; j < n; j++) to[j] = from[j] * one;
        }
        memset(sums, 0, (size_t)sums_bytes(k));
        for (int64_t g = 0; g < groups; g += NEAR) {
            int64_t near = groups - g < NEAR ? groups - g : NEAR;
            for (int64_t t = 0; t < TOKENS; t++)
                tabulate(rows + (t * groups + g) * THREE, near, tables + t * TABLE);
            for (int64_t b = 0; b < blocks_of(k); b++) {
                const uint8_t *index = job->index + (b * groups + g) * COLUMNS;
                add(tables, index, near, sums + b * COLUMNS * TOKENS);
            }
        }
        for (int64_t b = 0; b < blocks_of(k); b++) {
            int64_t some = k - b * COLUMNS < COLUMNS ? k - b * COLUMNS : COLUMNS;
            for (int64_t t = 0; t < tokens; t++)
                memcpy(
                    job->dx + (i + t) * k + b * COLUMNS, sums + (b * TOKENS + t) * COLUMNS,
                    (size_t)some * 4
                );
        }
    }
}

BN_TARGET_END

void bn_lookup_gradient(
    const float *dy, const int8_t *codes, const float *gamma, int64_t gamma_stride, int64_t m,
    int64_t n, int64_t k, float *dx, void *scratch, int32_t threads
) {
    job job = {.dy = dy, .codes = codes, .gamma = gamma, .gamma_stride = gamma_stride};
    job.m = m, job.n = n, job.k = k, job.dx = dx;
    job.index = scratch;
    job.own = (char *)scratch + index_bytes(n, k);
    job.own_bytes = rows_bytes(n) + TABLES_BYTES + sums_bytes(k);
    bn_parallel(share, &job, threads);
}

#else

int32_t bn_has_lookup(void) { return 0; }
int64_t bn_lookup_scratch(int64_t n, int64_t k, int32_t threads) {
    (void)n, (void)k, (void)threads;
    return 0;
}
void bn_lookup_gradient(
    const float *dy, const int8_t *codes, const float *gamma, int64_t gamma_stride, int64_t m,
    int64_t n, int64_t k, float *dx, void *scratch, int32_t threads
) {
    (void)dy, (void)codes, (void)gamma, (void)gamma_stride, (void)m, (void)n, (void)k;
    (void)dx, (void)scratch, (void)threads;
}

#endif
