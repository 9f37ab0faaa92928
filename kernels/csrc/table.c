/*
 * Lookups in the pool's index (pdtransport/pool/core/index.py has the same in numpy): a chained hash table of 32-byte
 * keys in flat arrays. A large table does not fit the cache, and a key costs a miss in each array. So many keys are
 * looked up together, and each step prefetches for all of them what the next step reads.
 */
#include <stdint.h>
#include <string.h>

#define API __attribute__((visibility("default")))
#define WORDS 4 /* of a key */
#define TOGETHER 32

#if defined(__GNUC__)
#define FETCH(address) __builtin_prefetch(address)
#else
#define FETCH(address) ((void)(address))
#endif

typedef struct {
    const uint64_t *multipliers; /* WORDS */
    uint64_t shift;
    const uint64_t *keys;  /* per entry, WORDS each */
    const int32_t *heads;  /* per bucket: its first entry, -1: none */
    const int32_t *chain;  /* per entry: the next entry of its bucket */
    const uint8_t *tiers;  /* per entry */
} table_t;

/* Writes the entry of each of `count` keys to `out`, -1 if there is none. */
API void pdt_find(const table_t *t, const uint64_t *keys, uint64_t count, int32_t *out) {
    uint64_t buckets[TOGETHER];
    for (uint64_t first = 0; first < count; first += TOGETHER) {
        uint64_t n = count - first < TOGETHER ? count - first : TOGETHER;
        const uint64_t *wanted = keys + first * WORDS;
        for (uint64_t i = 0; i < n; i++) {
            uint64_t sum = 0;
            for (int w = 0; w < WORDS; w++) sum += wanted[i * WORDS + w] * t->multipliers[w];
            buckets[i] = sum >> t->shift;
            FETCH(&t->heads[buckets[i]]);
        }
        for (uint64_t i = 0; i < n; i++) {
            int32_t entry = out[first + i] = t->heads[buckets[i]];
            if (entry < 0) continue;
            FETCH(&t->keys[(uint64_t)entry * WORDS]);
            FETCH(&t->chain[entry]);
            FETCH(&t->tiers[entry]);
        }
        for (uint64_t i = 0; i < n; i++) {
            int32_t entry = out[first + i];
            while (entry >= 0 && memcmp(&t->keys[(uint64_t)entry * WORDS], wanted + i * WORDS, 8 * WORDS))
                entry = t->chain[entry];
            out[first + i] = entry;
        }
    }
}

/* Length of the prefix of `entries` that exists in one of the tiers `reachable`; writes to `in_memory` how many of
 * these are in one of the tiers `memory`. */
API uint64_t pdt_prefix(const table_t *t, const int32_t *entries, uint64_t count, uint8_t reachable, uint8_t memory,
                        uint64_t *in_memory) {
    uint64_t there = 0, held = 0;
    while (there < count && entries[there] >= 0 && t->tiers[entries[there]] & reachable)
        held += (t->tiers[entries[there++]] & memory) != 0;
    *in_memory = held;
    return there;
}
