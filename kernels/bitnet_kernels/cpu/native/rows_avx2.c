#if defined(__x86_64__)
#include <immintrin.h>

#include "internal.h"

BN_TARGET_BEGIN("avx2,fma,f16c")

#define BN_ROWS_TABLE bn_rows_avx2
#define LANES 8
#define DENSE_ROWS 2
#define DENSE_TOKENS 4
#define ROWS_AHEAD 1024
#define SCORE_COLUMNS 4
#define VALUE_VECTORS 2
typedef __m256 vf;
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define MAX(a, b) _mm256_max_ps(a, b)
static inline vf BF16_LOAD(const void *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16));
}
static inline vf I8_LOAD(const void *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p)));
}
#define F16_LOAD(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define F16_STORE(p, v) _mm_storeu_si128((__m128i *)(p), _mm256_cvtps_ph(v, 0))

static inline void sums8(const vf *a, float *out) {
    __m256 p = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    __m256 r = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
    __m256 q = _mm256_permute2f128_ps(p, r, 0x20), s = _mm256_permute2f128_ps(p, r, 0x31);
    _mm256_storeu_ps(out, _mm256_add_ps(q, s));
}

#define DOT_BYTES 16
#define DOT_BIAS 0
typedef __m256i vdot;
static inline __m256i wide16(const int8_t *p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
}
#define DOT(acc, w, x) _mm256_add_epi32(acc, _mm256_madd_epi16(wide16(w), wide16(x)))
static inline int32_t dot_sum(vdot acc) {
    __m128i a = _mm_add_epi32(_mm256_castsi256_si128(acc), _mm256_extracti128_si256(acc, 1));
    a = _mm_add_epi32(a, _mm_shuffle_epi32(a, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(a, _mm_shuffle_epi32(a, 0xb1)));
}

#include "rows.inc.h"

BN_TARGET_END
#endif
