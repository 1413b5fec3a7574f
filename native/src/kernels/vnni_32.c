// Products with Q8_0 and Q4_0 for several columns by AVX512-VNNI, with AVX-512BW, FMA and F16C; a single column by
// AVX2, see avx2products.c.
#include "kernels/q8_groups.h"

typedef q8_groups q8_column;

#include "kernels/vnni_panels.h"

enum {
    GROUP_STEPS = SMALL_BLOCK / 4,
    // What is added to weights, so that none is negative
    Q8_0_ZERO   = 128,
    Q4_0_ZERO   = 8, // in the file too
};

// ---- rows ---------------------------------------------------------------------------------------------------------

// The factors of blocks of so many bytes
INLINE void unpack_factors(const char * const * rows, size_t size, panel * p) {
    UNROLL for (int j = 0; j < GROUPS; j++) {
        ggml_fp16_t d[PANEL];
        for (int i = 0; i < PANEL; i++) {
            memcpy(&d[i], rows[i] + (size_t) j * size, sizeof(d[i]));
        }
        _mm512_store_ps(p->scales[j], _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) d)));
    }
}

static void unpack_q8_0(const char * const * rows, panel * p) {
    const vw zero = (vw) { 0 } + 0x80808080;
    unpack_factors(rows, sizeof(q8_0_block), p);
    UNROLL for (int j = 0; j < 2 * GROUPS; j++) { // 16 weights each
        vw w[4];
        transpose(rows, (size_t) (j / 2) * sizeof(q8_0_block) + offsetof(q8_0_block, q) + (size_t) (j % 2 * 16), w);
        UNROLL for (int i = 0; i < 4; i++) {
            store(p->w[4 * j + i], w[i] ^ zero); // the same as + 128
        }
    }
}

static void unpack_q4_0(const char * const * rows, panel * p) {
    const vw low = (vw) { 0 } + 0x0f0f0f0f;
    unpack_factors(rows, sizeof(q4_0_block), p);
    UNROLL for (int j = 0; j < GROUPS; j++) { // 16 bytes each
        vw w[4];
        transpose(rows, (size_t) j * sizeof(q4_0_block) + offsetof(q4_0_block, q), w);
        UNROLL for (int i = 0; i < 4; i++) {
            store(p->w[GROUP_STEPS * j + i], w[i] & low);
            store(p->w[GROUP_STEPS * j + 4 + i], w[i] >> 4 & low);
        }
    }
}

// ---- products -----------------------------------------------------------------------------------------------------

// sums[c] += the panels' block times that of column c; the columns lie n blocks apart. zero: what is added to
// weights
INLINE void multiply_block(const panel * p, const int zero, const q8_column * x, int64_t n,
                           float (*sums)[PANELS * PANEL], const int columns) {
    __m512 block[COLUMN_GROUP][PANELS];
    UNROLL for (int c = 0; c < columns; c++) {
        UNROLL for (int k = 0; k < PANELS; k++) {
            block[c][k] = _mm512_load_ps(sums[c] + PANEL * k);
        }
    }
    for (int s = 0; s < GROUPS; s++) {
        __m512i dot[COLUMN_GROUP][PANELS];
        UNROLL for (int c = 0; c < columns; c++) {
            UNROLL for (int k = 0; k < PANELS; k++) {
                dot[c][k] = _mm512_set1_epi32(-zero * x[c * n].sums32[s]);
            }
        }
        UNROLL for (int i = 0; i < GROUP_STEPS; i++) {
            __m512i w[PANELS];
            UNROLL for (int k = 0; k < PANELS; k++) {
                w[k] = _mm512_load_si512(p[k].w[GROUP_STEPS * s + i]);
            }
            UNROLL for (int c = 0; c < columns; c++) {
                const __m512i four = spread(x[c * n].q + 4 * (GROUP_STEPS * s + i));
                UNROLL for (int k = 0; k < PANELS; k++) {
                    dot[c][k] = _mm512_dpbusd_epi32(dot[c][k], w[k], four);
                }
            }
        }
        UNROLL for (int k = 0; k < PANELS; k++) {
            const __m512 scale = _mm512_load_ps(p[k].scales[s]);
            UNROLL for (int c = 0; c < columns; c++) {
                const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x[c * n].d[s]));
                block[c][k] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[c][k]), both, block[c][k]);
            }
        }
    }
    UNROLL for (int c = 0; c < columns; c++) {
        UNROLL for (int k = 0; k < PANELS; k++) {
            _mm512_store_ps(sums[c] + PANEL * k, block[c][k]);
        }
    }
}

MULTIPLY(multiply_q8_0, Q8_0_ZERO)
MULTIPLY(multiply_q4_0, Q4_0_ZERO)

static const form Q8_0 = { GROUPS * sizeof(q8_0_block), unpack_q8_0, multiply_q8_0 };
static const form Q4_0 = { GROUPS * sizeof(q4_0_block), unpack_q4_0, multiply_q4_0 };

static void multiply_columns(const struct ggml_tensor * w, const void * x, int64_t n_columns, int64_t first,
                             int64_t then, float * out) {
    const form * f = w->type == GGML_TYPE_Q4_0 ? &Q4_0 : &Q8_0;
    multiply_panels(f, w, x, n_columns, column_groups(n_columns), first, then, out);
}

COLUMNS_OF(cpu_quantized_avx2_32)

const cpu_quantized cpu_quantized_vnni_32 = {
    .block_size       = sizeof(q8_column),
    .rows_alone       = 64,
    .rows             = PANELS * PANEL,
    .columns          = TASK_COLUMNS,
    .q8_0_columns     = INT64_MAX,
    .quantize         = quantize,
    .multiply_column  = multiply_column,
    .multiply_columns = multiply_columns,
};
