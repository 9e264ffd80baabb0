/* Ternary products with AVX2, four weights to a byte as they are stored.
 *
 * dot multiplies codes 0, 1, 2 by a token's and adds pairs in 16 bits (vpmaddubsw); codes are
 * weights + 1, so the sum of the token is taken off at the end. For one token the codes of bits 2
 * and 3 stay in their place: their sums come out four times too large, which is cheaper to undo
 * once than to shift every code.
 */
#if defined(__x86_64__)
#include <immintrin.h>

#include <string.h>

#include "internal.h"

BN_TARGET_BEGIN("avx2,fma,popcnt")
#include "products.inc.h"

#define INLINE static inline __attribute__((always_inline))

/* sum += v over 16 numbers of 16 bits. By assembly, because gcc reorders the sums and then keeps some of
 * them in memory. */
#define ADD16(sum, v) __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(v))
/* Keep the value in a register: else the compiler loads it again for every use. */
#define IN_REGISTER(v) __asm__("" : "+x"(v))

/* Bytes of weights that are fetched into the L2 cache beyond the next four rows. */
#define AHEAD 4096

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* 32 bytes, or 16 and then zeros: a row of packed weights is a multiple of 16 bytes. */
INLINE __m256i load(const void *at, bool all) {
    if (all) return _mm256_loadu_si256((const __m256i *)at);
    return _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)at));
}

/* The sums of the eight lanes of a, b, c and d. */
INLINE __m128i sum_lanes(__m256i a, __m256i b, __m256i c, __m256i d) {
    __m256i v = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    return _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}

INLINE __m256i widen(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

/* The first `count` of four. */
INLINE void store(int32_t *acc, __m128i y, int64_t count) {
    int32_t all[4];
    _mm_storeu_si128((__m128i *)all, y);
    for (int64_t i = 0; i < count; i++) acc[i] = all[i];
}

/* Packed bytes after which sums of 16 bits are widened. A byte adds at most 2 * 2 * 128 to a sum for
 * each code that is in place, 4 times as much where it is 4 times too large: 8 vectors of the
 * latter, two codes each, come to -2^15 or 8 * 2 * 4 * 2 * 2 * 127; so do 16 vectors of four codes
 * in place. */
#define SHORT_BYTES (8 * 32)
#define LONG_BYTES (16 * 32)

/* One token */

/* Add 32 packed bytes of four rows: `low` the codes in place, `high` those that are 4 times as large. */
INLINE void dot_one(
    const uint8_t *const packed[4], int64_t bytes, const int8_t *codes, int64_t i, bool all,
    __m256i low[4], __m256i high[4]
) {
    const __m256i three = _mm256_set1_epi8(3), twelve = _mm256_set1_epi8(12);
    __m256i x[4];
    for (int j = 0; j < 4; j++) x[j] = load(codes + j * bytes + i, all);
    for (int r = 0; r < 4; r++) {
        __m256i v = load(packed[r] + i, all), w = _mm256_srli_epi16(v, 4);
        __m256i a = _mm256_maddubs_epi16(_mm256_and_si256(v, three), x[0]);
        __m256i b = _mm256_maddubs_epi16(_mm256_and_si256(v, twelve), x[1]);
        __m256i c = _mm256_maddubs_epi16(_mm256_and_si256(w, three), x[2]);
        __m256i d = _mm256_maddubs_epi16(_mm256_and_si256(w, twelve), x[3]);
        ADD16(low[r], a);
        ADD16(high[r], b);
        ADD16(low[r], c);
        ADD16(high[r], d);
    }
}

static void dot_token(
    const uint8_t *const packed[4], int64_t bytes, const int8_t *codes, int32_t sum, int64_t rows,
    int32_t *acc
) {
    const char *next = (const char *)packed[0] + 4 * bytes + AHEAD;
    int64_t full = bytes / 32 * 32, i = 0;
    __m256i total[4];
    for (int r = 0; r < 4; r++) total[r] = _mm256_setzero_si256();
    while (i < bytes) {
        int64_t end = least(i + SHORT_BYTES, full);
        __m256i low[4], high[4];
        for (int r = 0; r < 4; r++) low[r] = high[r] = _mm256_setzero_si256();
        if (i == full) {
            dot_one(packed, bytes, codes, i, false, low, high);
            i = bytes;
        }
        for (; i < end; i += 32) {
            _mm_prefetch(next + 4 * i, _MM_HINT_T1);
            _mm_prefetch(next + 4 * i + 64, _MM_HINT_T1);
            dot_one(packed, bytes, codes, i, true, low, high);
        }
        for (int r = 0; r < 4; r++) {
            __m256i v = _mm256_add_epi32(widen(low[r]), _mm256_srai_epi32(widen(high[r]), 2));
            total[r] = _mm256_add_epi32(total[r], v);
        }
    }
    __m128i y = sum_lanes(total[0], total[1], total[2], total[3]);
    store(acc, _mm_sub_epi32(y, _mm_set1_epi32(sum)), rows);
}

/* More tokens */

/* Add 32 packed bytes of two rows, times up to four tokens. */
INLINE void dot_several(
    const uint8_t *const packed[2], int64_t bytes, const int8_t *codes, int64_t stride, int64_t i,
    bool all, int tokens, __m256i part[2][4]
) {
    const __m256i three = _mm256_set1_epi8(3);
    __m256i v[2] = {load(packed[0] + i, all), load(packed[1] + i, all)};
    for (int j = 0; j < 4; j++) {
        __m256i a = _mm256_and_si256(v[0], three), b = _mm256_and_si256(v[1], three);
        v[0] = _mm256_srli_epi16(v[0], 2);
        v[1] = _mm256_srli_epi16(v[1], 2);
        for (int t = 0; t < tokens; t++) {
            __m256i x = load(codes + t * stride + j * bytes + i, all);
            IN_REGISTER(x);
            ADD16(part[0][t], _mm256_maddubs_epi16(a, x));
            ADD16(part[1][t], _mm256_maddubs_epi16(b, x));
        }
    }
}

/* acc of up to two rows and four tokens; of one row, it is given twice. */
INLINE void dot_tile(
    const uint8_t *const packed[2], int64_t bytes, const int8_t *codes, int64_t stride,
    const int32_t *sum, int tokens, int64_t rows, int32_t *acc, int64_t ld
) {
    int64_t full = bytes / 32 * 32, i = 0;
    __m256i total[2][4];
    for (int t = 0; t < tokens; t++) total[0][t] = total[1][t] = _mm256_setzero_si256();
    while (i < bytes) {
        int64_t end = least(i + LONG_BYTES, full);
        __m256i part[2][4];
        for (int t = 0; t < tokens; t++) part[0][t] = part[1][t] = _mm256_setzero_si256();
        if (i == full) {
            dot_several(packed, bytes, codes, stride, i, false, tokens, part);
            i = bytes;
        }
        for (; i < end; i += 32) dot_several(packed, bytes, codes, stride, i, true, tokens, part);
        for (int r = 0; r < 2; r++)
            for (int t = 0; t < tokens; t++)
                total[r][t] = _mm256_add_epi32(total[r][t], widen(part[r][t]));
    }
    for (int t = 0; t < tokens; t += 2) { /* two tokens at a time; the last may be alone */
        int s = t + 1 < tokens ? t + 1 : t;
        __m128i y = sum_lanes(total[0][t], total[1][t], total[0][s], total[1][s]);
        y = _mm_sub_epi32(y, _mm_set_epi32(sum[s], sum[s], sum[t], sum[t]));
        store(acc + t * ld, y, rows);
        store(acc + s * ld, _mm_unpackhi_epi64(y, y), rows);
    }
}

/* Four tokens stay in the first cache while the weights of all rows pass. */
static void dot_avx2(
    const bn_ternary *w, const bn_tokens *x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    int32_t *acc, int64_t ld, void *scratch
) {
    if (!w->packed) {
        bn_dot_portable(w, x, m0, m1, n0, n1, acc, ld, scratch);
        return;
    }
    int64_t stride = x->stride, bytes = stride / 4;
    for (int64_t m = m0; m < m1; m += 4) {
        const int8_t *codes = x->codes + m * stride;
        int64_t tokens = least(m1 - m, 4), step = tokens == 1 ? 4 : 2;
        for (int64_t n = n0; n < n1; n += step) {
            const uint8_t *rows[4];
            for (int r = 0; r < 4; r++) rows[r] = w->packed + bytes * least(n + r, n1 - 1);
            int64_t some = least(n1 - n, step);
            int32_t *at = acc + (m - m0) * ld + n - n0;
            const int32_t *sum = x->sum + m;
            switch (tokens) {
            case 1: dot_token(rows, bytes, codes, *sum, some, at); break;
            case 2: dot_tile(rows, bytes, codes, stride, sum, 2, some, at, ld); break;
            case 3: dot_tile(rows, bytes, codes, stride, sum, 3, some, at, ld); break;
            default: dot_tile(rows, bytes, codes, stride, sum, 4, some, at, ld);
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
