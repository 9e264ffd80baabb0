/* Threads of the OpenMP runtime that is already in the process: torch's own.
 *
 * Linking an OpenMP library could bring a second pool of threads into the process. So native.py
 * finds the runtime that torch loaded and passes three of its functions, whose ABI is fixed (gcc
 * calls GOMP_parallel for `#pragma omp parallel`).
 *
 * A forked child has none of its parent's threads, and GNU OpenMP would wait for them forever. So
 * in a child everything runs on the calling thread.
 */
#include <stdatomic.h>

#include "internal.h"

#if defined(_WIN32)
static void pause_or_yield(int32_t waited) { (void)waited; }
static bool forked(void) { return false; }
static void watch_forks(void) {}
#else
#include <pthread.h>
#include <sched.h>

static atomic_bool in_child;
static void child(void) { in_child = true; }
static bool forked(void) { return in_child; }
static void watch_forks(void) {
    static atomic_bool watched;
    if (!atomic_exchange(&watched, true)) pthread_atfork(NULL, NULL, child);
}

/* Spinning is fastest while every thread has a core. If another process takes a core, the waiting
 * threads must yield theirs, so that the missing thread can run. */
static void pause_or_yield(int32_t waited) {
    if (waited > 4000)
        sched_yield();
    else {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
    }
}
#endif

struct bn_barrier {
    _Alignas(BN_CACHE_LINE) _Atomic int32_t arrived;
    _Alignas(BN_CACHE_LINE) _Atomic int32_t round;
};

typedef struct {
    void (*task)(const bn_team *, void *);
    void *argument;
    struct bn_barrier barrier;
} region;

static void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*thread_num)(void), (*num_threads)(void);

void bn_use_openmp(void *parallel, void *number, void *count) {
    watch_forks();
    *(void **)&gomp_parallel = parallel;
    *(void **)&thread_num = number;
    *(void **)&num_threads = count;
}

static void run(void *argument) {
    region *r = argument;
    bn_team team = {thread_num(), num_threads(), &r->barrier};
    r->task(&team, r->argument);
}

void bn_parallel(void (*task)(const bn_team *, void *), void *argument, int32_t threads) {
    region r = {.task = task, .argument = argument};
    if (threads > 1 && gomp_parallel != NULL && !forked())
        gomp_parallel(run, &r, (unsigned)threads, 0);
    else
        task(&(bn_team){0, 1, &r.barrier}, argument);
}

void bn_wait(const bn_team *team) {
    if (team->size == 1) return;
    struct bn_barrier *b = team->barrier;
    int32_t round = atomic_load_explicit(&b->round, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&b->arrived, 1, memory_order_acq_rel) == team->size - 1) {
        atomic_store_explicit(&b->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&b->round, round + 1, memory_order_release);
        return;
    }
    for (int32_t waited = 0; atomic_load_explicit(&b->round, memory_order_acquire) == round;)
        pause_or_yield(waited < 1 << 30 ? waited++ : waited);
}
