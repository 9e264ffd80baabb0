/* fp32 numbers times small integers on the matrix tiles of Intel's AMX (Sapphire Rapids and later).
 *
 * The tiles multiply bf16 and add in fp32, some fifteen times as fast as AVX-512 multiplies fp32. A
 * bf16 number has 8 significant bits, enough for a ternary or an int8 code. Three bf16 numbers, the
 * terms, hold the 24 bits of an fp32 number. So a product with integers is three products of tiles,
 * in which every single product is exact, and sums round as in fp32. That is what the backward of a
 * ternary layer needs. (A product of two fp32 matrices would take six. Measured, that is no faster
 * than MKL's once the tiles' unit is shared with a busy neighbor.)
 *
 * Matrices are packed a piece at a time. A piece of the right matrix, DEPTH rows of at most WIDTH
 * columns, is packed once for all threads. Each thread cuts ROWS rows of the left matrix into
 * terms, which stay in its L2 cache. The sums over DEPTH are added in order, so results do not
 * depend on the number of threads.
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
    TERMS = 3, /* bf16 numbers per fp32 number */
    DEPTH = 512, /* a multiple of STEP */
    WIDTH = 512, /* a multiple of COLUMNS */
    NEAR = 4, /* steps of the left matrix that the L1 cache holds */
    LEFT = DEPTH / STEP * TERMS * 2 * TILE, /* bytes of a piece of the left matrix */
    RIGHT = DEPTH / STEP * WIDTH / COLUMNS * 2 * TILE, /* bytes of a piece of the right one */
    SUMS = WIDTH / COLUMNS * 4 * TILE, /* bytes of the sums of a left and a right piece */
};

/* Asks Linux for the tiles, which it grants to a process only on request. */
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

/* Cuts each number into three that have 8 significant bits and add up to it. They are the upper
 * halves of fp32 numbers. */
static inline void cut(__m512 x, __m512i term[TERMS]) {
    for (int t = 0; t < TERMS; t++) {
        term[t] = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32((int)0xffff0000));
        x = _mm512_sub_ps(x, _mm512_castsi512_ps(term[t]));
    }
}

/* Pairs of bf16: the upper halves of `even` below those of `odd`, whose lower halves are 0. */
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
    const float *left; /* [rows, depth], or [depth, rows] if `left_transposed` */
    const float *scale; /* [depth], multiplied by the left matrix; NULL: `one` */
    float one;
    const int8_t *right; /* [depth, columns] */
    float *out; /* [rows, columns] */
    int64_t rows, depth, columns;
    bool left_transposed;
    uint8_t *pieces; /* LEFT + SUMS bytes per thread */
    uint8_t *packed; /* a piece of the right matrix: per COLUMNS and STEP two tiles */
} job;

static inline float scale_of(const job *job, int64_t depth) {
    return job->scale == NULL ? job->one : job->scale[depth];
}

/* Sixteen int8 as the upper halves of fp32: small integers are exact there. */
static inline __m512i widened(const int8_t *x, __mmask16 mask) {
    __m512i wide = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, x));
    return _mm512_castps_si512(_mm512_cvtepi32_ps(wide));
}

/* COLUMNS columns of int8 from `column` on, `steps` steps of the depth, as tiles of pairs of rows. */
static void pack_right(const job *job, int64_t depth, int64_t steps, int64_t column, uint8_t *to) {
    for (int64_t s = 0; s < steps; s++)
        for (int half = 0; half < 2; half++, to += TILE) {
            __mmask16 mask = first(job->columns - column - half * SIDE);
            for (int i = 0; i < SIDE; i++) {
                int64_t row = depth + s * STEP + 2 * i;
                const int8_t *from = job->right + row * job->columns + column + half * SIDE;
                __m512i even = _mm512_setzero_si512(), odd = even;
                if (row < job->depth) even = widened(from, mask);
                if (row + 1 < job->depth) odd = widened(from + job->columns, mask);
                _mm512_storeu_si512(to + 64 * i, pairs(even, odd));
            }
        }
}

/* The upper halves of 32 fp32 numbers in two vectors. */
static inline __m512i upper_halves(__m512i low, __m512i high) {
    const __m512i odd = _mm512_set_epi16(
        63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21, 19,
        17, 15, 13, 11, 9, 7, 5, 3, 1
    );
    return _mm512_permutex2var_epi16(low, odd, high);
}

/* STEP numbers from `from` on, of which `count` exist, times their scales, cut into terms. */
static inline void cut_step(
    const float *from, const float *scale, float one, int64_t count, __m512i term[TERMS]
) {
    __m512i part[2][TERMS];
    for (int half = 0; half < 2; half++) {
        __mmask16 mask = first(count - half * 16);
        __m512 x = _mm512_maskz_loadu_ps(mask, from + half * 16), by = _mm512_set1_ps(one);
        if (scale != NULL) by = _mm512_maskz_loadu_ps(mask, scale + half * 16);
        cut(_mm512_mul_ps(x, by), part[half]);
    }
    for (int t = 0; t < TERMS; t++) term[t] = upper_halves(part[0][t], part[1][t]);
}

/* A piece of the left matrix: `steps` steps from `depth` on, of ROWS rows, number i. */
static void pack_left(const job *job, int64_t i, int64_t depth, int64_t steps, uint8_t *to) {
    for (int64_t r = 0; r < ROWS; r++) {
        int64_t row = i * ROWS + r;
        for (int64_t s = 0; s < steps; s++) {
            __m512i term[TERMS];
            int64_t start = depth + s * STEP, count = row < job->rows ? job->depth - start : 0;
            const float *scale = job->scale == NULL ? NULL : job->scale + start;
            cut_step(job->left + row * job->depth + start, scale, job->one, count, term);
            for (int t = 0; t < TERMS; t++)
                _mm512_storeu_si512(
                    to + ((s * TERMS + t) * 2 + r / SIDE) * TILE + r % SIDE * 64, term[t]
                );
        }
    }
}

/* The same for a left matrix that is stored transposed. */
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

/* Adds `steps` steps to 2 x 2 tiles of sums. */
static void multiply(const uint8_t *left, const uint8_t *right, int64_t steps, uint8_t *sums) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + TILE, 64);
    _tile_loadd(2, sums + 2 * TILE, 64);
    _tile_loadd(3, sums + 3 * TILE, 64);
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
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + TILE, 64);
    _tile_stored(2, sums + 2 * TILE, 64);
    _tile_stored(3, sums + 3 * TILE, 64);
}

/* Writes or adds to `out` the sums of ROWS rows, number i, and COLUMNS columns from `column` on. */
static void finish(const job *job, const uint8_t *sums, int64_t i, int64_t column, bool add) {
    int64_t rows = job->rows - i * ROWS;
    for (int64_t r = 0; r < ROWS && r < rows; r++)
        for (int half = 0; half < 2; half++) {
            int64_t c = column + half * SIDE;
            float *out = job->out + (i * ROWS + r) * job->columns + c;
            __mmask16 mask = first(job->columns - c);
            __m512 sum = _mm512_loadu_ps(sums + (r / SIDE * 2 + half) * TILE + r % SIDE * 64);
            if (add) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, out));
            _mm512_mask_storeu_ps(out, mask, sum);
        }
}

/* A piece of the left matrix times panels `begin` to `end` of the packed matrix, which start at
 * `column`. NEAR steps of the left matrix stay in the L1 cache for all panels. */
static void multiply_panels(
    const job *job, const uint8_t *left, uint8_t *sums, int64_t i, int64_t column, int64_t begin,
    int64_t end, int64_t steps, bool add
) {
    memset(sums, 0, (size_t)((end - begin) * 4 * TILE));
    for (int64_t s = 0; s < steps; s += NEAR) {
        int64_t near = steps - s < NEAR ? steps - s : NEAR;
        const uint8_t *piece = left + s * TERMS * 2 * TILE;
        for (int64_t j = begin; j < end; j++) {
            const uint8_t *right = job->packed + (j * steps + s) * 2 * TILE;
            multiply(piece, right, near, sums + (j - begin) * 4 * TILE);
        }
    }
    for (int64_t j = begin; j < end; j++)
        finish(job, sums + (j - begin) * 4 * TILE, i, column + j * COLUMNS, add);
}

static void share(const bn_team *team, void *argument) {
    const job *job = argument;
    uint8_t *left = job->pieces + (int64_t)team->index * (LEFT + SUMS), *sums = left + LEFT;
    int64_t blocks = (job->rows + ROWS - 1) / ROWS;
    configure();
    for (int64_t column = 0; column < job->columns; column += WIDTH) {
        int64_t wide = job->columns - column < WIDTH ? job->columns - column : WIDTH;
        int64_t panels = (wide + COLUMNS - 1) / COLUMNS;
        /* With fewer blocks of rows than threads, each is shared, in `parts` of the panels. */
        int64_t parts = (team->size + blocks - 1) / blocks, begin, end;
        int64_t most = (panels + parts - 1) / parts;
        for (int64_t depth = 0; depth < job->depth; depth += DEPTH) {
            int64_t deep = job->depth - depth < DEPTH ? job->depth - depth : DEPTH;
            int64_t steps = (deep + STEP - 1) / STEP;
            bn_share(team, panels, 1, &begin, &end);
            for (int64_t j = begin; j < end; j++) {
                uint8_t *panel = job->packed + j * steps * 2 * TILE;
                pack_right(job, depth, steps, column + j * COLUMNS, panel);
            }
            bn_wait(team);
            bn_share(team, blocks * parts, 1, &begin, &end);
            for (int64_t item = begin; item < end; item++) {
                int64_t i = item % blocks, j = item / blocks * most;
                int64_t past = j + most < panels ? j + most : panels;
                if (j >= past) continue;
                (job->left_transposed ? pack_left_transposed : pack_left)(
                    job, i, depth, steps, left
                );
                multiply_panels(job, left, sums, i, column, j, past, steps, depth > 0);
            }
            bn_wait(team);
        }
    }
    _tile_release();
}

BN_TARGET_END

int64_t bn_tiles_scratch(int32_t threads) { return RIGHT + (int64_t)threads * (LEFT + SUMS); }

static void run(job *job, void *scratch, int32_t threads) {
    job->packed = scratch;
    job->pieces = job->packed + RIGHT;
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
    job.left_transposed = true, job.scale = s_x;
    run(&job, scratch, threads);
}

#else

int32_t bn_has_tiles(void) { return 0; }

int64_t bn_tiles_scratch(int32_t threads) {
    (void)threads;
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
