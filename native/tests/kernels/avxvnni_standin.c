// The products by AVX-VNNI, with its two instructions written in others: for processors that lack them.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

// sum + four products of bytes, those of a without a sign
static inline __m256i dot_bytes(__m256i sum, __m256i a, __m256i b) {
    int32_t sums[8];
    uint8_t x[32];
    int8_t  y[32];
    memcpy(sums, &sum, sizeof(sums));
    memcpy(x, &a, sizeof(x));
    memcpy(y, &b, sizeof(y));
    for (int i = 0; i < 32; i++) {
        sums[i / 4] += x[i] * y[i];
    }
    memcpy(&sum, sums, sizeof(sums));
    return sum;
}

// sum + two products of 16 bits
static inline __m256i dot_pairs(__m256i sum, __m256i a, __m256i b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}

#define _mm256_dpbusd_avx_epi32  dot_bytes
#define _mm256_dpwssd_avx_epi32  dot_pairs
#define cpu_quantized_avxvnni    cpu_quantized_avxvnni_standin
#define cpu_quantized_avxvnni_32 cpu_quantized_avxvnni_32_standin
#include "../../src/kernels/avxvnni.c"
