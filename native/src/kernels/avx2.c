// AVX2, FMA and F16C
#define LANES 8
#define ROWS 6
#define VECTORS 2
#include "kernels/simd_types.h"

#include <immintrin.h>

INLINE vf vmax(vf a, vf b) {
    return _mm256_max_ps(a, b);
}

INLINE vf widen(const ggml_fp16_t * p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p));
}

INLINE v4f totals(vf a, vf b, vf c, vf d) {
    const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

#include "kernels/simd_f32.h"

#include "kernels/simd_block.h"
#include "kernels/simd_rows.h"

const cpu_f32 cpu_f32_avx2 = {
    .lanes       = LANES,
    .width       = WIDTH,
    .multiplies  = true,
    .attend      = attend,
    .attend_rows = attend_rows,
    .linear      = linear,
    .bias_gelu   = bias_gelu,
    .erf_array   = erf_array,
};
