// Functions of vectors, see simd_types.h
#pragma once

#include "kernels/simd_types.h"

// 2^x for x <= 0 or small; relative error 2e-7; not less than 2^-125, which stands for 0
INLINE vf vexp2(vf x) {
    const vf least = (vf) { 0 } - 125.0f, shift = (vf) { 0 } + 12582912.0f; // 1.5 * 2^23: adding it rounds
    x = vmax(least, x);
    const vf whole = x + shift, f = x - (whole - shift);
    vf       p     = 0.001327647129073739f * f + 0.009675540961325169f; // minimax of 2^f on [-0.5, 0.5]
    p = p * f + 0.05550713092088699f;
    p = p * f + 0.24022120237350464f;
    p = p * f + 0.6931469440460205f;
    p = p * f + 1.0000001192092896f;
    return (vf) ((vw) p + ((vw) whole << 23)); // unsigned: what is not a number gives anything, but no overflow
}

// Absolute error 2e-7: 1 - 2^q(|x|), where q is the minimax of log2(erfc) on [0, 4], weighted by erfc
INLINE vf verf(vf x) {
    const vi sign = (vi) x & INT32_MIN;
    const vf a    = -vmax((vf) { 0 } - 4.0f, -(vf) ((vi) x ^ sign));
    vf       q    = -4.435278970049694e-05f * a + 0.0004369438684079796f;
    q = q * a - 0.0014603807358071208f;
    q = q * a - 0.0008251662366092205f;
    q = q * a + 0.028301887214183807f;
    q = q * a - 0.14850664138793945f;
    q = q * a - 0.9184098243713379f;
    q = q * a - 1.6279093027114868f;
    return (vf) ((vi) (1.0f - vexp2(q * a)) ^ sign);
}

INLINE vf vgelu(vf x) {
    return 0.5f * x * (1.0f + verf(0.70710678118654752f * x));
}

// The largest of the lanes and a
INLINE float largest(vf x, float a) {
    const union { vf whole; v4f part[LANES / 4]; } u = { .whole = x };
    v4f four = u.part[0];
    UNROLL for (int i = 1; i < LANES / 4; i++) {
        four = vmax4(four, u.part[i]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        a = a > four[i] ? a : four[i];
    }
    return a;
}

// The sum of the lanes
INLINE float total(vf x) {
    const union { vf whole; v4f part[LANES / 4]; } u = { .whole = x };
    v4f four = u.part[0];
    UNROLL for (int i = 1; i < LANES / 4; i++) {
        four += u.part[i];
    }
    return (four[0] + four[1]) + (four[2] + four[3]);
}

// ---- softmax ------------------------------------------------------------------------------------------------------
//
// Blocks of scores one after the other, for some rows of KEYS. A score s weighs 2^(s - top). `top` is no smaller than
// the largest score of the row so far minus SLACK: so it seldom moves, and what follows does not wait for it. A sum of
// weights is kept as a vector; total() of it comes last.

static const float SLACK = 8.0f;

INLINE vf highest(const float * s, int64_t n) {
    vf high = LOAD(s);
    for (int64_t i = LANES; i < n; i += LANES) {
        high = vmax(high, LOAD(s + i));
    }
    return high;
}

// First for a block: tops that its scores n to a row need. Where one moves, the sums so far are scaled down to it. Then
// comes softmax_weights of simd_f32.h or simd_bf16.h.
INLINE void softmax_tops(const float * s, int64_t rows, int64_t n, float * top, vf * sum, float * out, int64_t n_out) {
    vf beyond = (vf) { 0 };
    for (int64_t i = 0; i < rows; i++) {
        beyond = vmax(beyond, highest(s + i * KEYS, n) - (top[i] + SLACK));
    }
    if (largest(beyond, 0.0f) <= 0.0f) {
        return;
    }
    for (int64_t i = 0; i < rows; i++) {
        const float now = largest(highest(s + i * KEYS, n), top[i]);
        if (!(now <= top[i])) {
            const vf factor = vexp2((vf) { 0 } + (top[i] - now));
            for (int64_t j = 0; j < n_out; j += LANES) {
                STORE(out + i * n_out + j, LOAD(out + i * n_out + j) * factor);
            }
            sum[i] *= factor;
            top[i] = now;
        }
    }
}
