// A column of the text's products, rounded to 8 bits: the form that the kernels of AVX2 share with those of AVX512-VNNI
// and AMX for blocks of 32 weights.
#pragma once

#include "kernels/k_quants.h"

enum { GROUPS = QUANT_BLOCK / SMALL_BLOCK };

// 256 values of a column: value i is q[i] times d[0], or d[i / 32] where each 32 have a factor of their own.
typedef struct q8_groups {
    int8_t  q[QUANT_BLOCK];
    int16_t sums16[QUANT_BLOCK / 16]; // of each 16 of q
    float   d[GROUPS];
    int16_t sums32[GROUPS];
} __attribute__((aligned(32))) q8_groups;
