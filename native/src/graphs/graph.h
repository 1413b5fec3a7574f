// What the two graphs share: norms, linear layers, attention, and cutting large work into nodes of bounded time.
#pragma once

#include "kernels/kernels.h"
#include "status.h"

#include "ggml-backend.h"

typedef struct graph {
    struct ggml_context * ctx; // holds the tensors' descriptions, no data
    struct ggml_cgraph *  gf;
    compute_env           env;
    tasks *               tasks;          // of its nodes, one after the other
    cpu_product *         products;       // with quantized weights
    size_t                n_products, max_products;
    struct ggml_tensor *  x, * quantized; // of the last of them
    const cpu_quantized * with;
    atomic_bool *         not_finite;     // [n_watched], for each column: seen by graph_watch
    size_t                n_watched;
    size_t                watch_from;     // which of them is column 0 of what is watched next
    struct ggml_tensor *  beside;         // a weight in the CPU's own memory, or NULL
    ggml_backend_dev_t    device;         // computes what has no weight of its own and no cache; NULL: not known
} graph;

// beside: a weight in the CPU's own memory, in no layout of special kernels; NULL where all of the graph is on the CPU.
// ggml computes a node where its weight is. A node of ours without one would go to a worker, which cannot compute it,
// if the next layer is there.
mllama_status graph_init(graph * g, size_t max_nodes, const compute_env * env, struct ggml_tensor * beside);
// Quantized weights in memory are multiplied by the kernel, in max_products nodes at most.
mllama_status graph_use_products(graph * g, size_t max_products);
// An input [ne0, ne1] of the text's graphs, named for taps
struct ggml_tensor * graph_input(graph * g, enum ggml_type type, int64_t ne0, int64_t ne1, const char * name);
// So many columns can be watched, in a graph with `beside`.
mllama_status graph_use_watch(graph * g, size_t n_columns);
// Whether graph_watch has seen something in these columns.
bool          graph_saw(const graph * g, int64_t first, int64_t n);
// The tasks of a node of this graph, which live as long as it does
void          graph_add_tasks(graph * g, tasks * t);
void          graph_begin(graph * g); // before each time that it is computed
void          graph_free(graph * g);

// Names a tensor as "prefix.layer.name" (as "prefix.name" for layer -1), for taps.
struct ggml_tensor * graph_named(struct ggml_tensor * t, const char * prefix, int32_t layer, const char * name);

// Looks for values that are not finite in x, whose column 0 is the first that can be watched. It computes on the CPU.
void                 graph_watch(graph * g, struct ggml_tensor * x);
// From now on column 0 of what is watched is another one: it has other columns than what was watched before.
void                 graph_watch_from(graph * g, size_t first);
// The same where w multiplies x next on the CPU and is quantized: then x is rounded, which turns NaN into a number.
// Other products carry NaN on.
void                 graph_watch_factor(graph * g, const struct ggml_tensor * w, struct ggml_tensor * x);
// x [n_in, n] -> W x [n_out, n]
struct ggml_tensor * graph_linear(graph * g, struct ggml_tensor * w, struct ggml_tensor * x);
// as graph_linear, plus a bias [n_out]
struct ggml_tensor * graph_linear_bias(graph * g, struct ggml_tensor * w, struct ggml_tensor * b,
                                       struct ggml_tensor * x);
struct ggml_tensor * graph_rms_norm(graph * g, struct ggml_tensor * x, struct ggml_tensor * w, float eps);
struct ggml_tensor * graph_layer_norm(graph * g, struct ggml_tensor * x, struct ggml_tensor * w,
                                      struct ggml_tensor * b, float eps);

// q [head_dim * n_head, n]; k, v [head_dim, n_kv, n_head_kv] views; mask [n_kv, n] F16 or NULL -> as q
struct ggml_tensor * graph_attention(graph * g, struct ggml_tensor * q, struct ggml_tensor * k, struct ggml_tensor * v,
                                     struct ggml_tensor * mask, int64_t n_head);

// q [head_dim, n, n_head] -> [head_dim, n_head, n] as one operation, or NULL where the device lacks it for these sizes
// or is to be exact: CUDA's rounds F32 to F16. Only this operation can read quantized values, which are not exact in
// any case.
struct ggml_tensor * graph_flash_attention(graph * g, struct ggml_tensor * q, struct ggml_tensor * k,
                                           struct ggml_tensor * v, struct ggml_tensor * mask, float scale);

// [n_embd, n] -> [head_dim, n, n_head], the layout in which graph_attention takes k and v
struct ggml_tensor * graph_split_heads(graph * g, struct ggml_tensor * x, int64_t n_head);

// Whether g->device is a GPU of this machine: nodes need not be cut there, and its attention takes 16-bit factors
bool graph_on_gpu(const graph * g);
// Runs fn over x [c, n] in blocks of at most n_max columns and joins the results. One node of a graph is the smallest
// thing that can be interrupted, so nodes that would take long on a CPU are cut. on_cpu: fn surely runs there.
typedef struct ggml_tensor * (*graph_block_fn)(graph * g, struct ggml_tensor * x, void * arg);
struct ggml_tensor * graph_in_blocks(graph * g, struct ggml_tensor * x, int64_t n_max, bool on_cpu, graph_block_fn fn,
                                     void * arg);
// Columns that a node with this many floating point operations a column may have.
int64_t graph_block_columns(double flop_per_column);
// At most so many nodes are products with a weight of n_in x n_out, in blocks: up to eight for each.
int64_t graph_block_nodes(int64_t n_products, int64_t n_in, int64_t n_out, int64_t n_columns);
