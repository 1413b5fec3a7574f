// Products with Q4_K, Q5_K and Q6_K by ARM's SDOT, and by SMMLA in files that may use it
#pragma once

#include "kernels/k_quants.h"

#include <arm_neon.h>
#include <string.h>

enum {
    GROUPS       = QUANT_BLOCK / 16, // of 16 weights, which have the same scale
    TASK_ROWS    = 8,
    TASK_COLUMNS = 96,
    AHEAD        = 4096, // bytes of a row that are on their way from memory
    LINE         = 64,   // bytes
};

// 256 values of a column
typedef struct q8_column {
    int8_t  q[QUANT_BLOCK];
    int16_t sums16[GROUPS];     // of each 16 values
    int16_t sums32[GROUPS / 2];
    float   d;
} __attribute__((aligned(16))) q8_column;

// A block of a row. Weight i is d * scales[i / 16] * w - dmin * mins[i / 32].
typedef struct row_block {
    int8x16_t w[GROUPS];
    int16_t   scales[GROUPS];
    int16x8_t mins;
    float     d, dmin;
} row_block;

// ---- columns ------------------------------------------------------------------------------------------------------

// Rounds n values to 8 bits
static void quantize(const float * x, int64_t n, void * to) {
    q8_column * out = to;
    for (; n > 0; n -= QUANT_BLOCK, x += QUANT_BLOCK, out++) {
        float32x4_t most = vdupq_n_f32(0.0f);
        for (int i = 0; i < QUANT_BLOCK; i += 4) {
            most = vmaxq_f32(most, vabsq_f32(vld1q_f32(x + i)));
        }
        const float largest = vmaxvq_f32(most), factor = largest > 0.0f ? 127.0f / largest : 0.0f;
        out->d = largest / 127.0f;
        for (int i = 0; i < GROUPS; i++) {
            int32x4_t q[4];
            UNROLL for (int j = 0; j < 4; j++) {
                q[j] = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 16 * i + 4 * j), factor));
            }
            const int16x8_t low  = vcombine_s16(vqmovn_s32(q[0]), vqmovn_s32(q[1]));
            const int16x8_t high = vcombine_s16(vqmovn_s32(q[2]), vqmovn_s32(q[3]));
            vst1q_s8(out->q + 16 * i, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
            out->sums16[i] = vaddvq_s16(vaddq_s16(low, high));
        }
        for (int i = 0; i < GROUPS / 2; i++) {
            out->sums32[i] = (int16_t) (out->sums16[2 * i] + out->sums16[2 * i + 1]);
        }
    }
}

// ---- rows ---------------------------------------------------------------------------------------------------------

INLINE float half_to_float(ggml_fp16_t x) {
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(x))), 0);
}

// Of Q4_K or, `five`, of Q5_K
INLINE void unpack_with_mins(const bool five, const char * block, row_block * out) {
    const q5_k_block * b   = (const void *) block; // Q4_K: the same up to the scales
    const uint8_t *    q   = five ? b->q : ((const q4_k_block *) b)->q;
    const uint8x16_t   bit = vdupq_n_u8(0x10);
    UNROLL for (int i = 0; i < 8; i++) { // 16 bytes: 16 weights in the low halves, those 32 further on in the high ones
        const uint8x16_t byte    = vld1q_u8(q + 16 * i);
        const int        at      = i / 2 * 4 + i % 2;
        uint8x16_t       both[2] = { vandq_u8(byte, vdupq_n_u8(0x0f)), vshrq_n_u8(byte, 4) };
        if (five) {
            const uint8x16_t high = vld1q_u8(b->high + 16 * (i % 2));
            UNROLL for (int j = 0; j < 2; j++) { // bit 2 (i / 2) + j to bit 4
                const int8x16_t up = vdupq_n_s8((int8_t) (4 - i / 2 * 2 - j));
                both[j] = vorrq_u8(both[j], vandq_u8(vshlq_u8(high, up), bit));
            }
        }
        out->w[at]     = vreinterpretq_s8_u8(both[0]);
        out->w[at + 2] = vreinterpretq_s8_u8(both[1]);
    }
    uint64_t scales, mins;
    k_scales(b->scales, &scales, &mins);
    const uint8x8_t each = vcreate_u8(scales);
    vst1q_s16(out->scales, vreinterpretq_s16_u16(vmovl_u8(vzip1_u8(each, each))));
    vst1q_s16(out->scales + 8, vreinterpretq_s16_u16(vmovl_u8(vzip2_u8(each, each))));
    out->mins = vreinterpretq_s16_u16(vmovl_u8(vcreate_u8(mins)));
    out->d    = half_to_float(b->d);
    out->dmin = half_to_float(b->dmin);
}

INLINE void unpack_q6_k(const q6_k_block * b, row_block * out) {
    const uint8x16_t four = vdupq_n_u8(0x0f), two = vdupq_n_u8(0x30);
    const int8x16_t  middle = vdupq_n_s8(32);
    for (int i = 0; i < 4; i++) { // 16 of the places 32 h + ..., h = i / 2
        const int        at   = i / 2 * 8 + i % 2;
        const uint8_t *  low  = b->low + i / 2 * 64 + i % 2 * 16;
        const uint8x16_t a    = vld1q_u8(low), c = vld1q_u8(low + 32);
        const uint8x16_t high = vld1q_u8(b->high + i / 2 * 32 + i % 2 * 16);
        const uint8x16_t q[4] = {
            vorrq_u8(vandq_u8(a, four), vandq_u8(vshlq_n_u8(high, 4), two)),
            vorrq_u8(vandq_u8(c, four), vandq_u8(vshlq_n_u8(high, 2), two)),
            vorrq_u8(vshrq_n_u8(a, 4), vandq_u8(high, two)),
            vorrq_u8(vshrq_n_u8(c, 4), vandq_u8(vshrq_n_u8(high, 2), two)),
        };
        UNROLL for (int j = 0; j < 4; j++) {
            out->w[at + 2 * j] = vsubq_s8(vreinterpretq_s8_u8(q[j]), middle);
        }
    }
    for (int i = 0; i < GROUPS; i++) {
        out->scales[i] = b->scales[i];
    }
    out->mins = vdupq_n_s16(0);
    out->d    = half_to_float(b->d);
    out->dmin = 0.0f;
}

INLINE void unpack(enum ggml_type type, const char * block, row_block * out) {
    switch (type) {
        case GGML_TYPE_Q4_K: unpack_with_mins(false, block, out); break;
        case GGML_TYPE_Q5_K: unpack_with_mins(true, block, out); break;
        default:             unpack_q6_k((const void *) block, out); break;
    }
}

// ---- products -----------------------------------------------------------------------------------------------------

// The mins of a row times the sums of a column
INLINE int32_t taken(int16x8_t mins, const q8_column * x) {
    const int16x8_t sums = vld1q_s16(x->sums32);
    return vaddvq_s32(vmlal_high_s16(vmull_s16(vget_low_s16(mins), vget_low_s16(sums)), mins, sums));
}

INLINE float dot(const row_block * w, const q8_column * x) {
    int32x4_t sum = vdupq_n_s32(0);
    UNROLL for (int i = 0; i < GROUPS; i++) {
        const int32x4_t some = vdotq_s32(vdupq_n_s32(0), w->w[i], vld1q_s8(x->q + 16 * i));
        sum = vmlaq_n_s32(sum, some, w->scales[i]);
    }
    return x->d * (w->d * (float) vaddvq_s32(sum) - w->dmin * (float) taken(w->mins, x));
}

static void multiply_column(const struct ggml_tensor * w, const void * columns, int64_t first, int64_t end,
                            int64_t then, float * out) {
    const q8_column * x    = columns;
    const int64_t     n    = w->ne[0] / QUANT_BLOCK;
    const size_t      size = k_block_size(w->type);
    for (int64_t i = first; i < end; i++) {
        const char * row  = (const char *) w->data + (size_t) i * w->nb[1];
        const char * next = (const char *) w->data + (size_t) (i + 1 < end ? i + 1 : then) * w->nb[1];
        float        sum  = 0.0f;
        for (size_t at = 0; at < AHEAD && at < w->nb[1]; at += LINE) {
            __builtin_prefetch(next + at);
        }
        for (int64_t block = 0; block < n; block++) {
            row_block b;
            unpack(w->type, row + (size_t) block * size, &b);
            sum += dot(&b, x + block);
        }
        out[i] = sum;
    }
}

#ifdef __ARM_FEATURE_MATMUL_INT8
// Blocks of two rows: eight weights of the one, then of the other
typedef struct pair_block {
    int8x16_t w[GROUPS][2];
    int32x4_t scales[GROUPS];
    int16x8_t mins[2];
    float32x4_t d, dmin;
} pair_block;

INLINE float32x4_t twice(float a, float b) {
    return (float32x4_t) { a, a, b, b };
}

INLINE int8x16_t low_halves(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s64(vzip1q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}

INLINE int8x16_t high_halves(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s64(vzip2q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}

static void pair(const row_block * a, const row_block * b, pair_block * out) {
    for (int i = 0; i < GROUPS; i++) {
        out->w[i][0]   = low_halves(a->w[i], b->w[i]);
        out->w[i][1]   = high_halves(a->w[i], b->w[i]);
        out->scales[i] = (int32x4_t) { a->scales[i], a->scales[i], b->scales[i], b->scales[i] };
    }
    out->mins[0] = a->mins;
    out->mins[1] = b->mins;
    out->d       = twice(a->d, b->d);
    out->dmin    = twice(a->dmin, b->dmin);
}

// sums of TASK_ROWS rows and two columns += their products
static void multiply_tile(const pair_block * w, const q8_column * x, const q8_column * y, float * x_sums,
                          float * y_sums) {
    int32x4_t sum[TASK_ROWS / 2];
    UNROLL for (int r = 0; r < TASK_ROWS / 2; r++) {
        sum[r] = vdupq_n_s32(0);
    }
    for (int i = 0; i < GROUPS; i++) {
        const int8x16_t a = vld1q_s8(x->q + 16 * i), b = vld1q_s8(y->q + 16 * i);
        const int8x16_t low = low_halves(a, b), high = high_halves(a, b);
        UNROLL for (int r = 0; r < TASK_ROWS / 2; r++) {
            const int32x4_t some = vmmlaq_s32(vmmlaq_s32(vdupq_n_s32(0), w[r].w[i][0], low), w[r].w[i][1], high);
            sum[r] = vmlaq_s32(sum[r], some, w[r].scales[i]);
        }
    }
    const float32x4_t d = { x->d, y->d, x->d, y->d };
    UNROLL for (int r = 0; r < TASK_ROWS / 2; r++) {
        const int32x4_t   less = { taken(w[r].mins[0], x), taken(w[r].mins[0], y), taken(w[r].mins[1], x),
                                   taken(w[r].mins[1], y) };
        const float32x4_t all  = vmulq_f32(w[r].d, vcvtq_f32_s32(sum[r]));
        const float32x4_t tile = vmulq_f32(d, vfmsq_f32(all, w[r].dmin, vcvtq_f32_s32(less)));
        x_sums[2 * r] += tile[0];
        y_sums[2 * r] += tile[1];
        x_sums[2 * r + 1] += tile[2];
        y_sums[2 * r + 1] += tile[3];
    }
}

// sums[c] += rows[TASK_ROWS] times column c
static void multiply_block(const row_block * rows, const q8_column * x, int64_t stride, int64_t n_columns,
                           float (*sums)[TASK_ROWS]) {
    pair_block pairs[TASK_ROWS / 2];
    float      unused[TASK_ROWS] = { 0 };
    for (int r = 0; r < TASK_ROWS / 2; r++) {
        pair(&rows[2 * r], &rows[2 * r + 1], &pairs[r]);
    }
    for (int64_t c = 0; c < n_columns; c += 2) {
        const bool both = c + 1 < n_columns; // else the column twice
        multiply_tile(pairs, x + c * stride, x + (c + both) * stride, sums[c], both ? sums[c + 1] : unused);
    }
}
#else
// sums[c] += rows[TASK_ROWS] times column c
static void multiply_block(const row_block * rows, const q8_column * x, int64_t stride, int64_t n_columns,
                           float (*sums)[TASK_ROWS]) {
    for (int64_t c = 0; c < n_columns; c++) {
        for (int r = 0; r < TASK_ROWS; r++) {
            sums[c][r] += dot(&rows[r], x + c * stride);
        }
    }
}
#endif

static void multiply_columns(const struct ggml_tensor * w, const void * columns, int64_t n_columns, int64_t first,
                             int64_t then, float * out) {
    const q8_column * x      = columns;
    const int64_t     n      = w->ne[0] / QUANT_BLOCK, left = w->ne[1] - first;
    const int64_t     n_rows = left < TASK_ROWS ? left : TASK_ROWS;
    const size_t      size   = k_block_size(w->type);
    const char *      next   = (const char *) w->data + (size_t) then * w->nb[1];
    float             sums[TASK_COLUMNS][TASK_ROWS];
    row_block         rows[TASK_ROWS];
    memset(sums, 0, sizeof(sums[0]) * (size_t) n_columns);
    for (int64_t block = 0; block < n; block++) {
        for (int64_t r = 0; r < TASK_ROWS; r++) { // the last row for those that do not exist
            const int64_t row = first + (r < n_rows ? r : n_rows - 1);
            unpack(w->type, (const char *) w->data + (size_t) row * w->nb[1] + (size_t) block * size, &rows[r]);
            __builtin_prefetch(next + (size_t) r * w->nb[1] + (size_t) block * size);
        }
        multiply_block(rows, x + block, n, n_columns, sums);
    }
    for (int64_t c = 0; c < n_columns; c++) {
        memcpy(out + c * w->ne[1] + first, sums[c], sizeof(float) * (size_t) n_rows);
    }
}

#define NEON_PRODUCTS                         \
    {                                         \
        .block_size       = sizeof(q8_column), \
        .rows_alone       = 64,               \
        .rows             = TASK_ROWS,        \
        .columns          = TASK_COLUMNS,     \
        .quantize         = quantize,         \
        .multiply_column  = multiply_column,  \
        .multiply_columns = multiply_columns, \
    }
