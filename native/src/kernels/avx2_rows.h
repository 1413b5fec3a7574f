// Products of rows in place with a single column, for avx2_products.h
#pragma once

#include "kernels/avx2_columns.h"

enum { AHEAD = 8192 }; // bytes of rows that are on their way from memory while one is multiplied

INLINE float sum_floats(__m256 x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two  = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

INLINE __m256i load(const void * p) {
    return _mm256_loadu_si256((const __m256i *) p);
}

// By which a shuffle makes copies of 16-bit item `low` of eight in the lower half, and of item `high` in the upper one
INLINE __m256i copies(int low, int high) {
    return _mm256_set_m128i(_mm_set1_epi16((int16_t) (0x0101 * 2 * high + 0x100)),
                            _mm_set1_epi16((int16_t) (0x0101 * 2 * low + 0x100)));
}

// A row of n blocks times a column, while the row at `ahead` is fetched
INLINE float dot_q4_k(const void * row, const q8_column * x, int64_t n, const char * ahead) {
    const q4_k_block * w     = row;
    const __m256i      low   = _mm256_set1_epi8(0x0f);
    __m256             sum   = _mm256_setzero_ps();
    __m128             taken = _mm_setzero_ps();
    for (int64_t i = 0; i < n; i++) {
        fetch(ahead + (size_t) i * sizeof(*w), sizeof(*w));
        uint64_t packed_scales, packed_mins;
        q4_k_scales(&w[i], &packed_scales, &packed_mins);
        const __m128i scales = _mm_cvtepu8_epi16(_mm_cvtsi64_si128((int64_t) packed_scales));
        const __m128i mins   = _mm_cvtepu8_epi16(_mm_cvtsi64_si128((int64_t) packed_mins));
        const __m256i all    = _mm256_broadcastsi128_si256(scales);
        __m256i       block[2] = { _mm256_setzero_si256(), _mm256_setzero_si256() };
        UNROLL for (int j = 0; j < 4; j++) {
            const __m256i both = load(w[i].q + 32 * j);
            const __m256i q[2] = { _mm256_and_si256(both, low), _mm256_and_si256(_mm256_srli_epi16(both, 4), low) };
            UNROLL for (int k = 0; k < 2; k++) { // two products are at most 15 * 127
                const __m256i products = _mm256_maddubs_epi16(q[k], load(x[i].q + 64 * j + 32 * k));
                const __m256i scale    = _mm256_shuffle_epi8(all, copies(2 * j + k, 2 * j + k));
                block[k] = add_pairs(block[k], products, scale);
            }
        }
        int32_t factors; // d and dmin
        memcpy(&factors, &w[i], sizeof(factors));
        const __m128  d     = _mm_mul_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(factors)), _mm_set1_ps(x[i].d[0]));
        const __m128i least = _mm_madd_epi16(mins, _mm_load_si128((const __m128i *) x[i].sums32));
        const __m256  part  = _mm256_cvtepi32_ps(_mm256_add_epi32(block[0], block[1]));
        sum   = _mm256_fmadd_ps(part, _mm256_broadcastss_ps(d), sum);
        taken = _mm_fmadd_ps(_mm_cvtepi32_ps(least), _mm_broadcastss_ps(_mm_movehdup_ps(d)), taken);
    }
    return sum_floats(_mm256_sub_ps(sum, _mm256_zextps128_ps256(taken)));
}

// The same with a row of Q6_K
INLINE float dot_q6_k(const void * row, const q8_column * x, int64_t n, const char * ahead) {
    const q6_k_block * w   = row;
    const __m256i      low = _mm256_set1_epi8(0x0f), top = _mm256_set1_epi8(0x30);
    __m256             sum = _mm256_setzero_ps();
    for (int64_t i = 0; i < n; i++) {
        fetch(ahead + (size_t) i * sizeof(*w), sizeof(*w));
        const __m256i scales = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *) w[i].scales));
        const __m256i least  = _mm256_madd_epi16(scales, load(x[i].sums16));
        __m256i       block[2] = { _mm256_setzero_si256(), _mm256_setzero_si256() };
        UNROLL for (int half = 0; half < 2; half++) {
            const __m256i all  = half ? _mm256_permute4x64_epi64(scales, 0xee) // its scales; Clang wants constants
                                      : _mm256_permute4x64_epi64(scales, 0x44);
            const __m256i high = load(w[i].high + 32 * half);
            const __m256i a    = load(w[i].low + 64 * half), b = load(w[i].low + 64 * half + 32);
            const __m256i lower[4] = { a, b, _mm256_srli_epi16(a, 4), _mm256_srli_epi16(b, 4) };
            const __m256i upper[4] = { _mm256_slli_epi16(high, 4), _mm256_slli_epi16(high, 2), high,
                                       _mm256_srli_epi16(high, 2) };
            UNROLL for (int j = 0; j < 4; j++) { // two products are at most 63 * 127
                const __m256i q = _mm256_or_si256(_mm256_and_si256(lower[j], low), _mm256_and_si256(upper[j], top));
                const __m256i products = _mm256_maddubs_epi16(q, load(x[i].q + 128 * half + 32 * j));
                const __m256i scale    = _mm256_shuffle_epi8(all, copies(2 * j, 2 * j + 1));
                block[j % 2] = add_pairs(block[j % 2], products, scale);
            }
        }
        const __m256i whole = _mm256_sub_epi32(_mm256_add_epi32(block[0], block[1]), _mm256_slli_epi32(least, 5));
        const __m256  d     = _mm256_mul_ps(_mm256_cvtph_ps(_mm_set1_epi16((int16_t) w[i].d)),
                                            _mm256_set1_ps(x[i].d[0]));
        sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), d, sum);
    }
    return sum_floats(sum);
}

// The factors of eight blocks, `size` bytes apart, times those of the column
INLINE void factors_of(const void * first, size_t size, const q8_column * x, float * out) {
    uint16_t d[GROUPS];
    UNROLL for (int i = 0; i < GROUPS; i++) {
        memcpy(&d[i], (const char *) first + (size_t) i * size, sizeof(d[i]));
    }
    const __m128i all = _mm_setr_epi16((int16_t) d[0], (int16_t) d[1], (int16_t) d[2], (int16_t) d[3], (int16_t) d[4],
                                       (int16_t) d[5], (int16_t) d[6], (int16_t) d[7]);
    _mm256_store_ps(out, _mm256_mul_ps(_mm256_cvtph_ps(all), _mm256_load_ps(x->d)));
}

// With a row of Q8_0 or Q4_0
INLINE float dot_32(const void * row, const bool q4, const q8_column * x, int64_t n, const char * ahead) {
    const size_t  size = q4 ? sizeof(q4_0_block) : sizeof(q8_0_block);
    const __m256i one  = _mm256_set1_epi16(1), eight = _mm256_set1_epi8(8), low = _mm256_set1_epi8(0x0f);
    const char *  w    = row;
    __m256        sum[2] = { _mm256_setzero_ps(), _mm256_setzero_ps() };
    float         d[GROUPS] __attribute__((aligned(32)));
    for (int64_t i = 0; i < n; i++, w += GROUPS * size, ahead += GROUPS * size) {
        fetch(ahead, (int64_t) (GROUPS * size));
        factors_of(w, size, &x[i], d);
        UNROLL for (int j = 0; j < GROUPS; j++) {
            const char *  at = w + (size_t) j * size + sizeof(ggml_fp16_t);
            const __m256i in = load(x[i].q + SMALL_BLOCK * j);
            __m256i       products; // two are at most 15 * 127 + 8 * 127, or 128 * 127
            if (q4) {
                const __m128i both = _mm_loadu_si128((const __m128i *) at);
                const __m256i q    = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(both, 4), both), low);
                products = _mm256_sub_epi16(_mm256_maddubs_epi16(q, in), _mm256_maddubs_epi16(eight, in));
            } else {
                const __m256i q = load(at);
                products = _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(in, q));
            }
            const __m256 part = _mm256_cvtepi32_ps(add_pairs(_mm256_setzero_si256(), products, one));
            sum[j % 2] = _mm256_fmadd_ps(part, _mm256_broadcast_ss(d + j), sum[j % 2]);
        }
    }
    return sum_floats(_mm256_add_ps(sum[0], sum[1]));
}

INLINE float dot(enum ggml_type type, const char * row, const q8_column * x, int64_t n, const char * ahead) {
    switch (type) {
        case GGML_TYPE_Q4_K: return dot_q4_k(row, x, n, ahead);
        case GGML_TYPE_Q6_K: return dot_q6_k(row, x, n, ahead);
        default:             return dot_32(row, type == GGML_TYPE_Q4_0, x, n, ahead);
    }
}

// Rows are fetched ahead: left alone, a processor foresees badly where a column does not fit the first-level cache
// beside the rows.
INLINE void multiply_rows(const enum ggml_type type, const struct ggml_tensor * w, const q8_column * x, int64_t first,
                          int64_t end, int64_t then, float * out) {
    const int64_t n = w->ne[0] / QUANT_BLOCK, stride = (int64_t) w->nb[1], n_ahead = (AHEAD + stride - 1) / stride;
    for (int64_t i = first; i < end; i++) {
        const int64_t next = i + n_ahead < end ? i + n_ahead : then + i + n_ahead - end;
        out[i] = dot(type, (const char *) w->data + i * stride, x, n, (const char *) w->data + next * stride);
    }
}

static void multiply_column_256(const struct ggml_tensor * w, const void * x, int64_t first, int64_t end,
                                int64_t then, float * out) {
    if (w->type == GGML_TYPE_Q4_K) {
        multiply_rows(GGML_TYPE_Q4_K, w, x, first, end, then, out);
    } else {
        multiply_rows(GGML_TYPE_Q6_K, w, x, first, end, then, out);
    }
}

static void multiply_column_32(const struct ggml_tensor * w, const void * x, int64_t first, int64_t end, int64_t then,
                               float * out) {
    if (w->type == GGML_TYPE_Q4_0) {
        multiply_rows(GGML_TYPE_Q4_0, w, x, first, end, then, out);
    } else {
        multiply_rows(GGML_TYPE_Q8_0, w, x, first, end, then, out);
    }
}
