// Products of the text's quantized weights, see kernels.h
#include "guard.h"
#include "kernels/kernel.h"

enum { ALIGNMENT = 64 }; // of columns; ggml aligns tensors to less

const cpu_quantized * cpu_product_with(const cpu_kernel * kernel, const struct ggml_tensor * weight, int64_t n) {
    const bool here = weight->buffer && weight->ne[0] % QUANT_BLOCK == 0 && guard_is_host(weight->buffer);
    return kernel && here ? cpu_quantized_of(kernel, weight->type, n) : NULL;
}

const cpu_quantized * cpu_quantized_of(const cpu_kernel * kernel, enum ggml_type weights, int64_t n) {
    const cpu_quantized * with_32 = kernel->quantized_32;
    switch (weights) {
        case GGML_TYPE_Q4_K:
        case GGML_TYPE_Q5_K:
        case GGML_TYPE_Q6_K: return kernel->quantized;
        case GGML_TYPE_Q8_0: return with_32 && n <= with_32->q8_0_columns ? with_32 : NULL;
        case GGML_TYPE_Q4_0: return with_32;
        default:             return NULL;
    }
}

// Where the columns begin in a tensor for them
static char * columns_of(const struct ggml_tensor * t) {
    return (char *) (((uintptr_t) t->data + ALIGNMENT - 1) & ~(uintptr_t) (ALIGNMENT - 1));
}

// Bytes of a rounded column
static size_t column_size(const cpu_quantized * with, int64_t n_in) {
    return (size_t) (n_in / QUANT_BLOCK) * with->block_size;
}

static void quantize_columns(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    const cpu_quantized *      with = userdata;
    const struct ggml_tensor * x    = dst->src[0];
    const size_t               size = column_size(with, x->ne[0]);
    for (int64_t i = ith; i < x->ne[1]; i += nth) {
        const float * in = (const float *) ((const char *) x->data + (size_t) i * x->nb[1]);
        with->quantize(in, x->ne[0], columns_of(dst) + (size_t) i * size);
    }
}

struct ggml_tensor * cpu_quantize_node(struct ggml_context * ctx, const cpu_quantized * with, struct ggml_tensor * x) {
    const int64_t size = (int64_t) column_size(with, x->ne[0]) * x->ne[1] + ALIGNMENT;
    return ggml_custom_4d(ctx, GGML_TYPE_I8, size, 1, 1, 1, (struct ggml_tensor *[]) { x }, 1, quantize_columns,
                          GGML_N_TASKS_MAX, (void *) (uintptr_t) with);
}

// A task: some rows of W times the single column, or times some of the columns
static void multiply(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    cpu_product *              a     = userdata;
    const cpu_quantized *      with  = a->with;
    const struct ggml_tensor * w     = dst->src[0];
    const char *               x     = columns_of(dst->src[1]);
    const int64_t              n     = dst->ne[1], n_out = dst->ne[0];
    const int64_t              rows  = n == 1 ? with->rows_alone : with->rows, most = with->columns;
    const int64_t              parts = (n_out + rows - 1) / rows, n_tasks = parts * ((n + most - 1) / most);
    (void) nth;
    for (int64_t i = tasks_take(&a->tasks, ith, 1), then; i < n_tasks; i = then) {
        then = tasks_take(&a->tasks, ith, 1);
        const int64_t first = i % parts * rows, next = then < n_tasks ? then % parts * rows : first;
        if (n == 1) {
            with->multiply_column(w, x, first, first + rows < n_out ? first + rows : n_out, next, dst->data);
            continue;
        }
        const int64_t column = i / parts * most, n_columns = n - column < most ? n - column : most;
        with->multiply_columns(w, x + (size_t) column * column_size(with, w->ne[0]), n_columns, first, next,
                               (float *) dst->data + column * n_out);
    }
}

struct ggml_tensor * cpu_product_node(struct ggml_context * ctx, cpu_product * a, struct ggml_tensor * weight,
                                      struct ggml_tensor * quantized, int64_t n) {
    return ggml_custom_4d(ctx, GGML_TYPE_F32, weight->ne[1], n, 1, 1, (struct ggml_tensor *[]) { weight, quantized }, 2,
                          multiply, GGML_N_TASKS_MAX, a);
}
