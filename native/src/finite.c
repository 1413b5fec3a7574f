#include "finite.h"

#include <string.h>

enum {
    EXPONENT_F32  = 0x7f800000, // all ones: infinite or NaN
    STEP_F32      = 0x00800000, // carries such an exponent, and no other, into the sign
    EXPONENT_F16  = 0x7c00,
    STEP_F16      = 0x0400,
    EXPONENT_BF16 = 0x7f80,
    STEP_BF16     = 0x0080,
};

bool finite_f32(const float * x, int64_t n) {
    uint32_t signs = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof(bits));
        signs |= (bits & EXPONENT_F32) + STEP_F32;
    }
    return signs >> 31 == 0;
}

bool finite_f16(const ggml_fp16_t * x, int64_t n) {
    uint16_t signs = 0;
    for (int64_t i = 0; i < n; i++) {
        signs |= (uint16_t) ((x[i] & EXPONENT_F16) + STEP_F16);
    }
    return signs >> 15 == 0;
}

static bool finite_bf16(const ggml_bf16_t * x, int64_t n) {
    uint16_t signs = 0;
    for (int64_t i = 0; i < n; i++) {
        signs |= (uint16_t) ((x[i].bits & EXPONENT_BF16) + STEP_BF16);
    }
    return signs >> 15 == 0;
}

// Where the scales in F16 are in a block, in bytes; the second is 0 where there is one only
typedef struct block_scales {
    enum ggml_type type;
    uint8_t        at[2];
} block_scales;

static const block_scales SCALES[] = {
    { GGML_TYPE_Q4_0,    { 0 } },      { GGML_TYPE_Q4_1,   { 0, 2 } }, { GGML_TYPE_Q5_0,  { 0 } },
    { GGML_TYPE_Q5_1,    { 0, 2 } },   { GGML_TYPE_Q8_0,   { 0 } },    { GGML_TYPE_Q2_K,  { 80, 82 } },
    { GGML_TYPE_Q3_K,    { 108 } },    { GGML_TYPE_Q4_K,   { 0, 2 } }, { GGML_TYPE_Q5_K,  { 0, 2 } },
    { GGML_TYPE_Q6_K,    { 208 } },    { GGML_TYPE_IQ1_S,  { 0 } },    { GGML_TYPE_IQ2_S, { 0 } },
    { GGML_TYPE_IQ2_XXS, { 0 } },      { GGML_TYPE_IQ2_XS, { 0 } },    { GGML_TYPE_IQ3_S, { 0 } },
    { GGML_TYPE_IQ3_XXS, { 0 } },      { GGML_TYPE_IQ4_NL, { 0 } },    { GGML_TYPE_IQ4_XS, { 0 } },
    { GGML_TYPE_TQ1_0,   { 52 } },     { GGML_TYPE_TQ2_0,  { 64 } },
};

static bool finite_blocks(const block_scales * scales, const char * data, size_t n_bytes) {
    const size_t size = ggml_type_size(scales->type);
    uint16_t     signs = 0;
    for (size_t at = 0; at < n_bytes; at += size) {
        for (int i = 0; i < 2; i++) {
            ggml_fp16_t scale;
            memcpy(&scale, data + at + (scales->at[i] ? scales->at[i] : scales->at[0]), sizeof(scale));
            signs |= (uint16_t) ((scale & EXPONENT_F16) + STEP_F16);
        }
    }
    return signs >> 15 == 0;
}

bool finite_bytes(enum ggml_type type, const void * data, size_t n_bytes) {
    switch (type) {
        case GGML_TYPE_F32:  return finite_f32(data, (int64_t) (n_bytes / sizeof(float)));
        case GGML_TYPE_F16:  return finite_f16(data, (int64_t) (n_bytes / sizeof(ggml_fp16_t)));
        case GGML_TYPE_BF16: return finite_bf16(data, (int64_t) (n_bytes / sizeof(ggml_bf16_t)));
        default:             break;
    }
    for (size_t i = 0; i < sizeof(SCALES) / sizeof(*SCALES); i++) {
        if (SCALES[i].type == type) {
            return finite_blocks(&SCALES[i], data, n_bytes);
        }
    }
    return true;
}
