// Products with Q4_K, Q5_K and Q6_K by AVX512-VNNI, with AVX-512BW, FMA and F16C
#include "kernels/vnni_rows.h"

// ---- rows ---------------------------------------------------------------------------------------------------------

INLINE void store_step(panel * p, int group, int i, vw w) {
    store(p->w[8 * PLACE[group] + i], w);
}

#include "kernels/k_unpack.h"

INLINE __m512 scaled(__m512 d, vw scale) {
    return _mm512_mul_ps(d, _mm512_cvtepi32_ps((__m512i) scale));
}

// Blocks of Q4_K or, `five`, of Q5_K
INLINE void unpack_with_mins(const bool five, const char * const * rows, panel * p) {
    unpack_four_or_five_bits(five, rows, p);
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
    unpack_six_bits(rows, p);
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

// ---- products -----------------------------------------------------------------------------------------------------

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

MULTIPLY(multiply_with_mins, true)
MULTIPLY(multiply_q6_k, false)

static const form Q4_K = { sizeof(q4_k_block), unpack_q4_k, multiply_with_mins };
static const form Q5_K = { sizeof(q5_k_block), unpack_q5_k, multiply_with_mins };
static const form Q6_K = { sizeof(q6_k_block), unpack_q6_k, multiply_q6_k };

static void multiply_columns(const struct ggml_tensor * w, const void * x, int64_t n_columns, int64_t first,
                             int64_t then, float * out) {
    const form * f = w->type == GGML_TYPE_Q4_K ? &Q4_K : w->type == GGML_TYPE_Q5_K ? &Q5_K : &Q6_K;
    multiply_panels(f, w, x, n_columns, column_groups(n_columns), first, then, out);
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
