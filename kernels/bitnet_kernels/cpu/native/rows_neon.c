#if defined(__aarch64__)
#include <string.h>

#include "neon.h"

BN_NEON_BEGIN

#define BN_ROWS_TABLE bn_rows_neon
#define LANES 4
#define DENSE_ROWS 4
#define DENSE_TOKENS 4
#define ROWS_AHEAD 0
#define SCORE_COLUMNS 8
#define VALUE_VECTORS 4
typedef float32x4_t vf;
#define FMA(a, b, c) vfmaq_f32(c, a, b)
#define MAX(a, b) vmaxq_f32(a, b)
#define BF16_LOAD(p) vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t *)(p)), 16))
static inline vf I8_LOAD(const void *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8((uint32_t)four)))));
}
#define F16_LOAD(p) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)(p))))
#define F16_STORE(p, v) vst1_u16((uint16_t *)(p), vreinterpret_u16_f16(vcvt_f16_f32(v)))

static inline void sums8(const vf *a, float *out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3])));
    vst1q_f32(out + 4, vpaddq_f32(vpaddq_f32(a[4], a[5]), vpaddq_f32(a[6], a[7])));
}

#define DOT_BYTES 16
#define DOT_BIAS 0
typedef int32x4_t vdot;
#define DOT(acc, w, x) bn_dot16(acc, vld1q_s8(w), vld1q_s8(x))
static inline int32_t dot_sum(vdot acc) { return vaddvq_s32(acc); }

#include "rows.inc.h"

BN_TARGET_END
#endif
