// Bias and GELU, and copies from several tensors into one, see kernels.h
#include "finite.h"
#include "kernels/kernel.h"

#include <string.h>

static void bias_gelu(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    const cpu_kernel * kernel = userdata;
    const int64_t      n      = dst->ne[1];
    for (int64_t i = n * ith / nth; i < n * (ith + 1) / nth; i++) {
        float * row = (float *) ((char *) dst->data + (size_t) i * dst->nb[1]);
        kernel->f32->bias_gelu(row, dst->src[1]->data, dst->ne[0]);
    }
}

struct ggml_tensor * cpu_bias_gelu_node(struct ggml_context * ctx, const cpu_kernel * kernel, struct ggml_tensor * x,
                                        struct ggml_tensor * bias) {
    return ggml_custom_inplace(ctx, x, (struct ggml_tensor *[]) { bias }, 1, bias_gelu, GGML_N_TASKS_MAX,
                               (void *) (uintptr_t) kernel);
}

static void interleave(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    const int64_t n_values = dst->src[0]->ne[0], n = dst->ne[0] / n_values - 1;
    (void) userdata;
    for (int64_t row = dst->ne[1] * ith / nth; row < dst->ne[1] * (ith + 1) / nth; row++) {
        float *      out   = (float *) ((char *) dst->data + (size_t) row * dst->nb[1]);
        const char * first = (const char *) dst->src[0]->data + (size_t) row * dst->src[0]->nb[1];
        memcpy(out, first, (size_t) n_values * sizeof(float));
        out += n_values;
        for (int64_t i = 0; i < n; i++) {
            const struct ggml_tensor * src = dst->src[1 + i];
            const float *              in  = (const float *) ((const char *) src->data + (size_t) row * src->nb[1]);
            for (int64_t j = 0; j < n_values; j++) {
                out[j * n + i] = in[j];
            }
        }
    }
}

struct ggml_tensor * cpu_interleave_node(struct ggml_context * ctx, struct ggml_tensor ** tensors, int64_t n) {
    return ggml_custom_4d(ctx, GGML_TYPE_F32, n * tensors[0]->ne[0], tensors[0]->ne[1], 1, 1, tensors, (int) n,
                          interleave, GGML_N_TASKS_MAX, NULL);
}

static void join(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    const struct ggml_tensor * left = dst->src[0], * right = dst->src[1];
    const int64_t              n    = dst->ne[1];
    (void) userdata;
    for (int64_t i = n * ith / nth; i < n * (ith + 1) / nth; i++) {
        const bool                 is_left = i < left->ne[1];
        const struct ggml_tensor * from    = is_left ? left : right;
        const char * column = (const char *) from->data + (size_t) (is_left ? i : i - left->ne[1]) * from->nb[1];
        memcpy((char *) dst->data + (size_t) i * dst->nb[1], column, (size_t) dst->ne[0] * sizeof(float));
    }
}

struct ggml_tensor * cpu_join_node(struct ggml_context * ctx, struct ggml_tensor * left, struct ggml_tensor * right,
                                   struct ggml_tensor * beside) {
    struct ggml_tensor * src[] = { left, right, beside };
    return ggml_custom_4d(ctx, GGML_TYPE_F32, left->ne[0], left->ne[1] + right->ne[1], 1, 1, src, beside ? 3 : 2, join,
                          GGML_N_TASKS_MAX, NULL);
}

static void watch(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    const struct ggml_tensor * x = dst->src[0];
    for (int64_t i = ith; i < x->ne[1]; i += nth) {
        if (!finite_f32((const float *) ((const char *) x->data + (size_t) i * x->nb[1]), x->ne[0])) {
            atomic_store_explicit((atomic_bool *) userdata + i, true, memory_order_relaxed);
        }
    }
}

struct ggml_tensor * cpu_watch_node(struct ggml_context * ctx, struct ggml_tensor * x, struct ggml_tensor * beside,
                                    atomic_bool * seen) {
    return ggml_custom_4d(ctx, GGML_TYPE_I8, 1, 1, 1, 1, (struct ggml_tensor *[]) { x, beside }, 2, watch,
                          GGML_N_TASKS_MAX, seen);
}
