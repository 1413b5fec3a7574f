// The arithmetic of cpu_kernels.c for one kind of processor. Included once for each, with
//
//     KERNEL(name)   the name with a suffix
//     TARGET         the function attribute that switches the instructions on
//     LANES          floats in a vector
//     ROWS, VECTORS  rows and vectors of the block of sums that is kept in registers
//     VMAX(a, b)     larger of each lane; b where either is not a number
//     WIDEN(p)       LANES F16 numbers in memory as floats
//     TOTALS(a, b, c, d)  the sums of four vectors
//     PAIRS          0, or 1: factors are pairs of BF16 numbers, whose products are added to a sum of F32. Then only
//                    `attend` and `linear` are made, and WIDEN and TOTALS are not needed, but
//     MULTIPLY_ADD(sum, a, p)  sum + the pair a times LANES pairs in memory
//     NARROW(p, q)   2 LANES floats in memory to as many BF16 numbers, rounded; q may be p
//
// Everything else is GCC's and Clang's vector extension.

#if PAIRS
#define FACTOR bf16_pair
#define PER_FACTOR 2
#else
#define FACTOR float
#define PER_FACTOR 1
#define MULTIPLY_ADD(sum, a, p) ((sum) + (a) * LOAD(p))
#endif

typedef float   KERNEL(vf) __attribute__((vector_size(4 * LANES)));
typedef int32_t KERNEL(vi) __attribute__((vector_size(4 * LANES)));
typedef uint32_t KERNEL(vw) __attribute__((vector_size(4 * LANES)));
typedef float   KERNEL(vu) __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); // in memory
#define vf   KERNEL(vf)
#define vi   KERNEL(vi)
#define vw   KERNEL(vw)
#define vu   KERNEL(vu)
#define LOAD(p)     (*(const vu *) (p))
#define STORE(p, x) (*(vu *) (p) = (x))
#define INLINE TARGET static inline __attribute__((always_inline))

enum {
    KERNEL(WIDTH) = VECTORS * LANES,
    KERNEL(TILES) = QUERIES / ROWS,
    KERNEL(SUMS)  = LANES == 16 ? 4 : 2, // in registers for each query of a group: rows of keys, or vectors of a row of values
};
#define WIDTH KERNEL(WIDTH)
#define TILES KERNEL(TILES)
#define SUMS KERNEL(SUMS)
_Static_assert(GROUP == 4, "TOTALS are of a group");
_Static_assert(QUERIES % ROWS == 0 && KEYS % (VECTORS * LANES) == 0, "blocks are whole tiles");

// 2^x for x <= 0 or small; relative error 2e-7; not less than 2^-125, which stands for 0
INLINE vf KERNEL(exp2)(vf x) {
    const vf least = (vf) { 0 } - 125.0f, shift = (vf) { 0 } + 12582912.0f; // 1.5 * 2^23: adding it rounds to whole numbers
    x = VMAX(least, x);
    const vf whole = x + shift, f = x - (whole - shift);
    vf       p     = 0.001327647129073739f * f + 0.009675540961325169f; // minimax of 2^f on [-0.5, 0.5]
    p = p * f + 0.05550713092088699f;
    p = p * f + 0.24022120237350464f;
    p = p * f + 0.6931469440460205f;
    p = p * f + 1.0000001192092896f;
    return (vf) ((vw) p + ((vw) whole << 23)); // unsigned: of what is not a number anything may come, but no overflow
}

#if !PAIRS
// Absolute error 2e-7: 1 - 2^q(|x|), where q is the minimax of log2(erfc) on [0, 4], weighted by erfc
INLINE vf KERNEL(erf)(vf x) {
    const vi sign = (vi) x & INT32_MIN;
    const vf a    = -VMAX((vf) { 0 } - 4.0f, -(vf) ((vi) x ^ sign));
    vf       q    = -4.435278970049694e-05f * a + 0.0004369438684079796f;
    q = q * a - 0.0014603807358071208f;
    q = q * a - 0.0008251662366092205f;
    q = q * a + 0.028301887214183807f;
    q = q * a - 0.14850664138793945f;
    q = q * a - 0.9184098243713379f;
    q = q * a - 1.6279093027114868f;
    return (vf) ((vi) (1.0f - KERNEL(exp2)(q * a)) ^ sign);
}

INLINE vf KERNEL(gelu)(vf x) {
    return 0.5f * x * (1.0f + KERNEL(erf)(0.70710678118654752f * x));
}

TARGET static void KERNEL(erf_array)(const float * x, float * y, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        STORE(y + i, KERNEL(erf)(LOAD(x + i)));
    }
    float rest[LANES] = { 0 };
    memcpy(rest, x + i, sizeof(float) * (size_t) (n - i));
    STORE(rest, KERNEL(erf)(LOAD(rest)));
    memcpy(y + i, rest, sizeof(float) * (size_t) (n - i));
}

// x = gelu(x + bias), n values; bias may be NULL
TARGET static void KERNEL(bias_gelu)(float * x, const float * bias, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vf v = LOAD(x + i);
        if (bias) {
            v += LOAD(bias + i);
        }
        STORE(x + i, KERNEL(gelu)(v));
    }
    float rest[LANES] = { 0 };
    for (int64_t j = i; j < n; j++) {
        rest[j - i] = bias ? x[j] + bias[j] : x[j];
    }
    STORE(rest, KERNEL(gelu)(LOAD(rest)));
    memcpy(x + i, rest, sizeof(float) * (size_t) (n - i));
}

#endif

// out[ROWS][WIDTH] = first + a^T b, with factors a [n][ROWS] and b [n][WIDTH]; first and out in rows of their strides, 0: one row for all
INLINE void KERNEL(product)(const FACTOR * a, const FACTOR * b, int64_t n, const float * first, int64_t first_stride, float * out,
                            int64_t stride) {
    vf sum[ROWS][VECTORS];
    UNROLL for (int r = 0; r < ROWS; r++) {
        UNROLL for (int v = 0; v < VECTORS; v++) {
            sum[r][v] = LOAD(first + r * first_stride + v * LANES);
        }
    }
    for (int64_t i = 0; i < n; i++, a += ROWS, b += WIDTH) {
        UNROLL for (int r = 0; r < ROWS; r++) {
            UNROLL for (int v = 0; v < VECTORS; v++) {
                sum[r][v] = MULTIPLY_ADD(sum[r][v], a[r], b + v * LANES);
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
INLINE void KERNEL(accumulate)(const FACTOR * a, const FACTOR * b, int64_t n, int64_t stride, float * out, const int vectors) {
    vf sum[ROWS][VECTORS];
    UNROLL for (int r = 0; r < ROWS; r++) {
        UNROLL for (int v = 0; v < vectors; v++) {
            sum[r][v] = LOAD(out + r * stride + v * LANES);
        }
    }
    for (int64_t i = 0; i < n; i++, b += stride) {
        UNROLL for (int r = 0; r < ROWS; r++) {
            UNROLL for (int v = 0; v < vectors; v++) {
                sum[r][v] = MULTIPLY_ADD(sum[r][v], a[r * KEYS + i], b + v * LANES);
            }
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++) {
        UNROLL for (int v = 0; v < vectors; v++) {
            STORE(out + r * stride + v * LANES, sum[r][v]);
        }
    }
}

// The largest of the lanes and a
INLINE float KERNEL(largest)(vf x, float a) {
    const union { vf whole; v4f part[LANES / 4]; } u = { .whole = x };
    v4f four = u.part[0];
    UNROLL for (int i = 1; i < LANES / 4; i++) {
        four = max4(four, u.part[i]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        a = a > four[i] ? a : four[i];
    }
    return a;
}

// The sum of the lanes
INLINE float KERNEL(total)(vf x) {
    const union { vf whole; v4f part[LANES / 4]; } u = { .whole = x };
    v4f four = u.part[0];
    UNROLL for (int i = 1; i < LANES / 4; i++) {
        four += u.part[i];
    }
    return (four[0] + four[1]) + (four[2] + four[3]);
}

// One step of the online softmax for one query: s [n] becomes 2^(s - top), and what was summed so far is scaled down to
// the new top.
INLINE void KERNEL(softmax_step)(float * s, int64_t n, float * top, float * sum, float * out, int64_t n_out) {
    vf high = LOAD(s);
    for (int64_t i = LANES; i < n; i += LANES) {
        high = VMAX(high, LOAD(s + i));
    }
    const float now = KERNEL(largest)(high, *top);
    if (!(now <= *top)) {
        const vf factor = KERNEL(exp2)((vf) { 0 } + (*top - now));
        for (int64_t i = 0; i < n_out; i += LANES) {
            STORE(out + i, LOAD(out + i) * factor);
        }
        *sum *= factor[0];
        *top = now;
    }
    vf total = { 0 };
    for (int64_t i = 0; i < n; i += LANES) {
        const vf p = KERNEL(exp2)(LOAD(s + i) - now);
        STORE(s + i, p);
        total += p;
    }
    *sum += KERNEL(total)(total);
}

// to[i * stride] = scale * from[i] as factors, n values
INLINE void KERNEL(spread)(const float * from, float scale, int64_t n, FACTOR * to, int64_t stride) {
#if PAIRS
    float __attribute__((aligned(64))) some[2 * LANES] = { 0 };
    for (int64_t i = 0; i < n; i += 2 * LANES) {
        const int64_t m = n - i < 2 * LANES ? n - i : 2 * LANES;
        for (int64_t j = 0; j < m; j++) {
            some[j] = scale * from[i + j];
        }
        NARROW(some, some);
        for (int64_t j = 0; j < m / 2; j++) {
            to[(i / 2 + j) * stride] = ((const FACTOR *) some)[j];
        }
    }
#else
    for (int64_t i = 0; i < n; i++) {
        to[i * stride] = scale * from[i];
    }
#endif
}

// At most QUERIES queries of one head over the first n_keys packed keys (whole panels)
TARGET static void KERNEL(attend)(const attend_args * a) {
    float __attribute__((aligned(64))) s[QUERIES * KEYS], out[QUERIES * MAX_HEAD_DIM];
    FACTOR __attribute__((aligned(64))) q[QUERIES * MAX_HEAD_DIM / PER_FACTOR];
    float         top[QUERIES], sum[QUERIES];
    const int64_t dim = a->head_dim, depth = dim / PER_FACTOR, n_out = (dim + LANES - 1) / LANES * LANES;
    const int64_t tiles = (a->n + ROWS - 1) / ROWS;

    memset(q, 0, sizeof(FACTOR) * (size_t) (tiles * ROWS * depth));
    memset(out, 0, sizeof(float) * (size_t) (tiles * ROWS * n_out));
    for (int64_t i = 0; i < tiles * ROWS; i++) {
        top[i] = NO_KEY;
        sum[i] = 0.0f;
    }
    for (int64_t i = 0; i < a->n; i++) {
        const float * row = (const float *) ((const char *) a->q + (size_t) i * a->q_stride);
        KERNEL(spread)(row, a->scale, dim, q + i / ROWS * depth * ROWS + i % ROWS, ROWS);
    }
    for (int64_t key = 0; key < a->n_keys; key += KEYS) {
        const int64_t n = a->n_keys - key < KEYS ? a->n_keys - key : KEYS;
        for (int64_t j = 0; j < n; j += WIDTH) {
            const float * panel = a->k + (key + j) * (1 + depth);
            for (int64_t t = 0; t < tiles; t++) {
                KERNEL(product)(q + t * depth * ROWS, (const FACTOR *) (panel + WIDTH), depth, panel, 0, s + t * ROWS * KEYS + j, KEYS);
            }
        }
        for (int64_t i = 0; i < tiles * ROWS; i++) {
            KERNEL(softmax_step)(s + i * KEYS, n, &top[i], &sum[i], out + i * n_out, n_out);
#if PAIRS
            for (int64_t j = 0; j < n; j += 2 * LANES) {
                NARROW(s + i * KEYS + j, s + i * KEYS + j / 2);
            }
#endif
        }
        const FACTOR * weights = (const FACTOR *) s, * v = (const FACTOR *) a->v + key / PER_FACTOR * n_out;
        int64_t        j       = 0;
        for (; j + WIDTH <= n_out; j += WIDTH) {
            for (int64_t t = 0; t < tiles; t++) {
                KERNEL(accumulate)(weights + t * ROWS * KEYS, v + j, n / PER_FACTOR, n_out, out + t * ROWS * n_out + j, VECTORS);
            }
        }
        for (; j < n_out; j += LANES) {
            for (int64_t t = 0; t < tiles; t++) {
                KERNEL(accumulate)(weights + t * ROWS * KEYS, v + j, n / PER_FACTOR, n_out, out + t * ROWS * n_out + j, 1);
            }
        }
    }
    for (int64_t i = 0; i < a->n; i++) {
        float *     row    = (float *) ((char *) a->out + (size_t) i * a->out_stride);
        const float factor = 1.0f / sum[i];
        for (int64_t j = 0; j < dim; j++) {
            row[j] = out[i * n_out + j] * factor;
        }
    }
}

// Rows of x times whole panels of weights: depth by depth, so that a piece of a panel stays in the nearest caches while
// all rows, in the second-level cache, pass by it.
TARGET static void KERNEL(linear)(const linear_args * a) {
    FACTOR __attribute__((aligned(64))) x[COLUMNS * DEPTH];
    float __attribute__((aligned(64))) tile[ROWS * WIDTH];
    const int64_t tiles = (a->n + ROWS - 1) / ROWS, panels = (a->n_out + WIDTH - 1) / WIDTH;

    for (int64_t at = 0; at < a->n_in; at += DEPTH * PER_FACTOR) {
        const int64_t values = a->n_in - at < DEPTH * PER_FACTOR ? a->n_in - at : DEPTH * PER_FACTOR, depth = values / PER_FACTOR;
        for (int64_t i = 0; i < tiles * ROWS; i++) {
            const float * row = (const float *) ((const char *) a->x + (size_t) (i < a->n ? i : 0) * a->x_stride) + at;
            KERNEL(spread)(row, 1.0f, values, x + i / ROWS * depth * ROWS + i % ROWS, ROWS);
        }
        for (int64_t p = 0; p < panels; p++) {
            const float *  first = a->w + p * WIDTH * (1 + a->n_in / PER_FACTOR);
            const FACTOR * w     = (const FACTOR *) first + WIDTH * (1 + at / PER_FACTOR);
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t rows  = a->n - t * ROWS < ROWS ? a->n - t * ROWS : ROWS;
                const int64_t width = a->n_out - p * WIDTH < WIDTH ? a->n_out - p * WIDTH : WIDTH;
                float *       out   = a->out + t * ROWS * a->out_stride + p * WIDTH;
                if (rows == ROWS && width == WIDTH) {
                    KERNEL(product)(x + t * ROWS * depth, w, depth, at ? out : first, at ? a->out_stride : 0, out, a->out_stride);
                    continue;
                }
                for (int64_t r = 0; at && r < rows; r++) {
                    memcpy(tile + r * WIDTH, out + r * a->out_stride, sizeof(float) * (size_t) width);
                }
                KERNEL(product)(x + t * ROWS * depth, w, depth, at ? tile : first, at ? WIDTH : 0, tile, WIDTH);
                for (int64_t r = 0; r < rows; r++) {
                    memcpy(out + r * a->out_stride, tile + r * WIDTH, sizeof(float) * (size_t) width);
                }
            }
        }
    }
}

#if !PAIRS
// ---- attention to rows of a cache ----

// Rows lie so far apart that the processor does not foresee the next one; into the second-level cache.
INLINE void KERNEL(fetch)(const char * rows, size_t stride, int64_t n, size_t n_bytes) {
    for (int64_t i = 0; i < n; i++, rows += stride) {
        for (size_t j = 0; j < n_bytes; j += 64) {
            __builtin_prefetch(rows + j, 0, 2);
        }
    }
}

// `n` rows of a cache, *stride bytes apart, as floats, each of `size` values of which those from head_dim on are 0. Rows that are so
// already stay where they are.
INLINE const char * KERNEL(widen)(const char * rows, size_t * stride, bool * is_half, int64_t n, int64_t head_dim, int64_t size,
                                  float * buffer) {
    const bool half = *is_half;
    if (!half && head_dim == size) {
        return rows;
    }
    for (int64_t i = 0; i < n; i++, rows += *stride) {
        float * out = buffer + i * size;
        int64_t j   = 0;
        for (; j + LANES <= head_dim; j += LANES) {
            STORE(out + j, half ? (vf) WIDEN((const ggml_fp16_t *) rows + j) : (vf) LOAD((const float *) rows + j));
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

// s[GROUP][n] in rows of KEYS = q k^T, with q [GROUP][size] and n rows of k, `stride` bytes apart, F16 or F32;
// meanwhile n_bytes of each of as many rows are fetched, `ahead_stride` apart.
INLINE void KERNEL(dots)(const float * q, const char * k, size_t stride, const bool half, int64_t n, int64_t size, float * s,
                         const char * ahead, size_t ahead_stride, size_t n_bytes) {
    for (int64_t i = 0; i < n; i += SUMS, ahead += SUMS * ahead_stride) {
        KERNEL(fetch)(ahead, ahead_stride, SUMS, n_bytes);
        const char * rows[SUMS];
        vf           sum[SUMS][GROUP] = { 0 };
        UNROLL for (int row = 0; row < SUMS; row++) {
            rows[row] = k + (size_t) (i + row < n ? i + row : i) * stride;
        }
        for (int64_t j = 0; j < size; j += LANES) {
            vf x[SUMS];
            UNROLL for (int row = 0; row < SUMS; row++) {
                x[row] = half ? (vf) WIDEN((const ggml_fp16_t *) rows[row] + j) : (vf) LOAD((const float *) rows[row] + j);
            }
            UNROLL for (int r = 0; r < GROUP; r++) {
                const vf z = LOAD(q + r * size + j);
                UNROLL for (int row = 0; row < SUMS; row++) {
                    sum[row][r] += z * x[row];
                }
            }
        }
        UNROLL for (int row = 0; row < SUMS; row++) { // KEYS is a multiple: room for those too many
            const v4f total = TOTALS(sum[row][0], sum[row][1], sum[row][2], sum[row][3]);
            UNROLL for (int r = 0; r < GROUP; r++) {
                s[r * KEYS + i + row] = total[r];
            }
        }
    }
}

// out[GROUP][vectors * LANES] += s v, with s [GROUP][n] in rows of KEYS, n rows of v, `stride` bytes apart, F16 or F32, and out in rows
// of `size`
INLINE void KERNEL(weigh_part)(const float * s, const char * v, size_t stride, const bool half, int64_t n, int64_t size, float * out,
                               const int vectors) {
    vf sum[GROUP][SUMS];
    UNROLL for (int r = 0; r < GROUP; r++) {
        UNROLL for (int c = 0; c < vectors; c++) {
            sum[r][c] = LOAD(out + r * size + c * LANES);
        }
    }
    for (int64_t i = 0; i < n; i++, v += stride) {
        vf x[SUMS];
        UNROLL for (int c = 0; c < vectors; c++) {
            x[c] = half ? (vf) WIDEN((const ggml_fp16_t *) v + c * LANES) : (vf) LOAD((const float *) v + c * LANES);
        }
        UNROLL for (int r = 0; r < GROUP; r++) {
            UNROLL for (int c = 0; c < vectors; c++) {
                sum[r][c] += s[r * KEYS + i] * x[c];
            }
        }
    }
    UNROLL for (int r = 0; r < GROUP; r++) {
        UNROLL for (int c = 0; c < vectors; c++) {
            STORE(out + r * size + c * LANES, sum[r][c]);
        }
    }
}

// The same for whole rows
INLINE void KERNEL(weigh)(const float * s, const char * v, size_t stride, const bool half, int64_t n, int64_t size, float * out) {
    const size_t item = half ? sizeof(ggml_fp16_t) : sizeof(float);
    int64_t      j    = 0;
    for (; j + SUMS * LANES <= size; j += SUMS * LANES) {
        KERNEL(weigh_part)(s, v + (size_t) j * item, stride, half, n, size, out + j, SUMS);
    }
    for (; j < size; j += LANES) {
        KERNEL(weigh_part)(s, v + (size_t) j * item, stride, half, n, size, out + j, 1);
    }
}

// What a query sees of the keys from `key` on: 0, or -inf
INLINE const ggml_fp16_t * KERNEL(mask_of)(const rows_args * a, int64_t query, int64_t key) {
    return (const ggml_fp16_t *) ((const char *) a->mask + (size_t) (query / a->group) * a->mask_stride) + key;
}

// How many of n keys there are up to the last that some query sees
INLINE int64_t KERNEL(n_seen)(const rows_args * a, int64_t key, int64_t n) {
    int64_t seen = 0;
    for (int64_t i = 0; i < a->n && seen < n; i += a->group) {
        const ggml_fp16_t * mask = KERNEL(mask_of)(a, i, key);
        for (int64_t j = n; j > seen; j--) {
            if (mask[j - 1] == 0) {
                seen = j;
            }
        }
    }
    return seen;
}

INLINE void KERNEL(hide)(const rows_args * a, int64_t key, int64_t n, float * s) {
    for (int64_t i = 0; i < a->n; i++) {
        const ggml_fp16_t * mask = KERNEL(mask_of)(a, i, key);
        for (int64_t j = 0; j < n; j++) {
            s[i * KEYS + j] = mask[j] == 0 ? s[i * KEYS + j] : NO_KEY;
        }
    }
}

TARGET static void KERNEL(attend_rows)(const rows_args * a) {
    float __attribute__((aligned(64))) q[QUERIES * MAX_HEAD_DIM], s[QUERIES * KEYS], out[QUERIES * MAX_HEAD_DIM];
    float __attribute__((aligned(64))) buffer[KEYS * MAX_HEAD_DIM]; // of keys, then of values
    float         top[QUERIES], sum[QUERIES];
    const int64_t dim = a->head_dim, size = (dim + LANES - 1) / LANES * LANES;
    const int64_t n_q = (a->n + GROUP - 1) / GROUP * GROUP; // of a head
    const size_t  k_bytes = (a->k_half ? sizeof(ggml_fp16_t) : sizeof(float)) * (size_t) dim;
    const size_t  v_bytes = (a->v_half ? sizeof(ggml_fp16_t) : sizeof(float)) * (size_t) dim;
    const bool    direct  = n_q == GROUP && dim == size; // rows stay as they are: each is read once

    memset(q, 0, sizeof(float) * (size_t) (a->n_heads * n_q * size));
    memset(out, 0, sizeof(float) * (size_t) (a->n_heads * n_q * size));
    for (int64_t i = 0; i < a->n_heads * n_q; i++) {
        top[i] = NO_KEY;
        sum[i] = 0.0f;
    }
    for (int64_t h = 0; h < a->n_heads; h++) {
        for (int64_t i = 0; i < a->n; i++) {
            const float * row = (const float *) ((const char *) a->q + (size_t) (i / a->group) * a->q_stride) + (h * a->group + i % a->group) * dim;
            for (int64_t j = 0; j < dim; j++) {
                q[(h * n_q + i) * size + j] = row[j] * a->scale;
            }
        }
    }
    // Rows lie kilobytes apart, which no processor foresees: while one head's part of some rows is computed, so much of the next ones
    // is fetched. If all heads go over them, the next ones are fetched from the first byte to the last.
    const int64_t step    = a->n_heads > 1 ? ROWS_TOGETHER : KEYS;
    const size_t  k_apart = a->n_heads > 1 ? k_bytes : a->k_stride, v_apart = a->n_heads > 1 ? v_bytes : a->v_stride;
    if (!a->fetched) {
        KERNEL(fetch)(a->k, a->k_stride, a->n_keys < step ? a->n_keys : step, k_bytes * (size_t) a->n_heads);
        KERNEL(fetch)(a->v, a->v_stride, a->n_keys < step ? a->n_keys : step, v_bytes * (size_t) a->n_heads);
    }
    for (int64_t key = 0; key < a->n_keys; key += step) {
        int64_t n = a->n_keys - key < step ? a->n_keys - key : step;
        if (a->mask && (n = KERNEL(n_seen)(a, key, n)) == 0) {
            continue;
        }
        const bool   last   = key + step >= a->n_keys;
        const char * k_next = last ? a->k_then : a->k + (size_t) (key + step) * a->k_stride;
        const char * v_next = last ? a->v_then : a->v + (size_t) (key + step) * a->v_stride;
        for (int64_t h = 0; h < a->n_heads; h++) {
            const char *  k_rows  = a->k + (size_t) key * a->k_stride + (size_t) h * k_bytes;
            const char *  v_rows  = a->v + (size_t) key * a->v_stride + (size_t) h * v_bytes;
            const char *  k_ahead = k_next + (size_t) (h * step) * k_apart, * v_ahead = v_next + (size_t) (h * step) * v_apart;
            float *       s_head = s + h * n_q * KEYS, * out_head = out + h * n_q * size;
            size_t        k_stride = a->k_stride, v_stride = a->v_stride;
            bool          k_half = a->k_half, v_half = a->v_half;
            if (!direct) {
                k_rows = KERNEL(widen)(k_rows, &k_stride, &k_half, n, dim, size, buffer);
            }
            for (int64_t i = 0; i < n_q; i += GROUP) {
                const float * q_rows  = q + (h * n_q + i) * size;
                const size_t  fetched = i == 0 ? k_bytes : 0;
                if (k_half) {
                    KERNEL(dots)(q_rows, k_rows, k_stride, true, n, size, s_head + i * KEYS, k_ahead, k_apart, fetched);
                } else {
                    KERNEL(dots)(q_rows, k_rows, k_stride, false, n, size, s_head + i * KEYS, k_ahead, k_apart, fetched);
                }
            }
            if (a->mask) {
                KERNEL(hide)(a, key, n, s_head);
            }
            for (int64_t i = 0; i < n_q; i++) {
                for (int64_t j = n; j < (n + LANES - 1) / LANES * LANES; j++) {
                    s_head[i * KEYS + j] = NO_KEY;
                }
                KERNEL(softmax_step)(s_head + i * KEYS, n, &top[h * n_q + i], &sum[h * n_q + i], out_head + i * size, size);
            }
            if (!direct) {
                v_rows = KERNEL(widen)(v_rows, &v_stride, &v_half, n, dim, size, buffer);
            }
            for (int64_t at = 0; at < n; at += ROWS_AT_ONCE) {
                const int64_t m = n - at < ROWS_AT_ONCE ? n - at : ROWS_AT_ONCE;
                KERNEL(fetch)(v_ahead + (size_t) at * v_apart, v_apart, m, v_bytes);
                for (int64_t i = 0; i < n_q; i += GROUP) {
                    const char * v = v_rows + (size_t) at * v_stride;
                    if (v_half) {
                        KERNEL(weigh)(s_head + i * KEYS + at, v, v_stride, true, m, size, out_head + i * size);
                    } else {
                        KERNEL(weigh)(s_head + i * KEYS + at, v, v_stride, false, m, size, out_head + i * size);
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
                part[1] = sum[from];
                memcpy(part + 2, out + from * size, sizeof(float) * (size_t) dim);
                continue;
            }
            float *     row    = (float *) ((char *) a->out + (size_t) (i / a->group) * a->out_stride) + (h * a->group + i % a->group) * dim;
            const float factor = 1.0f / sum[from];
            for (int64_t j = 0; j < dim; j++) {
                row[j] = out[from * size + j] * factor;
            }
        }
    }
}

#endif

#undef FACTOR
#undef PER_FACTOR
#undef MULTIPLY_ADD
#undef vf
#undef vi
#undef vw
#undef vu
#undef LOAD
#undef STORE
#undef INLINE
#undef WIDTH
#undef TILES
#undef SUMS
#undef KERNEL
#undef TARGET
#undef LANES
#undef ROWS
#undef VECTORS
#undef VMAX
#undef WIDEN
#undef TOTALS
#undef PAIRS
#undef NARROW
