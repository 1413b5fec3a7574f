// Attention to rows of a cache, see simd_types.h
#pragma once

#include "kernels/simd_math.h"

enum {
    ROWS_AT_ONCE  = 16, // of values; rows lie kilobytes apart, and the first-level cache has few places for them
    ROWS_TOGETHER = 32, // of a cache, where all heads go over them before the next ones
    SUMS = LANES == 16 ? 4 : 2, // in registers for each query of a group: rows of keys, or vectors of a row of values
};
_Static_assert(ROWS_GROUP == 4, "totals are of a group");
_Static_assert(KEYS % LANES == 0 && KEYS % ROWS_TOGETHER == 0 && ROWS_TOGETHER % SUMS == 0, "rows are whole vectors");

// Rows lie so far apart that the processor does not foresee the next one; into the second-level cache.
INLINE void fetch(const char * rows, size_t stride, int64_t n, size_t n_bytes) {
    for (int64_t i = 0; i < n; i++, rows += stride) {
        for (size_t j = 0; j < n_bytes; j += 64) {
            __builtin_prefetch(rows + j, 0, 2);
        }
    }
}

// `n` rows of a cache, *stride bytes apart, as floats, each of `size` values of which those from head_dim on are 0.
// Rows that have this form already stay where they are.
INLINE const char * widen_rows(const char * rows, size_t * stride, bool * is_half, int64_t n, int64_t head_dim,
                               int64_t size, float * buffer) {
    const bool half = *is_half;
    if (!half && head_dim == size) {
        return rows;
    }
    for (int64_t i = 0; i < n; i++, rows += *stride) {
        float * out = buffer + i * size;
        int64_t j   = 0;
        for (; j + LANES <= head_dim; j += LANES) {
            STORE(out + j, half ? (vf) widen((const ggml_fp16_t *) rows + j) : (vf) LOAD((const float *) rows + j));
        }
        for (; j < head_dim; j++) {
            out[j] = half ? ggml_fp16_to_fp32(((const ggml_fp16_t *) rows)[j]) : ((const float *) rows)[j];
        }
        for (; j < size; j++) {
            out[j] = 0.0f;
        }
    }
    *stride  = sizeof(float) * (size_t) size;
    *is_half = false;
    return (const char *) buffer;
}

// s[ROWS_GROUP][n] in rows of KEYS = q k^T, with q [ROWS_GROUP][size] and n rows of k, `stride` bytes apart, F16 or
// F32. Meanwhile n_bytes of each of as many rows are fetched, `ahead_stride` apart.
INLINE void dots(const float * q, const char * k, size_t stride, const bool half, int64_t n, int64_t size, float * s,
                 const char * ahead, size_t ahead_stride, size_t n_bytes) {
    for (int64_t i = 0; i < n; i += SUMS, ahead += SUMS * ahead_stride) {
        fetch(ahead, ahead_stride, SUMS, n_bytes);
        const char * rows[SUMS];
        vf           sum[SUMS][ROWS_GROUP] = { 0 };
        UNROLL for (int row = 0; row < SUMS; row++) {
            rows[row] = k + (size_t) (i + row < n ? i + row : i) * stride;
        }
        for (int64_t j = 0; j < size; j += LANES) {
            vf x[SUMS];
            UNROLL for (int row = 0; row < SUMS; row++) {
                const char * from = rows[row];
                x[row] = half ? (vf) widen((const ggml_fp16_t *) from + j) : (vf) LOAD((const float *) from + j);
            }
            UNROLL for (int r = 0; r < ROWS_GROUP; r++) {
                const vf z = LOAD(q + r * size + j);
                UNROLL for (int row = 0; row < SUMS; row++) {
                    sum[row][r] += z * x[row];
                }
            }
        }
        UNROLL for (int row = 0; row < SUMS; row++) { // KEYS is a multiple: room for those too many
            const v4f total = totals(sum[row][0], sum[row][1], sum[row][2], sum[row][3]);
            UNROLL for (int r = 0; r < ROWS_GROUP; r++) {
                s[r * KEYS + i + row] = total[r];
            }
        }
    }
}

// out[ROWS_GROUP][vectors * LANES] += s v, with s [ROWS_GROUP][n] in rows of KEYS, n rows of v, `stride` bytes apart,
// F16 or F32, and out in rows of `size`
INLINE void weigh_part(const float * s, const char * v, size_t stride, const bool half, int64_t n, int64_t size,
                       float * out, const int vectors) {
    vf sum[ROWS_GROUP][SUMS];
    UNROLL for (int r = 0; r < ROWS_GROUP; r++) {
        UNROLL for (int c = 0; c < vectors; c++) {
            sum[r][c] = LOAD(out + r * size + c * LANES);
        }
    }
    for (int64_t i = 0; i < n; i++, v += stride) {
        vf x[SUMS];
        UNROLL for (int c = 0; c < vectors; c++) {
            x[c] = half ? (vf) widen((const ggml_fp16_t *) v + c * LANES) : (vf) LOAD((const float *) v + c * LANES);
        }
        UNROLL for (int r = 0; r < ROWS_GROUP; r++) {
            UNROLL for (int c = 0; c < vectors; c++) {
                sum[r][c] += s[r * KEYS + i] * x[c];
            }
        }
    }
    UNROLL for (int r = 0; r < ROWS_GROUP; r++) {
        UNROLL for (int c = 0; c < vectors; c++) {
            STORE(out + r * size + c * LANES, sum[r][c]);
        }
    }
}

// The same for whole rows
INLINE void weigh(const float * s, const char * v, size_t stride, const bool half, int64_t n, int64_t size,
                  float * out) {
    const size_t item = half ? sizeof(ggml_fp16_t) : sizeof(float);
    int64_t      j    = 0;
    for (; j + SUMS * LANES <= size; j += SUMS * LANES) {
        weigh_part(s, v + (size_t) j * item, stride, half, n, size, out + j, SUMS);
    }
    for (; j < size; j += LANES) {
        weigh_part(s, v + (size_t) j * item, stride, half, n, size, out + j, 1);
    }
}

// The mask of a query from `key` on: 0, or -inf
INLINE const ggml_fp16_t * mask_of(const rows_args * a, int64_t query, int64_t key) {
    return (const ggml_fp16_t *) ((const char *) a->mask + (size_t) (query / a->group) * a->mask_stride) + key;
}

// How many of n keys there are up to the last that some query sees
INLINE int64_t n_seen(const rows_args * a, int64_t key, int64_t n) {
    int64_t seen = 0;
    for (int64_t i = 0; i < a->n && seen < n; i += a->group) {
        const ggml_fp16_t * mask = mask_of(a, i, key);
        for (int64_t j = n; j > seen; j--) {
            if (mask[j - 1] == 0) {
                seen = j;
            }
        }
    }
    return seen;
}

INLINE void hide(const rows_args * a, int64_t key, int64_t n, float * s) {
    for (int64_t i = 0; i < a->n; i++) {
        const ggml_fp16_t * mask = mask_of(a, i, key);
        for (int64_t j = 0; j < n; j++) {
            s[i * KEYS + j] = mask[j] == 0 ? s[i * KEYS + j] : NO_KEY;
        }
    }
}

static void attend_rows(const rows_args * a) {
    float __attribute__((aligned(64))) q[QUERIES * MAX_HEAD_DIM], s[QUERIES * KEYS], out[QUERIES * MAX_HEAD_DIM];
    float __attribute__((aligned(64))) buffer[KEYS * MAX_HEAD_DIM]; // of keys, then of values
    float         top[QUERIES];
    vf            sum[QUERIES];
    const int64_t dim = a->head_dim, size = (dim + LANES - 1) / LANES * LANES;
    const int64_t n_q = (a->n + ROWS_GROUP - 1) / ROWS_GROUP * ROWS_GROUP; // of a head
    const size_t  k_bytes = (a->k_half ? sizeof(ggml_fp16_t) : sizeof(float)) * (size_t) dim;
    const size_t  v_bytes = (a->v_half ? sizeof(ggml_fp16_t) : sizeof(float)) * (size_t) dim;
    const bool    direct  = n_q == ROWS_GROUP && dim == size; // rows stay as they are: each is read once

    memset(q, 0, sizeof(float) * (size_t) (a->n_heads * n_q * size));
    memset(out, 0, sizeof(float) * (size_t) (a->n_heads * n_q * size));
    for (int64_t i = 0; i < a->n_heads * n_q; i++) {
        top[i] = NO_KEY;
        sum[i] = (vf) { 0 };
    }
    for (int64_t h = 0; h < a->n_heads; h++) {
        for (int64_t i = 0; i < a->n; i++) {
            const float * token = (const float *) ((const char *) a->q + (size_t) (i / a->group) * a->q_stride);
            const float * row   = token + (h * a->group + i % a->group) * dim;
            for (int64_t j = 0; j < dim; j++) {
                q[(h * n_q + i) * size + j] = row[j] * a->scale;
            }
        }
    }
    // Rows lie kilobytes apart, which no processor foresees: while one head's part of some rows is computed, so much of
    // the next ones is fetched. If all heads go over them, the next ones are fetched from the first byte to the last.
    const int64_t step    = a->n_heads > 1 ? ROWS_TOGETHER : KEYS;
    const size_t  k_apart = a->n_heads > 1 ? k_bytes : a->k_stride, v_apart = a->n_heads > 1 ? v_bytes : a->v_stride;
    if (!a->fetched) {
        fetch(a->k, a->k_stride, a->n_keys < step ? a->n_keys : step, k_bytes * (size_t) a->n_heads);
        fetch(a->v, a->v_stride, a->n_keys < step ? a->n_keys : step, v_bytes * (size_t) a->n_heads);
    }
    for (int64_t key = 0; key < a->n_keys; key += step) {
        int64_t n = a->n_keys - key < step ? a->n_keys - key : step;
        if (a->mask && (n = n_seen(a, key, n)) == 0) {
            continue;
        }
        const bool   last   = key + step >= a->n_keys;
        const char * k_next = last ? a->k_then : a->k + (size_t) (key + step) * a->k_stride;
        const char * v_next = last ? a->v_then : a->v + (size_t) (key + step) * a->v_stride;
        for (int64_t h = 0; h < a->n_heads; h++) {
            const char *  k_rows  = a->k + (size_t) key * a->k_stride + (size_t) h * k_bytes;
            const char *  v_rows  = a->v + (size_t) key * a->v_stride + (size_t) h * v_bytes;
            const char *  k_ahead = k_next + (size_t) (h * step) * k_apart;
            const char *  v_ahead = v_next + (size_t) (h * step) * v_apart;
            float *       s_head = s + h * n_q * KEYS, * out_head = out + h * n_q * size;
            size_t        k_stride = a->k_stride, v_stride = a->v_stride;
            bool          k_half = a->k_half, v_half = a->v_half;
            if (!direct) {
                k_rows = widen_rows(k_rows, &k_stride, &k_half, n, dim, size, buffer);
            }
            for (int64_t i = 0; i < n_q; i += ROWS_GROUP) {
                const float * q_rows  = q + (h * n_q + i) * size;
                const size_t  fetched = i == 0 ? k_bytes : 0;
                if (k_half) { // a constant for each
                    dots(q_rows, k_rows, k_stride, true, n, size, s_head + i * KEYS, k_ahead, k_apart, fetched);
                } else {
                    dots(q_rows, k_rows, k_stride, false, n, size, s_head + i * KEYS, k_ahead, k_apart, fetched);
                }
            }
            if (a->mask) {
                hide(a, key, n, s_head);
            }
            for (int64_t i = 0; i < n_q; i++) {
                for (int64_t j = n; j < (n + LANES - 1) / LANES * LANES; j++) {
                    s_head[i * KEYS + j] = NO_KEY;
                }
            }
            softmax_tops(s_head, n_q, n, top + h * n_q, sum + h * n_q, out_head, size);
            softmax_weights(s_head, n_q, n, top + h * n_q, sum + h * n_q);
            if (!direct) {
                v_rows = widen_rows(v_rows, &v_stride, &v_half, n, dim, size, buffer);
            }
            for (int64_t at = 0; at < n; at += ROWS_AT_ONCE) {
                const int64_t m = n - at < ROWS_AT_ONCE ? n - at : ROWS_AT_ONCE;
                fetch(v_ahead + (size_t) at * v_apart, v_apart, m, v_bytes);
                for (int64_t i = 0; i < n_q; i += ROWS_GROUP) {
                    const char * v = v_rows + (size_t) at * v_stride;
                    if (v_half) {
                        weigh(s_head + i * KEYS + at, v, v_stride, true, m, size, out_head + i * size);
                    } else {
                        weigh(s_head + i * KEYS + at, v, v_stride, false, m, size, out_head + i * size);
                    }
                }
            }
        }
    }
    for (int64_t h = 0; h < a->n_heads; h++) {
        for (int64_t i = 0; i < a->n; i++) {
            const int64_t from = h * n_q + i;
            if (a->part) {
                float * part = a->part + (h * a->n + i) * (2 + dim);
                part[0] = top[from];
                part[1] = total(sum[from]);
                memcpy(part + 2, out + from * size, sizeof(float) * (size_t) dim);
                continue;
            }
            float *     token = (float *) ((char *) a->out + (size_t) (i / a->group) * a->out_stride);
            float *     row   = token + (h * a->group + i % a->group) * dim;
            const float share = 1.0f / total(sum[from]);
            for (int64_t j = 0; j < dim; j++) {
                row[j] = out[from * size + j] * share;
            }
        }
    }
}
