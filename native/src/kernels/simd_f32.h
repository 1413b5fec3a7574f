// Factors of F32 for simd_block.h, and arrays of erf and GELU, see simd_types.h
#pragma once

#include "kernels/simd_math.h"

typedef float factor;
enum { PER_FACTOR = 1 }; // values in a factor

// sum + a times LANES factors in memory
INLINE vf multiply_add(vf sum, factor a, const factor * p) {
    return sum + a * LOAD(p);
}

// to[i * stride] = scale * from[i] as factors, n values
INLINE void spread(const float * from, float scale, int64_t n, factor * to, int64_t stride) {
    for (int64_t i = 0; i < n; i++) {
        to[i * stride] = scale * from[i];
    }
}

// After softmax_tops: rows of n scores become weights, which are factors, and their sums are added up.
INLINE void softmax_weights(float * s, int64_t rows, int64_t n, const float * top, vf * sum) {
    for (int64_t i = 0; i < rows; i++, s += KEYS) {
        const vf now  = (vf) { 0 } + top[i];
        vf       sums = sum[i];
        for (int64_t j = 0; j < n; j += LANES) {
            const vf p = vexp2(LOAD(s + j) - now);
            STORE(s + j, p);
            sums += p;
        }
        sum[i] = sums;
    }
}

static void erf_array(const float * x, float * y, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        STORE(y + i, verf(LOAD(x + i)));
    }
    float rest[LANES] = { 0 };
    memcpy(rest, x + i, sizeof(float) * (size_t) (n - i));
    STORE(rest, verf(LOAD(rest)));
    memcpy(y + i, rest, sizeof(float) * (size_t) (n - i));
}

static void bias_gelu(float * x, const float * bias, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vf v = LOAD(x + i);
        if (bias) {
            v += LOAD(bias + i);
        }
        STORE(x + i, vgelu(v));
    }
    float rest[LANES] = { 0 };
    for (int64_t j = i; j < n; j++) {
        rest[j - i] = bias ? x[j] + bias[j] : x[j];
    }
    STORE(rest, vgelu(LOAD(rest)));
    memcpy(x + i, rest, sizeof(float) * (size_t) (n - i));
}
