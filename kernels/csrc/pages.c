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
#include <stdint.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>

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
#define GOLDEN 0x9e3779b97f4a7c15ull
#define KEY_SEED 0x7064747061676573ull /* "pdtpages" */

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTOR_CLONES
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

/* Sum of the values of `count` whole stripes, the first of which has number `first` in its block. */
VECTOR_CLONES
static uint64_t hash_stripes(const void *bytes, uint64_t count, uint64_t first) {
    const word_t *words = bytes;
    uint64_t sum = 0;
    for (uint64_t s = 0; s < count; s++, words += LANES) {
        uint64_t products = 0, plain = 0;
        for (int i = 0; i < LANES; i++) {
            uint64_t y = words[i] ^ keys[i];
            products += (y & 0xffffffffull) * (y >> 32);
            plain += y;
        }
        sum += mix(products + mix(plain + (first + s + 1) * GOLDEN));
    }
    return sum;
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

static void feed_runs(hasher_t *h, cursor_t *c, uint64_t count) {
    while (count) {
        uint64_t left = cursor_left(c), take = left < count ? left : count;
        if (h->out) hasher_feed(h, cursor_at(c), take);
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

/* Copy from `remote` runs of process `pid` into `local` runs of this one, straight from page to page; with
 * blocks > 0, checksum what arrived. */
API int pdt_read_remote(int64_t pid, const run_t *remote, uint64_t nremote, const run_t *local, uint64_t nlocal,
                        uint64_t blocks, uint64_t *out) {
    hasher_t h;
    uint64_t total;
    int error = same_total(remote, nremote, local, nlocal, &total);
    if (!error) error = hasher_start(&h, total, blocks, out);
    if (error) return error;
    struct iovec from_iov[IOV_LIMIT], to_iov[IOV_LIMIT];
    cursor_t from = {remote, nremote, 0, 0}, to = {local, nlocal, 0, 0};
    while (total) {
        int nfrom, nto;
        uint64_t limit = h.out ? REMOTE_HASH_CHUNK : REMOTE_CHUNK;
        limit = fill_iov(from, limit, from_iov, &nfrom);
        limit = fill_iov(to, limit, to_iov, &nto); /* the shorter of the two lists ends the transfer */
        ssize_t got = process_vm_readv((pid_t)pid, to_iov, nto, from_iov, nfrom, 0);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return -errno;
        if (!got) return -EIO;
        total -= (uint64_t)got;
        feed_runs(&h, &to, (uint64_t)got);
        for (uint64_t n = (uint64_t)got; n;) {
            uint64_t left = cursor_left(&from), take = left < n ? left : n;
            from.offset += take, n -= take;
        }
    }
    return 0;
}

/* ---- the module, which only serves to be found and loaded ------------------------------------------------------ */

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_pages", "C page kernels; call them through pages.py", -1,
                                    NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__pages(void) {
    make_keys();
    return PyModule_Create(&module);
}
