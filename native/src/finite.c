#include "finite.h"

#include <string.h>

enum {
    EXPONENT_F32 = 0x7f800000, // all ones: infinite or NaN
    STEP_F32     = 0x00800000, // carries such an exponent, and no other, into the sign
    EXPONENT_F16 = 0x7c00,
    STEP_F16     = 0x0400,
    Q8_0_BLOCK   = 34,         // bytes: a scale in F16 and 32 whole numbers
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

bool finite_bytes(enum ggml_type type, const void * data, size_t n_bytes) {
    if (type == GGML_TYPE_F32) {
        return finite_f32(data, (int64_t) (n_bytes / sizeof(float)));
    }
    if (type == GGML_TYPE_F16) {
        return finite_f16(data, (int64_t) (n_bytes / sizeof(ggml_fp16_t)));
    }
    bool finite = true;
    for (size_t at = 0; type == GGML_TYPE_Q8_0 && at < n_bytes; at += Q8_0_BLOCK) {
        ggml_fp16_t scale;
        memcpy(&scale, (const char *) data + at, sizeof(scale));
        finite &= finite_f16(&scale, 1);
    }
    return finite;
}

mllama_status finite_fail(const gguf_file * file, const char * doing) {
    return fail(MLLAMA_ERR_FILE,
                "%s: the results of %s are not finite (NaN or infinity): the file is damaged or badly quantized; "
                "`mllama verify` checks it, `mllama trace` names the first such tensor",
                file->path, doing);
}
