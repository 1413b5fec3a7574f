// The weights of a model one by one, between finding them in a file (find.c) and loading them (load.c).
#pragma once

#include "model/weights.h"

typedef enum weight_kind {
    WEIGHT_MATRIX, // multiplied: any type that ggml multiplies
    WEIGHT_TABLE,  // rows are looked up: F32, F16 or BF16
    WEIGHT_VECTOR, // F32 when it is used, whatever the file has
    WEIGHT_GATE,   // one number, read into a float
} weight_kind;

typedef struct weight {
    gguf_file *                file;    // one part of a split model
    const struct ggml_tensor * source;  // in file->meta
    struct ggml_tensor **      tensor;  // where the loaded tensor goes; NULL for a gate
    ggml_backend_dev_t         device;
    ggml_backend_buffer_type_t repacked; // the faster layout of the CPU that it is copied to, or NULL
    weight_kind                kind;
    model_part                 part;
    bool                       permuted; // halves to pairs when loaded, see layout.h
} weight;

typedef struct weight_buffer {
    struct ggml_context * context;
    ggml_backend_buffer_t buffer;
    ggml_backend_dev_t    device;
    bool                  mapped; // from a file
    uint64_t              size;
} weight_buffer;

struct weight_list {
    weight *        items;
    int32_t         n, capacity;
    weight_buffer * buffers;
    int32_t         n_buffers;
    uint64_t        staging; // bytes that copying takes on the host
};
