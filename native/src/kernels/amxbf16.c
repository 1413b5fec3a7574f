// Products of BF16 with AMX; the rest is F32. A tile of 16 rows of x or Q is multiplied by a tile of 16 columns of a
// panel: [n / 2][width] pairs are tiles already, whose rows are a panel's row apart.
#include "kernels/amx.h"

#include "kernels/simd_bf16.h"

enum {
    WIDTH      = 32,              // of a panel: two tiles
    STEP       = TILE,            // pairs of a row in a tile
    TILE_SIZE  = TILE * STEP,     // pairs
    ROW        = 64,              // bytes of a tile's row
    PANEL_ROW  = WIDTH * (int) sizeof(factor), // bytes
    ROWS       = 192,             // of x in one task: weights come from far away
    DEPTH      = 640,             // pairs of x that are packed together, for the second-level cache
    NEAR_DEPTH = 320,             // pairs of a panel that stay in the first-level cache while all rows pass by
    LINE       = 64,
};
_Static_assert(QUERIES % TILE == 0 && QUERIES <= 3 * TILE, "three tiles of queries");
_Static_assert(KEYS % WIDTH == 0 && (int) WIDTH <= (int) MAX_WIDTH, "whole panels");
_Static_assert(ROWS % (2 * TILE) == 0 && DEPTH % STEP == 0 && NEAR_DEPTH % STEP == 0, "whole tiles");

// ---- factors ------------------------------------------------------------------------------------------------------

// scale * from[0 .. n - 1] as pairs: 16 to a row of each of the tiles from `to` on. A row that n does not fill ends
// with 0.
INLINE void pack_row(const float * from, float scale, int64_t n, factor * to) {
    for (; n >= 2 * LANES; n -= 2 * LANES, from += 2 * LANES, to += TILE_SIZE) {
        narrow_two(LOAD(from) * scale, LOAD(from + LANES) * scale, to);
    }
    if (n > 0) {
        float __attribute__((aligned(64))) some[2 * LANES] = { 0 };
        memcpy(some, from, sizeof(float) * (size_t) n);
        narrow_two(LOAD(some) * scale, LOAD(some + LANES) * scale, to);
    }
}

// ---- memory -------------------------------------------------------------------------------------------------------

// What will be read next: to the second-level cache, a part with each step. And rows of sums that will be written.
typedef struct ahead {
    const char *  at;
    int64_t       lines;  // with each step
    const float * out;    // NULL: none
    int64_t       stride; // values
    int64_t       rows;   // two with each step
} ahead;

INLINE void fetch(ahead * a) {
    for (int64_t i = 0; i < a->lines; i++, a->at += LINE) {
        __builtin_prefetch(a->at, 0, 2);
    }
    for (int i = 0; a->out && i < 2 && a->rows > 0; i++, a->rows--, a->out += a->stride) {
        __builtin_prefetch(a->out, 1);
        __builtin_prefetch((const char *) a->out + LINE, 1);
    }
}

// `size` bytes at `at` in so many steps
INLINE ahead fetch_in(const void * at, int64_t size, int64_t steps) {
    return (ahead) { .at = at, .lines = (size / LINE + steps - 1) / steps };
}

// ---- attention ----------------------------------------------------------------------------------------------------

// Sums in 0 to 2, one for each tile of queries; rows in 3 and 4, columns in 6. 5 and 7 are rows and columns of the last
// `n` pairs of a head.
#define ATTEND_TILES(n)                                               \
    { .palette   = 1,                                                 \
      .row_bytes = { ROW, ROW, ROW, ROW, ROW, 4 * (n), ROW, ROW },    \
      .rows      = { TILE, TILE, TILE, TILE, TILE, TILE, TILE, (n) } }
// By the pairs of a head beyond whole tiles, a multiple of 4; none: any number will do
static const amx_tiles attend_tiles[4] = { ATTEND_TILES(16), ATTEND_TILES(4), ATTEND_TILES(8), ATTEND_TILES(12) };

enum { Q_STEPS = MAX_HEAD_DIM / 2 / STEP };

// Scores of 16 keys: s[query] = bias + q k^T, for `tiles` tiles of queries
INLINE void score(factor (*q)[Q_STEPS][TILE_SIZE], const float * bias, const factor * keys, int64_t depth, int tiles,
                  float * s, ahead * next) {
    AMX_LOAD(0, bias, 0);
    if (tiles > 1) {
        AMX_LOAD(1, bias, 0);
    }
    if (tiles > 2) {
        AMX_LOAD(2, bias, 0);
    }
    int64_t i = 0;
    for (; i < depth / STEP; i++, keys += STEP * WIDTH) {
        AMX_LOAD(6, keys, PANEL_ROW);
        AMX_LOAD(3, q[0][i], ROW);
        AMX_MULTIPLY_BF16(0, 3, 6);
        if (tiles > 1) {
            AMX_LOAD(4, q[1][i], ROW);
            AMX_MULTIPLY_BF16(1, 4, 6);
        }
        if (tiles > 2) {
            AMX_LOAD(3, q[2][i], ROW);
            AMX_MULTIPLY_BF16(2, 3, 6);
        }
        fetch(next);
    }
    if (depth % STEP) {
        AMX_LOAD(7, keys, PANEL_ROW);
        AMX_LOAD(5, q[0][i], ROW);
        AMX_MULTIPLY_BF16(0, 5, 7);
        if (tiles > 1) {
            AMX_LOAD(5, q[1][i], ROW);
            AMX_MULTIPLY_BF16(1, 5, 7);
        }
        if (tiles > 2) {
            AMX_LOAD(5, q[2][i], ROW);
            AMX_MULTIPLY_BF16(2, 5, 7);
        }
        fetch(next);
    }
    const int64_t row = sizeof(float) * KEYS;
    AMX_STORE(0, s, row);
    if (tiles > 1) {
        AMX_STORE(1, s + TILE * KEYS, row);
    }
    if (tiles > 2) {
        AMX_STORE(2, s + 2 * TILE * KEYS, row);
    }
}

// 16 columns of out += weights v, for n pairs of keys; rows of v and out hold n_out pairs or values
INLINE void add_values(const factor * weights, const factor * v, int64_t n, int64_t n_out, int tiles, float * out,
                       ahead * next) {
    const int64_t row = (int64_t) sizeof(float) * n_out, keys = sizeof(factor) * KEYS;
    AMX_LOAD(0, out, row);
    if (tiles > 1) {
        AMX_LOAD(1, out + TILE * n_out, row);
    }
    if (tiles > 2) {
        AMX_LOAD(2, out + 2 * TILE * n_out, row);
    }
    for (int64_t i = 0; i < n; i += STEP) {
        AMX_LOAD(6, v + i * n_out, row);
        AMX_LOAD(3, weights + i, keys);
        AMX_MULTIPLY_BF16(0, 3, 6);
        if (tiles > 1) {
            AMX_LOAD(4, weights + TILE * KEYS + i, keys);
            AMX_MULTIPLY_BF16(1, 4, 6);
        }
        if (tiles > 2) {
            AMX_LOAD(3, weights + 2 * TILE * KEYS + i, keys);
            AMX_MULTIPLY_BF16(2, 3, 6);
        }
        fetch(next);
    }
    AMX_STORE(0, out, row);
    if (tiles > 1) {
        AMX_STORE(1, out + TILE * n_out, row);
    }
    if (tiles > 2) {
        AMX_STORE(2, out + 2 * TILE * n_out, row);
    }
}

static void attend(const attend_args * a) {
    float __attribute__((aligned(64))) s[QUERIES * KEYS], out[QUERIES * MAX_HEAD_DIM];
    factor __attribute__((aligned(64))) q[QUERIES / TILE][Q_STEPS][TILE_SIZE];
    float         top[QUERIES];
    vf            sum[QUERIES];
    const int64_t dim = a->head_dim, depth = dim / 2, n_out = round_up(dim, LANES);
    const int     tiles = (int) ((a->n + TILE - 1) / TILE), rows = tiles * TILE;

    memset(q, 0, sizeof(q[0]) * (size_t) tiles);
    memset(out, 0, sizeof(float) * (size_t) (rows * n_out));
    for (int64_t i = 0; i < rows; i++) {
        top[i] = NO_KEY;
        sum[i] = (vf) { 0 };
    }
    for (int64_t i = 0; i < a->n; i++) {
        const float * row = (const float *) ((const char *) a->q + (size_t) i * a->q_stride);
        pack_row(row, a->scale, dim, q[i / TILE][0] + i % TILE * STEP);
    }
    AMX_CONFIGURE(&attend_tiles[depth % STEP / 4]);
    for (int64_t key = 0; key < a->n_keys; key += KEYS) {
        const int64_t left = a->n_keys - key, n = left < KEYS ? left : KEYS, then = left < 2 * KEYS ? left - n : KEYS;
        // The next values are fetched with tiles, and the next keys with weights.
        const float *  k_then = a->k + (key + n) * (1 + depth), * v = a->v + key / 2 * n_out;
        const int64_t  slots  = n / TILE * ((depth + STEP - 1) / STEP) + n_out / TILE * (n / 2 / STEP);
        ahead          values = fetch_in(v + n / 2 * n_out, (int64_t) sizeof(factor) * then / 2 * n_out, slots);
        ahead          keys   = fetch_in(k_then, (int64_t) sizeof(float) * then * (1 + depth), rows);
        for (int64_t j = 0; j < n; j += WIDTH) {
            const float *  panel = a->k + (key + j) * (1 + depth);
            const factor * pairs = (const factor *) (panel + WIDTH);
            score(q, panel, pairs, depth, tiles, s + j, &values);
            score(q, panel + TILE, pairs + TILE, depth, tiles, s + j + TILE, &values);
        }
        softmax_tops(s, rows, n, top, sum, out, n_out);
        for (int64_t i = 0; i < rows; i++) {
            softmax_weights(s + i * KEYS, 1, n, top + i, sum + i);
            fetch(&keys);
        }
        for (int64_t j = 0; j < n_out; j += TILE) {
            add_values((const factor *) s, (const factor *) v + j, n / 2, n_out, tiles, out + j, &values);
        }
    }
    AMX_RELEASE();
    for (int64_t i = 0; i < a->n; i++) {
        float *     row   = (float *) ((char *) a->out + (size_t) i * a->out_stride);
        const float share = 1.0f / total(sum[i]);
        for (int64_t j = 0; j < dim; j++) {
            row[j] = out[i * n_out + j] * share;
        }
    }
}

// ---- linear layers ------------------------------------------------------------------------------------------------

// Sums in 0 and 1 (the first 16 rows), 2 and 3; rows in 4 and 5, columns in 6 and 7: of `n` pairs
#define LINEAR_TILES(n)                                                                    \
    { .palette   = 1,                                                                      \
      .row_bytes = { ROW, ROW, ROW, ROW, 4 * (n), 4 * (n), ROW, ROW },                     \
      .rows      = { TILE, TILE, TILE, TILE, TILE, TILE, (n), (n) } }
static const amx_tiles linear_tiles[STEP] = { // of that many pairs plus one
    ONE_TO_16(LINEAR_TILES),
};

// to[16 or, with `both`, 32 rows][WIDTH] = first + x w for some steps of a panel. x: tiles of the first rows; those of
// the others are `then` pairs further on. Strides are bytes; first_stride 0: one row for all.
INLINE void multiply(const factor * x, int64_t then, const bool both, const factor * w, int64_t steps,
                     const float * first, int64_t first_stride, float * to, int64_t stride, ahead * next) {
    const char * from = (const char *) first;
    char *       out  = (char *) to;
    AMX_LOAD(0, from, first_stride);
    AMX_LOAD(1, from + ROW, first_stride);
    if (both) {
        AMX_LOAD(2, from + TILE * first_stride, first_stride);
        AMX_LOAD(3, from + TILE * first_stride + ROW, first_stride);
    }
    for (int64_t i = 0; i < steps; i++, x += TILE_SIZE, w += STEP * WIDTH) {
        AMX_LOAD(4, x, ROW);
        AMX_LOAD(6, w, PANEL_ROW);
        AMX_MULTIPLY_BF16(0, 4, 6);
        AMX_LOAD(7, w + TILE, PANEL_ROW);
        AMX_MULTIPLY_BF16(1, 4, 7);
        if (both) {
            AMX_LOAD(5, x + then, ROW);
            AMX_MULTIPLY_BF16(2, 5, 6);
            AMX_MULTIPLY_BF16(3, 5, 7);
        }
        fetch(next);
    }
    AMX_STORE(0, out, stride);
    AMX_STORE(1, out + ROW, stride);
    if (both) {
        AMX_STORE(2, out + TILE * stride, stride);
        AMX_STORE(3, out + TILE * stride + ROW, stride);
    }
}

// to[i][j] = from[i][j]; strides are values
INLINE void copy(const float * from, int64_t from_stride, int64_t rows, int64_t width, float * to, int64_t stride) {
    for (int64_t i = 0; i < rows; i++) {
        memcpy(to + i * stride, from + i * from_stride, sizeof(float) * (size_t) width);
    }
}

// One panel: a->n rows of out, `width` columns, = first + x w or, if `first` is NULL, out + x w, for so many pairs
// of x, in tiles [..][steps]. Sums wait in the nearest caches for the last pass; those that fill no pair of tiles are
// copied. Meanwhile the weights at `next` are fetched, if there is another panel.
static void multiply_panel(const linear_args * a, const factor * x, int64_t pairs, const factor * w,
                           const float * first, int64_t width, float * out, const char * next) {
    float __attribute__((aligned(64))) sums[ROWS][WIDTH];
    const int64_t steps = (pairs + STEP - 1) / STEP, tiles = (a->n + TILE - 1) / TILE;
    const int64_t passes = (steps * STEP + NEAR_DEPTH - 1) / NEAR_DEPTH, stride = a->out_stride;
    ahead         then   = fetch_in(next, next ? PANEL_ROW * pairs : 0, (tiles + 1) / 2 * steps);
    then.stride = stride;
    for (int64_t pass = 0; pass < passes; pass++) {
        const int64_t  at      = steps * pass / passes, end = steps * (pass + 1) / passes;
        const bool     last    = pass + 1 == passes;
        const factor * columns = w + at * STEP * WIDTH;
        for (int64_t t = 0; t < tiles; t += 2) {
            const bool     both  = t + 1 < tiles;
            const int64_t  left  = a->n - t * TILE, rows = left < 2 * TILE ? left : 2 * TILE;
            const bool     whole = width == WIDTH && rows % TILE == 0;
            const factor * in    = x + (t * steps + at) * TILE_SIZE;
            float *        near  = sums[t * TILE], * far = out + t * TILE * stride, * to = last && whole ? far : near;
            const float *  from  = near;
            int64_t        apart = PANEL_ROW, to_apart = to == far ? (int64_t) sizeof(float) * stride : PANEL_ROW;
            if (pass == 0) {
                if (first) {
                    from = first, apart = 0;
                } else if (whole) {
                    from = far, apart = (int64_t) sizeof(float) * stride;
                } else {
                    copy(far, stride, rows, width, near, WIDTH);
                }
            }
            then.out = NULL;
            if (left > rows && (last || (pass == 0 && !first))) { // the next rows come to their turn
                then.out = far + rows * stride, then.rows = left - rows < 2 * TILE ? left - rows : 2 * TILE;
            } else if (last && next) { // the first ones of the next panel
                then.out = out + WIDTH, then.rows = a->n < 2 * TILE ? a->n : 2 * TILE;
            }
            if (both) {
                multiply(in, steps * TILE_SIZE, true, columns, end - at, from, apart, to, to_apart, &then);
            } else {
                multiply(in, 0, false, columns, end - at, from, apart, to, to_apart, &then);
            }
            if (last && !whole) {
                copy(near, WIDTH, rows, width, far, stride);
            }
        }
    }
}

// Rows of x times whole panels of weights. The sums of a panel go to `out` once for each DEPTH of x.
static void linear(const linear_args * a) {
    factor __attribute__((aligned(64))) x[ROWS * DEPTH];
    const int64_t pairs = a->n_in / 2, tiles = (a->n + TILE - 1) / TILE, panels = (a->n_out + WIDTH - 1) / WIDTH;

    for (int64_t at = 0, depth; at < pairs; at += depth) {
        const int64_t left = pairs - at, whole = left < DEPTH ? left / STEP * STEP : DEPTH;
        depth = whole ? whole : left; // at last what fills no tile
        const int64_t steps = (depth + STEP - 1) / STEP;
        for (int64_t i = 0; i < tiles * TILE; i++) { // the first row again for those that do not exist
            const float * row = (const float *) ((const char *) a->x + (size_t) (i < a->n ? i : 0) * a->x_stride);
            pack_row(row + 2 * at, 1.0f, 2 * depth, x + i / TILE * steps * TILE_SIZE + i % TILE * STEP);
        }
        AMX_CONFIGURE(&linear_tiles[(whole ? STEP : depth) - 1]);
        for (int64_t p = 0; p < panels; p++) {
            const int64_t  size  = WIDTH * (1 + pairs);
            const float *  first = a->w + p * size;
            const factor * w     = (const factor *) first + WIDTH * (1 + at);
            const int64_t  width = a->n_out - p * WIDTH < WIDTH ? a->n_out - p * WIDTH : WIDTH;
            multiply_panel(a, x, depth, w, at ? NULL : first, width, a->out + p * WIDTH,
                           p + 1 < panels ? (const char *) (w + size) : NULL);
        }
    }
    AMX_RELEASE();
}

const cpu_bf16 cpu_bf16_amx = {
    .lanes   = LANES,
    .width   = WIDTH,
    .columns = ROWS,
    .attend  = attend,
    .linear  = linear,
};
