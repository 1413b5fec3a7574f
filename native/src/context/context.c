// A context: its settings, its devices, its life. See context.h for the other files.
#include "context/context.h"
#include "guard.h"
#include "model/weights.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

mllama_context_params mllama_context_default_params(void) {
    return (mllama_context_params){
        .n_ctx       = 4096,
        .n_batch     = 512,
        .type_k      = MLLAMA_KV_F16,
        .type_v      = MLLAMA_KV_F16,
        .flash_attn  = true,
        .offload_kqv = true,
    };
}

static mllama_status ggml_type_of(int32_t kv_type, enum ggml_type * type) {
    switch (kv_type) {
        case MLLAMA_KV_F32:  *type = GGML_TYPE_F32; return MLLAMA_OK;
        case MLLAMA_KV_F16:  *type = GGML_TYPE_F16; return MLLAMA_OK;
        case MLLAMA_KV_Q8_0: *type = GGML_TYPE_Q8_0; return MLLAMA_OK;
        default: return fail(MLLAMA_ERR_ARGUMENT, "%d is not a cache type: F32, F16 or Q8_0", kv_type);
    }
}

static mllama_status add_backend(mllama_context * ctx, ggml_backend_dev_t device) {
    if (ctx->n_backends == MAX_BACKENDS) {
        return fail(MLLAMA_ERR_BACKEND, "too many devices");
    }
    ggml_backend_t backend   = NULL;
    void *         set_abort = NULL;
    TRY(guard_start(device, &backend));
    if (!backend) {
        return fail(MLLAMA_ERR_BACKEND, "device %s cannot be started", device_label(device));
    }
    ctx->backends[ctx->n_backends++] = backend;
    TRY(guard_function(device, "ggml_backend_set_abort_callback", &set_abort));
    if (set_abort) {
        ((ggml_backend_set_abort_callback_t) set_abort)(backend, context_should_abort, ctx);
    }
    return MLLAMA_OK;
}

// Once, as the types of the caches depend on it
static mllama_status choose_kernel(mllama_context * ctx) {
    const cpu_kernel * kernel = NULL;
    TRY(cpu_kernel_choose(ctx->params.cpu_kernel, &kernel));
    ctx->params.cpu_kernel = NULL; // the caller's
    ctx->env               = (compute_env){
        .kernel     = ctx->params.flash_attn ? kernel : NULL,
        .flash_attn = ctx->params.flash_attn,
        .exact      = ctx->params.exact && ctx->model->plan.n_gpus > 0,
        .stop       = context_look,
        .stop_data  = ctx,
    };
    return MLLAMA_OK;
}

// ggml's CPU kernel sums F16 values unnormalised in F16: three digits are left, and many rows of large values overflow
// (seen: values of 2000). So values on the CPU are F16 only where our kernel reads them; it sums in F32.
static enum ggml_type cpu_values(const mllama_hparams * p, const cpu_kernel * kernel, const kv_types * types) {
    const cpu_cache_attention attention = {
        .kernel = kernel, .n_head = p->n_head, .n_head_kv = p->n_head_kv, .head_dim = p->head_dim
    };
    return types->v == GGML_TYPE_F16 && !cpu_cache_attention_has(&attention, types->k, types->v) ? GGML_TYPE_F32
                                                                                                 : types->v;
}

static mllama_status check_params(mllama_context * ctx) {
    const mllama_hparams * p    = &ctx->model->hp.pub;
    kv_types *             self = &ctx->types, * cross = &ctx->cross_types;
    TRY(ggml_type_of(ctx->params.type_k, &self->k));
    TRY(ggml_type_of(ctx->params.type_v, &self->v));
    cross->k = ggml_is_quantized(self->k) ? GGML_TYPE_F16 : self->k;
    cross->v = ggml_is_quantized(self->v) ? GGML_TYPE_F16 : self->v;
    self->v_cpu  = cpu_values(p, ctx->env.kernel, self);
    cross->v_cpu = cpu_values(p, ctx->env.kernel, cross);
    if (ctx->params.n_ctx == 0) {
        ctx->params.n_ctx = p->n_ctx_train;
    }
    if (ctx->params.n_ctx < 1 || ctx->params.n_ctx > p->n_ctx_train) {
        return fail(MLLAMA_ERR_ARGUMENT, "n_ctx is %d; this model takes 1 to %d", ctx->params.n_ctx, p->n_ctx_train);
    }
    if (ctx->params.n_batch < 1 || ctx->params.n_batch > MAX_BATCH) {
        return fail(MLLAMA_ERR_ARGUMENT, "n_batch is %d; it can be 1 to %d", ctx->params.n_batch, MAX_BATCH);
    }
    if (ctx->params.n_threads > GGML_MAX_N_THREADS) {
        return fail(MLLAMA_ERR_ARGUMENT, "n_threads is %d; at most %d are possible", ctx->params.n_threads,
                    GGML_MAX_N_THREADS);
    }
    ctx->n_step = ctx->params.n_batch;
    if (ctx->params.n_batch > ctx->params.n_ctx) {
        ctx->params.n_batch = ctx->params.n_ctx;
    }
    if ((ggml_is_quantized(ctx->types.k) || ggml_is_quantized(ctx->types.v)) && p->head_dim % 32 != 0) {
        return fail(MLLAMA_ERR_ARGUMENT,
                    "a Q8_0 cache needs heads of a multiple of 32 values, this model's have %d; use F16", p->head_dim);
    }
    if (ggml_is_quantized(ctx->types.v) && !ctx->params.flash_attn) {
        return fail(MLLAMA_ERR_ARGUMENT, "a Q8_0 cache of values needs flash_attn");
    }
    return MLLAMA_OK;
}

static mllama_status init(mllama_context * ctx) {
    const mllama_model * model = ctx->model;
    TRY(choose_kernel(ctx));
    TRY(check_params(ctx));
    if (!model->token_embd) {
        return fail(MLLAMA_ERR_ARGUMENT, "the model was opened for checking only");
    }
    for (int32_t i = 0; i < model->plan.n_gpus; i++) {
        TRY(add_backend(ctx, model->plan.gpus[i]));
    }
    for (int32_t i = 0; i < devices_count(); i++) {
        if (!device_is_accel(devices_get(i))) {
            continue;
        }
        if (device_start(devices_get(i)) != MLLAMA_OK) {
            log_warn("the CPU works without it: %s", mllama_last_error());
            continue;
        }
        TRY(add_backend(ctx, devices_get(i)));
    }
    TRY(add_backend(ctx, model->plan.cpu));
    mllama_set_n_threads(ctx, ctx->params.n_threads);
    return sequence_init(ctx, &ctx->own, ctx->params.n_ctx, ctx->params.n_ctx);
}

mllama_status mllama_context_new(const mllama_model * model, const mllama_context_params * params,
                                 mllama_context ** out) {
    if (!model || !params || !out) {
        return fail(MLLAMA_ERR_ARGUMENT, "mllama_context_new: NULL argument");
    }
    *out = NULL;
    mllama_context * ctx = calloc(1, sizeof(*ctx));
    if (!ctx) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    ctx->model  = model;
    ctx->params = *params;
    const mllama_status status = init(ctx);
    if (status != MLLAMA_OK) {
        mllama_context_free(ctx);
        return status;
    }
    *out = ctx;
    return MLLAMA_OK;
}

void mllama_context_free(mllama_context * ctx) {
    if (!ctx) {
        return;
    }
    text_graph_free(&ctx->text);
    guard_sched_free(ctx->sched);
    for (int32_t i = 0; i < ctx->n_slots; i++) {
        image_slot_free(&ctx->slots[i]);
    }
    free(ctx->slots);
    sequence_end(&ctx->own);
    for (int32_t i = 0; i < ctx->n_more; i++) {
        sequence_end(ctx->more[i]);
        free(ctx->more[i]);
    }
    free(ctx->more);
    guard_buffer_free(ctx->patches);
    for (int32_t i = 0; i < ctx->n_backends; i++) {
        guard_backend_free(ctx->backends[i]);
    }
    free(ctx->tap_values);
    free(ctx);
}

int32_t mllama_n_ctx(const mllama_context * ctx) {
    return ctx->params.n_ctx;
}

const char * mllama_kernel_name(const mllama_context * ctx) {
    return cpu_kernel_name(ctx->env.kernel);
}

void mllama_set_n_threads(mllama_context * ctx, int32_t n_threads) {
    if (n_threads <= 0) {
        const long n_cpus = sysconf(_SC_NPROCESSORS_ONLN);
        n_threads = n_cpus > 0 ? (int32_t) n_cpus : 1;
    }
    n_threads = n_threads > GGML_MAX_N_THREADS ? GGML_MAX_N_THREADS : n_threads;
    ctx->env.n_threads = n_threads;
    for (int32_t i = 0; i < ctx->n_backends; i++) {
        void * set = NULL;
        guard_function(ggml_backend_get_device(ctx->backends[i]), "ggml_backend_set_n_threads", &set);
        if (set) {
            ((ggml_backend_set_n_threads_t) set)(ctx->backends[i], n_threads);
        }
    }
}

int32_t mllama_memory_count(const mllama_context * ctx) {
    return 1 + ctx->model->plan.n_gpus;
}

mllama_status mllama_memory_usage(const mllama_context * ctx, int32_t index, mllama_memory * memory) {
    if (index < 0 || index >= mllama_memory_count(ctx)) {
        return fail(MLLAMA_ERR_ARGUMENT, "no device %d; this context uses %d", index, mllama_memory_count(ctx));
    }
    const device_plan *      plan   = &ctx->model->plan;
    const ggml_backend_dev_t device = index == 0 ? plan->cpu : plan->gpus[index - 1];
    memset(memory, 0, sizeof(*memory));
    memory->device = device_name(device);
    weights_memory(ctx->model->weights, device, memory);
    memory->self_kv = ctx->own.cache.sizes[index];
    for (int32_t i = 0; i < ctx->n_more; i++) {
        memory->self_kv += ctx->more[i]->used ? ctx->more[i]->cache.sizes[index] : 0;
    }
    for (int32_t i = 0; i < ctx->n_slots; i++) {
        memory->cross_kv += ctx->slots[i].used ? ctx->slots[i].kv.sizes[index] : 0;
    }
    memory->compute = ctx->compute[index];
    memory->vision  = ctx->vision[index];
    return MLLAMA_OK;
}

mllama_status context_check_memory(const mllama_context * ctx) {
    return ctx->model->no_alloc ? fail(MLLAMA_ERR_ARGUMENT, "the model was opened for measuring only") : MLLAMA_OK;
}

void mllama_clear(mllama_context * ctx) {
    ctx->own.n_past = 0;
    for (int32_t i = 0; i < ctx->n_slots; i++) {
        context_free_slot(ctx, &ctx->slots[i]);
    }
}
