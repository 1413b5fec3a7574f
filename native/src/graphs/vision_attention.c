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

static void make_mask(graph * g, key_mask * m, int64_t n_keys, int64_t n_queries, const char * name) {
    const int64_t n_kv = rounded_up(n_keys, KEYS), n_rows = rounded_up(n_queries, HEADS) / HEADS;
    m->n_keys = n_keys;
    m->row    = ggml_new_tensor_1d(g->ctx, GGML_TYPE_F32, n_kv);
    ggml_set_input(graph_named(m->row, "v", -1, name));
    m->mask   = ggml_cast(g->ctx, ggml_repeat_4d(g->ctx, m->row, n_kv, n_rows, 1, 1), GGML_TYPE_F16);
}

// q [n_embd, n]; k, v [head_dim, n_kv, n_head] F16 -> as q, or NULL where the device has no such operation
static struct ggml_tensor * shared_keys(graph * g, struct ggml_tensor * q, struct ggml_tensor * k,
                                        struct ggml_tensor * v, const key_mask * m, int64_t n_head) {
    struct ggml_context * ctx    = g->ctx;
    const int64_t         n_embd = q->ne[0], n = q->ne[1], n_rows = m->mask->ne[1], n_kv = m->mask->ne[0];
    if (n < n_rows * HEADS) {
        q = ggml_pad(ctx, q, 0, (int) (n_rows * HEADS - n), 0, 0);
    }
    q = ggml_reshape_4d(ctx, q, n_embd / n_head, n_head, n_rows, HEADS);
    q = ggml_cont_3d(ctx, ggml_permute(ctx, q, 0, 3, 1, 2), n_embd / n_head, n_rows, HEADS * n_head);
    k = ggml_view_3d(ctx, k, k->ne[0], n_kv, n_head, k->nb[1], k->nb[2], 0);
    v = ggml_view_3d(ctx, v, v->ne[0], n_kv, n_head, v->nb[1], v->nb[2], 0);
    struct ggml_tensor * x = graph_flash_attention(g, q, k, v, m->mask, 1.0f / sqrtf((float) (n_embd / n_head)));
    if (!x) {
        return NULL;
    }
    x = ggml_reshape_4d(ctx, x, n_embd / n_head, HEADS, n_head, n_rows);
    x = ggml_cont_2d(ctx, ggml_permute(ctx, x, 0, 3, 1, 2), n_embd, n_rows * HEADS);
    return n < n_rows * HEADS ? ggml_view_2d(ctx, x, n_embd, n, x->nb[1], 0) : x;
}

// k [n_embd, n_all] -> [head_dim, n_kv, n_head] F16
static struct ggml_tensor * padded_keys(graph * g, struct ggml_tensor * k, int64_t n_kv, int64_t n_head) {
    if (k->ne[1] < n_kv) {
        k = ggml_pad(g->ctx, k, 0, (int) (n_kv - k->ne[1]), 0, 0);
    }
    return graph_split_heads(g, ggml_cast(g->ctx, k, GGML_TYPE_F16), n_head);
}

// As vision_attention_node, or NULL where the device has no such operation
static struct ggml_tensor * masked_attention(graph * g, vision_attention * a, struct ggml_tensor * q,
                                             struct ggml_tensor * k, struct ggml_tensor * v) {
    struct ggml_context * ctx = g->ctx;
    const int64_t         n = q->ne[1], n_pads = n - a->n_real;
    if (!a->real.row) {
        make_mask(g, &a->real, a->n_all, a->n_real, "keys");
    }
    k = padded_keys(g, k, a->real.row->ne[0], a->n_head);
    v = padded_keys(g, v, a->real.row->ne[0], a->n_head);
    struct ggml_tensor * q_real = ggml_view_2d(ctx, q, q->ne[0], a->n_real, q->nb[1], 0);
    struct ggml_tensor * real   = shared_keys(g, q_real, k, v, &a->real, a->n_head);
    if (!real || n_pads == 0) {
        return real;
    }
    if (!a->pads.row) {
        make_mask(g, &a->pads, a->n_real, n_pads, "keys_of_pads");
    }
    struct ggml_tensor * q_pads = ggml_view_2d(ctx, q, q->ne[0], n_pads, q->nb[1], q->nb[1] * (size_t) a->n_real);
    struct ggml_tensor * pads   = shared_keys(g, q_pads, k, v, &a->pads, a->n_head);
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

static mllama_status set_mask(const vision_attention * a, const key_mask * m) {
    if (!m->row || a->no_masks) {
        return MLLAMA_OK;
    }
    float * values = malloc(ggml_nbytes(m->row));
    if (!values) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    for (int64_t i = 0; i < m->row->ne[0]; i++) {
        values[i] = i < m->n_keys ? 0.0f : -INFINITY;
    }
    for (int j = 0; j < 2; j++) {
        for (int64_t i = a->repeated[j][0]; i < a->repeated[j][1] && i < m->n_keys; i++) {
            values[i] = logf((float) a->times);
        }
    }
    const mllama_status status = guard_set(m->row, values, 0, ggml_nbytes(m->row));
    free(values);
    return status;
}

mllama_status vision_attention_set(const vision_attention * a) {
    TRY(set_mask(a, &a->real));
    return set_mask(a, &a->pads);
}
