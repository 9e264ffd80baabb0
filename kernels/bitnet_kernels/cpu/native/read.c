/* The cost of reading memory, to compare with kernels whose weights come from memory. */
#include "internal.h"

#define WORDS 32 /* four cache lines per turn: their loads overlap */

typedef struct {
    const uint64_t *words;
    int64_t n;
    _Alignas(BN_CACHE_LINE) _Atomic uint64_t sum;
} read_job;

static void read_share(const bn_team *team, void *argument) {
    read_job *job = argument;
    uint64_t sums[WORDS] = {0}, sum = 0;
    int64_t i, end;
    bn_share(team, job->n, WORDS, &i, &end);
    for (; i + WORDS <= end; i += WORDS)
        for (int64_t j = 0; j < WORDS; j++) sums[j] += job->words[i + j];
    for (; i < end; i++) sum += job->words[i];
    for (int64_t j = 0; j < WORDS; j++) sum += sums[j];
    job->sum += sum;
}

uint64_t bn_read(const void *memory, int64_t bytes, int32_t threads) {
    read_job job = {memory, bytes / 8, 0};
    bn_parallel(read_share, &job, threads);
    return job.sum;
}
