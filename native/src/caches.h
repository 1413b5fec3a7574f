// The two key/value caches of a conversation: self-attention (all tokens) and cross-attention (one slot an image
// group).
#pragma once

#include "model/model.h"

typedef struct kv_types {
    enum ggml_type k, v;
    enum ggml_type v_cpu; // of values on the CPU
} kv_types;

typedef struct kv_cache {
    struct ggml_tensor **   k; // [n_layer]: [head_dim * n_head_kv, n_ctx], NULL in cross-attention layers
    struct ggml_tensor **   v;
    enum ggml_type          type_v; // to which values are rounded, wherever they are
    struct ggml_context *   contexts[MAX_DEVICES + 1]; // one for each device
    ggml_backend_buffer_t   buffers[MAX_DEVICES + 1];
    uint64_t                sizes[MAX_DEVICES + 1]; // bytes on the CPU, then on each of model->plan.gpus
    int32_t                 n_buffers;
} kv_cache;

// offload: each layer's part goes to the layer's device, else all to the CPU.
mllama_status kv_cache_init(kv_cache * cache, const mllama_model * model, bool offload, int32_t n_ctx, kv_types types);
void          kv_cache_free(kv_cache * cache);
// Values as a layer's cache holds them on any device: where they are F32 only because ggml's kernel needs that, they
// are rounded like the others, so that the answer does not depend on where a layer is.
struct ggml_tensor * kv_cache_rounded(struct ggml_context * ctx, const kv_cache * cache, int32_t il,
                                      struct ggml_tensor * v);
// The bytes of the first n_rows rows: for each layer those of k, then those of v. One of get and set is NULL.
uint64_t      kv_cache_size(const kv_cache * cache, int32_t n_layer, int32_t n_rows);
mllama_status kv_cache_copy(const kv_cache * cache, int32_t n_layer, int32_t n_rows, char * get, const char * set);
// Whether such bytes are finite numbers.
bool          kv_cache_finite(const kv_cache * cache, int32_t n_layer, int32_t n_rows, const char * data);
// A masked row still enters a product with weight 0, so it must hold numbers: all rows become 0.
mllama_status kv_cache_clear(const kv_cache * cache);
// Whether the rows [first, first + n_rows) are finite, as far as they are in host memory.
bool          kv_cache_host_rows_finite(const kv_cache * cache, int32_t n_layer, int64_t first, int64_t n_rows);
// Copies the first n_rows rows into another cache of the same model and types, through the memory of this process.
mllama_status kv_cache_move(const kv_cache * from, const kv_cache * to, int32_t n_layer, int32_t n_rows);

// One image, or several directly adjacent ones. The rows of an image follow those of the one before, so that what a
// token sees, the first n images, is one view.
typedef struct image_slot {
    bool      used;       // by the context, before it has rows
    uint64_t  generation; // differs between two fillings of one slot
    int32_t   n_images;
    int32_t * row_end;    // [n_images] rows of the images up to and including this one
    kv_cache  kv;         // [n_layer], set in cross-attention layers only
    void *    map;        // of a file whose bytes kv has, or NULL
    size_t    map_size;
} image_slot;

mllama_status image_slot_init(image_slot * slot, const mllama_model * model, bool offload, int32_t n_images,
                              const int32_t * n_tiles, kv_types types);
void          image_slot_free(image_slot * slot);

// The bytes of an image with n_tiles tiles, if a slot can have them from a file: all in memory, at addresses that ggml
// allows. Else 0.
uint64_t      image_slot_mapped_size(const mllama_model * model, bool offload, int32_t n_tiles, kv_types types);
// A slot of one image with the bytes from `offset` (a multiple of 64) of a file, which is mapped to read.
mllama_status image_slot_map(image_slot * slot, const mllama_model * model, bool offload, int32_t n_tiles,
                             kv_types types, const char * path, uint64_t offset);

// The bytes of one image: for each cross-attention layer its rows of k, then those of v.
uint64_t      image_slot_size(const image_slot * slot, const mllama_model * model, int32_t image);
// Part of these bytes, which must be within their size. One of get and set is NULL.
mllama_status image_slot_copy(const image_slot * slot, const mllama_model * model, int32_t image, uint64_t offset,
                              uint64_t n_bytes, char * get, const char * set);
