// Attention and linear layers over packed blocks, see simd_types.h
#pragma once

#include "kernels/simd_math.h"

enum {
    WIDTH = VECTORS * LANES, // of a panel
    DEPTH = 640,             // factors of each in one pass of a linear layer
};
_Static_assert(QUERIES % ROWS == 0 && COLUMNS % ROWS == 0 && KEYS % (VECTORS * LANES) == 0, "blocks are whole tiles");
_Static_assert(VECTORS * LANES <= MAX_WIDTH, "nodes pack panels");

#ifndef OWN_PRODUCTS // else the file has defined these two in another way
// out[ROWS][WIDTH] = first + a^T b, with factors a [n][ROWS] and b [n][WIDTH]; first and out in rows of their strides,
// 0: one row for all
INLINE void product(const factor * a, const factor * b, int64_t n, const float * first, int64_t first_stride,
                    float * out, int64_t stride) {
    vf sum[ROWS][VECTORS];
    UNROLL for (int r = 0; r < ROWS; r++) {
        UNROLL for (int v = 0; v < VECTORS; v++) {
            sum[r][v] = LOAD(first + r * first_stride + v * LANES);
        }
    }
    for (int64_t i = 0; i < n; i++, a += ROWS, b += WIDTH) {
        UNROLL for (int r = 0; r < ROWS; r++) {
            UNROLL for (int v = 0; v < VECTORS; v++) {
                sum[r][v] = multiply_add(sum[r][v], a[r], b + v * LANES);
            }
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++) {
        UNROLL for (int v = 0; v < VECTORS; v++) {
            STORE(out + r * stride + v * LANES, sum[r][v]);
        }
    }
}

// out[ROWS][vectors * LANES] += a b, with factors a [ROWS][n] in rows of KEYS, b [n] and out in rows of `stride`
INLINE void accumulate(const factor * a, const factor * b, int64_t n, int64_t stride, float * out, const int vectors) {
    vf sum[ROWS][VECTORS];
    UNROLL for (int r = 0; r < ROWS; r++) {
        UNROLL for (int v = 0; v < vectors; v++) {
            sum[r][v] = LOAD(out + r * stride + v * LANES);
        }
    }
    for (int64_t i = 0; i < n; i++, b += stride) {
        UNROLL for (int r = 0; r < ROWS; r++) {
            UNROLL for (int v = 0; v < vectors; v++) {
                sum[r][v] = multiply_add(sum[r][v], a[r * KEYS + i], b + v * LANES);
            }
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++) {
        UNROLL for (int v = 0; v < vectors; v++) {
            STORE(out + r * stride + v * LANES, sum[r][v]);
        }
    }
}
#endif

static void attend(const attend_args * a) {
    float __attribute__((aligned(64))) s[QUERIES * KEYS], out[QUERIES * MAX_HEAD_DIM];
    factor __attribute__((aligned(64))) q[QUERIES * MAX_HEAD_DIM / PER_FACTOR];
    float         top[QUERIES];
    vf            sum[QUERIES];
    const int64_t dim = a->head_dim, depth = dim / PER_FACTOR, n_out = (dim + LANES - 1) / LANES * LANES;
    const int64_t tiles = (a->n + ROWS - 1) / ROWS;

    memset(q, 0, sizeof(factor) * (size_t) (tiles * ROWS * depth));
    memset(out, 0, sizeof(float) * (size_t) (tiles * ROWS * n_out));
    for (int64_t i = 0; i < tiles * ROWS; i++) {
        top[i] = NO_KEY;
        sum[i] = (vf) { 0 };
    }
    for (int64_t i = 0; i < a->n; i++) {
        const float * row = (const float *) ((const char *) a->q + (size_t) i * a->q_stride);
        spread(row, a->scale, dim, q + i / ROWS * depth * ROWS + i % ROWS, ROWS);
    }
    for (int64_t key = 0; key < a->n_keys; key += KEYS) {
        const int64_t n = a->n_keys - key < KEYS ? a->n_keys - key : KEYS;
        for (int64_t j = 0; j < n; j += WIDTH) {
            const float *  panel = a->k + (key + j) * (1 + depth);
            const factor * keys  = (const factor *) (panel + WIDTH);
            for (int64_t t = 0; t < tiles; t++) {
                product(q + t * depth * ROWS, keys, depth, panel, 0, s + t * ROWS * KEYS + j, KEYS);
            }
        }
        softmax_tops(s, tiles * ROWS, n, top, sum, out, n_out);
        softmax_weights(s, tiles * ROWS, n, top, sum);
        const factor * weights = (const factor *) s, * v = (const factor *) a->v + key / PER_FACTOR * n_out;
        const int64_t  some    = n / PER_FACTOR;
        int64_t        j       = 0;
        for (; j + WIDTH <= n_out; j += WIDTH) {
            for (int64_t t = 0; t < tiles; t++) {
                accumulate(weights + t * ROWS * KEYS, v + j, some, n_out, out + t * ROWS * n_out + j, VECTORS);
            }
        }
        for (; j < n_out; j += LANES) {
            for (int64_t t = 0; t < tiles; t++) {
                accumulate(weights + t * ROWS * KEYS, v + j, some, n_out, out + t * ROWS * n_out + j, 1);
            }
        }
    }
    for (int64_t i = 0; i < a->n; i++) {
        float *     row    = (float *) ((char *) a->out + (size_t) i * a->out_stride);
        const float share = 1.0f / total(sum[i]);
        for (int64_t j = 0; j < dim; j++) {
            row[j] = out[i * n_out + j] * share;
        }
    }
}

// Rows of x times whole panels of weights: depth by depth, so that a piece of a panel stays in the nearest caches while
// all rows, in the second-level cache, pass by it.
static void linear(const linear_args * a) {
    factor __attribute__((aligned(64))) x[COLUMNS * DEPTH];
    float __attribute__((aligned(64))) tile[ROWS * WIDTH];
    const int64_t tiles = (a->n + ROWS - 1) / ROWS, panels = (a->n_out + WIDTH - 1) / WIDTH;

    for (int64_t at = 0; at < a->n_in; at += DEPTH * PER_FACTOR) {
        const int64_t values = a->n_in - at < DEPTH * PER_FACTOR ? a->n_in - at : DEPTH * PER_FACTOR;
        const int64_t depth  = values / PER_FACTOR;
        for (int64_t i = 0; i < tiles * ROWS; i++) {
            const float * row = (const float *) ((const char *) a->x + (size_t) (i < a->n ? i : 0) * a->x_stride) + at;
            spread(row, 1.0f, values, x + i / ROWS * depth * ROWS + i % ROWS, ROWS);
        }
        for (int64_t p = 0; p < panels; p++) {
            const float *  first = a->w + p * WIDTH * (1 + a->n_in / PER_FACTOR);
            const factor * w     = (const factor *) first + WIDTH * (1 + at / PER_FACTOR);
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t  rows   = a->n - t * ROWS < ROWS ? a->n - t * ROWS : ROWS;
                const int64_t  width  = a->n_out - p * WIDTH < WIDTH ? a->n_out - p * WIDTH : WIDTH;
                const int64_t  stride = a->out_stride;
                const factor * in     = x + t * ROWS * depth;
                float *        out    = a->out + t * ROWS * stride + p * WIDTH;
                if (rows == ROWS && width == WIDTH) {
                    product(in, w, depth, at ? out : first, at ? stride : 0, out, stride);
                    continue;
                }
                for (int64_t r = 0; at && r < rows; r++) {
                    memcpy(tile + r * WIDTH, out + r * stride, sizeof(float) * (size_t) width);
                }
                product(in, w, depth, at ? tile : first, at ? WIDTH : 0, tile, WIDTH);
                for (int64_t r = 0; r < rows; r++) {
                    memcpy(out + r * stride, tile + r * WIDTH, sizeof(float) * (size_t) width);
                }
            }
        }
    }
}
