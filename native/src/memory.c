#include "memory.h"

#include "ggml-alloc.h"

ggml_backend_buffer_t memory_alloc(struct ggml_context * ctx, ggml_backend_buffer_type_t type, bool no_alloc, uint64_t * size) {
    if (!no_alloc) {
        ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors_from_buft(ctx, type);
        *size = buffer ? ggml_backend_buffer_get_size(buffer) : 0;
        return buffer;
    }
    *size = ggml_backend_alloc_ctx_tensors_from_buft_size(ctx, type);
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(type, 0);
    for (struct ggml_tensor * t = ggml_get_first_tensor(ctx); buffer && t; t = ggml_get_next_tensor(ctx, t)) {
        t->buffer = buffer;
    }
    return buffer;
}
