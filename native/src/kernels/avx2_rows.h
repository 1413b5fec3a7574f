// Products of rows in place with a single column or a few, for avx2_products.h
#pragma once

#include "kernels/avx2_columns.h"

enum {
    AHEAD = 8192, // bytes of rows that are on their way from memory while one is multiplied
    FEW   = 4,    // most columns; with more, unpacking rows gains more than it costs
};

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

// A row of n blocks of Q4_K or, `five`, of Q5_K times columns, which lie n blocks apart, while the row at `ahead` is
// fetched
INLINE void dot_with_mins(const bool five, const char * row, const q8_column * x, int64_t n, const char * ahead,
                          const int columns, float * out) {
    const int64_t size  = five ? sizeof(q5_k_block) : sizeof(q4_k_block);
    const __m256i low   = _mm256_set1_epi8(0x0f), fifth = _mm256_set1_epi8(0x10);
    const int     parts = columns == 1 ? 2 : 1; // sums that do not wait for each other
    __m256        sum[FEW];
    __m128        taken[FEW];
    UNROLL for (int c = 0; c < columns; c++) {
        sum[c]   = _mm256_setzero_ps();
        taken[c] = _mm_setzero_ps();
    }
    for (int64_t i = 0; i < n; i++) {
        const char * block_at = row + i * size;
        fetch(ahead + i * size, size);
        uint64_t packed_scales, packed_mins;
        k_scales((const uint8_t *) block_at + offsetof(q4_k_block, scales), &packed_scales, &packed_mins);
        const __m128i scales = _mm_cvtepu8_epi16(_mm_cvtsi64_si128((int64_t) packed_scales));
        const __m128i mins   = _mm_cvtepu8_epi16(_mm_cvtsi64_si128((int64_t) packed_mins));
        const __m256i all    = _mm256_broadcastsi128_si256(scales);
        const char *  at     = block_at + (five ? offsetof(q5_k_block, q) : offsetof(q4_k_block, q));
        const __m256i high   = five ? load(block_at + offsetof(q5_k_block, high)) : _mm256_setzero_si256();
        __m256i       block[FEW][2];
        UNROLL for (int c = 0; c < columns; c++) {
            block[c][0] = block[c][1] = _mm256_setzero_si256();
        }
        UNROLL for (int j = 0; j < 8; j++) { // halves of the bytes from 32 (j / 2) on
            const __m256i both  = load(at + j / 2 * 32);
            __m256i       q     = _mm256_and_si256(j % 2 ? _mm256_srli_epi16(both, 4) : both, low);
            if (five) {
                const __m256i above = j <= 4 ? _mm256_slli_epi16(high, 4 - j) : _mm256_srli_epi16(high, j - 4);
                q = _mm256_or_si256(q, _mm256_and_si256(above, fifth));
            }
            const __m256i scale = _mm256_shuffle_epi8(all, copies(j, j));
            UNROLL for (int c = 0; c < columns; c++) { // two products are at most 31 * 127
                const __m256i products = _mm256_maddubs_epi16(q, load(x[c * n + i].q + SMALL_BLOCK * j));
                block[c][j % parts] = add_pairs(block[c][j % parts], products, scale);
            }
        }
        int32_t factors; // d and dmin
        memcpy(&factors, block_at, sizeof(factors));
        const __m128 two = _mm_cvtph_ps(_mm_cvtsi32_si128(factors));
        UNROLL for (int c = 0; c < columns; c++) {
            const q8_column * in    = &x[c * n + i];
            const __m128      d     = _mm_mul_ps(two, _mm_set1_ps(in->d[0]));
            const __m128i     least = _mm_madd_epi16(mins, _mm_load_si128((const __m128i *) in->sums32));
            const __m256      part  = _mm256_cvtepi32_ps(_mm256_add_epi32(block[c][0], block[c][1]));
            sum[c]   = _mm256_fmadd_ps(part, _mm256_broadcastss_ps(d), sum[c]);
            taken[c] = _mm_fmadd_ps(_mm_cvtepi32_ps(least), _mm_broadcastss_ps(_mm_movehdup_ps(d)), taken[c]);
        }
    }
    UNROLL for (int c = 0; c < columns; c++) {
        out[c] = sum_floats(_mm256_sub_ps(sum[c], _mm256_zextps128_ps256(taken[c])));
    }
}

// The same with a row of Q6_K
INLINE void dot_q6_k(const void * row, const q8_column * x, int64_t n, const char * ahead, const int columns,
                     float * out) {
    const q6_k_block * w     = row;
    const __m256i      low   = _mm256_set1_epi8(0x0f), top = _mm256_set1_epi8(0x30);
    const int          parts = columns == 1 ? 2 : 1;
    __m256             sum[FEW];
    UNROLL for (int c = 0; c < columns; c++) {
        sum[c] = _mm256_setzero_ps();
    }
    for (int64_t i = 0; i < n; i++) {
        fetch(ahead + (size_t) i * sizeof(*w), sizeof(*w));
        const __m256i scales = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *) w[i].scales));
        __m256i       block[FEW][2];
        UNROLL for (int c = 0; c < columns; c++) {
            const __m256i least = _mm256_madd_epi16(scales, load(x[c * n + i].sums16));
            block[c][0] = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(least, 5));
            block[c][1] = _mm256_setzero_si256();
        }
        // of each half of the block; Clang wants constants
        const __m256i halves[2] = { _mm256_permute4x64_epi64(scales, 0x44), _mm256_permute4x64_epi64(scales, 0xee) };
        UNROLL for (int half = 0; half < 2; half++) {
            const __m256i high = load(w[i].high + 32 * half);
            const __m256i a    = load(w[i].low + 64 * half), b = load(w[i].low + 64 * half + 32);
            const __m256i lower[4] = { a, b, _mm256_srli_epi16(a, 4), _mm256_srli_epi16(b, 4) };
            const __m256i upper[4] = { _mm256_slli_epi16(high, 4), _mm256_slli_epi16(high, 2), high,
                                       _mm256_srli_epi16(high, 2) };
            UNROLL for (int j = 0; j < 4; j++) {
                const __m256i q = _mm256_or_si256(_mm256_and_si256(lower[j], low), _mm256_and_si256(upper[j], top));
                const __m256i scale = _mm256_shuffle_epi8(halves[half], copies(2 * j, 2 * j + 1));
                UNROLL for (int c = 0; c < columns; c++) { // two products are at most 63 * 127
                    const __m256i products = _mm256_maddubs_epi16(q, load(x[c * n + i].q + 128 * half + 32 * j));
                    block[c][j % parts] = add_pairs(block[c][j % parts], products, scale);
                }
            }
        }
        const __m256 d = _mm256_cvtph_ps(_mm_set1_epi16((int16_t) w[i].d));
        UNROLL for (int c = 0; c < columns; c++) {
            const __m256 part = _mm256_cvtepi32_ps(_mm256_add_epi32(block[c][0], block[c][1]));
            sum[c] = _mm256_fmadd_ps(part, _mm256_mul_ps(d, _mm256_set1_ps(x[c * n + i].d[0])), sum[c]);
        }
    }
    UNROLL for (int c = 0; c < columns; c++) {
        out[c] = sum_floats(sum[c]);
    }
}

// The factors of eight blocks, `size` bytes apart
INLINE __m256 factors_of(const char * first, size_t size) {
    int16_t d[GROUPS];
    UNROLL for (int i = 0; i < GROUPS; i++) {
        memcpy(&d[i], first + (size_t) i * size, sizeof(d[i]));
    }
    return _mm256_cvtph_ps(_mm_setr_epi16(d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]));
}

// The same with a row of Q8_0 or Q4_0
INLINE void dot_32(const void * row, const bool q4, const q8_column * x, int64_t n, const char * ahead,
                   const int columns, float * out) {
    const size_t  size  = q4 ? sizeof(q4_0_block) : sizeof(q8_0_block);
    const __m256i one   = _mm256_set1_epi16(1), eight = _mm256_set1_epi8(8), low = _mm256_set1_epi8(0x0f);
    const int     parts = columns == 1 ? 2 : 1;
    const char *  w     = row;
    __m256        sum[FEW][2];
    float         d[FEW][GROUPS] __attribute__((aligned(32)));
    UNROLL for (int c = 0; c < columns; c++) {
        sum[c][0] = sum[c][1] = _mm256_setzero_ps();
    }
    for (int64_t i = 0; i < n; i++, w += GROUPS * size, ahead += GROUPS * size) {
        fetch(ahead, (int64_t) (GROUPS * size));
        const __m256 factors = factors_of(w, size);
        UNROLL for (int c = 0; c < columns; c++) {
            _mm256_store_ps(d[c], _mm256_mul_ps(factors, _mm256_load_ps(x[c * n + i].d)));
        }
        UNROLL for (int j = 0; j < GROUPS; j++) {
            const char * at = w + (size_t) j * size + sizeof(ggml_fp16_t);
            __m256i      q;
            if (q4) {
                const __m128i both = _mm_loadu_si128((const __m128i *) at);
                q = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(both, 4), both), low);
            } else {
                q = load(at);
            }
            UNROLL for (int c = 0; c < columns; c++) {
                const __m256i in = load(x[c * n + i].q + SMALL_BLOCK * j);
                // two products are at most 15 * 127 + 8 * 127, or 128 * 127
                const __m256i products = q4 ? _mm256_sub_epi16(_mm256_maddubs_epi16(q, in),
                                                               _mm256_maddubs_epi16(eight, in))
                                            : _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(in, q));
                const __m256  part     = _mm256_cvtepi32_ps(add_pairs(_mm256_setzero_si256(), products, one));
                sum[c][j % parts] = _mm256_fmadd_ps(part, _mm256_broadcast_ss(&d[c][j]), sum[c][j % parts]);
            }
        }
    }
    UNROLL for (int c = 0; c < columns; c++) {
        out[c] = sum_floats(_mm256_add_ps(sum[c][0], sum[c][1]));
    }
}

INLINE void dot(const enum ggml_type type, const char * row, const q8_column * x, int64_t n, const char * ahead,
                const int columns, float * out) {
    switch (type) {
        case GGML_TYPE_Q4_K: dot_with_mins(false, row, x, n, ahead, columns, out); break;
        case GGML_TYPE_Q5_K: dot_with_mins(true, row, x, n, ahead, columns, out); break;
        case GGML_TYPE_Q6_K: dot_q6_k(row, x, n, ahead, columns, out); break;
        default:             dot_32(row, type == GGML_TYPE_Q4_0, x, n, ahead, columns, out); break;
    }
}

// Rows first to end - 1; the products with a column lie n_out apart from those with the next one. Rows are fetched
// ahead: left alone, a processor foresees badly where a column does not fit the first-level cache beside the rows.
INLINE void multiply_rows(const enum ggml_type type, const struct ggml_tensor * w, const q8_column * x,
                          const int columns, int64_t first, int64_t end, int64_t then, float * out) {
    const int64_t n = w->ne[0] / QUANT_BLOCK, stride = (int64_t) w->nb[1], n_ahead = (AHEAD + stride - 1) / stride;
    for (int64_t i = first; i < end; i++) {
        const int64_t next = i + n_ahead < end ? i + n_ahead : then + i + n_ahead - end;
        float         products[FEW];
        dot(type, (const char *) w->data + i * stride, x, n, (const char *) w->data + next * stride, columns, products);
        for (int c = 0; c < columns; c++) {
            out[c * w->ne[1] + i] = products[c];
        }
    }
}

// 1 to FEW columns. A function for each type: all in one are slower as GCC compiles them.
#define MULTIPLY_FEW(name, type)                                                                                  \
    static __attribute__((noinline)) void name(const struct ggml_tensor * w, const q8_column * x,                 \
                                               int64_t n_columns, int64_t first, int64_t end, int64_t then,       \
                                               float * out) {                                                     \
        switch (n_columns) {                                                                                      \
            case 1: multiply_rows(type, w, x, 1, first, end, then, out); break;                                   \
            case 2: multiply_rows(type, w, x, 2, first, end, then, out); break;                                   \
            case 3: multiply_rows(type, w, x, 3, first, end, then, out); break;                                   \
            case 4: multiply_rows(type, w, x, 4, first, end, then, out); break;                                   \
        }                                                                                                         \
    }
MULTIPLY_FEW(multiply_few_q4_k, GGML_TYPE_Q4_K)
MULTIPLY_FEW(multiply_few_q5_k, GGML_TYPE_Q5_K)
MULTIPLY_FEW(multiply_few_q6_k, GGML_TYPE_Q6_K)
MULTIPLY_FEW(multiply_few_q8_0, GGML_TYPE_Q8_0)
MULTIPLY_FEW(multiply_few_q4_0, GGML_TYPE_Q4_0)
#undef MULTIPLY_FEW

static void multiply_few_256(const struct ggml_tensor * w, const q8_column * x, int64_t n_columns, int64_t first,
                             int64_t end, int64_t then, float * out) {
    switch (w->type) {
        case GGML_TYPE_Q4_K: multiply_few_q4_k(w, x, n_columns, first, end, then, out); break;
        case GGML_TYPE_Q5_K: multiply_few_q5_k(w, x, n_columns, first, end, then, out); break;
        default:             multiply_few_q6_k(w, x, n_columns, first, end, then, out); break;
    }
}

static void multiply_few_32(const struct ggml_tensor * w, const q8_column * x, int64_t n_columns, int64_t first,
                            int64_t end, int64_t then, float * out) {
    if (w->type == GGML_TYPE_Q4_0) {
        multiply_few_q4_0(w, x, n_columns, first, end, then, out);
    } else {
        multiply_few_q8_0(w, x, n_columns, first, end, then, out);
    }
}
