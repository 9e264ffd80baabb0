#if defined(__x86_64__)
#include "internal.h"

const bn_products bn_products_avx512 = {
    .dot = bn_dot_portable,
    .addsub = bn_addsub_portable,
    .bits = bn_bits_portable,
    .rescale = bn_rescale_portable,
};
#endif
