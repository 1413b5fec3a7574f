// From the states of images to the keys and values that cross-attention layers read. Tensors that taps see, for layer
// N:
//     text.states                        input
//     blk.N.cross_k, blk.N.cross_v       k after its norm
#include "graphs/fill_graph.h"

#include "guard.h"

#include <string.h>

static struct ggml_tensor * rows_of(struct ggml_context * ctx, struct ggml_tensor * cache, int64_t first, int64_t n) {
    return ggml_view_2d(ctx, cache, cache->ne[0], n, cache->nb[1], cache->nb[1] * (size_t) first);
}

// Adds rows that were just written to fg->zero: 0 times a finite number is 0, and times another NaN. On a device this
// costs less than to read the rows back.
static void check_rows(fill_graph * fg, struct ggml_tensor * cache, struct ggml_tensor * rows) {
    if (guard_is_host(cache->buffer)) {
        return;
    }
    struct ggml_context * ctx = fg->g.ctx;
    struct ggml_tensor *  x   = rows->type == GGML_TYPE_F32 ? rows : ggml_cast(ctx, rows, GGML_TYPE_F32);
    struct ggml_tensor *  sum = ggml_sum(ctx, ggml_scale(ctx, x, 0.0f));
    fg->zero = fg->zero ? ggml_add(ctx, fg->zero, sum) : sum;
}

mllama_status fill_graph_build(const mllama_model * model, const image_slot * slot, int64_t first, int64_t n_rows,
                               const compute_env * env, fill_graph * fg) {
    const mllama_hparams * p      = &model->hp.pub;
    const int64_t          n_embd = (int64_t) p->head_dim * p->n_head_kv;
    memset(fg, 0, sizeof(*fg));
    const int64_t blocks = graph_block_nodes(2, p->n_embd, n_embd, n_rows);
    const int64_t cut    = n_rows / 4 > blocks ? n_rows / 4 : blocks;
    TRY(graph_init(&fg->g, 64 + (size_t) p->n_cross_layers * (48 + (size_t) cut), env,
                   model->token_embd));
    TRY(graph_use_products(&fg->g, 2 * (size_t) p->n_cross_layers));
    graph *               g   = &fg->g;
    struct ggml_context * ctx = g->ctx;
    fg->states = graph_input(g, GGML_TYPE_F32, p->n_embd, n_rows, "states");

    for (int32_t i = 0; i < p->n_cross_layers; i++) {
        const int32_t        il = model->hp.cross_layers[i];
        const text_layer *   l  = &model->layers[il];
        struct ggml_tensor * k  = graph_linear(g, l->k, fg->states);
        k = ggml_reshape_3d(ctx, k, p->head_dim, p->n_head_kv, n_rows);
        k = ggml_reshape_2d(ctx, graph_rms_norm(g, k, l->k_norm, p->rms_eps), n_embd, n_rows);
        graph_named(k, "blk", il, "cross_k");
        struct ggml_tensor * v = graph_named(graph_linear(g, l->v, fg->states), "blk", il, "cross_v");
        v = kv_cache_rounded(ctx, &slot->kv, il, v);
        k = ggml_cpy(ctx, k, rows_of(ctx, slot->kv.k[il], first, n_rows));
        v = ggml_cpy(ctx, v, rows_of(ctx, slot->kv.v[il], first, n_rows));
        ggml_build_forward_expand(g->gf, k);
        ggml_build_forward_expand(g->gf, v);
        check_rows(fg, slot->kv.k[il], k);
        check_rows(fg, slot->kv.v[il], v);
    }
    if (fg->zero) {
        ggml_set_output(fg->zero);
        ggml_build_forward_expand(g->gf, fg->zero);
    }
    return MLLAMA_OK;
}

void fill_graph_free(fill_graph * fg) {
    graph_free(&fg->g);
}
