// From the tensors of a file to memory: mapped, or copied to devices and to layouts of the CPU.
#include "finite.h"
#include "guard.h"
#include "memory.h"
#include "model/repack.h"
#include "model/weight_list.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_STAGING = 16 << 20 }; // bytes on the way from the file to a device

static bool needs_conversion(const weight * w) {
    return w->kind == WEIGHT_VECTOR && w->source->type != GGML_TYPE_F32;
}

// As a Llama converter orders the rows of a head for interleaved RoPE: i and i + n/2 become 2i and 2i + 1.
static void permute(const float * halves, float * pairs, int64_t n) {
    for (int64_t i = 0; i < n / 2; i++) {
        pairs[2 * i]     = halves[i];
        pairs[2 * i + 1] = halves[i + n / 2];
    }
}

// For the text model alone: states are kept on disk for years, and must not depend on a setting.
static ggml_backend_buffer_type_t repacked_type(const mllama_model * model, const weight * w,
                                                const mllama_model_params * params) {
    if (!params->repack || w->device != model->plan.cpu || w->kind != WEIGHT_MATRIX || w->part == PART_VISION ||
        w->tensor == &model->token_embd) {
        return NULL;
    }
    return repack_choose(model->plan.cpu, params->repack_layouts ? params->repack_layouts : "CPU_REPACK", w->source);
}

static bool can_map(const mllama_model * model, const weight * w, const mllama_model_params * params) {
    // ggml's kernels want 32-byte alignment, which a file may not give
    return params->use_mmap && w->device == model->plan.cpu && !needs_conversion(w) && !w->permuted && !w->repacked &&
           gguf_file_position(w->file, w->source) % 32 == 0;
}

typedef struct loader {
    mllama_model *              model;
    const mllama_model_params * params;
    int64_t                     done, total;
    size_t                      n_staging, n_floats;
    char *                      staging; // n_staging bytes
    float *                     floats;  // n_floats bytes, for conversions
} loader;

static mllama_status report(loader * ld, int64_t bytes) {
    if (ld->model->no_alloc) {
        return MLLAMA_OK;
    }
    ld->done += bytes;
    if (ld->params->progress) {
        ld->params->progress(MLLAMA_PHASE_LOAD, ld->done, ld->total, ld->params->user_data);
    }
    if (ld->params->abort && ld->params->abort(ld->params->user_data)) {
        return fail(MLLAMA_ERR_ABORTED, "loading was stopped");
    }
    return MLLAMA_OK;
}

// Products with quantized weights hide such values: in the factors of a norm before them, or in weights on a device. So
// they are remembered from here on. Not in tables: a row counts where it is looked up, and reaches the results. Mapped
// matrices are not read here: graph_watch_factor sees what is computed with them.
static void note_damage(mllama_model * model, const weight * w, const void * data, size_t n_bytes) {
    const bool is_table = w->kind == WEIGHT_TABLE || w->tensor == &model->token_embd;
    if (!is_table && !model->damage[w->part] && !finite_bytes(w->source->type, data, n_bytes)) {
        model->damage[w->part] = w->source->name;
    }
}

static mllama_status upload(loader * ld, const weight * w, struct ggml_tensor * tensor) {
    const size_t n_bytes = ggml_nbytes(w->source);
    const size_t item    = ggml_type_size(w->source->type);
    const size_t most    = w->repacked || ld->n_staging < MAX_STAGING ? ld->n_staging : MAX_STAGING;
    const size_t n_piece = most - most % item;
    for (size_t at = 0; at < n_bytes;) {
        const size_t n = n_bytes - at < n_piece ? n_bytes - at : n_piece;
        TRY(gguf_file_read(w->file, w->source, at, ld->staging, n));
        note_damage(ld->model, w, ld->staging, n);
        if (needs_conversion(w) || w->permuted) {
            const int64_t count = (int64_t) (n / item);
            if (w->source->type == GGML_TYPE_F32) {
                memcpy(ld->floats, ld->staging, n);
            } else {
                ggml_get_type_traits(w->source->type)->to_float(ld->staging, ld->floats, count);
            }
            if (w->permuted) { // the values of one head: the whole tensor
                permute(ld->floats, (float *) ld->staging, count);
                memcpy(ld->floats, ld->staging, (size_t) count * sizeof(float));
            }
            TRY(guard_set(tensor, ld->floats, at / item * sizeof(float), (size_t) count * sizeof(float)));
        } else {
            TRY(guard_set(tensor, ld->staging, at, n));
        }
        at += n;
        TRY(report(ld, (int64_t) n));
    }
    return MLLAMA_OK;
}

static mllama_status new_context(weight_list * list, ggml_backend_dev_t device, bool mapped,
                                 struct ggml_context ** ctx) {
    weight_buffer * buffers = realloc(list->buffers, ((size_t) list->n_buffers + 1) * sizeof(*buffers));
    if (!buffers) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    list->buffers = buffers;
    TRY(guard_context(ggml_tensor_overhead() * (size_t) (list->n + 1), ctx));
    list->buffers[list->n_buffers++] = (weight_buffer) { .context = *ctx, .device = device, .mapped = mapped };
    return MLLAMA_OK;
}

static struct ggml_tensor * new_tensor(struct ggml_context * ctx, const weight * w) {
    const enum ggml_type type = w->kind == WEIGHT_VECTOR ? GGML_TYPE_F32 : w->source->type;
    struct ggml_tensor * t    = ggml_new_tensor(ctx, type, 4, w->source->ne);
    ggml_set_name(t, w->source->name);
    *w->tensor = t;
    return t;
}

// The tensors of a file that stay in its mapping.
static mllama_status load_mapped(loader * ld, gguf_file * file) {
    weight_list *         list     = ld->model->weights;
    const bool            no_alloc = ld->model->no_alloc;
    struct ggml_context * ctx      = NULL;
    for (int32_t i = 0; i < list->n; i++) {
        const weight * w = &list->items[i];
        if (!w->tensor || w->file != file || !can_map(ld->model, w, ld->params)) {
            continue;
        }
        if (!ctx) {
            if (!file->map && !no_alloc) {
                TRY(gguf_file_map(file));
            }
            TRY(new_context(list, w->device, true, &ctx));
            ggml_backend_buffer_t buffer = NULL;
            if (no_alloc) {
                TRY(guard_alloc_buffer(ggml_backend_cpu_buffer_type(), 0, &buffer));
            } else {
                TRY(guard_wrap_memory(file->map, file->size, &buffer));
            }
            if (!buffer) {
                return fail(MLLAMA_ERR_MEMORY, "%s: out of memory", file->path);
            }
            ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
            list->buffers[list->n_buffers - 1].buffer = buffer;
        }
        struct ggml_tensor * t = new_tensor(ctx, w);
        weight_buffer * place = &list->buffers[list->n_buffers - 1];
        place->size += ggml_nbytes(t);
        if (no_alloc) {
            t->buffer = place->buffer;
        } else {
            TRY(guard_place_tensor(place->buffer, t, (char *) file->map + gguf_file_position(file, w->source)));
        }
        if (w->kind == WEIGHT_VECTOR && !no_alloc && (w->part != PART_VISION || ld->params->allow_quantized_vision)) {
            note_damage(ld->model, w, t->data, ggml_nbytes(t));
        }
        TRY(report(ld, (int64_t) ggml_nbytes(t)));
    }
    return MLLAMA_OK;
}

static bool is_copied(const loader * ld, const weight * w, ggml_backend_dev_t device,
                      ggml_backend_buffer_type_t repacked) {
    return w->tensor && w->device == device && w->repacked == repacked && !can_map(ld->model, w, ld->params);
}

// The tensors that are copied to a buffer of the device, or to one of these layouts of the CPU.
static mllama_status load_copied(loader * ld, ggml_backend_dev_t device, ggml_backend_buffer_type_t repacked) {
    weight_list *         list = ld->model->weights;
    struct ggml_context * ctx  = NULL;
    uint64_t              size = 0;
    for (int32_t i = 0; i < list->n; i++) {
        const weight * w = &list->items[i];
        if (!is_copied(ld, w, device, repacked)) {
            continue;
        }
        if (!ctx) {
            TRY(new_context(list, device, false, &ctx));
        }
        size += ggml_nbytes(new_tensor(ctx, w));
    }
    if (!ctx) {
        return MLLAMA_OK;
    }
    weight_buffer *            place = &list->buffers[list->n_buffers - 1];
    ggml_backend_buffer_type_t type  = repacked;
    if (!type) {
        TRY(guard_buffer_type(device, &type));
    }
    TRY(memory_alloc(ctx, type, ld->model->no_alloc, &place->buffer, &place->size));
    if (!place->buffer) {
        return fail(MLLAMA_ERR_MEMORY, "device %s has no room for %llu MiB of weights; %s", device_label(device),
                    (unsigned long long) (size >> 20), repacked ? "load them without repack" : "offload fewer layers");
    }
    ggml_backend_buffer_set_usage(place->buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    for (int32_t i = 0; i < list->n; i++) {
        const weight * w = &list->items[i];
        if (!ld->model->no_alloc && is_copied(ld, w, device, repacked)) {
            TRY(upload(ld, w, *w->tensor));
        }
    }
    return MLLAMA_OK;
}

static mllama_status load_all(loader * ld) {
    mllama_model * model = ld->model;
    for (int32_t i = 0; i < model->weights->n; i++) {
        if (model->weights->items[i].tensor) {
            ld->total += (int64_t) ggml_nbytes(model->weights->items[i].source);
        }
    }
    for (int32_t i = 0; i < gguf_file_n_parts(model->text_file); i++) {
        TRY(load_mapped(ld, gguf_file_part(model->text_file, i)));
    }
    if (model->vision_file && model->vision_file != model->text_file) {
        for (int32_t i = 0; i < gguf_file_n_parts(model->vision_file); i++) {
            TRY(load_mapped(ld, gguf_file_part(model->vision_file, i)));
        }
    }
    TRY(load_copied(ld, model->plan.cpu, NULL));
    for (ggml_backend_buffer_type_t * type = repack_layouts(model->plan.cpu); type && *type; type++) {
        TRY(load_copied(ld, model->plan.cpu, *type));
    }
    for (int32_t i = 0; i < model->plan.n_gpus; i++) {
        TRY(load_copied(ld, model->plan.gpus[i], NULL));
    }
    return MLLAMA_OK;
}

static size_t larger(size_t a, size_t b) {
    return a > b ? a : b;
}

mllama_status weights_load(mllama_model * model, const mllama_model_params * params) {
    loader ld = { .model = model, .params = params, .n_staging = 4, .n_floats = 4 };
    for (int32_t i = 0; i < model->weights->n; i++) {
        weight * w = &model->weights->items[i];
        if (!w->tensor) {
            continue;
        }
        w->repacked = repacked_type(model, w, params);
        if (can_map(model, w, params)) {
            continue;
        }
        const size_t n = w->permuted ? (size_t) ggml_nelements(w->source) * sizeof(float) : ggml_nbytes(w->source);
        const size_t n_piece = n > MAX_STAGING && !w->repacked ? MAX_STAGING : n; // ggml repacks whole tensors only
        ld.n_staging = larger(ld.n_staging, n_piece);
        if (needs_conversion(w) || w->permuted) {
            ld.n_floats = larger(ld.n_floats,
                                 n_piece / 2 * sizeof(float)); // 2-byte types are the smallest that are converted
        }
    }
    model->weights->staging = ld.n_staging + ld.n_floats;
    if (model->no_alloc) {
        return load_all(&ld);
    }
    ld.staging = malloc(ld.n_staging);
    ld.floats  = malloc(ld.n_floats);
    mllama_status status = ld.staging && ld.floats ? load_all(&ld) : fail(MLLAMA_ERR_MEMORY, "out of memory");
    free(ld.staging);
    free(ld.floats);
    return status;
}
