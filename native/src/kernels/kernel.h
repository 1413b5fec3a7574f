// What an instruction set gives: a table of functions in a file of its own, see tables.c. A kernel puts such tables
// together, see choose.c.
#pragma once

#include "kernels/kernels.h"

enum {
    MAX_HEAD_DIM = 128,
    MAX_WIDTH    = 32,  // of a panel
    QUERIES      = 48,  // in one block; its scores and sums stay in the second-level cache
    KEYS         = 128, // in one block
    COLUMNS      = 96,  // of x, in one task of a linear layer
    ROWS_GROUP   = 4,   // queries of a head that go over the rows of a cache together
    QUANT_BLOCK  = 256, // weights with a common factor, in Q4_K, Q5_K and Q6_K
    SMALL_BLOCK  = 32,  // the same in Q8_0 and Q4_0
};
static const float NO_KEY = -1e30f; // score of a row that only fills a panel

// Two BF16 numbers, the first in the low half
typedef uint32_t bf16_pair __attribute__((may_alias));

static inline int64_t round_up(int64_t n, int64_t to) {
    return (n + to - 1) / to * to;
}

// Loops of constant length in registers
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

// Always, as arguments that are constants decide what is computed in registers
#define INLINE static inline __attribute__((always_inline))

// ---- arguments ----------------------------------------------------------------------------------------------------

// At most QUERIES queries of one head over packed keys
typedef struct attend_args {
    const float * q;
    size_t        q_stride, out_stride; // bytes
    int64_t       n;                    // queries
    int64_t       head_dim;
    float         scale;
    const float * k;                    // panels of keys: [width] added to the scores, then [head_dim][width] values or
                                        // [head_dim / 2][width] pairs
    const float * v;                    // [n_keys][head_dim rounded up to whole vectors], or pairs of two keys
    int64_t       n_keys;               // whole panels
    float *       out;
} attend_args;

// At most COLUMNS rows of x, or as many as the table says
typedef struct linear_args {
    const float * x;                    // [n][n_in] in rows of x_stride bytes
    size_t        x_stride;
    int64_t       n, n_in, n_out;
    const float * w;                    // panels of outputs: [width] to begin with, then [n_in][width], or pairs
    float *       out;                  // [n][n_out] in rows of out_stride values
    int64_t       out_stride;
} linear_args;

// Queries of some heads of K and V over rows of their cache: at most QUERIES, if those of each head are rounded up to
// a multiple of ROWS_GROUP
typedef struct rows_args {
    const float *       q;        // query i of head h is head h * group + i % group of token i / group
    size_t              q_stride; // bytes from token to token
    int64_t             n_heads;
    int64_t             n, group; // queries of each head; of one token
    int64_t             head_dim;
    float               scale;
    const char *        k, * v;
    const char *        k_then, * v_then;   // what will be read after these: fetched meanwhile
    bool                fetched;            // and so were these
    size_t              k_stride, v_stride; // bytes from row to row
    bool                k_half, v_half;     // F16, else F32
    int64_t             n_keys;
    const ggml_fp16_t * mask;     // a row for each token: 0, or -inf for a key that it does not see; or NULL
    size_t              mask_stride;
    float *             part;     // [n_heads][n][2 + head_dim]: largest score, sum, sums of values; NULL: to `out`
    float *             out;      // as q
    size_t              out_stride;
} rows_args;

// ---- tables -------------------------------------------------------------------------------------------------------

typedef struct cpu_f32 {
    int64_t lanes;      // floats in a vector
    int64_t width;      // keys or outputs in a panel, at most MAX_WIDTH
    bool    multiplies; // linear layers faster than ggml does
    void (* attend)(const attend_args * args);
    void (* attend_rows)(const rows_args * args);
    void (* linear)(const linear_args * args);
    void (* bias_gelu)(float * x, const float * bias, int64_t n); // x = gelu(x + bias), n values; bias may be NULL
    void (* erf_array)(const float * x, float * y, int64_t n);
} cpu_f32;

// Factors rounded to BF16, products and sums in F32
typedef struct cpu_bf16 {
    int64_t lanes;      // as in cpu_f32
    int64_t width;
    int64_t columns;    // of x, most of them in a call of `linear`
    void (* attend)(const attend_args * args);
    void (* linear)(const linear_args * args);
} cpu_bf16;

// Products with Q4_K, Q5_K and Q6_K, or with Q8_0 and Q4_0. A column is rounded to blocks in a form of the table's own.
struct cpu_quantized {
    size_t  block_size;   // bytes of QUANT_BLOCK rounded values
    int64_t rows_alone;   // of W, in a task of a single column
    int64_t rows;         // of W, in a task of several columns
    int64_t columns;      // most of them in a task
    int64_t q8_0_columns; // most of them in a product with Q8_0; with more ggml is faster
    void (* quantize)(const float * x, int64_t n, void * out); // `out` is aligned to 64 bytes
    // out[first .. end - 1] of W x, for a single column. The rows from `then` on come next.
    void (* multiply_column)(const struct ggml_tensor * w, const void * x, int64_t first, int64_t end, int64_t then,
                             float * out);
    // Rows first to first + rows of W x, as far as there are any, for at most `columns` columns;
    // out [n_columns][n_out]. The rows from `then` on come next.
    void (* multiply_columns)(const struct ggml_tensor * w, const void * x, int64_t n_columns, int64_t first,
                              int64_t then, float * out);
};

// ---- kernels ------------------------------------------------------------------------------------------------------

// What a kernel is put together of
typedef enum cpu_part {
    CPU_ATTENTION,    // the encoder's, in F32
    CPU_LINEAR,       // the encoder's linear layers, with factors in F32
    CPU_BF16,         // both of these for BF16 weights
    CPU_CACHE,        // the text's attention to rows of a cache
    CPU_QUANTIZED,    // the text's products with Q4_K, Q5_K and Q6_K, blocks of 256 weights
    CPU_QUANTIZED_32, // the same with Q8_0 and Q4_0, blocks of 32
    CPU_F16,          // no work of its own: whether F16 weights of the encoder are rounded to BF16, for CPU_BF16
    CPU_PARTS,
} cpu_part;

// What a part can be computed with. It has tables of one of the three kinds, or none: then its name is "ggml", for
// ggml's own operations, or "f32", for weights that are widened, or "bf16", see CPU_F16.
typedef struct cpu_table {
    const char *          name;
    bool               (* supported)(void); // by this processor
    const cpu_f32 *       f32;
    const cpu_bf16 *      bf16;
    const cpu_quantized * quantized;        // of Q4_K, Q5_K and Q6_K, or of Q8_0 and Q4_0
} cpu_table;

const char *      cpu_part_name(cpu_part part);
// Those of this build for a part, the best first; the last has no name.
const cpu_table * cpu_tables(cpu_part part);
// Of them those that this processor supports; NULL: no more of them
const cpu_table * cpu_table_at(cpu_part part, int32_t index);
// The one with a name of `length` characters, or NULL
const cpu_table * cpu_table_named(cpu_part part, const char * name, size_t length);
bool              cpu_ggml_has_bf16(void); // ggml's CPU backend uses this processor's instructions for BF16

enum { CPU_KERNEL_NAME = 200 };

struct cpu_kernel {
    char                  name[CPU_KERNEL_NAME];
    const cpu_table *     parts[CPU_PARTS];
    // of the parts; NULL: ggml's operations
    const cpu_f32 *       attention, * linear, * cache;
    const cpu_bf16 *      bf16;         // NULL: see the next one
    bool                  f16_as_bf16;  // weights of the encoder; only with a table
    bool                  bf16_by_ggml; // linear layers of BF16 weights; else these are widened to F32
    const cpu_quantized * quantized, * quantized_32;
    const cpu_f32 *       f32;          // GELU and erf; never NULL
    cpu_kernel *          next;         // of all kernels
};

// The table for products of n columns with weights of this type, or NULL
const cpu_quantized * cpu_quantized_of(const cpu_kernel * kernel, enum ggml_type weights, int64_t n);

// Entry `index` of the list of kernels of this build, the best first: its name, or NULL beyond the last. *kernel: NULL
// where this processor does not have it.
const char * cpu_kernel_at(int32_t index, const cpu_kernel ** kernel);

extern const cpu_f32       cpu_f32_portable, cpu_f32_avx2, cpu_f32_avx512, cpu_f32_neon;
extern const cpu_bf16      cpu_bf16_avx512bf16, cpu_bf16_amx, cpu_bf16_neon;
extern const cpu_quantized cpu_quantized_vnni, cpu_quantized_amx, cpu_quantized_neondot, cpu_quantized_neoni8mm;
extern const cpu_quantized cpu_quantized_avx2, cpu_quantized_avxvnni;
extern const cpu_quantized cpu_quantized_amx_32, cpu_quantized_vnni_32, cpu_quantized_avx2_32;
extern const cpu_quantized cpu_quantized_avxvnni_32;

// Whether this processor has AMX for BF16 and 8 bits, and the system lets this process use it. The first call asks.
bool amx_supported(void);
