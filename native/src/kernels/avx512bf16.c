// Products of BF16 with AVX512-BF16; the rest is F32
#define LANES 16
#define ROWS 12
#define VECTORS 2
#include "kernels/simd_types.h"

#include <immintrin.h>

INLINE vf vmax(vf a, vf b) {
    return _mm512_max_ps(a, b);
}

typedef bf16_pair factor;
enum { PER_FACTOR = 2 }; // values in a factor

// sum + a times LANES factors in memory
INLINE vf multiply_add(vf sum, factor a, const factor * p) {
    return _mm512_dpbf16_ps(sum, (__m512bh) _mm512_set1_epi32((int) a), (__m512bh) _mm512_loadu_si512(p));
}

// n values in whole vectors become factors, in place.
INLINE void narrow(float * s, int64_t n) {
    for (int64_t i = 0; i < n; i += 2 * LANES) {
        const __m512bh pairs = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(s + i + LANES), _mm512_loadu_ps(s + i));
        _mm512_storeu_si512(s + i / 2, (__m512i) pairs);
    }
}

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

#include "kernels/simd_block.h"

const cpu_bf16 cpu_bf16_avx512bf16 = {
    .lanes  = LANES,
    .width  = WIDTH,
    .attend = attend,
    .linear = linear,
};
