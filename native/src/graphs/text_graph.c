// Llama 3 with cross-attention layers (llama_models/llama3/multimodal/model.py).
//
// One graph computes items: some tokens of a sequence, one after the other, that see the same images. What an item's
// tokens see:
//
//                                  self-attention layer: the cells of its cache      cross-attention layer: its slot
//
//                                  0 .. n_past - 1   n_past ...       .. n_kv        rows of images       others
//     token 0 of the item          seen              seen  .    .     .              seen                 .
//     token 1                      seen              seen  seen .     .              seen                 .
//     token 2                      seen              seen  seen seen  .              seen                 .
//
//     written by this graph        no                yes              no             no: by fill_graph    no
//
// The mask hides cells: those after the token itself, and the rest of n_kv, which is rounded up so that one graph
// serves many tokens. Cross-attention has no mask: every token of the item sees the first n_rows rows of the slot, all
// rows of the images before it. Tokens before the first image see none: for them the cross-attention layers are left
// out, and x passes through them unchanged. Text after another image needs another item, with another n_rows or slot.
//
// Several items are sequences that compute together: the weights are read once for all their columns. Columns:
//
//     item 0 ... with images, same slot next to each other ... | items without images ...
//     <------------- cross-attention layers compute these ----->
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
#include "graphs/text_graph.h"

#include <stdlib.h>
#include <string.h>

typedef struct decoder {
    graph *                g;
    const mllama_model *   model;
    const mllama_hparams * p;
    text_graph *           tg;
    int64_t                n_seeing; // columns that see images: the first ones
} decoder;

// The first n_kv rows of a cache tensor as [head_dim, n_kv, n_head_kv]
static struct ggml_tensor * cache_view(const decoder * d, struct ggml_tensor * cache, int64_t n_kv) {
    const int64_t head_dim = d->p->head_dim;
    return ggml_view_3d(d->g->ctx, cache, head_dim, n_kv, d->p->n_head_kv, cache->nb[1],
                        ggml_row_size(cache->type, head_dim), 0);
}

static struct ggml_tensor * columns(const decoder * d, struct ggml_tensor * x, int64_t first, int64_t n) {
    if (n == x->ne[1]) {
        return x;
    }
    return ggml_view_2d(d->g->ctx, x, x->ne[0], n, x->nb[1], x->nb[1] * (size_t) first);
}

static void share_inputs(text_graph * tg) {
    struct ggml_context * ctx  = tg->g.ctx;
    size_t                cell = 0, mask = 0;
    for (int32_t i = 0; i < tg->n_items; i++) {
        const text_item * item = &tg->items[i];
        const bool        all  = tg->n_items == 1;
        tg->item_cells[i] = all ? tg->cells : ggml_view_1d(ctx, tg->cells, item->n_tokens, cell);
        tg->item_masks[i] = all ? tg->mask
                                : ggml_view_2d(ctx, tg->mask, item->n_kv, item->n_tokens,
                                               sizeof(ggml_fp16_t) * (size_t) item->n_kv, mask);
        cell += tg->cells->nb[0] * (size_t) item->n_tokens;
        mask += sizeof(ggml_fp16_t) * (size_t) (item->n_tokens * item->n_kv);
    }
}

// Attention of the items from..to - 1 by ggml's operations, joined in halves
static struct ggml_tensor * attend_items(const decoder * d, struct ggml_tensor * q, const cpu_cache_item * items,
                                         int64_t from, int64_t to) {
    if (to - from > 1) {
        const int64_t        half = from + (to - from) / 2;
        struct ggml_tensor * left = attend_items(d, q, items, from, half);
        return ggml_concat(d->g->ctx, left, attend_items(d, q, items, half, to), 1);
    }
    const cpu_cache_item * item = &items[from];
    return graph_attention(d->g, columns(d, q, item->column, item->n_columns), cache_view(d, item->k, item->n_rows),
                           cache_view(d, item->v, item->n_rows), item->mask < 0 ? NULL : d->tg->item_masks[from],
                           d->p->n_head);
}

// q [head_dim * n_head, n] over the rows of the items of a layer, which are set
static struct ggml_tensor * cache_attention(const decoder * d, int32_t il, struct ggml_tensor * q,
                                            struct ggml_tensor * mask) {
    cpu_cache_attention * a = &d->tg->attention[il];
    if (cpu_cache_attention_fits(a)) {
        graph_add_tasks(d->g, &a->tasks);
        return cpu_cache_attention_node(d->g->ctx, a, q, mask);
    }
    return attend_items(d, q, a->items, 0, a->n_items);
}

static struct ggml_tensor * rope(const decoder * d, const text_layer * l, struct ggml_tensor * x, int64_t n_head) {
    struct ggml_context * ctx = d->g->ctx;
    const int64_t         n   = x->ne[1];
    x = ggml_reshape_3d(ctx, x, d->p->head_dim, n_head, n);
    x = ggml_rope_ext(ctx, x, d->tg->positions, l->rope_freqs ? l->rope_freqs : d->model->rope_freqs, d->p->rope_dim,
                      GGML_ROPE_TYPE_NORMAL, 0, d->p->rope_freq_base, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f);
    return ggml_reshape_2d(ctx, x, d->p->head_dim * n_head, n);
}

// Writes an item's keys and values into its cache.
static void store(const decoder * d, int32_t il, const cpu_cache_item * item, struct ggml_tensor * k,
                  struct ggml_tensor * v) {
    struct ggml_context * ctx   = d->g->ctx;
    const kv_cache *      cache = d->tg->items[item - d->tg->attention[il].items].cache;
    struct ggml_tensor *  cells = d->tg->item_cells[item - d->tg->attention[il].items];
    k = columns(d, k, item->column, item->n_columns);
    v = columns(d, v, item->column, item->n_columns);
    ggml_build_forward_expand(d->g->gf, ggml_set_rows(ctx, item->k, k, cells));
    ggml_build_forward_expand(d->g->gf, ggml_set_rows(ctx, item->v, kv_cache_rounded(ctx, cache, il, v), cells));
}

static struct ggml_tensor * self_attention(const decoder * d, const text_layer * l, int32_t il,
                                           struct ggml_tensor * x) {
    graph *               g  = d->g;
    cpu_cache_attention * a  = &d->tg->attention[il];
    struct ggml_tensor *  q  = graph_named(rope(d, l, graph_linear(g, l->q, x), d->p->n_head), "blk", il, "q");
    struct ggml_tensor *  k  = graph_named(rope(d, l, graph_linear(g, l->k, x), d->p->n_head_kv), "blk", il, "k");
    struct ggml_tensor *  v  = graph_named(graph_linear(g, l->v, x), "blk", il, "v");
    int64_t               at = 0, mask = 0;
    ggml_build_forward_expand(g->gf, q);
    for (int32_t i = 0; i < d->tg->n_items; i++) {
        const text_item * item = &d->tg->items[i];
        a->items[i] = (cpu_cache_item) {
            .k = item->cache->k[il], .v = item->cache->v[il], .column = at, .n_columns = item->n_tokens,
            .n_rows = item->n_kv, .mask = mask,
        };
        store(d, il, &a->items[i], k, v);
        at   += item->n_tokens;
        mask += item->n_tokens * item->n_kv;
    }
    a->n_items = d->tg->n_items;
    return cache_attention(d, il, q, d->tg->mask);
}

// x: the columns that see images
static struct ggml_tensor * cross_attention(const decoder * d, const text_layer * l, int32_t il,
                                            struct ggml_tensor * x) {
    graph *               g   = d->g;
    struct ggml_context * ctx = g->ctx;
    const int64_t         n   = x->ne[1], n_q = (int64_t) d->p->head_dim * d->p->n_head;
    cpu_cache_attention * a   = &d->tg->attention[il];

    struct ggml_tensor * q = ggml_reshape_3d(ctx, graph_linear(g, l->q, x), d->p->head_dim, d->p->n_head, n);
    q = ggml_reshape_2d(ctx, graph_rms_norm(g, q, l->q_norm, d->p->rms_eps), n_q, n);
    graph_named(q, "blk", il, "cross_q");
    a->n_items = 0;
    for (int64_t at = 0, i = 0; at < n; at += d->tg->items[i++].n_tokens) {
        const text_item * item = &d->tg->items[i];
        cpu_cache_item *  last = &a->items[a->n_items - (a->n_items > 0)];
        if (a->n_items > 0 && last->k == item->slot->kv.k[il] && last->n_rows == item->n_rows) {
            last->n_columns += item->n_tokens; // they read the rows once
            continue;
        }
        a->items[a->n_items++] = (cpu_cache_item) {
            .k = item->slot->kv.k[il], .v = item->slot->kv.v[il], .column = at, .n_columns = item->n_tokens,
            .n_rows = item->n_rows, .mask = -1,
        };
    }
    return cache_attention(d, il, q, NULL);
}

// The columns of text_graph_columns, of x with a column for each token
static struct ggml_tensor * wanted_columns(const decoder * d, struct ggml_tensor * x) {
    const text_graph * tg = d->tg;
    if (tg->wanted) {
        return ggml_get_rows(d->g->ctx, x, tg->wanted);
    }
    return tg->n_items > 1 || tg->items[0].logits == MLLAMA_LOGITS_ALL ? x : columns(d, x, x->ne[1] - 1, 1);
}

// x [n_embd, n] -> [n_embd, n], or only the wanted columns after the last layer. That layer's caches hold all of them,
// so what follows its attention is computed for the wanted ones alone.
static struct ggml_tensor * decoder_layer(const decoder * d, int32_t il, struct ggml_tensor * x) {
    graph *               g   = d->g;
    struct ggml_context * ctx = g->ctx;
    const text_layer *    l   = &d->model->layers[il];

    struct ggml_tensor * norm = graph_named(graph_rms_norm(g, x, l->attn_norm, d->p->rms_eps), "blk", il, "attn_norm");
    struct ggml_tensor * attn = l->is_cross ? cross_attention(d, l, il, norm) : self_attention(d, l, il, norm);
    if (il == d->p->n_layer - 1 && x->ne[1] == d->tg->n_tokens) {
        attn = wanted_columns(d, attn);
        x    = wanted_columns(d, x);
        graph_watch_from(g, (size_t) d->tg->n_tokens);
    }
    graph_watch_factor(g, l->o, attn);
    attn = graph_named(graph_linear(g, l->o, attn), "blk", il, "attn_out");
    if (l->is_cross) {
        attn = ggml_scale(ctx, attn, l->attn_gate);
    }
    x = graph_named(ggml_add(ctx, x, attn), "blk", il, "attn_residual");

    norm = graph_named(graph_rms_norm(g, x, l->ffn_norm, d->p->rms_eps), "blk", il, "ffn_norm");
    struct ggml_tensor * ffn = graph_linear(g, l->ffn_gate, norm);
    ffn = ggml_swiglu_split(ctx, ffn, graph_linear(g, l->ffn_up, norm));
    graph_watch_factor(g, l->ffn_down, ffn);
    ffn = graph_named(graph_linear(g, l->ffn_down, ffn), "blk", il, "ffn_out");
    if (l->is_cross) {
        ffn = ggml_scale(ctx, ffn, l->mlp_gate);
    }
    return graph_named(ggml_add(ctx, x, ffn), "blk", il, "layer_out");
}

// A cross-attention layer changes the columns that see images; the others pass through.
static struct ggml_tensor * cross_layer(const decoder * d, int32_t il, struct ggml_tensor * x) {
    const int64_t n = x->ne[1];
    if (d->n_seeing == n) {
        return decoder_layer(d, il, x);
    }
    if (d->n_seeing > 0) {
        struct ggml_tensor * seeing = decoder_layer(d, il, columns(d, x, 0, d->n_seeing));
        x = ggml_concat(d->g->ctx, seeing, columns(d, x, d->n_seeing, n - d->n_seeing), 1);
    }
    return il == d->p->n_layer - 1 ? wanted_columns(d, x) : x;
}

int64_t text_graph_columns(const text_shape * shape, int32_t * columns) {
    int64_t n = 0;
    for (int32_t logits = 1; logits >= 0; logits--) { // the wanted ones, then the others
        int64_t at = 0;
        for (int32_t i = 0; i < shape->n_items; i++) {
            const text_item * item  = &shape->items[i];
            const int64_t     first = item->logits == MLLAMA_LOGITS_ALL ? 0 : item->n_tokens - 1;
            for (int64_t j = first; j < item->n_tokens && (item->logits != MLLAMA_LOGITS_NONE) == (logits == 1); j++) {
                if (columns) {
                    columns[n] = (int32_t) (at + j);
                }
                n++;
            }
            at += item->n_tokens;
        }
    }
    return n;
}

bool text_graph_serves(const text_graph * tg, const text_shape * shape) {
    if (!tg->g.ctx || tg->n_items != shape->n_items) {
        return false;
    }
    for (int32_t i = 0; i < shape->n_items; i++) {
        const text_item * a = &tg->items[i], * b = &shape->items[i];
        if (a->cache != b->cache || a->generation != b->generation || a->slot != b->slot ||
            a->slot_generation != b->slot_generation || a->n_tokens != b->n_tokens || a->n_kv != b->n_kv ||
            a->n_rows != b->n_rows || a->logits != b->logits) {
            return false;
        }
    }
    return true;
}

static mllama_status prepare(const mllama_model * model, const text_shape * shape, const compute_env * env,
                             text_graph * tg) {
    const mllama_hparams * p       = &model->hp.pub;
    const size_t           n_layer = (size_t) p->n_layer, n_items = (size_t) shape->n_items;
    memset(tg, 0, sizeof(*tg));
    tg->n_items     = shape->n_items;
    tg->items       = malloc(n_items * sizeof(*tg->items));
    tg->attention   = calloc(n_layer, sizeof(*tg->attention));
    tg->cache_items = calloc(n_layer * n_items, sizeof(*tg->cache_items));
    tg->item_cells  = calloc(n_items, sizeof(*tg->item_cells));
    tg->item_masks  = calloc(n_items, sizeof(*tg->item_masks));
    if (!tg->items || !tg->attention || !tg->cache_items || !tg->item_cells || !tg->item_masks) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    memcpy(tg->items, shape->items, n_items * sizeof(*tg->items));
    for (size_t i = 0; i < n_items; i++) {
        tg->n_tokens += tg->items[i].n_tokens;
        tg->n_logits += text_n_logits(tg->items[i].logits, tg->items[i].n_tokens);
    }
    for (size_t il = 0; il < n_layer; il++) {
        tg->attention[il] = (cpu_cache_attention) {
            .kernel = env->kernel, .n_head = p->n_head, .n_head_kv = p->n_head_kv, .head_dim = p->head_dim,
            .items = &tg->cache_items[il * n_items], .many = n_items > 1,
        };
    }
    return MLLAMA_OK;
}

static void add_inputs(text_graph * tg) {
    graph * g    = &tg->g;
    int64_t mask = 0;
    for (int32_t i = 0; i < tg->n_items; i++) {
        mask += tg->items[i].n_tokens * tg->items[i].n_kv;
    }
    tg->tokens    = graph_input(g, GGML_TYPE_I32, tg->n_tokens, 1, "tokens");
    tg->positions = graph_input(g, GGML_TYPE_I32, tg->n_tokens, 1, "positions");
    tg->cells     = graph_input(g, GGML_TYPE_I64, tg->n_tokens, 1, "cells");
    const int64_t n = tg->n_items == 1 ? tg->n_tokens : 1;
    tg->mask = graph_input(g, GGML_TYPE_F16, mask / n, n, "mask");
    const int64_t n_wanted = text_graph_columns(&(text_shape) { .n_items = tg->n_items, .items = tg->items }, NULL);
    if (tg->n_items > 1 && (n_wanted < tg->n_tokens || (tg->n_logits > 0 && tg->n_logits < n_wanted))) {
        tg->wanted = graph_input(g, GGML_TYPE_I32, n_wanted, 1, "wanted");
    }
}

mllama_status text_graph_build(const mllama_model * model, const text_shape * shape, const compute_env * env,
                               text_graph * tg) {
    const mllama_hparams * p = &model->hp.pub;
    TRY(prepare(model, shape, env, tg));
    decoder d = { .g = &tg->g, .model = model, .p = p, .tg = tg };
    for (int32_t i = 0; i < tg->n_items; i++) {
        d.n_seeing += tg->items[i].n_rows > 0 ? tg->items[i].n_tokens : 0;
    }
    TRY(graph_init(&tg->g, text_graph_most_nodes(p, tg->n_tokens, tg->n_items), env, model->token_embd));
    graph * g = &tg->g;
    TRY(graph_use_products(g, 7 * (size_t) p->n_layer + 1));
    TRY(graph_use_watch(g, 2 * (size_t) tg->n_tokens)); // the tokens, and then the columns of `last`
    add_inputs(tg);
    share_inputs(tg);

    struct ggml_tensor * x = ggml_get_rows(g->ctx, model->token_embd, tg->tokens);
    graph_named(x, "text", -1, "token_embd");
    // A column stays not finite once it is so, whatever is added to it, but products with quantized weights keep that
    // from the columns after it. So all columns are looked at: as they begin, and on the CPU before the last layer.
    if (tg->n_tokens > tg->n_items && ggml_is_quantized(model->layers[0].q->type)) {
        graph_watch(g, x);
    }
    for (int32_t il = 0; il < p->n_layer; il++) {
        if (tg->n_tokens > tg->n_items && il == p->n_layer - 1) {
            graph_watch_factor(g, model->layers[il].q, x);
        }
        x = model->layers[il].is_cross ? cross_layer(&d, il, x) : decoder_layer(&d, il, x);
    }
    if (tg->n_logits > 0) {
        x = graph_named(graph_rms_norm(g, x, model->output_norm, p->rms_eps), "text", -1, "output_norm");
        tg->last = x;
        x = graph_named(graph_linear(g, model->output, columns(&d, x, 0, tg->n_logits)), "text", -1, "logits");
        ggml_set_output(x);
        tg->logits = x;
    } else {
        tg->last = x;
    }
    ggml_set_output(tg->last);
    ggml_build_forward_expand(g->gf, x);
    return MLLAMA_OK;
}

// Batches of many tokens are cut into blocks, which adds nodes for each of the seven products.
size_t text_graph_most_nodes(const mllama_hparams * p, int64_t n_tokens, int64_t n_items) {
    const int64_t n_q    = (int64_t) p->head_dim * p->n_head, n_ff = p->n_ff;
    const int64_t blocks = graph_block_nodes(7, p->n_embd, n_ff > n_q ? n_ff : n_q, n_tokens);
    const int64_t cut    = blocks > n_tokens ? blocks : n_tokens;
    return 256 + (size_t) p->n_layer * (160 + (size_t) cut + 40 * (size_t) n_items);
}

void text_graph_free(text_graph * tg) {
    free(tg->items);
    free(tg->attention);
    free(tg->cache_items);
    free(tg->item_cells);
    free(tg->item_masks);
    tg->item_cells  = NULL;
    tg->item_masks  = NULL;
    tg->items       = NULL;
    tg->attention   = NULL;
    tg->cache_items = NULL;
    graph_free(&tg->g);
}
