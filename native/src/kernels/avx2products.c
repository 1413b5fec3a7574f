// Products with quantized weights by AVX2, with FMA and F16C
#include "kernels/kernel.h"

#include <immintrin.h>

// Sums of products are of 16 bits, in pairs. So many steps of four weights fit them:
enum {
    Q5_K_STEPS = 4, // 4 * 2 * 31 * 127 < 2^15
    Q6_K_STEPS = 2, // 2 * 2 * 63 * 127 < 2^15; of the weights of Q4_K and Q4_0 eight do
};

// sum + the weights times the column's values
INLINE __m256i add_step(__m256i sum, __m256i w, __m256i x) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x));
}

// sum + the pairs of a times those of b, of 16 bits
INLINE __m256i add_pairs(__m256i sum, __m256i a, __m256i b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}

// Scales of 32 bits in the form that add_scaled takes
INLINE __m256i as_scale(__m256i s) {
    return _mm256_blend_epi16(s, _mm256_slli_epi32(s, 16), 0xaa);
}

// block + scale times the sums of steps, of 32 bits
INLINE __m256i add_scaled(__m256i block, __m256i sum, __m256i scale) {
    return add_pairs(block, sum, scale);
}

#include "kernels/avx2_products.h"

const cpu_quantized cpu_quantized_avx2 = PRODUCTS(quantize_256, multiply_column_256, multiply_columns_256);
const cpu_quantized cpu_quantized_avx2_32 = PRODUCTS(quantize_32, multiply_column_32, multiply_columns_32);
