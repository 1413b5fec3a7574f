// How a context runs its graphs: schedulers and their memory, aborting, progress, taps, results that are not finite.
#include "context/context.h"
#include "guard.h"

#include <stdlib.h>
#include <string.h>

enum {
    ABORT_EVERY = 50000, // microseconds between two looks at the caller's abort callback
    PAGE        = 4096,
};

// ---- aborting, progress, taps -------------------------------------------------------------------------------------

void context_report(const mllama_context * ctx, int32_t phase, int64_t done, int64_t total) {
    if (ctx->params.progress) {
        ctx->params.progress(phase, done, total, ctx->params.user_data);
    }
}

// Our own kernels ask this while they work, on the calling thread.
bool context_look(void * user_data) {
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
bool context_should_abort(void * user_data) {
    mllama_context * ctx = user_data;
    ctx->nodes_done++;
    return context_look(ctx);
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
            counted |= ggml_backend_sched_get_buffer_type(sched, ctx->backends[j]) ==
                       ggml_backend_sched_get_buffer_type(sched, ctx->backends[i]);
        }
        if (!counted) {
            now[place_of(ctx, ctx->backends[i])] += sizes ? sizes[i]
                                                          : ggml_backend_sched_get_buffer_size(sched, ctx->backends[i]);
        }
    }
    for (int32_t i = 0; i <= MAX_DEVICES; i++) {
        most[i] = now[i] > most[i] ? now[i] : most[i];
    }
}

// most: raised to what the buffers take. Without memory nothing but that is done. *sched becomes NULL when a device
// throws.
mllama_status context_alloc(const mllama_context * ctx, ggml_backend_sched_t * sched, struct ggml_cgraph * gf,
                            uint64_t * most, const char * what, const char * remedy) {
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
        return fail(MLLAMA_ERR_MEMORY, "no room for the compute buffers of %s%s%s; %s", what,
                    log_last_error()[0] ? ": " : "", log_last_error(), remedy);
    }
    note_sizes(ctx, *sched, NULL, most);
    return MLLAMA_OK;
}

mllama_status context_compute(mllama_context * ctx, ggml_backend_sched_t sched, struct ggml_cgraph * gf,
                              const char * what) {
    return context_compute_for(ctx, sched, gf, what, NULL, 0);
}

mllama_status context_compute_for(mllama_context * ctx, ggml_backend_sched_t sched, struct ggml_cgraph * gf,
                                  const char * what, void * to, size_t size) {
    enum ggml_status status;
    log_forget();
    TRY(guard_sched_begin(sched, gf, &status));
    for (size_t i = 0; i < size; i += PAGE) {
        ((volatile char *) to)[i] = 0;
    }
    TRY(guard_sched_wait(sched));
    TRY(ctx->tap_status);
    if (ctx->aborted || status == GGML_STATUS_ABORTED) {
        return fail(MLLAMA_ERR_ABORTED, "%s was stopped", what);
    }
    if (status != GGML_STATUS_SUCCESS) {
        return fail(MLLAMA_ERR_BACKEND, "%s failed: %s%s%s", what, ggml_status_to_string(status),
                    log_last_error()[0] ? ": " : "", log_last_error());
    }
    return MLLAMA_OK;
}

// ---- what came out ----------------------------------------------------------------------------------------------

mllama_status context_not_finite(const gguf_file * file, const char * doing, const char * weight) {
    return fail(MLLAMA_ERR_FILE,
                "%s: the results of %s are not finite (NaN or infinity): the file is damaged or badly quantized%s%s; "
                "`mllama verify` checks it, `mllama trace` names the first such tensor",
                file->path, doing, weight ? ", as its tensor " : "", weight ? weight : "");
}
