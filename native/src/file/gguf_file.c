#include "file/gguf_file.h"

#include "guard.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

// The tensors of the table in file->meta, without data. ggml would do that itself, but ends the process where an empty
// tensor has other sizes whose product overflows.
static mllama_status read_tensors(gguf_file * file) {
    const int64_t n = gguf_get_n_tensors(file->gguf);
    if (guard_context(ggml_tensor_overhead() * (size_t) (n + 1), &file->meta) != MLLAMA_OK) {
        return fail(MLLAMA_ERR_MEMORY, "%s: out of memory", file->path);
    }
    for (int64_t i = 0; i < n; i++) {
        const char *    name   = gguf_get_tensor_name(file->gguf, i);
        const uint64_t  offset = gguf_get_tensor_offset(file->gguf, i), bytes = gguf_get_tensor_size(file->gguf, i);
        const int64_t * ne     = gguf_get_tensor_ne(file->gguf, i);
        for (int d = 0; d < GGML_MAX_DIMS; d++) {
            if (ne[d] < 1) {
                return fail(MLLAMA_ERR_FILE, "%s: tensor '%s' is empty; the file is damaged", file->path, name);
            }
        }
        if (offset > file->size || bytes > file->size || file->data_offset + offset > file->size - bytes) {
            return fail(MLLAMA_ERR_FILE,
                        "%s: the file is truncated: tensor '%s' ends at byte %llu of %llu; download it again",
                        file->path, name, (unsigned long long) (file->data_offset + offset + bytes),
                        (unsigned long long) file->size);
        }
        ggml_set_name(ggml_new_tensor(file->meta, gguf_get_tensor_type(file->gguf, i), GGML_MAX_DIMS, ne), name);
    }
    return MLLAMA_OK;
}

static mllama_status open_checked(gguf_file * file) {
    struct stat st;
    if (stat(file->path, &st) != 0) {
        return fail(MLLAMA_ERR_FILE, "%s: cannot open: %s", file->path, strerror(errno));
    }
    if (S_ISREG(st.st_mode)) { // neither waits for a pipe nor starts a device, should the name change hands
        file->fd = open(file->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
        if (file->fd < 0) {
            return fail(MLLAMA_ERR_FILE, "%s: cannot open: %s", file->path, strerror(errno));
        }
        if (fstat(file->fd, &st) != 0) {
            return fail(MLLAMA_ERR_FILE, "%s: cannot read: %s", file->path, strerror(errno));
        }
    }
    if (!S_ISREG(st.st_mode)) {
        return fail(MLLAMA_ERR_FILE, "%s: not a file", file->path);
    }
    file->size = (uint64_t) st.st_size;

    unsigned char head[8];
    if (pread(file->fd, head, sizeof(head), 0) != (ssize_t) sizeof(head) || memcmp(head, "GGUF", 4) != 0) {
        return fail(MLLAMA_ERR_FILE, "%s: not a GGUF file", file->path);
    }
    const uint32_t version = head[4] | (uint32_t) head[5] << 8 | (uint32_t) head[6] << 16 | (uint32_t) head[7] << 24;
    if (version != 0 && (version & 0xffff) == 0) {
        return fail(MLLAMA_ERR_FILE, "%s: a big-endian GGUF file; convert it with gguf-py's gguf_convert_endian.py",
                    file->path);
    }
    if (version == 1) {
        return fail(MLLAMA_ERR_FILE, "%s: GGUF version 1, of 2023, is not supported; convert the model again",
                    file->path);
    }

    log_forget();
    TRY(guard_gguf_open(file->path, &file->gguf));
    if (!file->gguf) {
        const char * words = log_last_error();
        const char * colon = strstr(words, ": "); // skip the name of ggml's function
        return fail(MLLAMA_ERR_FILE, "%s: not a readable GGUF file: %s", file->path,
                    colon ? colon + 2 : "damaged or truncated");
    }
    file->data_offset = gguf_get_data_offset(file->gguf);
    return read_tensors(file);
}

static mllama_status open_one(const char * path, gguf_file ** out) {
    gguf_file * file = calloc(1, sizeof(*file));
    if (!file || !(file->path = strdup(path))) {
        free(file);
        return fail(MLLAMA_ERR_MEMORY, "%s: out of memory", path);
    }
    file->fd = -1;
    const mllama_status status = open_checked(file);
    if (status != MLLAMA_OK) {
        gguf_file_close(file);
        return status;
    }
    *out = file;
    return MLLAMA_OK;
}

// ---- split models -------------------------------------------------------------------------------------------------

enum { MAX_PARTS = 1000 }; // open files that a process may have

static mllama_status check_part(gguf_file * first, gguf_file * part, int32_t no, int32_t count) {
    int32_t its_no, its_count;
    TRY(gguf_file_int(part, "split.no", 0, UINT16_MAX, &its_no));
    TRY(gguf_file_int(part, "split.count", 0, UINT16_MAX, &its_count));
    if (its_no != no || its_count != count) {
        return fail(MLLAMA_ERR_FILE, "%s: this is part %d of %d, not part %d of %d as its name says; download it again",
                    part->path, its_no + 1, its_count, no + 1, count);
    }
    for (int64_t i = 0; i < gguf_get_n_tensors(part->gguf); i++) {
        const char * name = gguf_get_tensor_name(part->gguf, i);
        gguf_file *  other;
        if (gguf_file_tensor(first, name, &other)) {
            return fail(MLLAMA_ERR_FILE, "%s: tensor '%s' is in %s too; they are not parts of one model", part->path,
                        name, other->path);
        }
    }
    return MLLAMA_OK;
}

static mllama_status open_more(gguf_file * first) {
    int32_t no, count;
    TRY(gguf_file_int_or(first, "split.count", 0, MAX_PARTS, 1, &count));
    if (count < 2) {
        return MLLAMA_OK;
    }
    TRY(gguf_file_int(first, "split.no", 0, count - 1, &no));
    if (no != 0) {
        return fail(MLLAMA_ERR_FILE, "%s: part %d of a model in %d files; give the first, NAME-00001-of-%05d.gguf",
                    first->path, no + 1, count, count);
    }
    char         suffix[40];
    const size_t n_suffix = (size_t) snprintf(suffix, sizeof(suffix), "-00001-of-%05d.gguf", count);
    const size_t n_path   = strlen(first->path);
    if (n_path < n_suffix || strcmp(first->path + n_path - n_suffix, suffix) != 0) {
        return fail(MLLAMA_ERR_FILE,
                    "%s: part 1 of a model in %d files; its name must end in %s for the others to be found",
                    first->path, count, suffix);
    }
    char * path = strdup(first->path);
    first->more = calloc((size_t) count - 1, sizeof(*first->more));
    mllama_status status = path && first->more ? MLLAMA_OK : fail(MLLAMA_ERR_MEMORY, "%s: out of memory", first->path);
    int64_t n_tensors = gguf_get_n_tensors(first->gguf);
    for (no = 1; no < count && status == MLLAMA_OK; no++) {
        gguf_file * part = NULL;
        snprintf(suffix, sizeof(suffix), "-%05d-of-%05d.gguf", no + 1, count);
        memcpy(path + n_path - n_suffix, suffix, n_suffix); // five digits are enough for MAX_PARTS
        status = access(path, F_OK) == 0
                     ? open_one(path, &part)
                     : fail(MLLAMA_ERR_FILE, "%s: part %d of %d of the model is missing", path, no + 1, count);
        if (status == MLLAMA_OK) {
            status = check_part(first, part, no, count);
            first->more[first->n_more++] = part;
            n_tensors += gguf_get_n_tensors(part->gguf);
        }
    }
    free(path);
    TRY(status);
    int32_t promised;
    TRY(gguf_file_int_or(first, "split.tensors.count", 0, INT32_MAX, (int32_t) n_tensors, &promised));
    if (promised != n_tensors) {
        return fail(MLLAMA_ERR_FILE,
                    "%s: its %d files hold %lld tensors, but split.tensors.count is %d; they are not of one model",
                    first->path, count, (long long) n_tensors, promised);
    }
    return MLLAMA_OK;
}

mllama_status gguf_file_open(const char * path, gguf_file ** out) {
    log_install();
    gguf_file * file;
    TRY(open_one(path, &file));
    const mllama_status status = open_more(file);
    if (status != MLLAMA_OK) {
        gguf_file_close(file);
        return status;
    }
    *out = file;
    return MLLAMA_OK;
}

const struct ggml_tensor * gguf_file_tensor(gguf_file * file, const char * name, gguf_file ** part) {
    for (int32_t i = 0; i < gguf_file_n_parts(file); i++) {
        gguf_file *                one    = gguf_file_part(file, i);
        const struct ggml_tensor * tensor = ggml_get_tensor(one->meta, name);
        if (tensor) {
            if (part) {
                *part = one;
            }
            return tensor;
        }
    }
    return NULL;
}

bool gguf_file_has_vision(gguf_file * file) {
    return gguf_file_tensor(file, "v.patch_embd.weight", NULL) != NULL;
}

void gguf_file_close(gguf_file * file) {
    if (!file) {
        return;
    }
    for (int32_t i = 0; i < file->n_more; i++) {
        gguf_file_close(file->more[i]);
    }
    free(file->more);
    if (file->map) {
        munmap(file->map, file->size);
    }
    if (file->fd >= 0) {
        close(file->fd);
    }
    gguf_free(file->gguf);
    ggml_free(file->meta);
    free(file->path);
    free(file);
}

mllama_status gguf_file_map(gguf_file * file) {
    void * map = mmap(NULL, file->size, PROT_READ, MAP_SHARED, file->fd, 0);
    if (map == MAP_FAILED) {
        return fail(MLLAMA_ERR_FILE, "%s: cannot be mapped into memory: %s; try use_mmap=False", file->path,
                    strerror(errno));
    }
    file->map = map;
    return MLLAMA_OK;
}

uint64_t gguf_file_position(const gguf_file * file, const struct ggml_tensor * tensor) {
    const int64_t index = gguf_find_tensor(file->gguf, tensor->name);
    return file->data_offset + gguf_get_tensor_offset(file->gguf, index);
}

mllama_status gguf_file_read(const gguf_file * file, const struct ggml_tensor * tensor, uint64_t offset, void * dst,
                             size_t n) {
    const uint64_t position = gguf_file_position(file, tensor) + offset;
    size_t         done     = 0;
    while (done < n) {
        const ssize_t got = pread(file->fd, (char *) dst + done, n - done, (off_t) (position + done));
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            return fail(MLLAMA_ERR_FILE, "%s: cannot read tensor '%s': %s", file->path, tensor->name,
                        got < 0 ? strerror(errno) : "the file has become shorter");
        }
        done += (size_t) got;
    }
    return MLLAMA_OK;
}

// ---- keys ---------------------------------------------------------------------------------------------------------

bool gguf_file_has(const gguf_file * file, const char * key) {
    return gguf_find_key(file->gguf, key) >= 0;
}

static bool int_of(const void * data, enum gguf_type type, size_t i, int64_t * value) {
    switch (type) {
        case GGUF_TYPE_UINT8:  *value = ((const uint8_t *) data)[i]; return true;
        case GGUF_TYPE_INT8:   *value = ((const int8_t *) data)[i]; return true;
        case GGUF_TYPE_UINT16: *value = ((const uint16_t *) data)[i]; return true;
        case GGUF_TYPE_INT16:  *value = ((const int16_t *) data)[i]; return true;
        case GGUF_TYPE_UINT32: *value = ((const uint32_t *) data)[i]; return true;
        case GGUF_TYPE_INT32:  *value = ((const int32_t *) data)[i]; return true;
        case GGUF_TYPE_INT64:  *value = ((const int64_t *) data)[i]; return true;
        case GGUF_TYPE_UINT64: {
            const uint64_t u = ((const uint64_t *) data)[i];
            *value = u > INT64_MAX ? INT64_MAX : (int64_t) u;
            return true;
        }
        default: return false;
    }
}

static mllama_status missing(const gguf_file * file, const char * key) {
    return fail(MLLAMA_ERR_FILE, "%s: key '%s' is missing", file->path, key);
}

static mllama_status wrong_type(const gguf_file * file, const char * key, int64_t id, const char * expected) {
    return fail(MLLAMA_ERR_FILE, "%s: key '%s' has type %s, expected %s", file->path, key,
                gguf_type_name(gguf_get_kv_type(file->gguf, id)), expected);
}

mllama_status gguf_file_int(const gguf_file * file, const char * key, int64_t min, int64_t max, int32_t * value) {
    const int64_t id = gguf_find_key(file->gguf, key);
    if (id < 0) {
        return missing(file, key);
    }
    const enum gguf_type type = gguf_get_kv_type(file->gguf, id);
    int64_t              wide = 0;
    if (type == GGUF_TYPE_ARRAY || type == GGUF_TYPE_STRING ||
        !int_of(gguf_get_val_data(file->gguf, id), type, 0, &wide)) {
        return wrong_type(file, key, id, "an integer");
    }
    if (wide < min || wide > max) {
        return fail(MLLAMA_ERR_FILE, "%s: key '%s' is %lld, expected %lld to %lld", file->path, key, (long long) wide,
                    (long long) min, (long long) max);
    }
    *value = (int32_t) wide;
    return MLLAMA_OK;
}

mllama_status gguf_file_int_or(const gguf_file * file, const char * key, int64_t min, int64_t max, int32_t otherwise,
                               int32_t * value) {
    if (!gguf_file_has(file, key)) {
        *value = otherwise;
        return MLLAMA_OK;
    }
    return gguf_file_int(file, key, min, max, value);
}

mllama_status gguf_file_float_or(const gguf_file * file, const char * key, float min, float max, float otherwise,
                                 float * value) {
    const int64_t id = gguf_find_key(file->gguf, key);
    if (id < 0) {
        *value = otherwise;
        return MLLAMA_OK;
    }
    switch (gguf_get_kv_type(file->gguf, id)) {
        case GGUF_TYPE_FLOAT32: *value = gguf_get_val_f32(file->gguf, id); break;
        case GGUF_TYPE_FLOAT64: *value = (float) gguf_get_val_f64(file->gguf, id); break;
        default: return wrong_type(file, key, id, "a float");
    }
    if (!(*value >= min && *value <= max)) {
        return fail(MLLAMA_ERR_FILE, "%s: key '%s' is %g, expected %g to %g", file->path, key, (double) *value,
                    (double) min, (double) max);
    }
    return MLLAMA_OK;
}

mllama_status gguf_file_string(const gguf_file * file, const char * key, const char ** value) {
    const int64_t id = gguf_find_key(file->gguf, key);
    if (id < 0) {
        return missing(file, key);
    }
    if (gguf_get_kv_type(file->gguf, id) != GGUF_TYPE_STRING) {
        return wrong_type(file, key, id, "a string");
    }
    *value = gguf_get_val_str(file->gguf, id);
    return MLLAMA_OK;
}

mllama_status gguf_file_ints(const gguf_file * file, const char * key, int32_t ** values, int32_t * n) {
    *values = NULL;
    *n      = 0;
    const int64_t id = gguf_find_key(file->gguf, key);
    if (id < 0) {
        return MLLAMA_OK;
    }
    if (gguf_get_kv_type(file->gguf, id) != GGUF_TYPE_ARRAY) {
        return wrong_type(file, key, id, "an array of integers");
    }
    const enum gguf_type type  = gguf_get_arr_type(file->gguf, id);
    const size_t         count = gguf_get_arr_n(file->gguf, id);
    if (type == GGUF_TYPE_STRING || count > 4096) {
        return fail(MLLAMA_ERR_FILE, "%s: key '%s' must be a short array of integers", file->path, key);
    }
    if (count == 0) {
        return MLLAMA_OK;
    }
    const void * data   = gguf_get_arr_data(file->gguf, id);
    int32_t *    result = malloc(count * sizeof(*result));
    if (!result) {
        return fail(MLLAMA_ERR_MEMORY, "%s: out of memory", file->path);
    }
    for (size_t i = 0; i < count; i++) {
        int64_t wide = 0;
        if (!int_of(data, type, i, &wide) || wide < INT32_MIN || wide > INT32_MAX) {
            free(result);
            return fail(MLLAMA_ERR_FILE, "%s: key '%s' must be an array of integers", file->path, key);
        }
        result[i] = (int32_t) wide;
    }
    *values = result;
    *n      = (int32_t) count;
    return MLLAMA_OK;
}
