// Memory for a full context, made before it is needed or only measured.
#include "context/context.h"

#include <string.h>

static mllama_status reserve_step(mllama_context * ctx, const text_item * items, int32_t n_items) {
    const mllama_status status = context_prepare(ctx, &(text_shape) { .n_items = n_items, .items = items });
    text_graph_free(&ctx->text); // it is of no use, and must not outlive the slots
    return status;
}

// The text graphs of a full sequence, for whole batches and single tokens, that see a slot (-1: no image).
static mllama_status reserve_text(mllama_context * ctx, const sequence * s, int32_t slot) {
    const int32_t n_tokens[] = { ctx->n_step < s->n_ctx ? ctx->n_step : s->n_ctx, 1 };
    for (int32_t i = 0; i < 2; i++) {
        const int32_t   n_visible = slot >= 0 ? ctx->slots[slot].n_images : 0;
        const text_item item = context_item(ctx, s, n_tokens[i], s->n_ctx, slot, n_visible, MLLAMA_LOGITS_LAST);
        TRY(reserve_step(ctx, &item, 1));
    }
    return MLLAMA_OK;
}

static mllama_status reserve_images(mllama_context * ctx, const sequence * s, int32_t index, int32_t n_images,
                                    const int32_t * n_tiles) {
    image_slot * slot = &ctx->slots[index];
    TRY(image_slot_init(slot, ctx->model, ctx->params.offload_kqv, n_images, n_tiles, ctx->cross_types));
    TRY(reserve_text(ctx, s, index));
    for (int32_t i = 0; i < n_images; i++) {
        TRY(context_encode(ctx, NULL, n_tiles[i], 0, NULL));
    }
    return context_fill_rows(ctx, slot, 0, ctx->model->hp.pub.n_positions, NULL);
}

static void forget_measured(mllama_context * ctx) {
    mllama_clear(ctx);
    for (int32_t i = 0; i < ctx->n_more; i++) {
        sequence_end(ctx->more[i]);
    }
    memset(ctx->compute, 0, sizeof(ctx->compute));
    memset(ctx->vision, 0, sizeof(ctx->vision));
}

mllama_status mllama_reserve(mllama_context * ctx, int32_t n_images, const int32_t * n_tiles) {
    if (n_images != 0) {
        TRY(context_check_images(ctx, n_images, n_tiles));
    }
    text_graph_free(&ctx->text);
    if (ctx->model->no_alloc) {
        forget_measured(ctx);
    }
    TRY(reserve_text(ctx, &ctx->own, -1));
    if (n_images == 0) {
        return MLLAMA_OK;
    }
    int32_t index = 0;
    TRY(context_new_slot(ctx, &index));
    const mllama_status status = reserve_images(ctx, &ctx->own, index, n_images, n_tiles);
    if (status != MLLAMA_OK || !ctx->model->no_alloc) {
        context_free_slot(ctx, &ctx->slots[index]);
    }
    return status;
}

// One token of each sequence, with its slot if there are images, and a piece of the last one's prompt.
static mllama_status reserve_together(mllama_context * ctx, int32_t n_sequences, int32_t n_piece, int32_t n_images) {
    text_item items[MAX_SEQUENCES];
    for (int32_t i = 0; i < n_sequences; i++) {
        const sequence * s        = ctx->more[i];
        const int32_t    room     = ctx->n_step - i;
        const int32_t    n_tokens = i + 1 < n_sequences ? 1 : n_piece < room ? n_piece : room;
        items[i] = context_item(ctx, s, n_tokens, s->n_ctx, n_images ? i : -1, n_images, MLLAMA_LOGITS_LAST);
    }
    return reserve_step(ctx, items, n_sequences);
}

mllama_status mllama_reserve_many(mllama_context * ctx, int32_t n_sequences, int32_t n_ctx, int32_t n_piece,
                                  int32_t n_images, const int32_t * n_tiles) {
    if (!ctx->model->no_alloc) {
        return fail(MLLAMA_ERR_ARGUMENT, "several sequences are reserved only for measuring");
    }
    if (n_sequences < 1 || n_sequences >= MAX_SEQUENCES || n_sequences > ctx->n_step || n_piece < 1) {
        return fail(MLLAMA_ERR_ARGUMENT, "%d sequences, %d tokens of a prompt: 1 to %d, and n_batch at most (%d)",
                    n_sequences, n_piece, MAX_SEQUENCES - 1, ctx->n_step);
    }
    if (n_images != 0) {
        TRY(context_check_images(ctx, n_images, n_tiles));
    }
    text_graph_free(&ctx->text);
    forget_measured(ctx);
    for (int32_t i = 0, number = 0; i < n_sequences; i++) {
        TRY(sequence_new(ctx, n_ctx, 0, &number));
    }
    for (int32_t i = 0, index = 0; n_images != 0 && i < n_sequences; i++) {
        TRY(context_new_slot(ctx, &index));
        if (i == 0) {
            TRY(reserve_images(ctx, ctx->more[0], index, n_images, n_tiles));
        } else {
            TRY(image_slot_init(&ctx->slots[index], ctx->model, ctx->params.offload_kqv, n_images, n_tiles,
                                ctx->cross_types));
        }
    }
    TRY(reserve_text(ctx, ctx->more[0], -1));
    return reserve_together(ctx, n_sequences, n_piece, n_images);
}
