/* Ternary products with AVX2: the codes of some rows are laid out as bytes and multiplied in pairs
 * (dot), or bits are counted by a table of nibbles (addsub). */
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "internal.h"

BN_TARGET_BEGIN("avx2,fma,popcnt")
#include "products.inc.h"

#define INLINE static inline __attribute__((always_inline))

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Columns of all rows that are decoded at once. */
#define BLOCK 512

typedef struct {
    uint8_t w[BN_ROWS][BLOCK]; /* codes 0, 1, 2 */
    int8_t x[BN_TOKENS][BLOCK]; /* the tokens' codes of these columns; 0 where there are none */
} block;
_Static_assert(sizeof(block) <= BN_PRODUCT_SCRATCH, "the scratch is too small");

/* 128 bytes of packed codes from byte i on: columns j * bytes + i to + 127 become columns 128 j. */
static void block_of_packed(
    const bn_ternary *w, const bn_tokens *x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    int64_t i, block *b
) {
    int64_t bytes = x->stride / 4, length = least(bytes - i, BLOCK / 4);
    const __m128i three = _mm_set1_epi8(3);
    for (int64_t n = n0; n < n1; n++)
        for (int64_t c = 0; c < length; c += 16) {
            __m128i v = _mm_loadu_si128((const __m128i *)(w->packed + n * bytes + i + c));
            for (int j = 0; j < 4; j++) {
                __m128i code = _mm_and_si128(_mm_srl_epi16(v, _mm_cvtsi32_si128(2 * j)), three);
                _mm_store_si128((__m128i *)(b->w[n - n0] + BLOCK / 4 * j + c), code);
            }
        }
    for (int64_t m = m0; m < m1; m++)
        for (int j = 0; j < 4; j++) {
            int8_t *to = b->x[m - m0] + BLOCK / 4 * j;
            memcpy(to, x->codes + m * x->stride + j * bytes + i, (size_t)length);
            memset(to + length, 0, (size_t)(BLOCK / 4 - length));
        }
}

/* 32 bits as bytes of 0 or -1. */
INLINE __m256i spread(const uint8_t *at) {
    const __m256i bytes = _mm256_setr_epi64x(
        0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303
    );
    const __m256i bits = _mm256_set1_epi64x((long long)0x8040201008040201);
    int32_t word;
    memcpy(&word, at, 4);
    __m256i v = _mm256_shuffle_epi8(_mm256_set1_epi32(word), bytes);
    return _mm256_cmpeq_epi8(_mm256_and_si256(v, bits), bits);
}

/* 512 columns of bit planes from column i on. */
static void block_of_planes(
    const bn_ternary *w, const bn_tokens *x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    int64_t i, block *b
) {
    int64_t plane = 4 * bn_plane_words(w->k), length = least(x->stride - i, BLOCK);
    const __m256i one = _mm256_set1_epi8(1);
    for (int64_t n = n0; n < n1; n++) {
        const uint8_t *row = (const uint8_t *)w->planes + 2 * n * plane + i / 8;
        for (int64_t c = 0; c < length; c += 32) {
            __m256i negative = spread(row + plane + c / 8); /* -1 for -1 */
            __m256i code = _mm256_sub_epi8(one, spread(row + c / 8));
            code = _mm256_add_epi8(code, _mm256_add_epi8(negative, negative));
            _mm256_store_si256((__m256i *)(b->w[n - n0] + c), code);
        }
    }
    for (int64_t m = m0; m < m1; m++) {
        memcpy(b->x[m - m0], x->codes + m * x->stride + i, (size_t)length);
        memset(b->x[m - m0] + length, 0, (size_t)(BLOCK - length));
    }
}

/* The products of four rows and one token of a block. Sums of 16 bits hold them: a pair is at most
 * 2 * 2 * 128, and each sum adds 16 pairs. */
INLINE __m128i multiply(const uint8_t *const w[4], const int8_t *x) {
    __m256i y[4];
    for (int r = 0; r < 4; r++) y[r] = _mm256_setzero_si256();
    for (int64_t c = 0; c < BLOCK; c += 32) {
        __m256i v = _mm256_load_si256((const __m256i *)(x + c));
        for (int r = 0; r < 4; r++) {
            __m256i code = _mm256_load_si256((const __m256i *)(w[r] + c));
            y[r] = _mm256_add_epi16(y[r], _mm256_maddubs_epi16(code, v));
        }
    }
    for (int r = 0; r < 4; r++) y[r] = _mm256_madd_epi16(y[r], _mm256_set1_epi16(1));
    __m256i v = _mm256_hadd_epi32(_mm256_hadd_epi32(y[0], y[1]), _mm256_hadd_epi32(y[2], y[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}

static void dot_avx2(
    const bn_ternary *w, const bn_tokens *x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    int32_t *acc, int64_t ld, void *scratch
) {
    block *b = scratch;
    int64_t end = w->packed ? x->stride / 4 : x->stride, step = w->packed ? BLOCK / 4 : BLOCK;
    for (int64_t i = 0; i < end; i += step) {
        if (w->packed)
            block_of_packed(w, x, m0, m1, n0, n1, i, b);
        else
            block_of_planes(w, x, m0, m1, n0, n1, i, b);
        for (int64_t n = n0; n < n1; n += 4) {
            const uint8_t *rows[4];
            for (int r = 0; r < 4; r++) rows[r] = b->w[least(n + r, n1 - 1) - n0];
            for (int64_t m = m0; m < m1; m++) {
                int32_t y[4], *at = acc + (m - m0) * ld + n - n0;
                _mm_storeu_si128((__m128i *)y, multiply(rows, b->x[m - m0]));
                for (int r = 0; r < least(n1 - n, 4); r++) /* codes are weights + 1 */
                    at[r] = (int32_t)((uint32_t)y[r] + (uint32_t)(i == 0 ? -x->sum[m] : at[r]));
            }
        }
    }
}

/* Bits of each byte. */
INLINE __m256i count_bits(__m256i v) {
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i table = _mm256_setr_epi8(
        0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4
    );
    __m256i a = _mm256_shuffle_epi8(table, _mm256_and_si256(v, low));
    __m256i b = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), low));
    return _mm256_add_epi8(a, b);
}

/* One row times one token: see products_portable.c. The eight planes of 64 columns are two vectors. */
INLINE int32_t addsub_row(
    const uint8_t *nonzero, const uint8_t *negative, const uint64_t *bits, int64_t chunks
) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i low = zero, high = zero;
    int64_t ones = 0;
    while (chunks > 0) {
        int64_t some = least(chunks, 31); /* bytes count to 255 */
        __m256i l = zero, h = zero;
        for (int64_t c = 0; c < some; c++, nonzero += 8, negative += 8, bits += 8) {
            long long z, s;
            memcpy(&z, nonzero, 8);
            memcpy(&s, negative, 8);
            __m256i set = _mm256_set1_epi64x(z), flip = _mm256_set1_epi64x(s);
            __m256i a = _mm256_loadu_si256((const __m256i *)bits);
            __m256i b = _mm256_loadu_si256((const __m256i *)(bits + 4));
            a = _mm256_and_si256(_mm256_xor_si256(a, flip), set);
            b = _mm256_and_si256(_mm256_xor_si256(b, flip), set);
            l = _mm256_add_epi8(l, count_bits(a));
            h = _mm256_add_epi8(h, count_bits(b));
            ones += _mm_popcnt_u64((uint64_t)s);
        }
        low = _mm256_add_epi64(low, _mm256_sad_epu8(l, zero));
        high = _mm256_add_epi64(high, _mm256_sad_epu8(h, zero));
        chunks -= some;
    }
    low = _mm256_sllv_epi64(low, _mm256_setr_epi64x(0, 1, 2, 3));
    high = _mm256_sllv_epi64(high, _mm256_setr_epi64x(4, 5, 6, 7));
    int64_t y[8];
    _mm256_storeu_si256((__m256i *)y, low);
    _mm256_storeu_si256((__m256i *)(y + 4), high);
    return (int32_t)(ones + y[0] + y[1] + y[2] + y[3] + y[4] + y[5] + y[6] - y[7]);
}

static __attribute__((noinline)) void addsub_avx2(
    const bn_ternary *w, const bn_tokens *x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    int32_t *acc, int64_t ld, void *scratch
) {
    (void)scratch;
    int64_t bytes = 4 * bn_plane_words(w->k), chunks = x->stride / 64;
    for (int64_t n = n0; n < n1; n++) {
        const uint8_t *planes = (const uint8_t *)w->planes + 2 * n * bytes;
        _mm_prefetch((const char *)planes + 4096, _MM_HINT_T0);
        for (int64_t m = m0; m < m1; m++)
            acc[(m - m0) * ld + n - n0] =
                addsub_row(planes, planes + bytes, x->bits + 8 * chunks * m, chunks);
    }
}

static void addsub_bits_avx2(const bn_tokens *x, int64_t m0, int64_t m1) {
    int64_t chunks = x->stride / 64;
    for (int64_t c = m0 * chunks; c < m1 * chunks; c++) {
        __m256i a = _mm256_loadu_si256((const __m256i *)(x->codes + 64 * c));
        __m256i b = _mm256_loadu_si256((const __m256i *)(x->codes + 64 * c + 32));
        for (int bit = 7; bit >= 0; bit--) {
            uint64_t low = (uint32_t)_mm256_movemask_epi8(a), high = (uint32_t)_mm256_movemask_epi8(b);
            x->bits[8 * c + bit] = low | high << 32;
            a = _mm256_add_epi8(a, a);
            b = _mm256_add_epi8(b, b);
        }
    }
}

static void rescale(
    const bn_ternary *w, const bn_tokens *x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    const int32_t *acc, int64_t ld, bool add, float *out, int64_t out_ld
) {
    bn_rescale(w, x, m0, m1, n0, n1, acc, ld, add, out, out_ld);
}

BN_TARGET_END

const bn_products bn_products_avx2 = {
    .dot = dot_avx2,
    .addsub = addsub_avx2,
    .bits = addsub_bits_avx2,
    .rescale = rescale,
};
#endif
