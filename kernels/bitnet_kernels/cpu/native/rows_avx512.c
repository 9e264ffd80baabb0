#if defined(__x86_64__)
#include <immintrin.h>

#include "internal.h"

BN_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")

#define BN_ROWS_TABLE bn_rows_avx512
#define LANES 16
#define DENSE_ROWS 2
#define DENSE_TOKENS 8
#define ROWS_AHEAD 0
#define SCORE_COLUMNS 8
#define VALUE_VECTORS 4
typedef __m512 vf;
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define MAX(a, b) _mm512_max_ps(a, b)
static inline vf BF16_LOAD(const void *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16));
}
static inline vf I8_LOAD(const void *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p)));
}
#define F16_LOAD(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define F16_STORE(p, v) _mm256_storeu_si256((__m256i *)(p), _mm512_cvtps_ph(v, 0))

static inline __m256 halves(__m512 a) {
    return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}

static inline void sums8(const vf *a, float *out) {
    __m256 p = _mm256_hadd_ps(halves(a[0]), halves(a[1]));
    __m256 q = _mm256_hadd_ps(halves(a[2]), halves(a[3]));
    __m256 r = _mm256_hadd_ps(halves(a[4]), halves(a[5]));
    __m256 s = _mm256_hadd_ps(halves(a[6]), halves(a[7]));
    p = _mm256_hadd_ps(p, q), r = _mm256_hadd_ps(r, s);
    q = _mm256_permute2f128_ps(p, r, 0x20), s = _mm256_permute2f128_ps(p, r, 0x31);
    _mm256_storeu_ps(out, _mm256_add_ps(q, s));
}

/* vpdpbusd multiplies unsigned by signed: the weights are the unsigned side. */
#define DOT_BYTES 64
#define DOT_BIAS 128
typedef __m512i vdot;
static inline vdot DOT(vdot acc, const void *w, const void *x) {
    __m512i biased = _mm512_xor_si512(_mm512_loadu_si512(w), _mm512_set1_epi8(-128));
    return _mm512_dpbusd_epi32(acc, biased, _mm512_loadu_si512(x));
}
static inline int32_t dot_sum(vdot acc) { return _mm512_reduce_add_epi32(acc); }

#include "rows.inc.h"

BN_TARGET_END
#endif
