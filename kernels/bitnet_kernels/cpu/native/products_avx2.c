#if defined(__x86_64__)
#include "internal.h"

const bn_products bn_products_avx2 = {0};
#endif
