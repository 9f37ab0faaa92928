/*
 * Words that streams of a GPU wait for (barrier.py), and a thread that opens those which nobody opened in time. It needs
 * no interpreter: whoever waits for the GPU may hold that, and those who would open the barrier wait for him.
 *
 * A word holds the last ticket that was let through; tickets count up, modulo 2^32.
 */
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#define API __attribute__((visibility("default")))
#define MOST 64 /* closed at a time */

typedef struct {
    uint32_t *word; /* 0: this entry is free */
    uint32_t ticket;
    uint64_t deadline; /* ns, CLOCK_MONOTONIC */
} closed_t;

static closed_t closed[MOST];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int watched;

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* The stream goes on, and with it what waits for earlier tickets of this word. The lock is held. */
static void let_through(uint32_t *word, uint32_t ticket) {
    for (int i = 0; i < MOST; i++)
        if (closed[i].word == word && (int32_t)(ticket - closed[i].ticket) >= 0) closed[i].word = 0;
    if ((int32_t)(ticket - *word) > 0) __atomic_store_n(word, ticket, __ATOMIC_RELEASE);
}

static void *watch(void *unused) {
    (void)unused;
    pthread_mutex_lock(&lock);
    for (;;) {
        uint64_t now = now_ns(), next = UINT64_MAX;
        for (int i = 0; i < MOST; i++) {
            if (!closed[i].word) continue;
            if (closed[i].deadline <= now)
                let_through(closed[i].word, closed[i].ticket);
            else if (closed[i].deadline < next)
                next = closed[i].deadline;
        }
        if (next == UINT64_MAX) {
            pthread_cond_wait(&changed, &lock);
        } else {
            struct timespec until = {(time_t)(next / 1000000000u), (long)(next % 1000000000u)};
            pthread_cond_timedwait(&changed, &lock, &until);
        }
    }
    return NULL;
}

/* A forked child has neither the thread nor the GPU. */
static void forked(void) {
    pthread_mutex_init(&lock, NULL);
    memset(closed, 0, sizeof closed);
    watched = 0;
}

static void start(void) {
    pthread_condattr_t attributes;
    pthread_t thread;
    sigset_t all, before;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&changed, &attributes);
    pthread_condattr_destroy(&attributes);
    sigfillset(&all); /* signals are for the threads that expect them */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    watched = pthread_atfork(NULL, NULL, forked) == 0 && pthread_create(&thread, NULL, watch, NULL) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (watched) pthread_detach(thread);
}

/* Has the ticket let through in `ns` at the latest; -1: it can't be seen to. */
API int pdt_barrier_close(uint32_t *word, uint32_t ticket, uint64_t ns) {
    int found = -1;
    pthread_once(&once, start);
    if (!watched) return -1;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MOST && found < 0; i++)
        if (!closed[i].word) found = i;
    if (found >= 0) {
        closed[found] = (closed_t){word, ticket, now_ns() + ns};
        pthread_cond_signal(&changed);
    }
    pthread_mutex_unlock(&lock);
    return found < 0 ? -1 : 0;
}

/* Lets the ticket through; 0: it was let through before. */
API int pdt_barrier_open(uint32_t *word, uint32_t ticket) {
    int first = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MOST; i++) first |= closed[i].word == word && closed[i].ticket == ticket;
    if (first) let_through(word, ticket);
    pthread_mutex_unlock(&lock);
    return first;
}

/* Lets all tickets of all words through. */
API int pdt_barriers_let_go(void) {
    int count = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MOST; i++)
        if (closed[i].word) {
            let_through(closed[i].word, closed[i].ticket);
            count++;
        }
    pthread_mutex_unlock(&lock);
    return count;
}
