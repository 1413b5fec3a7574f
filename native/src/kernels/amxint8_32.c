// Products with Q8_0 and Q4_0 for several columns by AMX; a few columns by AVX512-VNNI, see vnni_32.c.
//
// Each 32 weights, and each 32 values of a column, have a factor of their own, in floats. So a sum ends after 32
// products: half of each instruction is unused, and all sums are fetched from tiles, converted and scaled by vectors.
// That happens while the tiles of the next four groups are multiplied.
#include "kernels/amx_rows.h"
#include "kernels/q8_groups.h"

typedef q8_groups q8_column;

enum {
    PANEL        = TILE,            // rows
    PANELS       = 2,               // that are multiplied together
    STEPS        = QUANT_BLOCK / 4, // fours of weights
    GROUP_STEPS  = SMALL_BLOCK / 4, // in a tile of weights
    PART         = 4,               // groups whose sums are added together
    TASK_COLUMNS = 256,
    FEW          = 8,               // columns that tiles are not worth
};
_Static_assert(PART == 4 && GROUPS % PART == 0, "a part has two times two groups, and a tile four times four columns");

typedef int8_t vb __attribute__((vector_size(64)));

// 256 weights of each of 16 rows. Weight i is d[i / 32] * w[i].
typedef struct panel {
    uint32_t w[STEPS][TILE]; // four weights of each row, as the columns' values come
    float    d[GROUPS][TILE];
} __attribute__((aligned(64))) panel;

#include "kernels/panels.h"

// ---- weights to lanes ---------------------------------------------------------------------------------------------

INLINE void store_step(panel * p, int step, vw w) {
    memcpy(p->w[step], &w, sizeof(w));
}

// The factors of blocks of so many bytes
INLINE void unpack_factors(const char * const * rows, size_t size, panel * p) {
    UNROLL for (int j = 0; j < GROUPS; j++) {
        ggml_fp16_t d[TILE];
        for (int i = 0; i < TILE; i++) {
            memcpy(&d[i], rows[i] + (size_t) j * size, sizeof(d[i]));
        }
        STORE(p->d[j], widen(d));
    }
}

static void unpack_q8_0(const char * const * rows, panel * p) {
    unpack_factors(rows, sizeof(q8_0_block), p);
    UNROLL for (int j = 0; j < 2 * GROUPS; j++) { // 16 weights each
        vw w[4];
        transpose(rows, (size_t) (j / 2) * sizeof(q8_0_block) + offsetof(q8_0_block, q) + (size_t) (j % 2 * 16), w);
        UNROLL for (int i = 0; i < 4; i++) {
            store_step(p, 4 * j + i, w[i]);
        }
    }
}

static void unpack_q4_0(const char * const * rows, panel * p) {
    const vw low = (vw) { 0 } + 0x0f0f0f0f;
    unpack_factors(rows, sizeof(q4_0_block), p);
    UNROLL for (int j = 0; j < GROUPS; j++) { // 16 bytes each
        vw w[4];
        transpose(rows, (size_t) j * sizeof(q4_0_block) + offsetof(q4_0_block, q), w);
        UNROLL for (int i = 0; i < 4; i++) {
            store_step(p, GROUP_STEPS * j + i, (vw) ((vb) (w[i] & low) - 8));
            store_step(p, GROUP_STEPS * j + 4 + i, (vw) ((vb) (w[i] >> 4 & low) - 8));
        }
    }
}

// ---- products -----------------------------------------------------------------------------------------------------

// Sums in 0 to 3 for `n` columns; 32 values of columns in 4 and 5, weights in 6 and 7
#define COLUMN_TILES(n)                                                              \
    { .palette   = 1,                                                                \
      .row_bytes = { ROW, ROW, ROW, ROW, SMALL_BLOCK, SMALL_BLOCK, ROW, ROW },       \
      .rows      = { (n), (n), (n), (n), (n), (n), GROUP_STEPS, GROUP_STEPS } }
static const amx_tiles tiles_of[TILE] = { // for that many columns plus one
    ONE_TO_16(COLUMN_TILES),
};

static int64_t parts_of(int64_t n_columns) {
    return (n_columns + TILE - 1) / TILE * (GROUPS / PART);
}

// The products of a group of a tile of columns, `stride` bytes apart: an even group's sums go to 0 and 1, an odd one's
// to 2 and 3.
INLINE void multiply_even(const panel * p, const q8_column * x, int64_t stride, int group) {
    AMX_ZERO(0);
    AMX_ZERO(1);
    AMX_LOAD(4, x->q + SMALL_BLOCK * group, stride);
    AMX_LOAD(6, p[0].w[GROUP_STEPS * group], ROW);
    AMX_MULTIPLY_INT8(0, 4, 6);
    AMX_LOAD(7, p[1].w[GROUP_STEPS * group], ROW);
    AMX_MULTIPLY_INT8(1, 4, 7);
}

INLINE void multiply_odd(const panel * p, const q8_column * x, int64_t stride, int group) {
    AMX_ZERO(2);
    AMX_ZERO(3);
    AMX_LOAD(5, x->q + SMALL_BLOCK * group, stride);
    AMX_LOAD(6, p[0].w[GROUP_STEPS * group], ROW);
    AMX_MULTIPLY_INT8(2, 5, 6);
    AMX_LOAD(7, p[1].w[GROUP_STEPS * group], ROW);
    AMX_MULTIPLY_INT8(3, 5, 7);
}

INLINE void store_even(tile_sums * sums) { // of each panel
    AMX_STORE(0, sums[0], ROW);
    AMX_STORE(1, sums[1], ROW);
}

INLINE void store_odd(tile_sums * sums) {
    AMX_STORE(2, sums[0], ROW);
    AMX_STORE(3, sums[1], ROW);
}

// A part of the groups of a tile of columns
typedef struct part {
    const q8_column * x;           // n blocks apart
    int64_t           n;
    int64_t           first, full; // columns that are still to be added
    int               group;       // the first
    tile_sums      (* sums)[PANELS];
    float          (* out)[PANELS * TILE];
} part;

// out[c] += what the sums of the columns c before `end` are worth that were not added yet; `d` are the panels' factors.
INLINE void add_columns(part * a, int64_t end, const vf (*d)[PANELS]) {
    for (end = end < a->full ? end : a->full; a->first < end; a->first++) {
        const int64_t c      = a->first;
        const float * column = a->x[c * a->n].d + a->group;
        UNROLL for (int k = 0; k < PANELS; k++) {
            float * to    = a->out[c] + TILE * k;
            vf      total = LOAD(to);
            UNROLL for (int i = 0; i < PART; i++) {
                vi sum;
                memcpy(&sum, a->sums[i][k][c], sizeof(sum));
                total += __builtin_convertvector(sum, vf) * (d[i][k] * column[i]);
            }
            STORE(to, total);
        }
    }
}

// out[c] += a block of each panel times column c; columns lie n blocks apart. Meanwhile a piece of memory is fetched
// for each part.
//
// The unit of the tiles and those of vectors work at the same time, but the processor looks only some hundreds of
// operations ahead. So a quarter of the part before is added after each group's products. The last tile begins among
// the columns of the one before it.
static void multiply_block(const panel * p, const q8_column * x, int64_t n, int64_t n_columns, const char * fetched,
                           int64_t piece, float (*out)[PANELS * TILE]) {
    const int64_t n_parts = parts_of(n_columns);
    const int64_t full    = n_columns < TILE ? n_columns : TILE, stride = n * (int64_t) sizeof(q8_column);
    tile_sums     sums[2][PART][PANELS] __attribute__((aligned(64)));
    part          before = { .first = TILE }; // none
    for (int64_t i = 0; i <= n_parts; i++) {
        const bool    more   = i < n_parts;
        const int64_t column = i / (GROUPS / PART) * TILE;
        const int64_t begin  = column + full > n_columns ? n_columns - full : column;
        const int     group  = i % (GROUPS / PART) * PART;
        const part    now    = { x + begin * n, n, column - begin, full, group, sums[i % 2], out + begin };
        vf            d[PART][PANELS];
        UNROLL for (int j = 0; j < PART; j++) {
            UNROLL for (int k = 0; k < PANELS; k++) {
                d[j][k] = LOAD(p[k].d[before.group + j]);
            }
        }
        if (more) {
            fetch(fetched + i * piece, piece);
        }
        for (int j = 0; j < PART; j += 2) { // sums are stored a group later, when they are complete
            if (more) {
                multiply_even(p, now.x, stride, group + j);
                if (j > 0) {
                    store_odd(now.sums[j - 1]);
                }
            }
            add_columns(&before, 4 * j + 4, d);
            if (more) {
                multiply_odd(p, now.x, stride, group + j + 1);
                store_even(now.sums[j]);
            }
            add_columns(&before, 4 * j + 8, d);
        }
        if (more) {
            store_odd(now.sums[PART - 1]);
        }
        before = now;
    }
}

static const form Q8_0 = { GROUPS * sizeof(q8_0_block), unpack_q8_0, multiply_block };
static const form Q4_0 = { GROUPS * sizeof(q4_0_block), unpack_q4_0, multiply_block };

static void multiply_columns(const struct ggml_tensor * w, const void * x, int64_t n_columns, int64_t first,
                             int64_t then, float * out) {
    AMX_CONFIGURE(&tiles_of[(n_columns < TILE ? n_columns : TILE) - 1]);
    multiply_panels(w->type == GGML_TYPE_Q4_0 ? &Q4_0 : &Q8_0, w, x, n_columns, parts_of(n_columns), first, then, out);
    AMX_RELEASE();
}

// ---- few columns --------------------------------------------------------------------------------------------------

#ifdef MLLAMA_AMX_EMULATED
const cpu_quantized cpu_quantized_amx_32 = {
    .quantize         = amx_emulated_quantize_32,
    .multiply_column  = amx_emulated_multiply_column_32,
    .multiply_columns = multiply_columns,
#else
COLUMNS_OF(cpu_quantized_vnni_32)

static void multiply(const struct ggml_tensor * w, const void * x, int64_t n_columns, int64_t first, int64_t then,
                     float * out) {
    if (n_columns < FEW) {
        cpu_quantized_vnni_32.multiply_columns(w, x, n_columns, first, then, out);
    } else {
        multiply_columns(w, x, n_columns, first, then, out);
    }
}

const cpu_quantized cpu_quantized_amx_32 = {
    .quantize         = quantize,
    .multiply_column  = multiply_column,
    .multiply_columns = multiply,
#endif
    .block_size       = sizeof(q8_column),
    .rows_alone       = 64,
    .rows             = PANELS * PANEL,
    .columns          = TASK_COLUMNS,
    .q8_0_columns     = INT64_MAX,
};
