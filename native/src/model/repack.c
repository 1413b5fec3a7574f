#include "model/repack.h"

#include "devices.h"
#include "guard.h"

#include "ggml-cpu.h"

#include <stdlib.h>
#include <string.h>

ggml_backend_buffer_type_t * repack_layouts(ggml_backend_dev_t cpu) {
    void * function = NULL;
    if (guard_function(cpu, "ggml_backend_dev_get_extra_bufts", &function) != MLLAMA_OK || !function) {
        return NULL;
    }
    return ((ggml_backend_dev_get_extra_bufts_t) function)(cpu);
}

bool repack_multiplies(ggml_backend_dev_t cpu, ggml_backend_buffer_type_t layout, const struct ggml_tensor * matrix) {
    struct ggml_context * ctx    = NULL;
    ggml_backend_buffer_t buffer = NULL;
    bool                  ok     = false;
    if (guard_context(4 * ggml_tensor_overhead(), &ctx) == MLLAMA_OK &&
        guard_alloc_buffer(layout, 0, &buffer) == MLLAMA_OK && buffer) {
        struct ggml_tensor * w = ggml_new_tensor(ctx, matrix->type, 4, matrix->ne);
        struct ggml_tensor * x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, matrix->ne[0], 1);
        w->buffer = buffer;
        ok = guard_supports_op(cpu, ggml_mul_mat(ctx, w, x), &ok) == MLLAMA_OK && ok;
    }
    guard_buffer_free(buffer);
    ggml_free(ctx);
    return ok;
}

// Whether a name is in a list, "A,B".
static bool is_named(const char * names, const char * name) {
    const size_t n = strlen(name);
    for (const char * at = names; at && *at;) {
        const size_t length = strcspn(at, ",");
        if (length == n && strncmp(at, name, n) == 0) {
            return true;
        }
        at += length + (at[length] == ',');
    }
    return false;
}

// The types that mllama_repack_product makes matrices of. No other is repacked: nobody can have tried it.
static bool can_be_tried(int32_t type) {
    switch (type) {
        case GGML_TYPE_F32: case GGML_TYPE_F16: case GGML_TYPE_BF16:
        case GGML_TYPE_Q4_0: case GGML_TYPE_Q4_1: case GGML_TYPE_Q5_0: case GGML_TYPE_Q5_1: case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q2_K: case GGML_TYPE_Q3_K: case GGML_TYPE_Q4_K: case GGML_TYPE_Q5_K: case GGML_TYPE_Q6_K:
        case GGML_TYPE_IQ3_XXS:
        case GGML_TYPE_IQ3_S:
        case GGML_TYPE_IQ4_NL:
        case GGML_TYPE_IQ4_XS:
        case GGML_TYPE_MXFP4: return true;
        default:
            return false;
    }
}

ggml_backend_buffer_type_t repack_choose(ggml_backend_dev_t cpu, const char * names,
                                         const struct ggml_tensor * matrix) {
    ggml_backend_buffer_type_t * layout = can_be_tried((int32_t) matrix->type) ? repack_layouts(cpu) : NULL;
    for (; layout && *layout; layout++) {
        if (is_named(names, guard_layout_name(*layout)) && repack_multiplies(cpu, *layout, matrix)) {
            return *layout;
        }
    }
    return NULL;
}

// ---- a trial ------------------------------------------------------------------------------------------------------

const char * mllama_repack_layout(int32_t index) {
    ggml_backend_dev_t           cpu    = devices_init() == MLLAMA_OK ? devices_cpu() : NULL;
    ggml_backend_buffer_type_t * layout = cpu && index >= 0 ? repack_layouts(cpu) : NULL;
    for (int32_t i = 0; layout && *layout; i++, layout++) {
        if (i == index) {
            return guard_layout_name(*layout);
        }
    }
    return NULL;
}

// A product on the CPU: y = w x. w lies in a layout of its own.
typedef struct product {
    struct ggml_context * weights, * values;
    ggml_backend_buffer_t w_buffer, xy_buffer;
    ggml_backend_t        backend;
    struct ggml_tensor *  w, * x, * y;
    void *                packed; // w as its type, in the plain layout
} product;

static void product_free(product * p) {
    guard_buffer_free(p->w_buffer);
    guard_buffer_free(p->xy_buffer);
    guard_backend_free(p->backend);
    ggml_free(p->weights);
    ggml_free(p->values);
    free(p->packed);
}

// layout NULL: the plain one
static mllama_status product_init(product * p, ggml_backend_buffer_type_t layout, enum ggml_type type, int32_t n_in,
                                  int32_t n_out, int32_t n_columns) {
    const size_t size = 16 * ggml_tensor_overhead() + ggml_graph_overhead();
    TRY(guard_context(size, &p->weights));
    TRY(guard_context(size, &p->values));
    p->packed = malloc(ggml_row_size(type, n_in) * (size_t) n_out);
    TRY(guard_start(devices_cpu(), &p->backend));
    if (!p->packed || !p->backend) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    p->w = ggml_new_tensor_2d(p->weights, type, n_in, n_out);
    TRY(guard_alloc_tensors(p->weights, layout ? layout : ggml_backend_cpu_buffer_type(), &p->w_buffer));
    p->x = ggml_new_tensor_2d(p->values, GGML_TYPE_F32, n_in, n_columns);
    p->y = ggml_mul_mat(p->values, p->w, p->x);
    TRY(guard_alloc_tensors(p->values, ggml_backend_cpu_buffer_type(), &p->xy_buffer));
    return p->w_buffer && p->xy_buffer ? MLLAMA_OK : fail(MLLAMA_ERR_MEMORY, "out of memory");
}

// y = w x, with w [n_out, n_in] and x [n_columns, n_in] float32
static mllama_status product_compute(product * p, const float * w, const float * x, float * y, int32_t n_threads) {
    enum ggml_status     status;
    struct ggml_cgraph * graph = ggml_new_graph(p->weights);
    ggml_quantize_chunk(p->w->type, w, p->packed, 0, p->w->ne[1], p->w->ne[0], NULL);
    TRY(guard_set(p->w, p->packed, 0, ggml_nbytes(p->w)));
    TRY(guard_set(p->x, x, 0, ggml_nbytes(p->x)));
    ggml_build_forward_expand(graph, p->y);
    ggml_backend_cpu_set_n_threads(p->backend, n_threads);
    TRY(guard_compute(p->backend, graph, &status));
    if (status != GGML_STATUS_SUCCESS) {
        return fail(MLLAMA_ERR_BACKEND, "a product failed: %s", ggml_status_to_string(status));
    }
    return guard_get(p->y, y, 0, ggml_nbytes(p->y));
}

static mllama_status find_layout(const char * name, ggml_backend_dev_t cpu, ggml_backend_buffer_type_t * layout) {
    for (ggml_backend_buffer_type_t * one = repack_layouts(cpu); one && *one; one++) {
        if (strcmp(guard_layout_name(*one), name) == 0) {
            *layout = *one;
            return MLLAMA_OK;
        }
    }
    return fail(MLLAMA_ERR_ARGUMENT, "the CPU has no layout '%s' here", name);
}

mllama_status mllama_repack_product(const char * layout, int32_t type, const float * w, const float * x, float * y,
                                    int32_t n_in, int32_t n_out, int32_t n_columns, int32_t n_threads) {
    TRY(devices_init());
    const ggml_backend_dev_t   cpu   = devices_cpu();
    ggml_backend_buffer_type_t place = NULL;
    if (layout) {
        TRY(find_layout(layout, cpu, &place));
    }
    if (type < 0 || type >= GGML_TYPE_COUNT || !w || !x || !y || n_in < 1 || n_out < 1 || n_columns < 1 ||
        n_threads < 1 || n_threads > GGML_MAX_N_THREADS) {
        return fail(MLLAMA_ERR_ARGUMENT, "no product of type %d with %d x %d weights, %d columns and %d threads", type,
                    n_in, n_out, n_columns, n_threads);
    }
    const struct ggml_tensor wanted = { .type = (enum ggml_type) type, .ne = { n_in, n_out, 1, 1 } };
    if (!can_be_tried(type) || n_in % ggml_blck_size(wanted.type) != 0) {
        return fail(MLLAMA_ERR_ARGUMENT, "rows of %d values cannot be made %s", n_in, ggml_type_name(wanted.type));
    }
    if (place && !repack_multiplies(cpu, place, &wanted)) {
        return fail(MLLAMA_ERR_ARGUMENT, "layout %s has no products with %s matrices of %d x %d", layout,
                    ggml_type_name(wanted.type), n_in, n_out);
    }
    product       p      = { 0 };
    mllama_status status = product_init(&p, place, wanted.type, n_in, n_out, n_columns);
    if (status == MLLAMA_OK) {
        status = product_compute(&p, w, x, y, n_threads);
    }
    product_free(&p);
    return status;
}
