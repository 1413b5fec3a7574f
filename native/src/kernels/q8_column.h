// A column of the text's products, rounded to 8 bits: the form that the kernels of AVX512-VNNI and of AMX share.
#pragma once

#include "kernels/k_quants.h"

// 256 values of a column. Groups of 32 are in the order 0, 2, 1, 3, 4, 6, 5, 7, as the halves of weights come.
typedef struct q8_column {
    int8_t  q[QUANT_BLOCK];
    int32_t offsets[16]; // -32 times the sum of each 16 values, in this order
    int16_t sums16[16];  // of each 16 values, from the first to the last
    int16_t sums32[8];
    float   d;
} __attribute__((aligned(64))) q8_column;

static const int PLACE[8] = { 0, 2, 1, 3, 4, 6, 5, 7 };
