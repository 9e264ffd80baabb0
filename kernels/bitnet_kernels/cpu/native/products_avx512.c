/* Ternary products with AVX-512: VNNI (dot) and VPOPCNTDQ (addsub).
 *
 * Few tokens: dot keeps the four codes of a byte in place and masks them. So the sums of quarter j
 * are 4^j times too large, and are shifted once per row. addsub counts bits.
 * More tokens: the codes of 64 rows are laid out as [columns / 4][64 rows][4], so that one
 * instruction multiplies four columns of 16 rows by four codes of a token. No sum is horizontal.
 */
#if defined(__x86_64__)
#include <immintrin.h>

#include "internal.h"

BN_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vpopcntdq,avx512vbmi,popcnt")
#include "products.inc.h"

#define INLINE static inline __attribute__((always_inline))
/* Keep the value in a register; else the compiler loads it again for every use. */
#define IN_REGISTER(v) __asm__("" : "+v"(v))
/* sum += u s over four adjacent bytes, u unsigned and s signed. In assembly, because gcc copies
 * sums between registers, and to the stack and back. */
#define DOT4(sum, u, s) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s))

/* Bytes of weights that are prefetched into the L2 cache beyond the next four rows. */
#define AHEAD 8192

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* The sums of the 16 lanes of a, b, c and d. */
INLINE __m128i sum_lanes(__m512i a, __m512i b, __m512i c, __m512i d) {
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    __m512i v = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    __m256i w = _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
}

/* addsub, few tokens */

/* acc of up to four rows; with fewer, the last one is given several times. */
INLINE void addsub_rows(
    const uint8_t *const planes[4], int64_t bytes, const uint64_t *bits, int64_t chunks, int tokens,
    int64_t ahead, int64_t rows, int32_t *acc, int64_t ld
) {
    __m512i count[4][4];
    for (int r = 0; r < 4; r++)
        for (int t = 0; t < tokens; t++) count[r][t] = _mm512_setzero_si512();
    for (int64_t c = 0; c < chunks; c++) {
        _mm_prefetch((const char *)planes[0] + ahead + 64 * c, _MM_HINT_T1);
        __m512i x[4];
        for (int t = 0; t < tokens; t++) x[t] = _mm512_loadu_si512(bits + 8 * (t * chunks + c));
        for (int r = 0; r < 4; r++) {
            __m512i nonzero = _mm512_set1_epi64(*(const long long *)(planes[r] + 8 * c));
            __m512i negative = _mm512_set1_epi64(*(const long long *)(planes[r] + bytes + 8 * c));
            for (int t = 0; t < tokens; t++) { /* (x ^ s) & z */
                __m512i v = _mm512_ternarylogic_epi64(nonzero, negative, x[t], 0x60);
                count[r][t] = _mm512_add_epi64(count[r][t], _mm512_popcnt_epi64(v));
            }
        }
    }
    __m512i ones[4]; /* ~x is -x - 1, so each weight of -1 adds one */
    int64_t full = bytes / 64 * 64;
    const __mmask8 rest = (__mmask8)((1 << ((bytes - full) / 8)) - 1);
    for (int r = 0; r < 4; r++)
        ones[r] = _mm512_popcnt_epi64(_mm512_maskz_loadu_epi64(rest, planes[r] + bytes + full));
    for (int64_t i = 0; i < full; i += 64)
        for (int r = 0; r < 4; r++) {
            __m512i v = _mm512_loadu_si512(planes[r] + bytes + i);
            ones[r] = _mm512_add_epi64(ones[r], _mm512_popcnt_epi64(v));
        }
    const __m512i place = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    for (int t = 0; t < tokens; t++) {
        __m512i pair[2]; /* of rows, in the halves of 64 bits */
        for (int i = 0; i < 2; i++) {
            __m512i even = _mm512_sllv_epi64(count[2 * i][t], place);
            __m512i odd = _mm512_sllv_epi64(count[2 * i + 1][t], place);
            even = _mm512_mask_sub_epi64(even, 0x80, _mm512_setzero_si512(), even); /* the sign */
            odd = _mm512_mask_sub_epi64(odd, 0x80, _mm512_setzero_si512(), odd);
            even = _mm512_add_epi64(even, ones[2 * i]);
            odd = _mm512_add_epi64(odd, ones[2 * i + 1]);
            pair[i] = _mm512_mask_mov_epi32(_mm512_slli_epi64(odd, 32), 0x5555, even);
        }
        __m512i v = _mm512_add_epi32(
            _mm512_unpacklo_epi64(pair[0], pair[1]), _mm512_unpackhi_epi64(pair[0], pair[1])
        );
        __m256i w = _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
        __m128i y = _mm_add_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
        _mm_mask_storeu_epi32(acc + t * ld, (__mmask8)((1 << rows) - 1), y);
    }
}

static __attribute__((noinline)) void addsub_avx512(
    const bn_ternary *w, const bn_tokens *x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    int32_t *acc, int64_t ld, void *scratch
) {
    (void)scratch;
    int64_t bytes = 4 * bn_plane_words(w->k), chunks = x->stride / 64;
    for (int64_t n = n0; n < n1; n += 4) {
        const uint8_t *rows[4];
        for (int r = 0; r < 4; r++)
            rows[r] = (const uint8_t *)w->planes + 2 * bytes * least(n + r, n1 - 1);
        int64_t some = least(n1 - n, 4), ahead = 8 * bytes + AHEAD;
        for (int64_t m = m0; m < m1; m += 4) {
            const uint64_t *bits = x->bits + 8 * chunks * m;
            int32_t *at = acc + (m - m0) * ld + n - n0;
            switch (least(m1 - m, 4)) {
            case 1: addsub_rows(rows, bytes, bits, chunks, 1, ahead, some, at, ld); break;
            case 2: addsub_rows(rows, bytes, bits, chunks, 2, ahead, some, at, ld); break;
            case 3: addsub_rows(rows, bytes, bits, chunks, 3, ahead, some, at, ld); break;
            default: addsub_rows(rows, bytes, bits, chunks, 4, ahead, some, at, ld);
            }
        }
    }
}

static void addsub_bits_avx512(const bn_tokens *x, int64_t m0, int64_t m1) {
    int64_t chunks = x->stride / 64;
    for (int64_t c = m0 * chunks; c < m1 * chunks; c++) {
        __m512i v = _mm512_loadu_si512(x->codes + 64 * c);
        for (int b = 7; b >= 0; b--) {
            x->bits[8 * c + b] = _cvtmask64_u64(_mm512_movepi8_mask(v));
            v = _mm512_add_epi8(v, v);
        }
    }
}

/* dot, few tokens */

/* Most tokens for which decoding the weights again for every four is cheaper than a new layout. */
#define FEW 16
/* Columns that the sums of a quarter hold without overflow: 4 products of 128 * 128 per 256. */
#define SAFE_BYTES (1 << 20)

/* Add 256 columns of four rows to one sum per row and quarter. All 64 bytes, or those of `some`. */
INLINE void dot_one(
    const uint8_t *const packed[4], int64_t bytes, const int8_t *codes, int64_t i, bool all,
    __mmask64 some, __m512i part[4][4]
) {
    __m512i x[4];
    for (int j = 0; j < 4; j++) {
        const int8_t *at = codes + j * bytes + i;
        x[j] = all ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi8(some, at);
        IN_REGISTER(x[j]);
    }
    for (int r = 0; r < 4; r++) {
        const uint8_t *at = packed[r] + i;
        __m512i v = all ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi8(some, at);
        IN_REGISTER(v);
        DOT4(part[r][0], _mm512_and_si512(v, _mm512_set1_epi8(3)), x[0]);
        DOT4(part[r][1], _mm512_and_si512(v, _mm512_set1_epi8(12)), x[1]);
        DOT4(part[r][2], _mm512_and_si512(v, _mm512_set1_epi8(48)), x[2]);
        DOT4(part[r][3], _mm512_and_si512(v, _mm512_set1_epi8((char)192)), x[3]);
    }
}

/* The same for several tokens, to one sum per row and token. */
INLINE void dot_several(
    const uint8_t *const packed[4], int64_t bytes, const int8_t *codes, int64_t stride, int64_t i,
    bool all, __mmask64 some, int tokens, __m512i total[4][4]
) {
    __m512i v[4];
    for (int r = 0; r < 4; r++) {
        const uint8_t *at = packed[r] + i;
        v[r] = all ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi8(some, at);
    }
    for (int j = 0; j < 4; j++) {
        __m512i code[4];
        for (int r = 0; r < 4; r++) {
            code[r] = _mm512_and_si512(v[r], _mm512_set1_epi8(3));
            v[r] = _mm512_srli_epi16(v[r], 2);
        }
        for (int t = 0; t < tokens; t++) {
            const int8_t *at = codes + t * stride + j * bytes + i;
            __m512i x = all ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi8(some, at);
            IN_REGISTER(x);
            for (int r = 0; r < 4; r++) DOT4(total[r][t], code[r], x);
        }
    }
}

/* acc of up to four rows and tokens; with fewer rows, the last one is given several times. */
INLINE void dot_rows(
    const uint8_t *const packed[4], int64_t bytes, const int8_t *codes, int64_t stride,
    const int32_t *sum, int tokens, int64_t ahead, int64_t rows, int32_t *acc, int64_t ld
) {
    __m512i total[4][4];
    int64_t full = bytes / 64 * 64, i = 0;
    const __mmask64 some = ((__mmask64)1 << (bytes - full)) - 1;
    const char *next = (const char *)packed[0] + ahead;
    for (int r = 0; r < 4; r++)
        for (int t = 0; t < tokens; t++) total[r][t] = _mm512_setzero_si512();
    while (tokens == 1 && i < bytes) {
        int64_t end = least(i + SAFE_BYTES, full);
        __m512i part[4][4];
        for (int j = 0; j < 4; j++)
            for (int r = 0; r < 4; r++) part[r][j] = _mm512_setzero_si512();
        for (; i < end; i += 64) {
            for (int r = 0; r < 4; r++) _mm_prefetch(next + 4 * i + 64 * r, _MM_HINT_T1);
            dot_one(packed, bytes, codes, i, true, 0, part);
        }
        if (i == full && some) dot_one(packed, bytes, codes, i, false, some, part);
        if (i == full) i = bytes;
        for (int r = 0; r < 4; r++) {
            __m512i v = _mm512_add_epi32(part[r][0], _mm512_srai_epi32(part[r][1], 2));
            v = _mm512_add_epi32(v, _mm512_srai_epi32(part[r][2], 4));
            v = _mm512_add_epi32(v, _mm512_srai_epi32(part[r][3], 6));
            total[r][0] = _mm512_add_epi32(total[r][0], v);
        }
    }
    for (; i < full; i += 64) {
        for (int r = 0; r < 4; r++) _mm_prefetch(next + 4 * i + 64 * r, _MM_HINT_T1);
        dot_several(packed, bytes, codes, stride, i, true, 0, tokens, total);
    }
    if (i < bytes) dot_several(packed, bytes, codes, stride, i, false, some, tokens, total);
    for (int t = 0; t < tokens; t++) {
        __m128i y = sum_lanes(total[0][t], total[1][t], total[2][t], total[3][t]);
        y = _mm_sub_epi32(y, _mm_set1_epi32(sum[t])); /* codes are weights + 1 */
        _mm_mask_storeu_epi32(acc + t * ld, (__mmask8)((1 << rows) - 1), y);
    }
}

/* Four rows of weights stay in the L1 cache for all tokens, which come four at a time. */
static void dot_few(
    const bn_ternary *w, const bn_tokens *x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    int32_t *acc, int64_t ld
) {
    int64_t bytes = x->stride / 4, ahead = 4 * bytes + AHEAD;
    for (int64_t n = n0; n < n1; n += 4) {
        const uint8_t *rows[4];
        for (int r = 0; r < 4; r++) rows[r] = w->packed + bytes * least(n + r, n1 - 1);
        int64_t some = least(n1 - n, 4);
        for (int64_t m = m0; m < m1; m += 4) {
            const int8_t *codes = x->codes + m * x->stride;
            const int32_t *sum = x->sum + m;
            int32_t *at = acc + (m - m0) * ld + n - n0;
            switch (least(m1 - m, 4)) {
            case 1: dot_rows(rows, bytes, codes, x->stride, sum, 1, ahead, some, at, ld); break;
            case 2: dot_rows(rows, bytes, codes, x->stride, sum, 2, ahead, some, at, ld); break;
            case 3: dot_rows(rows, bytes, codes, x->stride, sum, 3, ahead, some, at, ld); break;
            default: dot_rows(rows, bytes, codes, x->stride, sum, 4, ahead, some, at, ld);
            }
        }
    }
}

/* dot, more tokens */

/* BLOCK: columns of 64 rows that are decoded at once. TILE: tokens of a tile of registers. */
#define BLOCK 256
#define TILE 6

typedef struct {
    uint8_t w[BLOCK / 4][BN_ROWS][4]; /* codes 0, 1, 2 */
    int8_t x[BN_TOKENS][BLOCK]; /* the tokens' codes of these columns, in the same order */
} block;
_Static_assert(sizeof(block) <= BN_PRODUCT_SCRATCH, "the scratch is too small");

/* Transpose a matrix of 16 x 16 words of 32 bits. */
INLINE void transpose(__m512i v[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 4) {
        __m512i ab = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        __m512i cd = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]);
        __m512i ef = _mm512_unpackhi_epi32(v[i], v[i + 1]);
        __m512i gh = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
        t[i] = _mm512_unpacklo_epi64(ab, cd);
        t[i + 1] = _mm512_unpackhi_epi64(ab, cd);
        t[i + 2] = _mm512_unpacklo_epi64(ef, gh);
        t[i + 3] = _mm512_unpackhi_epi64(ef, gh);
    }
    for (int i = 0; i < 4; i++) { /* now of 4 x 4 blocks of 128 bits */
        __m512i ab = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88);
        __m512i cd = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
        __m512i ef = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
        __m512i gh = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
        v[i] = _mm512_shuffle_i32x4(ab, cd, 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(ab, cd, 0xdd);
        v[i + 4] = _mm512_shuffle_i32x4(ef, gh, 0x88);
        v[i + 12] = _mm512_shuffle_i32x4(ef, gh, 0xdd);
    }
}

/* 64 bytes of packed codes from byte i on: columns j * bytes + i to + 63 become columns 64 j of the
 * block. */
static void block_of_packed(
    const bn_ternary *w, const bn_tokens *x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    int64_t i, block *b
) {
    int64_t bytes = x->stride / 4;
    __mmask64 tail = bytes - i < 64 ? ((__mmask64)1 << (bytes - i)) - 1 : ~(__mmask64)0;
    for (int64_t r = 0; r < n1 - n0; r += 16) {
        __m512i v[16];
        for (int s = 0; s < 16; s++)
            v[s] = _mm512_maskz_loadu_epi8(tail, w->packed + bytes * least(n0 + r + s, n1 - 1) + i);
        transpose(v);
        for (int q = 0; q < 16; q++)
            for (int j = 0; j < 4; j++) {
                __m512i code = (__m512i)((__v32hu)v[q] >> 2 * j);
                _mm512_store_si512(b->w[16 * j + q][r], _mm512_and_si512(code, _mm512_set1_epi8(3)));
            }
    }
    for (int64_t m = m0; m < m1; m++)
        for (int j = 0; j < 4; j++) {
            const int8_t *codes = x->codes + m * x->stride + j * bytes + i;
            _mm512_store_si512(b->x[m - m0] + 64 * j, _mm512_maskz_loadu_epi8(tail, codes));
        }
}

/* 256 columns of bit planes from column i on. Bits c, c + 8, c + 16 and c + 24 of a word have the
 * same place in its four bytes, so a shift and a mask give four codes. Columns have that order. */
static void block_of_planes(
    const bn_ternary *w, const bn_tokens *x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    int64_t i, block *b
) {
    int64_t words = bn_plane_words(w->k);
    __mmask8 tail = (__mmask8)((1 << least(words - i / 32, 8)) - 1);
    const __m512i one = _mm512_set1_epi8(1), two = _mm512_set1_epi8(2);
    for (int64_t r = 0; r < n1 - n0; r += 16) {
        __m512i v[16];
        for (int s = 0; s < 16; s++) {
            const uint32_t *row = w->planes + 2 * words * least(n0 + r + s, n1 - 1) + i / 32;
            __m256i nonzero = _mm256_maskz_loadu_epi32(tail, row);
            __m256i negative = _mm256_maskz_loadu_epi32(tail, row + words);
            v[s] = _mm512_inserti64x4(_mm512_castsi256_si512(nonzero), negative, 1);
        }
        transpose(v);
        for (int d = 0; d < 8; d++) {
            /* The code is 2 where the weight is 1, and 1 where it is 0. */
            __m512i high = _mm512_andnot_si512(v[8 + d], v[d]), low = ~v[d];
            high = _mm512_rol_epi32(high, 1);
            for (int c = 0; c < 8; c++) {
                __m512i h = _mm512_and_si512(_mm512_rorv_epi32(high, _mm512_set1_epi32(c)), two);
                __m512i l = (__m512i)((__v16su)low >> c);
                __m512i code = _mm512_ternarylogic_epi32(h, l, one, 0xf8); /* h | (l & one) */
                _mm512_store_si512(b->w[8 * d + c][r], code);
            }
        }
    }
    uint8_t order[64]; /* of the 32 columns of a word, place 4 c + e has column c + 8 e */
    for (int at = 0; at < 64; at++) order[at] = (uint8_t)(at / 32 * 32 + at % 32 / 4 + at % 4 * 8);
    const __m512i columns = _mm512_loadu_si512(order);
    for (int64_t m = m0; m < m1; m++)
        for (int j = 0; j < 4; j++) {
            const int8_t *codes = x->codes + m * x->stride + i + 64 * j;
            __mmask64 inside = i + 64 * j < x->stride ? ~(__mmask64)0 : 0;
            __m512i v = _mm512_permutexvar_epi8(columns, _mm512_maskz_loadu_epi8(inside, codes));
            _mm512_store_si512(b->x[m - m0] + 64 * j, v);
        }
}

/* The products of T tokens and 64 rows with a block: y[t][row]. In assembly, since gcc 12 keeps some of
 * the 24 sums in memory. zmm0 to 23: sums, 24 to 27: codes of 64 rows, 28: of a token. */
#define ROW(y, r) "vpdpbusd %%zmm28, %%zmm" #r ", %%zmm" #y "\n\t"
#define TOKEN(at, a, b, c, d) \
    "vpbroadcastd " #at "(%[x]), %%zmm28\n\t" ROW(a, 24) ROW(b, 25) ROW(c, 26) ROW(d, 27)
#define TOKENS_1 TOKEN(0, 0, 1, 2, 3)
#define TOKENS_2 TOKENS_1 TOKEN(256, 4, 5, 6, 7)
#define TOKENS_3 TOKENS_2 TOKEN(512, 8, 9, 10, 11)
#define TOKENS_4 TOKENS_3 TOKEN(768, 12, 13, 14, 15)
#define TOKENS_5 TOKENS_4 TOKEN(1024, 16, 17, 18, 19)
#define TOKENS_6 TOKENS_5 TOKEN(1280, 20, 21, 22, 23)
#define ZERO(y) "vpxord %%zmm" #y ", %%zmm" #y ", %%zmm" #y "\n\t"
#define STORE(y) "vmovdqa64 %%zmm" #y ", 64*" #y "(%[y])\n\t"
#define TIMES4(F, a, b, c, d) F(a) F(b) F(c) F(d)
#define TIMES24(F) \
    TIMES4(F, 0, 1, 2, 3) TIMES4(F, 4, 5, 6, 7) TIMES4(F, 8, 9, 10, 11) \
    TIMES4(F, 12, 13, 14, 15) TIMES4(F, 16, 17, 18, 19) TIMES4(F, 20, 21, 22, 23)
#define MULTIPLY(T) \
    __asm__ volatile( \
        TIMES24(ZERO) \
        ".p2align 4\n1:\n\t" \
        "vmovdqa64 (%[w]), %%zmm24\n\tvmovdqa64 64(%[w]), %%zmm25\n\t" \
        "vmovdqa64 128(%[w]), %%zmm26\n\tvmovdqa64 192(%[w]), %%zmm27\n\t" \
        TOKENS_##T \
        "add $256, %[w]\n\tadd $4, %[x]\n\tdec %[k]\n\tjne 1b\n\t" \
        TIMES24(STORE) \
        : [w] "+r"(w), [x] "+r"(x), [k] "+r"(k) \
        : [y] "r"(y) \
        : "memory", "cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", \
          "zmm9", "zmm10", "zmm11", "zmm12", "zmm13", "zmm14", "zmm15", "zmm16", "zmm17", "zmm18", \
          "zmm19", "zmm20", "zmm21", "zmm22", "zmm23", "zmm24", "zmm25", "zmm26", "zmm27", "zmm28" \
    )

/* acc += w x of up to 6 tokens from token m of the block on. The first block starts at -sum(x), since
 * codes are weights + 1. */
static void multiply(
    const block *b, int64_t m, int64_t tokens, bool first, const int32_t *sum, int64_t rows,
    int32_t *acc, int64_t ld
) {
    _Alignas(64) int32_t y[TILE][BN_ROWS];
    const void *w = b->w, *x = b->x[m];
    int64_t k = BLOCK / 4;
    switch (tokens) {
    case 1: MULTIPLY(1); break;
    case 2: MULTIPLY(2); break;
    case 3: MULTIPLY(3); break;
    case 4: MULTIPLY(4); break;
    case 5: MULTIPLY(5); break;
    default: MULTIPLY(6);
    }
    for (int64_t t = 0; t < tokens; t++, acc += ld)
        for (int64_t r = 0; r < rows; r += 16) {
            int64_t some = least(rows - r, 16);
            __mmask16 inside = (__mmask16)((1 << some) - 1);
            __m512i before = _mm512_maskz_loadu_epi32(first ? 0 : inside, acc + r);
            if (first) before = _mm512_set1_epi32(-sum[t]);
            __m512i v = _mm512_add_epi32(before, _mm512_load_si512(y[t] + r));
            _mm512_mask_storeu_epi32(acc + r, inside, v);
        }
}

static void dot_avx512(
    const bn_ternary *w, const bn_tokens *x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    int32_t *acc, int64_t ld, void *scratch
) {
    if (w->packed && m1 - m0 <= FEW) {
        dot_few(w, x, m0, m1, n0, n1, acc, ld);
        return;
    }
    block *b = scratch;
    int64_t end = w->packed ? x->stride / 4 : x->stride, step = w->packed ? 64 : BLOCK;
    int64_t tiles = (m1 - m0 + TILE - 1) / TILE, rows = n1 - n0;
    for (int64_t i = 0; i < end; i += step) {
        if (w->packed)
            block_of_packed(w, x, m0, m1, n0, n1, i, b);
        else
            block_of_planes(w, x, m0, m1, n0, n1, i, b);
        for (int64_t tile = 0; tile < tiles; tile++) {
            int64_t m = (m1 - m0) * tile / tiles, tokens = (m1 - m0) * (tile + 1) / tiles - m;
            multiply(b, m, tokens, i == 0, x->sum + m0 + m, rows, acc + m * ld, ld);
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

const bn_products bn_products_avx512 = {
    .dot = dot_avx512,
    .addsub = addsub_avx512,
    .bits = addsub_bits_avx512,
    .rescale = rescale,
};
#endif
