#include "status.h"

#include "ggml.h"

#include <stdlib.h>
#include <string.h>

// About a megabyte of float32: stays in the cache of a core between widening and quantizing.
#define PIECE_VALUES (256 * 1024)

static bool can_write(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32: case GGML_TYPE_F16: case GGML_TYPE_BF16:
        case GGML_TYPE_Q4_0: case GGML_TYPE_Q5_0: case GGML_TYPE_Q5_1: case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q4_K: case GGML_TYPE_Q5_K: case GGML_TYPE_Q6_K:
            return true;
        default:
            return false;
    }
}

static bool all_finite(const float * values, int64_t n) {
    uint32_t any = 0;
    for (int64_t i = 0; i < n; i++) { // no branch: the compiler makes vectors of it
        uint32_t bits;
        memcpy(&bits, values + i, sizeof(bits));
        any |= (bits & 0x7f800000u) == 0x7f800000u;
    }
    return !any;
}

static float largest(const float * values, int64_t n) {
    float max = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        const float magnitude = values[i] < 0 ? -values[i] : values[i];
        max = magnitude > max ? magnitude : max;
    }
    return max;
}

// False if a value became infinite on the way.
static bool narrow(enum ggml_type type, const float * src, void * dst, int64_t n_rows, int64_t n_per_row) {
    const int64_t n = n_rows * n_per_row;
    switch (type) {
        case GGML_TYPE_F32:
            memcpy(dst, src, (size_t) n * sizeof(float));
            return true;
        case GGML_TYPE_BF16:
            ggml_fp32_to_bf16_row(src, dst, n);
            break;
        case GGML_TYPE_F16:
            ggml_fp32_to_fp16_row(src, dst, n);
            break;
        default:
            // Every scale of a block is stored as F16; within its range none overflows.
            if (largest(src, n) > 65504.0f) {
                return false;
            }
            ggml_quantize_chunk(type, src, dst, 0, n_rows, n_per_row, NULL);
            return true;
    }
    const uint16_t exponent = type == GGML_TYPE_F16 ? 0x7c00 : 0x7f80;
    uint16_t       any      = 0;
    for (int64_t i = 0; i < n; i++) {
        any |= (((const uint16_t *) dst)[i] & exponent) == exponent;
    }
    return !any;
}

mllama_status mllama_quantize_rows(int32_t src_type, const void * src, int32_t dst_type, void * dst, int64_t n_rows,
                                   int64_t n_per_row) {
    log_install();
    if (src_type < 0 || src_type >= GGML_TYPE_COUNT || dst_type < 0 || dst_type >= GGML_TYPE_COUNT) {
        return fail(MLLAMA_ERR_ARGUMENT, "types %d and %d: not types of ggml", src_type, dst_type);
    }
    const enum ggml_type from = (enum ggml_type) src_type, to = (enum ggml_type) dst_type;
    const ggml_to_float_t widen = ggml_get_type_traits(from)->to_float;
    if (from != GGML_TYPE_F32 && !widen) {
        return fail(MLLAMA_ERR_ARGUMENT, "type %s cannot be read as numbers", ggml_type_name(from));
    }
    if (!can_write(to)) {
        return fail(MLLAMA_ERR_ARGUMENT, "type %s cannot be written", ggml_type_name(to));
    }
    if (!src || !dst || n_rows < 1 || n_per_row < 1 || n_per_row > INT64_MAX / (int64_t) sizeof(float) / n_rows) {
        return fail(MLLAMA_ERR_ARGUMENT, "%lld rows of %lld values cannot be converted", (long long) n_rows, (long long) n_per_row);
    }
    if (n_per_row % ggml_blck_size(from) != 0 || n_per_row % ggml_blck_size(to) != 0) {
        return fail(MLLAMA_ERR_ARGUMENT, "rows of %lld values are no multiple of the blocks of %s and %s", (long long) n_per_row,
                    ggml_type_name(from), ggml_type_name(to));
    }

    const int64_t step     = n_per_row < PIECE_VALUES ? PIECE_VALUES / n_per_row : 1;
    const size_t  src_size = ggml_row_size(from, n_per_row), dst_size = ggml_row_size(to, n_per_row);
    float *       scratch  = NULL;
    if (from != GGML_TYPE_F32) {
        scratch = malloc((size_t) (step < n_rows ? step : n_rows) * (size_t) n_per_row * sizeof(float));
        if (!scratch) {
            return fail(MLLAMA_ERR_MEMORY, "out of memory");
        }
    }
    mllama_status status = MLLAMA_OK;
    for (int64_t row = 0; row < n_rows && status == MLLAMA_OK; row += step) {
        const int64_t rows   = row + step < n_rows ? step : n_rows - row;
        const int64_t n      = rows * n_per_row;
        const char *  in     = (const char *) src + (size_t) row * src_size;
        const float * values = (const float *) in;
        if (scratch) {
            widen(in, scratch, n);
            values = scratch;
        }
        if (!all_finite(values, n)) {
            status = fail(MLLAMA_ERR_FILE, "holds a value that is not finite");
        } else if (!narrow(to, values, (char *) dst + (size_t) row * dst_size, rows, n_per_row)) {
            status = fail(MLLAMA_ERR_FILE, "the value %g is too large for %s", (double) largest(values, n), ggml_type_name(to));
        }
    }
    free(scratch);
    return status;
}
