/* check [CASES [SEED]]: every function of every instruction set that this CPU runs. Exits with 1 at
 * the first difference. Also the tools of the checks. */
#define _DEFAULT_SOURCE
#include "check.h"

#include <sys/mman.h>
#include <unistd.h>

/* Memory */

static struct {
    void *start;
    size_t bytes;
} blocks[256];
static int n_blocks;

void *memory(size_t bytes, size_t alignment) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (bytes + page - 1) / page;
    size_t all = (pages + 1) * page;
    char *start =
        mmap(NULL, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED || n_blocks == 256 || mprotect(start + pages * page, page, PROT_NONE)) {
        perror("memory");
        exit(2);
    }
    blocks[n_blocks].start = start;
    blocks[n_blocks++].bytes = all;
    memset(start, 0xa5, pages * page);
    return start + (pages * page - bytes) / alignment * alignment;
}

void forget(void) {
    while (n_blocks > 0) {
        n_blocks--;
        munmap(blocks[n_blocks].start, blocks[n_blocks].bytes);
    }
}

/* Random numbers (xorshift64*) */

static uint64_t state;

uint64_t draw(void) {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 2685821657736338717u;
}

int64_t below(int64_t count) { return (int64_t)((draw() >> 11) % (uint64_t)count); }

int64_t size_up_to(int64_t most) {
    int64_t size;
    switch (below(4)) {
    case 0: size = 1 + below(most); break;
    case 1: size = 64 * (1 + below(most / 64 + 1)) - 1 + below(3); break;
    case 2: size = 1 + below(most < 8 ? most : 8); break;
    default: size = 1 + below(most < 200 ? most : 200); break;
    }
    return size < 1 ? 1 : size > most ? most : size;
}

float uniform(void) { return (float)((double)(draw() >> 11) / 9007199254740992.0 * 2 - 1); }

float any_float(void) {
    for (;;) {
        uint32_t bits = (uint32_t)draw();
        float x;
        memcpy(&x, &bits, sizeof x);
        if (isfinite(x)) return x;
    }
}

void fill(float *x, int64_t count) {
    int64_t kind = below(12);
    float size = ldexpf(1, (int)below(40) - 20);
    for (int64_t i = 0; i < count; i++) switch (kind) {
        case 0: x[i] = any_float(); break;
        case 1: x[i] = 0; break;
        case 2: x[i] = ldexpf(uniform(), -140); break; /* subnormal */
        case 3: x[i] = uniform() * 3e38f; break;
        case 4: x[i] = (float)(below(255) - 127) / 2; break; /* halves of codes: ties */
        case 5: x[i] = below(50) ? 0 : uniform(); break;
        case 6: x[i] = i == count / 2 ? 1000 : uniform(); break; /* an outlier */
        default: x[i] = uniform() * size; break;
        }
}

void fill_codes(int8_t *x, int64_t count) {
    int64_t kind = below(6);
    for (int64_t i = 0; i < count; i++)
        x[i] = kind == 0 ? 127 : kind == 1 ? -127 : kind == 2 ? 0 : (int8_t)(below(255) - 127);
}

/* Comparisons */

int differ(const char *what, const float *got, const float *expected, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (memcmp(got + i, expected + i, sizeof *got) && !(isnan(got[i]) && isnan(expected[i]))) {
            printf(
                "%s: element %lld of %lld is %.9g, expected %.9g\n", what, (long long)i,
                (long long)count, (double)got[i], (double)expected[i]
            );
            return 1;
        }
    return 0;
}

int differ_bytes(const char *what, const void *got, const void *expected, size_t count) {
    const unsigned char *g = got, *e = expected;
    for (size_t i = 0; i < count; i++)
        if (g[i] != e[i]) {
            printf("%s: byte %zu of %zu is %#x, expected %#x\n", what, i, count, g[i], e[i]);
            return 1;
        }
    return 0;
}

int differ_by(
    const char *what, const float *got, const double *expected, const double *bound, int64_t count
) {
    for (int64_t i = 0; i < count; i++)
        if (!(fabs((double)got[i] - expected[i]) <= bound[i])) {
            printf(
                "%s: element %lld of %lld is %.9g, expected %.9g within %.3g\n", what, (long long)i,
                (long long)count, (double)got[i], expected[i], bound[i]
            );
            return 1;
        }
    return 0;
}

/* References */

/* The multiple of a unit that is nearest to a number, the even one of two, with `fraction` bits
 * below the unit. */
static uint32_t nearest_even(uint32_t number, int fraction) {
    if (fraction > 31) return 0;
    uint32_t whole = number >> fraction, rest = number - (whole << fraction);
    uint32_t half = 1u << (fraction - 1);
    return whole + (rest > half || (rest == half && (whole & 1)));
}

uint16_t bf16_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (isnan(x)) return 0x7fc0;
    return (uint16_t)nearest_even(bits, 16);
}

float of_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

uint16_t f16_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    if (isnan(x)) return 0x7e00;
    int exponent = (int)(bits >> 23 & 0xff) - 127;
    uint32_t mantissa = (bits & 0x7fffff) | 0x800000;
    if (exponent > 15) return sign | 0x7c00;
    /* The unit is 2^(exponent - 10), and 2^-24 at least; a carry runs into the exponent. */
    if (exponent >= -14)
        return sign | (uint16_t)(((uint32_t)(exponent + 14) << 10) + nearest_even(mantissa, 13));
    return sign | (uint16_t)nearest_even(mantissa, -1 - exponent);
}

float of_f16(uint16_t half) {
    int exponent = half >> 10 & 31;
    float sign = half & 0x8000 ? -1 : 1, mantissa = (float)(half & 0x3ff);
    if (exponent == 31) return mantissa != 0 ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * ldexpf(mantissa, -24);
    return sign * ldexpf(mantissa + 1024, exponent - 25);
}

int32_t quant_of(const float *x, int64_t k, int8_t *codes, float *scale) {
    float largest = 0;
    int32_t sum = 0;
    bool finite = true;
    for (int64_t i = 0; i < k; i++) {
        finite = finite && isfinite(x[i]);
        if (fabsf(x[i]) > largest) largest = fabsf(x[i]);
    }
    *scale = finite ? (largest > 1e-5f ? largest : 1e-5f) / 127.0f : NAN;
    for (int64_t i = 0; i < k; i++) {
        codes[i] = (int8_t)(finite ? nearbyintf(x[i] / *scale) : 0);
        sum += codes[i];
    }
    return sum;
}

int main(int count, char **words) {
    long cases = count > 1 ? atol(words[1]) : 1000, seed = count > 2 ? atol(words[2]) : 1;
    int failed = 0;
    setvbuf(stdout, NULL, _IOLBF, 0); /* a crash does not lose what was printed */
    state = 0x9e3779b97f4a7c15u * (uint64_t)(seed + 1);
    use_plain_threads();
    for (int32_t i = 0; bn_isa_name(i) != NULL; i++) {
        const char *name = bn_isa_name(i);
        if (!bn_isa_use(name)) return 1;
        const bn_isa *isa = bn_isa_current();
        for (long j = 0; j < cases && !failed; j++) {
            failed = check_products(isa->products) || check_share(isa->products) ||
                     check_rows(isa->rows) || check_dense(isa->rows) || check_attend(isa->rows);
            forget();
            if (failed) printf("%s: case %ld of seed %ld\n", name, j, seed);
        }
        if (failed) return 1;
        printf("%s: %ld cases are equal\n", name, cases);
    }
    if (check_threads()) return 1;
    printf("threads: all arrive at every barrier\n");
    return 0;
}
