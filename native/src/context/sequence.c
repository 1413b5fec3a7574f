// The sequences of a context: the caches of tokens, and what is in them.
#include "context/context.h"

#include <stdlib.h>
#include <string.h>

mllama_status sequence_init(mllama_context * ctx, sequence * s, int32_t n_ctx, int32_t n_tokens) {
    s->used       = true;
    s->n_ctx      = n_ctx;
    s->n_past     = 0;
    s->n_rows     = context_rows(n_tokens);
    s->generation = ++ctx->generation;
    return kv_cache_init(&s->cache, ctx->model, ctx->params.offload_kqv, s->n_rows, ctx->types);
}

void sequence_end(sequence * s) {
    if (s->cache.k || s->cache.n_buffers) {
        kv_cache_free(&s->cache);
    }
    memset(s, 0, sizeof(*s));
}

mllama_status sequence_grow(mllama_context * ctx, sequence * s, int32_t n_tokens) {
    if (n_tokens <= s->n_rows) {
        return MLLAMA_OK;
    }
    const int32_t most = context_rows(s->n_ctx), twice = s->n_rows <= most / 2 ? 2 * s->n_rows : most;
    sequence      grown = { 0 };
    text_graph_free(&ctx->text);
    mllama_status status = sequence_init(ctx, &grown, s->n_ctx, twice > n_tokens ? twice : n_tokens);
    if (status == MLLAMA_OK) {
        status = kv_cache_move(&s->cache, &grown.cache, ctx->model->hp.pub.n_layer, s->n_past);
    }
    if (status != MLLAMA_OK) {
        sequence_end(&grown);
        return status;
    }
    grown.n_past = s->n_past;
    sequence_end(s);
    *s = grown;
    return MLLAMA_OK;
}

mllama_status sequence_find(const mllama_context * ctx, int32_t number, sequence ** s) {
    *s = number == 0                                 ? (sequence *) &ctx->own
         : number > 0 && number <= ctx->n_more ? ctx->more[number - 1]
                                                     : NULL;
    return *s && (*s)->used ? MLLAMA_OK : fail(MLLAMA_ERR_ARGUMENT, "there is no sequence %d", number);
}

// A place for a sequence: one that is free, or a new one
static mllama_status find_place(mllama_context * ctx, int32_t * number) {
    int32_t i = 0;
    while (i < ctx->n_more && ctx->more[i]->used) {
        i++;
    }
    *number = i + 1;
    if (i < ctx->n_more) {
        return MLLAMA_OK;
    }
    if (i + 1 == MAX_SEQUENCES) {
        return fail(MLLAMA_ERR_ARGUMENT, "a context has %d sequences at most", MAX_SEQUENCES);
    }
    sequence ** more = realloc(ctx->more, ((size_t) i + 1) * sizeof(*more));
    if (!more) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    ctx->more    = more;
    ctx->more[i] = calloc(1, sizeof(*ctx->more[i]));
    if (!ctx->more[i]) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    ctx->n_more++;
    return MLLAMA_OK;
}

mllama_status sequence_new(mllama_context * ctx, int32_t n_ctx, int32_t n_tokens, int32_t * number) {
    n_ctx = n_ctx == 0 ? ctx->params.n_ctx : n_ctx;
    if (n_ctx < 1 || n_ctx > ctx->model->hp.pub.n_ctx_train) {
        return fail(MLLAMA_ERR_ARGUMENT, "n_ctx is %d; this model takes 1 to %d", n_ctx,
                    ctx->model->hp.pub.n_ctx_train);
    }
    int32_t found = 0;
    TRY(find_place(ctx, &found));
    text_graph_free(&ctx->text); // as sequence_grow
    sequence *          s      = ctx->more[found - 1];
    const mllama_status status = sequence_init(ctx, s, n_ctx, n_tokens ? n_tokens : n_ctx);
    if (status != MLLAMA_OK) {
        sequence_end(s);
        return status;
    }
    *number = found;
    return MLLAMA_OK;
}

mllama_status mllama_sequence_new(mllama_context * ctx, int32_t n_ctx, int32_t * number) {
    TRY(context_check_memory(ctx));
    return sequence_new(ctx, n_ctx, 1, number);
}

mllama_status mllama_sequence_free(mllama_context * ctx, int32_t number) {
    sequence * s;
    TRY(sequence_find(ctx, number, &s));
    if (number == 0) {
        return fail(MLLAMA_ERR_ARGUMENT, "sequence 0 is the context's own");
    }
    text_graph_free(&ctx->text);
    sequence_end(s);
    return MLLAMA_OK;
}

int32_t mllama_sequence_n_past(const mllama_context * ctx, int32_t number) {
    sequence * s;
    return sequence_find(ctx, number, &s) == MLLAMA_OK ? s->n_past : -1;
}

mllama_status mllama_sequence_truncate(mllama_context * ctx, int32_t number, int32_t n_past) {
    sequence * s;
    TRY(sequence_find(ctx, number, &s));
    if (n_past < 0 || n_past > s->n_past) {
        return fail(MLLAMA_ERR_ARGUMENT, "cannot keep %d of %d tokens", n_past, s->n_past);
    }
    s->n_past = n_past;
    return MLLAMA_OK;
}

uint64_t mllama_prefix_kv_size(const mllama_context * ctx, int32_t n_tokens) {
    return n_tokens > 0 ? kv_cache_size(&ctx->own.cache, ctx->model->hp.pub.n_layer, n_tokens) : 0;
}

static mllama_status check_prefix_kv(const mllama_context * ctx, int32_t n_tokens, int32_t most, uint64_t n_bytes,
                                const void * data) {
    const uint64_t size = n_tokens >= 0 && n_tokens <= most ? mllama_prefix_kv_size(ctx, n_tokens) : 0;
    if (n_tokens < 0 || n_tokens > most || n_bytes != size || !data) {
        return fail(MLLAMA_ERR_ARGUMENT, "%llu bytes for %d tokens; %d tokens at most, and %llu bytes are possible",
                    (unsigned long long) n_bytes, n_tokens, most, (unsigned long long) size);
    }
    return context_check_memory(ctx);
}

mllama_status mllama_sequence_prefix_kv_get(mllama_context * ctx, int32_t number, int32_t n_tokens, uint64_t n_bytes,
                                  void * data) {
    const int32_t n_layer = ctx->model->hp.pub.n_layer;
    sequence *    s;
    TRY(sequence_find(ctx, number, &s));
    TRY(check_prefix_kv(ctx, n_tokens, s->n_past, n_bytes, data));
    TRY(kv_cache_copy(&s->cache, n_layer, n_tokens, data, NULL));
    const bool finite = !ctx->model->damage[PART_TEXT] && kv_cache_finite(&s->cache, n_layer, n_tokens, data);
    return finite ? MLLAMA_OK : sequence_not_finite(ctx, s, "the prompt");
}

mllama_status mllama_sequence_prefix_kv_set(mllama_context * ctx, int32_t number, int32_t n_tokens, uint64_t n_bytes,
                                  const void * data) {
    sequence * s;
    TRY(sequence_find(ctx, number, &s));
    TRY(check_prefix_kv(ctx, n_tokens, s->n_ctx, n_bytes, data));
    TRY(sequence_grow(ctx, s, n_tokens));
    s->n_past = 0; // what a failure leaves is worth nothing
    TRY(kv_cache_copy(&s->cache, ctx->model->hp.pub.n_layer, n_tokens, NULL, data));
    s->n_past = n_tokens;
    return MLLAMA_OK;
}

// ---- the context's own --------------------------------------------------------------------------------------------

int32_t mllama_n_past(const mllama_context * ctx) {
    return mllama_sequence_n_past(ctx, 0);
}

mllama_status mllama_truncate(mllama_context * ctx, int32_t n_past) {
    return mllama_sequence_truncate(ctx, 0, n_past);
}

mllama_status mllama_prefix_kv_get(mllama_context * ctx, int32_t n_tokens, uint64_t n_bytes, void * data) {
    return mllama_sequence_prefix_kv_get(ctx, 0, n_tokens, n_bytes, data);
}

mllama_status mllama_prefix_kv_set(mllama_context * ctx, int32_t n_tokens, uint64_t n_bytes, const void * data) {
    return mllama_sequence_prefix_kv_set(ctx, 0, n_tokens, n_bytes, data);
}
