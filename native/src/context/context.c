// A conversation: its backends, its caches, and the running of graphs on them.
#include "context/context.h"
#include "finite.h"
#include "graphs/vision_graph.h"
#include "guard.h"
#include "model/weights.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { ABORT_EVERY = 50000 }; // microseconds between two looks at the caller's abort callback

// ---- aborting, progress, taps -------------------------------------------------------------------------------------

void context_report(const mllama_context * ctx, int32_t phase, int64_t done, int64_t total) {
    if (ctx->params.progress) {
        ctx->params.progress(phase, done, total, ctx->params.user_data);
    }
}

// Our own kernels ask this while they work, on the calling thread.
static bool look(void * user_data) {
    mllama_context * ctx = user_data;
    if (ctx->aborted) {
        return true;
    }
    const int64_t now = ggml_time_us();
    if (now - ctx->looked_at < ABORT_EVERY) {
        return false;
    }
    ctx->looked_at = now;
    if (ctx->phase == MLLAMA_PHASE_ENCODE && ctx->nodes_total > 0) {
        const int64_t done = ctx->nodes_done < ctx->nodes_total ? ctx->nodes_done : ctx->nodes_total;
        context_report(ctx, MLLAMA_PHASE_ENCODE, done, ctx->nodes_total);
    }
    ctx->aborted = ctx->params.abort && ctx->params.abort(ctx->params.user_data);
    return ctx->aborted;
}

// ggml's CPU backend asks this before every node, on the calling thread.
static bool should_abort(void * user_data) {
    mllama_context * ctx = user_data;
    ctx->nodes_done++;
    return look(ctx);
}

void context_begin(mllama_context * ctx, int32_t phase) {
    ctx->aborted    = false;
    ctx->tap_status = MLLAMA_OK;
    ctx->looked_at  = ggml_time_us();
    ctx->phase      = phase;
    ctx->nodes_done = ctx->nodes_total = 0;
}

static void to_floats(const struct ggml_tensor * t, const char * raw, float * out) {
    const ggml_to_float_t to_float = ggml_get_type_traits(t->type)->to_float;
    for (int64_t i3 = 0; i3 < t->ne[3]; i3++) {
        for (int64_t i2 = 0; i2 < t->ne[2]; i2++) {
            for (int64_t i1 = 0; i1 < t->ne[1]; i1++, out += t->ne[0]) {
                const char * row = raw + (size_t) i1 * t->nb[1] + (size_t) i2 * t->nb[2] + (size_t) i3 * t->nb[3];
                if (t->type != GGML_TYPE_F32) {
                    to_float(row, out, t->ne[0]);
                    continue;
                }
                for (int64_t i0 = 0; i0 < t->ne[0]; i0++) {
                    memcpy(out + i0, row + (size_t) i0 * t->nb[0], sizeof(float));
                }
            }
        }
    }
}

static bool show_tensor(struct ggml_tensor * t, bool ask, void * user_data) {
    mllama_context * ctx = user_data;
    if (ctx->tap_status != MLLAMA_OK) {
        return false;
    }
    if (ask) {
        const bool readable = t->type == GGML_TYPE_F32 || ggml_get_type_traits(t->type)->to_float;
        return readable && ctx->tap(t->name, t->ne, NULL, ctx->tap_user_data);
    }
    const size_t raw_size = ggml_nbytes(t), n = (size_t) ggml_nelements(t), need = n * sizeof(float) + raw_size;
    if (need > ctx->tap_capacity) {
        float * values = realloc(ctx->tap_values, need);
        if (!values) {
            return true;
        }
        ctx->tap_values   = values;
        ctx->tap_capacity = need;
    }
    char * raw = (char *) (ctx->tap_values + n);
    ctx->tap_status = guard_get(t, raw, 0, raw_size);
    if (ctx->tap_status != MLLAMA_OK) {
        return false; // the computation ends
    }
    to_floats(t, raw, ctx->tap_values);
    ctx->tap(t->name, t->ne, ctx->tap_values, ctx->tap_user_data);
    return true;
}

void mllama_set_tap(mllama_context * ctx, mllama_tap_callback callback, void * user_data) {
    ctx->tap           = callback;
    ctx->tap_user_data = user_data;
    if (ctx->sched) {
        ggml_backend_sched_set_eval_callback(ctx->sched, callback ? show_tensor : NULL, ctx);
    }
}

// ---- running a graph ----------------------------------------------------------------------------------------------

mllama_status context_new_sched(mllama_context * ctx, size_t n_nodes, ggml_backend_sched_t * sched) {
    TRY(guard_sched_new(ctx->backends, ctx->n_backends, n_nodes, sched));
    if (ctx->tap) {
        ggml_backend_sched_set_eval_callback(*sched, show_tensor, ctx);
    }
    return MLLAMA_OK;
}

static bool reads_cache(const struct ggml_tensor * node) {
    for (int32_t i = 0; i < GGML_MAX_SRC && node->src[i]; i++) {
        const struct ggml_tensor * src = node->src[i]->view_src ? node->src[i]->view_src : node->src[i];
        if (strstr(src->name, "cache_") && src->buffer) return true;
    }
    return false;
}

// What reads the caches is computed where they are. Without this ggml would copy the caches to where the weights are.
static void keep_attention_on_cpu(const mllama_context * ctx, ggml_backend_sched_t sched, struct ggml_cgraph * gf) {
    for (int i = 0; i < ggml_graph_n_nodes(gf); i++) {
        struct ggml_tensor * node = ggml_graph_node(gf, i);
        if (reads_cache(node)) {
            ggml_backend_sched_set_tensor_backend(sched, node, ctx->backends[ctx->n_backends - 1]);
        }
    }
}

// The place of a backend's device in the arrays of bytes. Devices that help the CPU use its memory.
static int32_t place_of(const mllama_context * ctx, ggml_backend_t backend) {
    for (int32_t i = 0; i < ctx->model->plan.n_gpus; i++) {
        if (ctx->model->plan.gpus[i] == ggml_backend_get_device(backend)) return i + 1;
    }
    return 0;
}

// Raises `most` to what a scheduler's buffers take. sizes: of each backend, NULL: of the allocated buffers.
static void note_sizes(const mllama_context * ctx, ggml_backend_sched_t sched, const size_t * sizes, uint64_t * most) {
    uint64_t now[MAX_DEVICES + 1] = { 0 };
    for (int32_t i = 0; i < ctx->n_backends; i++) {
        bool counted = false; // with a backend that has the same memory
        for (int32_t j = 0; j < i && sizes; j++) {
            counted |= ggml_backend_sched_get_buffer_type(sched, ctx->backends[j]) == ggml_backend_sched_get_buffer_type(sched, ctx->backends[i]);
        }
        if (!counted) {
            now[place_of(ctx, ctx->backends[i])] += sizes ? sizes[i] : ggml_backend_sched_get_buffer_size(sched, ctx->backends[i]);
        }
    }
    for (int32_t i = 0; i <= MAX_DEVICES; i++) {
        most[i] = now[i] > most[i] ? now[i] : most[i];
    }
}

// most: raised to what the buffers take. Without memory nothing but that is done. *sched becomes NULL when a device throws.
mllama_status context_alloc(const mllama_context * ctx, ggml_backend_sched_t * sched, struct ggml_cgraph * gf, uint64_t * most,
                                 const char * what, const char * remedy) {
    ggml_backend_sched_reset(*sched);
    log_forget();
    if (ctx->model->no_alloc && ctx->params.offload_kqv) {
        size_t sizes[MAX_BACKENDS];
        TRY(guard_sched_measure(sched, gf, sizes));
        note_sizes(ctx, *sched, sizes, most);
        return MLLAMA_OK;
    }
    if (!ctx->params.offload_kqv) {
        keep_attention_on_cpu(ctx, *sched, gf);
    }
    // ggml_backend_sched_reserve_size forgets what was said about the attention, so buffers are made and given back.
    bool ok = false;
    TRY(guard_sched_alloc(sched, gf, !ctx->model->no_alloc, &ok));
    if (!ok) {
        return fail(MLLAMA_ERR_MEMORY, "no room for the compute buffers of %s%s%s; %s", what, log_last_error()[0] ? ": " : "",
                    log_last_error(), remedy);
    }
    note_sizes(ctx, *sched, NULL, most);
    return MLLAMA_OK;
}

mllama_status context_compute(mllama_context * ctx, ggml_backend_sched_t sched, struct ggml_cgraph * gf, const char * what) {
    enum ggml_status status;
    log_forget();
    TRY(guard_sched_compute(sched, gf, &status));
    TRY(ctx->tap_status);
    if (ctx->aborted || status == GGML_STATUS_ABORTED) {
        return fail(MLLAMA_ERR_ABORTED, "%s was stopped", what);
    }
    if (status != GGML_STATUS_SUCCESS) {
        return fail(MLLAMA_ERR_BACKEND, "%s failed: %s%s%s", what, ggml_status_to_string(status), log_last_error()[0] ? ": " : "",
                    log_last_error());
    }
    return MLLAMA_OK;
}

// ---- context ------------------------------------------------------------------------------------------------------

mllama_context_params mllama_context_default_params(void) {
    return (mllama_context_params) {
        .n_ctx = 4096, .n_batch = 512, .type_k = MLLAMA_KV_F16, .type_v = MLLAMA_KV_F16, .flash_attn = true, .offload_kqv = true,
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
        ((ggml_backend_set_abort_callback_t) set_abort)(backend, should_abort, ctx);
    }
    return MLLAMA_OK;
}

// Once, as the types of the caches depend on it
static mllama_status choose_kernel(mllama_context * ctx) {
    const cpu_kernel * kernel = NULL;
    TRY(cpu_kernel_choose(ctx->params.cpu_kernel, &kernel));
    ctx->params.cpu_kernel = NULL; // the caller's
    ctx->env = (compute_env) {
        .kernel = ctx->params.flash_attn ? kernel : NULL, .flash_attn = ctx->params.flash_attn, .stop = look, .stop_data = ctx,
    };
    return MLLAMA_OK;
}

// ggml's CPU kernel sums F16 values unnormalised in F16: three digits are left, and many rows of large values overflow (seen: values
// of 2000). So values on the CPU are F16 only where our kernel reads them; it sums in F32.
static enum ggml_type cpu_values(const mllama_hparams * p, const cpu_kernel * kernel, const kv_types * types) {
    const cpu_cache_attention attention = { .kernel = kernel, .n_head = p->n_head, .n_head_kv = p->n_head_kv, .head_dim = p->head_dim };
    return types->v == GGML_TYPE_F16 && !cpu_cache_attention_has(&attention, types->k, types->v) ? GGML_TYPE_F32 : types->v;
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
    if (ctx->params.n_batch < 1) {
        return fail(MLLAMA_ERR_ARGUMENT, "n_batch is %d; it must be at least 1", ctx->params.n_batch);
    }
    if (ctx->params.n_threads > GGML_MAX_N_THREADS) {
        return fail(MLLAMA_ERR_ARGUMENT, "n_threads is %d; at most %d are possible", ctx->params.n_threads, GGML_MAX_N_THREADS);
    }
    ctx->n_step = ctx->params.n_batch;
    if (ctx->params.n_batch > ctx->params.n_ctx) {
        ctx->params.n_batch = ctx->params.n_ctx;
    }
    if ((ggml_is_quantized(ctx->types.k) || ggml_is_quantized(ctx->types.v)) && p->head_dim % 32 != 0) {
        return fail(MLLAMA_ERR_ARGUMENT, "a Q8_0 cache needs heads of a multiple of 32 values, this model's have %d; use F16", p->head_dim);
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

mllama_status mllama_context_new(const mllama_model * model, const mllama_context_params * params, mllama_context ** out) {
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

mllama_status context_not_finite(const gguf_file * file, const char * doing, const char * weight) {
    return fail(MLLAMA_ERR_FILE,
                "%s: the results of %s are not finite (NaN or infinity): the file is damaged or badly quantized%s%s; "
                "`mllama verify` checks it, `mllama trace` names the first such tensor",
                file->path, doing, weight ? ", as its tensor " : "", weight ? weight : "");
}

// ---- images -------------------------------------------------------------------------------------------------------

// patches NULL: only the buffers are made.
static mllama_status run_encode(mllama_context * ctx, ggml_backend_sched_t * sched, vision_graph * vg, const float * patches,
                                int32_t aspect_ratio_id, float * states) {
    TRY(context_alloc(ctx, sched, vg->g.gf, ctx->vision, "the vision encoder", "free some memory, or put the encoder on the CPU"));
    if (!patches) {
        return MLLAMA_OK;
    }
    TRY(guard_set(vg->patches, patches, 0, ggml_nbytes(vg->patches)));
    TRY(guard_set(vg->aspect_ratio_id, &aspect_ratio_id, 0, sizeof(aspect_ratio_id)));
    ctx->nodes_total = ggml_graph_n_nodes(vg->g.gf);
    TRY(context_compute(ctx, *sched, vg->g.gf, "encoding the image"));
    context_report(ctx, MLLAMA_PHASE_ENCODE, ctx->nodes_total, ctx->nodes_total);
    TRY(guard_get(vg->states, states, 0, ggml_nbytes(vg->states)));
    const mllama_model * model = ctx->model;
    return model->damage[PART_VISION] || !finite_f32(states, ggml_nelements(vg->states))
               ? context_not_finite(model->vision_file, "encoding the image", model->damage[PART_VISION])
               : MLLAMA_OK;
}

// The scheduler lives for this call only: its buffers are large, and text needs the memory next.
// pixels NULL: only the buffers are made, for any picture with n_tiles.
static mllama_status encode(mllama_context * ctx, const float * pixels, int32_t n_tiles, int32_t aspect_ratio_id, float * states) {
    const mllama_model *   model  = ctx->model;
    const mllama_hparams * p      = &model->hp.pub;
    vision_graph         vg;
    ggml_backend_sched_t sched   = NULL;
    float *              patches = NULL;
    mllama_status        status  = vision_graph_build(model, n_tiles, aspect_ratio_id, &ctx->env, &vg);
    if (status == MLLAMA_OK) {
        status = context_new_sched(ctx, (size_t) ggml_graph_size(vg.g.gf), &sched);
    }
    if (status == MLLAMA_OK && pixels) {
        patches = malloc(ggml_nbytes(vg.patches));
        status  = patches ? MLLAMA_OK : fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    if (status == MLLAMA_OK) {
        if (patches) {
            vision_patches(p, pixels, n_tiles, vg.n_tiles, patches);
        }
        status = run_encode(ctx, &sched, &vg, patches, aspect_ratio_id, states);
    }
    free(patches);
    guard_sched_free(sched);
    vision_graph_free(&vg);
    return status;
}

mllama_status context_check_memory(const mllama_context * ctx) {
    return ctx->model->no_alloc ? fail(MLLAMA_ERR_ARGUMENT, "the model was opened for measuring only") : MLLAMA_OK;
}

mllama_status mllama_encode(mllama_context * ctx, const float * pixels, int32_t n_tiles, int32_t aspect_ratio_id, float * states) {
    const mllama_hparams * p = &ctx->model->hp.pub;
    TRY(context_check_memory(ctx));
    if (!hparams_has_vision(&ctx->model->hp)) {
        return fail(MLLAMA_ERR_ARGUMENT, "%s: a text model without vision projector cannot see images; give the mmproj file",
                    ctx->model->text_file->path);
    }
    if (n_tiles < 1 || n_tiles > p->max_tiles) {
        return fail(MLLAMA_ERR_ARGUMENT, "%d tiles; this model takes 1 to %d", n_tiles, p->max_tiles);
    }
    if (aspect_ratio_id < 1 || aspect_ratio_id > p->n_aspect_ratios) {
        return fail(MLLAMA_ERR_ARGUMENT, "aspect_ratio_id %d; this model knows 1 to %d", aspect_ratio_id, p->n_aspect_ratios);
    }
    if (!finite_f32(pixels, (int64_t) n_tiles * 3 * p->image_size * p->image_size)) {
        return fail(MLLAMA_ERR_ARGUMENT, "the pixels are not finite numbers");
    }
    text_graph_free(&ctx->text); // see free_slot
    context_begin(ctx, MLLAMA_PHASE_ENCODE);
    return encode(ctx, pixels, n_tiles, aspect_ratio_id, states);
}

// Looks at the rows that a graph has written.
static mllama_status check_filled(const mllama_context * ctx, const image_slot * slot, const fill_graph * fg, int64_t first,
                                  int64_t n_rows) {
    float zero = 0.0f; // of the rows on other devices
    if (fg->zero) {
        TRY(guard_get(fg->zero, &zero, 0, sizeof(zero)));
    }
    if (!finite_f32(&zero, 1) || !kv_cache_host_rows_finite(&slot->kv, ctx->model->hp.pub.n_layer, first, n_rows)) {
        return context_not_finite(ctx->model->text_file, "filling the cross-attention cache", ctx->model->damage[PART_CROSS]);
    }
    return MLLAMA_OK;
}

// states NULL: only the buffers are made.
static mllama_status fill_rows(mllama_context * ctx, const image_slot * slot, int64_t first, int64_t n_rows, const float * states) {
    fill_graph           fg;
    ggml_backend_sched_t sched  = NULL;
    mllama_status        status = fill_graph_build(ctx->model, slot, first, n_rows, &ctx->env, &fg);
    if (status == MLLAMA_OK) {
        status = context_new_sched(ctx, (size_t) ggml_graph_size(fg.g.gf), &sched);
    }
    if (status == MLLAMA_OK) {
        status = context_alloc(ctx, &sched, fg.g.gf, ctx->vision, "the cross-attention cache", "free some memory");
    }
    if (status == MLLAMA_OK && states) {
        status = guard_set(fg.states, states, 0, ggml_nbytes(fg.states));
    }
    if (status == MLLAMA_OK && states) {
        status = context_compute(ctx, sched, fg.g.gf, "filling the cross-attention cache");
    }
    if (status == MLLAMA_OK && states) {
        status = check_filled(ctx, slot, &fg, first, n_rows);
    }
    guard_sched_free(sched);
    fill_graph_free(&fg);
    return status;
}

// With a buffer, ggml's RPC server forgets the graph that it computed last; its client may then ask it to compute that graph
// again, and both give up. So the text graph does not outlive a slot, nor the buffers of an encode or a fill.
static void free_slot(mllama_context * ctx, image_slot * slot) {
    if (slot->used) {
        text_graph_free(&ctx->text);
        image_slot_free(slot);
    }
}

// Without rows yet; free_slot gives it back.
static mllama_status new_slot(mllama_context * ctx, int32_t * index) {
    int32_t i = 0;
    while (i < ctx->n_slots && ctx->slots[i].used) {
        i++;
    }
    if (i == ctx->n_slots) {
        image_slot * slots = realloc(ctx->slots, ((size_t) i + 1) * sizeof(*slots));
        if (!slots) {
            return fail(MLLAMA_ERR_MEMORY, "out of memory");
        }
        ctx->slots = slots;
        memset(&slots[i], 0, sizeof(*slots));
        ctx->n_slots++;
    }
    ctx->slots[i].used       = true;
    ctx->slots[i].generation = ++ctx->generation;
    *index = i;
    return MLLAMA_OK;
}

// Names a new slot if that which gave it its rows went well, else gives it back.
static mllama_status name_slot(mllama_context * ctx, int32_t index, mllama_status status, int32_t * slot) {
    if (status == MLLAMA_OK) {
        *slot = index;
    } else {
        free_slot(ctx, &ctx->slots[index]);
    }
    return status;
}

static mllama_status fill_slot(mllama_context * ctx, image_slot * slot, int32_t n_images, const float * const * states,
                               const int32_t * n_tiles) {
    const mllama_hparams * p = &ctx->model->hp.pub;
    TRY(image_slot_init(slot, ctx->model, ctx->params.offload_kqv, n_images, n_tiles, ctx->cross_types));
    int64_t row = 0;
    for (int32_t i = 0; i < n_images; i++) {
        for (int32_t tile = 0; tile < n_tiles[i] && states[i]; tile++) {
            const int64_t n    = (int64_t) p->n_positions * p->n_embd;
            const float * from = states[i] + tile * n;
            if (!finite_f32(from, n)) { // not ours: mllama_encode gives no such states
                return fail(MLLAMA_ERR_ARGUMENT, "the states of image %d are not finite numbers", i);
            }
            TRY(fill_rows(ctx, slot, row + (int64_t) tile * p->n_positions, p->n_positions, from));
        }
        row += (int64_t) n_tiles[i] * p->n_positions;
    }
    return MLLAMA_OK;
}

static mllama_status check_images(const mllama_context * ctx, int32_t n_images, const int32_t * n_tiles) {
    const mllama_hparams * p = &ctx->model->hp.pub;
    if (!hparams_has_vision(&ctx->model->hp)) {
        return fail(MLLAMA_ERR_ARGUMENT, "%s: a text model without vision projector cannot see images", ctx->model->text_file->path);
    }
    if (n_images < 1 || n_images > 4096) {
        return fail(MLLAMA_ERR_ARGUMENT, "%d adjacent images; 1 to 4096 are possible", n_images);
    }
    for (int32_t i = 0; i < n_images; i++) {
        if (n_tiles[i] < 1 || n_tiles[i] > p->max_tiles) {
            return fail(MLLAMA_ERR_ARGUMENT, "image %d has %d tiles; this model takes 1 to %d", i, n_tiles[i], p->max_tiles);
        }
    }
    return MLLAMA_OK;
}

mllama_status mllama_image_fill(mllama_context * ctx, int32_t n_images, const float * const * states, const int32_t * n_tiles,
                                int32_t * slot) {
    TRY(context_check_memory(ctx));
    TRY(check_images(ctx, n_images, n_tiles));
    text_graph_free(&ctx->text); // see free_slot
    context_begin(ctx, MLLAMA_PHASE_PROMPT);
    int32_t index = 0;
    TRY(new_slot(ctx, &index));
    return name_slot(ctx, index, fill_slot(ctx, &ctx->slots[index], n_images, states, n_tiles), slot);
}

uint64_t mllama_image_mapped_size(const mllama_context * ctx, int32_t n_tiles) {
    if (n_tiles < 1 || n_tiles > ctx->model->hp.pub.max_tiles || !hparams_has_vision(&ctx->model->hp)) {
        return 0;
    }
    return image_slot_mapped_size(ctx->model, ctx->params.offload_kqv, n_tiles, ctx->cross_types);
}

mllama_status mllama_image_map(mllama_context * ctx, int32_t n_tiles, const char * path, uint64_t offset, int32_t * slot) {
    TRY(context_check_memory(ctx));
    TRY(check_images(ctx, 1, &n_tiles));
    text_graph_free(&ctx->text); // see free_slot
    int32_t index = 0;
    TRY(new_slot(ctx, &index));
    const mllama_status status = image_slot_map(&ctx->slots[index], ctx->model, ctx->params.offload_kqv, n_tiles, ctx->cross_types,
                                                path, offset);
    return name_slot(ctx, index, status, slot);
}

bool context_has_slot(const mllama_context * ctx, int32_t slot) {
    return slot >= 0 && slot < ctx->n_slots && ctx->slots[slot].used;
}

mllama_status mllama_image_free(mllama_context * ctx, int32_t slot) {
    if (!context_has_slot(ctx, slot)) {
        return fail(MLLAMA_ERR_ARGUMENT, "no image in slot %d", slot);
    }
    free_slot(ctx, &ctx->slots[slot]);
    return MLLAMA_OK;
}

mllama_status mllama_image_size(const mllama_context * ctx, int32_t slot, int32_t image, uint64_t * n_bytes) {
    if (!context_has_slot(ctx, slot) || image < 0 || image >= ctx->slots[slot].n_images) {
        return fail(MLLAMA_ERR_ARGUMENT, "no image %d in slot %d", image, slot);
    }
    *n_bytes = image_slot_size(&ctx->slots[slot], ctx->model, image);
    return MLLAMA_OK;
}

static mllama_status copy_image(const mllama_context * ctx, int32_t slot, int32_t image, uint64_t offset, uint64_t n_bytes, char * get,
                                const char * set) {
    uint64_t size = 0;
    TRY(context_check_memory(ctx));
    TRY(mllama_image_size(ctx, slot, image, &size));
    if (offset > size || n_bytes > size - offset || (n_bytes > 0 && !get && !set)) {
        return fail(MLLAMA_ERR_ARGUMENT, "%llu bytes at %llu of the %llu of an image", (unsigned long long) n_bytes,
                    (unsigned long long) offset, (unsigned long long) size);
    }
    if (set && ctx->slots[slot].map) {
        return fail(MLLAMA_ERR_ARGUMENT, "the image in slot %d is in a file, which is only read", slot);
    }
    return image_slot_copy(&ctx->slots[slot], ctx->model, image, offset, n_bytes, get, set);
}

mllama_status mllama_image_get(mllama_context * ctx, int32_t slot, int32_t image, uint64_t offset, uint64_t n_bytes, void * data) {
    return copy_image(ctx, slot, image, offset, n_bytes, data, NULL);
}

mllama_status mllama_image_set(mllama_context * ctx, int32_t slot, int32_t image, uint64_t offset, uint64_t n_bytes,
                               const void * data) {
    return copy_image(ctx, slot, image, offset, n_bytes, NULL, data);
}

void mllama_clear(mllama_context * ctx) {
    ctx->own.n_past = 0;
    for (int32_t i = 0; i < ctx->n_slots; i++) {
        free_slot(ctx, &ctx->slots[i]);
    }
}

// ---- reserving ----------------------------------------------------------------------------------------------------

// The text graphs of a full context, for whole batches and single tokens, that see a slot (-1: no image).
static mllama_status reserve_text(mllama_context * ctx, int32_t slot) {
    // With logits the last layer computes one column only, without them all.
    const int32_t n_tokens[] = { ctx->params.n_batch, ctx->params.n_batch, 1 };
    const int32_t logits[]   = { MLLAMA_LOGITS_NONE, MLLAMA_LOGITS_LAST, MLLAMA_LOGITS_LAST };
    for (int32_t i = 0; i < 3; i++) {
        const int32_t       n_visible = slot >= 0 ? ctx->slots[slot].n_images : 0;
        const text_item     item      = context_item(ctx, &ctx->own, n_tokens[i], ctx->params.n_ctx, slot, n_visible,
                                                     logits[i]);
        const mllama_status status    = context_prepare(ctx, &(text_shape) { .n_items = 1, .items = &item });
        text_graph_free(&ctx->text); // it is of no use, and must not outlive the slot
        TRY(status);
    }
    return MLLAMA_OK;
}

static mllama_status reserve_images(mllama_context * ctx, int32_t index, int32_t n_images, const int32_t * n_tiles) {
    image_slot * slot = &ctx->slots[index];
    TRY(image_slot_init(slot, ctx->model, ctx->params.offload_kqv, n_images, n_tiles, ctx->cross_types));
    TRY(reserve_text(ctx, index));
    for (int32_t i = 0; i < n_images; i++) {
        TRY(encode(ctx, NULL, n_tiles[i], 0, NULL));
    }
    return fill_rows(ctx, slot, 0, ctx->model->hp.pub.n_positions, NULL);
}

mllama_status mllama_reserve(mllama_context * ctx, int32_t n_images, const int32_t * n_tiles) {
    if (n_images != 0) {
        TRY(check_images(ctx, n_images, n_tiles));
    }
    text_graph_free(&ctx->text);
    if (ctx->model->no_alloc) {
        mllama_clear(ctx);
        memset(ctx->compute, 0, sizeof(ctx->compute));
        memset(ctx->vision, 0, sizeof(ctx->vision));
    }
    TRY(reserve_text(ctx, -1));
    if (n_images == 0) {
        return MLLAMA_OK;
    }
    int32_t index = 0;
    TRY(new_slot(ctx, &index));
    const mllama_status status = reserve_images(ctx, index, n_images, n_tiles);
    if (status != MLLAMA_OK || !ctx->model->no_alloc) {
        free_slot(ctx, &ctx->slots[index]);
    }
    return status;
}
