// Factors of BF16 for simd_block.h, see simd_types.h. The file defines before:
//
//     void narrow_two(vf a, vf b, bf16_pair * to)    two vectors become LANES pairs in memory
#pragma once

#include "kernels/simd_math.h"

typedef bf16_pair factor;
enum { PER_FACTOR = 2 }; // values in a factor

// to[i * stride] = scale * from[2 i, 2 i + 1] as factors, n values
INLINE void spread(const float * from, float scale, int64_t n, factor * to, int64_t stride) {
    float __attribute__((aligned(64))) some[2 * LANES] = { 0 };
    for (int64_t i = 0; i < n; i += 2 * LANES) {
        const int64_t m = n - i < 2 * LANES ? n - i : 2 * LANES;
        for (int64_t j = 0; j < m; j++) {
            some[j] = scale * from[i + j];
        }
        factor __attribute__((aligned(64))) pairs[LANES];
        narrow_two(LOAD(some), LOAD(some + LANES), pairs);
        for (int64_t j = 0; j < m / 2; j++) {
            to[(i / 2 + j) * stride] = pairs[j];
        }
    }
}

// 2^x as vexp2 has it, for what is rounded to BF16: relative error 8e-5
INLINE vf vexp2_near(vf x) {
    x = vmax((vf) { 0 } - 125.0f, x);
#ifdef __AVX512DQ__ // f from 0 to 1, which the last operation scales by 2^floor(x)
    const vf f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    vf       p = 0.07802452147006989f * f + 0.22606715559959412f;
    p = p * f + 0.6958335638046265f;
    p = p * f + 0.9999251961708069f;
    return _mm512_scalef_ps(p, x);
#else
    const vf shift = (vf) { 0 } + 12582912.0f, whole = x + shift, f = x - (whole - shift); // as in vexp2
    vf       p     = 0.0551716685295105f * f + 0.2426111251115799f;
    p = p * f + 0.6932609677314758f;
    p = p * f + 0.9999280571937561f;
    return (vf) ((vw) p + ((vw) whole << 23));
#endif
}

// After softmax_tops: rows of n scores, whole pairs of vectors, become weights as factors, at the beginning of their
// rows; and the sums of weights are added up.
INLINE void softmax_weights(float * s, int64_t rows, int64_t n, const float * top, vf * sum) {
    for (int64_t i = 0; i < rows; i++, s += KEYS) {
        const vf now  = (vf) { 0 } + top[i];
        vf       sums = sum[i];
        for (int64_t j = 0; j < n; j += 2 * LANES) {
            const vf a = vexp2_near(LOAD(s + j) - now), b = vexp2_near(LOAD(s + j + LANES) - now);
            narrow_two(a, b, (factor *) (s + j / 2));
            sums += a + b;
        }
        sum[i] = sums;
    }
}
