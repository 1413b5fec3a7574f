// ggml's other layouts of weights for the CPU ("CPU_REPACK", "AMX", ...): a matrix that is copied to one is multiplied
// faster. Some of them end the process on some processors, so none is used that the caller does not name.
#pragma once

#include "status.h"

#include "ggml-backend.h"

// The layouts of the CPU, ended by NULL; or NULL.
ggml_backend_buffer_type_t * repack_layouts(ggml_backend_dev_t cpu);

// Whether the CPU multiplies a matrix like this when it is in that layout.
bool repack_multiplies(ggml_backend_dev_t cpu, ggml_backend_buffer_type_t layout, const struct ggml_tensor * matrix);

// The first layout among these names ("A,B") that the CPU multiplies such a matrix in, or NULL.
ggml_backend_buffer_type_t repack_choose(ggml_backend_dev_t cpu, const char * names, const struct ggml_tensor * matrix);
