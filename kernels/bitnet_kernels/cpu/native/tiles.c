/* fp32 numbers times small integers on the matrix tiles of Intel's AMX (Sapphire Rapids and
 * later).
 *
 * The tiles multiply bf16 and add in fp32, some fifteen times as fast as AVX-512 multiplies fp32.
 * A bf16 number has 8 significant bits: enough for a ternary code or an int8 one, and three of
 * them hold the 24 bits of an fp32 number. So a product with integers is three products of tiles,
 * in which every single product is exact, and sums round as in fp32. That is what the backward of
 * a ternary layer needs (products of two fp32 numbers would take six).
 *
 * The left matrix, fp32, is cut into terms a block of ROWS rows and DEPTH columns at a time, which
 * stays in the second cache; the right one, int8, is widened once. The sums over DEPTH columns
 * follow each other, so results do not depend on the number of threads.
 */
#define _DEFAULT_SOURCE /* syscall() */
#include <stdatomic.h>

#include "internal.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    SIDE = 16, /* rows of a tile */
    TILE = 1024, /* its bytes: SIDE rows of 32 bf16 or 16 fp32 */
    STEP = 32, /* columns of the left matrix in one tile */
    ROWS = 32, COLUMNS = 32, /* of a block of results: 2 x 2 tiles */
    TERMS = 3, /* bf16 numbers in an fp32 one */
    DEPTH = 512, /* a multiple of STEP */
    WIDTH = 1024, /* columns of results for which one thread cuts a block */
    LEFT = DEPTH / STEP * TERMS * 2 * TILE, /* bytes of a block of the left matrix */
};

/* Asks for the tiles, which Linux grants to a process that wants them. */
static bool granted(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if (!(d >> 22 & 1) || !(d >> 24 & 1)) return false; /* AMX-BF16, AMX-TILE */
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
}

int32_t bn_has_tiles(void) {
    static _Atomic int32_t known; /* 0: not asked yet; 1: no; 2: yes */
    if (!known) known = granted() ? 2 : 1;
    return known == 2 && bn_isa_current()->training == &bn_training_avx512;
}

BN_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16")

/* Eight tiles of SIDE rows of 64 bytes. */
static void configure(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = SIDE;
    _tile_loadconfig(&config);
}

/* The first `count` of 16. */
static inline __mmask16 first(int64_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

/* Cuts each number into three that have 8 significant bits, and add up to it: upper halves of
 * fp32. */
static inline void cut(__m512 x, __m512i term[TERMS]) {
    for (int t = 0; t < TERMS; t++) {
        term[t] = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32((int)0xffff0000));
        x = _mm512_sub_ps(x, _mm512_castsi512_ps(term[t]));
    }
}

/* Pairs of bf16: the upper halves of `even` below those of `odd`, which has nothing else. */
static inline __m512i pairs(__m512i even, __m512i odd) {
    return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd);
}

/* Transposes 16 rows of 16 words of 32 bits. */
static inline void transpose(__m512i row[SIDE]) {
    __m512i other[SIDE];
    for (int i = 0; i < 16; i += 2) {
        other[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        other[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            row[i + 2 * j] = _mm512_unpacklo_epi64(other[i + j], other[i + 2 + j]);
            row[i + 2 * j + 1] = _mm512_unpackhi_epi64(other[i + j], other[i + 2 + j]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            other[i + j] = _mm512_shuffle_i32x4(row[i + j], row[i + 4 + j], 0x88);
            other[i + 4 + j] = _mm512_shuffle_i32x4(row[i + j], row[i + 4 + j], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        row[i] = _mm512_shuffle_i32x4(other[i], other[8 + i], 0x88);
        row[8 + i] = _mm512_shuffle_i32x4(other[i], other[8 + i], 0xdd);
    }
}

typedef struct {
    const float *left; /* [rows, depth], or [depth, rows] where it is `transposed` */
    bool transposed;
    const float *scale; /* of each of the depth; NULL: `one` for all */
    float one;
    const int8_t *right; /* [depth, columns] */
    float *out; /* [rows, columns] */
    int64_t rows, depth, columns;
    uint8_t *packed; /* the right matrix: per COLUMNS columns and STEP of the depth, two tiles */
    uint8_t *blocks; /* LEFT bytes per thread */
    int64_t width; /* columns of an item of work, a multiple of COLUMNS */
} job;

static inline float scale_of(const job *job, int64_t depth) {
    return job->scale == NULL ? job->one : job->scale[depth];
}

static int64_t steps_of(int64_t depth) { return (depth + STEP - 1) / STEP; }

/* Sixteen int8 as the upper halves of fp32: small integers are exact there. */
static inline __m512i widened(const int8_t *x, __mmask16 mask) {
    __m512i wide = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, x));
    return _mm512_castps_si512(_mm512_cvtepi32_ps(wide));
}

/* COLUMNS columns of the right matrix, number j, as tiles of pairs of rows. */
static void pack_right(const job *job, int64_t j) {
    uint8_t *to = job->packed + j * steps_of(job->depth) * 2 * TILE;
    for (int64_t depth = 0; depth < job->depth; depth += STEP)
        for (int half = 0; half < 2; half++, to += TILE) {
            int64_t column = j * COLUMNS + half * SIDE;
            __mmask16 mask = first(job->columns - column);
            const int8_t *from = job->right + depth * job->columns + column;
            for (int i = 0; i < SIDE; i++, from += 2 * job->columns) {
                int64_t left = job->depth - depth - 2 * i; /* of the depth */
                __m512i even = _mm512_setzero_si512(), odd = even;
                if (left > 0) even = widened(from, mask);
                if (left > 1) odd = widened(from + job->columns, mask);
                _mm512_storeu_si512(to + 64 * i, pairs(even, odd));
            }
        }
}

/* A block of the left matrix: `steps` steps from `depth` on, of ROWS rows, number i. */
static void pack_left(const job *job, int64_t i, int64_t depth, int64_t steps, uint8_t *to) {
    const __m512i halves = _mm512_set_epi16(
        63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21, 19,
        17, 15, 13, 11, 9, 7, 5, 3, 1
    );
    for (int64_t r = 0; r < ROWS; r++) {
        int64_t row = i * ROWS + r;
        for (int64_t s = 0; s < steps; s++) {
            __m512i term[2][TERMS];
            for (int half = 0; half < 2; half++) {
                int64_t column = depth + s * STEP + half * 16;
                __mmask16 mask = row < job->rows ? first(job->depth - column) : 0;
                const float *from = job->left + row * job->depth + column;
                __m512 x = _mm512_maskz_loadu_ps(mask, from), scale = _mm512_set1_ps(job->one);
                if (job->scale != NULL) scale = _mm512_maskz_loadu_ps(mask, job->scale + column);
                cut(_mm512_mul_ps(x, scale), term[half]);
            }
            for (int t = 0; t < TERMS; t++)
                _mm512_storeu_si512(
                    to + ((s * TERMS + t) * 2 + r / SIDE) * TILE + r % SIDE * 64,
                    _mm512_permutex2var_epi16(term[0][t], halves, term[1][t])
                );
        }
    }
}

/* The same where the left matrix is stored transposed. */
static void pack_left_transposed(
    const job *job, int64_t i, int64_t depth, int64_t steps, uint8_t *to
) {
    for (int64_t s = 0; s < steps; s++)
        for (int half = 0; half < 2; half++) {
            __m512i row[TERMS][SIDE];
            int64_t column = i * ROWS + half * SIDE;
            __mmask16 mask = first(job->rows - column);
            for (int p = 0; p < SIDE; p++) {
                __m512i term[2][TERMS];
                for (int odd = 0; odd < 2; odd++) {
                    int64_t d = depth + s * STEP + 2 * p + odd;
                    __m512 x = _mm512_setzero_ps();
                    if (d < job->depth) {
                        const float *from = job->left + d * job->rows + column;
                        _mm_prefetch(from + STEP * job->rows, _MM_HINT_T0);
                        x = _mm512_maskz_loadu_ps(mask, from);
                        x = _mm512_mul_ps(x, _mm512_set1_ps(scale_of(job, d)));
                    }
                    cut(x, term[odd]);
                }
                for (int t = 0; t < TERMS; t++) row[t][p] = pairs(term[0][t], term[1][t]);
            }
            for (int t = 0; t < TERMS; t++) {
                transpose(row[t]);
                for (int r = 0; r < SIDE; r++)
                    _mm512_storeu_si512(
                        to + ((s * TERMS + t) * 2 + half) * TILE + r * 64, row[t][r]
                    );
            }
        }
}

/* ROWS x COLUMNS sums [., ld], added to what is there unless they are new. */
static void multiply(
    const uint8_t *left, const uint8_t *right, int64_t steps, float *sums, int64_t ld, bool fresh
) {
    size_t bytes = (size_t)ld * sizeof *sums;
    float *below = sums + SIDE * ld;
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, bytes);
        _tile_loadd(1, sums + SIDE, bytes);
        _tile_loadd(2, below, bytes);
        _tile_loadd(3, below + SIDE, bytes);
    }
    for (int64_t s = 0; s < steps; s++, right += 2 * TILE) {
        _tile_loadd(6, right, 64);
        _tile_loadd(7, right + TILE, 64);
        for (int t = 0; t < TERMS; t++, left += 2 * TILE) {
            _tile_loadd(4, left, 64);
            _tile_loadd(5, left + TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, bytes);
    _tile_stored(1, sums + SIDE, bytes);
    _tile_stored(2, below, bytes);
    _tile_stored(3, below + SIDE, bytes);
}

/* A block of the left matrix times the columns from `column` to `end`. */
static void multiply_columns(
    const job *job, const uint8_t *left, int64_t i, int64_t column, int64_t end, int64_t depth,
    int64_t steps
) {
    int64_t all = steps_of(job->depth), rows = job->rows - i * ROWS;
    for (; column < end; column += COLUMNS) {
        const uint8_t *right = job->packed + (column / COLUMNS * all + depth / STEP) * 2 * TILE;
        float *out = job->out + i * ROWS * job->columns + column;
        int64_t columns = job->columns - column;
        if (rows >= ROWS && columns >= COLUMNS) {
            multiply(left, right, steps, out, job->columns, depth == 0);
            continue;
        }
        float sums[ROWS * COLUMNS]; /* a block that stands out at the edge */
        if (rows > ROWS) rows = ROWS;
        if (columns > COLUMNS) columns = COLUMNS;
        size_t bytes = (size_t)columns * sizeof *sums;
        memset(sums, 0, sizeof sums);
        if (depth > 0)
            for (int64_t r = 0; r < rows; r++)
                memcpy(sums + r * COLUMNS, out + r * job->columns, bytes);
        multiply(left, right, steps, sums, COLUMNS, false);
        for (int64_t r = 0; r < rows; r++)
            memcpy(out + r * job->columns, sums + r * COLUMNS, bytes);
    }
}

static void share(const bn_team *team, void *argument) {
    const job *job = argument;
    int64_t blocks = (job->rows + ROWS - 1) / ROWS, begin, end;
    bn_share(team, (job->columns + COLUMNS - 1) / COLUMNS, 1, &begin, &end);
    for (int64_t j = begin; j < end; j++) pack_right(job, j);
    bn_wait(team);
    bn_share(team, blocks * ((job->columns + job->width - 1) / job->width), 1, &begin, &end);
    uint8_t *left = job->blocks + (int64_t)team->index * LEFT;
    configure();
    for (int64_t depth = 0; depth < job->depth; depth += DEPTH) {
        int64_t steps = steps_of(job->depth - depth < DEPTH ? job->depth - depth : DEPTH);
        for (int64_t item = begin; item < end; item++) {
            int64_t i = item % blocks, column = item / blocks * job->width;
            int64_t past = job->columns - column < job->width ? job->columns : column + job->width;
            (job->transposed ? pack_left_transposed : pack_left)(job, i, depth, steps, left);
            multiply_columns(job, left, i, column, past, depth, steps);
        }
    }
    _tile_release();
}

BN_TARGET_END

int64_t bn_tiles_scratch(int64_t depth, int64_t columns, int32_t threads) {
    int64_t panels = (columns + COLUMNS - 1) / COLUMNS;
    return panels * steps_of(depth) * 2 * TILE + (int64_t)threads * LEFT;
}

static void run(job *job, void *scratch, int32_t threads) {
    int64_t blocks = (job->rows + ROWS - 1) / ROWS;
    int64_t panels = (job->columns + COLUMNS - 1) / COLUMNS;
    int64_t groups = (threads + blocks - 1) / blocks; /* of columns, so that all have work */
    job->width = (panels + groups - 1) / groups * COLUMNS;
    if (job->width > WIDTH) job->width = WIDTH;
    job->blocks = scratch;
    job->packed = job->blocks + (int64_t)threads * LEFT;
    bn_parallel(share, job, threads);
}

void bn_input_gradient(
    const float *dy, const int8_t *codes, const float *gamma, int64_t gamma_stride, int64_t m,
    int64_t n, int64_t k, float *dx, void *scratch, int32_t threads
) {
    job job = {.left = dy, .right = codes, .out = dx, .rows = m, .depth = n, .columns = k};
    job.one = *gamma, job.scale = gamma_stride ? gamma : NULL;
    run(&job, scratch, threads);
}

void bn_weight_gradient(
    const float *dy, const int8_t *x_q, const float *s_x, int64_t m, int64_t n, int64_t k, float *dw,
    void *scratch, int32_t threads
) {
    job job = {.left = dy, .right = x_q, .out = dw, .rows = n, .depth = m, .columns = k};
    job.transposed = true, job.scale = s_x;
    run(&job, scratch, threads);
}

#else

int32_t bn_has_tiles(void) { return 0; }

int64_t bn_tiles_scratch(int64_t depth, int64_t columns, int32_t threads) {
    (void)depth, (void)columns, (void)threads;
    return 0;
}

void bn_input_gradient(
    const float *dy, const int8_t *codes, const float *gamma, int64_t gamma_stride, int64_t m,
    int64_t n, int64_t k, float *dx, void *scratch, int32_t threads
) {
    (void)dy, (void)codes, (void)gamma, (void)gamma_stride, (void)m, (void)n, (void)k, (void)dx;
    (void)scratch, (void)threads;
}

void bn_weight_gradient(
    const float *dy, const int8_t *x_q, const float *s_x, int64_t m, int64_t n, int64_t k, float *dw,
    void *scratch, int32_t threads
) {
    (void)dy, (void)x_q, (void)s_x, (void)m, (void)n, (void)k, (void)dw, (void)scratch;
    (void)threads;
}
#endif
