// Products of several columns with rows unpacked to lanes, by AVX512-VNNI. The file that includes this one defines
// before it the form of a column, q8_column.
#pragma once

#include "kernels/kernel.h"

#include <immintrin.h>
#include <string.h>

typedef uint32_t vw __attribute__((vector_size(64)));

enum {
    PANEL        = 16, // rows, one for each 32-bit lane
    PANELS       = 2,  // that are multiplied together
    STEPS        = QUANT_BLOCK / 4,
    COLUMN_GROUP = 6,  // columns whose sums are in registers
    TASK_COLUMNS = 96,
    LINE         = 64, // bytes
};

// 256 weights of each of 16 rows
typedef struct panel {
    uint8_t w[STEPS][PANEL][4];  // four weights of each row, as the columns' values come
    float   scales[16][PANEL];   // of every 32 (the first eight) or 16 (Q6_K) weights, in the same order, times d
    int16_t mins[4][PANEL][2];   // Q4_K and Q5_K: of weights 64 j + i and 64 j + 32 + i
    float   dmin[PANEL];
} __attribute__((aligned(64))) panel;

// out[i] = dword i of the 16 bytes at `at` of each row's block
INLINE void transpose(const char * const * rows, size_t at, vw * out) {
    __m512i v[4];
    UNROLL for (int i = 0; i < 4; i++) { // rows i, 4 + i, 8 + i, 12 + i
        v[i] = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) (rows[i] + at)));
        UNROLL for (int j = 1; j < 4; j++) {
            const __m128i row = _mm_loadu_si128((const __m128i *) (rows[4 * j + i] + at));
            v[i] = _mm512_mask_broadcast_i32x4(v[i], (__mmask16) (0xf << 4 * j), row);
        }
    }
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    out[0] = (vw) _mm512_unpacklo_epi64(a, c);
    out[1] = (vw) _mm512_unpackhi_epi64(a, c);
    out[2] = (vw) _mm512_unpacklo_epi64(b, d);
    out[3] = (vw) _mm512_unpackhi_epi64(b, d);
}

INLINE void store(void * p, vw x) {
    _mm512_store_si512(p, (__m512i) x);
}

// To the second-level cache. Nothing happens where there is no memory.
INLINE void fetch(const char * p, int64_t n) {
    for (int64_t i = 0; i < n; i += LINE) {
        _mm_prefetch(p + i, _MM_HINT_T1);
    }
}

// Of the low halves of lanes
INLINE __m512 floats_of(vw halves) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i) halves));
}

// The 32 bits at p, of a column's values or two sums, for all rows
INLINE __m512i spread(const void * p) {
    int32_t x;
    memcpy(&x, p, sizeof(x));
    return _mm512_set1_epi32(x);
}

#include "kernels/panels.h"

static int64_t column_groups(int64_t n_columns) {
    return (n_columns + COLUMN_GROUP - 1) / COLUMN_GROUP;
}

// The `multiply` of a form: multiply_block with the number of a group's columns as a constant
#define MULTIPLY(name, argument)                                                                             \
    static __attribute__((noinline)) void name##_group(const panel * p, const q8_column * x, int64_t n,      \
                                                       float (*sums)[PANELS * PANEL], int64_t columns) {     \
        switch (columns) {                                                                                   \
            case 1: multiply_block(p, argument, x, n, sums, 1); break;                                       \
            case 2: multiply_block(p, argument, x, n, sums, 2); break;                                       \
            case 3: multiply_block(p, argument, x, n, sums, 3); break;                                       \
            case 4: multiply_block(p, argument, x, n, sums, 4); break;                                       \
            case 5: multiply_block(p, argument, x, n, sums, 5); break;                                       \
            case 6: multiply_block(p, argument, x, n, sums, 6); break;                                       \
        }                                                                                                    \
    }                                                                                                        \
    static void name(const panel * p, const q8_column * x, int64_t n, int64_t n_columns,                     \
                     const char * fetched, int64_t piece, float (*sums)[PANELS * PANEL]) {                   \
        const int64_t n_groups = column_groups(n_columns);                                                   \
        for (int64_t i = 0; i < n_groups; i++) {                                                             \
            const int64_t c = n_columns * i / n_groups, end = n_columns * (i + 1) / n_groups;                \
            fetch(fetched + i * piece, piece);                                                               \
            name##_group(p, x + c * n, n, sums + c, end - c);                                                \
        }                                                                                                    \
    }
