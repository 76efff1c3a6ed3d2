/* Eight floats at a time, with the same bits on every machine.
 *
 * GCC vector types carry the arithmetic; only the fused multiply-add needs an intrinsic, and the larger
 * and the smaller of two are one instruction with it. Rounded once everywhere (fmaf in the portable
 * branch), so both branches agree bit for bit.
 * exp and log1p are our own polynomials because libm's last bit differs between machines.
 */
#ifndef V4_SIMD_H
#define V4_SIMD_H

#include <stdint.h>
#include <string.h>

#if defined(__FMA__) && defined(__AVX2__) && !defined(V4_PORTABLE)
#include <immintrin.h>
#define V4_X86 1
#endif

/* Vectors never cross a real call (everything here is inlined), so their calling convention is moot. */
#pragma GCC diagnostic ignored "-Wpsabi"

typedef float f8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef uint32_t u8 __attribute__((vector_size(32)));

#define V4_INLINE static inline __attribute__((always_inline, unused))

V4_INLINE f8 f8_load(const float *p) {
    f8 v;
    memcpy(&v, p, sizeof v);
    return v;
}

V4_INLINE void f8_store(float *p, f8 v) { memcpy(p, &v, sizeof v); }

V4_INLINE f8 f8_splat(float x) { return (f8){x, x, x, x, x, x, x, x}; }

/* a * b + c, rounded once. */
V4_INLINE f8 f8_fma(f8 a, f8 b, f8 c) {
#ifdef V4_X86
    return (f8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    f8 out;
    for (int i = 0; i < 8; i++) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return out;
#endif
}

V4_INLINE f8 f8_select(i8 mask, f8 a, f8 b) { return (f8)((mask & (i8)a) | (~mask & (i8)b)); }

/* Of a NaN and b, and of zeros: b. */
#ifdef V4_X86
V4_INLINE f8 f8_max(f8 a, f8 b) { return (f8)_mm256_max_ps((__m256)a, (__m256)b); }
V4_INLINE f8 f8_min(f8 a, f8 b) { return (f8)_mm256_min_ps((__m256)a, (__m256)b); }
#else
V4_INLINE f8 f8_max(f8 a, f8 b) { return f8_select(a > b, a, b); }
V4_INLINE f8 f8_min(f8 a, f8 b) { return f8_select(a < b, a, b); }
#endif

/* Whether any lane of a comparison holds. */
V4_INLINE int i8_any(i8 mask) {
#ifdef V4_X86
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    int32_t any = 0;
    for (int i = 0; i < 8; i++) any |= mask[i];
    return any != 0;
#endif
}

typedef float f4 __attribute__((vector_size(16)));

/* The one order in which lanes are added: halves, then quarters, then the last pair. */
V4_INLINE float f8_sum(f8 v) {
    f4 half = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
    f4 quarter = half + __builtin_shufflevector(half, half, 2, 3, 2, 3);
    return quarter[0] + quarter[1];
}

/* f8_sum of four vectors at once, in the same order. */
V4_INLINE f4 f8_sum4(f8 p, f8 q, f8 r, f8 s) {
    f4 p4 = __builtin_shufflevector(p, p, 0, 1, 2, 3) + __builtin_shufflevector(p, p, 4, 5, 6, 7);
    f4 q4 = __builtin_shufflevector(q, q, 0, 1, 2, 3) + __builtin_shufflevector(q, q, 4, 5, 6, 7);
    f4 r4 = __builtin_shufflevector(r, r, 0, 1, 2, 3) + __builtin_shufflevector(r, r, 4, 5, 6, 7);
    f4 s4 = __builtin_shufflevector(s, s, 0, 1, 2, 3) + __builtin_shufflevector(s, s, 4, 5, 6, 7);
    f4 pq = __builtin_shufflevector(p4, q4, 0, 1, 4, 5) + __builtin_shufflevector(p4, q4, 2, 3, 6, 7);
    f4 rs = __builtin_shufflevector(r4, s4, 0, 1, 4, 5) + __builtin_shufflevector(r4, s4, 2, 3, 6, 7);
    return __builtin_shufflevector(pq, rs, 0, 2, 4, 6) + __builtin_shufflevector(pq, rs, 1, 3, 5, 7);
}

/* e^x to about one unit in the last place; x is clamped to the range of normal results. One text for all widths: V is a
 * vector of floats, I of as many integers. */
#define V4_DEFINE_EXP(NAME, V, I, SPLAT, FMA, MAX, MIN)                          \
    V4_INLINE V NAME(V x) {                                                      \
        const V magic = SPLAT(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */ \
        x = MIN(MAX(x, SPLAT(-87.33f)), SPLAT(88.3f));                           \
        V shifted = FMA(x, SPLAT(1.44269504088896341f), magic);                  \
        V n = shifted - magic;                                                   \
        V r = FMA(n, SPLAT(-0.693359375f), x);                                   \
        r = FMA(n, SPLAT(2.12194440e-4f), r);                                    \
        V p = SPLAT(1.0f / 5040);                                                \
        p = FMA(p, r, SPLAT(1.0f / 720));                                        \
        p = FMA(p, r, SPLAT(1.0f / 120));                                        \
        p = FMA(p, r, SPLAT(1.0f / 24));                                         \
        p = FMA(p, r, SPLAT(1.0f / 6));                                          \
        p = FMA(p, r, SPLAT(0.5f));                                              \
        p = FMA(p, r, SPLAT(1.0f));                                              \
        p = FMA(p, r, SPLAT(1.0f));                                              \
        I exponent = ((I)shifted - (I)magic + 127) << 23;                        \
        return p * (V)exponent;                                                  \
    }

V4_DEFINE_EXP(f8_exp, f8, i8, f8_splat, f8_fma, f8_max, f8_min)

/* log(1 + u) for u in [0, 1], as 2 atanh(u / (2 + u)). */
V4_INLINE f8 f8_log1p(f8 u) {
    f8 s = u / (u + 2.0f), t = s * s;
    f8 p = f8_splat(1.0f / 17);
    p = f8_fma(p, t, f8_splat(1.0f / 15));
    p = f8_fma(p, t, f8_splat(1.0f / 13));
    p = f8_fma(p, t, f8_splat(1.0f / 11));
    p = f8_fma(p, t, f8_splat(1.0f / 9));
    p = f8_fma(p, t, f8_splat(1.0f / 7));
    p = f8_fma(p, t, f8_splat(1.0f / 5));
    p = f8_fma(p, t, f8_splat(1.0f / 3));
    p = f8_fma(p, t, f8_splat(1.0f));
    return (s + s) * p;
}

V4_INLINE f8 f8_sigmoid(f8 x) { return 1.0f / (1.0f + f8_exp(-x)); }

V4_INLINE f8 f8_softplus(f8 x) {
    f8 zero = f8_splat(0.0f), size = f8_max(x, -x);
    return f8_max(x, zero) + f8_log1p(f8_exp(-size));
}

/* Dot product of two float rows, n a multiple of 8, in eight lanes. */
V4_INLINE float f8_dot(const float *a, const float *b, int n) {
    f8 acc = f8_splat(0.0f);
    for (int i = 0; i < n; i += 8) acc = f8_fma(f8_load(a + i), f8_load(b + i), acc);
    return f8_sum(acc);
}

/* The nearest bf16, of two the even one; the float is no NaN. */
V4_INLINE uint16_t float_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

V4_INLINE float bf16_to_float(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

#endif
