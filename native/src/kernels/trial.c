// Trials: how fast a part of a kernel is on this processor, and whether it is right. Shapes are those of the 11B model,
// with fewer outputs, rows or heads, so that one computation takes a few milliseconds. There are as many columns as the
// tasks of all tables take.
#include "devices.h"
#include "guard.h"
#include "kernels/kernel.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    EMBD = 1280, LINEAR_OUT = 128, LINEAR_COLUMNS = 8 * COLUMNS,              // a linear layer of the encoder
    VISION_HEAD = 80, IMAGE_ROWS = 1601, IMAGE_KEYS = 1608,                   // a tile, and with its pads
    HEADS = 16, KV_HEADS = 4, TEXT_HEAD = 128, CACHE_ROWS = 500, PROMPT = 12, // the text's attention
    TEXT_EMBD = 4096, TOGETHER = 128,                                         // products, of one column and several
    DISTINCT = 17,                                                            // rows of quantized weights
    MOST = 8,                                                                 // results of one trial
    RUNS = 2,                                                                 // at least
};

// One part of one kernel, with its own copies of the input
typedef struct trial {
    cpu_kernel            kernel;
    cpu_part              part;
    struct ggml_context * ctx;
    ggml_backend_t        backend;
    ggml_backend_buffer_t buffer;
    struct ggml_cgraph *  before, * timed; // what is packed or rounded once for many computations; the rest
    struct ggml_tensor *  inputs[2 * MOST], * results[MOST];
    int                   n_inputs, n_results;
    tasks *               tasks[MOST];
    int                   n_tasks;
    cpu_linear            linear;
    cpu_attention         attention;
    cpu_cache_attention   caches[2];
    cpu_cache_item        items[2];
    cpu_product           products[MOST];
} trial;

// ---- input --------------------------------------------------------------------------------------------------------

static float chance(uint32_t * state) { // from -1 to 1
    *state = *state * 1664525u + 1013904223u;
    return (float) (int32_t) *state * 0x1p-31f;
}

static struct ggml_tensor * input(trial * t, enum ggml_type type, int64_t n, int64_t n_rows) {
    return t->inputs[t->n_inputs++] = ggml_new_tensor_2d(t->ctx, type, n, n_rows);
}

// Rows of quantized weights: the first DISTINCT are made, the others repeat them.
static mllama_status fill_rows(struct ggml_tensor * w, uint32_t * state) {
    const size_t n   = (size_t) w->ne[0] * DISTINCT, row = w->nb[1];
    float *      raw = malloc(n * sizeof(float));
    if (!raw) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    for (size_t i = 0; i < n; i++) {
        raw[i] = chance(state);
    }
    ggml_quantize_chunk(w->type, raw, w->data, 0, DISTINCT, w->ne[0], NULL);
    free(raw);
    for (int64_t i = DISTINCT; i < w->ne[1]; i++) {
        memcpy((char *) w->data + (size_t) i * row, (char *) w->data + (size_t) (i - DISTINCT) * row, row);
    }
    return MLLAMA_OK;
}

// The same for every kernel that tries this part
static mllama_status fill_inputs(trial * t) {
    uint32_t state = 1;
    for (int i = 0; i < t->n_inputs; i++) {
        struct ggml_tensor * x = t->inputs[i];
        if (ggml_is_quantized(x->type)) {
            TRY(fill_rows(x, &state));
            continue;
        }
        for (int64_t j = 0; j < ggml_nelements(x); j++) {
            const float value = chance(&state);
            switch (x->type) {
                case GGML_TYPE_F16:  ggml_fp32_to_fp16_row(&value, (ggml_fp16_t *) x->data + j, 1); break;
                case GGML_TYPE_BF16: ggml_fp32_to_bf16_row(&value, (ggml_bf16_t *) x->data + j, 1); break;
                default:             ((float *) x->data)[j] = value; break;
            }
        }
    }
    return MLLAMA_OK;
}

// ---- work ---------------------------------------------------------------------------------------------------------

// packed: the source of the result that is computed before; -1: none
static void add(trial * t, struct ggml_tensor * result, int packed, tasks * its_tasks) {
    if (packed >= 0) {
        struct ggml_tensor * made = result->src[packed], * leaf = ggml_view_tensor(t->ctx, made);
        ggml_build_forward_expand(t->before, made);
        leaf->op = GGML_OP_NONE; // the same memory, but nothing to compute
        leaf->src[0] = NULL;
        result->src[packed] = leaf;
    }
    if (its_tasks) {
        t->tasks[t->n_tasks++] = its_tasks;
    }
    ggml_build_forward_expand(t->timed, result);
    t->results[t->n_results++] = result;
}

static void add_linear(trial * t, enum ggml_type type, bool own) {
    struct ggml_tensor * w = input(t, type, EMBD, LINEAR_OUT), * x = input(t, GGML_TYPE_F32, EMBD, LINEAR_COLUMNS);
    t->linear.kernel = &t->kernel;
    if (own) {
        add(t, cpu_linear_node(t->ctx, &t->linear, w, NULL, x), 1, &t->linear.tasks);
    } else {
        add(t, ggml_mul_mat(t->ctx, w, x), -1, NULL);
    }
}

static void add_attention(trial * t, bool bf16) {
    struct ggml_tensor * q = input(t, GGML_TYPE_F32, VISION_HEAD, COLUMNS);
    struct ggml_tensor * k = input(t, GGML_TYPE_F32, VISION_HEAD, IMAGE_KEYS);
    struct ggml_tensor * v = input(t, GGML_TYPE_F32, VISION_HEAD, IMAGE_KEYS);
    t->attention = (cpu_attention) {
        .kernel = &t->kernel, .n_head = 1, .head_dim = VISION_HEAD, .n_real = IMAGE_ROWS, .n_all = IMAGE_KEYS,
        .repeats = 1.0f, .bf16 = bf16,
    };
    add(t, cpu_attention_node(t->ctx, &t->attention, q, k, v), 1, &t->attention.tasks);
}

// Of a single token, and of a part of a prompt
static void add_cache_attention(trial * t) {
    struct ggml_tensor * k = input(t, GGML_TYPE_F16, TEXT_HEAD * KV_HEADS, CACHE_ROWS);
    struct ggml_tensor * v = input(t, GGML_TYPE_F16, TEXT_HEAD * KV_HEADS, CACHE_ROWS);
    for (int i = 0; i < 2; i++) {
        const int64_t        n = i == 0 ? 1 : PROMPT;
        struct ggml_tensor * q = input(t, GGML_TYPE_F32, TEXT_HEAD * HEADS, n);
        t->items[i]  = (cpu_cache_item) { .k = k, .v = v, .n_columns = n, .n_rows = CACHE_ROWS, .mask = -1 };
        t->caches[i] = (cpu_cache_attention) {
            .kernel = &t->kernel, .n_head = HEADS, .n_head_kv = KV_HEADS, .head_dim = TEXT_HEAD,
            .items = &t->items[i], .n_items = 1,
        };
        add(t, cpu_cache_attention_node(t->ctx, &t->caches[i], q, NULL), -1, &t->caches[i].tasks);
    }
}

// Types of weights of a part, with the rows that are multiplied by a single column and by several: most files are
// Q4_K_M, of Q4_K and some Q6_K. Q5_K counts little.
typedef struct quantized_work {
    enum ggml_type type;
    int64_t        alone, together;
} quantized_work;
static const quantized_work QUANTIZED[] = {
    { GGML_TYPE_Q4_K, 1024, 64 }, { GGML_TYPE_Q6_K, 512, 32 }, { GGML_TYPE_Q5_K, 128, 32 }, { GGML_TYPE_COUNT, 0, 0 },
};
static const quantized_work QUANTIZED_32[] = {
    { GGML_TYPE_Q8_0, 512, 32 }, { GGML_TYPE_Q4_0, 512, 32 }, { GGML_TYPE_COUNT, 0, 0 },
};

static void add_product(trial * t, enum ggml_type type, int64_t n_out, int64_t n) {
    cpu_product *        product = &t->products[t->n_results];
    struct ggml_tensor * w       = input(t, type, TEXT_EMBD, n_out), * x = input(t, GGML_TYPE_F32, TEXT_EMBD, n);
    product->with = cpu_quantized_of(&t->kernel, type, n);
    if (product->with) {
        struct ggml_tensor * rounded = cpu_quantize_node(t->ctx, product->with, x);
        add(t, cpu_product_node(t->ctx, product, w, rounded, n), 1, &product->tasks);
    } else {
        add(t, ggml_mul_mat(t->ctx, w, x), -1, NULL);
    }
}

static void add_products(trial * t, const quantized_work * work) {
    for (; work->type != GGML_TYPE_COUNT; work++) {
        add_product(t, work->type, work->alone, 1);
        add_product(t, work->type, work->together, TOGETHER);
    }
}

static void add_work(trial * t) {
    const cpu_kernel * kernel = &t->kernel;
    switch (t->part) {
        case CPU_ATTENTION:    add_attention(t, false); break;
        case CPU_LINEAR:       add_linear(t, GGML_TYPE_F16, kernel->linear); break;
        case CPU_BF16:
            add_linear(t, GGML_TYPE_BF16, kernel->bf16 || (kernel->linear && !kernel->bf16_by_ggml));
            add_attention(t, kernel->bf16);
            break;
        case CPU_CACHE:        add_cache_attention(t); break;
        case CPU_QUANTIZED_32: add_products(t, QUANTIZED_32); break;
        default:               add_products(t, QUANTIZED); break;
    }
}

static mllama_status compute(trial * t, struct ggml_cgraph * graph) {
    enum ggml_status status;
    for (int i = 0; i < t->n_tasks; i++) {
        tasks_reset(t->tasks[i]);
    }
    TRY(guard_compute(t->backend, graph, &status));
    return status == GGML_STATUS_SUCCESS
               ? MLLAMA_OK
               : fail(MLLAMA_ERR_BACKEND, "a trial failed: %s", ggml_status_to_string(status));
}

static void end(trial * t) {
    guard_buffer_free(t->buffer);
    guard_backend_free(t->backend);
    ggml_free(t->ctx);
}

// Everything up to the first results
static mllama_status begin(trial * t, const cpu_kernel * kernel, cpu_part part, int32_t n_threads) {
    *t = (trial) { .kernel = *kernel, .part = part };
    const size_t size = 64 * ggml_tensor_overhead() + 2 * ggml_graph_overhead();
    TRY(guard_context(size, &t->ctx));
    TRY(devices_init());
    TRY(guard_start(devices_cpu(), &t->backend));
    void * set = NULL;
    TRY(guard_function(devices_cpu(), "ggml_backend_set_n_threads", &set));
    ggml_backend_buffer_type_t type = NULL;
    TRY(guard_buffer_type(devices_cpu(), &type));
    if (!t->backend || !set || !type) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    ((ggml_backend_set_n_threads_t) set)(t->backend, n_threads);
    t->before = ggml_new_graph(t->ctx);
    t->timed  = ggml_new_graph(t->ctx);
    add_work(t);
    TRY(guard_alloc_tensors(t->ctx, type, &t->buffer));
    if (!t->buffer) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    TRY(fill_inputs(t));
    TRY(compute(t, t->before));
    return compute(t, t->timed);
}

// ---- errors -------------------------------------------------------------------------------------------------------

// What rounding explains, of single values beside the usual size of all: F16 in ggml's products, BF16 or 8 bits. A
// wrong value is off by about 1.
static const double BOUNDS[CPU_F16] = {
    [CPU_ATTENTION] = 1e-3, [CPU_LINEAR] = 1e-2, [CPU_BF16] = 0.05, [CPU_CACHE] = 1e-3, [CPU_QUANTIZED] = 0.1,
    [CPU_QUANTIZED_32] = 0.1,
};

// What should be there
typedef struct expected {
    const float * values;
    int64_t       n, n_rows, n_distinct; // rows are repeated after so many values: 0, not at all
} expected;

// The largest error of a result, beside the root of the mean square of what should be there
static double error_of(const struct ggml_tensor * result, const expected * e) {
    const float * got = result->data;
    double        most = 0.0, squares = 0.0;
    for (int64_t row = 0; row < e->n_rows; row++) {
        for (int64_t i = 0; i < e->n; i++) {
            const int64_t at    = e->n_distinct ? row * e->n_distinct + i % e->n_distinct : row * e->n + i;
            const double  want  = e->values[at], error = fabs((double) got[row * e->n + i] - want);
            most = error <= most ? most : isnan(error) ? INFINITY : error;
            squares += want * want;
        }
    }
    return most / sqrt(squares / (double) (e->n * e->n_rows));
}

// Products by plain sums: [columns][DISTINCT]
static mllama_status multiply(const struct ggml_tensor * w, const struct ggml_tensor * x, float * out) {
    float * row = malloc(sizeof(float) * (size_t) w->ne[0]);
    if (!row) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    for (int64_t j = 0; j < DISTINCT; j++) {
        ggml_get_type_traits(w->type)->to_float((const char *) w->data + (size_t) j * w->nb[1], row, w->ne[0]);
        for (int64_t column = 0; column < x->ne[1]; column++) {
            const float * in     = (const float *) x->data + column * x->ne[0];
            double        sums[4] = { 0.0 };
            for (int64_t i = 0; i < w->ne[0]; i++) {
                sums[i % 4] += (double) row[i] * in[i];
            }
            out[column * DISTINCT + j] = (float) (sums[0] + sums[1] + sums[2] + sums[3]);
        }
    }
    free(row);
    return MLLAMA_OK;
}

static mllama_status product_error(const trial * t, double * most) {
    float out[TOGETHER * DISTINCT];
    for (int i = 0; i < t->n_results; i++) {
        const struct ggml_tensor * result = t->results[i];
        const expected             e      = {
            .values = out, .n = result->ne[0], .n_rows = result->ne[1], .n_distinct = DISTINCT,
        };
        TRY(multiply(t->inputs[2 * i], t->inputs[2 * i + 1], out));
        const double error = error_of(result, &e);
        *most = error <= *most ? *most : error;
    }
    return MLLAMA_OK;
}

// The portable table for everything, with factors in F32
static mllama_status portable_error(const trial * t, double * most) {
    const cpu_f32 *  table    = &cpu_f32_portable;
    const cpu_kernel portable = { .attention = table, .linear = table, .cache = table, .f32 = table };
    trial            plain;
    mllama_status    status = begin(&plain, &portable, t->part, 1);
    for (int i = 0; status == MLLAMA_OK && i < t->n_results; i++) {
        const struct ggml_tensor * result = t->results[i];
        const expected e = { .values = plain.results[i]->data, .n = result->ne[0], .n_rows = result->ne[1] };
        const double   error = error_of(result, &e);
        *most = error <= *most ? *most : error;
    }
    end(&plain);
    return status;
}

// ---- public -------------------------------------------------------------------------------------------------------

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double) t.tv_sec + 1e-9 * (double) t.tv_nsec;
}

static mllama_status measure(trial * t, double seconds, double * best) {
    const double start = now();
    *best = INFINITY;
    for (int i = 0; i < RUNS || now() - start < seconds; i++) {
        const double begun = now();
        TRY(compute(t, t->timed));
        const double took = now() - begun;
        *best = took < *best ? took : *best;
    }
    return MLLAMA_OK;
}

mllama_status mllama_cpu_try(const char * kernel, int32_t part, int32_t n_threads, double seconds, bool check,
                             mllama_cpu_trial * result) {
    const cpu_kernel * chosen = NULL;
    if (part < 0 || part >= CPU_F16 || n_threads < 1 || n_threads > GGML_MAX_N_THREADS || !(seconds >= 0.0) ||
        !result) {
        return fail(MLLAMA_ERR_ARGUMENT, "no trial of part %d with %d threads for %g s", part, n_threads, seconds);
    }
    TRY(cpu_kernel_choose(kernel, &chosen));
    if (!chosen || (part == CPU_ATTENTION && !chosen->attention) || (part == CPU_CACHE && !chosen->cache) ||
        (part == CPU_BF16 && !chosen->bf16 && !chosen->attention)) {
        return fail(MLLAMA_ERR_ARGUMENT, "ggml's attention cannot be tried");
    }
    trial         t;
    mllama_status status = begin(&t, chosen, (cpu_part) part, n_threads);
    *result = (mllama_cpu_trial) { .right = true };
    if (status == MLLAMA_OK && check) {
        const bool products = part == CPU_QUANTIZED || part == CPU_QUANTIZED_32;
        status = products ? product_error(&t, &result->error) : portable_error(&t, &result->error);
        result->right = result->error <= BOUNDS[part];
    }
    if (status == MLLAMA_OK) {
        status = measure(&t, seconds, &result->seconds);
    }
    end(&t);
    return status;
}
