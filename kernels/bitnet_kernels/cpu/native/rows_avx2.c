#if defined(__x86_64__)
#include "internal.h"

const bn_rows bn_rows_avx2 = {0};
#endif
