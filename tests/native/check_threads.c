/* Threads: a plain stand-in for the OpenMP runtime, and the barrier. */
#include "check.h"

#include <pthread.h>
#include <stdatomic.h>

#define MOST 16
#define ROUNDS 2000

static _Thread_local int index_here = 0, size_here = 1;
static int thread_num(void) { return index_here; }
static int num_threads(void) { return size_here; }

typedef struct {
    void (*task)(void *);
    void *argument;
    int index, size;
} member;

static void *start(void *argument) {
    member *m = argument;
    index_here = m->index, size_here = m->size;
    m->task(m->argument);
    index_here = 0, size_here = 1;
    return NULL;
}

/* As GOMP_parallel, but with new threads each time. */
static void parallel(void (*task)(void *), void *argument, unsigned threads, unsigned flags) {
    (void)flags;
    pthread_t ids[MOST];
    member members[MOST];
    int size = threads < MOST ? (int)threads : MOST;
    for (int i = 0; i < size; i++) members[i] = (member){task, argument, i, size};
    for (int i = 1; i < size; i++)
        if (pthread_create(&ids[i], NULL, start, &members[i])) {
            perror("pthread_create");
            exit(2);
        }
    start(&members[0]);
    for (int i = 1; i < size; i++) pthread_join(ids[i], NULL);
}

void use_plain_threads(void) {
    void (*p)(void (*)(void *), void *, unsigned, unsigned) = parallel;
    int (*number)(void) = thread_num, (*size)(void) = num_threads;
    bn_use_openmp(*(void **)&p, *(void **)&number, *(void **)&size);
}

/* Each thread adds to its own number before the barrier and reads its neighbour's after it. */
static long numbers[MOST];
static atomic_long wrong;

static void take_turns(const bn_team *team, void *argument) {
    (void)argument;
    for (long round = 1; round <= ROUNDS; round++) {
        numbers[team->index] = round;
        bn_wait(team);
        if (numbers[(team->index + 1) % team->size] != round) atomic_fetch_add(&wrong, 1);
        bn_wait(team);
    }
}

int check_threads(void) {
    for (int32_t threads = 1; threads <= 7; threads += 2) {
        memset(numbers, 0, sizeof numbers);
        bn_parallel(take_turns, NULL, threads);
        if (wrong || numbers[threads - 1] != ROUNDS) {
            printf("threads: %ld of %d threads passed a barrier too early\n", (long)wrong, threads);
            return 1;
        }
    }
    return 0;
}
