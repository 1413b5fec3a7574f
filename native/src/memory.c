#include "memory.h"

#include "guard.h"

mllama_status memory_alloc(struct ggml_context * ctx, ggml_backend_buffer_type_t type, bool no_alloc,
                           ggml_backend_buffer_t * buffer, uint64_t * size) {
    if (!no_alloc) {
        TRY(guard_alloc_tensors(ctx, type, buffer));
        *size = *buffer ? ggml_backend_buffer_get_size(*buffer) : 0;
        return MLLAMA_OK;
    }
    *buffer = NULL;
    TRY(guard_measure_tensors(ctx, type, size));
    TRY(guard_alloc_buffer(type, 0, buffer));
    for (struct ggml_tensor * t = ggml_get_first_tensor(ctx); *buffer && t; t = ggml_get_next_tensor(ctx, t)) {
        t->buffer = *buffer;
    }
    return MLLAMA_OK;
}
