// Columns rounded to 8 bits, for avx2_products.h
#pragma once

#include "kernels/q8_groups.h"

#include <immintrin.h>

enum { LINE = 64 }; // bytes

typedef q8_groups q8_column;

// To the second-level cache. Nothing happens where there is no memory.
INLINE void fetch(const char * p, int64_t n) {
    for (int64_t i = 0; i < n; i += LINE) {
        _mm_prefetch(p + i, _MM_HINT_T1);
    }
}

INLINE float largest_of(__m256 x) {
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}

// The largest of 32 values without their signs, in each lane that of every eighth
INLINE __m256 sizes_of(const float * x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256       v[4];
    UNROLL for (int i = 0; i < 4; i++) {
        v[i] = _mm256_andnot_ps(sign, _mm256_loadu_ps(x + 8 * i));
    }
    return _mm256_max_ps(_mm256_max_ps(v[0], v[1]), _mm256_max_ps(v[2], v[3]));
}

// 32 values times a factor, rounded
INLINE __m256i rounded(const float * x, float factor) {
    __m256i q[4];
    UNROLL for (int i = 0; i < 4; i++) {
        q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_set1_ps(factor), _mm256_loadu_ps(x + 8 * i)));
    }
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

INLINE int sum_of(__m128i x) { // of four
    const __m128i two = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

// Puts 32 values there.
INLINE void put_group(q8_column * out, int group, const float * x, float largest) {
    const __m256i q    = rounded(x, largest > 0.0f ? 127.0f / largest : 0.0f);
    const __m256i two  = _mm256_maddubs_epi16(_mm256_set1_epi8(1), q);
    const __m256i four = _mm256_madd_epi16(two, _mm256_set1_epi16(1));
    const int     sums[2] = { sum_of(_mm256_castsi256_si128(four)), sum_of(_mm256_extracti128_si256(four, 1)) };
    _mm256_store_si256((__m256i *) (out->q + SMALL_BLOCK * group), q);
    out->sums16[2 * group]     = (int16_t) sums[0];
    out->sums16[2 * group + 1] = (int16_t) sums[1];
    out->sums32[group]         = (int16_t) (sums[0] + sums[1]);
    out->d[group]              = largest / 127.0f;
}

// n values, each 256 with one factor
static void quantize_256(const float * x, int64_t n, void * to) {
    for (q8_column * out = to; n > 0; n -= QUANT_BLOCK, x += QUANT_BLOCK, out++) {
        __m256 most = _mm256_setzero_ps();
        for (int i = 0; i < GROUPS; i++) {
            most = _mm256_max_ps(most, sizes_of(x + SMALL_BLOCK * i));
        }
        const float largest = largest_of(most);
        for (int i = 0; i < GROUPS; i++) {
            put_group(out, i, x + SMALL_BLOCK * i, largest);
        }
    }
}

// The same, each 32 with one factor
static void quantize_32(const float * x, int64_t n, void * to) {
    for (q8_column * out = to; n > 0; n -= QUANT_BLOCK, x += QUANT_BLOCK, out++) {
        for (int i = 0; i < GROUPS; i++) {
            const float * some = x + SMALL_BLOCK * i;
            put_group(out, i, some, largest_of(sizes_of(some)));
        }
    }
}
