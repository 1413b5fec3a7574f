// Meta's encoder (llama_models/llama3/multimodal/image_transform.py and model.py), with its attention mask replaced by
// an order.
//
// A position is a pad if it is a pad row of a used tile or any row of an unused tile. Only pad-to-pad pairs are masked:
// real queries attend to every key, pad queries to the real keys. With the tokens ordered
//
//     [rows of used tiles | rows of unused tiles | pad rows of all tiles]        n_real = P * n_tiles come first
//
// those are two plain attention calls over contiguous views. Attention does not depend on the order of its keys.
//
// Unused tiles are black, and in the published models their rows of the tile tables are zero: they begin alike, and as
// they see the same keys they stay alike. Then one of them is computed, and counts as all of them where it is a key.
#include "graphs/vision_graph.h"

#include "guard.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_NODES = 1 << 20 }; // ten times as many as the 11B model takes

typedef struct encoder {
    graph *                g;
    const mllama_model *   model;
    const mllama_hparams * p;
    int64_t                n_used, tiles; // tiles of the image; tiles that are computed
    int64_t                n_real;        // tokens that are not pads
    compute_env            env;           // kernel NULL: ggml's own operations
    vision_attention *     attention;
    cpu_attention *        next_attention;
    cpu_linear *           next_linear;
} encoder;

void vision_patches(const mllama_hparams * p, const float * pixels, int32_t n_used, int32_t n_tiles, float * patches) {
    const int64_t size = p->image_size, patch = p->patch_size, side = size / patch;
    float *       out  = patches;
    for (int64_t tile = 0; tile < n_used; tile++) {
        for (int64_t row = 0; row < side; row++) {
            for (int64_t column = 0; column < side; column++) {
                for (int64_t channel = 0; channel < 3; channel++) {
                    const float * in = pixels + ((tile * 3 + channel) * size + row * patch) * size + column * patch;
                    for (int64_t y = 0; y < patch; y++, in += size, out += patch) {
                        memcpy(out, in, (size_t) patch * sizeof(float));
                    }
                }
            }
        }
    }
    memset(out, 0, (size_t) ((n_tiles - n_used) * side * side * patch * patch * 3) * sizeof(float));
}

static cpu_attention * new_attention(encoder * e, bool bf16) {
    graph_add_tasks(e->g, &e->next_attention->tasks);
    e->next_attention->bf16 = bf16;
    return e->next_attention++;
}

static cpu_linear * new_linear(encoder * e) {
    graph_add_tasks(e->g, &e->next_linear->tasks);
    return e->next_linear++;
}

// W x + b; b NULL: none
static struct ggml_tensor * project(encoder * e, struct ggml_tensor * w, struct ggml_tensor * b,
                                    struct ggml_tensor * x) {
    if (cpu_linear_supported(e->env.kernel, w)) {
        return cpu_linear_node(e->g->ctx, new_linear(e), w, b, x);
    }
    return b ? graph_linear_bias(e->g, w, b, x) : graph_linear(e->g, w, x);
}

// The row of a table for this aspect ratio, as [n_embd, rows, tiles], times its gate.
static struct ggml_tensor * table_row(encoder * e, struct ggml_tensor * table, struct ggml_tensor * id, float gate) {
    struct ggml_context * ctx = e->g->ctx;
    struct ggml_tensor *  row = ggml_get_rows(ctx, table, id);
    const int64_t         n   = e->p->vision_embd, rows = table->ne[0] / n / e->p->max_tiles;
    const size_t          nb1 = ggml_row_size(row->type, n), nb2 = ggml_row_size(row->type, n * rows);
    return ggml_scale(ctx, ggml_view_3d(ctx, row, n, rows, e->tiles, nb1, nb2, 0), gate);
}

// -> [n_embd, P, tiles]: what each position of each tile is before the first layer
static struct ggml_tensor * embed(encoder * e, vision_graph * vg) {
    struct ggml_context *  ctx     = e->g->ctx;
    const vision_weights * v       = &e->model->vision;
    const mllama_hparams * p       = e->p;
    const int64_t          n_embd  = p->vision_embd, n_patches = p->n_positions - 1, tiles = e->tiles;
    const int64_t          n_pixel = (int64_t) p->patch_size * p->patch_size * 3;

    struct ggml_tensor * kernel  = ggml_reshape_2d(ctx, v->patch_embd, n_pixel, n_embd);
    struct ggml_tensor * patches = ggml_reshape_2d(ctx, vg->patches, n_pixel, n_patches * tiles);
    struct ggml_tensor * x       = project(e, kernel, NULL, patches);
    x = graph_named(ggml_reshape_3d(ctx, x, n_embd, n_patches, tiles), "v", -1, "patch_embd");
    x = ggml_add(ctx, x, table_row(e, v->pre_tile_embd, vg->aspect_ratio_id, v->pre_tile_gate));
    graph_named(x, "v", -1, "pre_tile_embd");

    struct ggml_tensor * class_embd = ggml_reshape_3d(ctx, v->class_embd, n_embd, 1, 1);
    class_embd = ggml_repeat_4d(ctx, class_embd, n_embd, 1, tiles, 1);
    x = ggml_concat(ctx, class_embd, x, 1);

    x = ggml_add(ctx, x, ggml_scale(ctx, v->position_embd, v->position_gate));
    x = ggml_add(ctx, x, table_row(e, v->tile_position_embd, vg->aspect_ratio_id, v->tile_position_gate));
    x = graph_named(x, "v", -1, "position_embd");
    return graph_named(graph_layer_norm(e->g, x, v->pre_ln, v->pre_ln_b, p->vision_eps), "v", -1, "pre_ln");
}

typedef struct mlp_args {
    encoder *            e;
    const vision_layer * layer;
    bool                 whole; // all columns in one node, by our own products
} mlp_args;

static struct ggml_tensor * mlp(graph * g, struct ggml_tensor * x, void * arg) {
    const mlp_args *     args = arg;
    const vision_layer * l    = args->layer;
    encoder *            e    = args->e;
    if (args->whole) {
        cpu_linear * a = new_linear(e), * b = new_linear(e);
        return cpu_mlp_node(g->ctx, a, l->fc1, l->fc1_b, b, l->fc2, l->fc2_b, x, e->env.n_threads);
    }
    if (e->env.kernel) {
        x = cpu_bias_gelu_node(g->ctx, e->env.kernel, graph_linear(g, l->fc1, x), l->fc1_b);
    } else {
        x = graph_linear_bias(g, l->fc1, l->fc1_b, x);
        x = ggml_gelu_erf(g->ctx, x); // ggml_gelu goes through a table of 16-bit values
    }
    return graph_linear_bias(g, l->fc2, l->fc2_b, x);
}

// x + gate * y; the gates of local layers are 1
static struct ggml_tensor * add_gated(graph * g, struct ggml_tensor * x, struct ggml_tensor * y, float gate) {
    return ggml_add(g->ctx, x, gate == 1.0f ? y : ggml_scale(g->ctx, y, gate));
}

// x [n_embd, n_all] -> [n_embd, n_all], or [n_embd, n_real] when nobody reads the pads afterwards
static struct ggml_tensor * encoder_layer(encoder * e, const vision_layer * l, const char * prefix, int32_t il,
                                          struct ggml_tensor * x, bool only_real) {
    graph *               g      = e->g;
    struct ggml_context * ctx    = g->ctx;
    const int64_t         n_embd = x->ne[0];

    struct ggml_tensor * norm = graph_layer_norm(g, x, l->attn_norm, l->attn_norm_b, e->p->vision_eps);
    graph_named(norm, prefix, il, "attn_norm");
    struct ggml_tensor * k    = project(e, l->k, NULL, norm);
    struct ggml_tensor * v    = project(e, l->v, NULL, norm);
    if (only_real) {
        norm = ggml_view_2d(ctx, norm, n_embd, e->n_real, norm->nb[1], 0);
        x    = ggml_view_2d(ctx, x, n_embd, e->n_real, x->nb[1], 0);
    }
    struct ggml_tensor * q    = project(e, l->q, NULL, norm);
    const bool           bf16 = cpu_in_bf16(e->env.kernel, l->q->type);
    struct ggml_tensor * attn = cpu_attention_supported(e->env.kernel, bf16)
                                    ? cpu_attention_node(ctx, new_attention(e, bf16), q, k, v)
                                    : vision_attention_node(g, e->attention, q, k, v);
    attn = graph_named(project(e, l->o, NULL, attn), prefix, il, "attn_out");
    x    = graph_named(add_gated(g, x, attn, l->attn_gate), prefix, il, "attn_residual");

    norm = graph_named(graph_layer_norm(g, x, l->ffn_norm, l->ffn_norm_b, e->p->vision_eps), prefix, il, "ffn_norm");
    // Our own nodes can be interrupted while they work, and each packs its weights.
    const cpu_kernel *   kernel = e->env.kernel;
    const bool           whole  = cpu_linear_supported(kernel, l->fc1) && cpu_linear_supported(kernel, l->fc2);
    const int64_t        block  = graph_block_columns(2.0 * (double) n_embd * (double) e->p->vision_ff);
    const int64_t        most   = whole ? norm->ne[1] : block;
    mlp_args             args   = { .e = e, .layer = l, .whole = whole };
    struct ggml_tensor * out    = graph_in_blocks(g, norm, most, kernel != NULL, mlp, &args);
    return graph_named(add_gated(g, x, graph_named(out, prefix, il, "ffn_out"), l->ffn_gate), prefix, il, "layer_out");
}

// x [n_embd, n_all] plus the row of its tile: first P rows of each tile, then the pad rows of each tile
static struct ggml_tensor * add_post_tile(encoder * e, vision_graph * vg, struct ggml_tensor * x) {
    struct ggml_context * ctx    = e->g->ctx;
    const int64_t         n_embd = x->ne[0], tiles = e->tiles, positions = e->p->n_positions;
    const int64_t         pads   = e->p->n_positions_padded - positions;
    const vision_weights * v     = &e->model->vision;
    struct ggml_tensor *  post   = table_row(e, v->post_tile_embd, vg->aspect_ratio_id, v->post_tile_gate);

    const size_t         tile = x->nb[1] * (size_t) positions;
    struct ggml_tensor * rows = ggml_view_3d(ctx, x, n_embd, positions, tiles, x->nb[1], tile, 0);
    rows = ggml_reshape_2d(ctx, ggml_add(ctx, rows, post), n_embd, positions * tiles);
    if (pads == 0) {
        return rows;
    }
    struct ggml_tensor * pad_rows = ggml_view_3d(ctx, x, n_embd, pads, tiles, x->nb[1], x->nb[1] * (size_t) pads,
                                                 x->nb[1] * (size_t) (positions * tiles));
    pad_rows = ggml_reshape_2d(ctx, ggml_add(ctx, pad_rows, post), n_embd, pads * tiles);
    return ggml_concat(ctx, rows, pad_rows, 1);
}

// [final, intermediates] -> [n_embd * (1 + n), n_real], the intermediates interleaved value by value
static struct ggml_tensor * collect(encoder * e, struct ggml_tensor * final, struct ggml_tensor ** inputs) {
    struct ggml_context * ctx    = e->g->ctx;
    const int64_t         n_embd = final->ne[0], n = e->p->n_intermediate;
    if (n == 0) {
        return final;
    }
    if (e->env.kernel && n < CPU_INTERLEAVE_MAX) {
        struct ggml_tensor * all[CPU_INTERLEAVE_MAX] = { final };
        for (int64_t i = 0; i < n; i++) {
            struct ggml_tensor * x = inputs[e->model->hp.intermediate_layers[i]];
            all[1 + i] = ggml_view_2d(ctx, x, n_embd, e->n_real, x->nb[1], 0);
        }
        return cpu_interleave_node(ctx, all, 1 + n);
    }
    struct ggml_tensor * stack = NULL; // [n_embd, n_real, n]
    for (int64_t i = 0; i < n; i++) {
        struct ggml_tensor * x = inputs[e->model->hp.intermediate_layers[i]];
        x     = ggml_view_3d(ctx, x, n_embd, e->n_real, 1, x->nb[1], x->nb[1] * (size_t) e->n_real, 0);
        stack = stack ? ggml_concat(ctx, stack, x, 2) : x;
    }
    stack = ggml_cont_2d(ctx, ggml_permute(ctx, stack, 1, 2, 0, 3), n * n_embd, e->n_real);
    return ggml_concat(ctx, final, stack, 0);
}

static void build(encoder * e, vision_graph * vg, struct ggml_tensor ** inputs) {
    const mllama_hparams * p   = e->p;
    const vision_weights * v   = &e->model->vision;
    struct ggml_context *  ctx = e->g->ctx;
    const int64_t          pads = p->n_positions_padded - p->n_positions, n_patches = p->n_positions - 1;

    const int64_t n_pixel = (int64_t) p->patch_size * p->patch_size * 3;
    vg->patches = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_pixel, n_patches, e->tiles);
    ggml_set_input(graph_named(vg->patches, "v", -1, "patches"));
    vg->aspect_ratio_id = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 1);
    ggml_set_input(graph_named(vg->aspect_ratio_id, "v", -1, "aspect_ratio_id"));

    struct ggml_tensor * x = embed(e, vg);
    x = ggml_reshape_2d(ctx, x, p->vision_embd, (int64_t) p->n_positions * e->tiles);
    if (pads > 0) {
        x = ggml_pad(ctx, x, 0, (int) (pads * e->tiles), 0, 0);
    }
    for (int32_t il = 0; il < p->n_vision_layer; il++) {
        inputs[il] = x;
        x = encoder_layer(e, &v->local[il], "v.blk", il, x, false);
    }
    x = graph_named(graph_layer_norm(e->g, x, v->post_ln, v->post_ln_b, p->vision_eps), "v", -1, "post_ln");
    x = graph_named(add_post_tile(e, vg, x), "v", -1, "post_tile_embd");
    for (int32_t il = 0; il < p->n_vision_global_layer; il++) {
        x = encoder_layer(e, &v->global[il], "v.global.blk", il, x, il == p->n_vision_global_layer - 1);
    }
    x = ggml_view_2d(ctx, x, p->vision_embd, e->n_real, x->nb[1], 0);

    x = graph_named(collect(e, x, inputs), "v", -1, "features");
    vg->states = graph_named(project(e, v->projector, v->projector_b, x), "v", -1, "cross_attention_states");
    ggml_set_output(vg->states);
    ggml_build_forward_expand(e->g->gf, vg->states);
}

static mllama_status init_kernels(encoder * e, vision_graph * vg) {
    const mllama_hparams * p       = e->p;
    const size_t           n       = (size_t) p->n_vision_layer + (size_t) p->n_vision_global_layer;
    const size_t           linears = 6 * n + 2;
    vg->attentions = calloc(n + 1, sizeof(*vg->attentions));
    vg->linears    = calloc(linears, sizeof(*vg->linears));
    if (!vg->attentions || !vg->linears) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    for (size_t i = 0; i < n; i++) {
        cpu_attention * a = &vg->attentions[i];
        a->kernel    = e->env.kernel;
        a->n_head    = p->vision_head;
        a->head_dim  = p->vision_embd / p->vision_head;
        a->n_real    = e->n_real;
        a->n_all     = p->n_positions_padded * e->tiles;
        a->repeats   = (float) vg->attention.times;
        memcpy(a->repeated, vg->attention.repeated, sizeof(a->repeated));
    }
    for (size_t i = 0; i < linears; i++) {
        vg->linears[i].kernel = e->env.kernel;
    }
    e->next_attention = vg->attentions;
    e->next_linear    = vg->linears;
    return MLLAMA_OK;
}

// Whether all unused tiles have the same values in this row of a table
static mllama_status unused_alike(const struct ggml_tensor * table, int32_t row, int32_t n_used, int32_t n_tiles,
                                  bool * alike) {
    const size_t tile = table->nb[1] / (size_t) n_tiles, size = tile * (size_t) (n_tiles - n_used);
    char *       raw  = malloc(size);
    if (!raw) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    const mllama_status status = guard_get(table, raw, table->nb[1] * (size_t) row + tile * (size_t) n_used, size);
    *alike = *alike && status == MLLAMA_OK && memcmp(raw, raw + tile, size - tile) == 0;
    free(raw);
    return status;
}

static mllama_status count_tiles(const mllama_model * model, int32_t n_used, int32_t aspect_ratio_id,
                                 int32_t * n_tiles) {
    const vision_weights *     v        = &model->vision;
    const struct ggml_tensor * tables[] = { v->pre_tile_embd, v->post_tile_embd, v->tile_position_embd };
    bool                       alike    = aspect_ratio_id > 0;
    *n_tiles = model->hp.pub.max_tiles;
    for (int i = 0; i < 3 && n_used < *n_tiles && alike; i++) {
        TRY(unused_alike(tables[i], aspect_ratio_id, n_used, *n_tiles, &alike));
    }
    if (n_used < *n_tiles && alike) {
        *n_tiles = n_used + 1;
    }
    return MLLAMA_OK;
}

// Our own kernels are for an encoder in the CPU's memory.
static bool uses_kernel(const mllama_model * model) {
    const mllama_hparams * p = &model->hp.pub;
    return model->plan.vision == model->plan.cpu && cpu_kernel_has_head_dim(p->vision_embd / p->vision_head);
}

static void init_attention(const encoder * e, vision_attention * a) {
    const mllama_hparams * p         = e->p;
    const int64_t          positions = p->n_positions, pads = p->n_positions_padded - positions;
    a->n_real = e->n_real;
    a->n_all  = p->n_positions_padded * e->tiles;
    a->n_head = p->vision_head;
    a->times  = 1 + p->max_tiles - e->tiles;
    a->repeated[0][0] = positions * e->n_used;
    a->repeated[0][1] = positions * e->tiles;
    a->repeated[1][0] = a->repeated[0][1] + pads * e->n_used;
    a->repeated[1][1] = a->repeated[0][1] + pads * e->tiles;
}

mllama_status vision_graph_build(const mllama_model * model, int32_t n_used, int32_t aspect_ratio_id,
                                 const compute_env * env, vision_graph * vg) {
    const mllama_hparams * p = &model->hp.pub;
    memset(vg, 0, sizeof(*vg));
    TRY(count_tiles(model, n_used, aspect_ratio_id, &vg->n_tiles));
    // Blocks multiply the nodes of a layer, at most by the number of halvings of 2^10 pieces for the largest shapes.
    const double flop   = (double) p->n_positions_padded * p->max_tiles * p->vision_embd;
    const double keys   = (double) p->n_positions_padded * p->max_tiles * 4;
    const size_t blocks = 1 + (size_t) (flop * (keys + 8.0 * p->vision_ff) / 2e10 * 4);
    const size_t layer  = 96 + 8 * (size_t) p->max_tiles + 24 * blocks;
    const size_t layers = (size_t) (p->n_vision_layer + p->n_vision_global_layer);
    const size_t nodes  = 512 + 4 * (size_t) p->n_intermediate + layers * layer + 64 * blocks +
                         (size_t) (flop * (1 + p->n_intermediate) * p->n_embd * 2 / 2e10) * 16;
    if (nodes > MAX_NODES) {
        return fail(MLLAMA_ERR_FILE, "%s: %d layers over %d tiles of %d patches take %zu operations; at most %d are "
                    "supported", model->vision_file->path, p->n_vision_layer + p->n_vision_global_layer, p->max_tiles,
                    p->n_positions - 1, nodes, MAX_NODES);
    }
    TRY(graph_init(&vg->g, nodes, env, NULL));
    vg->g.device = model->plan.vision;

    struct ggml_tensor * inputs[1024]; // hparams allows no more layers
    encoder              e = { .g = &vg->g, .model = model, .p = p, .n_used = n_used, .tiles = vg->n_tiles,
                               .n_real = (int64_t) n_used * p->n_positions, .env = *env,
                               .attention = &vg->attention };
    init_attention(&e, &vg->attention);
    if (!uses_kernel(model)) {
        e.env.kernel = NULL;
    }
    if (e.env.kernel) {
        TRY(init_kernels(&e, vg));
    }
    build(&e, vg, inputs);
    return MLLAMA_OK;
}

mllama_status vision_graph_set(const vision_graph * vg, const float * patches, int32_t aspect_ratio_id) {
    TRY(guard_set(vg->patches, patches, 0, ggml_nbytes(vg->patches)));
    TRY(guard_set(vg->aspect_ratio_id, &aspect_ratio_id, 0, sizeof(aspect_ratio_id)));
    return vision_attention_set(&vg->attention);
}

void vision_graph_free(vision_graph * vg) {
    graph_free(&vg->g);
    free(vg->attentions);
    free(vg->linears);
    vg->attentions = NULL;
    vg->linears    = NULL;
}
