/* Runs kernels/csrc/pages.cu on a CPU: the lanes of a warp are fibers that take turns at every shuffle. Warps run one
 * after the other, which the kernels allow (no shared memory, no barriers). Included before the kernels' source. */
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#define ON_HOST 1
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads, blocks)

struct index_t {
    unsigned x;
};
static index_t threadIdx, blockIdx, gridDim;

namespace warp {
const unsigned lanes = 32, stack_bytes = 64 << 10;
ucontext_t home, fiber[lanes];
unsigned char stack[lanes][stack_bytes];
bool alive[lanes];
unsigned current, turn[lanes];
uint64_t given[2][lanes];

/* All lanes give a value; each returns what lane `from` gave. */
inline uint64_t swap(uint64_t value, unsigned from) {
    unsigned me = current, half = turn[me]++ & 1; /* no lane is more than one shuffle ahead */
    given[half][me] = value;
    swapcontext(&fiber[me], &home);
    return given[half][from % lanes];
}
} // namespace warp

inline unsigned long long __shfl_sync(unsigned, unsigned long long value, unsigned from) {
    return warp::swap(value, from);
}
inline unsigned long long __shfl_xor_sync(unsigned, unsigned long long value, unsigned bits) {
    return warp::swap(value, warp::current ^ bits);
}
inline void atomicAdd(unsigned long long *at, unsigned long long more) { *at += more; }

inline void load16(unsigned long long at, unsigned long long &a, unsigned long long &b) {
    if (at % 16) __builtin_trap(); /* the GPU faults too */
    memcpy(&a, (void *)at, 8), memcpy(&b, (void *)(at + 8), 8);
}
inline void load8(unsigned long long at, unsigned long long &a) {
    if (at % 8) __builtin_trap();
    memcpy(&a, (void *)at, 8);
}
inline void store16(unsigned long long at, unsigned long long a, unsigned long long b) {
    if (at % 16) __builtin_trap();
    memcpy((void *)at, &a, 8), memcpy((void *)(at + 8), &b, 8);
}
inline void store8(unsigned long long at, unsigned long long a) {
    if (at % 8) __builtin_trap();
    memcpy((void *)at, &a, 8);
}

typedef void kernel_t(unsigned long long, unsigned long long, unsigned long long, unsigned long long,
                      unsigned long long, unsigned long long, unsigned long long, unsigned long long,
                      unsigned long long, unsigned long long, unsigned long long);

namespace warp {
kernel_t *kernel;
const unsigned long long *arguments;

void lane() {
    const unsigned long long *a = arguments;
    kernel(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10]);
    alive[current] = false;
    swapcontext(&fiber[current], &home);
}
} // namespace warp

extern "C" void run_kernel(kernel_t *kernel, unsigned blocks, unsigned threads, const unsigned long long *arguments) {
    using namespace warp;
    warp::kernel = kernel, warp::arguments = arguments;
    gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (unsigned first = 0; first < threads; first += lanes) {
            for (unsigned l = 0; l < lanes; l++) {
                getcontext(&fiber[l]);
                fiber[l].uc_stack.ss_sp = stack[l], fiber[l].uc_stack.ss_size = stack_bytes, fiber[l].uc_link = &home;
                makecontext(&fiber[l], lane, 0);
                alive[l] = true, turn[l] = 0;
            }
            for (bool some = true; some;) {
                some = false;
                for (current = 0; current < lanes; current++)
                    if (alive[current]) {
                        threadIdx.x = first + current;
                        swapcontext(&home, &fiber[current]);
                        some |= alive[current];
                    }
            }
        }
}
