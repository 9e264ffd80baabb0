/* Compares the functions of every instruction set with plain C. Linked with the library's sources,
 * without Python and torch, so that it runs where they do not: under an emulator or a sanitizer.
 *
 * Each check draws one case of random shape and values, calls a table's functions and returns 0, or
 * prints the first difference and returns 1.
 */
#ifndef BITNET_CHECK_H
#define BITNET_CHECK_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

/* Memory of one case; `bytes` end where an unreadable page begins, so that a read or write past the
 * end is a crash. Aligned to `alignment` (a divisor of the page) as far as that allows, and filled
 * with 0xa5. */
void *memory(size_t bytes, size_t alignment);
#define NEW(type, count) ((type *)memory((size_t)(count) * sizeof(type), _Alignof(type)))
/* Return all of it. */
void forget(void);

/* Random numbers */
uint64_t draw(void);
int64_t below(int64_t count); /* 0 to count - 1 */
int64_t size_up_to(int64_t most); /* 1 to most, mostly small, with multiples of 64 and neighbours */
float uniform(void); /* -1 to 1 */
float any_float(void); /* of any magnitude, also 0, -0 and subnormal; finite */
void fill(float *x, int64_t count); /* one of several kinds of data; finite */
void fill_codes(int8_t *x, int64_t count); /* -127 to 127; sometimes the extremes alone */

/* Comparisons: 1 and a line if they differ. Equal bits, but any NaN equals any other. */
int differ(const char *what, const float *got, const float *expected, int64_t count);
int differ_bytes(const char *what, const void *got, const void *expected, size_t count);
int differ_by(
    const char *what, const float *got, const double *expected, const double *bound, int64_t count
);

/* References that several checks need */
uint16_t bf16_of(float x);
float of_bf16(uint16_t bits);
uint16_t f16_of(float x);
float of_f16(uint16_t bits);
int32_t quant_of(const float *x, int64_t k, int8_t *codes, float *scale);

/* The checks */
int check_products(const bn_products *table);
int check_share(const bn_products *table);
int check_rows(const bn_rows *table);
int check_dense(const bn_rows *table);
int check_attend(const bn_rows *table);
int check_threads(void);

/* An OpenMP runtime of plain threads. */
void use_plain_threads(void);

#endif
