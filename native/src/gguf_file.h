// A GGUF file on disk: header, keys and tensor table, checked against the size of the file.
#pragma once

#include "status.h"

#include "ggml.h"
#include "gguf.h"

#include <stddef.h>

typedef struct gguf_file {
    char *                path;
    int                   fd;
    uint64_t              size;        // of the file, bytes
    uint64_t              data_offset; // of the tensor data in the file
    struct gguf_context * gguf;
    struct ggml_context * meta;        // the tensors of the table, without data
    void *                map;         // the whole file, read-only, or NULL
} gguf_file;

mllama_status gguf_file_open(const char * path, gguf_file ** file);
void          gguf_file_close(gguf_file * file);
mllama_status gguf_file_map(gguf_file * file);
// Reads n bytes of a tensor's data from its byte `offset`.
mllama_status gguf_file_read(const gguf_file * file, const struct ggml_tensor * tensor, uint64_t offset, void * dst,
                             size_t n);
// Position of a tensor's data in the file. The tensor must be of this file's table.
uint64_t      gguf_file_position(const gguf_file * file, const struct ggml_tensor * tensor);

// Keys. A missing key is an error unless a default is given; so is a wrong type or a value out of range.
bool          gguf_file_has(const gguf_file * file, const char * key);
mllama_status gguf_file_int(const gguf_file * file, const char * key, int64_t min, int64_t max, int32_t * value);
mllama_status gguf_file_int_or(const gguf_file * file, const char * key, int64_t min, int64_t max, int32_t otherwise,
                               int32_t * value);
mllama_status gguf_file_float_or(const gguf_file * file, const char * key, float min, float max, float otherwise,
                                 float * value);
mllama_status gguf_file_string(const gguf_file * file, const char * key, const char ** value);
// *values is allocated with malloc; a missing key gives NULL and 0.
mllama_status gguf_file_ints(const gguf_file * file, const char * key, int32_t ** values, int32_t * n);
