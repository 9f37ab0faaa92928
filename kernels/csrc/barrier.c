/*
 * Words that GPU streams wait for (barrier.py), and a watchdog thread that opens barriers at their deadline. The
 * watchdog needs no GIL: a thread that waits for the GPU may hold the GIL, and the threads that would open the barrier
 * may wait for the GIL.
 *
 * A word holds the last ticket that was opened; tickets count up, modulo 2^32.
 */
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#define API __attribute__((visibility("default")))
#define MOST 64 /* barriers closed at a time */

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

/* Opens the ticket, and with it all earlier tickets of this word. Call with the lock held. */
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

/* A forked child has neither the watchdog thread nor the GPU. */
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
    sigfillset(&all); /* this thread must not handle signals */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    watched = pthread_atfork(NULL, NULL, forked) == 0 && pthread_create(&thread, NULL, watch, NULL) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (watched) pthread_detach(thread);
}

/* Registers a ticket, to be opened after `ns` nanoseconds at the latest; -1: it can't be registered. */
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

/* Opens the ticket; 0: it was open already. */
API int pdt_barrier_open(uint32_t *word, uint32_t ticket) {
    int first = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MOST; i++) first |= closed[i].word == word && closed[i].ticket == ticket;
    if (first) let_through(word, ticket);
    pthread_mutex_unlock(&lock);
    return first;
}

/* Opens all tickets of all words. */
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
