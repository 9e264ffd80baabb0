/* Which instruction sets this CPU runs, and which one is in use. */
#include <stdatomic.h>
#include <string.h>
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "internal.h"

static bool always(void) { return true; }

#if defined(__x86_64__)
/* With VNNI and VPOPCNTDQ: Intel from Ice Lake on, AMD from Zen 4 on. */
static bool avx512(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vpopcntdq") &&
           __builtin_cpu_supports("avx512vbmi");
}

/* Intel from Haswell on, AMD from Excavator on. All have F16C, which gcc 12 cannot query. */
static bool avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#elif defined(__aarch64__)
/* With the dot product of ARMv8.2. */
static bool neon(void) {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) >> 20) & 1; /* HWCAP_ASIMDDP */
#elif defined(__APPLE__)
    return true;
#else
    return false;
#endif
}
#endif

/* Best first. */
static const bn_isa all[] = {
#if defined(__x86_64__)
    {"avx512", avx512, &bn_products_avx512, &bn_rows_avx512, &bn_training_avx512},
    {"avx2", avx2, &bn_products_avx2, &bn_rows_avx2, &bn_training_avx2},
#elif defined(__aarch64__)
    {"neon", neon, &bn_products_neon, &bn_rows_neon, &bn_training_portable},
#endif
    {"portable", always, &bn_products_portable, &bn_rows_portable, &bn_training_portable},
};
#define COUNT ((int32_t)(sizeof all / sizeof *all))

static const bn_isa *_Atomic used;

int32_t bn_abi(void) { return BN_ABI; }

const char *bn_isa_name(int32_t i) {
    for (int32_t j = 0; j < COUNT; j++)
        if (all[j].runs() && i-- == 0) return all[j].name;
    return NULL;
}

int32_t bn_isa_use(const char *name) {
    for (int32_t j = 0; j < COUNT; j++)
        if (strcmp(all[j].name, name) == 0 && all[j].runs()) {
            used = &all[j];
            return 1;
        }
    return 0;
}

const char *bn_isa_used(void) { return bn_isa_current()->name; }

int32_t bn_families_share_layout(void) { return bn_isa_current()->products->addsub_packed; }

const bn_isa *bn_isa_current(void) {
    for (int32_t j = 0; used == NULL; j++) /* portable code runs everywhere */
        if (all[j].runs()) used = &all[j];
    return used;
}
