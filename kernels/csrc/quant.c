/*
 * Lossy codecs for KV: fp8 (e4m3) and int4, with one scale per group of elements.
 *
 * Elements are laid out as [outer, rows, groups, width]; the rows x width elements of one (outer, group) share a scale.
 * Codes have the same order, int4 with two codes per byte: the first half of a row of `width` in the low nibbles, the
 * second half in the high ones, so that no shuffle is needed. kernels/quant.py gives the same results in numpy, bit for
 * bit: no operation here may be reordered or contracted to a fused multiply-add (setup.py).
 */
#include <errno.h>
#include <stdint.h>
#include <string.h>

#define API __attribute__((visibility("default")))
#define INLINE __attribute__((always_inline)) static inline

enum { FLOAT32, FLOAT16, BFLOAT16 };
enum { FP8, INT4 };

#define INFINITE 0x7f800000
#define E4M3_MAX 448.0f
#define TINY_SCALE 1e-30f /* below it all elements of a group count as equal */
#define MAX_EXPONENT 120  /* of a scale, so that its inverse is a normal number too */

INLINE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* Branch-free, so that the loops can be vectorised. */
INLINE uint32_t either(int condition, uint32_t yes, uint32_t no) {
    uint32_t mask = -(uint32_t)condition;
    return (yes & mask) | (no & ~mask);
}

INLINE uint32_t raw(const unsigned char *from, uint64_t i, int dtype) {
    uint32_t wide;
    uint16_t narrow;
    if (dtype == FLOAT32) return memcpy(&wide, from + 4 * i, 4), wide;
    return memcpy(&narrow, from + 2 * i, 2), narrow;
}

INLINE float widened(uint32_t raw, int dtype) {
    if (dtype == FLOAT32) return as_float(raw);
    if (dtype == BFLOAT16) return as_float(raw << 16);
    uint32_t bits = (raw & 0x7fff) << 13, exponent = bits & (0x7c00u << 13), sign = (raw & 0x8000) << 16;
    bits += (127 - 15) << 23;
    bits += either(exponent == (0x7c00u << 13), (128 - 16) << 23, 0);
    uint32_t small = as_bits(as_float(bits + (1 << 23)) - as_float(113 << 23)); /* subnormal: subtract to normalise */
    return as_float(either(exponent != 0, bits, small) | sign);
}

INLINE float load(const unsigned char *from, uint64_t i, int dtype) {
    return widened(raw(from, i, dtype), dtype);
}

/* Round to nearest, ties to even; saturates at the largest finite number. */
INLINE void store(unsigned char *to, uint64_t i, float value, int dtype) {
    uint32_t bits = as_bits(value), sign = bits & 0x80000000u, most = dtype == FLOAT32 ? 0x7f7fffff : dtype == BFLOAT16 ? 0x7f7f0000 : 0x477fe000;
    bits &= 0x7fffffff;
    bits = either(bits > most, most, bits);
    if (dtype == FLOAT32) {
        bits |= sign;
        memcpy(to + 4 * i, &bits, 4);
        return;
    }
    uint32_t small = as_bits(as_float(bits) + 0.5f) - 0x3f000000; /* the addition rounds to a subnormal's last bit */
    uint32_t normal = (bits - ((127 - 15) << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
    uint32_t half = either(bits < (113 << 23), small, normal), brain = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    uint16_t raw = (uint16_t)((dtype == BFLOAT16 ? brain : half) | sign >> 16);
    memcpy(to + 2 * i, &raw, 2);
}

/* ---- fp8 ------------------------------------------------------------------------------------------------------ */

/* Exponent of the power of two that brings `largest` just within e4m3's range. With a power of two, decoding does not
 * round, so encoding decoded values again gives the same codes. */
INLINE int exponent_for(float largest) {
    uint32_t bits = as_bits(largest), mantissa = bits & 0x7fffff;
    int exponent = (int)(bits >> 23) - 127; /* largest = 1.mantissa * 2^exponent; subnormal ones are too small to matter */
    if (!bits) return 0;
    int k = (mantissa > 0x600000 ? 7 : 8) - exponent; /* 448 = 1.75 * 2^8 */
    return k > MAX_EXPONENT ? MAX_EXPONENT : k < -MAX_EXPONENT ? -MAX_EXPONENT : k;
}

INLINE float power_of_two(int exponent) {
    return as_float((uint32_t)(127 + exponent) << 23);
}

INLINE uint8_t to_e4m3(float value) {
    uint32_t bits = as_bits(value), sign = (bits >> 24) & 0x80;
    bits &= 0x7fffffff;
    uint32_t small = as_bits(as_float(bits) + 16384.0f) & 0xf; /* 2^14: its last bit is e4m3's smallest step, 2^-9 */
    uint32_t normal = ((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - (120 << 3);
    return (uint8_t)(either(bits < (121u << 23), small, normal) | sign);
}

INLINE float from_e4m3(uint8_t code) {
    uint32_t bits = ((uint32_t)(code & 0x7f) << 20) + (120u << 23), sign = (uint32_t)(code & 0x80) << 24;
    uint32_t small = as_bits(as_float(bits + (1 << 23)) - as_float(121u << 23));
    return as_float(either((code & 0x78) != 0, bits, small) | sign);
}

INLINE int pack_fp8(const unsigned char *from, uint64_t outer, uint64_t rows, uint64_t groups, uint64_t width,
                    unsigned char *scales, unsigned char *codes, int dtype) {
    for (uint64_t o = 0; o < outer; o++)
        for (uint64_t g = 0; g < groups; g++) {
            uint64_t base = (o * rows * groups + g) * width, step = groups * width;
            int32_t most = 0; /* maximum of the bits without sign; they order like the magnitudes */
            for (uint64_t r = 0; r < rows; r++)
                for (uint64_t i = 0; i < width; i++) {
                    int32_t bits = (int32_t)(raw(from, base + r * step + i, dtype) & (dtype == FLOAT32 ? 0x7fffffff : 0x7fff));
                    most = bits > most ? bits : most;
                }
            float largest = widened((uint32_t)most, dtype);
            if (as_bits(largest) >= INFINITE) return -EDOM;
            int exponent = exponent_for(largest);
            float factor = power_of_two(exponent);
            scales[o * groups + g] = (unsigned char)(int8_t)exponent;
            for (uint64_t r = 0; r < rows; r++)
                for (uint64_t i = 0; i < width; i++)
                    codes[base + r * step + i] = to_e4m3(load(from, base + r * step + i, dtype) * factor);
        }
    return 0;
}

INLINE int unpack_fp8(unsigned char *to, uint64_t outer, uint64_t rows, uint64_t groups, uint64_t width,
                      const unsigned char *scales, const unsigned char *codes, int dtype) {
    for (uint64_t o = 0; o < outer; o++)
        for (uint64_t g = 0; g < groups; g++) {
            uint64_t base = (o * rows * groups + g) * width, step = groups * width;
            int exponent = (int8_t)scales[o * groups + g];
            if (exponent > MAX_EXPONENT || exponent < -MAX_EXPONENT) return -EDOM;
            float factor = power_of_two(-exponent);
            for (uint64_t r = 0; r < rows; r++)
                for (uint64_t i = 0; i < width; i++)
                    store(to, base + r * step + i, from_e4m3(codes[base + r * step + i]) * factor, dtype);
        }
    return 0;
}

/* ---- int4 ----------------------------------------------------------------------------------------------------- */

/* Maps float bits to integers that order like the floats, NaNs beyond both infinities; its own inverse. */
INLINE int32_t in_order(uint32_t bits, int dtype) {
    if (dtype == FLOAT32) return (int32_t)(bits ^ ((uint32_t)((int32_t)bits >> 31) >> 1));
    int16_t narrow = (int16_t)bits;
    return (int16_t)(narrow ^ ((uint16_t)(narrow >> 15) >> 1));
}

INLINE uint8_t to_int4(float value, float low, float inverse) {
    float steps = (value - low) * inverse;
    return (uint8_t)(as_bits(steps + 12582912.0f) & 0xf); /* 1.5 * 2^23: its last bit is 1, the addition rounds */
}

INLINE int pack_int4(const unsigned char *from, uint64_t outer, uint64_t rows, uint64_t groups, uint64_t width,
                     unsigned char *scales, unsigned char *codes, int dtype) {
    uint64_t half = width / 2;
    for (uint64_t o = 0; o < outer; o++)
        for (uint64_t g = 0; g < groups; g++) {
            uint64_t base = (o * rows * groups + g) * width, step = groups * width;
            int32_t least = INT32_MAX, most = INT32_MIN;
            for (uint64_t r = 0; r < rows; r++)
                for (uint64_t i = 0; i < width; i++) {
                    int32_t place = in_order(raw(from, base + r * step + i, dtype), dtype);
                    most = place > most ? place : most;
                    least = place < least ? place : least;
                }
            uint32_t bits = dtype == FLOAT32 ? 0xffffffffu : 0xffff;
            float low = widened((uint32_t)in_order((uint32_t)least, dtype) & bits, dtype);
            float high = widened((uint32_t)in_order((uint32_t)most, dtype) & bits, dtype), scale = (high - low) / 15.0f;
            if ((as_bits(low) & 0x7fffffff) >= INFINITE || (as_bits(high) & 0x7fffffff) >= INFINITE) return -EDOM;
            if (as_bits(scale) >= INFINITE) return -EDOM;
            if (!(scale >= TINY_SCALE)) scale = 0.0f;
            float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
            memcpy(scales + 8 * (o * groups + g), &scale, 4);
            memcpy(scales + 8 * (o * groups + g) + 4, &low, 4);
            for (uint64_t r = 0; r < rows; r++) {
                uint64_t row = base + r * step;
                for (uint64_t i = 0; i < half; i++)
                    codes[row / 2 + i] = (uint8_t)(to_int4(load(from, row + i, dtype), low, inverse) |
                                                   to_int4(load(from, row + half + i, dtype), low, inverse) << 4);
            }
        }
    return 0;
}

INLINE int unpack_int4(unsigned char *to, uint64_t outer, uint64_t rows, uint64_t groups, uint64_t width,
                       const unsigned char *scales, const unsigned char *codes, int dtype) {
    uint64_t half = width / 2;
    for (uint64_t o = 0; o < outer; o++)
        for (uint64_t g = 0; g < groups; g++) {
            uint64_t base = (o * rows * groups + g) * width, step = groups * width;
            float scale, low;
            memcpy(&scale, scales + 8 * (o * groups + g), 4);
            memcpy(&low, scales + 8 * (o * groups + g) + 4, 4);
            if (as_bits(scale) >= INFINITE || (as_bits(low) & 0x7fffffff) >= INFINITE) return -EDOM;
            for (uint64_t r = 0; r < rows; r++) {
                uint64_t row = base + r * step;
                for (uint64_t i = 0; i < half; i++) {
                    uint32_t pair = codes[row / 2 + i];
                    store(to, row + i, low + (float)(int32_t)(pair & 0xf) * scale, dtype);
                    store(to, row + half + i, low + (float)(int32_t)(pair >> 4) * scale, dtype);
                }
            }
        }
    return 0;
}

/* ---- one function for each kind, element type and instruction set ---------------------------------------------- */

#define SIDE(NAME, BYTES, CONST)                                                                                       \
    INLINE int NAME##_any(CONST unsigned char *bytes, int kind, int dtype, uint64_t outer, uint64_t rows,              \
                          uint64_t groups, uint64_t width, BYTES unsigned char *scales, BYTES unsigned char *codes) {   \
        switch (kind * 4 + dtype) {                                                                                    \
        case FP8 * 4 + FLOAT32: return NAME##_fp8(bytes, outer, rows, groups, width, scales, codes, FLOAT32);          \
        case FP8 * 4 + FLOAT16: return NAME##_fp8(bytes, outer, rows, groups, width, scales, codes, FLOAT16);          \
        case FP8 * 4 + BFLOAT16: return NAME##_fp8(bytes, outer, rows, groups, width, scales, codes, BFLOAT16);        \
        case INT4 * 4 + FLOAT32: return NAME##_int4(bytes, outer, rows, groups, width, scales, codes, FLOAT32);        \
        case INT4 * 4 + FLOAT16: return NAME##_int4(bytes, outer, rows, groups, width, scales, codes, FLOAT16);        \
        case INT4 * 4 + BFLOAT16: return NAME##_int4(bytes, outer, rows, groups, width, scales, codes, BFLOAT16);      \
        }                                                                                                              \
        return -EINVAL;                                                                                                \
    }                                                                                                                  \
    static int NAME##_portable(CONST unsigned char *bytes, int kind, int dtype, uint64_t outer, uint64_t rows,         \
                               uint64_t groups, uint64_t width, BYTES unsigned char *scales,                           \
                               BYTES unsigned char *codes) {                                                           \
        return NAME##_any(bytes, kind, dtype, outer, rows, groups, width, scales, codes);                              \
    }

#define NOTHING
SIDE(pack, NOTHING, const)
SIDE(unpack, const, NOTHING)

typedef int pack_t(const unsigned char *, int, int, uint64_t, uint64_t, uint64_t, uint64_t, unsigned char *,
                   unsigned char *);
typedef int unpack_t(unsigned char *, int, int, uint64_t, uint64_t, uint64_t, uint64_t, const unsigned char *,
                     const unsigned char *);

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2"))) static int pack_avx2(const unsigned char *from, int kind, int dtype, uint64_t outer,
                                                     uint64_t rows, uint64_t groups, uint64_t width,
                                                     unsigned char *scales, unsigned char *codes) {
    return pack_any(from, kind, dtype, outer, rows, groups, width, scales, codes);
}
__attribute__((target("avx2"))) static int unpack_avx2(unsigned char *to, int kind, int dtype, uint64_t outer,
                                                       uint64_t rows, uint64_t groups, uint64_t width,
                                                       const unsigned char *scales, const unsigned char *codes) {
    return unpack_any(to, kind, dtype, outer, rows, groups, width, scales, codes);
}
#define WIDE (__builtin_cpu_init(), __builtin_cpu_supports("avx2"))
#else
#define pack_avx2 pack_portable
#define unpack_avx2 unpack_portable
#define WIDE 0
#endif

static int wide = -1; /* -1: not determined yet; all threads determine the same value */

/* Selects the processor's widest instruction set, at most `level` (0: portable, 1: AVX2); returns it. */
API int pdt_choose_quant(int level) {
    return wide = level > 0 && WIDE;
}

static int chosen(void) {
    return wide < 0 ? pdt_choose_quant(1) : wide;
}

/* 0, or -EDOM: an element is not finite, or the range of a group is too large. */
API int pdt_pack(const unsigned char *from, int kind, int dtype, uint64_t outer, uint64_t rows, uint64_t groups,
                 uint64_t width, unsigned char *scales, unsigned char *codes) {
    return (chosen() ? pack_avx2 : pack_portable)(from, kind, dtype, outer, rows, groups, width, scales, codes);
}

/* 0, or -EDOM: a scale is invalid. */
API int pdt_unpack(unsigned char *to, int kind, int dtype, uint64_t outer, uint64_t rows, uint64_t groups,
                   uint64_t width, const unsigned char *scales, const unsigned char *codes) {
    return (chosen() ? unpack_avx2 : unpack_portable)(to, kind, dtype, outer, rows, groups, width, scales, codes);
}
