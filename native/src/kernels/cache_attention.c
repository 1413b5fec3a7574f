// The text's attention to rows of a cache, see kernels.h
#include "guard.h"
#include "kernels/kernel.h"


#include <math.h>
#include <string.h>

enum {
    SPLIT_KEYS = 256, // rows that one thread takes where there are few queries
    FEW_TOKENS = 4,
    FEW_OF_MANY = 16, // of several sequences, which are not one prompt
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
    return a->kernel && a->kernel->cache && cpu_kernel_has_head_dim(a->head_dim) && group_size(a) <= QUERIES &&
           is_float(k) && is_float(v);
}

bool cpu_cache_attention_fits(const cpu_cache_attention * a) {
    for (int64_t i = 0; i < a->n_items; i++) {
        const cpu_cache_item * item = &a->items[i];
        if (!cpu_cache_attention_has(a, item->k->type, item->v->type) || !is_in_memory(item->k) ||
            !is_in_memory(item->v)) {
            return false;
        }
    }
    return a->n_items > 0;
}

static int64_t block_tokens(const cpu_cache_attention * a) {
    return QUERIES / group_size(a);
}

static int64_t n_blocks(const cpu_cache_attention * a, const cpu_cache_item * item) {
    return (item->n_columns + block_tokens(a) - 1) / block_tokens(a);
}

// Floats of a part: the largest score, the sum, sums of values
static int64_t part_size(const cpu_cache_attention * a) {
    return 2 + a->head_dim;
}

// Heads of K and V that go over rows together, so that these are read from memory one after the other: all or one
static int64_t heads_together(const cpu_cache_attention * a, const cpu_cache_item * item) {
    const int64_t queries = a->n_head_kv * round_up(item->n_columns * group_size(a), ROWS_GROUP);
    return item->n_columns <= FEW_TOKENS && queries <= QUERIES ? a->n_head_kv : 1;
}

// The work of one thread at a time: a block of queries of some heads over the rows [first, end)
typedef struct cache_task {
    const cpu_cache_item * item;
    int64_t                head, n_heads, block, split, first, end;
} cache_task;

static int64_t n_tasks(const cpu_cache_attention * a, const cpu_cache_item * item) {
    return a->n_head_kv / heads_together(a, item) * n_blocks(a, item) * item->n_splits;
}

static cache_task task_of(const cpu_cache_attention * a, int64_t i) {
    const cpu_cache_item * item = a->items;
    while (item + 1 < a->items + a->n_items && i >= item[1].task) {
        item++;
    }
    i -= item->task;
    const int64_t heads = heads_together(a, item), parts = a->n_head_kv / heads, blocks = n_blocks(a, item);
    cache_task    t     = {
        .item = item, .head = i % parts * heads, .n_heads = heads, .block = i / parts % blocks,
        .split = i / parts / blocks, .end = item->n_rows,
    };
    if (item->n_splits > 1) {
        t.first = t.split * SPLIT_KEYS;
        t.end   = t.first + SPLIT_KEYS < item->n_rows ? t.first + SPLIT_KEYS : item->n_rows;
    }
    return t;
}

// The first row of a task, in its heads
static const char * rows_of(const struct ggml_tensor * cache, const cpu_cache_attention * a, cache_task t) {
    const size_t head = (size_t) (t.head * a->head_dim) * cache->nb[0];
    return (const char *) cache->data + (size_t) t.first * cache->nb[1] + head;
}

// Where the parts of an item's split and head begin, among all parts
static int64_t part_of(const cpu_cache_attention * a, const cpu_cache_item * item, int64_t split, int64_t head) {
    return item->part + (split * a->n_head_kv + head) * item->n_columns * group_size(a);
}

// `then` comes after it. fetched: its first rows are there already, as it came after another.
static void attend_task(const cpu_cache_attention * a, struct ggml_tensor * dst, cache_task t, cache_task then,
                        bool fetched) {
    const struct ggml_tensor * q = dst->src[0], * mask = dst->src[3], * k = t.item->k, * v = t.item->v;
    const int64_t   token  = t.block * block_tokens(a), left = t.item->n_columns - token; // in the item
    const int64_t   column = t.item->column + token;
    const int64_t   n      = (left < block_tokens(a) ? left : block_tokens(a)) * group_size(a);
    const size_t    at     = (size_t) (t.head * group_size(a) * a->head_dim) * sizeof(float); // in a row of q and dst
    const int64_t   part   = part_of(a, t.item, t.split, t.head) + token * group_size(a);
    const bool      hides  = mask && t.item->mask >= 0;
    const int64_t   unseen = hides ? t.item->mask + token * t.item->n_rows + t.first : 0;
    const rows_args args   = {
        .q           = (const float *) ((const char *) q->data + (size_t) column * q->nb[1] + at),
        .q_stride    = q->nb[1],
        .n_heads     = t.n_heads,
        .n           = n,
        .group       = group_size(a),
        .head_dim    = a->head_dim,
        .scale       = 1.44269504f / sqrtf((float) a->head_dim), // log2(e): scores are exponents of 2
        .k           = rows_of(k, a, t),
        .v           = rows_of(v, a, t),
        .k_then      = rows_of(then.item->k, a, then),
        .v_then      = rows_of(then.item->v, a, then),
        .fetched     = fetched,
        .k_stride    = k->nb[1],
        .v_stride    = v->nb[1],
        .k_half      = k->type == GGML_TYPE_F16,
        .v_half      = v->type == GGML_TYPE_F16,
        .n_keys      = t.end - t.first,
        .mask        = hides ? (const ggml_fp16_t *) mask->data + unseen : NULL,
        .mask_stride = sizeof(ggml_fp16_t) * (size_t) t.item->n_rows,
        .part        = a->joined ? (float *) dst->data + part * part_size(a) : NULL,
        .out         = (float *) ((char *) dst->data + (size_t) column * dst->nb[1] + at),
        .out_stride  = dst->nb[1],
    };
    a->kernel->cache->attend_rows(&args);
}

// dst: as q, or parts [part_size, n]
static void attend_tasks(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    cpu_cache_attention * a       = userdata;
    bool                  fetched = false;
    (void) nth;
    for (int64_t i = tasks_take(&a->tasks, ith, 1), then; i < a->n_tasks; i = then, fetched = true) {
        then = tasks_take(&a->tasks, ith, 1);
        attend_task(a, dst, task_of(a, i), task_of(a, then < a->n_tasks ? then : i), fetched);
    }
}

// One head of one column, from its part in each split
static void join_parts(const cpu_cache_attention * a, const float * first, int64_t step, int64_t n_splits,
                       float * out) {
    float top = NO_KEY, sum = 0.0f;
    for (int64_t s = 0; s < n_splits; s++) {
        top = fmaxf(top, first[s * step]);
    }
    memset(out, 0, sizeof(float) * (size_t) a->head_dim);
    for (int64_t s = 0; s < n_splits; s++) {
        const float * part   = first + s * step;
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

// dst [n_embd, n_tokens] from the parts of all splits
static void join_splits(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    const cpu_cache_attention * a     = userdata;
    const float *               parts = dst->src[0]->data;
    const int64_t               group = group_size(a);
    for (const cpu_cache_item * item = a->items; item < a->items + a->n_items; item++) {
        const int64_t n    = item->n_columns * a->n_head;
        const int64_t step = a->n_head_kv * item->n_columns * group * part_size(a); // from split to split
        for (int64_t i = n * ith / nth; i < n * (ith + 1) / nth; i++) {
            const int64_t token = i / a->n_head, head = i % a->n_head;
            const int64_t part  = part_of(a, item, 0, head / group) + token * group + head % group;
            char *        row   = (char *) dst->data + (size_t) (item->column + token) * dst->nb[1];
            join_parts(a, parts + part * part_size(a), step, item->n_splits, (float *) row + head * a->head_dim);
        }
    }
}

struct ggml_tensor * cpu_cache_attention_node(struct ggml_context * ctx, cpu_cache_attention * a,
                                              struct ggml_tensor * q, struct ggml_tensor * mask) {
    const int64_t        n       = q->ne[1], few = a->many ? FEW_OF_MANY : FEW_TOKENS;
    struct ggml_tensor * src[]   = { q, a->items[0].k, a->items[0].v, mask }; // caches: ggml sees where this belongs
    const int            n_src   = mask ? 4 : 3;
    int64_t              n_parts = 0;
    a->n_tasks = 0;
    a->joined  = false;
    for (cpu_cache_item * item = a->items; item < a->items + a->n_items; item++) {
        item->n_splits = item->n_columns <= few ? (item->n_rows + SPLIT_KEYS - 1) / SPLIT_KEYS : 1;
        item->task     = a->n_tasks;
        item->part     = n_parts;
        a->n_tasks += n_tasks(a, item);
        a->joined |= item->n_splits > 1;
        n_parts += a->n_head * item->n_columns * item->n_splits;
    }
    if (!a->joined) {
        return ggml_custom_4d(ctx, GGML_TYPE_F32, q->ne[0], n, 1, 1, src, n_src, attend_tasks, GGML_N_TASKS_MAX, a);
    }
    struct ggml_tensor * parts = ggml_custom_4d(ctx, GGML_TYPE_F32, part_size(a), n_parts, 1, 1, src, n_src,
                                                attend_tasks, GGML_N_TASKS_MAX, a);
    return ggml_custom_4d(ctx, GGML_TYPE_F32, q->ne[0], n, 1, 1, (struct ggml_tensor *[]) { parts }, 1, join_splits,
                          GGML_N_TASKS_MAX, a);
}
