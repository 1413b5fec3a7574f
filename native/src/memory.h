// Buffers that are allocated, or that only say what they would take.
#pragma once

#include "status.h"

#include "ggml-backend.h"

// One buffer for all tensors of ctx, and its bytes. With no_alloc an empty buffer, which tells ggml where the tensors
// are to be and nothing more. *buffer NULL: no room.
mllama_status memory_alloc(struct ggml_context * ctx, ggml_backend_buffer_type_t type, bool no_alloc,
                           ggml_backend_buffer_t * buffer, uint64_t * size);
