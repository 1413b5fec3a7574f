// Products with Q4_K, Q5_K and Q6_K, and with Q8_0 and Q4_0, in vectors of 256 bits. The file that includes this one
// defines before what it does with its instructions, see avx2products.c:
//
//     Q5_K_STEPS, Q6_K_STEPS, add_step, add_pairs, as_scale, add_scaled
#pragma once

#include "kernels/avx2_panels.h"
#include "kernels/avx2_rows.h"

static void multiply_column_256(const struct ggml_tensor * w, const void * x, int64_t first, int64_t end,
                                int64_t then, float * out) {
    multiply_few_256(w, x, 1, first, end, then, out);
}

static void multiply_column_32(const struct ggml_tensor * w, const void * x, int64_t first, int64_t end, int64_t then,
                               float * out) {
    multiply_few_32(w, x, 1, first, end, then, out);
}

// Of a task of several columns
INLINE int64_t end_of(const struct ggml_tensor * w, int64_t first) {
    return w->ne[1] - first < TASK_ROWS ? w->ne[1] : first + TASK_ROWS;
}

static void multiply_columns_256(const struct ggml_tensor * w, const void * x, int64_t n_columns, int64_t first,
                                 int64_t then, float * out) {
    if (n_columns <= FEW) {
        multiply_few_256(w, x, n_columns, first, end_of(w, first), then, out);
    } else {
        const form * f = w->type == GGML_TYPE_Q4_K ? &Q4_K : w->type == GGML_TYPE_Q5_K ? &Q5_K : &Q6_K;
        multiply_panels(f, w, x, n_columns, first, then, out);
    }
}

static void multiply_columns_32(const struct ggml_tensor * w, const void * x, int64_t n_columns, int64_t first,
                                int64_t then, float * out) {
    if (n_columns <= FEW) { // as are those with Q8_0
        multiply_few_32(w, x, n_columns, first, end_of(w, first), then, out);
    } else {
        multiply_panels(&Q4_0, w, x, n_columns, first, then, out);
    }
}

#define PRODUCTS(quantize_columns, one, several) \
    {                                            \
        .block_size       = sizeof(q8_column),   \
        .rows_alone       = 64,                  \
        .rows             = TASK_ROWS,           \
        .columns          = TASK_COLUMNS,        \
        .q8_0_columns     = FEW,                 \
        .quantize         = quantize_columns,    \
        .multiply_column  = one,                 \
        .multiply_columns = several,             \
    }
