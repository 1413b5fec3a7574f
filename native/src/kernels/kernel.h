// What an instruction set gives: a table of functions in a file of its own. A kernel puts such tables together for a
// kind of processor, see choose.c.
#pragma once

#include "kernels/kernels.h"

enum {
    MAX_HEAD_DIM = 128,
    MAX_WIDTH    = 32,  // of a panel
    QUERIES      = 48,  // in one block; its scores and sums stay in the second-level cache
    KEYS         = 128, // in one block
    COLUMNS      = 96,  // of x, in one task of a linear layer
    ROWS_GROUP   = 4,   // queries of a head that go over the rows of a cache together
    QUANT_BLOCK  = 256, // weights with a common factor, in Q4_K and Q6_K
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

// At most COLUMNS rows of x
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
    void (* attend)(const attend_args * args);
    void (* linear)(const linear_args * args);
} cpu_bf16;

// Products with Q4_K and Q6_K. A column is rounded to blocks in a form of the table's own.
typedef struct cpu_quantized {
    size_t  block_size;   // bytes of QUANT_BLOCK rounded values
    int64_t rows_alone;   // of W, in a task of a single column
    int64_t rows;         // of W, in a task of several columns
    int64_t columns;      // most of them in a task
    void (* quantize)(const float * x, int64_t n, void * out); // `out` is aligned to 64 bytes
    // out[first .. end - 1] of W x, for a single column. The rows from `then` on come next.
    void (* multiply_column)(const struct ggml_tensor * w, const void * x, int64_t first, int64_t end, int64_t then,
                             float * out);
    // Rows first to first + rows of W x, as far as there are any, for at most `columns` columns;
    // out [n_columns][n_out]. The rows from `then` on come next.
    void (* multiply_columns)(const struct ggml_tensor * w, const void * x, int64_t n_columns, int64_t first,
                              int64_t then, float * out);
} cpu_quantized;

struct cpu_kernel {
    const char *          name;
    bool               (* supported)(void); // by this processor
    const cpu_f32 *       f32;
    const cpu_bf16 *      bf16;             // NULL: none
    const cpu_quantized * quantized;        // NULL: none
};

// All that this library has for the architecture, the best first; NULL: no more of them
const cpu_kernel * cpu_kernel_at(int32_t index);

extern const cpu_f32       cpu_f32_portable, cpu_f32_avx2, cpu_f32_avx512, cpu_f32_neon;
extern const cpu_bf16      cpu_bf16_avx512bf16, cpu_bf16_neon;
extern const cpu_quantized cpu_quantized_vnni, cpu_quantized_neondot, cpu_quantized_neoni8mm;
