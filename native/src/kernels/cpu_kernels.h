// Attention and linear layers of the vision encoder and the text's attention, on the CPU, faster than ggml's, as custom operations
// of the graphs.
//
// The encoder's attention has no mask. Its keys come as two groups of rows, real ones first; a query sees all of them or the real ones.
// One node packs keys and values, one computes: a block of queries of one head at a time goes over blocks of keys with an
// online softmax, in F32 throughout; where weights are BF16 and the processor multiplies them, factors are rounded to BF16.
#pragma once

#include "status.h"

#include "ggml.h"

#include <stdatomic.h>

typedef struct cpu_kernel cpu_kernel;

// How a context computes its graphs
typedef struct compute_env {
    const cpu_kernel * kernel;       // NULL: ggml's operations alone
    int32_t            n_threads;
    bool               flash_attn;
    bool            (* stop)(void *); // asked on the calling thread while our own nodes work; true: leave, the result does not matter
    void *             stop_data;
} compute_env;

// The kernel of this name: "avx512bf16", "avx512", "avx2", "portable", or "off", which gives NULL. name NULL or empty: the one that the
// environment variable MLLAMA_CPU_KERNEL names, else the best of this processor.
mllama_status cpu_kernel_choose(const char * name, const cpu_kernel ** kernel);
const char *  cpu_kernel_name(const cpu_kernel * kernel);     // "off" for NULL
bool          cpu_kernel_has_head_dim(int64_t head_dim);
bool          cpu_kernel_has_bf16(const cpu_kernel * kernel); // instructions for products of BF16
int64_t       cpu_kernel_lanes(const cpu_kernel * kernel);    // of 32 bits in its vectors

// What one attention needs while its graph lives. It is computed at most once at a time.
typedef struct cpu_attention {
    const cpu_kernel * kernel;
    int64_t            n_head, head_dim;
    int64_t            n_real, n_all;  // keys, and queries likewise
    int64_t            repeated[2][2]; // keys of rows [from, to) count as
    float              repeats;        // this many, at least 1
    bool               bf16;           // round Q, K, V and the weights of values to BF16: sums stay F32
    bool            (* stop)(void *);  // asked on the calling thread; true: leave, the result does not matter
    void *             stop_data;
    atomic_llong       next;           // block of queries to be done
    atomic_bool        stopped;
} cpu_attention;

// q [n_embd, n_all or n_real], k and v [n_embd, n_all], rows contiguous -> as q. The first n_real queries see all keys, the
// others the first n_real keys. `a` must live as long as the graph.
struct ggml_tensor * cpu_attention_node(struct ggml_context * ctx, cpu_attention * a, struct ggml_tensor * q, struct ggml_tensor * k,
                                        struct ggml_tensor * v);

// What one linear layer needs while its graph lives. It is computed at most once at a time.
typedef struct cpu_linear {
    const cpu_kernel * kernel;
    // set by the node
    bool               gelu, bf16;
    int64_t            n_in, n_out;
    struct cpu_linear * then; // of an MLP: the second layer

    bool            (* stop)(void *); // as in cpu_attention
    void *             stop_data;
    atomic_llong       next;          // column to be done
    atomic_bool        stopped;
} cpu_linear;

// Whether the kernel multiplies by weights of this type faster than ggml does.
bool cpu_linear_supported(const cpu_kernel * kernel, const struct ggml_tensor * weight);

// weight [n_in, n_out], bias [n_out] or NULL, x [n_in, n] in contiguous rows -> W x + bias [n_out, n], or gelu of it. F32
// throughout: weights of 16 bits are widened. `a` must live as long as the graph.
struct ggml_tensor * cpu_linear_node(struct ggml_context * ctx, cpu_linear * a, struct ggml_tensor * weight, struct ggml_tensor * bias,
                                     struct ggml_tensor * x);

// fc2 gelu(fc1 x + fc1_b) + fc2_b, likewise. What is between them is never in memory as a whole: n_threads threads at most
// compute, each with a block of its own. `a` and `b` must live as long as the graph.
struct ggml_tensor * cpu_mlp_node(struct ggml_context * ctx, cpu_linear * a, struct ggml_tensor * fc1, struct ggml_tensor * fc1_b,
                                  cpu_linear * b, struct ggml_tensor * fc2, struct ggml_tensor * fc2_b, struct ggml_tensor * x,
                                  int64_t n_threads);

// The text's attention to rows of a cache in memory, F16 or F32. The heads of Q that share one of K and V go over its rows
// together, so that a row is read once; F32 throughout. With few tokens the rows are split among the threads, in the same way
// whatever their number, and the parts are joined by a second node.
typedef struct cpu_cache_attention {
    const cpu_kernel * kernel; // may be NULL: then nothing fits
    int64_t            n_head, n_head_kv, head_dim;
    int64_t            n_rows;
    bool            (* stop)(void *); // as above
    void *             stop_data;
    int64_t            n_splits;
    atomic_llong       next;
    atomic_bool        stopped;
} cpu_cache_attention;

// Whether there is such a node for these heads, with k and v of these types and, in the second, where they are
bool                 cpu_cache_attention_has(const cpu_cache_attention * a, enum ggml_type k, enum ggml_type v);
bool                 cpu_cache_attention_fits(const cpu_cache_attention * a, const struct ggml_tensor * k, const struct ggml_tensor * v);
// q [head_dim * n_head, n], k and v caches [head_dim * n_head_kv, at least n_rows], mask [n_rows, n] F16 of 0 and -inf, or NULL
// -> as q. `a` must live as long as the graph.
struct ggml_tensor * cpu_cache_attention_node(struct ggml_context * ctx, cpu_cache_attention * a, struct ggml_tensor * q,
                                              struct ggml_tensor * k, struct ggml_tensor * v, struct ggml_tensor * mask);
void                 cpu_cache_attention_reset(cpu_cache_attention * a); // before each time that the graph is computed

enum { CPU_INTERLEAVE_MAX = 9 };
// tensors[0 .. n - 1] [n_values, n_rows], at most CPU_INTERLEAVE_MAX -> [n * n_values, n_rows]: rows of the first, then of the
// others value by value in turn
struct ggml_tensor * cpu_interleave_node(struct ggml_context * ctx, struct ggml_tensor ** tensors, int64_t n);

// gelu(x + bias), written over x [n, m]; bias [n]. erf is right to 5e-7.
struct ggml_tensor * cpu_bias_gelu_node(struct ggml_context * ctx, const cpu_kernel * kernel, struct ggml_tensor * x,
                                        struct ggml_tensor * bias);
