// Q4_K and Q6_K as ggml lays them out.
#pragma once

#include "kernels/kernel.h"

// Weight 32 s + i is d * scale[s] * q - dmin * min[s]
typedef struct q4_k_block {
    ggml_fp16_t d, dmin;
    uint8_t     scales[12];         // eight scales and eight mins of 6 bits
    uint8_t     q[QUANT_BLOCK / 2]; // low halves: weights 64 j + i, high halves: 64 j + 32 + i
} q4_k_block;

// Weight 128 h + 32 s + i is d * scale[8 h + 2 s + i / 16] * (q - 32)
typedef struct q6_k_block {
    uint8_t     low[QUANT_BLOCK / 2];  // 4 bits: byte 64 h + 32 a + i has s = a and, above it, s = 2 + a
    uint8_t     high[QUANT_BLOCK / 4]; // 2 bits: byte 32 h + i has s = 0, 1, 2, 3
    int8_t      scales[16];
    ggml_fp16_t d;
} q6_k_block;
