#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

/* Rounds of waiting awake. Between two runs: some ten microseconds, then a thread offers its core at every look, to torch's
 * threads among others, for about as long as a caller needs from one token to the next; then it sleeps, and is slow to wake.
 * Inside a run: about a millisecond, then it offers its core at every look; or on a machine with more work than cores it
 * would keep from running the very thread that it waits for. */
enum { IDLE_ROUNDS = 2000, OFFER_ROUNDS = 1000, BARRIER_ROUNDS = 20000, MOST_THREADS = 256 };

typedef struct {
    int thread;
    atomic_uint run; /* counts the runs that this worker takes part in */
    atomic_int asleep;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    char apart[64]; /* no two workers on one cache line */
} Worker;

static Worker *workers[MOST_THREADS];
static pid_t owner; /* a forked child has no threads of its parent */
static Work work;
static void *context;
static int threads = 1;
static atomic_int arrived;
static atomic_uint barrier;

static inline void pause_core(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

int pool_threads(void) { return threads; }

void pool_barrier(void) {
    const int all = threads; /* once: the last one to come may begin another run, of other threads */
    if (all == 1) return;
    unsigned before = atomic_load_explicit(&barrier, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&arrived, 1, memory_order_acq_rel) == all - 1) {
        atomic_store_explicit(&arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&barrier, before + 1, memory_order_release);
        return;
    }
    for (int i = 0; atomic_load_explicit(&barrier, memory_order_acquire) == before; i++) {
        if (i < BARRIER_ROUNDS) pause_core();
        else sched_yield();
    }
}

static void *serve(void *argument) {
    Worker *self = argument;
    for (unsigned done = 0;; done++) {
        for (int i = 0; i < IDLE_ROUNDS && atomic_load_explicit(&self->run, memory_order_acquire) == done; i++) pause_core();
        for (int i = 0; i < OFFER_ROUNDS && atomic_load_explicit(&self->run, memory_order_acquire) == done; i++) sched_yield();
        if (atomic_load_explicit(&self->run, memory_order_acquire) == done) {
            pthread_mutex_lock(&self->lock);
            atomic_store(&self->asleep, 1);
            while (atomic_load(&self->run) == done) pthread_cond_wait(&self->wake, &self->lock);
            atomic_store(&self->asleep, 0);
            pthread_mutex_unlock(&self->lock);
        }
        work(context, self->thread);
        pool_barrier();
    }
    return NULL;
}

static Worker *start(int thread) {
    Worker *worker = calloc(1, sizeof *worker);
    if (!worker) return NULL;
    worker->thread = thread;
    pthread_mutex_init(&worker->lock, NULL);
    pthread_cond_init(&worker->wake, NULL);
    pthread_t handle;
    if (pthread_create(&handle, NULL, serve, worker)) {
        free(worker);
        return NULL;
    }
    pthread_detach(handle);
    return worker;
}

void pool_run(Work given, void *given_context, int wanted) {
    if (owner != getpid()) {
        for (int i = 0; i < MOST_THREADS; i++) workers[i] = NULL;
        owner = getpid();
        atomic_store(&arrived, 0);
    }
    if (wanted > MOST_THREADS) wanted = MOST_THREADS;
    int have = 1;
    while (have < wanted && (workers[have] || (workers[have] = start(have)))) have++;
    threads = have; /* fewer, if the system gives no more */
    work = given;
    context = given_context;
    for (int i = 1; i < threads; i++) {
        atomic_fetch_add(&workers[i]->run, 1);
        if (atomic_load(&workers[i]->asleep)) {
            pthread_mutex_lock(&workers[i]->lock);
            pthread_cond_signal(&workers[i]->wake);
            pthread_mutex_unlock(&workers[i]->lock);
        }
    }
    work(context, 0);
    pool_barrier();
}
