#include "internal.h"

const bn_rows bn_rows_portable = {0};
