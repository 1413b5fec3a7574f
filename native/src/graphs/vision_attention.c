#include "graphs/vision_attention.h"

#include "guard.h"

#include <math.h>
#include <stdlib.h>

// CUDA's flash attention loads keys while it computes only if heads share them, if there is a mask and if the number of
// keys is a multiple of KEYS. It is several times faster then. So the queries of a head are cut into HEADS groups, each
// a head to ggml, with the same keys.
enum { HEADS = 8, KEYS = 256 };

static int64_t rounded_up(int64_t n, int64_t to) {
    return (n + to - 1) / to * to;
}

static struct ggml_tensor * new_input(graph * g, enum ggml_type type, int64_t n, const char * name) {
    struct ggml_tensor * t = ggml_new_tensor_1d(g->ctx, type, n);
    ggml_set_input(graph_named(t, "v", -1, name));
    return t;
}

static void make_mask(graph * g, key_mask * m, int64_t n_keys, int64_t n_queries, const char * name) {
    const int64_t n_kv = rounded_up(n_keys, KEYS), n_rows = rounded_up(n_queries, HEADS) / HEADS;
    m->n_keys = n_keys;
    m->row    = new_input(g, GGML_TYPE_F32, n_kv, name);
    m->mask   = ggml_cast(g->ctx, ggml_repeat_4d(g->ctx, m->row, n_kv, n_rows, 1, 1), GGML_TYPE_F16);
}

static void make_shared(graph * g, vision_attention * a, int64_t n_embd) {
    struct ggml_context * ctx = g->ctx;
    make_mask(g, &a->real, a->n_all, a->n_real, "keys");
    a->rows = new_input(g, GGML_TYPE_I64, a->n_all, "rows");
    a->one  = new_input(g, GGML_TYPE_F32, 1, "one");
    struct ggml_tensor * zeros = ggml_repeat_4d(ctx, ggml_scale(ctx, a->one, 0.0f), n_embd, a->real.row->ne[0], 1, 1);
    a->k = ggml_cast(ctx, zeros, GGML_TYPE_F16);
    a->v = ggml_cast(ctx, zeros, GGML_TYPE_F16);
}

// As ggml_cont, which takes three times as long on CUDA for such rows of a head
static struct ggml_tensor * copied(graph * g, const vision_attention * a, struct ggml_tensor * x) {
    return ggml_mul(g->ctx, x, a->one);
}

// The rows [first, first + n) of q; k, v [head_dim, n_kv, n_head] F16 -> [n_embd, n], or NULL where the device has no
// such operation
static struct ggml_tensor * shared_keys(graph * g, const vision_attention * a, const key_mask * m,
                                        struct ggml_tensor * q, int64_t first, int64_t n, struct ggml_tensor * k,
                                        struct ggml_tensor * v) {
    struct ggml_context * ctx    = g->ctx;
    const int64_t         n_embd = q->ne[0], head_dim = n_embd / a->n_head, n_rows = m->mask->ne[1];
    const int64_t         n_wide = n_rows * HEADS, n_kv = m->mask->ne[0], there = q->ne[1] - first;
    // the rows after those that are asked for, if there are any, else zeros
    q = ggml_view_2d(ctx, q, n_embd, there < n_wide ? there : n_wide, q->nb[1], q->nb[1] * (size_t) first);
    if (there < n_wide) {
        q = ggml_pad(ctx, q, 0, (int) (n_wide - there), 0, 0);
    }
    q = ggml_permute(ctx, ggml_reshape_4d(ctx, q, head_dim, a->n_head, n_rows, HEADS), 0, 3, 1, 2);
    q = ggml_reshape_3d(ctx, copied(g, a, q), head_dim, n_rows, HEADS * a->n_head);
    k = ggml_view_3d(ctx, k, k->ne[0], n_kv, a->n_head, k->nb[1], k->nb[2], 0);
    v = ggml_view_3d(ctx, v, v->ne[0], n_kv, a->n_head, v->nb[1], v->nb[2], 0);
    struct ggml_tensor * x = graph_flash_attention(g, q, k, v, m->mask, 1.0f / sqrtf((float) head_dim));
    if (!x) {
        return NULL;
    }
    x = ggml_permute(ctx, ggml_reshape_4d(ctx, x, head_dim, HEADS, a->n_head, n_rows), 0, 3, 1, 2);
    x = ggml_reshape_2d(ctx, copied(g, a, x), n_embd, n_wide);
    return n < n_wide ? ggml_view_2d(ctx, x, n_embd, n, x->nb[1], 0) : x;
}

// As vision_attention_node, or NULL where the device has no such operation
static struct ggml_tensor * masked_attention(graph * g, vision_attention * a, struct ggml_tensor * q,
                                             struct ggml_tensor * k, struct ggml_tensor * v) {
    struct ggml_context * ctx    = g->ctx;
    const int64_t         n_pads = q->ne[1] - a->n_real;
    if (!a->real.row) {
        make_shared(g, a, q->ne[0]);
    }
    k = graph_split_heads(g, ggml_set_rows(ctx, a->k, k, a->rows), a->n_head);
    v = graph_split_heads(g, ggml_set_rows(ctx, a->v, v, a->rows), a->n_head);
    struct ggml_tensor * real = shared_keys(g, a, &a->real, q, 0, a->n_real, k, v);
    if (!real || n_pads == 0) {
        return real;
    }
    if (!a->pads.row) {
        make_mask(g, &a->pads, a->n_real, n_pads, "keys_of_pads");
    }
    struct ggml_tensor * pads = shared_keys(g, a, &a->pads, q, a->n_real, n_pads, k, v);
    return pads ? ggml_concat(ctx, real, pads, 1) : NULL;
}

// x [n_embd, n_all] with the rows of the repeated tile as often as they count
static struct ggml_tensor * repeat_rows(struct ggml_context * ctx, const vision_attention * a, struct ggml_tensor * x) {
    struct ggml_tensor * out = x;
    for (int j = 0; j < 2; j++) {
        const int64_t n = a->repeated[j][1] - a->repeated[j][0], more = a->times - 1;
        if (n > 0 && more > 0) {
            const size_t         at   = x->nb[1] * (size_t) a->repeated[j][0];
            struct ggml_tensor * rows = ggml_view_2d(ctx, x, x->ne[0], n, x->nb[1], at);
            rows = ggml_reshape_2d(ctx, ggml_repeat_4d(ctx, rows, x->ne[0], n, more, 1), x->ne[0], n * more);
            out  = ggml_concat(ctx, out, rows, 1);
        }
    }
    return out;
}

struct ggml_tensor * vision_attention_node(graph * g, vision_attention * a, struct ggml_tensor * q,
                                           struct ggml_tensor * k, struct ggml_tensor * v) {
    struct ggml_context * ctx    = g->ctx;
    const int64_t         n_embd = q->ne[0], n = q->ne[1], n_real = a->n_real, n_head = a->n_head;
    if (!a->no_masks && g->env.flash_attn && !g->env.exact && graph_on_gpu(g)) {
        struct ggml_tensor * x = masked_attention(g, a, q, k, v);
        if (x) {
            return x;
        }
        a->no_masks = true;
    }
    k = graph_split_heads(g, repeat_rows(ctx, a, k), n_head); // [head_dim, keys, n_head]
    v = graph_split_heads(g, repeat_rows(ctx, a, v), n_head);

    struct ggml_tensor * q_real = ggml_view_2d(ctx, q, n_embd, n_real, q->nb[1], 0);
    struct ggml_tensor * attn   = graph_attention(g, q_real, k, v, NULL, n_head);
    if (n == n_real) {
        return attn;
    }
    struct ggml_tensor * q_pad  = ggml_view_2d(ctx, q, n_embd, n - n_real, q->nb[1], q->nb[1] * (size_t) n_real);
    struct ggml_tensor * k_real = ggml_view_3d(ctx, k, k->ne[0], n_real, n_head, k->nb[1], k->nb[2], 0);
    struct ggml_tensor * v_real = ggml_view_3d(ctx, v, v->ne[0], n_real, n_head, v->nb[1], v->nb[2], 0);
    return ggml_concat(ctx, attn, graph_attention(g, q_pad, k_real, v_real, NULL, n_head), 1);
}

static void mask_values(const vision_attention * a, const key_mask * m, float * values) {
    for (int64_t i = 0; i < m->row->ne[0]; i++) {
        values[i] = i < m->n_keys ? 0.0f : -INFINITY;
    }
    for (int j = 0; j < 2; j++) {
        for (int64_t i = a->repeated[j][0]; i < a->repeated[j][1] && i < m->n_keys; i++) {
            values[i] = logf((float) a->times);
        }
    }
}

// values: of any of the inputs
static mllama_status set_inputs(const vision_attention * a, void * values) {
    const key_mask * masks[] = { &a->real, &a->pads };
    for (int i = 0; i < 2; i++) {
        if (masks[i]->row) {
            mask_values(a, masks[i], values);
            TRY(guard_set(masks[i]->row, values, 0, ggml_nbytes(masks[i]->row)));
        }
    }
    for (int64_t i = 0; i < a->n_all; i++) {
        ((int64_t *) values)[i] = i;
    }
    TRY(guard_set(a->rows, values, 0, ggml_nbytes(a->rows)));
    const float one = 1.0f;
    return guard_set(a->one, &one, 0, sizeof(one));
}

mllama_status vision_attention_set(const vision_attention * a) {
    if (!a->real.row || a->no_masks) {
        return MLLAMA_OK;
    }
    void * values = malloc(ggml_nbytes(a->rows) + ggml_nbytes(a->real.row));
    if (!values) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    const mllama_status status = set_inputs(a, values);
    free(values);
    return status;
}
