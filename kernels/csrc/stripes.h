/*
 * Operations on a stripe of 1024 bytes, for each instruction set: hash it, copy it past the cache, or both at once.
 * kernels/README.md defines the checksum. Only pages.c includes this file.
 *
 * Streaming stores bypass the cache and avoid the read of each cache line with which a plain store begins: a third of a
 * copy's traffic if the pages do not fit the cache. A stripe is hashed from the very registers that are stored.
 */
#ifndef PDT_STRIPES_H
#define PDT_STRIPES_H

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <immintrin.h>
#else
#define X86 0
#endif

#define LANES 128
#define STRIPE_BYTES 1024 /* LANES 64-bit words */
#define LINE_BYTES 64     /* alignment of the destinations of streaming stores */
#define GOLDEN 0x9e3779b97f4a7c15ull
#define KEY_SEED 0x7064747061676573ull /* "pdtpages" */

typedef uint64_t __attribute__((aligned(1), may_alias)) word_t; /* pages may start at any address */

static uint64_t keys[LANES] __attribute__((aligned(64)));

static inline uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static void make_keys(void) {
    for (int i = 0; i < LANES; i++) keys[i] = mix(KEY_SEED + (uint64_t)(i + 1) * GOLDEN);
}

/* Value of a stripe with the sums `products` and `plain`; `number` is its number in the block, from 1. */
static inline uint64_t stripe_value(uint64_t products, uint64_t plain, uint64_t number) {
    return mix(products + mix(plain + number * GOLDEN));
}

/* Sum of the values of `count` whole stripes, the first of which has number `first` (from 0) in its block. */
typedef uint64_t hash_stripes_t(const void *bytes, uint64_t count, uint64_t first);
/* Copies `count` stripes to `to`, a multiple of LINE_BYTES; prefetches `next`, where reading will continue. */
typedef void stream_stripes_t(void *to, const void *bytes, uint64_t count, const void *next);
/* Copies and hashes; returns the result of hash_stripes for the bytes that were stored. */
typedef uint64_t stream_hash_stripes_t(void *to, const void *bytes, uint64_t count, uint64_t first, const void *next);

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

static void stream_stripes_portable(void *to, const void *bytes, uint64_t count, const void *next) {
    (void)next;
    memcpy(to, bytes, count * STRIPE_BYTES);
}

static uint64_t stream_hash_stripes_portable(void *to, const void *bytes, uint64_t count, uint64_t first,
                                             const void *next) {
    uint64_t sum = 0;
    (void)next;
    for (uint64_t s = 0; s < count; s++) { /* one stripe at a time: the hash is of the bytes at the destination */
        unsigned char *place = (unsigned char *)to + s * STRIPE_BYTES;
        memcpy(place, (const unsigned char *)bytes + s * STRIPE_BYTES, STRIPE_BYTES);
        sum += hash_stripes_portable(place, 1, first + s);
    }
    return sum;
}

#if X86
/* Compilers don't see that the product above is one instruction per vector, and might load a word twice: once to hash
 * it and once to store it. ONCE pins a loaded vector to its register, because the peer may write in between. */
#define ONCE(v) __asm__ volatile("" : "+x"(v))

/* One core gets the most memory bandwidth when it reads and writes several memory pages in turn: WEAVE stripes,
 * WEAVE_APART stripes from each other, are processed together as long as there are that many. Their order does not
 * matter, because their values are added up. */
#define WEAVE 4
#define WEAVE_APART 4 /* 4 KiB */
#define WOVEN (WEAVE * WEAVE_APART)

#define DO_VECTOR(VECTOR, LOADU, LOAD, STREAM, XOR, ADD, MUL, SHIFT, AT, PRODUCTS, PLAIN)                              \
    do {                                                                                                               \
        VECTOR a = LOADU((const void *)(from + (AT)));                                                                 \
        if (to) {                                                                                                      \
            ONCE(a);                                                                                                   \
            STREAM((void *)(to + (AT)), a);                                                                            \
        }                                                                                                              \
        if (hash) {                                                                                                    \
            a = XOR(a, LOAD((const void *)(key + i)));                                                                 \
            PRODUCTS = ADD(PRODUCTS, MUL(a, SHIFT(a, 32))), PLAIN = ADD(PLAIN, a);                                     \
        }                                                                                                              \
    } while (0)

/* One loop for each vector width; the compiler drops what a caller's constants rule out. When stripes are processed one
 * by one, two vectors per turn with separate sums hide the latency of an addition. */
#define STRIPES(NAME, TARGET, VECTOR, BYTES, ZERO, LOADU, LOAD, STREAM, XOR, ADD, MUL, SHIFT, SUM)                     \
    __attribute__((target(TARGET), always_inline)) static inline uint64_t NAME(                                        \
        unsigned char *to, const unsigned char *from, uint64_t count, uint64_t first, const unsigned char *next,       \
        int hash) {                                                                                                    \
        const unsigned char *key = (const unsigned char *)keys;                                                        \
        uint64_t sum = 0;                                                                                              \
        for (; count >= WOVEN; count -= WOVEN, first += WOVEN, from += WOVEN * STRIPE_BYTES) {                         \
            const unsigned char *then = count > WOVEN || !next ? from + WOVEN * STRIPE_BYTES : next;                   \
            for (int s = 0; s < WEAVE_APART; s++) {                                                                    \
                VECTOR products[WEAVE], plain[WEAVE];                                                                  \
                for (int w = 0; w < WEAVE; w++) products[w] = plain[w] = ZERO();                                       \
                const unsigned char *ahead = s + 1 < WEAVE_APART ? from + (s + 1) * STRIPE_BYTES : then;               \
                for (int line = 0; line < STRIPE_BYTES; line += LINE_BYTES)                                            \
                    for (int w = 0; w < WEAVE; w++) {                                                                  \
                        int page = w * WEAVE_APART * STRIPE_BYTES;                                                     \
                        _mm_prefetch((const char *)ahead + page + line, _MM_HINT_T0);                                  \
                        for (int i = line; i < line + LINE_BYTES; i += BYTES)                                          \
                            DO_VECTOR(VECTOR, LOADU, LOAD, STREAM, XOR, ADD, MUL, SHIFT, page + s * STRIPE_BYTES + i,  \
                                      products[w], plain[w]);                                                          \
                    }                                                                                                  \
                if (hash)                                                                                              \
                    for (int w = 0; w < WEAVE; w++)                                                                    \
                        sum += stripe_value(SUM(products[w]), SUM(plain[w]), first + w * WEAVE_APART + s + 1);         \
            }                                                                                                          \
            if (to) to += WOVEN * STRIPE_BYTES;                                                                        \
        }                                                                                                              \
        for (uint64_t s = 1; s <= count; s++, from += STRIPE_BYTES) {                                                  \
            const unsigned char *ahead = s < count || !next ? from + STRIPE_BYTES : next;                              \
            VECTOR products_a = ZERO(), products_b = ZERO(), plain_a = ZERO(), plain_b = ZERO();                       \
            for (int i = 0; i < STRIPE_BYTES; i += BYTES) {                                                            \
                if (i % LINE_BYTES == 0) _mm_prefetch((const char *)ahead + i, _MM_HINT_T0);                           \
                if (i / BYTES % 2)                                                                                     \
                    DO_VECTOR(VECTOR, LOADU, LOAD, STREAM, XOR, ADD, MUL, SHIFT, i, products_b, plain_b);              \
                else                                                                                                   \
                    DO_VECTOR(VECTOR, LOADU, LOAD, STREAM, XOR, ADD, MUL, SHIFT, i, products_a, plain_a);              \
            }                                                                                                          \
            if (to) to += STRIPE_BYTES;                                                                                \
            if (hash) sum += stripe_value(SUM(ADD(products_a, products_b)), SUM(ADD(plain_a, plain_b)), first + s);    \
        }                                                                                                              \
        return sum;                                                                                                    \
    }

#define KINDS(SUFFIX, TARGET)                                                                                          \
    __attribute__((target(TARGET))) static uint64_t hash_stripes_##SUFFIX(const void *bytes, uint64_t count,           \
                                                                          uint64_t first) {                            \
        return stripes_##SUFFIX(NULL, bytes, count, first, NULL, 1);                                                   \
    }                                                                                                                  \
    __attribute__((target(TARGET))) static void stream_stripes_##SUFFIX(void *to, const void *bytes, uint64_t count,   \
                                                                        const void *next) {                            \
        stripes_##SUFFIX(to, bytes, count, 0, next, 0);                                                                \
    }                                                                                                                  \
    __attribute__((target(TARGET))) static uint64_t stream_hash_stripes_##SUFFIX(                                      \
        void *to, const void *bytes, uint64_t count, uint64_t first, const void *next) {                               \
        return stripes_##SUFFIX(to, bytes, count, first, next, 1);                                                     \
    }

__attribute__((target("avx2"))) static inline uint64_t sum_lanes_avx2(__m256i v) {
    __m128i half = _mm_add_epi64(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    return (uint64_t)_mm_cvtsi128_si64(half) + (uint64_t)_mm_extract_epi64(half, 1);
}
STRIPES(stripes_avx2, "avx2", __m256i, 32, _mm256_setzero_si256, _mm256_loadu_si256, _mm256_load_si256,
        _mm256_stream_si256, _mm256_xor_si256, _mm256_add_epi64, _mm256_mul_epu32, _mm256_srli_epi64, sum_lanes_avx2)
KINDS(avx2, "avx2")

__attribute__((target("avx512f"))) static inline uint64_t sum_lanes_avx512(__m512i v) {
    /* Not _mm512_reduce_add_epi64: GCC's adds the last two lanes as signed numbers, whose overflow is undefined. */
    return sum_lanes_avx2(_mm256_add_epi64(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1)));
}
STRIPES(stripes_avx512, "avx512f", __m512i, 64, _mm512_setzero_si512, _mm512_loadu_si512, _mm512_load_si512,
        _mm512_stream_si512, _mm512_xor_si512, _mm512_add_epi64, _mm512_mul_epu32, _mm512_srli_epi64, sum_lanes_avx512)
KINDS(avx512, "avx512f")
#endif

/* Chosen once, when the module is loaded. */
static hash_stripes_t *hash_stripes = hash_stripes_portable;
static stream_stripes_t *stream_stripes = stream_stripes_portable;
static stream_hash_stripes_t *stream_hash_stripes = stream_hash_stripes_portable;

#define CHOOSE(SUFFIX)                                                                                                 \
    (hash_stripes = hash_stripes_##SUFFIX, stream_stripes = stream_stripes_##SUFFIX,                                   \
     stream_hash_stripes = stream_hash_stripes_##SUFFIX)

static int choose_stripes(int level) {
#if X86
    __builtin_cpu_init();
    if (level >= 2 && __builtin_cpu_supports("avx512f")) return CHOOSE(avx512), 2;
    if (level >= 1 && __builtin_cpu_supports("avx2")) return CHOOSE(avx2), 1;
#endif
    (void)level;
    return CHOOSE(portable), 0;
}

/* Makes streamed stores visible to all before anything that follows. */
static inline void stream_fence(void) {
#if X86
    _mm_sfence();
#endif
}

#endif
