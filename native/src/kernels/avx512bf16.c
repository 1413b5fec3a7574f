// Products of BF16 with AVX512-BF16; the rest is F32
#define LANES 16
#define ROWS 12
#define VECTORS 2
#include "kernels/simd_types.h"

#include <immintrin.h>

INLINE vf vmax(vf a, vf b) {
    return _mm512_max_ps(a, b);
}

// 32 values become 16 pairs
INLINE void narrow_two(vf a, vf b, bf16_pair * to) {
    _mm512_storeu_si512(to, (__m512i) _mm512_cvtne2ps_pbh(b, a));
}

#include "kernels/simd_bf16.h"

// sum + a times LANES factors in memory
INLINE vf multiply_add(vf sum, factor a, const factor * p) {
    return _mm512_dpbf16_ps(sum, (__m512bh) _mm512_set1_epi32((int) a), (__m512bh) _mm512_loadu_si512(p));
}

#include "kernels/simd_block.h"

const cpu_bf16 cpu_bf16_avx512bf16 = {
    .lanes   = LANES,
    .width   = WIDTH,
    .columns = COLUMNS,
    .attend  = attend,
    .linear  = linear,
};
