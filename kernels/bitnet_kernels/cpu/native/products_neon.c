#if defined(__aarch64__)
#include "internal.h"

const bn_products bn_products_neon = {0};
#endif
