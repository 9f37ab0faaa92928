/*
 * Page kernels for the CPU: copy between two lists of runs, checksum the byte stream that a list of runs
 * describes, and read another process' pages (mapped here, or through the kernel), each in one pass over the bytes.
 *
 * Called through ctypes (see pages.py), which releases the GIL. kernels/README.md defines the checksum; reference.py
 * implements the same in numpy. Functions return 0 or a negative errno; -EINVAL and -EOVERFLOW mean that the lists do
 * not match.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#include "stripes.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the checksum is defined over little-endian words; the numpy reference serves other machines"
#endif

#define API __attribute__((visibility("default")))

#define HASH_CHUNK (16 << 10)        /* bytes copied before they are hashed: they are still in the L1 cache */
#define REMOTE_HASH_CHUNK (256 << 10) /* bytes read from a peer before they are hashed: still in the L2 cache */
#define REMOTE_CHUNK (1 << 20)
#define IOV_LIMIT 1024               /* Linux' IOV_MAX */
#define MAX_THREADS 8
#define STREAM_MIN (256 << 10)       /* streams from this size on bypass the cache */
#define MIN_PART (512 << 10)         /* least bytes per thread: 50 us of copying; starting a thread takes 20 */
#define THREAD_STACK (256 << 10)

typedef struct {
    uint64_t address;
    uint64_t nbytes;
} run_t;

/* ---- checksum ------------------------------------------------------------------------------------------------ */

/* Selects the processor's widest instruction set, at most `level` (0: portable, 1: AVX2, 2: AVX-512); returns it. */
API int pdt_choose(int level) {
    return choose_stripes(level);
}

/* Hashes a stream of equally long blocks incrementally. */
typedef struct {
    uint64_t *out;         /* address for the next block's checksum; NULL: no hashing */
    uint64_t block_bytes;
    uint64_t left;         /* bytes of this block still to come */
    uint64_t stripe;       /* number of the next stripe */
    uint64_t sum;
    uint64_t filled;       /* bytes buffered in `partial` */
    unsigned char partial[STRIPE_BYTES] __attribute__((aligned(64)));
} hasher_t;

static int hasher_start(hasher_t *h, uint64_t total, uint64_t blocks, uint64_t *out) {
    h->out = blocks ? out : NULL;
    if (!blocks) return 0;
    if (!out || total % blocks || (total / blocks) % 8) return -EINVAL;
    h->block_bytes = h->left = total / blocks;
    h->stripe = h->sum = h->filled = 0;
    if (!total)
        for (uint64_t b = 0; b < blocks; b++) out[b] = mix(mix(GOLDEN));
    return 0;
}

static void hasher_end_block(hasher_t *h) {
    if (h->filled) {
        memset(h->partial + h->filled, 0, STRIPE_BYTES - h->filled);
        h->sum += hash_stripes(h->partial, 1, h->stripe);
    }
    *h->out++ = mix(h->sum ^ mix(h->block_bytes + GOLDEN));
    h->left = h->block_bytes;
    h->stripe = h->sum = h->filled = 0;
}

static void hasher_feed(hasher_t *h, const unsigned char *bytes, uint64_t count) {
    while (count) {
        uint64_t take = count < h->left ? count : h->left;
        h->left -= take;
        count -= take;
        if (h->filled) {
            uint64_t room = STRIPE_BYTES - h->filled, more = take < room ? take : room;
            memcpy(h->partial + h->filled, bytes, more);
            h->filled += more, bytes += more, take -= more;
            if (h->filled == STRIPE_BYTES) {
                h->sum += hash_stripes(h->partial, 1, h->stripe++);
                h->filled = 0;
            }
        }
        if (take >= STRIPE_BYTES) {
            uint64_t whole = take / STRIPE_BYTES;
            h->sum += hash_stripes(bytes, whole, h->stripe);
            h->stripe += whole, bytes += whole * STRIPE_BYTES, take -= whole * STRIPE_BYTES;
        }
        if (take) {
            memcpy(h->partial + h->filled, bytes, take);
            h->filled += take, bytes += take;
        }
        if (!h->left) hasher_end_block(h);
    }
}

/* ---- walking runs -------------------------------------------------------------------------------------------- */

typedef struct {
    const run_t *runs;
    uint64_t count, index, offset; /* the next byte is runs[index].address + offset */
} cursor_t;

static uint64_t cursor_left(cursor_t *c) {
    while (c->index < c->count && c->offset == c->runs[c->index].nbytes) c->index++, c->offset = 0;
    return c->index < c->count ? c->runs[c->index].nbytes - c->offset : 0;
}

static unsigned char *cursor_at(const cursor_t *c) {
    return (unsigned char *)(uintptr_t)(c->runs[c->index].address + c->offset);
}

static int total_of(const run_t *runs, uint64_t count, uint64_t *total) {
    *total = 0;
    for (uint64_t i = 0; i < count; i++)
        if (__builtin_add_overflow(*total, runs[i].nbytes, total)) return -EOVERFLOW;
    return 0;
}

static int same_total(const run_t *a, uint64_t na, const run_t *b, uint64_t nb, uint64_t *total) {
    uint64_t other;
    if (total_of(a, na, total) || total_of(b, nb, &other)) return -EOVERFLOW;
    return *total == other ? 0 : -EINVAL;
}

static void skip(cursor_t *c, uint64_t count) {
    while (count) {
        uint64_t left = cursor_left(c), take = left < count ? left : count;
        c->offset += take;
        count -= take;
    }
}

static void feed_runs(hasher_t *h, cursor_t *c, uint64_t count) {
    if (!h->out) {
        skip(c, count);
        return;
    }
    while (count) {
        uint64_t left = cursor_left(c), take = left < count ? left : count;
        hasher_feed(h, cursor_at(c), take);
        c->offset += take;
        count -= take;
    }
}

/* ---- the API ------------------------------------------------------------------------------------------------- */

/* Checksums of `blocks` equally long blocks of the stream that `runs` describes. */
API int pdt_checksum(const run_t *runs, uint64_t count, uint64_t blocks, uint64_t *out) {
    hasher_t h;
    uint64_t total;
    int error = total_of(runs, count, &total);
    if (!error) error = hasher_start(&h, total, blocks, out);
    if (error || !blocks) return error;
    cursor_t c = {runs, count, 0, 0};
    feed_runs(&h, &c, total);
    return 0;
}

/* Copy stream to stream within this process; with blocks > 0, checksum the bytes at the destination. */
API int pdt_copy(const run_t *src, uint64_t nsrc, const run_t *dst, uint64_t ndst, uint64_t blocks, uint64_t *out) {
    hasher_t h;
    uint64_t total;
    int error = same_total(src, nsrc, dst, ndst, &total);
    if (!error) error = hasher_start(&h, total, blocks, out);
    if (error) return error;
    cursor_t from = {src, nsrc, 0, 0}, to = {dst, ndst, 0, 0};
    while (total) {
        uint64_t a = cursor_left(&from), b = cursor_left(&to), n = a < b ? a : b;
        if (h.out && n > HASH_CHUNK) n = HASH_CHUNK;
        unsigned char *place = cursor_at(&to);
        memcpy(place, cursor_at(&from), n);
        if (h.out) hasher_feed(&h, place, n);
        from.offset += n, to.offset += n, total -= n;
    }
    return 0;
}

static uint64_t fill_iov(cursor_t c, uint64_t limit, struct iovec *iov, int *used) {
    uint64_t bytes = 0;
    int n = 0;
    while (bytes < limit && n < IOV_LIMIT) {
        uint64_t left = cursor_left(&c), take = left < limit - bytes ? left : limit - bytes;
        if (!take) break;
        iov[n++] = (struct iovec){cursor_at(&c), take};
        c.offset += take, bytes += take;
    }
    *used = n;
    return bytes;
}

/* The part of the stream that one thread reads. */
typedef struct {
    pid_t pid; /* process that owns the memory of `from`; 0: mapped here */
    int stream; /* a mapped copy bypasses the cache */
    cursor_t from, to;
    uint64_t bytes;
    hasher_t hasher;
    int error;
} part_t;

/* Copies past the cache where both sides allow it: whole stripes of a block to cache lines of the destination. Returns
 * the number of bytes moved; 0: none can be moved this way from here. */
static uint64_t stream_stretch(hasher_t *h, unsigned char *to, const unsigned char *from, uint64_t n,
                               const unsigned char *next) {
    if ((uintptr_t)to % LINE_BYTES || n < STRIPE_BYTES) return 0;
    if (!h->out) {
        n -= n % STRIPE_BYTES;
        stream_stripes(to, from, n / STRIPE_BYTES, next);
        return n;
    }
    uint64_t whole = (n < h->left ? n : h->left) / STRIPE_BYTES;
    if (!whole || h->filled) return 0;
    h->sum += stream_hash_stripes(to, from, whole, h->stripe, next);
    h->stripe += whole;
    h->left -= whole * STRIPE_BYTES;
    if (!h->left) hasher_end_block(h);
    return whole * STRIPE_BYTES;
}

static void copy_part(part_t *p) {
    while (p->bytes) {
        uint64_t a = cursor_left(&p->from), b = cursor_left(&p->to), n = a < b ? a : b;
        if (n > p->bytes) n = p->bytes;
        const unsigned char *source = cursor_at(&p->from);
        unsigned char *place = cursor_at(&p->to);
        const unsigned char *next = source + n; /* read after this stretch; prefetched */
        if (n == a && p->from.index + 1 < p->from.count)
            next = (const unsigned char *)(uintptr_t)p->from.runs[p->from.index + 1].address;
        uint64_t moved = p->stream ? stream_stretch(&p->hasher, place, source, n, next) : 0;
        if (!moved) {
            moved = n;
            if (p->hasher.out && moved > HASH_CHUNK) moved = HASH_CHUNK;
            if (p->stream && (uintptr_t)place % LINE_BYTES == 0 && n > STRIPE_BYTES) /* up to the next stripe */
                moved = p->hasher.filled && STRIPE_BYTES - p->hasher.filled < n ? STRIPE_BYTES - p->hasher.filled : moved;
            memcpy(place, source, moved);
            if (p->hasher.out) hasher_feed(&p->hasher, place, moved);
        }
        p->from.offset += moved, p->to.offset += moved, p->bytes -= moved;
    }
    stream_fence();
}

static void *read_part(void *argument) {
    part_t *p = argument;
    if (!p->pid) {
        copy_part(p);
        return NULL;
    }
    struct iovec from_iov[IOV_LIMIT], to_iov[IOV_LIMIT];
    while (p->bytes) {
        int nfrom, nto;
        uint64_t limit = p->hasher.out ? REMOTE_HASH_CHUNK : REMOTE_CHUNK;
        if (limit > p->bytes) limit = p->bytes;
        limit = fill_iov(p->from, limit, from_iov, &nfrom);
        fill_iov(p->to, limit, to_iov, &nto); /* the shorter of the two lists ends the call */
        ssize_t got = process_vm_readv(p->pid, to_iov, nto, from_iov, nfrom, 0);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) {
            p->error = got ? -errno : -EIO;
            break;
        }
        p->bytes -= (uint64_t)got;
        feed_runs(&p->hasher, &p->to, (uint64_t)got);
        skip(&p->from, (uint64_t)got);
    }
    return NULL;
}

static int read_parts(part_t *parts, int count) {
    pthread_t threads[MAX_THREADS];
    pthread_attr_t small;
    int started = 0, error = 0;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, THREAD_STACK);
    while (started < count - 1 && !pthread_create(&threads[started], &small, read_part, &parts[started])) started++;
    pthread_attr_destroy(&small);
    for (int i = started; i < count; i++) read_part(&parts[i]); /* all parts if no thread can be started */
    for (int i = 0; i < started; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < count; i++)
        if (parts[i].error && !error) error = parts[i].error;
    return error;
}

/* Does the word at `address` of the peer (pid 0: mapped here) still hold `number`? */
static int ticket_holds(pid_t pid, uint64_t address, uint64_t number) {
    uint64_t found = 0;
    if (!pid) {
        __atomic_thread_fence(__ATOMIC_SEQ_CST); /* order: after earlier reads, before later ones */
        found = __atomic_load_n((const uint64_t *)(uintptr_t)address, __ATOMIC_SEQ_CST);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        return found == number ? 0 : -ESTALE;
    }
    struct iovec to = {&found, sizeof found}, from = {(void *)(uintptr_t)address, sizeof found};
    ssize_t got = process_vm_readv(pid, &to, 1, &from, 1, 0);
    if (got < 0) return errno == EFAULT ? -ESTALE : -errno;
    return got == sizeof found && found == number ? 0 : -ESTALE; /* less: the word ends in an unmapped page */
}

/* Copy from `remote` runs of process `pid` (0: the peer's memory mapped here, at addresses of this process) into `local`
 * runs of this process, directly from page to page, with up to `threads` threads; with blocks > 0, checksum the bytes
 * that arrived. With a ticket_at, returns -ESTALE if the word there did not hold `ticket` before the copy (then nothing
 * was read) and after it (then what was read must be discarded). */
API int pdt_read_remote(int64_t pid, const run_t *remote, uint64_t nremote, const run_t *local, uint64_t nlocal,
                        uint64_t blocks, uint64_t *out, int threads, uint64_t ticket_at, uint64_t ticket) {
    part_t parts[MAX_THREADS];
    uint64_t total;
    int error = same_total(remote, nremote, local, nlocal, &total);
    if (!error) error = hasher_start(&parts[0].hasher, total, blocks, out);
    if (!error && ticket_at) error = ticket_holds((pid_t)pid, ticket_at, ticket);
    if (error || !total) return error;
    uint64_t unit = blocks ? total / blocks : 4096, units = total / unit;
    int count = threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads;
    while (count > 1 && (total / (uint64_t)count < MIN_PART || units < (uint64_t)count)) count--;
    cursor_t from = {remote, nremote, 0, 0}, to = {local, nlocal, 0, 0};
    for (int i = 0; i < count; i++) {
        uint64_t first = units * (uint64_t)i / (uint64_t)count, last = units * (uint64_t)(i + 1) / (uint64_t)count;
        uint64_t bytes = i == count - 1 ? total - first * unit : (last - first) * unit;
        part_t *p = &parts[i];
        p->pid = (pid_t)pid, p->stream = total >= STREAM_MIN, p->from = from, p->to = to, p->bytes = bytes, p->error = 0;
        hasher_start(&p->hasher, total, blocks, out ? out + first : out);
        skip(&from, bytes), skip(&to, bytes);
    }
    error = read_parts(parts, count);
    if (ticket_at && (!error || error == -EFAULT)) {
        int stale = ticket_holds((pid_t)pid, ticket_at, ticket);
        if (stale) error = stale;
    }
    return error;
}

/* Addresses low .. high of a peer, mapped here at an offset of `shift` bytes (modulo 2^64). */
typedef struct {
    uint64_t low, high, shift;
} span_t;

/* Translates `runs` of a peer to addresses here, in `out`; -ENXIO if a run is not within one of `spans` (ascending). */
API int pdt_translate(const run_t *runs, uint64_t count, const span_t *spans, uint64_t nspans, run_t *out) {
    for (uint64_t i = 0; i < count; i++) {
        uint64_t at = runs[i].address, low = 0, high = nspans;
        while (low < high) { /* the first span that begins after the run's address */
            uint64_t middle = (low + high) / 2;
            if (spans[middle].low <= at) low = middle + 1;
            else high = middle;
        }
        if (!low || at > spans[low - 1].high || runs[i].nbytes > spans[low - 1].high - at) return -ENXIO;
        out[i] = (run_t){at + spans[low - 1].shift, runs[i].nbytes};
    }
    return 0;
}

/* For cuLaunchHostFunc: adds 1 to the eventfd given as argument. Needs no GIL; a full counter wakes as well. */
API void pdt_ring(void *eventfd) {
    uint64_t one = 1;
    ssize_t written = write((int)(intptr_t)eventfd, &one, sizeof one);
    (void)written;
}

/* ---- the Python module: exists only so that pages.py can find and load the library ------------------------------ */

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_pages", "C page kernels; call them through pages.py", -1,
                                    NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__pages(void) {
    make_keys();
    pdt_choose(2);
    return PyModule_Create(&module);
}
