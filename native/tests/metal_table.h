// Which of the operations that our graphs use ggml's Metal backend knows, by types, shapes and strides: its table of
// ggml 0.25.3 (ggml_metal_device_supports_op) as data for tests, for a chip without BF16. Operations that we do not
// use are not in it.
#pragma once

#include "ggml.h"

namespace metal {

inline bool is_half_or_float(const ggml_tensor * t) { return t->type == GGML_TYPE_F32 || t->type == GGML_TYPE_F16; }

inline bool has_head_size(int64_t n) {
    static const int sizes[] = { 32, 40, 48, 64, 72, 80, 96, 112, 128, 192, 256, 320, 512, 576 };
    for (int size : sizes) {
        if (n == size) return true;
    }
    return false;
}

inline bool attends(const ggml_tensor * op) {
    const ggml_tensor * q = op->src[0], * k = op->src[1], * v = op->src[2];
    return has_head_size(q->ne[0]) && k->ne[0] >= v->ne[0] && k->type == v->type &&
           (is_half_or_float(k) || k->type == GGML_TYPE_Q8_0);
}

inline bool copies(ggml_type from, ggml_type to) {
    if (from == GGML_TYPE_F32) {
        return to == GGML_TYPE_F32 || to == GGML_TYPE_F16 || to == GGML_TYPE_Q8_0 || to == GGML_TYPE_I32;
    }
    return (from == GGML_TYPE_F16 || from == GGML_TYPE_Q8_0) && (to == GGML_TYPE_F32 || to == GGML_TYPE_F16);
}

inline bool supports(const ggml_tensor * op) {
    const ggml_tensor * a = op->src[0], * b = op->src[1];
    for (int i = 0; i < 3; i++) {
        if (op->src[i] && op->src[i]->type == GGML_TYPE_BF16) return false;
    }
    switch (op->op) {
        case GGML_OP_NONE: case GGML_OP_RESHAPE: case GGML_OP_VIEW: case GGML_OP_PERMUTE: case GGML_OP_TRANSPOSE:
        case GGML_OP_REPEAT: case GGML_OP_ROPE: case GGML_OP_GET_ROWS:
            return true;
        case GGML_OP_SCALE:
            return ggml_is_contiguous_rows(a) && is_half_or_float(a);
        case GGML_OP_UNARY:
            return ggml_get_unary_op(op) == GGML_UNARY_OP_GELU_ERF && ggml_is_contiguous_rows(a) && is_half_or_float(a);
        case GGML_OP_GLU:
            return ggml_get_glu_op(op) == GGML_GLU_OP_SWIGLU && ggml_is_contiguous_1(a) && is_half_or_float(a);
        case GGML_OP_ADD: case GGML_OP_MUL:
            return ggml_is_contiguous_rows(a) && ggml_is_contiguous_rows(b) && is_half_or_float(a) &&
                   a->type == b->type;
        case GGML_OP_CONCAT:
            return a->type == b->type && a->type == op->type && is_half_or_float(a);
        case GGML_OP_SUM:
            return ggml_is_contiguous(a);
        case GGML_OP_NORM: case GGML_OP_RMS_NORM: case GGML_OP_SOFT_MAX:
            return ggml_is_contiguous_rows(a);
        case GGML_OP_PAD:
            return a->type == GGML_TYPE_F32;
        case GGML_OP_FLASH_ATTN_EXT:
            return attends(op);
        case GGML_OP_MUL_MAT:
            return b->type == GGML_TYPE_F32 && !ggml_is_transposed(a);
        case GGML_OP_CPY: case GGML_OP_CONT:
            return copies(a->type, op->type);
        case GGML_OP_SET_ROWS:
            return a->type == GGML_TYPE_F16 ? op->type == GGML_TYPE_F16 : copies(a->type, op->type);
        default:
            return false;
    }
}

} // namespace metal
