#if defined(__aarch64__)
#include "internal.h"

const bn_rows bn_rows_neon = {0};
#endif
