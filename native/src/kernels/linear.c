// Linear layers of the encoder, see kernels.h
#include "guard.h"
#include "kernels/kernel.h"

#include <string.h>

enum { PIECE = 64 }; // values of a row that are widened at a time

// Whether factors are rounded to BF16
static bool in_bf16(const cpu_kernel * kernel, const struct ggml_tensor * weight) {
    return cpu_in_bf16(kernel, weight->type) && weight->ne[0] % 2 == 0;
}

bool cpu_linear_supported(const cpu_kernel * kernel, const struct ggml_tensor * weight) {
    const ggml_backend_buffer_t buffer = weight->view_src ? weight->view_src->buffer : weight->buffer;
    if (!kernel || !buffer || !guard_is_host(buffer)) {
        return false;
    }
    switch (weight->type) {
        case GGML_TYPE_BF16: return in_bf16(kernel, weight) || (kernel->linear && !kernel->bf16_by_ggml);
        case GGML_TYPE_F16:  return in_bf16(kernel, weight) || kernel->linear;
        case GGML_TYPE_F32:  return kernel->linear;
        default:             return false;
    }
}

// Outputs in a panel
static int64_t panel_width(const cpu_linear * a) {
    return a->bf16 ? a->kernel->bf16->width : a->kernel->linear->width;
}

// Most of x in a task: what both layers of an MLP can do
static int64_t most_columns(const cpu_linear * a) {
    const int64_t own = a->bf16 ? a->kernel->bf16->columns : COLUMNS, then = a->then ? most_columns(a->then) : own;
    return own < then ? own : then;
}

// out [n_in][width] from `width` rows of the weight, from row `first` on; those that do not exist are 0
static void pack_floats(const struct ggml_tensor * w, int64_t first, int64_t width, float * out) {
    const int64_t         n_in  = w->ne[0];
    const ggml_to_float_t widen = ggml_get_type_traits(w->type)->to_float;
    const size_t          item  = ggml_type_size(w->type);
    float                 rows[MAX_WIDTH][PIECE];
    for (int64_t at = 0; at < n_in; at += PIECE) {
        const int64_t n = n_in - at < PIECE ? n_in - at : PIECE;
        for (int64_t j = 0; j < width; j++) {
            const int64_t row = first + j;
            const char *  in  = (const char *) w->data + (size_t) row * w->nb[1] + (size_t) at * item;
            if (row >= w->ne[1]) {
                memset(rows[j], 0, sizeof(rows[j]));
            } else if (widen) {
                widen(in, rows[j], n);
            } else {
                memcpy(rows[j], in, (size_t) n * sizeof(float));
            }
        }
        for (int64_t i = 0; i < n; i++, out += width) {
            for (int64_t j = 0; j < width; j++) {
                out[j] = rows[j][i];
            }
        }
    }
}

// n values of a row in BF16: those of another type are rounded, a row that does not exist is 0
static void read_bf16(const struct ggml_tensor * w, int64_t row, int64_t first, int64_t n, ggml_bf16_t * out) {
    const char * in = (const char *) w->data + (size_t) row * w->nb[1] + (size_t) first * ggml_type_size(w->type);
    float        wide[PIECE];
    if (row >= w->ne[1]) {
        memset(out, 0, sizeof(*out) * (size_t) n);
    } else if (w->type == GGML_TYPE_BF16) {
        memcpy(out, in, sizeof(*out) * (size_t) n);
    } else {
        ggml_get_type_traits(w->type)->to_float(in, wide, n);
        ggml_fp32_to_bf16_row(wide, out, n);
    }
}

// The same in BF16: [n_in / 2][width] pairs
static void pack_pairs(const struct ggml_tensor * w, int64_t first, int64_t width, float * out) {
    ggml_bf16_t rows[MAX_WIDTH][PIECE];
    for (int64_t at = 0; at < w->ne[0]; at += PIECE) {
        const int64_t n = w->ne[0] - at < PIECE ? w->ne[0] - at : PIECE;
        for (int64_t j = 0; j < width; j++) {
            read_bf16(w, first + j, at, n, rows[j]);
        }
        for (int64_t i = 0; i < n; i += 2, out += width) {
            for (int64_t j = 0; j < width; j++) {
                memcpy(out + j, rows[j] + i, sizeof(bf16_pair));
            }
        }
    }
}

// dst [width * (1 + n_in, or n_in / 2 pairs), panels] from the weight and the bias, with which the sums begin
static void pack_weight(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    const cpu_linear *         a     = userdata;
    const struct ggml_tensor * w     = dst->src[0];
    const struct ggml_tensor * bias  = dst->src[1];
    const int64_t              width = panel_width(a), n_out = w->ne[1];
    for (int64_t p = dst->ne[1] * ith / nth; p < dst->ne[1] * (ith + 1) / nth; p++) {
        float * out = (float *) ((char *) dst->data + (size_t) p * dst->nb[1]);
        for (int64_t j = 0; j < width; j++) {
            const int64_t row = p * width + j;
            out[j] = bias && row < n_out ? ((const float *) bias->data)[row] : 0.0f;
        }
        if (a->bf16) {
            pack_pairs(w, p * width, width, out + width);
        } else {
            pack_floats(w, p * width, width, out + width);
        }
    }
}

static struct ggml_tensor * pack_node(struct ggml_context * ctx, cpu_linear * a, struct ggml_tensor * weight,
                                      struct ggml_tensor * bias) {
    a->bf16  = in_bf16(a->kernel, weight);
    a->n_in  = weight->ne[0];
    a->n_out = weight->ne[1];
    const int64_t        width = panel_width(a), depth = a->bf16 ? a->n_in / 2 : a->n_in;
    struct ggml_tensor * src[] = { weight, bias };
    return ggml_custom_4d(ctx, GGML_TYPE_F32, width * (1 + depth), round_up(a->n_out, width) / width, 1, 1, src,
                          bias ? 2 : 1, pack_weight, GGML_N_TASKS_MAX, a);
}

// out [n][n_out] = W x + b or gelu of it, for n rows of x
static void multiply_rows(const cpu_linear * a, const float * x, size_t x_stride, int64_t n,
                          const struct ggml_tensor * packed, float * out) {
    const linear_args args = {
        .x = x, .x_stride = x_stride, .n = n, .n_in = a->n_in, .n_out = a->n_out, .w = packed->data, .out = out,
        .out_stride = a->n_out,
    };
    (a->bf16 ? a->kernel->bf16->linear : a->kernel->linear->linear)(&args);
    for (int64_t i = 0; a->gelu && i < n; i++) {
        a->kernel->f32->bias_gelu(out + i * a->n_out, NULL, a->n_out);
    }
}

// One linear layer, or two: then a block's values between them stay in the thread's row of dst->src[3].
static void multiply(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    cpu_linear *               a     = userdata;
    const struct ggml_tensor * x     = dst->src[0];
    const int64_t              n     = x->ne[1], share = n / (4 * nth); // small enough that all threads end together
    const int64_t              most  = most_columns(a), whole = share > most ? most : share / QUERIES * QUERIES;
    const int64_t              step  = share < QUERIES ? QUERIES : whole;
    if (a->then && ith >= dst->src[3]->ne[1]) {
        return;
    }
    for (int64_t first; (first = tasks_take(&a->tasks, ith, step)) < n;) {
        const int64_t some = n - first < step ? n - first : step;
        const float * in   = (const float *) ((const char *) x->data + (size_t) first * x->nb[1]);
        float *       out  = (float *) ((char *) dst->data + (size_t) first * dst->nb[1]);
        if (a->then) {
            float * between = (float *) ((char *) dst->src[3]->data + (size_t) ith * dst->src[3]->nb[1]);
            multiply_rows(a, in, x->nb[1], some, dst->src[1], between);
            multiply_rows(a->then, between, sizeof(float) * (size_t) a->n_out, some, dst->src[2], out);
        } else {
            multiply_rows(a, in, x->nb[1], some, dst->src[1], out);
        }
    }
}

struct ggml_tensor * cpu_linear_node(struct ggml_context * ctx, cpu_linear * a, struct ggml_tensor * weight,
                                     struct ggml_tensor * bias, struct ggml_tensor * x) {
    struct ggml_tensor * src[] = { x, pack_node(ctx, a, weight, bias) };
    return ggml_custom_4d(ctx, GGML_TYPE_F32, a->n_out, x->ne[1], 1, 1, src, 2, multiply, GGML_N_TASKS_MAX, a);
}

static void nothing(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) dst, (void) ith, (void) nth, (void) userdata;
}

struct ggml_tensor * cpu_mlp_node(struct ggml_context * ctx, cpu_linear * a, struct ggml_tensor * fc1,
                                  struct ggml_tensor * fc1_b, cpu_linear * b, struct ggml_tensor * fc2,
                                  struct ggml_tensor * fc2_b, struct ggml_tensor * x, int64_t n_threads) {
    a->gelu = true;
    a->then = b;
    struct ggml_tensor * first  = pack_node(ctx, a, fc1, fc1_b), * second = pack_node(ctx, b, fc2, fc2_b);
    struct ggml_tensor * between = ggml_custom_4d(ctx, GGML_TYPE_F32, most_columns(a) * fc1->ne[1], n_threads, 1, 1,
                                                  NULL, 0, nothing, 1, NULL);
    struct ggml_tensor * src[]   = { x, first, second, between };
    return ggml_custom_4d(ctx, GGML_TYPE_F32, b->n_out, x->ne[1], 1, 1, src, 4, multiply, GGML_N_TASKS_MAX, a);
}
