#include "caches.h"

#include "memory.h"

#include <stdlib.h>
#include <string.h>

// k and v of `rows` rows for every layer that is (or is not) a cross-attention layer, on the layer's device or all on the CPU.
static mllama_status allocate(kv_cache * cache, const mllama_model * model, bool cross, bool offload, int64_t rows,
                              enum ggml_type type_k, enum ggml_type type_v) {
    const mllama_hparams * p       = &model->hp.pub;
    const int64_t          n_embd  = (int64_t) p->head_dim * p->n_head_kv;
    const size_t           n_layer = (size_t) p->n_layer;
    memset(cache, 0, sizeof(*cache));
    cache->k = calloc(n_layer, sizeof(*cache->k));
    cache->v = calloc(n_layer, sizeof(*cache->v));
    if (!cache->k || !cache->v) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    for (int32_t d = -1; d < model->plan.n_gpus; d++) {
        ggml_backend_dev_t      device = d < 0 ? model->plan.cpu : model->plan.gpus[d];
        struct ggml_init_params params = { .mem_size = ggml_tensor_overhead() * (2 * n_layer + 1), .no_alloc = true };
        struct ggml_context *   ctx    = ggml_init(params);
        if (!ctx) {
            return fail(MLLAMA_ERR_MEMORY, "out of memory");
        }
        cache->contexts[cache->n_buffers++] = ctx;
        // ggml's CPU kernel sums F16 values unnormalised in F16: three digits are left, and many rows of large values overflow
        // (seen: values of 2000). Values are therefore F32 on the CPU, and on a worker, which may be one.
        const bool           wide   = (device == model->plan.cpu || device_is_rpc(device)) && type_v == GGML_TYPE_F16;
        const enum ggml_type here_v = wide ? GGML_TYPE_F32 : type_v;
        uint64_t size = 0;
        for (int32_t il = 0; il < p->n_layer; il++) {
            if (model->layers[il].is_cross != cross || (offload ? model->plan.layers[il] : model->plan.cpu) != device) {
                continue;
            }
            cache->k[il] = ggml_new_tensor_2d(ctx, type_k, n_embd, rows);
            cache->v[il] = ggml_new_tensor_2d(ctx, here_v, n_embd, rows);
            ggml_format_name(cache->k[il], "%scache_k.%d", cross ? "cross_" : "", il);
            ggml_format_name(cache->v[il], "%scache_v.%d", cross ? "cross_" : "", il);
            size += ggml_nbytes(cache->k[il]) + ggml_nbytes(cache->v[il]);
        }
        if (size == 0) {
            continue;
        }
        ggml_backend_buffer_t buffer = memory_alloc(ctx, ggml_backend_dev_buffer_type(device), model->no_alloc, &cache->sizes[d + 1]);
        if (!buffer) {
            return fail(MLLAMA_ERR_MEMORY, "device %s has no room for a %s cache of %llu MiB; %s", device_label(device),
                        cross ? "cross-attention" : "self-attention", (unsigned long long) (size >> 20),
                        cross ? "use fewer images" : "lower n_ctx");
        }
        if (!cross) { // A masked row still enters a product with weight 0, so it must hold numbers; a slot has no such rows.
            ggml_backend_buffer_clear(buffer, 0);
        }
        cache->buffers[cache->n_buffers - 1] = buffer;
    }
    return MLLAMA_OK;
}

mllama_status kv_cache_init(kv_cache * cache, const mllama_model * model, bool offload, int32_t n_ctx, enum ggml_type type_k,
                            enum ggml_type type_v) {
    return allocate(cache, model, false, offload, n_ctx, type_k, type_v);
}

void kv_cache_free(kv_cache * cache) {
    for (int32_t i = 0; i < cache->n_buffers; i++) {
        ggml_backend_buffer_free(cache->buffers[i]);
        ggml_free(cache->contexts[i]);
    }
    free(cache->k);
    free(cache->v);
    memset(cache, 0, sizeof(*cache));
}

mllama_status image_slot_init(image_slot * slot, const mllama_model * model, bool offload, int32_t n_images,
                              const int32_t * n_tiles, enum ggml_type type_k, enum ggml_type type_v) {
    slot->used    = true;
    slot->row_end = calloc((size_t) n_images, sizeof(*slot->row_end));
    if (!slot->row_end) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    slot->n_images = n_images;
    int32_t rows   = 0;
    for (int32_t i = 0; i < n_images; i++) {
        rows += n_tiles[i] * model->hp.pub.n_positions;
        slot->row_end[i] = rows;
    }
    return allocate(&slot->kv, model, true, offload, rows, type_k, type_v);
}

void image_slot_free(image_slot * slot) {
    if (!slot->used) {
        return;
    }
    kv_cache_free(&slot->kv);
    free(slot->row_end);
    slot->row_end = NULL;
    slot->used    = false;
}

// The rows of an image in one tensor of a slot: *first byte, and how many bytes.
static uint64_t rows_of(const image_slot * slot, const struct ggml_tensor * t, int32_t image, uint64_t * first) {
    const uint64_t start = image > 0 ? (uint64_t) slot->row_end[image - 1] : 0;
    *first = start * t->nb[1];
    return ((uint64_t) slot->row_end[image] - start) * t->nb[1];
}

uint64_t image_slot_size(const image_slot * slot, const mllama_model * model, int32_t image) {
    uint64_t size = 0, first = 0;
    for (int32_t i = 0; i < model->hp.pub.n_cross_layers; i++) {
        const int32_t il = model->hp.cross_layers[i];
        size += rows_of(slot, slot->kv.k[il], image, &first) + rows_of(slot, slot->kv.v[il], image, &first);
    }
    return size;
}

void image_slot_copy(const image_slot * slot, const mllama_model * model, int32_t image, uint64_t offset, uint64_t n_bytes, char * get,
                     const char * set) {
    for (int32_t i = 0; i < 2 * model->hp.pub.n_cross_layers && n_bytes > 0; i++) {
        const int32_t        il    = model->hp.cross_layers[i / 2];
        struct ggml_tensor * t     = i % 2 ? slot->kv.v[il] : slot->kv.k[il];
        uint64_t             first = 0;
        const uint64_t       size  = rows_of(slot, t, image, &first);
        if (offset >= size) {
            offset -= size;
            continue;
        }
        const uint64_t n = size - offset < n_bytes ? size - offset : n_bytes;
        if (get) {
            ggml_backend_tensor_get(t, get, first + offset, n);
            get += n;
        } else {
            ggml_backend_tensor_set(t, set, first + offset, n);
            set += n;
        }
        offset = 0;
        n_bytes -= n;
    }
}
