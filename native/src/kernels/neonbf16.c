// Products of BF16 with ARM's BFMMLA; the rest is F32. An instruction multiplies two rows of four values by two others:
// a tile of 2 by 2 sums.
#define LANES 4
#define ROWS 8
#define VECTORS 2
#define OWN_PRODUCTS
#include "kernels/simd_types.h"

#include <arm_neon.h>

INLINE vf vmax(vf a, vf b) {
    return vbslq_f32(vcgtq_f32(a, b), a, b); // vmaxq_f32 gives what is not a number
}

// 8 values become 4 pairs
INLINE void narrow_two(vf a, vf b, bf16_pair * to) {
    vst1q_u8((uint8_t *) to, vreinterpretq_u8_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(a), b)));
}

#include "kernels/simd_bf16.h"

enum { TILES = VECTORS * LANES / 2 }; // of 2 by 2 sums, in two rows

typedef struct operands {
    bfloat16x8_t first, then; // two of the four rows or columns each
} operands;

// Two factors of each of four rows or columns, from two lines of factors
INLINE operands two_by_two(uint32x4_t even, uint32x4_t odd) {
    return (operands) {
        vreinterpretq_bf16_u32(vzip1q_u32(even, odd)), vreinterpretq_bf16_u32(vzip2q_u32(even, odd)),
    };
}

INLINE float32x4_t load_tile(const float * p, int64_t stride) {
    return vcombine_f32(vld1_f32(p), vld1_f32(p + stride));
}

INLINE void store_tile(float * p, int64_t stride, float32x4_t tile) {
    vst1_f32(p, vget_low_f32(tile));
    vst1_f32(p + stride, vget_high_f32(tile));
}

// One step of product(): `both` says whether there is a second line of factors.
INLINE void product_step(float32x4_t (*sum)[TILES], const factor * a, const factor * b, const bool both) {
    const uint32x4_t none = vdupq_n_u32(0);
    operands         columns[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v++) {
        const factor * p = b + v * LANES;
        columns[v] = two_by_two(vld1q_u32(p), both ? vld1q_u32(p + VECTORS * LANES) : none);
    }
    UNROLL for (int r = 0; r < ROWS; r += 4) {
        const operands rows = two_by_two(vld1q_u32(a + r), both ? vld1q_u32(a + ROWS + r) : none);
        UNROLL for (int v = 0; v < VECTORS; v++) {
            float32x4_t * upper = sum[r / 2] + 2 * v, * lower = sum[r / 2 + 1] + 2 * v;
            upper[0] = vbfmmlaq_f32(upper[0], rows.first, columns[v].first);
            upper[1] = vbfmmlaq_f32(upper[1], rows.first, columns[v].then);
            lower[0] = vbfmmlaq_f32(lower[0], rows.then, columns[v].first);
            lower[1] = vbfmmlaq_f32(lower[1], rows.then, columns[v].then);
        }
    }
}

// As in simd_block.h
INLINE void product(const factor * a, const factor * b, int64_t n, const float * first, int64_t first_stride,
                    float * out, int64_t stride) {
    float32x4_t sum[ROWS / 2][TILES];
    UNROLL for (int r = 0; r < ROWS / 2; r++) {
        UNROLL for (int c = 0; c < TILES; c++) {
            sum[r][c] = load_tile(first + 2 * r * first_stride + 2 * c, first_stride);
        }
    }
    int64_t i = 0;
    for (; i + 2 <= n; i += 2, a += 2 * ROWS, b += 2 * VECTORS * LANES) {
        product_step(sum, a, b, true);
    }
    if (i < n) {
        product_step(sum, a, b, false);
    }
    UNROLL for (int r = 0; r < ROWS / 2; r++) {
        UNROLL for (int c = 0; c < TILES; c++) {
            store_tile(out + 2 * r * stride + 2 * c, stride, sum[r][c]);
        }
    }
}

// As in simd_block.h; n is even, as keys come in whole panels.
_Static_assert(VECTORS * LANES % 4 == 0, "two factors of keys at a time");

INLINE void accumulate(const factor * a, const factor * b, int64_t n, int64_t stride, float * out, const int vectors) {
    float32x4_t sum[ROWS / 2][TILES];
    UNROLL for (int r = 0; r < ROWS / 2; r++) {
        UNROLL for (int c = 0; c < 2 * vectors; c++) {
            sum[r][c] = load_tile(out + 2 * r * stride + 2 * c, stride);
        }
    }
    for (int64_t i = 0; i < n; i += 2, b += 2 * stride) {
        operands columns[VECTORS];
        UNROLL for (int v = 0; v < vectors; v++) {
            columns[v] = two_by_two(vld1q_u32(b + v * LANES), vld1q_u32(b + stride + v * LANES));
        }
        UNROLL for (int r = 0; r < ROWS / 2; r++) {
            const factor *     p    = a + 2 * r * KEYS + i;
            const bfloat16x8_t rows = vreinterpretq_bf16_u32(vcombine_u32(vld1_u32(p), vld1_u32(p + KEYS)));
            UNROLL for (int v = 0; v < vectors; v++) {
                sum[r][2 * v]     = vbfmmlaq_f32(sum[r][2 * v], rows, columns[v].first);
                sum[r][2 * v + 1] = vbfmmlaq_f32(sum[r][2 * v + 1], rows, columns[v].then);
            }
        }
    }
    UNROLL for (int r = 0; r < ROWS / 2; r++) {
        UNROLL for (int c = 0; c < 2 * vectors; c++) {
            store_tile(out + 2 * r * stride + 2 * c, stride, sum[r][c]);
        }
    }
}

#include "kernels/simd_block.h"

const cpu_bf16 cpu_bf16_neon = {
    .lanes   = LANES,
    .width   = WIDTH,
    .columns = COLUMNS,
    .attend  = attend,
    .linear  = linear,
};
