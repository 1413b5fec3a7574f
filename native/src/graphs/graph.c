#include "graphs/graph.h"

#include "devices.h"
#include "guard.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// At the 60 GFLOPS of two old CPU cores a node of this size takes a third of a second.
static const double NODE_FLOP = 2e10;

mllama_status graph_init(graph * g, size_t max_nodes, const compute_env * env, struct ggml_tensor * beside) {
    TRY(guard_context(ggml_tensor_overhead() * max_nodes + ggml_graph_overhead_custom(max_nodes, false), &g->ctx));
    g->gf         = ggml_new_graph_custom(g->ctx, max_nodes, false);
    g->env        = *env;
    g->beside     = beside;
    g->device     = NULL;
    g->tasks      = NULL;
    g->products   = NULL;
    g->n_products = g->max_products = 0;
    g->x          = NULL;
    g->with       = NULL;
    g->not_finite = NULL;
    g->n_watched  = 0;
    return MLLAMA_OK;
}

mllama_status graph_use_products(graph * g, size_t max_products) {
    g->products = calloc(max_products, sizeof(*g->products));
    if (!g->products) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    g->max_products = max_products;
    return MLLAMA_OK;
}

mllama_status graph_use_watch(graph * g, size_t n_columns) {
    g->not_finite = malloc(n_columns * sizeof(*g->not_finite));
    if (!g->not_finite) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    g->n_watched  = n_columns;
    g->watch_from = 0;
    for (size_t i = 0; i < n_columns; i++) {
        atomic_init(&g->not_finite[i], false);
    }
    return MLLAMA_OK;
}

bool graph_saw(const graph * g, int64_t first, int64_t n) {
    bool seen = false;
    for (int64_t i = first; i < first + n; i++) {
        seen |= atomic_load_explicit(&g->not_finite[i], memory_order_relaxed);
    }
    return seen;
}

void graph_add_tasks(graph * g, tasks * t) {
    t->stop      = g->env.stop;
    t->stop_data = g->env.stop_data;
    t->other     = g->tasks;
    g->tasks     = t;
    tasks_reset(t);
}

void graph_begin(graph * g) {
    for (size_t i = 0; i < g->n_watched; i++) {
        atomic_store_explicit(&g->not_finite[i], false, memory_order_relaxed);
    }
    for (tasks * t = g->tasks; t; t = t->other) {
        tasks_reset(t);
    }
}

void graph_free(graph * g) {
    free(g->products);
    free(g->not_finite);
    g->products   = NULL;
    g->not_finite = NULL;
    ggml_free(g->ctx);
    g->ctx = NULL;
    g->gf  = NULL;
}

struct ggml_tensor * graph_named(struct ggml_tensor * t, const char * prefix, int32_t layer, const char * name) {
    if (layer >= 0) {
        ggml_format_name(t, "%s.%d.%s", prefix, layer, name);
    } else {
        ggml_format_name(t, "%s.%s", prefix, name);
    }
    return t;
}

struct ggml_tensor * graph_input(graph * g, enum ggml_type type, int64_t ne0, int64_t ne1, const char * name) {
    struct ggml_tensor * t = ggml_new_tensor_2d(g->ctx, type, ne0, ne1);
    ggml_set_input(graph_named(t, "text", -1, name));
    return t;
}

int64_t graph_block_columns(double flop_per_column) {
    const double n = NODE_FLOP / flop_per_column;
    return n < 16.0 ? 16 : n > 1e9 ? (int64_t) 1e9 : (int64_t) n;
}

int64_t graph_block_nodes(int64_t n_products, int64_t n_in, int64_t n_out, int64_t n_columns) {
    const int64_t most = graph_block_columns(2.0 * (double) n_in * (double) n_out);
    return n_products * 8 * ((n_columns + most - 1) / most);
}

bool graph_on_gpu(const graph * g) {
    return g->device && device_is_gpu(g->device) && !device_is_rpc(g->device);
}

struct ggml_tensor * graph_in_blocks(graph * g, struct ggml_tensor * x, int64_t n_max, bool on_cpu, graph_block_fn fn,
                                     void * arg) {
    const int64_t n = x->ne[1];
    if (n <= n_max || graph_on_gpu(g)) {
        return fn(g, x, arg);
    }
    const int64_t        half  = n / 2;
    struct ggml_tensor * left  = ggml_view_2d(g->ctx, x, x->ne[0], half, x->nb[1], 0);
    struct ggml_tensor * right = ggml_view_2d(g->ctx, x, x->ne[0], n - half, x->nb[1], x->nb[1] * (size_t) half);
    left  = graph_in_blocks(g, left, n_max, on_cpu, fn, arg);
    right = graph_in_blocks(g, right, n_max, on_cpu, fn, arg);
    if (!on_cpu) {
        return ggml_concat(g->ctx, left, right, 1);
    }
    return cpu_join_node(g->ctx, left, right, g->beside);
}

// In the CPU's memory: mapped or copied, or in a layout of its own, which is no host memory to ggml
static bool is_on_cpu(const struct ggml_tensor * t) {
    if (!t->buffer || guard_is_host(t->buffer)) {
        return t->buffer != NULL;
    }
    const ggml_backend_dev_t device = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(t->buffer));
    return device && device_is_cpu(device);
}

// CUDA multiplies up to this many columns on tensor cores, which round factors to TF32 or 16 bits whatever precision is
// requested. More go to cuBLAS, which obeys.
#define ROUNDED_COLUMNS 16

static struct ggml_tensor * mul_mat(graph * g, struct ggml_tensor * x, void * w) {
    struct ggml_context * ctx = g->ctx;
    const int64_t         n = x->ne[1], n_matrices = x->ne[2];
    // one column of one matrix is computed in F32 anyway
    const bool more = g->env.exact && n <= ROUNDED_COLUMNS && (n > 1 || n_matrices > 1) && !is_on_cpu(w) &&
                      !ggml_is_quantized(((struct ggml_tensor *) w)->type);
    if (more) {
        x = ggml_pad(ctx, ggml_cont(ctx, x), 0, (int) (ROUNDED_COLUMNS + 1 - n), 0, 0);
    }
    struct ggml_tensor * y = ggml_mul_mat(ctx, w, x);
    if (g->env.exact) {
        ggml_prec_set_acc(y, GGML_PREC_F32);
    }
    return more ? ggml_cont(ctx, ggml_view_3d(ctx, y, y->ne[0], n, n_matrices, y->nb[1], y->nb[2], 0)) : y;
}

void graph_watch(graph * g, struct ggml_tensor * x) {
    ggml_build_forward_expand(g->gf, cpu_watch_node(g->ctx, x, g->beside, g->not_finite + g->watch_from));
}

void graph_watch_from(graph * g, size_t first) {
    g->watch_from = first;
}

void graph_watch_factor(graph * g, const struct ggml_tensor * w, struct ggml_tensor * x) {
    if (ggml_is_quantized(w->type) && is_on_cpu(w)) {
        graph_watch(g, x);
    }
}

struct ggml_tensor * graph_linear(graph * g, struct ggml_tensor * w, struct ggml_tensor * x) {
    if (!is_on_cpu(w) || x->ne[2] > 1) {
        return mul_mat(g, x, w);
    }
    const cpu_quantized * with = g->n_products < g->max_products
                                     ? cpu_product_with(g->env.kernel, w, x->ne[1]) : NULL;
    if (with) {
        cpu_product * product = &g->products[g->n_products++];
        if (g->x != x || g->with != with) { // else another weight of the same input
            g->x         = x;
            g->with      = with;
            g->quantized = cpu_quantize_node(g->ctx, with, x);
        }
        product->with = with;
        graph_add_tasks(g, &product->tasks);
        return cpu_product_node(g->ctx, product, w, g->quantized, x->ne[1]);
    }
    const int64_t most = graph_block_columns(2.0 * (double) w->ne[0] * (double) w->ne[1]);
    return graph_in_blocks(g, x, most, true, mul_mat, w);
}

struct ggml_tensor * graph_linear_bias(graph * g, struct ggml_tensor * w, struct ggml_tensor * b,
                                       struct ggml_tensor * x) {
    return ggml_add(g->ctx, graph_linear(g, w, x), b);
}

struct ggml_tensor * graph_rms_norm(graph * g, struct ggml_tensor * x, struct ggml_tensor * w, float eps) {
    return ggml_mul(g->ctx, ggml_rms_norm(g->ctx, x, eps), w);
}

struct ggml_tensor * graph_layer_norm(graph * g, struct ggml_tensor * x, struct ggml_tensor * w,
                                      struct ggml_tensor * b, float eps) {
    return ggml_add(g->ctx, ggml_mul(g->ctx, ggml_norm(g->ctx, x, eps), w), b);
}

struct ggml_tensor * graph_split_heads(graph * g, struct ggml_tensor * x, int64_t n_head) {
    x = ggml_reshape_3d(g->ctx, x, x->ne[0] / n_head, n_head, x->ne[1]);
    return ggml_permute(g->ctx, x, 0, 2, 1, 3);
}

typedef struct attention_args {
    struct ggml_tensor * k;
    struct ggml_tensor * v;
    struct ggml_tensor * mask;
    int64_t              n_head;
} attention_args;

struct ggml_tensor * graph_flash_attention(graph * g, struct ggml_tensor * q, struct ggml_tensor * k,
                                           struct ggml_tensor * v, struct ggml_tensor * mask, float scale) {
    const bool needed = ggml_is_quantized(v->type);
    if (!g->env.flash_attn || (g->env.exact && !needed)) {
        return NULL;
    }
    struct ggml_tensor *        out    = ggml_flash_attn_ext(g->ctx, q, k, v, mask, scale, 0.0f, 0.0f);
    const ggml_backend_buffer_t cache  = k->view_src ? k->view_src->buffer : NULL;
    const ggml_backend_dev_t    device = cache ? ggml_backend_buft_get_device(ggml_backend_buffer_get_type(cache))
                                               : g->device;
    bool ok = true;
    ggml_prec_set_acc(out, GGML_PREC_F32);
    if (device && !needed && guard_supports_op(device, out, &ok) != MLLAMA_OK) {
        ok = true; // computing tells
    }
    return ok ? out : NULL;
}

static struct ggml_tensor * attend_columns(graph * g, struct ggml_tensor * q, void * arg) {
    const attention_args * a       = arg;
    const int64_t          n_embd  = q->ne[0], n = q->ne[1];
    const float            scale   = 1.0f / sqrtf((float) (n_embd / a->n_head));
    struct ggml_tensor *   heads   = ggml_view_3d(g->ctx, q, n_embd / a->n_head, a->n_head, n,
                                                  ggml_row_size(q->type, n_embd / a->n_head), q->nb[1], 0);
    heads = ggml_permute(g->ctx, heads, 0, 2, 1, 3); // [head_dim, n, n_head]

    struct ggml_tensor * flash = graph_flash_attention(g, heads, a->k, a->v, a->mask, scale);
    if (flash) {
        return ggml_reshape_2d(g->ctx, flash, n_embd, n);
    }
    struct ggml_tensor * k = a->k;
    if (g->env.exact) { // Vulkan rounds factors to F16 if there are gaps between their rows
        k     = ggml_cont(g->ctx, k);
        heads = ggml_cont(g->ctx, heads);
    }
    struct ggml_tensor * scores = mul_mat(g, heads, k); // [n_kv, n, n_head]
    ggml_prec_set_acc(scores, GGML_PREC_F32);
    scores = ggml_soft_max_ext(g->ctx, scores, a->mask, scale, 0.0f);
    struct ggml_tensor * v   = ggml_cont(g->ctx, ggml_permute(g->ctx, a->v, 1, 0, 2, 3)); // [n_kv, head_dim, n_head_kv]
    struct ggml_tensor * out = mul_mat(g, scores, v);                                    // [head_dim, n, n_head]
    return ggml_cont_2d(g->ctx, ggml_permute(g->ctx, out, 0, 2, 1, 3), n_embd, n);
}

struct ggml_tensor * graph_attention(graph * g, struct ggml_tensor * q, struct ggml_tensor * k, struct ggml_tensor * v,
                                     struct ggml_tensor * mask, int64_t n_head) {
    attention_args args = { .k = k, .v = v, .mask = mask, .n_head = n_head };
    if (mask) { // text: batches are small, and the mask has a row for each query
        return attend_columns(g, q, &args);
    }
    const int64_t most = graph_block_columns(4.0 * (double) q->ne[0] * (double) k->ne[1]);
    return graph_in_blocks(g, q, most, false, attend_columns, &args);
}
