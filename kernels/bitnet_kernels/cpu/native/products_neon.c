#if defined(__aarch64__)
#include "internal.h"

const bn_products bn_products_neon = {
    .dot = bn_dot_portable,
    .addsub = bn_addsub_portable,
    .bits = bn_addsub_bits_portable,
    .rescale = bn_rescale_portable,
};
#endif
