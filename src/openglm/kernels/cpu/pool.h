/* Threads that run one function together, with barriers inside it. */
#ifndef OPENGLM_POOL_H
#define OPENGLM_POOL_H

typedef void (*Work)(void *context, int thread);

/* Run work on this many threads, the caller being thread 0. One call at a time. */
void pool_run(Work work, void *context, int threads);
/* How many take part in the present run: fewer than asked for, if the system gives no more. */
int pool_threads(void);
/* Wait inside work until all threads of this run are here. */
void pool_barrier(void);

#endif
