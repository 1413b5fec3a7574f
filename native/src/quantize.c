#include "status.h"

#include "ggml.h"

#include <math.h>
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

// The largest magnitude, as the bits of a float, whose order is that of magnitudes; NaN and infinity come last.
static uint32_t largest_bits(const float * values, int64_t n) {
    uint32_t max = 0;
    for (int64_t i = 0; i < n; i++) { // integers: the compiler makes vectors of it
        uint32_t bits;
        memcpy(&bits, values + i, sizeof(bits));
        bits &= 0x7fffffffu;
        max = bits > max ? bits : max;
    }
    return max;
}

// largest: the greatest magnitude in src. False if a value does not fit.
static bool narrow(enum ggml_type type, const float * src, float largest, void * dst, int64_t n_rows,
                   int64_t n_per_row) {
    const int64_t n = n_rows * n_per_row;
    switch (type) {
        case GGML_TYPE_F32:
            memcpy(dst, src, (size_t) n * sizeof(float));
            return true;
        case GGML_TYPE_BF16:
            if (isinf(ggml_bf16_to_fp32(ggml_fp32_to_bf16(largest)))) {
                return false;
            }
            ggml_fp32_to_bf16_row(src, dst, n);
            return true;
        case GGML_TYPE_F16:
            if (isinf(ggml_fp16_to_fp32(ggml_fp32_to_fp16(largest)))) {
                return false;
            }
            ggml_fp32_to_fp16_row(src, dst, n);
            return true;
        default:
            // The scales of a block are stored as F16; within its range none overflows.
            if (largest > 65504.0f) {
                return false;
            }
            ggml_quantize_chunk(type, src, dst, 0, n_rows, n_per_row, NULL);
            return true;
    }
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
        return fail(MLLAMA_ERR_ARGUMENT, "%lld rows of %lld values cannot be converted", (long long) n_rows,
                    (long long) n_per_row);
    }
    if (n_per_row % ggml_blck_size(from) != 0 || n_per_row % ggml_blck_size(to) != 0) {
        return fail(MLLAMA_ERR_ARGUMENT, "rows of %lld values are not multiples of the blocks of %s and %s",
                    (long long) n_per_row, ggml_type_name(from), ggml_type_name(to));
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
        const uint32_t bits = largest_bits(values, n);
        float          largest;
        memcpy(&largest, &bits, sizeof(largest));
        if (!isfinite(largest)) {
            status = fail(MLLAMA_ERR_FILE, "holds a value that is not finite");
        } else if (!narrow(to, values, largest, (char *) dst + (size_t) row * dst_size, rows, n_per_row)) {
            status = fail(MLLAMA_ERR_FILE, "the value %g is too large for %s", (double) largest, ggml_type_name(to));
        }
    }
    free(scratch);
    return status;
}
