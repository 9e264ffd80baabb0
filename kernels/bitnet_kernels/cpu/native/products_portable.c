#include "internal.h"

const bn_products bn_products_portable = {0};
