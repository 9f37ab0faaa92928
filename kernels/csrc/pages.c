/*
 * Page kernels for the CPU: copy between two lists of runs, checksum the byte stream that a list of runs
 * describes, and read another process' pages, each in one pass over the bytes.
 *
 * Called through ctypes (see pages.py), which lets go of the GIL. kernels/README.md defines the checksum;
 * reference.py says the same in numpy. Functions return 0 or a negative errno; -EINVAL and -EOVERFLOW mean that the
 * lists do not fit together.
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

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the checksum is defined over little-endian words; the numpy reference serves other machines"
#endif

#define API __attribute__((visibility("default")))

#define LANES 128
#define STRIPE_BYTES 1024            /* LANES 64-bit words */
#define HASH_CHUNK (16 << 10)        /* bytes copied before they are hashed: they are still in the L1 cache */
#define REMOTE_HASH_CHUNK (256 << 10) /* bytes read from a peer before they are hashed: still in the L2 cache */
#define REMOTE_CHUNK (1 << 20)
#define IOV_LIMIT 1024               /* Linux' IOV_MAX */
#define MAX_THREADS 8
#define MIN_PART (512 << 10)         /* bytes that are worth a thread: 50 us of copying, starting one takes 20 */
#define THREAD_STACK (256 << 10)
#define GOLDEN 0x9e3779b97f4a7c15ull
#define KEY_SEED 0x7064747061676573ull /* "pdtpages" */

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <immintrin.h>
#else
#define X86 0
#endif

typedef struct {
    uint64_t address;
    uint64_t nbytes;
} run_t;

typedef uint64_t __attribute__((aligned(1), may_alias)) word_t; /* pages may start at any address */

/* ---- checksum ------------------------------------------------------------------------------------------------ */

static uint64_t keys[LANES] __attribute__((aligned(64)));

static inline uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static void make_keys(void) {
    for (int i = 0; i < LANES; i++) keys[i] = mix(KEY_SEED + (uint64_t)(i + 1) * GOLDEN);
}

/* What a stripe of sums `products` and `plain` counts for; `number` is its place in the block, from 1. */
static inline uint64_t stripe_value(uint64_t products, uint64_t plain, uint64_t number) {
    return mix(products + mix(plain + number * GOLDEN));
}

/* hash_stripes(bytes, count, first): sum of the values of `count` whole stripes, the first of which has number `first`
 * in its block. Chosen once, when the module is loaded. */
typedef uint64_t hash_stripes_t(const void *bytes, uint64_t count, uint64_t first);

static uint64_t hash_stripes_portable(const void *bytes, uint64_t count, uint64_t first) {
    const word_t *words = bytes;
    uint64_t sum = 0;
    for (uint64_t s = 1; s <= count; s++, words += LANES) {
        uint64_t products = 0, plain = 0;
        for (int i = 0; i < LANES; i++) {
            uint64_t y = words[i] ^ keys[i];
            products += (uint64_t)(uint32_t)y * (uint32_t)(y >> 32);
            plain += y;
        }
        sum += stripe_value(products, plain, first + s);
    }
    return sum;
}

#if X86
/* Compilers don't see that the product above is one instruction a vector. */
__attribute__((target("avx2"))) static inline uint64_t sum_lanes_256(__m256i v) {
    __m128i half = _mm_add_epi64(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    return (uint64_t)_mm_cvtsi128_si64(half) + (uint64_t)_mm_extract_epi64(half, 1);
}

__attribute__((target("avx2"))) static uint64_t hash_stripes_avx2(const void *bytes, uint64_t count, uint64_t first) {
    const __m256i *words = bytes, *key = (const __m256i *)keys;
    uint64_t sum = 0;
    for (uint64_t s = 1; s <= count; s++, words += LANES / 4) {
        __m256i products = _mm256_setzero_si256(), plain = products;
        for (int i = 0; i < LANES / 4; i++) {
            __m256i y = _mm256_xor_si256(_mm256_loadu_si256(words + i), _mm256_load_si256(key + i));
            products = _mm256_add_epi64(products, _mm256_mul_epu32(y, _mm256_srli_epi64(y, 32)));
            plain = _mm256_add_epi64(plain, y);
        }
        sum += stripe_value(sum_lanes_256(products), sum_lanes_256(plain), first + s);
    }
    return sum;
}

__attribute__((target("avx512f"))) static uint64_t hash_stripes_avx512(const void *bytes, uint64_t count,
                                                                       uint64_t first) {
    const unsigned char *words = bytes;
    uint64_t sum = 0;
    for (uint64_t s = 1; s <= count; s++, words += STRIPE_BYTES) {
        __m512i products = _mm512_setzero_si512(), plain = products;
        for (int i = 0; i < LANES / 8; i++) {
            __m512i y = _mm512_xor_si512(_mm512_loadu_si512(words + 64 * i), _mm512_load_si512(keys + 8 * i));
            products = _mm512_add_epi64(products, _mm512_mul_epu32(y, _mm512_srli_epi64(y, 32)));
            plain = _mm512_add_epi64(plain, y);
        }
        sum += stripe_value((uint64_t)_mm512_reduce_add_epi64(products), (uint64_t)_mm512_reduce_add_epi64(plain),
                            first + s);
    }
    return sum;
}
#endif

static hash_stripes_t *hash_stripes = hash_stripes_portable;

/* The widest that this processor has, at most `level` (0: portable, 1: AVX2, 2: AVX-512); returns the level chosen. */
API int pdt_choose(int level) {
#if X86
    __builtin_cpu_init();
    if (level >= 2 && __builtin_cpu_supports("avx512f")) return hash_stripes = hash_stripes_avx512, 2;
    if (level >= 1 && __builtin_cpu_supports("avx2")) return hash_stripes = hash_stripes_avx2, 1;
#endif
    (void)level;
    return hash_stripes = hash_stripes_portable, 0;
}

/* A stream cut in equally long blocks, hashed as it goes by. */
typedef struct {
    uint64_t *out;         /* where the next block's checksum goes; NULL: nothing is hashed */
    uint64_t block_bytes;
    uint64_t left;         /* bytes of this block still to come */
    uint64_t stripe;       /* number of the next stripe */
    uint64_t sum;
    uint64_t filled;       /* bytes waiting in `partial` */
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

/* Copy stream to stream within this process; with blocks > 0, checksum what now stands at the destination. */
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

/* A stretch of the stream, read by one thread. */
typedef struct {
    pid_t pid;
    cursor_t from, to;
    uint64_t bytes;
    hasher_t hasher;
    int error;
} part_t;

static void *read_part(void *argument) {
    part_t *p = argument;
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
    for (int i = started; i < count; i++) read_part(&parts[i]); /* all of them where no thread is to be had */
    for (int i = 0; i < started; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < count; i++)
        if (parts[i].error && !error) error = parts[i].error;
    return error;
}

/* Does the word at `address` of the peer still hold `number`? */
static int ticket_holds(pid_t pid, uint64_t address, uint64_t number) {
    uint64_t found = 0;
    struct iovec to = {&found, sizeof found}, from = {(void *)(uintptr_t)address, sizeof found};
    if (process_vm_readv(pid, &to, 1, &from, 1, 0) == sizeof found) return found == number ? 0 : -ESTALE;
    return errno == EFAULT ? -ESTALE : -errno;
}

/* Copy from `remote` runs of process `pid` into `local` runs of this one, straight from page to page, by up to
 * `threads` threads; with blocks > 0, checksum what arrived. With a ticket_at, -ESTALE if the word there did not hold
 * `ticket` the whole time: before nothing is read, afterwards nothing that was read counts. */
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
        p->pid = (pid_t)pid, p->from = from, p->to = to, p->bytes = bytes, p->error = 0;
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

/* For cuLaunchHostFunc: adds 1 to the eventfd whose number is the argument. Needs no GIL; a full counter wakes as well. */
API void pdt_ring(void *eventfd) {
    uint64_t one = 1;
    ssize_t written = write((int)(intptr_t)eventfd, &one, sizeof one);
    (void)written;
}

/* ---- the module, which only serves to be found and loaded ------------------------------------------------------ */

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_pages", "C page kernels; call them through pages.py", -1,
                                    NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__pages(void) {
    make_keys();
    pdt_choose(2);
    return PyModule_Create(&module);
}
