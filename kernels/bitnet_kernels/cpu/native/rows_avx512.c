#if defined(__x86_64__)
#include "internal.h"

const bn_rows bn_rows_avx512 = {0};
#endif
