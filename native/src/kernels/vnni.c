// Products with Q4_K and Q6_K by AVX512-VNNI, with AVX-512BW, FMA and F16C
#include "kernels/q8_column.h"

#include <immintrin.h>
#include <string.h>

enum {
    PANEL        = 16,   // rows, one for each 32-bit lane
    PANELS       = 2,    // that are multiplied together
    STEPS        = QUANT_BLOCK / 4,
    COLUMN_GROUP = 6,    // columns whose sums are in registers
    TASK_COLUMNS = 96,
    LINE         = 64,   // bytes
    AHEAD        = 8192, // bytes of rows that are on their way from memory while one is multiplied by a single column
};

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

// To the second-level cache. Nothing happens where there is no memory.
INLINE void fetch(const char * p, int64_t n) {
    for (int64_t i = 0; i < n; i += LINE) {
        _mm_prefetch(p + i, _MM_HINT_T1);
    }
}

// ---- a single column: each row in place ---------------------------------------------------------------------------

// A row of n blocks times a column, while the row at `ahead` is fetched
INLINE float dot_q4_k(const void * row, const q8_column * x, int64_t n, const char * ahead) {
    const q4_k_block * w   = row;
    const __m512i      low = _mm512_set1_epi8(0x0f);
    __m512i            index[4];
    UNROLL for (int i = 0; i < 4; i++) { // the scales of the two times 32 weights in a vector
        const int16_t first = (int16_t) (4 * (i / 2) + i % 2);
        index[i] = _mm512_inserti64x4(_mm512_set1_epi16(first), _mm256_set1_epi16((int16_t) (first + 2)), 1);
    }
    __m512 sum   = _mm512_setzero_ps();
    __m128 taken = _mm_setzero_ps();
    for (int64_t i = 0; i < n; i++) {
        fetch(ahead + (size_t) i * sizeof(*w), sizeof(*w));
        uint64_t packed_scales, packed_mins;
        q4_k_scales(&w[i], &packed_scales, &packed_mins);
        const __m128i scales = _mm_cvtepu8_epi16(_mm_cvtsi64_si128((int64_t) packed_scales));
        const __m128i mins   = _mm_cvtepu8_epi16(_mm_cvtsi64_si128((int64_t) packed_mins));
        const __m512i a = _mm512_loadu_si512(w[i].q), b = _mm512_loadu_si512(w[i].q + 64);
        const __m512i q[4] = {
            _mm512_and_si512(a, low), _mm512_and_si512(_mm512_srli_epi16(a, 4), low),
            _mm512_and_si512(b, low), _mm512_and_si512(_mm512_srli_epi16(b, 4), low),
        };
        __m512i block = _mm512_setzero_si512();
        UNROLL for (int j = 0; j < 4; j++) {
            // two at most 15 * 127
            const __m512i products = _mm512_maddubs_epi16(q[j], _mm512_load_si512(x[i].q + 64 * j));
            const __m512i scale    = _mm512_permutexvar_epi16(index[j], _mm512_castsi128_si512(scales));
            block = _mm512_dpwssd_epi32(block, products, scale);
        }
        int32_t both; // d and dmin
        memcpy(&both, &w[i], sizeof(both));
        const __m128  d     = _mm_mul_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(both)), _mm_set1_ps(x[i].d));
        const __m128i least = _mm_madd_epi16(mins, _mm_load_si128((const __m128i *) x[i].sums32));
        sum   = _mm512_fmadd_ps(_mm512_cvtepi32_ps(block), _mm512_broadcastss_ps(d), sum);
        taken = _mm_fmadd_ps(_mm_cvtepi32_ps(least), _mm_broadcastss_ps(_mm_movehdup_ps(d)), taken);
    }
    return _mm512_reduce_add_ps(_mm512_sub_ps(sum, _mm512_zextps128_ps512(taken)));
}

// The same with a row of Q6_K.
INLINE float dot_q6_k(const void * row, const q8_column * x, int64_t n, const char * ahead) {
    const q6_k_block * w    = row;
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
static void multiply_column(const struct ggml_tensor * w, const void * columns, int64_t first, int64_t end,
                            int64_t then, float * out) {
    const q8_column * x = columns;
    const int64_t     n = w->ne[0] / QUANT_BLOCK, stride = (int64_t) w->nb[1], n_ahead = (AHEAD + stride - 1) / stride;
    for (int64_t i = first; i < end; i++) {
        const int64_t next  = i + n_ahead < end ? i + n_ahead : then + i + n_ahead - end;
        const char *  row   = (const char *) w->data + i * stride;
        const char *  ahead = (const char *) w->data + next * stride;
        out[i] = w->type == GGML_TYPE_Q4_K ? dot_q4_k(row, x, n, ahead) : dot_q6_k(row, x, n, ahead);
    }
}

// ---- several columns: rows unpacked to lanes ----------------------------------------------------------------------

// A block of each of 16 rows
typedef struct panel {
    uint8_t w[STEPS][PANEL][4];  // four weights of each row, as the columns' values come
    float   scales[16][PANEL];   // d times the scale of every 32 (Q4_K, the first eight) or 16 (Q6_K) weights, in the
                                 // same order
    int16_t mins[4][PANEL][2];   // Q4_K: of weights 64 j + i and 64 j + 32 + i
    float   dmin[PANEL];
} __attribute__((aligned(64))) panel;

// out[i] = dword i of the 16 bytes at `at` of each row's block
INLINE void transpose(const char * const * rows, size_t at, __m512i * out) {
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
    out[0] = _mm512_unpacklo_epi64(a, c);
    out[1] = _mm512_unpackhi_epi64(a, c);
    out[2] = _mm512_unpacklo_epi64(b, d);
    out[3] = _mm512_unpackhi_epi64(b, d);
}

INLINE void store_step(panel * p, int group, int i, __m512i w) {
    _mm512_store_si512(p->w[8 * PLACE[group] + i], w);
}

static void unpack_q4_k(const char * const * rows, panel * p) {
    const __m512i low = _mm512_set1_epi8(0x0f);
    UNROLL for (int j = 0; j < 8; j++) { // 16 bytes each
        __m512i w[4];
        transpose(rows, offsetof(q4_k_block, q) + (size_t) (16 * j), w);
        UNROLL for (int i = 0; i < 4; i++) {
            store_step(p, j / 2 * 2, j % 2 * 4 + i, _mm512_and_si512(w[i], low));
            store_step(p, j / 2 * 2 + 1, j % 2 * 4 + i, _mm512_and_si512(_mm512_srli_epi16(w[i], 4), low));
        }
    }
    __m512i head[4]; // d and dmin, scales
    transpose(rows, 0, head);
    const __m512 d = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(head[0]));
    _mm512_store_ps(p->dmin, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(head[0], 16))));
    const __m512i six = _mm512_set1_epi8(0x3f), top = _mm512_set1_epi8(0x30);
    const __m512i scales[2] = { // 0 to 3 and 4 to 7, bytes
        _mm512_and_si512(head[1], six),
        _mm512_or_si512(_mm512_and_si512(head[3], low), _mm512_and_si512(_mm512_srli_epi16(head[1], 2), top)),
    };
    const __m512i high    = _mm512_srli_epi16(head[3], 4);
    const __m512i mins[2] = {
        _mm512_and_si512(head[2], six),
        _mm512_or_si512(_mm512_and_si512(high, low), _mm512_and_si512(_mm512_srli_epi16(head[2], 2), top)),
    };
    UNROLL for (int j = 0; j < 8; j++) {
        const __m512i byte = _mm512_srli_epi32(scales[j / 4], (unsigned) (8 * (j % 4)));
        const __m512i one  = _mm512_and_si512(byte, _mm512_set1_epi32(0xff));
        _mm512_store_ps(p->scales[PLACE[j]], _mm512_mul_ps(d, _mm512_cvtepi32_ps(one)));
    }
    UNROLL for (int j = 0; j < 4; j++) {
        const __m512i two = _mm512_srli_epi32(mins[j / 2], (unsigned) (16 * (j % 2)));
        const __m512i first = _mm512_and_si512(two, _mm512_set1_epi32(0xff));
        const __m512i then  = _mm512_and_si512(_mm512_slli_epi32(two, 8), _mm512_set1_epi32(0xff0000));
        _mm512_store_si512(p->mins[j], _mm512_or_si512(first, then));
    }
}

static void unpack_q6_k(const char * const * rows, panel * p) {
    const __m512i low = _mm512_set1_epi8(0x0f), top = _mm512_set1_epi8(0x30);
    for (int half = 0; half < 2; half++) {
        UNROLL for (int j = 0; j < 2; j++) { // 16 bytes each
            const size_t at = (size_t) (64 * half + 16 * j);
            __m512i      a[4], b[4], high[4];
            transpose(rows, offsetof(q6_k_block, low) + at, a);
            transpose(rows, offsetof(q6_k_block, low) + at + 32, b);
            transpose(rows, offsetof(q6_k_block, high) + (size_t) (32 * half + 16 * j), high);
            UNROLL for (int i = 0; i < 4; i++) {
                const __m512i lower[4] = { a[i], b[i], _mm512_srli_epi16(a[i], 4), _mm512_srli_epi16(b[i], 4) };
                const __m512i upper[4] = {
                    _mm512_slli_epi16(high[i], 4), _mm512_slli_epi16(high[i], 2), high[i],
                    _mm512_srli_epi16(high[i], 2),
                };
                UNROLL for (int k = 0; k < 4; k++) {
                    const __m512i s = _mm512_or_si512(_mm512_and_si512(lower[k], low), _mm512_and_si512(upper[k], top));
                    store_step(p, 4 * half + k, 4 * j + i, s);
                }
            }
        }
    }
    ggml_fp16_t factors[PANEL];
    for (int i = 0; i < PANEL; i++) {
        factors[i] = ((const q6_k_block *) rows[i])->d;
    }
    const __m512 d = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) factors));
    __m512i      scales[4];
    transpose(rows, offsetof(q6_k_block, scales), scales);
    UNROLL for (int j = 0; j < 16; j++) {
        const __m512i one = _mm512_srai_epi32(_mm512_slli_epi32(scales[j / 4], (unsigned) (24 - 8 * (j % 4))), 24);
        _mm512_store_ps(p->scales[2 * PLACE[j / 2] + j % 2], _mm512_mul_ps(d, _mm512_cvtepi32_ps(one)));
    }
}

// The 32 bits at p, of a column's values or two sums, for all rows
INLINE __m512i spread(const void * p) {
    int32_t x;
    memcpy(&x, p, sizeof(x));
    return _mm512_set1_epi32(x);
}

// sums[c] += the panels' block times that of column c; the columns lie n blocks apart
INLINE void multiply_block(const panel * p, const bool q4, const q8_column * x, int64_t n,
                           float (*sums)[PANELS * PANEL], const int columns) {
    enum { SCALED = 4 }; // steps with the same scale in Q6_K; half of those in Q4_K
    __m512 block[COLUMN_GROUP][PANELS];
    UNROLL for (int c = 0; c < columns; c++) {
        UNROLL for (int k = 0; k < PANELS; k++) {
            block[c][k] = _mm512_setzero_ps();
        }
    }
    const int steps = q4 ? 2 * SCALED : SCALED;
    for (int s = 0; s < STEPS / steps; s++) {
        __m512i dot[COLUMN_GROUP][PANELS];
        UNROLL for (int c = 0; c < columns; c++) {
            UNROLL for (int k = 0; k < PANELS; k++) {
                dot[c][k] = q4 ? _mm512_setzero_si512() : _mm512_set1_epi32(x[c * n].offsets[s]);
            }
        }
        UNROLL for (int i = 0; i < steps; i++) {
            __m512i w[PANELS];
            UNROLL for (int k = 0; k < PANELS; k++) {
                w[k] = _mm512_load_si512(p[k].w[steps * s + i]);
            }
            UNROLL for (int c = 0; c < columns; c++) {
                const __m512i four = spread(x[c * n].q + 4 * (steps * s + i));
                UNROLL for (int k = 0; k < PANELS; k++) {
                    dot[c][k] = _mm512_dpbusd_epi32(dot[c][k], w[k], four);
                }
            }
        }
        UNROLL for (int k = 0; k < PANELS; k++) {
            const __m512 scale = _mm512_load_ps(p[k].scales[s]);
            UNROLL for (int c = 0; c < columns; c++) {
                block[c][k] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[c][k]), scale, block[c][k]);
            }
        }
    }
    UNROLL for (int c = 0; c < columns; c++) {
        UNROLL for (int k = 0; k < PANELS; k++) {
            if (q4) {
                __m512i taken = _mm512_setzero_si512();
                UNROLL for (int j = 0; j < 4; j++) {
                    const __m512i mins = _mm512_load_si512(p[k].mins[j]);
                    taken = _mm512_dpwssd_epi32(taken, mins, spread(x[c * n].sums32 + 2 * j));
                }
                block[c][k] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(taken), _mm512_load_ps(p[k].dmin), block[c][k]);
            }
            float * sum = sums[c] + PANEL * k;
            _mm512_store_ps(sum, _mm512_fmadd_ps(block[c][k], _mm512_set1_ps(x[c * n].d), _mm512_load_ps(sum)));
        }
    }
}

static __attribute__((noinline)) void multiply_group(const panel * p, bool q4, const q8_column * x, int64_t n,
                                                            float (*sums)[PANELS * PANEL], int64_t columns) {
#define CASE(c)                                      \
    case c:                                          \
        if (q4) {                                    \
            multiply_block(p, true, x, n, sums, c);  \
        } else {                                     \
            multiply_block(p, false, x, n, sums, c); \
        }                                            \
        break;
    switch (columns) {
        CASE(1)
        CASE(2)
        CASE(3)
        CASE(4)
        CASE(5)
        CASE(6)
    }
#undef CASE
}

// Two panels of rows. Meanwhile those from `then` on are fetched from memory.
static void multiply_columns(const struct ggml_tensor * w, const void * columns, int64_t n_columns, int64_t first,
                             int64_t then, float * out) {
    const q8_column * x = columns;
    const int64_t     n = w->ne[0] / QUANT_BLOCK, n_groups = (n_columns + COLUMN_GROUP - 1) / COLUMN_GROUP;
    const bool        q4 = w->type == GGML_TYPE_Q4_K;
    panel             panels[PANELS];
    float             sums[TASK_COLUMNS][PANELS * PANEL] __attribute__((aligned(64)));
    const char *      rows[PANELS * PANEL];
    for (int64_t i = 0; i < PANELS * PANEL; i++) { // the last row for those that do not exist
        rows[i] = (const char *) w->data + (size_t) (first + i < w->ne[1] ? first + i : w->ne[1] - 1) * w->nb[1];
    }
    memset(sums, 0, sizeof(sums[0]) * (size_t) n_columns);
    const char *  fetched = (const char *) w->data + (size_t) then * w->nb[1];
    const int64_t piece   = round_up(PANELS * PANEL * (int64_t) w->nb[1] / n / (PANELS + n_groups), LINE);
    for (int64_t block = 0; block < n; block++) {
        for (int k = 0; k < PANELS; k++, fetched += piece) {
            fetch(fetched, piece);
            (q4 ? unpack_q4_k : unpack_q6_k)(rows + PANEL * k, &panels[k]);
        }
        for (int64_t i = 0; i < n_groups; i++, fetched += piece) {
            fetch(fetched, piece);
            const int64_t c = n_columns * i / n_groups, end = n_columns * (i + 1) / n_groups;
            multiply_group(panels, q4, x + c * n + block, n, sums + c, end - c);
        }
        for (int i = 0; i < PANELS * PANEL; i++) {
            rows[i] += q4 ? sizeof(q4_k_block) : sizeof(q6_k_block);
        }
    }
    const int64_t left = w->ne[1] - first < PANELS * PANEL ? w->ne[1] - first : PANELS * PANEL;
    for (int64_t c = 0; c < n_columns; c++) {
        memcpy(out + c * w->ne[1] + first, sums[c], (size_t) left * sizeof(float));
    }
}

const cpu_quantized cpu_quantized_vnni = {
    .block_size       = sizeof(q8_column),
    .rows_alone       = 64,
    .rows             = PANELS * PANEL,
    .columns          = TASK_COLUMNS,
    .quantize         = quantize,
    .multiply_column  = multiply_column,
    .multiply_columns = multiply_columns,
};
