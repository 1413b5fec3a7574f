// Memory for a full context, made before it is needed or only measured.
#include "context/context.h"

#include <string.h>

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
        TRY(context_encode(ctx, NULL, n_tiles[i], 0, NULL));
    }
    return context_fill_rows(ctx, slot, 0, ctx->model->hp.pub.n_positions, NULL);
}

mllama_status mllama_reserve(mllama_context * ctx, int32_t n_images, const int32_t * n_tiles) {
    if (n_images != 0) {
        TRY(context_check_images(ctx, n_images, n_tiles));
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
    TRY(context_new_slot(ctx, &index));
    const mllama_status status = reserve_images(ctx, index, n_images, n_tiles);
    if (status != MLLAMA_OK || !ctx->model->no_alloc) {
        context_free_slot(ctx, &ctx->slots[index]);
    }
    return status;
}
