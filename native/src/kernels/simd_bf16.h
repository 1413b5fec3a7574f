// Factors of BF16 for simd_block.h, see simd_types.h. The file defines before:
//
//     void narrow(float * s, int64_t n)    n values in whole vectors become factors, in place
#pragma once

#include "kernels/simd_types.h"

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
        narrow(some, 2 * LANES);
        for (int64_t j = 0; j < m / 2; j++) {
            to[(i / 2 + j) * stride] = ((const factor *) some)[j];
        }
    }
}
