// Products of several columns with rows unpacked to lanes, for avx2_products.h
#pragma once

#include "kernels/avx2_columns.h"

typedef uint32_t vw __attribute__((vector_size(32)));

enum {
    PANEL        = 8,  // rows, one for each 32-bit lane
    PANELS       = 2,  // that are multiplied together
    COLUMN_GROUP = 4,  // columns whose sums are in registers
    TASK_PANELS  = 4,
    TASK_ROWS    = TASK_PANELS * PANEL,
    TASK_COLUMNS = 96,
    STEPS        = QUANT_BLOCK / 4,
    GROUP_STEPS  = SMALL_BLOCK / 4,
};

// 256 weights of each of eight rows. Weight i of a row is
//     K-quants      d * scales[s] * w[i] - less_d * less, with the scale of each 32 weights, and less that of them; in
//                   Q6_K with the scale of each 16, and less 32 times the scale
//     Q4_0          factors[i / 32] * (w[i] - 8)
typedef struct panel {
    uint8_t w[STEPS][PANEL][4];        // four weights of each row, as the columns' values come
    int32_t scales[2 * GROUPS][PANEL]; // as as_scale makes them
    int16_t less[GROUPS][PANEL][2];    // pairs; four of them, but in Q6_K
    float   d[PANEL], less_d[PANEL];
    float   factors[GROUPS][PANEL];
} __attribute__((aligned(64))) panel;

INLINE void store(void * p, __m256i x) {
    _mm256_store_si256((__m256i *) p, x);
}

// Of these low halves of 32-bit lanes
INLINE __m256 floats_of(vw halves) {
    const __m256i packed = _mm256_packus_epi32((__m256i) halves, (__m256i) halves);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}

// ---- rows ---------------------------------------------------------------------------------------------------------

// out[i] = dword i of the 16 bytes at `at` of each row's block
INLINE void transpose(const char * const * rows, size_t at, vw * out) {
    __m256i v[4];
    UNROLL for (int i = 0; i < 4; i++) { // rows i and 4 + i
        const __m128i row = _mm_loadu_si128((const __m128i *) (rows[i] + at));
        v[i] = _mm256_set_m128i(_mm_loadu_si128((const __m128i *) (rows[4 + i] + at)), row);
    }
    const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
    const __m256i c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
    out[0] = (vw) _mm256_unpacklo_epi64(a, c);
    out[1] = (vw) _mm256_unpackhi_epi64(a, c);
    out[2] = (vw) _mm256_unpacklo_epi64(b, d);
    out[3] = (vw) _mm256_unpackhi_epi64(b, d);
}

INLINE void store_step(panel * p, int group, int i, vw w) {
    store(p->w[GROUP_STEPS * group + i], (__m256i) w);
}

#include "kernels/k_unpack.h"

// Blocks of Q4_K or, `five`, of Q5_K
INLINE void unpack_with_mins(const bool five, const char * const * rows, panel * p) {
    unpack_four_or_five_bits(five, rows, p);
    vw first[4];
    transpose(rows, 0, first);
    const k_head head = k_head_of(first);
    _mm256_store_ps(p->d, floats_of(head.factors & 0xffff));
    _mm256_store_ps(p->less_d, floats_of(head.factors >> 16));
    UNROLL for (int j = 0; j < 8; j++) {
        store(p->scales[j], as_scale((__m256i) byte_at(head.scales, j)));
    }
    UNROLL for (int j = 0; j < 4; j++) {
        store(p->less[j], (__m256i) pair_at(head.mins, j));
    }
}

static void unpack_q4_k(const char * const * rows, panel * p) {
    unpack_with_mins(false, rows, p);
}

static void unpack_q5_k(const char * const * rows, panel * p) {
    unpack_with_mins(true, rows, p);
}

static void unpack_q6_k(const char * const * rows, panel * p) {
    unpack_six_bits(rows, p);
    vw scales[4];
    transpose(rows, offsetof(q6_k_block, scales), scales);
    UNROLL for (int j = 0; j < 4; j++) { // four bytes
        __m256i s[4];
        UNROLL for (int i = 0; i < 4; i++) {
            s[i] = _mm256_srai_epi32((__m256i) (scales[j] << (24 - 8 * i)), 24);
            store(p->scales[4 * j + i], as_scale(s[i]));
        }
        store(p->less[2 * j], _mm256_blend_epi16(s[0], _mm256_slli_epi32(s[1], 16), 0xaa));
        store(p->less[2 * j + 1], _mm256_blend_epi16(s[2], _mm256_slli_epi32(s[3], 16), 0xaa));
    }
    ggml_fp16_t factors[PANEL];
    __m128i     d;
    for (int i = 0; i < PANEL; i++) {
        factors[i] = ((const q6_k_block *) rows[i])->d;
    }
    memcpy(&d, factors, sizeof(d));
    const __m256 wide = _mm256_cvtph_ps(d);
    _mm256_store_ps(p->d, wide);
    _mm256_store_ps(p->less_d, _mm256_mul_ps(_mm256_set1_ps(32.0f), wide));
}

static void unpack_q4_0(const char * const * rows, panel * p) {
    const vw    low = bytes(0x0f0f0f0f);
    ggml_fp16_t d[GROUPS][PANEL];
    UNROLL for (int row = 0; row < PANEL; row++) {
        UNROLL for (int i = 0; i < GROUPS; i++) {
            memcpy(&d[i][row], rows[row] + (size_t) i * sizeof(q4_0_block), sizeof(ggml_fp16_t));
        }
    }
    UNROLL for (int j = 0; j < GROUPS; j++) { // 16 bytes each
        vw w[4];
        transpose(rows, (size_t) j * sizeof(q4_0_block) + offsetof(q4_0_block, q), w);
        UNROLL for (int i = 0; i < 4; i++) {
            store(p->w[GROUP_STEPS * j + i], (__m256i) (w[i] & low));
            store(p->w[GROUP_STEPS * j + 4 + i], (__m256i) (w[i] >> 4 & low));
        }
        _mm256_store_ps(p->factors[j], _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) d[j])));
    }
}

// ---- products -----------------------------------------------------------------------------------------------------

// The 32 bits at p, of a column's values or two sums, for all rows
INLINE __m256i spread(const void * p) {
    int32_t x;
    memcpy(&x, p, sizeof(x));
    return _mm256_set1_epi32(x);
}

// x, ready here. Else GCC begins many steps together, and what they wait for goes to memory and back.
INLINE __m256i in_register(__m256i x) {
    __asm__("" : "+x"(x));
    return x;
}

// dots = the panels' weights from step `first` on times those values of the columns, which lie n blocks apart
INLINE void multiply_steps(const panel * p, int first, const int steps, const q8_column * x, int64_t n,
                           const int columns, __m256i (*dots)[PANELS]) {
    UNROLL for (int c = 0; c < columns; c++) {
        UNROLL for (int k = 0; k < PANELS; k++) {
            dots[c][k] = _mm256_setzero_si256();
        }
    }
    UNROLL for (int i = 0; i < steps; i++) {
        __m256i w[PANELS];
        UNROLL for (int k = 0; k < PANELS; k++) {
            w[k] = _mm256_load_si256((const __m256i *) p[k].w[first + i]);
        }
        UNROLL for (int c = 0; c < columns; c++) {
            const __m256i four = spread(x[c * n].q + 4 * (first + i));
            UNROLL for (int k = 0; k < PANELS; k++) {
                dots[c][k] = in_register(add_step(dots[c][k], w[k], four));
            }
        }
    }
}

// sums[c] += the panels' block times that of column c, of a K-quant
INLINE void multiply_256(const enum ggml_type type, const panel * p, const q8_column * x, int64_t n,
                         float (*sums)[TASK_ROWS], const int columns) {
    const bool with_mins = type != GGML_TYPE_Q6_K;
    const int  steps     = type == GGML_TYPE_Q4_K   ? GROUP_STEPS
                           : type == GGML_TYPE_Q5_K ? Q5_K_STEPS
                                                    : Q6_K_STEPS;
    const int  scaled    = with_mins ? GROUP_STEPS : 4; // with the same scale
    __m256i    block[COLUMN_GROUP][PANELS], dots[COLUMN_GROUP][PANELS];
    UNROLL for (int c = 0; c < columns; c++) {
        UNROLL for (int k = 0; k < PANELS; k++) {
            block[c][k] = _mm256_setzero_si256();
        }
    }
    for (int s = 0; s < STEPS / scaled; s++) {
        UNROLL for (int part = 0; part < scaled; part += steps) {
            multiply_steps(p, scaled * s + part, steps, x, n, columns, dots);
            UNROLL for (int k = 0; k < PANELS; k++) {
                const __m256i scale = _mm256_load_si256((const __m256i *) p[k].scales[s]);
                UNROLL for (int c = 0; c < columns; c++) {
                    block[c][k] = add_scaled(block[c][k], dots[c][k], scale);
                }
            }
        }
    }
    const int pairs = with_mins ? GROUPS / 2 : GROUPS;
    UNROLL for (int c = 0; c < columns; c++) {
        const q8_column * column = &x[c * n];
        UNROLL for (int k = 0; k < PANELS; k++) {
            __m256i less = _mm256_setzero_si256();
            UNROLL for (int j = 0; j < pairs; j++) {
                const __m256i two = _mm256_load_si256((const __m256i *) p[k].less[j]);
                less = add_pairs(less, two, spread((with_mins ? column->sums32 : column->sums16) + 2 * j));
            }
            const __m256 all   = _mm256_mul_ps(_mm256_cvtepi32_ps(block[c][k]), _mm256_load_ps(p[k].d));
            const __m256 taken = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(less), _mm256_load_ps(p[k].less_d), all);
            float *      sum   = sums[c] + PANEL * k;
            _mm256_store_ps(sum, _mm256_fmadd_ps(taken, _mm256_set1_ps(column->d[0]), _mm256_load_ps(sum)));
        }
    }
}

// The same with Q4_0
INLINE void multiply_32(const panel * p, const q8_column * x, int64_t n, float (*sums)[TASK_ROWS], const int columns) {
    const __m256i one = as_scale(_mm256_set1_epi32(1));
    __m256i       dots[COLUMN_GROUP][PANELS];
    for (int s = 0; s < GROUPS; s++) {
        const __m256i eight = _mm256_set1_epi32(s % 2 ? (int32_t) (UINT32_C(0xfff8) << 16) : 0xfff8); // -8 and 0
        multiply_steps(p, GROUP_STEPS * s, GROUP_STEPS, x, n, columns, dots);
        UNROLL for (int c = 0; c < columns; c++) {
            const __m256i less = _mm256_madd_epi16(eight, spread(x[c * n].sums32 + s / 2 * 2));
            const __m256  d    = _mm256_broadcast_ss(&x[c * n].d[s]);
            UNROLL for (int k = 0; k < PANELS; k++) {
                const __m256 whole = _mm256_cvtepi32_ps(add_scaled(less, dots[c][k], one));
                const __m256 both  = _mm256_mul_ps(d, _mm256_load_ps(p[k].factors[s]));
                float *      sum   = sums[c] + PANEL * k;
                _mm256_store_ps(sum, _mm256_fmadd_ps(whole, both, _mm256_load_ps(sum)));
            }
        }
    }
}

// A form of weights: how a block of a panel's rows is unpacked, and multiplied by at most COLUMN_GROUP columns
typedef struct form {
    size_t size; // bytes of 256 weights
    void (* unpack)(const char * const * rows, panel * p);
    void (* multiply)(const panel * p, const q8_column * x, int64_t n, float (*sums)[TASK_ROWS], int64_t columns);
} form;

INLINE void multiply(const enum ggml_type type, const panel * p, const q8_column * x, int64_t n,
                     float (*sums)[TASK_ROWS], const int columns) {
    if (type == GGML_TYPE_Q4_0) {
        multiply_32(p, x, n, sums, columns);
    } else {
        multiply_256(type, p, x, n, sums, columns);
    }
}

#define MULTIPLY(name, type)                                                                    \
    static void name(const panel * p, const q8_column * x, int64_t n, float (*sums)[TASK_ROWS], \
                     int64_t columns) {                                                         \
        switch (columns) {                                                                      \
            case 1: multiply(type, p, x, n, sums, 1); break;                                    \
            case 2: multiply(type, p, x, n, sums, 2); break;                                    \
            case 3: multiply(type, p, x, n, sums, 3); break;                                    \
            case 4: multiply(type, p, x, n, sums, 4); break;                                    \
        }                                                                                       \
    }
MULTIPLY(multiply_q4_k, GGML_TYPE_Q4_K)
MULTIPLY(multiply_q5_k, GGML_TYPE_Q5_K)
MULTIPLY(multiply_q6_k, GGML_TYPE_Q6_K)
MULTIPLY(multiply_q4_0, GGML_TYPE_Q4_0)
#undef MULTIPLY

static const form Q4_K = { sizeof(q4_k_block), unpack_q4_k, multiply_q4_k };
static const form Q5_K = { sizeof(q5_k_block), unpack_q5_k, multiply_q5_k };
static const form Q6_K = { sizeof(q6_k_block), unpack_q6_k, multiply_q6_k };
static const form Q4_0 = { GROUPS * sizeof(q4_0_block), unpack_q4_0, multiply_q4_0 };

// All panels of a task. Meanwhile the rows from `then` on are fetched from memory.
static void multiply_panels(const form * f, const struct ggml_tensor * w, const q8_column * x, int64_t n_columns,
                             int64_t first, int64_t then, float * out) {
    const int64_t n = w->ne[0] / QUANT_BLOCK, n_groups = (n_columns + COLUMN_GROUP - 1) / COLUMN_GROUP;
    const int64_t left = w->ne[1] - first < TASK_ROWS ? w->ne[1] - first : TASK_ROWS;
    const int64_t used = (left + PANELS * PANEL - 1) / (PANELS * PANEL) * PANELS; // panels
    panel         panels[TASK_PANELS];
    float         sums[TASK_COLUMNS][TASK_ROWS] __attribute__((aligned(64)));
    const char *  rows[TASK_ROWS];
    for (int64_t i = 0; i < TASK_ROWS; i++) { // the last row for those that do not exist
        rows[i] = (const char *) w->data + (size_t) (first + (i < left ? i : left - 1)) * w->nb[1];
    }
    memset(sums, 0, sizeof(sums[0]) * (size_t) n_columns);
    const char *  fetched = (const char *) w->data + (size_t) then * w->nb[1];
    const int64_t piece   = round_up(TASK_ROWS * (int64_t) f->size / (used + n_groups), LINE);
    for (int64_t block = 0; block < n; block++) {
        for (int64_t k = 0; k < used; k++, fetched += piece) {
            fetch(fetched, piece);
            f->unpack(rows + PANEL * k, &panels[k]);
        }
        for (int64_t i = 0; i < n_groups; i++, fetched += piece) {
            fetch(fetched, piece);
            const int64_t c = n_columns * i / n_groups, end = n_columns * (i + 1) / n_groups;
            for (int64_t k = 0; k < used; k += PANELS) {
                float (*to)[TASK_ROWS] = (float (*)[TASK_ROWS]) (sums[c] + PANEL * k);
                f->multiply(panels + k, x + c * n + block, n, to, end - c);
            }
        }
        for (int64_t i = 0; i < TASK_ROWS; i++) {
            rows[i] += f->size;
        }
    }
    for (int64_t c = 0; c < n_columns; c++) {
        memcpy(out + c * w->ne[1] + first, sums[c], (size_t) left * sizeof(float));
    }
}
