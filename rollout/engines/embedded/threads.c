/* The threads of a model: the caller of a step and some helpers share the pieces of a job.
 *
 * A job is cut into pieces whose results do not depend on who computes them: rows of a matrix, tokens, sequences, never
 * a part of a sum. Whoever is free takes the next piece, so a helper that the kernel has put aside delays nobody but for
 * a piece that it has begun. The caller works too and never waits for a helper to come: in the child of a fork, where no
 * helpers live, it does everything by itself.
 *
 * A helper spins for some microseconds after a piece, because the next job follows that soon within a step, and then
 * sleeps: between steps no thread burns anything.
 */
#define _DEFAULT_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

#include "model.h"
#include "simd.h"

enum { SPINS = 400 };

struct v4_pool {
    v4_piece *piece;                 /* these three belong to the job: written before `unclaimed`, read after a claim */
    void *job;
    int32_t pieces_count, helpers_count;
    _Alignas(64) atomic_int unclaimed;
    _Alignas(64) atomic_int unfinished;
    _Alignas(64) atomic_int sleepers; /* helpers that nobody has woken yet */
    atomic_int is_closing, helpers_named;
    pthread_mutex_t lock;
    pthread_cond_t work;
    int forks;                       /* `forks` when the helpers were made */
    pthread_t helpers[V4_THREADS_MAX];
};

static atomic_int forks;             /* how many lie between the first process of this program and the one we run in */

static void count_fork(void) { atomic_fetch_add(&forks, 1); }

static int are_forks_watched;

static void watch_forks(void) { are_forks_watched = !pthread_atfork(NULL, NULL, count_fork); }

static int has_helpers(const v4_pool *pool) { return pool && pool->helpers_count && pool->forks == atomic_load(&forks); }

static void rest(void) {
#ifdef V4_X86
    _mm_pause();
#endif
}

/* Take the next piece and compute it; 0 if there is none. */
static int take_piece(v4_pool *pool, int thread) {
    int left = atomic_load_explicit(&pool->unclaimed, memory_order_relaxed);
    do {
        if (left == 0) return 0;
    } while (!atomic_compare_exchange_weak_explicit(&pool->unclaimed, &left, left - 1, memory_order_acquire,
                                                    memory_order_relaxed));
    pool->piece(pool->job, pool->pieces_count - left, thread);
    atomic_fetch_sub_explicit(&pool->unfinished, 1, memory_order_release);
    return 1;
}

static int has_news(v4_pool *pool) { return atomic_load(&pool->unclaimed) || atomic_load(&pool->is_closing); }

/* Counting itself as asleep and then looking once more, against a caller that publishes and then counts the sleepers:
 * one of the two sees the other. */
static void sleep_for_news(v4_pool *pool) {
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(&pool->sleepers, 1);
    if (!has_news(pool)) pthread_cond_wait(&pool->work, &pool->lock); /* once: who was woken spins for the next job */
    pthread_mutex_unlock(&pool->lock);
}

static void *help(void *argument) {
    v4_pool *pool = argument;
    int thread = 1 + atomic_fetch_add(&pool->helpers_named, 1);
#ifdef __linux__
    (void)prctl(PR_SET_NAME, "engine-helper"); /* who asks the system what takes so long, is told */
#endif
    while (!atomic_load_explicit(&pool->is_closing, memory_order_relaxed)) {
        if (take_piece(pool, thread)) continue;
        int spins = 0;
        for (; spins < SPINS && !has_news(pool); spins++) rest();
        if (spins == SPINS) sleep_for_news(pool);
    }
    return NULL;
}

static void wake(v4_pool *pool) {
    if (!atomic_load(&pool->sleepers)) return;
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->sleepers, 0);
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
}

void v4_share(v4_pool *pool, int count, v4_piece *piece, void *job) {
    if (count == 1 || !has_helpers(pool)) {
        for (int i = 0; i < count; i++) piece(job, i, 0);
        return;
    }
    pool->piece = piece;
    pool->job = job;
    pool->pieces_count = count;
    atomic_store_explicit(&pool->unfinished, count, memory_order_relaxed);
    atomic_store(&pool->unclaimed, count);
    wake(pool);
    while (take_piece(pool, 0)) continue;
    for (int spins = 0; atomic_load_explicit(&pool->unfinished, memory_order_acquire); spins++)
        if (spins < SPINS) rest();
        else sched_yield(); /* whoever has the last piece may be waiting for this very processor */
}

v4_pool *v4_pool_create(int threads_count) {
    v4_pool *pool = aligned_alloc(64, sizeof *pool);
    if (!pool) return NULL;
    memset(pool, 0, sizeof *pool);
    static pthread_once_t watched = PTHREAD_ONCE_INIT;
    pthread_once(&watched, watch_forks);
    pool->forks = atomic_load(&forks);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    sigset_t all, before;
    sigfillset(&all); /* signals are for the threads of whoever loaded us */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (are_forks_watched && pool->helpers_count < threads_count - 1 &&
           !pthread_create(&pool->helpers[pool->helpers_count], NULL, help, pool))
        pool->helpers_count++; /* fewer than asked for are slower, and nothing else */
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return pool;
}

void v4_pool_destroy(v4_pool *pool) {
    if (!pool) return;
    if (has_helpers(pool)) {
        atomic_store(&pool->is_closing, 1);
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->work);
        pthread_mutex_unlock(&pool->lock);
        for (int i = 0; i < pool->helpers_count; i++) pthread_join(pool->helpers[i], NULL);
        pthread_cond_destroy(&pool->work);
        pthread_mutex_destroy(&pool->lock);
    }
    free(pool);
}
