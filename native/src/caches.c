#include "caches.h"

#include "finite.h"
#include "guard.h"
#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

// A worker may be a CPU, whose values ggml cannot have in F16 (see cpu_values in context.c).
static enum ggml_type type_of_values(const mllama_model * model, ggml_backend_dev_t device, kv_types types) {
    return device == model->plan.cpu                           ? types.v_cpu
           : device_is_rpc(device) && types.v == GGML_TYPE_F16 ? GGML_TYPE_F32
                                                               : types.v;
}

// The buffer of the tensors of ctx: new, or memory that is there, in which they follow each other. *buffer NULL: no
// room.
static mllama_status make_buffer(struct ggml_context * ctx, ggml_backend_dev_t device, bool no_alloc, char * data,
                                 uint64_t size, ggml_backend_buffer_t * buffer, uint64_t * allocated) {
    if (!data) {
        ggml_backend_buffer_type_t type = NULL;
        TRY(guard_buffer_type(device, &type));
        return memory_alloc(ctx, type, no_alloc, buffer, allocated);
    }
    TRY(guard_wrap_memory(data, size, buffer));
    for (struct ggml_tensor * t = ggml_get_first_tensor(ctx); *buffer && t;
         data += ggml_nbytes(t), t = ggml_get_next_tensor(ctx, t)) {
        TRY(guard_place_tensor(*buffer, t, data));
    }
    return MLLAMA_OK;
}

// k and v of `rows` rows for every layer that is (or is not) a cross-attention layer, on the layer's device or all on
// the CPU. data: they are here, all on the CPU; NULL: new memory
static mllama_status allocate(kv_cache * cache, const mllama_model * model, bool cross, bool offload, int64_t rows,
                              kv_types types, char * data) {
    const mllama_hparams * p       = &model->hp.pub;
    const int64_t          n_embd  = (int64_t) p->head_dim * p->n_head_kv;
    const size_t           n_layer = (size_t) p->n_layer;
    memset(cache, 0, sizeof(*cache));
    cache->type_v = types.v;
    cache->k = calloc(n_layer, sizeof(*cache->k));
    cache->v = calloc(n_layer, sizeof(*cache->v));
    if (!cache->k || !cache->v) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    for (int32_t d = -1; d < model->plan.n_gpus; d++) {
        ggml_backend_dev_t    device = d < 0 ? model->plan.cpu : model->plan.gpus[d];
        struct ggml_context * ctx    = NULL;
        TRY(guard_context(ggml_tensor_overhead() * (2 * n_layer + 1), &ctx));
        cache->contexts[cache->n_buffers++] = ctx;
        const enum ggml_type here_v = type_of_values(model, device, types);
        uint64_t             size   = 0;
        for (int32_t il = 0; il < p->n_layer; il++) {
            if (model->layers[il].is_cross != cross || (offload ? model->plan.layers[il] : model->plan.cpu) != device) {
                continue;
            }
            cache->k[il] = ggml_new_tensor_2d(ctx, types.k, n_embd, rows);
            cache->v[il] = ggml_new_tensor_2d(ctx, here_v, n_embd, rows);
            ggml_format_name(cache->k[il], "%scache_k.%d", cross ? "cross_" : "", il);
            ggml_format_name(cache->v[il], "%scache_v.%d", cross ? "cross_" : "", il);
            size += ggml_nbytes(cache->k[il]) + ggml_nbytes(cache->v[il]);
        }
        if (size == 0) {
            continue;
        }
        ggml_backend_buffer_t * buffer = &cache->buffers[cache->n_buffers - 1];
        TRY(make_buffer(ctx, device, model->no_alloc, data, size, buffer, &cache->sizes[d + 1]));
        if (!*buffer) {
            return fail(MLLAMA_ERR_MEMORY, "device %s has no room for a %s cache of %llu MiB; %s", device_label(device),
                        cross ? "cross-attention" : "self-attention", (unsigned long long) (size >> 20),
                        cross ? "use fewer images" : "lower n_ctx");
        }
    }
    return MLLAMA_OK;
}

mllama_status kv_cache_init(kv_cache * cache, const mllama_model * model, bool offload, int32_t n_ctx, kv_types types) {
    TRY(allocate(cache, model, false, offload, n_ctx, types, NULL));
    return kv_cache_clear(cache);
}

mllama_status kv_cache_clear(const kv_cache * cache) {
    for (int32_t i = 0; i < cache->n_buffers; i++) {
        if (cache->buffers[i]) {
            TRY(guard_clear(cache->buffers[i], 0));
        }
    }
    return MLLAMA_OK;
}

void kv_cache_free(kv_cache * cache) {
    for (int32_t i = 0; i < cache->n_buffers; i++) {
        guard_buffer_free(cache->buffers[i]);
        ggml_free(cache->contexts[i]);
    }
    free(cache->k);
    free(cache->v);
    memset(cache, 0, sizeof(*cache));
}

struct ggml_tensor * kv_cache_rounded(struct ggml_context * ctx, const kv_cache * cache, int32_t il,
                                      struct ggml_tensor * v) {
    if (cache->type_v != GGML_TYPE_F16 || cache->v[il]->type == GGML_TYPE_F16) {
        return v;
    }
    return ggml_cast(ctx, ggml_cast(ctx, v, GGML_TYPE_F16), GGML_TYPE_F32);
}

uint64_t kv_cache_size(const kv_cache * cache, int32_t n_layer, int32_t n_rows) {
    uint64_t size = 0;
    for (int32_t il = 0; il < n_layer; il++) {
        if (cache->k[il]) {
            size += (uint64_t) n_rows * (cache->k[il]->nb[1] + cache->v[il]->nb[1]);
        }
    }
    return size;
}

// n bytes of a tensor to *get or from *set, one of which is NULL; the other moves behind them.
static mllama_status copy_part(struct ggml_tensor * t, uint64_t offset, uint64_t n, char ** get, const char ** set) {
    if (*get) {
        TRY(guard_get(t, *get, offset, n));
        *get += n;
    } else {
        TRY(guard_set(t, *set, offset, n));
        *set += n;
    }
    return MLLAMA_OK;
}

mllama_status kv_cache_copy(const kv_cache * cache, int32_t n_layer, int32_t n_rows, char * get, const char * set) {
    for (int32_t i = 0; i < 2 * n_layer; i++) {
        struct ggml_tensor * t = i % 2 ? cache->v[i / 2] : cache->k[i / 2];
        const size_t         n = t ? (size_t) n_rows * t->nb[1] : 0;
        if (n == 0) {
            continue;
        }
        TRY(copy_part(t, 0, n, &get, &set));
    }
    return MLLAMA_OK;
}

bool kv_cache_finite(const kv_cache * cache, int32_t n_layer, int32_t n_rows, const char * data) {
    for (int32_t i = 0; i < 2 * n_layer; i++) {
        const struct ggml_tensor * t = i % 2 ? cache->v[i / 2] : cache->k[i / 2];
        const size_t               n = t ? (size_t) n_rows * t->nb[1] : 0;
        if (n > 0 && !finite_bytes(t->type, data, n)) {
            return false;
        }
        data += n;
    }
    return true;
}

bool kv_cache_host_rows_finite(const kv_cache * cache, int32_t n_layer, int64_t first, int64_t n_rows) {
    for (int32_t i = 0; i < 2 * n_layer; i++) {
        const struct ggml_tensor * t = i % 2 ? cache->v[i / 2] : cache->k[i / 2];
        if (t && guard_is_host(t->buffer) &&
            !finite_bytes(t->type, (const char *) t->data + (size_t) first * t->nb[1], (size_t) n_rows * t->nb[1])) {
            return false;
        }
    }
    return true;
}

mllama_status kv_cache_move(const kv_cache * from, const kv_cache * to, int32_t n_layer, int32_t n_rows) {
    char *        data   = NULL;
    mllama_status status = MLLAMA_OK;
    for (int32_t i = 0; i < 2 * n_layer && status == MLLAMA_OK; i++) {
        struct ggml_tensor * a = i % 2 ? from->v[i / 2] : from->k[i / 2], * b = i % 2 ? to->v[i / 2] : to->k[i / 2];
        const size_t         n = a ? (size_t) n_rows * a->nb[1] : 0;
        if (n == 0) {
            continue;
        }
        char * room = realloc(data, n);
        if (!room) {
            status = fail(MLLAMA_ERR_MEMORY, "out of memory");
            break;
        }
        data   = room;
        status = guard_get(a, data, 0, n);
        if (status == MLLAMA_OK) {
            status = guard_set(b, data, 0, n);
        }
    }
    free(data);
    return status;
}

static mllama_status init(image_slot * slot, const mllama_model * model, bool offload, int32_t n_images,
                          const int32_t * n_tiles, kv_types types, char * data) {
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
    return allocate(&slot->kv, model, true, offload, rows, types, data);
}

mllama_status image_slot_init(image_slot * slot, const mllama_model * model, bool offload, int32_t n_images,
                              const int32_t * n_tiles, kv_types types) {
    return init(slot, model, offload, n_images, n_tiles, types, NULL);
}

uint64_t image_slot_mapped_size(const mllama_model * model, bool offload, int32_t n_tiles, kv_types types) {
    const mllama_hparams * p      = &model->hp.pub;
    const int64_t          n_embd = (int64_t) p->head_dim * p->n_head_kv, rows = (int64_t) n_tiles * p->n_positions;
    const uint64_t         k      = ggml_row_size(types.k, n_embd) * (uint64_t) rows;
    const uint64_t         v      = ggml_row_size(types.v_cpu, n_embd) * (uint64_t) rows;
    const size_t           step   = ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type());
    for (int32_t i = 0; offload && i < p->n_cross_layers; i++) {
        if (model->plan.layers[model->hp.cross_layers[i]] != model->plan.cpu) {
            return 0;
        }
    }
    return k % step == 0 && v % step == 0 ? (uint64_t) p->n_cross_layers * (k + v) : 0;
}

mllama_status image_slot_map(image_slot * slot, const mllama_model * model, bool offload, int32_t n_tiles,
                             kv_types types, const char * path, uint64_t offset) {
    const uint64_t size = image_slot_mapped_size(model, offload, n_tiles, types);
    const int      fd   = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY); // a pipe is not waited for
    struct stat    info;
    if (fd < 0 || fstat(fd, &info) != 0) {
        const int error = errno;
        if (fd >= 0) {
            close(fd);
        }
        return fail(MLLAMA_ERR_FILE, "%s: %s", path, strerror(error));
    }
    if (!S_ISREG(info.st_mode)) {
        close(fd);
        return fail(MLLAMA_ERR_FILE, "%s: cannot be mapped into memory: not a file", path);
    }
    if (size == 0 || offset % 64 != 0 || (uint64_t) info.st_size < offset || (uint64_t) info.st_size - offset < size) {
        close(fd);
        return fail(MLLAMA_ERR_ARGUMENT, "%s: no %llu bytes at %llu that could be mapped", path,
                    (unsigned long long) size, (unsigned long long) offset);
    }
    void *    map   = mmap(NULL, (size_t) (offset + size), PROT_READ, MAP_SHARED, fd, 0);
    const int error = errno;
    close(fd);
    if (map == MAP_FAILED) {
        return fail(MLLAMA_ERR_FILE, "%s: cannot be mapped into memory: %s", path, strerror(error));
    }
    slot->map      = map;
    slot->map_size = (size_t) (offset + size);
    return init(slot, model, offload, 1, &n_tiles, types, (char *) map + offset);
}

void image_slot_free(image_slot * slot) {
    if (!slot->used) {
        return;
    }
    kv_cache_free(&slot->kv);
    if (slot->map) {
        munmap(slot->map, slot->map_size);
        slot->map = NULL;
    }
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

mllama_status image_slot_copy(const image_slot * slot, const mllama_model * model, int32_t image, uint64_t offset,
                              uint64_t n_bytes, char * get, const char * set) {
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
        TRY(copy_part(t, first + offset, n, &get, &set));
        offset = 0;
        n_bytes -= n;
    }
    return MLLAMA_OK;
}
