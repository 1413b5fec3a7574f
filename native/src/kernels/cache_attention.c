// The text's attention to rows of a cache, see kernels.h
#include "guard.h"
#include "kernels/kernel.h"


#include <math.h>
#include <string.h>

enum {
    SPLIT_KEYS = 256, // rows that one thread takes where there are few queries
    FEW_TOKENS = 4,
};

static bool is_float(enum ggml_type type) {
    return type == GGML_TYPE_F16 || type == GGML_TYPE_F32;
}

static bool is_in_memory(const struct ggml_tensor * t) {
    return t->buffer && guard_is_host(t->buffer);
}

// Queries of one token that share a head of K and V
static int64_t group_size(const cpu_cache_attention * a) {
    return a->n_head / a->n_head_kv;
}

bool cpu_cache_attention_has(const cpu_cache_attention * a, enum ggml_type k, enum ggml_type v) {
    return a->kernel && cpu_kernel_has_head_dim(a->head_dim) && group_size(a) <= QUERIES && is_float(k) && is_float(v);
}

bool cpu_cache_attention_fits(const cpu_cache_attention * a, const struct ggml_tensor * k,
                              const struct ggml_tensor * v) {
    return cpu_cache_attention_has(a, k->type, v->type) && is_in_memory(k) && is_in_memory(v);
}

static int64_t block_tokens(const cpu_cache_attention * a) {
    return QUERIES / group_size(a);
}

static int64_t n_blocks(const cpu_cache_attention * a, int64_t n_tokens) {
    return (n_tokens + block_tokens(a) - 1) / block_tokens(a);
}

static int64_t part_size(const cpu_cache_attention * a) {
    return 2 + a->head_dim;
}

// Heads of K and V that go over rows together, so that these are read from memory one after the other: all or one
static int64_t heads_together(const cpu_cache_attention * a, int64_t n_tokens) {
    const int64_t queries = a->n_head_kv * round_up(n_tokens * group_size(a), ROWS_GROUP);
    return n_tokens <= FEW_TOKENS && queries <= QUERIES ? a->n_head_kv : 1;
}

// The work of one thread at a time: a block of queries of some heads over the rows [first, end)
typedef struct cache_task {
    int64_t head, n_heads, block, split, first, end;
} cache_task;

static int64_t n_tasks(const cpu_cache_attention * a, int64_t n_tokens) {
    return a->n_head_kv / heads_together(a, n_tokens) * n_blocks(a, n_tokens) * a->n_splits;
}

static cache_task task_of(const cpu_cache_attention * a, int64_t n_tokens, int64_t i) {
    const int64_t heads = heads_together(a, n_tokens), parts = a->n_head_kv / heads, blocks = n_blocks(a, n_tokens);
    cache_task    t     = {
        .head = i % parts * heads, .n_heads = heads, .block = i / parts % blocks, .split = i / parts / blocks,
        .end = a->n_rows,
    };
    if (a->n_splits > 1) {
        t.first = t.split * SPLIT_KEYS;
        t.end   = t.first + SPLIT_KEYS < a->n_rows ? t.first + SPLIT_KEYS : a->n_rows;
    }
    return t;
}

// The first row of a task, in its heads
static const char * rows_of(const struct ggml_tensor * cache, const cpu_cache_attention * a, cache_task t) {
    const size_t head = (size_t) (t.head * a->head_dim) * cache->nb[0];
    return (const char *) cache->data + (size_t) t.first * cache->nb[1] + head;
}

// `then` comes after it. fetched: its first rows are there already, as it came after another.
static void attend_task(const cpu_cache_attention * a, struct ggml_tensor * dst, cache_task t, cache_task then,
                        bool fetched) {
    const struct ggml_tensor * q = dst->src[0], * k = dst->src[1], * v = dst->src[2], * mask = dst->src[3];
    const int64_t   token  = t.block * block_tokens(a), left = q->ne[1] - token;
    const int64_t   n      = (left < block_tokens(a) ? left : block_tokens(a)) * group_size(a);
    const size_t    at     = (size_t) (t.head * group_size(a) * a->head_dim) * sizeof(float); // in a row of q and dst
    const size_t    part   = (size_t) (t.split * a->n_head_kv + t.head) * dst->nb[3] + (size_t) token * dst->nb[2];
    const char *    unseen = mask ? (const char *) mask->data + (size_t) token * mask->nb[1] : NULL;
    const rows_args args   = {
        .q           = (const float *) ((const char *) q->data + (size_t) token * q->nb[1] + at),
        .q_stride    = q->nb[1],
        .n_heads     = t.n_heads,
        .n           = n,
        .group       = group_size(a),
        .head_dim    = a->head_dim,
        .scale       = 1.44269504f / sqrtf((float) a->head_dim), // log2(e): scores are exponents of 2
        .k           = rows_of(k, a, t),
        .v           = rows_of(v, a, t),
        .k_then      = rows_of(k, a, then),
        .v_then      = rows_of(v, a, then),
        .fetched     = fetched,
        .k_stride    = k->nb[1],
        .v_stride    = v->nb[1],
        .k_half      = k->type == GGML_TYPE_F16,
        .v_half      = v->type == GGML_TYPE_F16,
        .n_keys      = t.end - t.first,
        .mask        = mask ? (const ggml_fp16_t *) unseen + t.first : NULL,
        .mask_stride = mask ? mask->nb[1] : 0,
        .part        = a->n_splits > 1 ? (float *) ((char *) dst->data + part) : NULL,
        .out         = (float *) ((char *) dst->data + (size_t) token * dst->nb[1] + at),
        .out_stride  = dst->nb[1],
    };
    a->kernel->f32->attend_rows(&args);
}

// dst: as q, or with splits [part_size, group, n_tokens, n_head_kv * n_splits]
static void attend_tasks(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    cpu_cache_attention * a        = userdata;
    const int64_t         n_tokens = dst->src[0]->ne[1], n = n_tasks(a, n_tokens);
    bool                  fetched  = false;
    (void) nth;
    for (int64_t i = tasks_take(&a->tasks, ith, 1), then; i < n; i = then, fetched = true) {
        then = tasks_take(&a->tasks, ith, 1);
        attend_task(a, dst, task_of(a, n_tokens, i), task_of(a, n_tokens, then < n ? then : i), fetched);
    }
}

// dst [n_embd, n_tokens] from the parts of all splits
static void join_splits(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    const cpu_cache_attention * a     = userdata;
    const struct ggml_tensor *  parts = dst->src[0];
    const int64_t               n     = dst->ne[1] * a->n_head, group = group_size(a);
    const size_t                step  = parts->nb[3] * (size_t) a->n_head_kv;
    for (int64_t i = n * ith / nth; i < n * (ith + 1) / nth; i++) {
        const int64_t token = i / a->n_head, head = i % a->n_head;
        const char *  first = (const char *) parts->data + (size_t) (head / group) * parts->nb[3] +
                              (size_t) token * parts->nb[2] + (size_t) (head % group) * parts->nb[1];
        float *       out   = (float *) ((char *) dst->data + (size_t) token * dst->nb[1]) + head * a->head_dim;
        float         top   = NO_KEY, sum = 0.0f;
        for (int64_t s = 0; s < a->n_splits; s++) {
            top = fmaxf(top, *(const float *) (first + (size_t) s * step));
        }
        memset(out, 0, sizeof(float) * (size_t) a->head_dim);
        for (int64_t s = 0; s < a->n_splits; s++) {
            const float * part   = (const float *) (first + (size_t) s * step);
            const float   factor = exp2f(part[0] - top);
            sum += factor * part[1];
            for (int64_t j = 0; j < a->head_dim; j++) {
                out[j] += factor * part[2 + j];
            }
        }
        for (int64_t j = 0; j < a->head_dim; j++) {
            out[j] /= sum;
        }
    }
}

struct ggml_tensor * cpu_cache_attention_node(struct ggml_context * ctx, cpu_cache_attention * a,
                                              struct ggml_tensor * q, struct ggml_tensor * k, struct ggml_tensor * v,
                                              struct ggml_tensor * mask) {
    const int64_t        n     = q->ne[1];
    struct ggml_tensor * src[] = { q, k, v, mask };
    const int            n_src = mask ? 4 : 3;
    a->n_splits = n <= FEW_TOKENS ? (a->n_rows + SPLIT_KEYS - 1) / SPLIT_KEYS : 1;
    if (a->n_splits == 1) {
        return ggml_custom_4d(ctx, GGML_TYPE_F32, q->ne[0], n, 1, 1, src, n_src, attend_tasks, GGML_N_TASKS_MAX, a);
    }
    const int64_t        n_parts = a->n_head_kv * a->n_splits;
    struct ggml_tensor * parts   = ggml_custom_4d(ctx, GGML_TYPE_F32, part_size(a), group_size(a), n, n_parts, src,
                                                  n_src, attend_tasks, GGML_N_TASKS_MAX, a);
    return ggml_custom_4d(ctx, GGML_TYPE_F32, q->ne[0], n, 1, 1, (struct ggml_tensor *[]) { parts }, 1, join_splits,
                          GGML_N_TASKS_MAX, a);
}
