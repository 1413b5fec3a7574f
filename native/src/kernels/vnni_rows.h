// Columns rounded to 8 bits, and rows in place multiplied by a single one, for vnni.c
#pragma once

#include "kernels/q8_column.h"
#include "kernels/vnni_panels.h"

enum { AHEAD = 8192 }; // bytes of rows that are on their way from memory while one is multiplied

// ---- columns ------------------------------------------------------------------------------------------------------

// Rounds n values to 8 bits
static void quantize(const float * x, int64_t n, void * to) {
    q8_column * out = to;
    for (; n > 0; n -= QUANT_BLOCK, x += QUANT_BLOCK, out++) {
        __m512 most = _mm512_setzero_ps();
        for (int i = 0; i < QUANT_BLOCK; i += 16) {
            most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
        }
        const float  largest = _mm512_reduce_max_ps(most);
        const __m512 factor  = _mm512_set1_ps(largest > 0.0f ? 127.0f / largest : 0.0f);
        out->d = largest / 127.0f;
        for (int i = 0; i < QUANT_BLOCK / 16; i++) {
            const int     at = 2 * PLACE[i / 2] + i % 2;
            const __m512i q  = _mm512_cvtps_epi32(_mm512_mul_ps(factor, _mm512_loadu_ps(x + 16 * i)));
            _mm_storeu_si128((__m128i *) (out->q + 16 * at), _mm512_cvtsepi32_epi8(q));
            const int sum = _mm512_reduce_add_epi32(q);
            out->sums16[i]   = (int16_t) sum;
            out->offsets[at] = -32 * sum;
        }
        for (int i = 0; i < 8; i++) {
            out->sums32[i] = (int16_t) (out->sums16[2 * i] + out->sums16[2 * i + 1]);
        }
    }
}

// ---- a single column ----------------------------------------------------------------------------------------------

// A row of n blocks of Q4_K or, `five`, of Q5_K times a column, while the row at `ahead` is fetched
INLINE float dot_with_mins(const bool five, const char * row, const q8_column * x, int64_t n, const char * ahead) {
    const int64_t size = five ? sizeof(q5_k_block) : sizeof(q4_k_block);
    const __m512i low = _mm512_set1_epi8(0x0f), fifth = _mm512_set1_epi8(0x10);
    __m512i       index[4], turn[4];
    UNROLL for (int i = 0; i < 4; i++) { // the scales of the two times 32 weights in a vector
        const int16_t first = (int16_t) (4 * (i / 2) + i % 2);
        index[i] = _mm512_inserti64x4(_mm512_set1_epi16(first), _mm256_set1_epi16((int16_t) (first + 2)), 1);
        // their bits above to bit 4: a rotation to the left
        turn[i] = _mm512_inserti64x4(_mm512_set1_epi32((4 - first) & 31), _mm256_set1_epi32((2 - first) & 31), 1);
    }
    __m512 sum   = _mm512_setzero_ps();
    __m128 taken = _mm_setzero_ps();
    for (int64_t i = 0; i < n; i++) {
        const char * block_at = row + i * size;
        fetch(ahead + i * size, size);
        uint64_t packed_scales, packed_mins;
        k_scales((const uint8_t *) block_at + offsetof(q4_k_block, scales), &packed_scales, &packed_mins);
        const __m128i scales = _mm_cvtepu8_epi16(_mm_cvtsi64_si128((int64_t) packed_scales));
        const __m128i mins   = _mm_cvtepu8_epi16(_mm_cvtsi64_si128((int64_t) packed_mins));
        const char *  at = block_at + (five ? offsetof(q5_k_block, q) : offsetof(q4_k_block, q));
        const __m512i a = _mm512_loadu_si512(at), b = _mm512_loadu_si512(at + 64);
        __m512i       q[4] = {
            _mm512_and_si512(a, low), _mm512_and_si512(_mm512_srli_epi16(a, 4), low),
            _mm512_and_si512(b, low), _mm512_and_si512(_mm512_srli_epi16(b, 4), low),
        };
        if (five) {
            const __m256i bits = _mm256_loadu_si256((const __m256i *) (block_at + offsetof(q5_k_block, high)));
            const __m512i high = _mm512_broadcast_i64x4(bits);
            UNROLL for (int j = 0; j < 4; j++) { // q or (high and fifth)
                q[j] = _mm512_ternarylogic_epi32(q[j], _mm512_rolv_epi32(high, turn[j]), fifth, 0xf8);
            }
        }
        __m512i block = _mm512_setzero_si512();
        UNROLL for (int j = 0; j < 4; j++) {
            // two at most 31 * 127
            const __m512i products = _mm512_maddubs_epi16(q[j], _mm512_load_si512(x[i].q + 64 * j));
            const __m512i scale    = _mm512_permutexvar_epi16(index[j], _mm512_castsi128_si512(scales));
            block = _mm512_dpwssd_epi32(block, products, scale);
        }
        int32_t both; // d and dmin
        memcpy(&both, block_at, sizeof(both));
        const __m128  d     = _mm_mul_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(both)), _mm_set1_ps(x[i].d));
        const __m128i least = _mm_madd_epi16(mins, _mm_load_si128((const __m128i *) x[i].sums32));
        sum   = _mm512_fmadd_ps(_mm512_cvtepi32_ps(block), _mm512_broadcastss_ps(d), sum);
        taken = _mm_fmadd_ps(_mm_cvtepi32_ps(least), _mm_broadcastss_ps(_mm_movehdup_ps(d)), taken);
    }
    return _mm512_reduce_add_ps(_mm512_sub_ps(sum, _mm512_zextps128_ps512(taken)));
}

// The same with a row of Q6_K.
INLINE float dot_q6_k(const char * row, const q8_column * x, int64_t n, const char * ahead) {
    const q6_k_block * w    = (const void *) row;
    const __m512i      low  = _mm512_set1_epi8(0x0f), all = _mm512_set1_epi8(0x3f);
    const __m512i      down = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1); // to s = 2 and 3
    // to bits 4 and 5; a rotation by 30 to the left is one by 2 to the right
    const __m512i turn[2] = { _mm512_inserti64x4(_mm512_set1_epi32(4), _mm256_setzero_si256(), 1),
                              _mm512_inserti64x4(_mm512_set1_epi32(2), _mm256_set1_epi32(30), 1) };
    __m512i       index[4];
    UNROLL for (int i = 0; i < 4; i++) { // the scales of the four times 16 weights in a vector
        const int16_t first = (int16_t) (8 * (i / 2) + 2 * (i % 2));
        const __m128i next  = _mm_set1_epi16((int16_t) (first + 1));
        const __m256i a     = _mm256_inserti128_si256(_mm256_set1_epi16(first), next, 1);
        index[i] = _mm512_inserti64x4(_mm512_castsi256_si512(a), _mm256_add_epi16(a, _mm256_set1_epi16(4)), 1);
    }
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i++) {
        fetch(ahead + (size_t) i * sizeof(*w), sizeof(*w));
        const __m256i scales = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *) w[i].scales));
        const __m256i least  = _mm256_madd_epi16(scales, _mm256_load_si256((const __m256i *) x[i].sums16));
        const __m512i taken  = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_zextsi256_si512(least));
        __m512i       block  = _mm512_slli_epi32(taken, 5);
        UNROLL for (int j = 0; j < 4; j++) {
            const __m512i a = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) (w[i].low + 32 * j)));
            const __m512i b = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) (w[i].high + 32 * (j / 2))));
            const __m512i lower = _mm512_srlv_epi16(a, down), upper = _mm512_rolv_epi32(b, turn[j % 2]);
            const __m512i both  = _mm512_ternarylogic_epi32(low, lower, upper, 0xca); // low ? lower : upper
            const __m512i q     = _mm512_and_si512(both, all);
            // two at most 63 * 127
            const __m512i products = _mm512_maddubs_epi16(q, _mm512_load_si512(x[i].q + 64 * j));
            const __m512i scale    = _mm512_permutexvar_epi16(index[j], _mm512_castsi256_si512(scales));
            block = _mm512_dpwssd_epi32(block, products, scale);
        }
        const __m512 d = _mm512_mul_ps(_mm512_cvtph_ps(_mm256_set1_epi16((int16_t) w[i].d)), _mm512_set1_ps(x[i].d));
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(block), d, sum);
    }
    return _mm512_reduce_add_ps(sum);
}

// Rows are fetched ahead: left alone, a processor foresees badly where a column does not fit the first-level cache
// beside the rows.
INLINE void multiply_rows(const enum ggml_type type, const struct ggml_tensor * w, const q8_column * x, int64_t first,
                          int64_t end, int64_t then, float * out) {
    const int64_t n = w->ne[0] / QUANT_BLOCK, stride = (int64_t) w->nb[1], n_ahead = (AHEAD + stride - 1) / stride;
    for (int64_t i = first; i < end; i++) {
        const int64_t next  = i + n_ahead < end ? i + n_ahead : then + i + n_ahead - end;
        const char *  row   = (const char *) w->data + i * stride;
        const char *  ahead = (const char *) w->data + next * stride;
        out[i] = type == GGML_TYPE_Q6_K ? dot_q6_k(row, x, n, ahead)
                                        : dot_with_mins(type == GGML_TYPE_Q5_K, row, x, n, ahead);
    }
}

static void multiply_column(const struct ggml_tensor * w, const void * x, int64_t first, int64_t end, int64_t then,
                            float * out) {
    switch (w->type) {
        case GGML_TYPE_Q4_K: multiply_rows(GGML_TYPE_Q4_K, w, x, first, end, then, out); break;
        case GGML_TYPE_Q5_K: multiply_rows(GGML_TYPE_Q5_K, w, x, first, end, then, out); break;
        default:             multiply_rows(GGML_TYPE_Q6_K, w, x, first, end, then, out); break;
    }
}
