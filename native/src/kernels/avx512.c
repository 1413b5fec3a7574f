// AVX-512F
#define LANES 16
#define ROWS 12
#define VECTORS 2
#include "kernels/simd_types.h"

#include <immintrin.h>

INLINE vf vmax(vf a, vf b) {
    return _mm512_max_ps(a, b);
}

INLINE vf widen(const ggml_fp16_t * p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p));
}

INLINE __m256 high_half(__m512 x) {
    return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1));
}

INLINE v4f totals(vf a, vf b, vf c, vf d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); // a, b, a, b in every quarter
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    // a, b, c, d in every quarter
    const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums), high_half(sums));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

#include "kernels/simd_f32.h"

#include "kernels/simd_block.h"
#include "kernels/simd_rows.h"

const cpu_f32 cpu_f32_avx512 = {
    .lanes       = LANES,
    .width       = WIDTH,
    .multiplies  = true,
    .attend      = attend,
    .attend_rows = attend_rows,
    .linear      = linear,
    .bias_gelu   = bias_gelu,
    .erf_array   = erf_array,
};
