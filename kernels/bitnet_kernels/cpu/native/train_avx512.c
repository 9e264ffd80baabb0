#if defined(__x86_64__)
#include <math.h>
#include <string.h>

#include "internal.h"

#define TABLE bn_training_avx512
BN_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl")
#include "train.inc.h"
BN_TARGET_END
#endif
