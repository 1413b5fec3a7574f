// Products with Q4_K, Q5_K and Q6_K for several columns by AMX; a few columns by AVX512-VNNI, see vnni.c.
//
// Each 32 (Q4_K, Q5_K) or 16 (Q6_K) weights have a scale of their own, 6 or 8 bits, so that a sum of 64 products, as a
// tile gives it, is worth nothing. Sums of 32 or 16 would leave half or three quarters of each instruction unused, and
// would all be fetched from tiles and scaled. Instead weights are multiplied by their scales when they are unpacked:
// at most 14 bits with the sign, in two planes of 8 bits, 256 high + low, of which high is signed. Then a block of 256
// weights needs as many instructions as sums of 32, and only two sums are fetched. Whole numbers are exact throughout.
// The mins of Q4_K and Q5_K are multiplied by sums of each 32 of a column's values, pairs of 16 bits, by AVX512-VNNI.
#include "kernels/amx_rows.h"
#include "kernels/k_panels.h"
#include "kernels/q8_column.h"

enum {
    PANEL        = TILE,            // rows
    PANELS       = 2,               // that are multiplied together
    STEPS        = QUANT_BLOCK / 4, // fours of weights
    TILE_STEPS   = TILE,            // in a tile
    HIGH         = 256,             // what the high plane counts
    TASK_COLUMNS = 256,
    FEW          = 8,               // columns for which unpacking to planes is not worth it
};

// ---- weights to planes --------------------------------------------------------------------------------------------

// A block of each of 16 rows
typedef struct panel {
    uint32_t planes[2][STEPS][TILE]; // high, low; four weights of each row, as the columns' values come
    float    d[TILE];
    float    dmin[TILE];             // these not of Q6_K
    uint32_t mins[4][TILE];          // two of 16 bits: of 32 weights each, from the first to the last
} __attribute__((aligned(64))) panel;

#include "kernels/panels.h"

// A scale of each row, 8 bits: for the even weights and for the odd ones; and what is less for all
typedef struct factors {
    vw even, odd;
    vs zero;
} factors;

INLINE factors factors_of(vw scale, const int zero) { // 32 bits
    const vw twice = (scale & 0xff) | (scale & 0xff) << 16;
    return (factors) { twice, twice << 8, (vs) ((scale & 0xffff) | scale << 16) * (int16_t) zero };
}

// Four weights of each row less a zero point, times its scale
INLINE void store_step(panel * p, int step, vw w, const factors * f) {
    const vw even = (vw) (multiply_bytes(w, f->even) - f->zero), odd = (vw) (multiply_bytes(w, f->odd) - f->zero);
    const vw high = (even >> 8 & 0x00ff00ff) | (odd & 0xff00ff00), low = (even & 0x00ff00ff) | (odd << 8 & 0xff00ff00);
    memcpy(p->planes[0][step], &high, sizeof(high));
    memcpy(p->planes[1][step], &low, sizeof(low));
}

// Blocks of Q4_K or, `five`, of Q5_K
INLINE void unpack_with_mins(const bool five, const char * const * rows, panel * p) {
    const size_t at = five ? offsetof(q5_k_block, q) : offsetof(q4_k_block, q);
    ggml_fp16_t  d[TILE], dmin[TILE];
    for (int i = 0; i < TILE; i++) {
        const q4_k_block * block = (const void *) rows[i]; // Q5_K: the same up to the scales
        d[i]    = block->d;
        dmin[i] = block->dmin;
    }
    STORE(p->d, widen(d));
    STORE(p->dmin, widen(dmin));
    vw first[4];
    transpose(rows, 0, first);
    const k_head head = k_head_of(first);
    UNROLL for (int j = 0; j < 4; j++) {
        const vw mins = pair_at(head.mins, j);
        memcpy(p->mins[j], &mins, sizeof(mins));
    }
    vw high[2][4];
    if (five) {
        transpose(rows, offsetof(q5_k_block, high), high[0]);
        transpose(rows, offsetof(q5_k_block, high) + 16, high[1]);
    }
    UNROLL for (int j = 0; j < 8; j += 2) { // 32 bytes: low halves for one scale, high halves for the next
        const factors scales[2] = { factors_of(byte_at(head.scales, j), 0),
                                    factors_of(byte_at(head.scales, j + 1), 0) };
        UNROLL for (int half = 0; half < 2; half++) {
            vw w[4];
            transpose(rows, at + (size_t) (16 * j + 16 * half), w);
            UNROLL for (int i = 0; i < 4; i++) {
                UNROLL for (int k = j; k < j + 2; k++) {
                    const vw q = five ? q5_k_weights(w[i], high[half][i], k) : q4_k_weights(w[i], k);
                    store_step(p, 8 * PLACE[k] + 4 * half + i, q, &scales[k - j]);
                }
            }
        }
    }
}

static void unpack_q4_k(const char * const * rows, panel * p) {
    unpack_with_mins(false, rows, p);
}

static void unpack_q5_k(const char * const * rows, panel * p) {
    unpack_with_mins(true, rows, p);
}

static void unpack_q6_k(const char * const * rows, panel * p) {
    ggml_fp16_t d[TILE];
    for (int i = 0; i < TILE; i++) {
        d[i] = ((const q6_k_block *) (const void *) rows[i])->d;
    }
    STORE(p->d, widen(d));
    vw all[4];
    transpose(rows, offsetof(q6_k_block, scales), all);
    UNROLL for (int half = 0; half < 2; half++) {
        UNROLL for (int j = 0; j < 2; j++) { // 16 weights of each of four groups
            const size_t at = offsetof(q6_k_block, low) + (size_t) (64 * half + 16 * j);
            vw           a[4], b[4], high[4];
            factors      scales[4];
            transpose(rows, at, a);
            transpose(rows, at + 32, b);
            transpose(rows, offsetof(q6_k_block, high) + (size_t) (32 * half + 16 * j), high);
            UNROLL for (int k = 0; k < 4; k++) {
                const int scale = 8 * half + 2 * k + j;
                const vi  one   = (vi) (all[scale / 4] << (24 - 8 * (scale % 4))) >> 24;
                scales[k] = factors_of((vw) one, 32);
            }
            UNROLL for (int i = 0; i < 4; i++) {
                UNROLL for (int k = 0; k < 4; k++) {
                    const vw w = q6_k_weights(a[i], b[i], high[i], k);
                    store_step(p, 8 * PLACE[4 * half + k] + 4 * j + i, w, &scales[k]);
                }
            }
        }
    }
}

// ---- products -----------------------------------------------------------------------------------------------------

// Sums in 0 to 3 for `n` columns; columns in 4, weights in 5 to 7
#define COLUMN_TILES(n)                                     \
    { .palette   = 1,                                       \
      .row_bytes = { ROW, ROW, ROW, ROW, ROW, ROW, ROW, ROW }, \
      .rows      = { (n), (n), (n), (n), (n), TILE, TILE, TILE } }
static const amx_tiles tiles_of[TILE] = { // for that many columns plus one
    ONE_TO_16(COLUMN_TILES),
};

static int64_t column_tiles(int64_t n_columns) {
    return (n_columns + TILE - 1) / TILE;
}

// Adds the products of a tile of columns, `stride` bytes apart, and a block of each panel, 64 weights from step i on
INLINE void multiply_step(const panel * p, const q8_column * x, int64_t stride, int i) {
    AMX_LOAD(4, x->q + 4 * i, stride);
    AMX_LOAD(5, p[0].planes[0][i], ROW);
    AMX_MULTIPLY_INT8(0, 4, 5);
    AMX_LOAD(6, p[0].planes[1][i], ROW);
    AMX_MULTIPLY_UINT8(1, 4, 6);
    AMX_LOAD(7, p[1].planes[0][i], ROW);
    AMX_MULTIPLY_INT8(2, 4, 7);
    AMX_LOAD(5, p[1].planes[1][i], ROW);
    AMX_MULTIPLY_UINT8(3, 4, 5);
}

// What a block's sums are worth: vectors that stay in registers for all columns
typedef struct worth {
    vf d[PANELS], dmin[PANELS];
    vw mins[PANELS][4];
} worth;

INLINE worth worth_of(const panel * p, const bool with_mins) {
    worth w = { 0 };
    UNROLL for (int k = 0; k < PANELS; k++) {
        w.d[k] = LOAD(p[k].d);
        if (with_mins) {
            w.dmin[k] = LOAD(p[k].dmin);
            memcpy(w.mins[k], p[k].mins, sizeof(w.mins[k]));
        }
    }
    return w;
}

// out += what the sums of column c of a tile are worth
INLINE void add_column(const worth * w, const bool with_mins, const q8_column * column, const tile_sums * sums,
                       int64_t c, float * out) {
    UNROLL for (int k = 0; k < PANELS; k++) {
        vi high, low;
        memcpy(&high, sums[2 * k][c], sizeof(high));
        memcpy(&low, sums[2 * k + 1][c], sizeof(low));
        vf block = __builtin_convertvector(HIGH * high + low, vf) * w->d[k];
        if (with_mins) {
            vi less = { 0 };
            UNROLL for (int j = 0; j < 4; j++) {
                uint32_t two;
                memcpy(&two, &column->sums32[2 * j], sizeof(two));
                less = add_products(less, bytes(two), w->mins[k][j]);
            }
            block -= __builtin_convertvector(less, vf) * w->dmin[k];
        }
        STORE(out + TILE * k, LOAD(out + TILE * k) + block * column->d);
    }
}

// out[c] += a block of each panel times column c; columns lie n blocks apart. Meanwhile a piece of memory is fetched
// for each tile of columns.
//
// The unit of the tiles and those of vectors work at the same time, but the processor looks only some hundreds of
// operations ahead. So the sums of the tile before are added in four parts, one after each step's products. The last
// tile begins among the columns of the one before it.
INLINE void multiply_block(const panel * p, const bool with_mins, const q8_column * x, int64_t n, int64_t n_columns,
                           const char * fetched, int64_t piece, float (*out)[PANELS * PANEL]) {
    const int64_t n_tiles = column_tiles(n_columns), full = n_columns < TILE ? n_columns : TILE;
    const worth   w = worth_of(p, with_mins);
    tile_sums     sums[2][2 * PANELS] __attribute__((aligned(64))); // [2 k + plane] of panel k
    int64_t       before = 0, first = TILE; // the tile before begins there, and its columns are added from `first` on
    for (int64_t t = 0; t <= n_tiles; t++) {
        const int64_t begin = t * TILE + full > n_columns ? n_columns - full : t * TILE;
        tile_sums *   of    = sums[(t + 1) % 2];
        if (t < n_tiles) {
            fetch(fetched + t * piece, piece);
            AMX_ZERO(0);
            AMX_ZERO(1);
            AMX_ZERO(2);
            AMX_ZERO(3);
        }
        for (int i = 0; i < STEPS; i += TILE_STEPS) {
            if (t < n_tiles) {
                multiply_step(p, x + begin * n, n * (int64_t) sizeof(q8_column), i);
            }
            const int64_t end = i / 4 + 4 < full ? i / 4 + 4 : full;
            for (; first < end; first++) {
                const int64_t c = before + first;
                add_column(&w, with_mins, x + c * n, of, first, out[c]);
            }
        }
        if (t < n_tiles) {
            tile_sums * to = sums[t % 2];
            AMX_STORE(0, to[0], ROW);
            AMX_STORE(1, to[1], ROW);
            AMX_STORE(2, to[2], ROW);
            AMX_STORE(3, to[3], ROW);
        }
        before = begin;
        first  = t * TILE - begin;
    }
}

static void multiply_with_mins(const panel * p, const q8_column * x, int64_t n, int64_t n_columns,
                               const char * fetched, int64_t piece, float (*sums)[PANELS * PANEL]) {
    multiply_block(p, true, x, n, n_columns, fetched, piece, sums);
}

static void multiply_q6_k(const panel * p, const q8_column * x, int64_t n, int64_t n_columns, const char * fetched,
                          int64_t piece, float (*sums)[PANELS * PANEL]) {
    multiply_block(p, false, x, n, n_columns, fetched, piece, sums);
}

static const form Q4_K = { sizeof(q4_k_block), unpack_q4_k, multiply_with_mins };
static const form Q5_K = { sizeof(q5_k_block), unpack_q5_k, multiply_with_mins };
static const form Q6_K = { sizeof(q6_k_block), unpack_q6_k, multiply_q6_k };

static void multiply_columns(const struct ggml_tensor * w, const void * x, int64_t n_columns, int64_t first,
                             int64_t then, float * out) {
    const form * f = w->type == GGML_TYPE_Q4_K ? &Q4_K : w->type == GGML_TYPE_Q5_K ? &Q5_K : &Q6_K;
    AMX_CONFIGURE(&tiles_of[(n_columns < TILE ? n_columns : TILE) - 1]);
    multiply_panels(f, w, x, n_columns, column_tiles(n_columns), first, then, out);
    AMX_RELEASE();
}

// ---- few columns --------------------------------------------------------------------------------------------------

#ifdef MLLAMA_AMX_EMULATED
const cpu_quantized cpu_quantized_amx = {
    .quantize         = amx_emulated_quantize,
    .multiply_column  = amx_emulated_multiply_column,
    .multiply_columns = multiply_columns,
#else
COLUMNS_OF(cpu_quantized_vnni)

static void multiply(const struct ggml_tensor * w, const void * x, int64_t n_columns, int64_t first, int64_t then,
                     float * out) {
    if (n_columns < FEW) {
        cpu_quantized_vnni.multiply_columns(w, x, n_columns, first, then, out);
    } else {
        multiply_columns(w, x, n_columns, first, then, out);
    }
}

const cpu_quantized cpu_quantized_amx = {
    .quantize         = quantize,
    .multiply_column  = multiply_column,
    .multiply_columns = multiply,
#endif
    .block_size       = sizeof(q8_column),
    .rows_alone       = 64,
    .rows             = PANELS * PANEL,
    .columns          = TASK_COLUMNS,
};
