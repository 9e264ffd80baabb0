/* The ABI of the native CPU library: all that Python calls.
 *
 * Plain C, without Python.h and torch. Python checks shapes, dtypes and pointers before a call;
 * the library trusts them. Matrices are row-major. M tokens, K in_features, N out_features.
 *
 * `threads` is the number to run on, the calling one among them; fewer may come.
 */
#ifndef BITNET_CPU_H
#define BITNET_CPU_H

#include <stdint.h>

#if defined(_WIN32)
#define BN_API __declspec(dllexport)
#else
#define BN_API __attribute__((visibility("default")))
#endif

/* Grows with every change of this file; native.py refuses a library of another version. */
#define BN_ABI 1

BN_API int32_t bn_abi(void);

/* Instruction sets (isa.c) */

/* The name of number i, best first, or NULL past the last one that this CPU runs. */
BN_API const char *bn_isa_name(int32_t i);
/* Use the instruction set of that name from now on; 0 if this CPU does not run it. */
BN_API int32_t bn_isa_use(const char *name);
/* The name of the one in use. */
BN_API const char *bn_isa_used(void);

/* Threads (threads.c) */

/* Hand over the OpenMP runtime of the process: the addresses of GOMP_parallel,
 * omp_get_thread_num and omp_get_num_threads. Until then everything runs on one thread. */
BN_API void bn_use_openmp(void *parallel, void *thread_num, void *num_threads);

#endif
