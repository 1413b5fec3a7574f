// See amx_emulated.h. The sums are those of Intel's manual: "TDPBF16PS", "TDPBSSD" and "TDPBSUD".
#define MLLAMA_AMX_EMULATED
#include "check.h"
#include "kernels/amx.h"
#include "kernels/q8_column.h"
#include "kernels/q8_groups.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { N_TILES = 8, MAX_ROWS = 16, ROW = 64 };

static amx_tiles sizes; // palette 0: no tiles are in use
static uint8_t   tiles[N_TILES][MAX_ROWS][ROW];

static void demand(bool ok, const char * words) {
    if (!ok) {
        fflush(stdout);
        fprintf(stderr, "kernels_test: the processor would refuse this use of tiles: %s\n", words);
        abort();
    }
}

bool amx_emulated_in_use(void) {
    return sizes.palette != 0;
}

// ---- tiles --------------------------------------------------------------------------------------------------------

void amx_emulated_configure(const amx_tiles * t) {
    demand(t->palette == 1 && t->start_row == 0, "the kind of tiles");
    for (size_t i = 0; i < sizeof(t->reserved); i++) {
        demand(t->reserved[i] == 0, "a reserved byte");
    }
    for (int i = 0; i < 16; i++) {
        demand(i < N_TILES || (t->row_bytes[i] == 0 && t->rows[i] == 0), "a ninth tile");
        demand(t->row_bytes[i] <= ROW && t->rows[i] <= MAX_ROWS, "a tile that is too large");
        demand((t->row_bytes[i] == 0) == (t->rows[i] == 0), "rows without bytes, or bytes without rows");
    }
    sizes = *t;
    memset(tiles, 0, sizeof(tiles));
}

void amx_emulated_release(void) {
    memset(&sizes, 0, sizeof(sizes));
    memset(tiles, UNWRITTEN, sizeof(tiles));
}

static void check_tile(int t) {
    demand(sizes.palette == 1, "tiles that are not configured");
    demand(t >= 0 && t < N_TILES && sizes.rows[t] > 0, "a tile that does not exist");
    demand(sizes.row_bytes[t] % 4 == 0, "a row that is not a whole number of sums");
}

void amx_emulated_zero(int t) {
    check_tile(t);
    memset(tiles[t], 0, sizeof(tiles[t]));
}

void amx_emulated_load(int t, const void * from, int64_t stride) {
    check_tile(t);
    memset(tiles[t], 0, sizeof(tiles[t]));
    for (int i = 0; i < sizes.rows[t]; i++) {
        memcpy(tiles[t][i], (const char *) from + i * stride, sizes.row_bytes[t]);
    }
}

void amx_emulated_store(int t, void * to, int64_t stride) {
    check_tile(t);
    for (int i = 0; i < sizes.rows[t]; i++) {
        memcpy((char *) to + i * stride, tiles[t][i], sizes.row_bytes[t]);
    }
}

static void check_product(int sums, int rows, int columns) {
    check_tile(sums);
    check_tile(rows);
    check_tile(columns);
    demand(sums != rows && sums != columns && rows != columns, "one tile as two");
    demand(sizes.rows[sums] == sizes.rows[rows], "rows that are not those of the sums");
    demand(sizes.row_bytes[sums] == sizes.row_bytes[columns], "columns that are not those of the sums");
    demand(sizes.row_bytes[rows] == 4 * sizes.rows[columns], "rows that are not as long as columns");
}

static float float_at(const uint8_t * p) { // of BF16
    uint16_t half;
    memcpy(&half, p, sizeof(half));
    const union { uint32_t u; float f; } x = { .u = (uint32_t) half << 16 };
    return fabsf(x.f) < 0x1p-126f ? 0.0f : x.f;
}

void amx_emulated_multiply_bf16(int sums, int rows, int columns) {
    check_product(sums, rows, columns);
    const int n = sizes.row_bytes[sums] / 4, n_k = sizes.rows[columns];
    float     factors[MAX_ROWS][2][MAX_ROWS];
    for (int k = 0; k < n_k; k++) {
        for (int j = 0; j < 2 * n; j++) {
            factors[k][j % 2][j / 2] = float_at(tiles[columns][k] + 2 * j);
        }
    }
    for (int m = 0; m < sizes.rows[sums]; m++) {
        float even[MAX_ROWS] = { 0 }, odd[MAX_ROWS] = { 0 }, sum[MAX_ROWS];
        for (int k = 0; k < n_k; k++) {
            const float a = float_at(tiles[rows][m] + 4 * k), b = float_at(tiles[rows][m] + 4 * k + 2);
            for (int j = 0; j < n; j++) {
                even[j] += a * factors[k][0][j];
                odd[j] += b * factors[k][1][j];
            }
        }
        memcpy(sum, tiles[sums][m], sizeof(sum));
        for (int j = 0; j < n; j++) {
            sum[j] += even[j] + odd[j];
        }
        memcpy(tiles[sums][m], sum, sizeof(sum));
    }
}

void amx_emulated_multiply_int8(int sums, int rows, int columns, bool columns_signed) {
    check_product(sums, rows, columns);
    for (int m = 0; m < sizes.rows[sums]; m++) {
        int32_t sum[MAX_ROWS];
        memcpy(sum, tiles[sums][m], sizeof(sum));
        for (int k = 0; k < sizes.rows[columns]; k++) {
            const int8_t *  a = (const int8_t *) tiles[rows][m] + 4 * k;
            const uint8_t * b = tiles[columns][k];
            for (int j = 0; j < sizes.row_bytes[sums] / 4; j++) {
                for (int i = 0; i < 4; i++, b++) {
                    sum[j] += a[i] * (columns_signed ? (int8_t) *b : *b);
                }
            }
        }
        memcpy(tiles[sums][m], sum, sizeof(sum));
    }
}

// ---- vectors ------------------------------------------------------------------------------------------------------

void amx_emulated_widen(const ggml_fp16_t * from, float * to) {
    for (int i = 0; i < LANES; i++) {
        to[i] = to_float_f16(from[i]);
    }
}

void amx_emulated_narrow(const float * from, bf16_pair * to) {
    ggml_bf16_t halves[2 * LANES];
    ggml_fp32_to_bf16_row(from, halves, 2 * LANES);
    memcpy(to, halves, sizeof(halves));
}

void amx_emulated_multiply_bytes(const uint8_t * a, const int8_t * b, int16_t * out) {
    for (int i = 0; i < 32; i++) {
        const int sum = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
        demand(sum == (int16_t) sum, "a sum of more than 16 bits");
        out[i] = (int16_t) sum;
    }
}

void amx_emulated_add_products(int32_t * sums, const int16_t * a, const int16_t * b) {
    for (int i = 0; i < 32; i++) {
        sums[i / 2] += a[i] * b[i];
    }
}

// ---- columns ------------------------------------------------------------------------------------------------------

// The largest of n values without their signs
static float largest_of(const float * x, int n) {
    float largest = 0.0f;
    for (int i = 0; i < n; i++) {
        largest = fmaxf(largest, fabsf(x[i]));
    }
    return largest;
}

static int8_t rounded(float x, float largest) {
    return (int8_t) lrintf(largest > 0.0f ? x * (127.0f / largest) : 0.0f);
}

void amx_emulated_quantize(const float * x, int64_t n, void * to) {
    q8_column * out = to;
    for (; n > 0; n -= QUANT_BLOCK, x += QUANT_BLOCK, out++) {
        const float largest = largest_of(x, QUANT_BLOCK);
        memset(out, 0, sizeof(*out));
        out->d = largest / 127.0f;
        for (int i = 0; i < QUANT_BLOCK; i++) {
            const int8_t q = rounded(x[i], largest);
            out->q[32 * PLACE[i / 32] + i % 32] = q;
            out->sums32[i / 32] = (int16_t) (out->sums32[i / 32] + q);
        }
    }
}

void amx_emulated_quantize_32(const float * x, int64_t n, void * to) {
    q8_groups * out = to;
    for (; n > 0; n -= QUANT_BLOCK, x += QUANT_BLOCK, out++) {
        memset(out, UNWRITTEN, sizeof(*out));
        for (int i = 0; i < QUANT_BLOCK; i++) {
            const float largest = largest_of(x + i / SMALL_BLOCK * SMALL_BLOCK, SMALL_BLOCK);
            out->d[i / SMALL_BLOCK] = largest / 127.0f;
            out->q[i] = rounded(x[i], largest);
        }
    }
}

static void multiply_column(const cpu_quantized * with, const struct ggml_tensor * w, const void * x, int64_t first,
                            int64_t end, int64_t then, float * out) {
    for (int64_t i = first; i < end; i += with->rows) {
        with->multiply_columns(w, x, 1, i, then, out);
    }
}

void amx_emulated_multiply_column(const struct ggml_tensor * w, const void * x, int64_t first, int64_t end,
                                  int64_t then, float * out) {
    multiply_column(&cpu_quantized_amx_emulated, w, x, first, end, then, out);
}

void amx_emulated_multiply_column_32(const struct ggml_tensor * w, const void * x, int64_t first, int64_t end,
                                     int64_t then, float * out) {
    multiply_column(&cpu_quantized_amx_32_emulated, w, x, first, end, then, out);
}
