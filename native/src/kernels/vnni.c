// Products with Q4_K, Q5_K and Q6_K by AVX512-VNNI, with AVX-512BW, FMA and F16C
#include "kernels/vnni_rows.h"

#include <string.h>

typedef uint32_t vw __attribute__((vector_size(64)));

#include "kernels/k_panels.h"

enum {
    PANEL        = 16, // rows, one for each 32-bit lane
    PANELS       = 2,  // that are multiplied together
    STEPS        = QUANT_BLOCK / 4,
    COLUMN_GROUP = 6,  // columns whose sums are in registers
    TASK_COLUMNS = 96,
};

// ---- several columns: rows unpacked to lanes ----------------------------------------------------------------------

// A block of each of 16 rows
typedef struct panel {
    uint8_t w[STEPS][PANEL][4];  // four weights of each row, as the columns' values come
    float   scales[16][PANEL];   // d times the scale of every 32 (the first eight) or 16 (Q6_K) weights, in the same
                                 // order
    int16_t mins[4][PANEL][2];   // of weights 64 j + i and 64 j + 32 + i; not Q6_K
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

INLINE void store_step(panel * p, int group, int i, vw w) {
    store(p->w[8 * PLACE[group] + i], w);
}

// Of the low halves of lanes
INLINE __m512 floats_of(vw halves) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i) halves));
}

INLINE __m512 scaled(__m512 d, vw scale) {
    return _mm512_mul_ps(d, _mm512_cvtepi32_ps((__m512i) scale));
}

// Blocks of Q4_K or, `five`, of Q5_K
INLINE void unpack_with_mins(const bool five, const char * const * rows, panel * p) {
    const size_t at = five ? offsetof(q5_k_block, q) : offsetof(q4_k_block, q);
    UNROLL for (int half = 0; half < 2; half++) { // 16 of the 32 bytes of two groups
        vw high[4];
        if (five) {
            transpose(rows, offsetof(q5_k_block, high) + (size_t) (16 * half), high);
        }
        UNROLL for (int j = 0; j < 8; j += 2) {
            vw w[4];
            transpose(rows, at + (size_t) (16 * j + 16 * half), w);
            UNROLL for (int i = 0; i < 4; i++) {
                UNROLL for (int k = j; k < j + 2; k++) {
                    store_step(p, k, 4 * half + i, five ? q5_k_weights(w[i], high[i], k) : q4_k_weights(w[i], k));
                }
            }
        }
    }
    vw first[4];
    transpose(rows, 0, first);
    const k_head head = k_head_of(first);
    const __m512 d    = floats_of(head.factors);
    _mm512_store_ps(p->dmin, floats_of(head.factors >> 16));
    UNROLL for (int j = 0; j < 8; j++) {
        _mm512_store_ps(p->scales[PLACE[j]], scaled(d, byte_at(head.scales, j)));
    }
    UNROLL for (int j = 0; j < 4; j++) {
        store(p->mins[j], pair_at(head.mins, j));
    }
}

static void unpack_q4_k(const char * const * rows, panel * p) {
    unpack_with_mins(false, rows, p);
}

static void unpack_q5_k(const char * const * rows, panel * p) {
    unpack_with_mins(true, rows, p);
}

static void unpack_q6_k(const char * const * rows, panel * p) {
    for (int half = 0; half < 2; half++) {
        UNROLL for (int j = 0; j < 2; j++) { // 16 bytes each
            const size_t at = offsetof(q6_k_block, low) + (size_t) (64 * half + 16 * j);
            vw           a[4], b[4], high[4];
            transpose(rows, at, a);
            transpose(rows, at + 32, b);
            transpose(rows, offsetof(q6_k_block, high) + (size_t) (32 * half + 16 * j), high);
            UNROLL for (int i = 0; i < 4; i++) {
                UNROLL for (int k = 0; k < 4; k++) {
                    store_step(p, 4 * half + k, 4 * j + i, q6_k_weights(a[i], b[i], high[i], k));
                }
            }
        }
    }
    ggml_fp16_t factors[PANEL];
    for (int i = 0; i < PANEL; i++) {
        factors[i] = ((const q6_k_block *) rows[i])->d;
    }
    const __m512 d = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) factors));
    vw           scales[4];
    transpose(rows, offsetof(q6_k_block, scales), scales);
    UNROLL for (int j = 0; j < 16; j++) {
        const __m512i up = (__m512i) (scales[j / 4] << (24 - 8 * (j % 4)));
        _mm512_store_ps(p->scales[2 * PLACE[j / 2] + j % 2], scaled(d, (vw) _mm512_srai_epi32(up, 24)));
    }
}

// The 32 bits at p, of a column's values or two sums, for all rows
INLINE __m512i spread(const void * p) {
    int32_t x;
    memcpy(&x, p, sizeof(x));
    return _mm512_set1_epi32(x);
}

// sums[c] += the panels' block times that of column c; the columns lie n blocks apart
INLINE void multiply_block(const panel * p, const bool with_mins, const q8_column * x, int64_t n,
                           float (*sums)[PANELS * PANEL], const int columns) {
    enum { SCALED = 4 }; // steps with the same scale in Q6_K; twice as many in the others
    __m512 block[COLUMN_GROUP][PANELS];
    UNROLL for (int c = 0; c < columns; c++) {
        UNROLL for (int k = 0; k < PANELS; k++) {
            block[c][k] = _mm512_setzero_ps();
        }
    }
    const int steps = with_mins ? 2 * SCALED : SCALED;
    for (int s = 0; s < STEPS / steps; s++) {
        __m512i dot[COLUMN_GROUP][PANELS];
        UNROLL for (int c = 0; c < columns; c++) {
            UNROLL for (int k = 0; k < PANELS; k++) {
                dot[c][k] = with_mins ? _mm512_setzero_si512() : _mm512_set1_epi32(x[c * n].offsets[s]);
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
            if (with_mins) {
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

static __attribute__((noinline)) void multiply_group(const panel * p, bool with_mins, const q8_column * x, int64_t n,
                                                            float (*sums)[PANELS * PANEL], int64_t columns) {
#define CASE(c)                                      \
    case c:                                          \
        if (with_mins) {                                    \
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
    const size_t      size = k_block_size(w->type);
    panel             panels[PANELS];
    float             sums[TASK_COLUMNS][PANELS * PANEL] __attribute__((aligned(64)));
    const char *      rows[PANELS * PANEL];
    void           (* unpack)(const char * const * rows, panel * p) = w->type == GGML_TYPE_Q4_K   ? unpack_q4_k
                                                                      : w->type == GGML_TYPE_Q5_K ? unpack_q5_k
                                                                                                  : unpack_q6_k;
    for (int64_t i = 0; i < PANELS * PANEL; i++) { // the last row for those that do not exist
        rows[i] = (const char *) w->data + (size_t) (first + i < w->ne[1] ? first + i : w->ne[1] - 1) * w->nb[1];
    }
    memset(sums, 0, sizeof(sums[0]) * (size_t) n_columns);
    const char *  fetched = (const char *) w->data + (size_t) then * w->nb[1];
    const int64_t piece   = round_up(PANELS * PANEL * (int64_t) w->nb[1] / n / (PANELS + n_groups), LINE);
    for (int64_t block = 0; block < n; block++) {
        for (int k = 0; k < PANELS; k++, fetched += piece) {
            fetch(fetched, piece);
            unpack(rows + PANEL * k, &panels[k]);
        }
        for (int64_t i = 0; i < n_groups; i++, fetched += piece) {
            fetch(fetched, piece);
            const int64_t c = n_columns * i / n_groups, end = n_columns * (i + 1) / n_groups;
            multiply_group(panels, w->type != GGML_TYPE_Q6_K, x + c * n + block, n, sums + c, end - c);
        }
        for (int i = 0; i < PANELS * PANEL; i++) {
            rows[i] += size;
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
