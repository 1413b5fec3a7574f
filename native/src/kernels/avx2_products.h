// Products with Q4_K and Q6_K, and with Q8_0 and Q4_0, in vectors of 256 bits. The file that includes this one defines
// before what it does with its instructions, see avx2products.c:
//
//     Q6_K_STEPS, Q8_0_PLANES, add_step, add_pairs, as_scale, add_scaled
#pragma once

#include "kernels/avx2_panels.h"
#include "kernels/avx2_rows.h"

#define PRODUCTS(quantize_columns, one, several) \
    {                                            \
        .block_size       = sizeof(q8_column),   \
        .rows_alone       = 64,                  \
        .rows             = TASK_ROWS,           \
        .columns          = TASK_COLUMNS,        \
        .quantize         = quantize_columns,    \
        .multiply_column  = one,                 \
        .multiply_columns = several,             \
    }
