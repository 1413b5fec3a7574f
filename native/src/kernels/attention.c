// The encoder's attention, see kernels.h
#include "kernels/kernel.h"

#include <math.h>
#include <string.h>

bool cpu_attention_supported(const cpu_kernel * kernel, bool bf16) {
    return kernel && (bf16 || kernel->attention);
}

static int64_t panel_width(const cpu_attention * a) {
    return a->bf16 ? a->kernel->bf16->width : a->kernel->attention->width;
}

// Real keys fill their panels first, so that a query can stop after them.
static int64_t padded_keys(const cpu_attention * a, bool only_real) {
    const int64_t width = panel_width(a);
    return round_up(a->n_real, width) + (only_real ? 0 : round_up(a->n_all - a->n_real, width));
}

static int64_t value_size(const cpu_attention * a) {
    return round_up(a->head_dim, a->bf16 ? a->kernel->bf16->lanes : a->kernel->attention->lanes);
}

// Values in the place of one float
static int64_t per_factor(const cpu_attention * a) {
    return a->bf16 ? 2 : 1;
}

// In floats; pairs take the place of one
static int64_t packed_keys_size(const cpu_attention * a) {
    return padded_keys(a, false) * (1 + a->head_dim / per_factor(a));
}

static int64_t packed_head_size(const cpu_attention * a) {
    return packed_keys_size(a) + padded_keys(a, false) * value_size(a) / per_factor(a);
}

static const float * row_of(const struct ggml_tensor * t, int64_t row, int64_t head, int64_t head_dim) {
    return (const float *) ((const char *) t->data + (size_t) row * t->nb[1]) + head * head_dim;
}

// Added to the scores of a key: they are exponents of 2, so this makes it count several times.
static float key_bonus(const cpu_attention * a, int64_t row) {
    for (int i = 0; i < 2; i++) {
        if (row >= a->repeated[i][0] && row < a->repeated[i][1]) {
            return log2f(a->repeats);
        }
    }
    return 0.0f;
}

// One panel of one head: k and v of `width` keys from row `first` on, of which those below `end` exist
static void pack_panel(const cpu_attention * a, const struct ggml_tensor * k, const struct ggml_tensor * v,
                       int64_t head, int64_t first, int64_t end, float * k_out, float * v_out) {
    const int64_t width = panel_width(a), dim = a->head_dim, v_size = value_size(a);
    for (int64_t j = 0; j < width; j++) {
        k_out[j] = first + j < end ? key_bonus(a, first + j) : NO_KEY;
    }
    k_out += width;
    memset(v_out, 0, sizeof(float) * (size_t) (width * v_size / per_factor(a)));
    for (int64_t j = 0; j < width; j++) {
        if (first + j >= end) {
            for (int64_t i = 0; i < dim / per_factor(a); i++) {
                k_out[i * width + j] = 0.0f;
            }
            continue;
        }
        const float * k_row = row_of(k, first + j, head, dim), * v_row = row_of(v, first + j, head, dim);
        if (!a->bf16) {
            for (int64_t i = 0; i < dim; i++) {
                k_out[i * width + j] = k_row[i];
            }
            memcpy(v_out + j * v_size, v_row, sizeof(float) * (size_t) dim);
            continue;
        }
        ggml_bf16_t row[MAX_HEAD_DIM];
        ggml_fp32_to_bf16_row(k_row, row, dim);
        for (int64_t i = 0; i < dim / 2; i++) {
            memcpy(k_out + i * width + j, row + 2 * i, sizeof(bf16_pair));
        }
        ggml_fp32_to_bf16_row(v_row, row, dim);
        for (int64_t i = 0; i < dim; i++) {
            ((ggml_bf16_t *) v_out)[2 * (j / 2 * v_size + i) + j % 2] = row[i];
        }
    }
}

// dst [packed_head_size, n_head] from k and v
static void pack(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    const cpu_attention * a      = userdata;
    const int64_t         width  = panel_width(a), n_keys = padded_keys(a, false), n_first = padded_keys(a, true);
    const int64_t         panels = n_keys / width, n = panels * a->n_head;
    for (int64_t i = n * ith / nth; i < n * (ith + 1) / nth; i++) {
        const int64_t head  = i / panels, at = i % panels * width;
        float *       k_out = (float *) dst->data + head * packed_head_size(a);
        float *       v_out = k_out + packed_keys_size(a);
        const bool    real  = at < n_first;
        pack_panel(a, dst->src[0], dst->src[1], head, real ? at : a->n_real + at - n_first, real ? a->n_real : a->n_all,
                   k_out + at * (1 + a->head_dim / per_factor(a)), v_out + at * value_size(a) / per_factor(a));
    }
}

static void attend_block(const cpu_attention * a, struct ggml_tensor * dst, int64_t head, int64_t first, int64_t end,
                         bool only_real) {
    const struct ggml_tensor * q    = dst->src[0];
    const float *              k    = (const float *) dst->src[1]->data + head * packed_head_size(a);
    const attend_args          args = {
        .q          = row_of(q, first, head, a->head_dim),
        .q_stride   = q->nb[1],
        .out_stride = dst->nb[1],
        .n          = end - first,
        .head_dim   = a->head_dim,
        .scale      = 1.44269504f / sqrtf((float) a->head_dim), // log2(e): scores are exponents of 2
        .k          = k,
        .v          = k + packed_keys_size(a),
        .n_keys     = padded_keys(a, only_real),
        .out        = (float *) ((char *) dst->data + (size_t) first * dst->nb[1]) + head * a->head_dim,
    };
    (a->bf16 ? a->kernel->bf16->attend : a->kernel->attention->attend)(&args);
}

// Blocks of real queries, then of the others, of each head
static void attend_blocks(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    cpu_attention * a      = userdata;
    const int64_t   n_real = dst->ne[1] < a->n_real ? dst->ne[1] : a->n_real, n_pad = dst->ne[1] - n_real;
    const int64_t   blocks_real = (n_real + QUERIES - 1) / QUERIES;
    const int64_t   blocks      = blocks_real + (n_pad + QUERIES - 1) / QUERIES, n = blocks * a->n_head;
    (void) nth;
    for (int64_t i; (i = tasks_take(&a->tasks, ith, 1)) < n;) {
        const int64_t head = i / blocks, block = i % blocks;
        const bool    pads  = block >= blocks_real;
        const int64_t first = pads ? n_real + (block - blocks_real) * QUERIES : block * QUERIES;
        const int64_t end   = pads ? dst->ne[1] : n_real;
        attend_block(a, dst, head, first, first + QUERIES < end ? first + QUERIES : end, pads);
    }
}

struct ggml_tensor * cpu_attention_node(struct ggml_context * ctx, cpu_attention * a, struct ggml_tensor * q,
                                        struct ggml_tensor * k, struct ggml_tensor * v) {
    struct ggml_tensor * kv[]   = { k, v };
    struct ggml_tensor * packed = ggml_custom_4d(ctx, GGML_TYPE_F32, packed_head_size(a), a->n_head, 1, 1, kv, 2, pack,
                                                 GGML_N_TASKS_MAX, a);
    struct ggml_tensor * src[]  = { q, packed };
    return ggml_custom_4d(ctx, GGML_TYPE_F32, q->ne[0], q->ne[1], 1, 1, src, 2, attend_blocks, GGML_N_TASKS_MAX, a);
}
