// Quantized weights as ggml lays them out.
#pragma once

#include "kernels/kernel.h"

#include <string.h>

// Weight 32 s + i is d * scale[s] * q - dmin * min[s]
typedef struct q4_k_block {
    ggml_fp16_t d, dmin;
    uint8_t     scales[12];         // eight scales and eight mins of 6 bits
    uint8_t     q[QUANT_BLOCK / 2]; // low halves: weights 64 j + i, high halves: 64 j + 32 + i
} q4_k_block;

// The same with a fifth bit: bit s of high[i] is that of weight 32 s + i.
typedef struct q5_k_block {
    ggml_fp16_t d, dmin;
    uint8_t     scales[12];
    uint8_t     high[QUANT_BLOCK / 8];
    uint8_t     q[QUANT_BLOCK / 2];
} q5_k_block;

// Weight 128 h + 32 s + i is d * scale[8 h + 2 s + i / 16] * (q - 32)
typedef struct q6_k_block {
    uint8_t     low[QUANT_BLOCK / 2];  // 4 bits: byte 64 h + 32 a + i has s = a and, above it, s = 2 + a
    uint8_t     high[QUANT_BLOCK / 4]; // 2 bits: byte 32 h + i has s = 0, 1, 2, 3
    int8_t      scales[16];
    ggml_fp16_t d;
} q6_k_block;

// Weight i is d * q[i]
typedef struct q8_0_block {
    ggml_fp16_t d;
    int8_t      q[SMALL_BLOCK];
} q8_0_block;

// Weight i is d * (q - 8)
typedef struct q4_0_block {
    ggml_fp16_t d;
    uint8_t     q[SMALL_BLOCK / 2]; // low halves: weights i, high halves: 16 + i
} q4_0_block;

// Bytes of a block of Q4_K, Q5_K or Q6_K
static inline size_t k_block_size(enum ggml_type type) {
    return type == GGML_TYPE_Q4_K   ? sizeof(q4_k_block)
           : type == GGML_TYPE_Q5_K ? sizeof(q5_k_block)
                                    : sizeof(q6_k_block);
}

// The eight scales and eight mins of a block of Q4_K or Q5_K, a byte each
static inline void k_scales(const uint8_t * packed, uint64_t * scales, uint64_t * mins) {
    uint32_t u[3];
    memcpy(u, packed, sizeof(u));
    const uint64_t above = (u[2] & 0x0f0f0f0f) | (u[0] >> 6 & 0x03030303) << 4;
    const uint64_t less  = (u[2] >> 4 & 0x0f0f0f0f) | (u[1] >> 6 & 0x03030303) << 4;
    *scales = (u[0] & 0x3f3f3f3f) | above << 32;
    *mins   = (u[1] & 0x3f3f3f3f) | less << 32;
}
