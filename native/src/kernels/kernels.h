// Operations of this library on the CPU, faster than ggml's, as custom nodes of a graph: attention, linear layers and
// GELU of the vision encoder, the text's attention and its products with quantized weights.
//
// A struct that a node gets must live as long as the graph, and is used by one computation at a time. Its `tasks` are
// reset before each of them.
#pragma once

#include "kernels/tasks.h"
#include "status.h"

#include "ggml.h"

// ---- the kernel ---------------------------------------------------------------------------------------------------

// What a kind of processor computes with
typedef struct cpu_kernel cpu_kernel;

// How a context computes its graphs
typedef struct compute_env {
    const cpu_kernel * kernel;         // NULL: ggml's operations alone
    int32_t            n_threads;
    bool               flash_attn;
    bool               exact;          // products in F32 on GPUs too; false without a GPU
    bool            (* stop)(void *);  // see tasks
    void *             stop_data;
} compute_env;

// The kernel of this name, or NULL for "off"; see "kernels of the CPU" in mllama.h. name NULL or empty: the one that
// the environment variable MLLAMA_CPU_KERNEL names, else the best of this processor, as far as known without a trial.
mllama_status cpu_kernel_choose(const char * name, const cpu_kernel ** kernel);
const char *  cpu_kernel_name(const cpu_kernel * kernel); // "off" for NULL
bool          cpu_kernel_has_head_dim(int64_t head_dim);
// Whether the encoder rounds factors to BF16 where weights have this type
bool          cpu_in_bf16(const cpu_kernel * kernel, enum ggml_type weights);

// ---- the encoder's attention (attention.c) ------------------------------------------------------------------------

// It has no mask. Its keys come as two groups of rows, real ones first; a query sees all of them or the real ones.
// One node packs keys and values, one computes: a block of queries of one head at a time goes over blocks of keys with
// an online softmax, in F32 throughout. With `bf16` factors are rounded to BF16.
typedef struct cpu_attention {
    const cpu_kernel * kernel;
    int64_t            n_head, head_dim;
    int64_t            n_real, n_all;  // keys; and queries, unless only the real ones are computed
    int64_t            repeated[2][2]; // keys of rows [from, to) count as
    float              repeats;        // this many, at least 1
    bool               bf16;           // round Q, K, V and the weights of values to BF16: sums stay F32
    tasks              tasks;          // blocks of queries
} cpu_attention;

// Whether the kernel attends itself. bf16: as in cpu_attention
bool cpu_attention_supported(const cpu_kernel * kernel, bool bf16);

// q [n_embd, n_all or n_real], k and v [n_embd, n_all], rows contiguous -> as q. The first n_real queries see all keys,
// the others the first n_real keys.
struct ggml_tensor * cpu_attention_node(struct ggml_context * ctx, cpu_attention * a, struct ggml_tensor * q,
                                        struct ggml_tensor * k, struct ggml_tensor * v);

// ---- linear layers (linear.c) -------------------------------------------------------------------------------------

typedef struct cpu_linear {
    const cpu_kernel * kernel;
    // set by the node
    bool                gelu, bf16;
    int64_t             n_in, n_out;
    struct cpu_linear * then;  // the second layer of an MLP
    tasks               tasks; // columns
} cpu_linear;

// Whether the kernel multiplies by weights of this type faster than ggml does.
bool cpu_linear_supported(const cpu_kernel * kernel, const struct ggml_tensor * weight);

// weight [n_in, n_out], bias [n_out] or NULL, x [n_in, n] in contiguous rows -> W x + bias [n_out, n]. F32 throughout:
// weights of 16 bits are widened. With cpu_in_bf16 and an even n_in, weights and x are rounded to BF16.
struct ggml_tensor * cpu_linear_node(struct ggml_context * ctx, cpu_linear * a, struct ggml_tensor * weight,
                                     struct ggml_tensor * bias, struct ggml_tensor * x);

// fc2 gelu(fc1 x + fc1_b) + fc2_b, in the same way. The values between the layers are never in memory as a whole: at
// most n_threads threads compute, each with a block of its own.
struct ggml_tensor * cpu_mlp_node(struct ggml_context * ctx, cpu_linear * a, struct ggml_tensor * fc1,
                                  struct ggml_tensor * fc1_b, cpu_linear * b, struct ggml_tensor * fc2,
                                  struct ggml_tensor * fc2_b, struct ggml_tensor * x, int64_t n_threads);

// ---- the text's attention to rows of a cache (cache_attention.c) --------------------------------------------------

// Caches are in memory, F16 or F32. The heads of Q that share one of K and V go over its rows together, so that a row
// is read once; F32 throughout. With few tokens the rows are split among the threads, in the same way whatever their
// number, and the parts are joined by a second node.

// Some columns of Q, next to each other, and the rows that they see
typedef struct cpu_cache_item {
    struct ggml_tensor * k, * v; // [head_dim * n_head_kv, at least n_rows]
    int64_t              column, n_columns;
    int64_t              n_rows;
    int64_t              mask;   // where its part of the mask begins, in values; -1: all rows are seen
    // set by the node
    int64_t              n_splits;
    int64_t              task, part; // the first of its tasks, and of its parts
} cpu_cache_item;

typedef struct cpu_cache_attention {
    const cpu_kernel * kernel; // may be NULL: then nothing fits
    int64_t            n_head, n_head_kv, head_dim;
    cpu_cache_item *   items;  // of all columns, in order; they must live as long as the graph
    int64_t            n_items;
    bool               many;   // items of several sequences: more columns count as few
    // set by the node
    int64_t            n_tasks;
    bool               joined; // parts are joined
    tasks              tasks;
} cpu_cache_attention;

// Whether there is such a node for these heads, with k and v of these types; and where the caches of all items are.
bool cpu_cache_attention_has(const cpu_cache_attention * a, enum ggml_type k, enum ggml_type v);
bool cpu_cache_attention_fits(const cpu_cache_attention * a);

// q [head_dim * n_head, n]; mask F16 of 0 and -inf, for each item [n_rows, n_columns] one after the other, or NULL
// -> as q
struct ggml_tensor * cpu_cache_attention_node(struct ggml_context * ctx, cpu_cache_attention * a,
                                              struct ggml_tensor * q, struct ggml_tensor * mask);

// ---- products with quantized weights (quantized.c) ----------------------------------------------------------------

// Q4_K, Q5_K and Q6_K, Q8_0 and Q4_0 in memory, as the file has them. Columns are rounded to 8 bits, as many values at
// a time as ggml rounds for such weights: 256, or 32.
typedef struct cpu_quantized cpu_quantized;

typedef struct cpu_product {
    const cpu_quantized * with;
    tasks                 tasks;
} cpu_product;

// What the kernel multiplies n columns by this weight with; NULL: it does not, as ggml is as fast. Weights that have
// the same share rounded columns.
const cpu_quantized * cpu_product_with(const cpu_kernel * kernel, const struct ggml_tensor * weight, int64_t n);
// x [n_in, n] in contiguous rows -> rounded, for cpu_product_node alone
struct ggml_tensor * cpu_quantize_node(struct ggml_context * ctx, const cpu_quantized * with, struct ggml_tensor * x);
// weight [n_in, n_out], x [n_in, n] from cpu_quantize_node, both for a->with -> W x [n_out, n]
struct ggml_tensor * cpu_product_node(struct ggml_context * ctx, cpu_product * a, struct ggml_tensor * weight,
                                      struct ggml_tensor * quantized, int64_t n);

// ---- value by value (elementwise.c) -------------------------------------------------------------------------------

// gelu(x + bias), written over x [n, m]; bias [n]. erf is right to 5e-7.
struct ggml_tensor * cpu_bias_gelu_node(struct ggml_context * ctx, const cpu_kernel * kernel, struct ggml_tensor * x,
                                        struct ggml_tensor * bias);

// Sets seen[i] if a value of column i of x [n, m] is not finite. The node's own result means nothing.
// beside: as in graph_init; it is not read
struct ggml_tensor * cpu_watch_node(struct ggml_context * ctx, struct ggml_tensor * x, struct ggml_tensor * beside,
                                    atomic_bool * seen);

enum { CPU_INTERLEAVE_MAX = 9 };
// tensors[0 .. n - 1] [n_values, n_rows], at most CPU_INTERLEAVE_MAX -> [n * n_values, n_rows]: rows of the first, then
// of the others value by value in turn
struct ggml_tensor * cpu_interleave_node(struct ggml_context * ctx, struct ggml_tensor ** tensors, int64_t n);

// [left, right] along the columns. ggml_concat copies value by value, on one thread. beside: as in graph_init; it is
// not read.
struct ggml_tensor * cpu_join_node(struct ggml_context * ctx, struct ggml_tensor * left, struct ggml_tensor * right,
                                   struct ggml_tensor * beside);
