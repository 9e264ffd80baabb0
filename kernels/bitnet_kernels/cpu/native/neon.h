/* NEON with the dot product of ARMv8.2: the target and the instruction. */
#ifndef BITNET_NEON_H
#define BITNET_NEON_H

#include <arm_neon.h>

#include "internal.h"

#if defined(__clang__)
#define BN_NEON_BEGIN BN_TARGET_BEGIN("dotprod")
#else
#define BN_NEON_BEGIN BN_TARGET_BEGIN("arch=armv8.2-a+dotprod")
#endif

BN_NEON_BEGIN

/* acc[i] += a[4i] b[4i] + ... + a[4i + 3] b[4i + 3], like vdotq_s32, which clang before version 16
 * declares only if the command line names the instruction. */
static inline int32x4_t bn_dot16(int32x4_t acc, int8x16_t a, int8x16_t b) {
#if defined(__clang__) && !defined(__ARM_FEATURE_DOTPROD)
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(a), "w"(b));
    return acc;
#else
    return vdotq_s32(acc, a, b);
#endif
}

BN_TARGET_END

#endif
