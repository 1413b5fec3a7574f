// Images: from pixels to states, and from states to the slots of the cross-attention cache.
#include "context/context.h"
#include "finite.h"
#include "graphs/fill_graph.h"
#include "graphs/vision_graph.h"
#include "guard.h"

#include <stdlib.h>
#include <string.h>

// ---- encoding ---------------------------------------------------------------------------------------------------

enum { PIECE = 1 << 20 }; // values: what stays in a processor's cache between copying and looking

// Copies a tensor of floats out; *finite: whether all are finite.
static mllama_status get_floats(const struct ggml_tensor * t, float * out, bool * finite) {
    const int64_t n = ggml_nelements(t);
    *finite = true;
    for (int64_t at = 0; at < n; at += PIECE) {
        const int64_t piece = n - at < PIECE ? n - at : PIECE;
        TRY(guard_get(t, out + at, (size_t) at * sizeof(float), (size_t) piece * sizeof(float)));
        *finite = *finite && finite_f32(out + at, piece);
    }
    return MLLAMA_OK;
}

// Memory from where a GPU reads fast, if the encoder is on one. It stays, so it has room for the largest image.
static void make_patches(mllama_context * ctx) {
    const mllama_hparams *     p    = &ctx->model->hp.pub;
    const size_t               tile = sizeof(float) * 3 * (size_t) (p->image_size * p->image_size);
    ggml_backend_buffer_type_t type = NULL;
    if (ctx->model->plan.vision == ctx->model->plan.cpu || ctx->patches ||
        guard_host_buffer_type(ctx->model->plan.vision, &type) != MLLAMA_OK || !type) {
        return;
    }
    (void) guard_alloc_buffer(type, tile * (size_t) p->max_tiles, &ctx->patches); // without it other memory serves too
}

// *own: to be freed afterwards
static mllama_status patches_memory(mllama_context * ctx, size_t size, float ** patches, float ** own) {
    make_patches(ctx);
    const bool fits = ctx->patches && size <= ggml_backend_buffer_get_size(ctx->patches);
    *own     = fits ? NULL : malloc(size);
    *patches = fits ? ggml_backend_buffer_get_base(ctx->patches) : *own;
    return *patches ? MLLAMA_OK : fail(MLLAMA_ERR_MEMORY, "out of memory");
}

// patches NULL: only the buffers are made.
static mllama_status run_encode(mllama_context * ctx, ggml_backend_sched_t * sched, vision_graph * vg,
                                const float * patches, int32_t aspect_ratio_id, float * states) {
    TRY(context_alloc(ctx, sched, vg->g.gf, ctx->vision, "the vision encoder",
                      "free some memory, or put the encoder on the CPU"));
    if (!patches) {
        return MLLAMA_OK;
    }
    TRY(vision_graph_set(vg, patches, aspect_ratio_id));
    ctx->nodes_total = ggml_graph_n_nodes(vg->g.gf);
    TRY(context_compute_for(ctx, *sched, vg->g.gf, "encoding the image", states, ggml_nbytes(vg->states)));
    context_report(ctx, MLLAMA_PHASE_ENCODE, ctx->nodes_total, ctx->nodes_total);
    bool finite = true;
    TRY(get_floats(vg->states, states, &finite));
    const mllama_model * model = ctx->model;
    return model->damage[PART_VISION] || !finite
               ? context_not_finite(model->vision_file, "encoding the image", model->damage[PART_VISION])
               : MLLAMA_OK;
}

// The scheduler lives for this call only: its buffers are large, and text needs the memory next.
// pixels NULL: only the buffers are made, for any image with n_tiles.
mllama_status context_encode(mllama_context * ctx, const float * pixels, int32_t n_tiles, int32_t aspect_ratio_id,
                             float * states) {
    const mllama_model *   model  = ctx->model;
    const mllama_hparams * p      = &model->hp.pub;
    vision_graph         vg;
    ggml_backend_sched_t sched   = NULL;
    float *              patches = NULL, * own = NULL;
    mllama_status        status  = vision_graph_build(model, n_tiles, aspect_ratio_id, &ctx->env, &vg);
    if (status == MLLAMA_OK) {
        status = context_new_sched(ctx, (size_t) ggml_graph_size(vg.g.gf), &sched);
    }
    if (status == MLLAMA_OK && pixels) {
        status = patches_memory(ctx, ggml_nbytes(vg.patches), &patches, &own);
    }
    if (status == MLLAMA_OK) {
        if (patches) {
            vision_patches(p, pixels, n_tiles, vg.n_tiles, patches);
        }
        status = run_encode(ctx, &sched, &vg, patches, aspect_ratio_id, states);
    }
    free(own);
    guard_sched_free(sched);
    vision_graph_free(&vg);
    return status;
}

mllama_status mllama_encode(mllama_context * ctx, const float * pixels, int32_t n_tiles, int32_t aspect_ratio_id,
                            float * states) {
    const mllama_hparams * p = &ctx->model->hp.pub;
    TRY(context_check_memory(ctx));
    if (!hparams_has_vision(&ctx->model->hp)) {
        return fail(MLLAMA_ERR_ARGUMENT,
                    "%s: a text model without vision projector cannot see images; give the mmproj file",
                    ctx->model->text_file->path);
    }
    if (n_tiles < 1 || n_tiles > p->max_tiles) {
        return fail(MLLAMA_ERR_ARGUMENT, "%d tiles; this model takes 1 to %d", n_tiles, p->max_tiles);
    }
    if (aspect_ratio_id < 1 || aspect_ratio_id > p->n_aspect_ratios) {
        return fail(MLLAMA_ERR_ARGUMENT, "aspect_ratio_id %d; this model knows 1 to %d", aspect_ratio_id,
                    p->n_aspect_ratios);
    }
    if (!finite_f32(pixels, (int64_t) n_tiles * 3 * p->image_size * p->image_size)) {
        return fail(MLLAMA_ERR_ARGUMENT, "the pixels are not finite numbers");
    }
    text_graph_free(&ctx->text); // see context_free_slot
    context_begin(ctx, MLLAMA_PHASE_ENCODE);
    return context_encode(ctx, pixels, n_tiles, aspect_ratio_id, states);
}

// Looks at the rows that a graph has written.
static mllama_status check_filled(const mllama_context * ctx, const image_slot * slot, const fill_graph * fg,
                                  int64_t first, int64_t n_rows) {
    float zero = 0.0f; // of the rows on other devices
    if (fg->zero) {
        TRY(guard_get(fg->zero, &zero, 0, sizeof(zero)));
    }
    if (!finite_f32(&zero, 1) || !kv_cache_host_rows_finite(&slot->kv, ctx->model->hp.pub.n_layer, first, n_rows)) {
        return context_not_finite(ctx->model->text_file, "filling the cross-attention cache",
                                  ctx->model->damage[PART_CROSS]);
    }
    return MLLAMA_OK;
}

// states NULL: only the buffers are made.
mllama_status context_fill_rows(mllama_context * ctx, const image_slot * slot, int64_t first, int64_t n_rows,
                                const float * states) {
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

// With a buffer, ggml's RPC server forgets the graph that it computed last; its client may then ask it to compute that
// graph again, and both give up. So the text graph does not outlive a slot, nor the buffers of an encode or a fill.
void context_free_slot(mllama_context * ctx, image_slot * slot) {
    if (slot->used) {
        text_graph_free(&ctx->text);
        image_slot_free(slot);
    }
}

// Without rows yet; context_free_slot gives it back.
mllama_status context_new_slot(mllama_context * ctx, int32_t * index) {
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
        context_free_slot(ctx, &ctx->slots[index]);
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
            TRY(context_fill_rows(ctx, slot, row + (int64_t) tile * p->n_positions, p->n_positions, from));
        }
        row += (int64_t) n_tiles[i] * p->n_positions;
    }
    return MLLAMA_OK;
}

mllama_status context_check_images(const mllama_context * ctx, int32_t n_images, const int32_t * n_tiles) {
    const mllama_hparams * p = &ctx->model->hp.pub;
    if (!hparams_has_vision(&ctx->model->hp)) {
        return fail(MLLAMA_ERR_ARGUMENT, "%s: a text model without vision projector cannot see images",
                    ctx->model->text_file->path);
    }
    if (n_images < 1 || n_images > 4096) {
        return fail(MLLAMA_ERR_ARGUMENT, "%d adjacent images; 1 to 4096 are possible", n_images);
    }
    for (int32_t i = 0; i < n_images; i++) {
        if (n_tiles[i] < 1 || n_tiles[i] > p->max_tiles) {
            return fail(MLLAMA_ERR_ARGUMENT, "image %d has %d tiles; this model takes 1 to %d", i, n_tiles[i],
                        p->max_tiles);
        }
    }
    return MLLAMA_OK;
}

mllama_status mllama_image_fill(mllama_context * ctx, int32_t n_images, const float * const * states,
                                const int32_t * n_tiles, int32_t * slot) {
    TRY(context_check_memory(ctx));
    TRY(context_check_images(ctx, n_images, n_tiles));
    text_graph_free(&ctx->text); // see context_free_slot
    context_begin(ctx, MLLAMA_PHASE_PROMPT);
    int32_t index = 0;
    TRY(context_new_slot(ctx, &index));
    return name_slot(ctx, index, fill_slot(ctx, &ctx->slots[index], n_images, states, n_tiles), slot);
}

uint64_t mllama_image_mapped_size(const mllama_context * ctx, int32_t n_tiles) {
    if (n_tiles < 1 || n_tiles > ctx->model->hp.pub.max_tiles || !hparams_has_vision(&ctx->model->hp)) {
        return 0;
    }
    return image_slot_mapped_size(ctx->model, ctx->params.offload_kqv, n_tiles, ctx->cross_types);
}

mllama_status mllama_image_map(mllama_context * ctx, int32_t n_tiles, const char * path, uint64_t offset,
                               int32_t * slot) {
    TRY(context_check_memory(ctx));
    TRY(context_check_images(ctx, 1, &n_tiles));
    text_graph_free(&ctx->text); // see context_free_slot
    int32_t index = 0;
    TRY(context_new_slot(ctx, &index));
    const mllama_status status = image_slot_map(&ctx->slots[index], ctx->model, ctx->params.offload_kqv, n_tiles,
                                                ctx->cross_types, path, offset);
    return name_slot(ctx, index, status, slot);
}

bool context_has_slot(const mllama_context * ctx, int32_t slot) {
    return slot >= 0 && slot < ctx->n_slots && ctx->slots[slot].used;
}

mllama_status mllama_image_free(mllama_context * ctx, int32_t slot) {
    if (!context_has_slot(ctx, slot)) {
        return fail(MLLAMA_ERR_ARGUMENT, "no image in slot %d", slot);
    }
    context_free_slot(ctx, &ctx->slots[slot]);
    return MLLAMA_OK;
}

mllama_status mllama_image_size(const mllama_context * ctx, int32_t slot, int32_t image, uint64_t * n_bytes) {
    if (!context_has_slot(ctx, slot) || image < 0 || image >= ctx->slots[slot].n_images) {
        return fail(MLLAMA_ERR_ARGUMENT, "no image %d in slot %d", image, slot);
    }
    *n_bytes = image_slot_size(&ctx->slots[slot], ctx->model, image);
    return MLLAMA_OK;
}

static mllama_status copy_image(const mllama_context * ctx, int32_t slot, int32_t image, uint64_t offset,
                                uint64_t n_bytes, char * get, const char * set) {
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

mllama_status mllama_image_get(mllama_context * ctx, int32_t slot, int32_t image, uint64_t offset, uint64_t n_bytes,
                               void * data) {
    return copy_image(ctx, slot, image, offset, n_bytes, data, NULL);
}

mllama_status mllama_image_set(mllama_context * ctx, int32_t slot, int32_t image, uint64_t offset, uint64_t n_bytes,
                               const void * data) {
    return copy_image(ctx, slot, image, offset, n_bytes, NULL, data);
}
