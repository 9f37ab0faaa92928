/*
 * Page kernels for the GPU: copy the byte stream of one list of pieces into another, checksum it while copying, or
 * checksum it alone. gpu.py compiles this with NVRTC at first use; pieces.py makes the tables; README.md beside them
 * defines the checksum, and reference.py implements the same in numpy.
 *
 * A warp works on tiles of four stripes (4 KiB): each lane has 128 bytes in flight before the first is stored. Warps
 * process up to eight neighbouring tiles per turn. There is no shared memory and no barrier between warps, so that
 * tests/unit/warps.h can run this very source on a CPU.
 *
 * Addresses may be on this device, on a peer's (CUDA IPC), or in mapped pinned host memory. Sources are loaded through
 * the read-only path: if they change while the kernel runs, the result is invalid.
 */
typedef unsigned long long u64;
typedef unsigned int u32;

#define LANES 32u
#define WARPS 8u /* per thread block; with at most 64 registers a thread, four blocks fit on an SM */
#define BLOCKS_PER_SM 4
#define STRIPE 1024ull
#define STRIPES 4u /* per tile */
#define TILE (STRIPES * STRIPE)
#define WORDS 4u /* of a stripe, per lane */
#define GOLDEN 0x9e3779b97f4a7c15ull
#define KEY_SEED 0x7064747061676573ull /* "pdtpages" */
#define ALL 0xffffffffu

#ifndef ON_HOST
/* Each byte is used once: bypass L1, so that the model's data is not evicted from the caches. */
static __device__ __forceinline__ void load16(u64 at, u64 &a, u64 &b) {
    asm volatile("ld.global.nc.L1::no_allocate.v2.u64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(at));
}
static __device__ __forceinline__ void load8(u64 at, u64 &a) {
    asm volatile("ld.global.nc.L1::no_allocate.u64 %0, [%1];" : "=l"(a) : "l"(at));
}
static __device__ __forceinline__ void store16(u64 at, u64 a, u64 b) {
    asm volatile("st.global.cs.v2.u64 [%0], {%1, %2};" ::"l"(at), "l"(a), "l"(b) : "memory");
}
static __device__ __forceinline__ void store8(u64 at, u64 a) {
    asm volatile("st.global.cs.u64 [%0], %1;" ::"l"(at), "l"(a) : "memory");
}
#endif

/* The largest unit that no piece boundary cuts. STRIPES_WHOLE: no stripe crosses from one piece to the next, and all is
 * aligned to 16 bytes, so that one table lookup serves a stripe. PAIRS: the same for units of 16 bytes. SINGLES: for 8
 * bytes. */
enum Grain { STRIPES_WHOLE, PAIRS, SINGLES };

struct Work {
    const u64 *src, *dst; /* addresses of the pieces; a checksum alone ignores dst */
    const u64 *starts;    /* stream offset of each piece; 0: all are `piece` bytes long */
    u64 count;            /* pieces in the tables */
    u64 piece;
    u64 origin;      /* stream offset of the first piece in the tables */
    u64 block_bytes; /* the stream is cut into blocks of this size, and each block into tiles */
    u64 first, end;  /* tiles of the stream to work on */
    u64 span;        /* tiles per turn, 1 to 8 */
    u64 *sums;       /* sums of the stripes' values, one per block; a plain copy ignores them */
};

static __device__ __forceinline__ u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

/* Index of the last of table[low .. high) that is <= place; table[low] is. */
static __device__ __forceinline__ u64 last_at_most(const u64 *table, u64 low, u64 high, u64 place) {
    while (high - low > 1) {
        u64 middle = (low + high) / 2;
        if (table[middle] <= place)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* Index in the stripe of a lane's word number w; the words of one load are adjacent. */
template <Grain grain>
static __device__ __forceinline__ u32 word_of(u32 lane, u32 w) {
    return grain == SINGLES ? 32u * w + lane : 64u * (w / 2) + 2u * lane + w % 2;
}

/* Halving exchange: each lane passes one of its two values to its partner, and adds the value that it gets to the one
 * that it kept. Lanes with the bit set end with the pair's sum of `upper`, the others with the sum of `lower`. */
static __device__ __forceinline__ u64 exchange(u64 lower, u64 upper, u32 bit, u32 lane) {
    bool high = lane & bit;
    u64 given = high ? lower : upper;
    return (high ? upper : lower) + __shfl_xor_sync(ALL, given, bit);
}

/* The value of one stripe of a tile. The lane determines which stripe, and whether this lane counts it (see `counts`).
 * `first` is the number of the tile's first stripe in its block; `whole` is the number of stripes the tile has. */
template <Grain grain>
static __device__ __forceinline__ u64 tile_value(const u64 (&x)[STRIPES][WORDS], const u64 (&keys)[WORDS], u64 first,
                                                 u32 whole, u32 lane) {
    u64 products[STRIPES], plain[STRIPES];
#pragma unroll
    for (u32 s = 0; s < STRIPES; s++) {
        products[s] = plain[s] = 0;
#pragma unroll
        for (u32 w = 0; w < WORDS; w++) {
            u64 y = x[s][w] ^ keys[w];
            products[s] += (u64)(u32)y * (u32)(y >> 32);
            plain[s] += y;
        }
    }
    u64 a = exchange(exchange(products[0], products[2], 16, lane), exchange(products[1], products[3], 16, lane), 8, lane);
    u64 b = exchange(exchange(plain[0], plain[2], 16, lane), exchange(plain[1], plain[3], 16, lane), 8, lane);
    u64 sum = exchange(a, b, 4, lane); /* lanes with bit 4 hold B, the others A */
    sum += __shfl_xor_sync(ALL, sum, 2);
    sum += __shfl_xor_sync(ALL, sum, 1);
    u32 stripe = (lane & 16 ? 2u : 0u) + (lane & 8 ? 1u : 0u);
    u64 mixed = __shfl_xor_sync(ALL, mix(sum + (first + stripe + 1) * GOLDEN), 4);
    return (lane & 7) == 0 && stripe < whole ? mix(sum + mixed) : 0;
}

static __device__ __forceinline__ void add_to_block(u64 *sums, u64 block, u64 sum, u32 lane) {
    sum += __shfl_xor_sync(ALL, sum, 16);
    sum += __shfl_xor_sync(ALL, sum, 8);
    if (lane == 0) atomicAdd(sums + block, sum);
}

/* Location of a stream offset: its piece, and the offset within that piece. */
struct Place {
    u64 index, inside;
};

/* Looks up locations within one tile. */
struct Finder {
    u64 base, inside, low, high;

    __device__ __forceinline__ Finder(const Work &work, u64 offset, u64 bytes) {
        if (work.starts) {
            base = offset, inside = 0;
            low = last_at_most(work.starts, 0, work.count, offset);
            high = last_at_most(work.starts, low, work.count, offset + bytes - 1) + 1;
        } else {
            base = (offset - work.origin) / work.piece;
            inside = offset - work.origin - base * work.piece;
            low = high = 0;
        }
    }

    __device__ __forceinline__ Place at(const Work &work, u32 offset) const {
        if (work.starts) {
            u64 index = last_at_most(work.starts, low, high, base + offset);
            return {index, base + offset - work.starts[index]};
        }
        u64 all = inside + offset;
        if (work.piece >= TILE) return all < work.piece ? Place{base, all} : Place{base + 1, all - work.piece};
        u32 piece = (u32)work.piece, more = (u32)all / piece; /* all < 2 * TILE */
        return {base + more, (u32)all - more * piece};
    }
};

/* A tile whose pieces are finer than stripes: every load looks up its own location. */
template <Grain grain, bool copies>
static __device__ __forceinline__ void fine_tile(const Work &work, u64 offset, u64 bytes, u64 (&x)[STRIPES][WORDS],
                                                 u32 lane) {
    const u32 step = grain == SINGLES ? 1 : 2; /* words per load */
    Finder finder(work, offset, bytes);
#pragma unroll
    for (u32 s = 0; s < STRIPES; s++)
#pragma unroll
        for (u32 w = 0; w < WORDS; w += step) {
            u32 at = s * (u32)STRIPE + 8 * word_of<grain>(lane, w);
            x[s][w] = x[s][w + step - 1] = 0;
            if (at >= bytes) continue;
            Place place = finder.at(work, at);
            if constexpr (grain == SINGLES)
                load8(work.src[place.index] + place.inside, x[s][w]);
            else
                load16(work.src[place.index] + place.inside, x[s][w], x[s][w + 1]);
        }
    if constexpr (copies) {
#pragma unroll
        for (u32 s = 0; s < STRIPES; s++)
#pragma unroll
            for (u32 w = 0; w < WORDS; w += step) {
                u32 at = s * (u32)STRIPE + 8 * word_of<grain>(lane, w);
                if (at >= bytes) continue;
                Place place = finder.at(work, at);
                if constexpr (grain == SINGLES)
                    store8(work.dst[place.index] + place.inside, x[s][w]);
                else
                    store16(work.dst[place.index] + place.inside, x[s][w], x[s][w + 1]);
            }
    }
}

/* A tile of whole stripes; the lanes from `slot` on hold their addresses (0: the stripe does not exist). */
template <bool copies>
static __device__ __forceinline__ void whole_tile(u64 from, u64 to, u32 slot, u64 (&x)[STRIPES][WORDS], u32 lane) {
#pragma unroll
    for (u32 s = 0; s < STRIPES; s++) {
        u64 at = __shfl_sync(ALL, from, slot + s);
        x[s][0] = x[s][1] = x[s][2] = x[s][3] = 0;
        if (at) {
            load16(at + 16 * lane, x[s][0], x[s][1]);
            load16(at + 512 + 16 * lane, x[s][2], x[s][3]);
        }
    }
    if constexpr (copies) {
#pragma unroll
        for (u32 s = 0; s < STRIPES; s++) {
            u64 at = __shfl_sync(ALL, to, slot + s);
            if (at) {
                store16(at + 16 * lane, x[s][0], x[s][1]);
                store16(at + 512 + 16 * lane, x[s][2], x[s][3]);
            }
        }
    }
}

template <Grain grain, bool copies, bool hashes>
static __device__ __forceinline__ void work_on(const Work &work) {
    const u32 lane = threadIdx.x % LANES;
    const u64 warp = (u64)blockIdx.x * WARPS + threadIdx.x / LANES, warps = (u64)gridDim.x * WARPS;
    const u64 tiles = (work.block_bytes + TILE - 1) / TILE; /* per block */
    u64 keys[WORDS], sum = 0;
    if (hashes)
#pragma unroll
        for (u32 w = 0; w < WORDS; w++) keys[w] = mix(KEY_SEED + (word_of<grain>(lane, w) + 1) * GOLDEN);

    for (u64 turn = work.first + warp * work.span; turn < work.end; turn += warps * work.span) {
        const u32 span = (u32)(work.end - turn < work.span ? work.end - turn : work.span);
        u64 block = turn / tiles, tile = turn - block * tiles;
        u64 from = 0, to = 0;
        if constexpr (grain == STRIPES_WHOLE) { /* lane l looks up the turn's stripe number l */
            u64 my_tile = turn + lane / STRIPES, my_block = my_tile / tiles;
            u64 inside = (my_tile - my_block * tiles) * TILE + lane % STRIPES * STRIPE;
            if (lane / STRIPES < span && inside < work.block_bytes) {
                u64 offset = my_block * work.block_bytes + inside - work.origin, index = offset / work.piece;
                from = work.src[index] + (offset - index * work.piece);
                if (copies) to = work.dst[index] + (offset - index * work.piece);
            }
        }
        for (u32 t = 0; t < span; t++) {
            u64 x[STRIPES][WORDS];
            u64 inside = tile * TILE, bytes = work.block_bytes - inside < TILE ? work.block_bytes - inside : TILE;
            if constexpr (grain == STRIPES_WHOLE)
                whole_tile<copies>(from, to, t * STRIPES, x, lane);
            else
                fine_tile<grain, copies>(work, block * work.block_bytes + inside, bytes, x, lane);
            if (hashes) sum += tile_value<grain>(x, keys, tile * STRIPES, (u32)((bytes + STRIPE - 1) / STRIPE), lane);
            if (++tile == tiles) {
                if (hashes) add_to_block(work.sums, block, sum, lane);
                sum = 0, tile = 0, block++;
            }
        }
        if (hashes && tile) { /* this warp's next turn is not adjacent */
            add_to_block(work.sums, block, sum, lane);
            sum = 0;
        }
    }
}

#define KERNEL(name, grain, copies, hashes)                                                                            \
    extern "C" __global__ void __launch_bounds__(WARPS *LANES, BLOCKS_PER_SM)                                          \
        name(u64 src, u64 dst, u64 starts, u64 count, u64 piece, u64 origin, u64 block_bytes, u64 first, u64 end,      \
             u64 span, u64 sums) {                                                                                     \
        const Work work = {(const u64 *)src, (const u64 *)dst, (const u64 *)starts, count, piece, origin,              \
                           block_bytes,      first,            end,                 span,  (u64 *)sums};               \
        work_on<grain, copies, hashes>(work);                                                                          \
    }

KERNEL(pdt_copy_stripes, STRIPES_WHOLE, true, false)
KERNEL(pdt_copy_pairs, PAIRS, true, false)
KERNEL(pdt_copy_singles, SINGLES, true, false)
KERNEL(pdt_copy_sum_stripes, STRIPES_WHOLE, true, true)
KERNEL(pdt_copy_sum_pairs, PAIRS, true, true)
KERNEL(pdt_copy_sum_singles, SINGLES, true, true)
KERNEL(pdt_sum_stripes, STRIPES_WHOLE, false, true)
KERNEL(pdt_sum_pairs, PAIRS, false, true)
KERNEL(pdt_sum_singles, SINGLES, false, true)
