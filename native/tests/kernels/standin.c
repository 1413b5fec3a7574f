#include "standin.h"

#include "devices.h"
#include "guard.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MAX_PLACES = 64, PATTERN = 0x5a };

// ---- memory -------------------------------------------------------------------------------------------------------

typedef struct memory {
    unsigned char * map, * data;
    size_t          map_size, size, shift, page;
} memory;

static memory places[MAX_PLACES];
static int    n_places;

static void stop(const char * words) {
    fprintf(stderr, "kernels_test: %s\n", words);
    exit(2);
}

void * place(size_t size, size_t shift) {
    const size_t page  = (size_t) sysconf(_SC_PAGESIZE);
    const size_t usual = (size + shift + page - 1) / page * page + page; // at least a page of pattern before it
    if (n_places == MAX_PLACES) {
        stop("too many places in one case");
    }
    void * map = mmap(NULL, usual + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED || mprotect((char *) map + usual, page, PROT_NONE) != 0) {
        stop("no memory");
    }
    memory * m = &places[n_places++];
    *m = (memory) { .map = map, .map_size = usual + page, .size = size, .shift = shift, .page = page };
    m->data = m->map + usual - size - shift;
    memset(m->map, PATTERN, usual);
    memset(m->data, UNWRITTEN, size);
    return m->data;
}

static bool is_pattern(const unsigned char * from, const unsigned char * end) {
    for (; from < end; from++) {
        if (*from != PATTERN) {
            return false;
        }
    }
    return true;
}

// ---- tensors ------------------------------------------------------------------------------------------------------

typedef struct node {
    struct ggml_tensor tensor; // first: a pointer to it is one to the node
    ggml_custom_op_t   fun;    // NULL: not a node
    void *             userdata;
    bool               computed;
} node;

static node   nodes[MAX_PLACES];
static int    n_nodes;
static size_t node_gap, node_shift;

bool places_end(void) {
    bool whole = true;
    for (int i = 0; i < n_places; i++) {
        memory *        m   = &places[i];
        unsigned char * end = m->data + m->size;
        whole &= is_pattern(m->map, m->data) && is_pattern(end, end + m->shift);
        munmap(m->map, m->map_size);
    }
    n_places = n_nodes = 0;
    node_layout(0, 0);
    return whole;
}

void node_layout(size_t gap, size_t shift) {
    node_gap   = gap;
    node_shift = shift;
}

static size_t row_size(enum ggml_type type, int64_t n) {
    const struct ggml_type_traits * traits = ggml_get_type_traits(type);
    return (size_t) (n / traits->blck_size) * traits->type_size;
}

static struct ggml_tensor * new_tensor(enum ggml_type type, int64_t n, int64_t n_rows, size_t gap) {
    if (n_nodes == MAX_PLACES) {
        stop("too many tensors in one case");
    }
    struct ggml_tensor * t = &nodes[n_nodes].tensor;
    nodes[n_nodes++] = (node) { .tensor = {
        .type = type, .buffer = (struct ggml_backend_buffer *) t, .ne = { n, n_rows, 1, 1 },
        .nb = { ggml_type_size(type), row_size(type, n) + gap },
    } };
    t->nb[2] = t->nb[3] = t->nb[1] * (size_t) n_rows;
    return t;
}

// Without the gap after the last row
static size_t tensor_size(const struct ggml_tensor * t) {
    return (size_t) (t->ne[1] - 1) * t->nb[1] + row_size(t->type, t->ne[0]);
}

struct ggml_tensor * tensor_new(enum ggml_type type, int64_t n, int64_t n_rows, size_t gap, size_t shift) {
    struct ggml_tensor * t = new_tensor(type, n, n_rows, gap);
    t->data = place(tensor_size(t), shift);
    return t;
}

void * tensor_row(const struct ggml_tensor * t, int64_t row) {
    return (char *) t->data + (size_t) row * t->nb[1];
}

bool tensor_gaps_whole(const struct ggml_tensor * t) {
    for (int64_t i = 0; i + 1 < t->ne[1]; i++) {
        const unsigned char * row = tensor_row(t, i);
        for (size_t j = row_size(t->type, t->ne[0]); j < t->nb[1]; j++) {
            if (row[j] != UNWRITTEN) {
                return false;
            }
        }
    }
    return true;
}

void run(struct ggml_tensor * t, int n_threads, bool last_thread_first) {
    node * n = (node *) t;
    if (!n->fun || n->computed) {
        return;
    }
    for (int i = 0; i < GGML_MAX_SRC && t->src[i]; i++) {
        run(t->src[i], n_threads, last_thread_first);
    }
    if (!t->data) {
        t->data = place(tensor_size(t), node_shift);
    }
    for (int i = 0; i < n_threads; i++) {
        n->fun(t, last_thread_first ? n_threads - 1 - i : i, n_threads, n->userdata);
    }
    n->computed = true;
}

// ---- ggml ---------------------------------------------------------------------------------------------------------

struct ggml_tensor * ggml_custom_4d(struct ggml_context * ctx, enum ggml_type type, int64_t ne0, int64_t ne1,
                                    int64_t ne2, int64_t ne3, struct ggml_tensor ** args, int n_args,
                                    ggml_custom_op_t fun, int n_tasks, void * userdata) {
    (void) ctx, (void) n_tasks;
    if (ne2 != 1 || ne3 != 1) {
        stop("a node of more than two dimensions");
    }
    struct ggml_tensor * t = new_tensor(type, ne0, ne1, node_gap);
    for (int i = 0; i < n_args; i++) {
        t->src[i] = args[i];
    }
    ((node *) t)->fun      = fun;
    ((node *) t)->userdata = userdata;
    return t;
}

struct ggml_tensor * ggml_custom_inplace(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor ** args,
                                         int n_args, ggml_custom_op_t fun, int n_tasks, void * userdata) {
    struct ggml_tensor * src[GGML_MAX_SRC] = { a };
    memcpy(src + 1, args, sizeof(*args) * (size_t) n_args);
    struct ggml_tensor * t = ggml_custom_4d(ctx, a->type, a->ne[0], a->ne[1], 1, 1, src, n_args + 1, fun, n_tasks,
                                            userdata);
    t->data  = a->data;
    t->nb[1] = a->nb[1];
    return t;
}

float to_float_f16(ggml_fp16_t x) {
    const int   exponent = x >> 10 & 0x1f, fraction = x & 0x3ff;
    const float size     = exponent == 0    ? ldexpf((float) fraction, -24)
                           : exponent == 31 ? (fraction ? NAN : INFINITY)
                                            : ldexpf((float) (fraction + 1024), exponent - 25);
    return x & 0x8000 ? -size : size;
}

ggml_fp16_t to_f16(float x) {
    int         exponent;
    const float size = fabsf(x);
    const int   sign = signbit(x) ? 0x8000 : 0;
    if (size >= 65520.0f || isnan(x)) {
        return (ggml_fp16_t) (sign | (isnan(x) ? 0x7e00 : 0x7c00));
    }
    frexpf(size, &exponent);
    const int   step     = size < 0x1p-14f ? -24 : exponent - 11;     // of the last bit
    const long  fraction = lrintf(ldexpf(size, -step));               // at most 2048, which is the next exponent
    return (ggml_fp16_t) (sign | (step == -24 ? fraction : ((step + 25) << 10) + fraction - 1024));
}

float ggml_fp16_to_fp32(ggml_fp16_t x) {
    return to_float_f16(x);
}

static void f16_row(const void * x, float * y, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        y[i] = to_float_f16(((const ggml_fp16_t *) x)[i]);
    }
}

static void bf16_row(const void * x, float * y, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = (uint32_t) ((const ggml_bf16_t *) x)[i].bits << 16;
        memcpy(y + i, &bits, sizeof(bits));
    }
}

// To the nearest, in the middle to the even one
void ggml_fp32_to_bf16_row(const float * x, ggml_bf16_t * y, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof(bits));
        y[i].bits = (uint16_t) ((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

const struct ggml_type_traits * ggml_get_type_traits(enum ggml_type type) {
    static const struct ggml_type_traits traits[GGML_TYPE_COUNT] = {
        [GGML_TYPE_F32]  = { .blck_size = 1, .type_size = sizeof(float) },
        [GGML_TYPE_F16]  = { .blck_size = 1, .type_size = sizeof(ggml_fp16_t), .to_float = f16_row },
        [GGML_TYPE_BF16] = { .blck_size = 1, .type_size = sizeof(ggml_bf16_t), .to_float = bf16_row },
        [GGML_TYPE_I8]   = { .blck_size = 1, .type_size = 1 },
        [GGML_TYPE_Q8_0] = { .blck_size = 32, .type_size = 34 },
        [GGML_TYPE_Q4_0] = { .blck_size = 32, .type_size = 18 },
        [GGML_TYPE_Q4_K] = { .blck_size = 256, .type_size = 144 },
        [GGML_TYPE_Q5_K] = { .blck_size = 256, .type_size = 176 },
        [GGML_TYPE_Q6_K] = { .blck_size = 256, .type_size = 210 },
    };
    if (traits[type].blck_size == 0) {
        stop("a type that is not in the table");
    }
    return &traits[type];
}

size_t ggml_type_size(enum ggml_type type) {
    return ggml_get_type_traits(type)->type_size;
}

ggml_backend_reg_t ggml_backend_dev_backend_reg(ggml_backend_dev_t device) {
    (void) device;
    return NULL;
}

// ---- the library's ------------------------------------------------------------------------------------------------

bool guard_is_host(ggml_backend_buffer_t buffer) {
    return buffer;
}

mllama_status guard_function(ggml_backend_dev_t device, const char * name, void ** function) {
    (void) device, (void) name;
    *function = NULL;
    return MLLAMA_OK;
}

mllama_status devices_init(void) {
    return MLLAMA_OK;
}

ggml_backend_dev_t devices_cpu(void) {
    return NULL;
}

static char last_error[1000];

mllama_status fail(mllama_status status, const char * format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(last_error, sizeof(last_error), format, args);
    va_end(args);
    return status;
}

const char * mllama_last_error(void) {
    return last_error;
}
