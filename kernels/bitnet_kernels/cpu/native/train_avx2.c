#if defined(__x86_64__)
#include <math.h>
#include <string.h>

#include "internal.h"

#define TABLE bn_training_avx2
BN_TARGET_BEGIN("avx2,fma")
#include "train.inc.h"
BN_TARGET_END
#endif
