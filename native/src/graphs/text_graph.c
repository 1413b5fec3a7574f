// Llama 3 with cross-attention layers (llama_models/llama3/multimodal/model.py).
//
// One graph computes some tokens, one after the other in the sequence, that see the same images. What they see:
//
//                                  self-attention layer: the cells of the cache      cross-attention layer: a slot
//
//                                  0 .. n_past - 1   n_past ...       .. n_kv        rows of images       others
//     token 0 of the graph         seen              seen  .    .     .              seen                 .
//     token 1                      seen              seen  seen .     .              seen                 .
//     token 2                      seen              seen  seen seen  .              seen                 .
//
//     written by this graph        no                yes              no             no: by fill_graph    no
//
// The mask hides cells: those after the token itself, and the rest of n_kv, which is rounded up so that one graph
// serves many tokens. Cross-attention has no mask: every token of the graph sees the first n_rows rows of the slot, all
// rows of the images before it. Tokens before the first image see none: then the cross-attention layers are left out,
// and x passes through them unchanged. Text after another image needs another call, with another n_rows or slot.
//
// Tensors that taps see, for layer N:
//     text.tokens, text.positions, text.cells, text.mask        inputs
//     text.token_embd                                           rows of the embedding
//     blk.N.attn_norm                                           input of attention
//     blk.N.q, blk.N.k, blk.N.v                                 self-attention; q and k after RoPE
//     blk.N.cross_q                                             cross-attention, after its norm
//     blk.N.attn_out, blk.N.attn_residual                       after W_o, before the gate; x + that
//     blk.N.ffn_norm, blk.N.ffn_out                             input and output of the feed-forward part
//     blk.N.layer_out                                           x after the layer
//     text.output_norm, text.logits
// and of fill_graph: text.states (input), blk.N.cross_k (after its norm), blk.N.cross_v.
#include "graphs/text_graph.h"

#include "guard.h"

#include <stdlib.h>
#include <string.h>

typedef struct decoder {
    graph *                g;
    const mllama_model *   model;
    const mllama_hparams * p;
    const kv_cache *       cache;
    const image_slot *     slot;
    text_graph *           tg;
} decoder;

// The first n_kv rows of a cache tensor as [head_dim, n_kv, n_head_kv]
static struct ggml_tensor * cache_view(const decoder * d, struct ggml_tensor * cache, int64_t n_kv) {
    const int64_t head_dim = d->p->head_dim;
    return ggml_view_3d(d->g->ctx, cache, head_dim, n_kv, d->p->n_head_kv, cache->nb[1],
                        ggml_row_size(cache->type, head_dim), 0);
}

// Values as a layer's cache holds them on any device: where they are F32 only because ggml's kernel needs that, they
// are rounded like the others, so that the answer does not depend on where a layer is.
static struct ggml_tensor * rounded(struct ggml_context * ctx, const kv_cache * cache, int32_t il,
                                    struct ggml_tensor * v) {
    if (cache->type_v != GGML_TYPE_F16 || cache->v[il]->type == GGML_TYPE_F16) {
        return v;
    }
    return ggml_cast(ctx, ggml_cast(ctx, v, GGML_TYPE_F16), GGML_TYPE_F32);
}

// q [head_dim * n_head, n] over the first n_rows of a layer's caches; mask as in graph_attention
static struct ggml_tensor * cache_attention(const decoder * d, int32_t il, struct ggml_tensor * q,
                                            struct ggml_tensor * k, struct ggml_tensor * v, int64_t n_rows,
                                            struct ggml_tensor * mask) {
    cpu_cache_attention * a = &d->tg->attention[il];
    a->items[0] = (cpu_cache_item) {
        .k = k, .v = v, .n_columns = q->ne[1], .n_rows = n_rows, .mask = mask ? 0 : -1,
    };
    a->n_items = 1;
    if (cpu_cache_attention_fits(a)) {
        graph_add_tasks(d->g, &a->tasks);
        return cpu_cache_attention_node(d->g->ctx, a, q, mask);
    }
    return graph_attention(d->g, q, cache_view(d, k, n_rows), cache_view(d, v, n_rows), mask, d->p->n_head);
}

static struct ggml_tensor * rope(const decoder * d, const text_layer * l, struct ggml_tensor * x, int64_t n_head) {
    struct ggml_context * ctx = d->g->ctx;
    const int64_t         n   = x->ne[1];
    x = ggml_reshape_3d(ctx, x, d->p->head_dim, n_head, n);
    x = ggml_rope_ext(ctx, x, d->tg->positions, l->rope_freqs ? l->rope_freqs : d->model->rope_freqs, d->p->rope_dim,
                      GGML_ROPE_TYPE_NORMAL, 0, d->p->rope_freq_base, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f);
    return ggml_reshape_2d(ctx, x, d->p->head_dim * n_head, n);
}

static struct ggml_tensor * self_attention(const decoder * d, const text_layer * l, int32_t il,
                                           struct ggml_tensor * x) {
    graph *               g   = d->g;
    struct ggml_context * ctx = g->ctx;

    struct ggml_tensor * q = graph_named(rope(d, l, graph_linear(g, l->q, x), d->p->n_head), "blk", il, "q");
    struct ggml_tensor * k = graph_named(rope(d, l, graph_linear(g, l->k, x), d->p->n_head_kv), "blk", il, "k");
    struct ggml_tensor * v = graph_named(graph_linear(g, l->v, x), "blk", il, "v");
    ggml_build_forward_expand(g->gf, q);
    ggml_build_forward_expand(g->gf, ggml_set_rows(ctx, d->cache->k[il], k, d->tg->cells));
    ggml_build_forward_expand(g->gf, ggml_set_rows(ctx, d->cache->v[il], rounded(ctx, d->cache, il, v), d->tg->cells));

    return cache_attention(d, il, q, d->cache->k[il], d->cache->v[il], d->tg->shape.n_kv, d->tg->mask);
}

static struct ggml_tensor * cross_attention(const decoder * d, const text_layer * l, int32_t il,
                                            struct ggml_tensor * x) {
    graph *               g   = d->g;
    struct ggml_context * ctx = g->ctx;
    const int64_t         n   = x->ne[1], n_q = (int64_t) d->p->head_dim * d->p->n_head;

    struct ggml_tensor * q = ggml_reshape_3d(ctx, graph_linear(g, l->q, x), d->p->head_dim, d->p->n_head, n);
    q = ggml_reshape_2d(ctx, graph_rms_norm(g, q, l->q_norm, d->p->rms_eps), n_q, n);
    graph_named(q, "blk", il, "cross_q");
    return cache_attention(d, il, q, d->slot->kv.k[il], d->slot->kv.v[il], d->tg->shape.n_rows, NULL);
}

// The last column, or all of them
static struct ggml_tensor * wanted_columns(const decoder * d, struct ggml_tensor * x) {
    if (d->tg->shape.logits != MLLAMA_LOGITS_LAST || x->ne[1] == 1) {
        return x;
    }
    return ggml_view_2d(d->g->ctx, x, x->ne[0], 1, x->nb[1], x->nb[1] * (size_t) (x->ne[1] - 1));
}

// x [n_embd, n] -> [n_embd, n], or only the wanted columns after the last layer
static struct ggml_tensor * decoder_layer(const decoder * d, int32_t il, struct ggml_tensor * x) {
    graph *               g   = d->g;
    struct ggml_context * ctx = g->ctx;
    const text_layer *    l   = &d->model->layers[il];

    struct ggml_tensor * norm = graph_named(graph_rms_norm(g, x, l->attn_norm, d->p->rms_eps), "blk", il, "attn_norm");
    struct ggml_tensor * attn = l->is_cross ? cross_attention(d, l, il, norm) : self_attention(d, l, il, norm);
    if (il == d->p->n_layer - 1) {
        attn = wanted_columns(d, attn);
        x    = wanted_columns(d, x);
    }
    attn = graph_named(graph_linear(g, l->o, attn), "blk", il, "attn_out");
    if (l->is_cross) {
        attn = ggml_scale(ctx, attn, l->attn_gate);
    }
    x = graph_named(ggml_add(ctx, x, attn), "blk", il, "attn_residual");

    norm = graph_named(graph_rms_norm(g, x, l->ffn_norm, d->p->rms_eps), "blk", il, "ffn_norm");
    struct ggml_tensor * ffn = graph_linear(g, l->ffn_gate, norm);
    ffn = ggml_swiglu_split(ctx, ffn, graph_linear(g, l->ffn_up, norm));
    ffn = graph_named(graph_linear(g, l->ffn_down, ffn), "blk", il, "ffn_out");
    if (l->is_cross) {
        ffn = ggml_scale(ctx, ffn, l->mlp_gate);
    }
    return graph_named(ggml_add(ctx, x, ffn), "blk", il, "layer_out");
}

static struct ggml_tensor * input(graph * g, enum ggml_type type, int64_t ne0, int64_t ne1, const char * name) {
    struct ggml_tensor * t = ggml_new_tensor_2d(g->ctx, type, ne0, ne1);
    ggml_set_input(graph_named(t, "text", -1, name));
    return t;
}

mllama_status text_graph_build(const mllama_model * model, const kv_cache * cache, const image_slot * slot,
                               const text_shape * shape, const compute_env * env, text_graph * tg) {
    const mllama_hparams * p = &model->hp.pub;
    memset(tg, 0, sizeof(*tg));
    tg->attention = calloc((size_t) p->n_layer, sizeof(*tg->attention));
    tg->items     = calloc((size_t) p->n_layer, sizeof(*tg->items));
    if (!tg->attention || !tg->items) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    for (int32_t il = 0; il < p->n_layer; il++) {
        tg->attention[il] = (cpu_cache_attention) {
            .kernel = env->kernel, .n_head = p->n_head, .n_head_kv = p->n_head_kv, .head_dim = p->head_dim,
            .items = &tg->items[il],
        };
    }
    // Batches of many tokens are cut into blocks, which adds nodes.
    TRY(graph_init(&tg->g, 256 + (size_t) p->n_layer * (128 + (size_t) shape->n_tokens), env));
    graph * g = &tg->g;
    TRY(graph_use_products(g, 7 * (size_t) p->n_layer + 1));
    tg->shape     = *shape;
    tg->tokens    = input(g, GGML_TYPE_I32, shape->n_tokens, 1, "tokens");
    tg->positions = input(g, GGML_TYPE_I32, shape->n_tokens, 1, "positions");
    tg->cells     = input(g, GGML_TYPE_I64, shape->n_tokens, 1, "cells");
    tg->mask      = input(g, GGML_TYPE_F16, shape->n_kv, shape->n_tokens, "mask");

    const decoder        d = { .g = g, .model = model, .p = p, .cache = cache, .slot = slot, .tg = tg };
    struct ggml_tensor * x = ggml_get_rows(g->ctx, model->token_embd, tg->tokens);
    graph_named(x, "text", -1, "token_embd");
    for (int32_t il = 0; il < p->n_layer; il++) {
        if (model->layers[il].is_cross && !slot) {
            if (il == p->n_layer - 1) {
                x = wanted_columns(&d, x);
            }
            continue; // a token that sees no image passes through unchanged
        }
        x = decoder_layer(&d, il, x);
    }
    if (shape->logits != MLLAMA_LOGITS_NONE) {
        x = graph_named(graph_rms_norm(g, x, model->output_norm, p->rms_eps), "text", -1, "output_norm");
        tg->last = x;
        x = graph_named(graph_linear(g, model->output, x), "text", -1, "logits");
        ggml_set_output(x);
        tg->logits = x;
    } else {
        tg->last = x;
    }
    ggml_set_output(tg->last);
    ggml_build_forward_expand(g->gf, x);
    return MLLAMA_OK;
}

void text_graph_free(text_graph * tg) {
    free(tg->attention);
    free(tg->items);
    tg->attention = NULL;
    tg->items     = NULL;
    graph_free(&tg->g);
}

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
    TRY(graph_init(&fg->g, 64 + (size_t) p->n_cross_layers * (32 + 4 * (size_t) n_rows / 16), env));
    TRY(graph_use_products(&fg->g, 2 * (size_t) p->n_cross_layers));
    graph *               g   = &fg->g;
    struct ggml_context * ctx = g->ctx;
    fg->states = input(g, GGML_TYPE_F32, p->n_embd, n_rows, "states");

    for (int32_t i = 0; i < p->n_cross_layers; i++) {
        const int32_t        il = model->hp.cross_layers[i];
        const text_layer *   l  = &model->layers[il];
        struct ggml_tensor * k  = graph_linear(g, l->k, fg->states);
        k = ggml_reshape_3d(ctx, k, p->head_dim, p->n_head_kv, n_rows);
        k = ggml_reshape_2d(ctx, graph_rms_norm(g, k, l->k_norm, p->rms_eps), n_embd, n_rows);
        graph_named(k, "blk", il, "cross_k");
        struct ggml_tensor * v = graph_named(graph_linear(g, l->v, fg->states), "blk", il, "cross_v");
        v = rounded(ctx, &slot->kv, il, v);
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
