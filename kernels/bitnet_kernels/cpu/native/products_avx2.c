/* Ternary products with AVX2, on the four weights of a byte as they are stored.
 *
 * dot multiplies codes 0, 1, 2 by a token's codes and adds pairs in 16 bits (vpmaddubsw). Codes are
 * weights + 1, so the sum of the token is subtracted at the end. For one token the codes in bits 2
 * and 3 stay in place, so their sums are four times too large; it is cheaper to undo that once than
 * to shift every code.
 *
 * addsub gives each of a token's codes the sign of the weight (vpsignb) and sums bytes (vpsadbw).
 */
#if defined(__x86_64__)
#include <immintrin.h>

#include "internal.h"

BN_TARGET_BEGIN("avx2,fma,popcnt")
#include "products.inc.h"

#define INLINE static inline __attribute__((always_inline))

/* sum += v over 16 numbers of 16 bits. In assembly, because gcc reorders the sums and then keeps
 * some of them in memory. */
#define ADD16(sum, v) __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(v))
/* Keep the value in a register; else the compiler loads it again for every use. */
#define IN_REGISTER(v) __asm__("" : "+x"(v))

/* Bytes of weights that are prefetched into the L2 cache beyond the next four rows. */
#define AHEAD 4096

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* 32 bytes, or 16 and then zeros, since a row of packed weights is a multiple of 16 bytes. */
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

/* Packed bytes after which 16-bit sums are widened. A byte adds at most 2 * 2 * 128 to a sum for
 * each code of true size, and 4 times as much for a code that is 4 times too large. 8 vectors of
 * the latter, with two codes each, reach -2^15 or 8 * 2 * 4 * 2 * 2 * 127; so do 16 vectors with
 * four codes of true size. */
#define SHORT_BYTES (8 * 32)
#define LONG_BYTES (16 * 32)

/* One token */

/* Add 32 packed bytes of four rows: codes of true size to `low`, 4 times too large to `high`. */
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

/* acc of up to two rows and four tokens; a single row is given twice. */
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

/* Four tokens stay in the L1 cache for the weights of all rows. */
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

/* addsub */

/* The sums of the low halves of the four lanes of a, b, c and d, modulo 2^32. */
INLINE __m128i sum_low(__m256i a, __m256i b, __m256i c, __m256i d) {
    __m256i v = _mm256_hadd_epi32(
        _mm256_castps_si256(
            _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88)
        ),
        _mm256_castps_si256(
            _mm256_shuffle_ps(_mm256_castsi256_ps(c), _mm256_castsi256_ps(d), 0x88)
        )
    );
    return _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}

/* Code j of each byte of packed weights, minus the code of weight 0: its sign is the weight's. */
INLINE __m256i signs(__m256i packed, int j) {
    __m256i code = _mm256_and_si256(packed, _mm256_set1_epi8((char)(3 << 2 * j)));
    return _mm256_sub_epi8(code, _mm256_set1_epi8((char)(1 << 2 * j)));
}

/* Add x, -x or 0, each plus 128 so that it is positive: vpsadbw sums unsigned bytes. */
#define ADD_SIGNED(sum, x, sign) \
    (sum) = _mm256_add_epi64( \
        sum, \
        _mm256_sad_epu8( \
            _mm256_xor_si256(_mm256_sign_epi8(x, sign), _mm256_set1_epi8(-128)), \
            _mm256_setzero_si256() \
        ) \
    )

/* Columns where the weight is -1 and the token's code is -128, whose negative fits no byte. */
static int32_t wrapped(const uint8_t *packed, int64_t bytes, const int8_t *codes) {
    int32_t count = 0;
    for (int j = 0; j < 4; j++)
        for (int64_t i = 0; i < bytes; i++)
            count += codes[j * bytes + i] == -128 && (packed[i] >> 2 * j & 3) == 0;
    return count;
}

static bool may_wrap(const int8_t *codes, int64_t stride) {
    int8_t lowest = 0;
    for (int64_t i = 0; i < stride; i++) lowest = codes[i] < lowest ? codes[i] : lowest;
    return lowest == -128;
}

/* 32 packed bytes of `rows` rows, times up to four tokens. */
INLINE void addsub_step(
    const uint8_t *const packed[4], int64_t bytes, const int8_t *codes, int64_t stride, int64_t i,
    bool all, int rows, int tokens, __m256i sum[4][4]
) {
    __m256i v[4];
    for (int r = 0; r < rows; r++) v[r] = load(packed[r] + i, all);
    for (int j = 0; j < 4; j++) {
        __m256i sign[4];
        for (int r = 0; r < rows; r++) sign[r] = signs(v[r], j);
        for (int t = 0; t < tokens; t++) {
            __m256i x = load(codes + t * stride + j * bytes + i, all);
            for (int r = 0; r < rows; r++) ADD_SIGNED(sum[r][t], x, sign[r]);
        }
    }
}

/* acc of up to two rows (four for one token) and four tokens; with fewer rows, the last one is
 * given several times. */
INLINE void addsub_tile(
    const uint8_t *const packed[4], int64_t bytes, const int8_t *codes, int64_t stride,
    const bool *wraps, int rows, int tokens, int64_t some, int32_t *acc, int64_t ld
) {
    const char *next = (const char *)packed[0] + rows * bytes + AHEAD;
    int64_t full = bytes / 32 * 32, i = 0;
    __m256i sum[4][4];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) sum[r][t] = _mm256_setzero_si256();
    for (; i < full; i += 32) {
        if (tokens == 1) {
            _mm_prefetch(next + 4 * i, _MM_HINT_T1);
            _mm_prefetch(next + 4 * i + 64, _MM_HINT_T1);
        }
        addsub_step(packed, bytes, codes, stride, i, true, rows, tokens, sum);
    }
    if (i < bytes) addsub_step(packed, bytes, codes, stride, i, false, rows, tokens, sum);
    /* 128 for each of the 4 * 32 columns of a step */
    const __m128i raised = _mm_set1_epi32((int32_t)((bytes + 31) / 32 << 14));
    for (int t = 0; t < tokens; t++) {
        __m128i y = sum_low(sum[0][t], sum[1][t], sum[rows - 2][t], sum[rows - 1][t]);
        store(acc + t * ld, _mm_sub_epi32(y, raised), some);
        if (wraps[t])
            for (int64_t r = 0; r < some; r++)
                acc[t * ld + r] += wrapped(packed[r], bytes, codes + t * stride) << 8;
    }
}

static void addsub_avx2(
    const bn_ternary *w, const bn_tokens *x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    int32_t *acc, int64_t ld, void *scratch
) {
    if (!w->packed) {
        bn_addsub_portable(w, x, m0, m1, n0, n1, acc, ld, scratch);
        return;
    }
    int64_t stride = x->stride, bytes = stride / 4;
    for (int64_t m = m0; m < m1; m += 4) {
        const int8_t *codes = x->codes + m * stride;
        int64_t tokens = least(m1 - m, 4), step = tokens == 1 ? 4 : 2;
        bool wraps[4];
        for (int t = 0; t < tokens; t++) wraps[t] = may_wrap(codes + t * stride, stride);
        for (int64_t n = n0; n < n1; n += step) {
            const uint8_t *rows[4];
            for (int r = 0; r < 4; r++) rows[r] = w->packed + bytes * least(n + r, n1 - 1);
            int64_t some = least(n1 - n, step);
            int32_t *at = acc + (m - m0) * ld + n - n0;
            switch (tokens) {
            case 1: addsub_tile(rows, bytes, codes, stride, wraps, 4, 1, some, at, ld); break;
            case 2: addsub_tile(rows, bytes, codes, stride, wraps, 2, 2, some, at, ld); break;
            case 3: addsub_tile(rows, bytes, codes, stride, wraps, 2, 3, some, at, ld); break;
            default: addsub_tile(rows, bytes, codes, stride, wraps, 2, 4, some, at, ld);
            }
        }
    }
}

/* For weights in bit planes. */
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
    .addsub_packed = true,
    .bits = addsub_bits_avx2,
    .rescale = rescale,
};
#endif
