// A GGUF file on disk: header, keys and tensor table, checked against the size of the file. A model may be split into
// several files (NAME-00001-of-0000N.gguf, as gguf-split writes them). The first then holds the keys and leads to the
// others.
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
    struct gguf_file **   more;        // [n_more]: the other files of a split model, in order
    int32_t               n_more;
} gguf_file;

// Opens a file, and the other files of a split model when it is the first of them.
mllama_status gguf_file_open(const char * path, gguf_file ** file);
void          gguf_file_close(gguf_file * file);
mllama_status gguf_file_map(gguf_file * file);

static inline int32_t gguf_file_n_parts(const gguf_file * file) {
    return 1 + file->n_more;
}
static inline gguf_file * gguf_file_part(gguf_file * file, int32_t index) {
    return index == 0 ? file : file->more[index - 1];
}
// A tensor of the model by its name, or NULL. *part, unless NULL, is the file that has it; the functions below want
// that one.
const struct ggml_tensor * gguf_file_tensor(gguf_file * file, const char * name, gguf_file ** part);
bool                       gguf_file_has_vision(gguf_file * file);

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
