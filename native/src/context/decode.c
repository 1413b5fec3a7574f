// Tokens to logits: of one sequence, or of many together.
#include "context/context.h"
#include "finite.h"
#include "guard.h"

#include <stdlib.h>
#include <string.h>

text_item context_item(const mllama_context * ctx, const sequence * s, int32_t n_tokens, int32_t n_end, int32_t slot,
                       int32_t n_visible, int32_t logits) {
    const image_slot * images = slot >= 0 ? &ctx->slots[slot] : NULL;
    return (text_item) {
        .cache           = &s->cache,
        .generation      = s->generation,
        .slot            = images,
        .slot_generation = images ? images->generation : 0,
        .n_tokens        = n_tokens,
        .n_kv            = context_rows(n_end),
        .n_rows          = images ? images->row_end[n_visible - 1] : 0,
        .logits          = logits,
    };
}

mllama_status context_prepare(mllama_context * ctx, const text_shape * shape) {
    if (text_graph_serves(&ctx->text, shape)) {
        return MLLAMA_OK;
    }
    const mllama_hparams * p     = &ctx->model->hp.pub;
    const size_t           nodes = text_graph_most_nodes(p, ctx->n_step, shape->n_items);
    text_graph_free(&ctx->text);
    mllama_status status = text_graph_build(ctx->model, shape, &ctx->env, &ctx->text);
    if (status == MLLAMA_OK && ctx->sched && nodes > ctx->sched_nodes) { // more sequences than ever
        guard_sched_free(ctx->sched);
        ctx->sched = NULL;
    }
    if (status == MLLAMA_OK && !ctx->sched) {
        status = context_new_sched(ctx, nodes, &ctx->sched);
        ctx->sched_nodes = nodes;
    }
    if (status == MLLAMA_OK) {
        status = context_alloc(ctx, &ctx->sched, ctx->text.g.gf, ctx->compute, "the text model",
                               "lower n_batch or n_ctx");
    }
    if (status != MLLAMA_OK) {
        text_graph_free(&ctx->text);
    }
    return status;
}

// ---- inputs -------------------------------------------------------------------------------------------------------

// One item of a call, and where its results go
typedef struct part {
    sequence *      sequence;
    const int32_t * tokens;
    int32_t         n_tokens, slot, n_visible, logits_mode;
    float *         logits;
    int32_t         order;  // of the call
    bool            finite; // its results
} part;

typedef struct inputs {
    int32_t *     tokens, * positions, * wanted;
    int64_t *     cells;
    ggml_fp16_t * mask;
} inputs;

static void free_inputs(inputs * in) {
    free(in->tokens);
    free(in->positions);
    free(in->wanted);
    free(in->cells);
    free(in->mask);
}

static mllama_status make_inputs(const text_graph * tg, inputs * in) {
    const size_t n = (size_t) tg->n_tokens;
    in->tokens    = malloc(n * sizeof(*in->tokens));
    in->positions = malloc(n * sizeof(*in->positions));
    in->wanted    = malloc(n * sizeof(*in->wanted));
    in->cells     = malloc(n * sizeof(*in->cells));
    in->mask      = malloc(ggml_nbytes(tg->mask));
    const bool ok = in->tokens && in->positions && in->wanted && in->cells && in->mask;
    return ok ? MLLAMA_OK : fail(MLLAMA_ERR_MEMORY, "out of memory");
}

static void write_inputs(const text_graph * tg, const part * parts, inputs * in) {
    const ggml_fp16_t seen = ggml_fp32_to_fp16(0.0f), unseen = 0xfc00; // -inf
    int64_t           at   = 0;
    ggml_fp16_t *     mask = in->mask;
    for (int32_t k = 0; k < tg->n_items; k++) {
        const int64_t n_kv = tg->items[k].n_kv, n_past = parts[k].sequence->n_past;
        for (int64_t i = 0; i < parts[k].n_tokens; i++, at++, mask += n_kv) {
            in->tokens[at]    = parts[k].tokens[i];
            in->positions[at] = (int32_t) (n_past + i);
            in->cells[at]     = n_past + i;
            for (int64_t j = 0; j < n_kv; j++) {
                mask[j] = j <= n_past + i ? seen : unseen;
            }
        }
    }
    text_graph_columns(&(text_shape) { .n_items = tg->n_items, .items = tg->items }, in->wanted);
}

// A model of cross-attention layers only reads neither positions nor mask.
static mllama_status set_input(struct ggml_tensor * input, const void * data) {
    return input && input->buffer ? guard_set(input, data, 0, ggml_nbytes(input)) : MLLAMA_OK;
}

static mllama_status set_inputs(const text_graph * tg, const part * parts) {
    inputs        in     = { 0 };
    mllama_status status = make_inputs(tg, &in);
    if (status == MLLAMA_OK) {
        write_inputs(tg, parts, &in);
        const void *         data[]    = { in.tokens, in.positions, in.cells, in.mask, in.wanted };
        struct ggml_tensor * tensors[] = { tg->tokens, tg->positions, tg->cells, tg->mask, tg->wanted };
        for (int i = 0; i < 5 && status == MLLAMA_OK; i++) {
            status = set_input(tensors[i], data[i]);
        }
    }
    free_inputs(&in);
    return status;
}

// ---- one step -----------------------------------------------------------------------------------------------------

static int64_t n_logits(const part * p) {
    return text_n_logits(p->logits_mode, p->n_tokens);
}

static mllama_status get_logits(const mllama_context * ctx, part * parts, int32_t n_parts) {
    const int64_t n_vocab = ctx->model->hp.pub.vocab_size;
    int64_t       at      = 0;
    for (int32_t i = 0; i < n_parts; i++) {
        const int64_t n = n_vocab * n_logits(&parts[i]);
        if (n > 0) {
            TRY(guard_get(ctx->text.logits, parts[i].logits, sizeof(float) * (size_t) at, sizeof(float) * (size_t) n));
            parts[i].finite &= finite_f32(parts[i].logits, n);
        }
        at += n;
    }
    return MLLAMA_OK;
}

// Whether each part's last token's values are finite, or with all logits each token's. They are read besides the
// logits, because a product with quantized weights rounds its input, which turns NaN into a number. Without logits they
// stand for the caches: the last token sees each row, and NaN in one reaches it.
static mllama_status check_last(const mllama_context * ctx, part * parts, int32_t n_parts) {
    const struct ggml_tensor * last = ctx->text.last;
    const int64_t n_embd  = last->ne[0];
    int64_t       at      = 0;
    float *       columns = malloc(ggml_nbytes(last));
    if (!columns) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    const mllama_status status = guard_get(last, columns, 0, ggml_nbytes(last));
    for (int32_t wants = 1; wants >= 0 && status == MLLAMA_OK; wants--) { // in the order of text_graph_columns
        for (int32_t i = 0; i < n_parts; i++) {
            const int64_t rows = n_logits(&parts[i]), mine = rows > 0 ? rows : 1;
            if ((rows > 0) == (wants == 1)) {
                parts[i].finite &= finite_f32(columns + at * n_embd, mine * n_embd);
                parts[i].finite &= !graph_saw(&ctx->text.g, ctx->text.n_tokens + at, mine);
                at += mine;
            }
        }
    }
    free(columns);
    return status;
}

// The same of what the graph has watched in the columns of the tokens, and of damage that products may hide. That
// counts with logits, the results at last: before them, taps see where it begins.
static void check_watched(const mllama_context * ctx, part * parts, int32_t n_parts) {
    const char * const * damage = ctx->model->damage;
    int64_t              column = 0;
    for (int32_t i = 0; i < n_parts; column += parts[i++].n_tokens) {
        parts[i].finite &= !graph_saw(&ctx->text.g, column, parts[i].n_tokens);
        if (n_logits(&parts[i]) > 0) {
            parts[i].finite &= !damage[PART_TEXT] && !(parts[i].slot >= 0 && damage[PART_CROSS]);
        }
    }
}

// What such values have reached in the caches cannot be told, and hidden cells must hold numbers: no token is kept.
mllama_status sequence_not_finite(mllama_context * ctx, sequence * s, const char * doing) {
    s->n_past = 0;
    text_graph_free(&ctx->text);
    TRY(kv_cache_clear(&s->cache));
    const char * const * damage = ctx->model->damage;
    return context_not_finite(ctx->model->text_file, doing, damage[PART_TEXT] ? damage[PART_TEXT] : damage[PART_CROSS]);
}

// Appends the tokens of all parts, which are in the order of a text_shape. After an error nothing is appended.
static mllama_status decode_parts(mllama_context * ctx, part * parts, int32_t n_parts) {
    text_item items[MAX_SEQUENCES];
    for (int32_t i = 0; i < n_parts; i++) {
        part * p = &parts[i];
        p->finite = true;
        TRY(sequence_grow(ctx, p->sequence, p->sequence->n_past + p->n_tokens));
        items[i] = context_item(ctx, p->sequence, p->n_tokens, p->sequence->n_past + p->n_tokens, p->slot, p->n_visible,
                                p->logits_mode);
    }
    TRY(context_prepare(ctx, &(text_shape) { .n_items = n_parts, .items = items }));
    TRY(set_inputs(&ctx->text, parts));
    graph_begin(&ctx->text.g);
    TRY(context_compute(ctx, ctx->sched, ctx->text.g.gf, "decoding"));
    TRY(get_logits(ctx, parts, n_parts));
    TRY(check_last(ctx, parts, n_parts));
    check_watched(ctx, parts, n_parts);
    for (int32_t i = 0; i < n_parts; i++) {
        parts[i].sequence->n_past += parts[i].n_tokens;
    }
    return MLLAMA_OK;
}

static mllama_status check_item(const mllama_context * ctx, const mllama_item * item, part * p) {
    const mllama_hparams * hp = &ctx->model->hp.pub;
    TRY(sequence_find(ctx, item->sequence, &p->sequence));
    const sequence * s = p->sequence;
    if (item->n_tokens < 1 || !item->tokens) {
        return fail(MLLAMA_ERR_ARGUMENT, "no tokens to decode");
    }
    if (item->n_tokens > s->n_ctx - s->n_past) {
        return fail(MLLAMA_ERR_CONTEXT_FULL, "%d tokens after %d do not fit n_ctx %d", item->n_tokens, s->n_past,
                    s->n_ctx);
    }
    for (int32_t i = 0; i < item->n_tokens; i++) {
        if (item->tokens[i] < 0 || item->tokens[i] >= hp->n_token_embd) {
            return fail(MLLAMA_ERR_ARGUMENT, "token %d is not in the vocabulary of %d", item->tokens[i],
                        hp->n_token_embd);
        }
    }
    if (item->slot != -1 && !context_has_slot(ctx, item->slot)) {
        return fail(MLLAMA_ERR_ARGUMENT, "no image in slot %d", item->slot);
    }
    if (item->slot >= 0 && (item->n_visible < 1 || item->n_visible > ctx->slots[item->slot].n_images)) {
        return fail(MLLAMA_ERR_ARGUMENT, "%d visible images of the %d in slot %d", item->n_visible,
                    ctx->slots[item->slot].n_images, item->slot);
    }
    p->tokens      = item->tokens;
    p->n_tokens    = item->n_tokens;
    p->slot        = item->slot;
    p->n_visible   = item->n_visible;
    p->logits_mode = item->logits_mode;
    p->logits      = item->logits;
    const int64_t rows = n_logits(p);
    if (item->logits_mode < MLLAMA_LOGITS_NONE || item->logits_mode > MLLAMA_LOGITS_ALL ||
        (rows > 0 && (!item->logits || item->logits_capacity < rows * hp->vocab_size))) {
        return fail(MLLAMA_ERR_ARGUMENT, "no room for %lld rows of %d logits", (long long) rows, hp->vocab_size);
    }
    return MLLAMA_OK;
}

mllama_status mllama_decode(mllama_context * ctx, const int32_t * tokens, int32_t n_tokens, int32_t slot,
                            int32_t n_visible, int32_t logits_mode, float * logits, int64_t logits_capacity) {
    const mllama_item item = { .tokens = tokens, .n_tokens = n_tokens, .slot = slot, .n_visible = n_visible,
                               .logits_mode = logits_mode, .logits = logits, .logits_capacity = logits_capacity };
    part whole = { 0 };
    TRY(context_check_memory(ctx));
    TRY(check_item(ctx, &item, &whole));
    context_begin(ctx, MLLAMA_PHASE_PROMPT);
    const int32_t n_past = ctx->own.n_past;
    for (int32_t at = 0; at < n_tokens;) {
        const int32_t n    = n_tokens - at < ctx->params.n_batch ? n_tokens - at : ctx->params.n_batch;
        part          step = whole;
        step.tokens   += at;
        step.n_tokens  = n;
        if (logits_mode == MLLAMA_LOGITS_LAST && at + n < n_tokens) {
            step.logits_mode = MLLAMA_LOGITS_NONE;
        }
        const mllama_status status = decode_parts(ctx, &step, 1);
        if (status != MLLAMA_OK) {
            ctx->own.n_past = n_past; // what was written beyond is masked from now on
            return status;
        }
        if (!step.finite) {
            return sequence_not_finite(ctx, &ctx->own, n_tokens > 1 ? "the prompt" : "a token");
        }
        at += n;
        if (logits_mode == MLLAMA_LOGITS_ALL) {
            whole.logits += (int64_t) n * ctx->model->hp.pub.vocab_size;
        }
        if (n_tokens > 1) {
            context_report(ctx, MLLAMA_PHASE_PROMPT, at, n_tokens);
        }
    }
    return MLLAMA_OK;
}

// As text_shape wants them: those with images first, those that see the same rows next to each other.
static int compare_parts(const void * left, const void * right) {
    const part * a = left, * b = right;
    if ((a->slot < 0) != (b->slot < 0)) {
        return a->slot < 0 ? 1 : -1;
    }
    if (a->slot != b->slot) {
        return a->slot < b->slot ? -1 : 1;
    }
    if (a->n_visible != b->n_visible) {
        return a->n_visible < b->n_visible ? -1 : 1;
    }
    return a->order < b->order ? -1 : 1;
}

mllama_status mllama_decode_many(mllama_context * ctx, int32_t n_items, mllama_item * items) {
    part    parts[MAX_SEQUENCES];
    int64_t n_tokens = 0;
    TRY(context_check_memory(ctx));
    if (n_items < 1 || n_items > MAX_SEQUENCES || !items) {
        return fail(MLLAMA_ERR_ARGUMENT, "%d items; 1 to %d are possible", n_items, MAX_SEQUENCES);
    }
    for (int32_t i = 0; i < n_items; i++) {
        TRY(check_item(ctx, &items[i], &parts[i]));
        parts[i].order = i;
        n_tokens += items[i].n_tokens;
        for (int32_t j = 0; j < i; j++) {
            if (items[j].sequence == items[i].sequence) {
                return fail(MLLAMA_ERR_ARGUMENT, "sequence %d is in two items", items[i].sequence);
            }
        }
    }
    if (n_tokens > ctx->n_step) {
        return fail(MLLAMA_ERR_ARGUMENT, "%lld tokens in one step; n_batch is %d", (long long) n_tokens, ctx->n_step);
    }
    qsort(parts, (size_t) n_items, sizeof(*parts), compare_parts);
    context_begin(ctx, MLLAMA_PHASE_PROMPT);
    TRY(decode_parts(ctx, parts, n_items));
    for (int32_t i = 0; i < n_items; i++) {
        mllama_item * item = &items[parts[i].order];
        item->status = MLLAMA_OK;
        if (!parts[i].finite) {
            item->status = sequence_not_finite(ctx, parts[i].sequence, item->n_tokens > 1 ? "the prompt" : "a token");
        }
    }
    return MLLAMA_OK;
}
