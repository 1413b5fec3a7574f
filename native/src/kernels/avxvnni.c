// Products with quantized weights by AVX-VNNI, with AVX2, FMA and F16C
#include "kernels/kernel.h"

#include <immintrin.h>

// Sums of products are of 32 bits: any number of steps fits them.
enum { Q5_K_STEPS = 8, Q6_K_STEPS = 4 };

// sum + the weights times the column's values
INLINE __m256i add_step(__m256i sum, __m256i w, __m256i x) {
    return _mm256_dpbusd_avx_epi32(sum, w, x);
}

// sum + the pairs of a times those of b, of 16 bits
INLINE __m256i add_pairs(__m256i sum, __m256i a, __m256i b) {
    return _mm256_dpwssd_avx_epi32(sum, a, b);
}

// Scales of 32 bits in the form that add_scaled takes
INLINE __m256i as_scale(__m256i s) {
    return s;
}

// block + scale times the sums of steps, of 32 bits
INLINE __m256i add_scaled(__m256i block, __m256i sum, __m256i scale) {
    return _mm256_add_epi32(block, _mm256_mullo_epi32(sum, scale));
}

#include "kernels/avx2_products.h"

const cpu_quantized cpu_quantized_avxvnni = PRODUCTS(quantize_256, multiply_column_256, multiply_columns_256);
const cpu_quantized cpu_quantized_avxvnni_32 = PRODUCTS(quantize_32, multiply_column_32, multiply_columns_32);
