#include "model/weights.h"

#include "finite.h"
#include "guard.h"
#include "memory.h"
#include "model/repack.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

// ---- what must be there -------------------------------------------------------------------------------------------

static bool is_float(enum ggml_type type) {
    return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
}

static bool is_multipliable(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q4_0: case GGML_TYPE_Q4_1: case GGML_TYPE_Q5_0: case GGML_TYPE_Q5_1: case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q2_K: case GGML_TYPE_Q3_K: case GGML_TYPE_Q4_K: case GGML_TYPE_Q5_K: case GGML_TYPE_Q6_K:
        case GGML_TYPE_IQ1_S: case GGML_TYPE_IQ1_M: case GGML_TYPE_IQ2_XXS: case GGML_TYPE_IQ2_XS: case GGML_TYPE_IQ2_S:
        case GGML_TYPE_IQ3_XXS: case GGML_TYPE_IQ3_S: case GGML_TYPE_IQ4_NL: case GGML_TYPE_IQ4_XS:
        case GGML_TYPE_TQ1_0: case GGML_TYPE_TQ2_0: case GGML_TYPE_MXFP4:
            return true;
        default:
            return is_float(type);
    }
}

typedef struct finder {
    mllama_model * model;
    gguf_file *    file;
    model_part     part;
    bool           allow_quantized_vision;
    mllama_status  status; // the first failure
} finder;

static void add_weight(finder * f, weight w) {
    weight_list * list = f->model->weights;
    if (list->n == list->capacity) {
        const int32_t capacity = list->capacity ? 2 * list->capacity : 256;
        weight *      items    = realloc(list->items, (size_t) capacity * sizeof(*items));
        if (!items) {
            f->status = fail(MLLAMA_ERR_MEMORY, "%s: out of memory", f->file->path);
            return;
        }
        list->items    = items;
        list->capacity = capacity;
    }
    list->items[list->n++] = w;
}

static void format_shape(const int64_t * ne, char * text, size_t size) {
    int n_dims = 4;
    while (n_dims > 1 && ne[n_dims - 1] == 1) {
        n_dims--;
    }
    size_t used = 0;
    for (int i = 0; i < n_dims && used < size; i++) {
        used += (size_t) snprintf(text + used, size - used, "%s%lld", i ? ", " : "[", (long long) ne[i]);
    }
    if (used < size) {
        snprintf(text + used, size - used, "]");
    }
}

static bool check_shape(finder * f, const gguf_file * file, const struct ggml_tensor * t, const int64_t * ne) {
    for (int i = 0; i < 4; i++) {
        if (t->ne[i] != ne[i]) {
            char is[128], must[128];
            format_shape(t->ne, is, sizeof(is));
            format_shape(ne, must, sizeof(must));
            f->status = fail(MLLAMA_ERR_FILE, "%s: tensor '%s' is %s, expected %s from the keys", file->path, t->name, is, must);
            return false;
        }
    }
    return true;
}

static bool check_type(finder * f, const gguf_file * file, const struct ggml_tensor * t, weight_kind kind) {
    const bool ok = kind == WEIGHT_MATRIX ? is_multipliable(t->type) : is_float(t->type);
    if (!ok) {
        f->status = fail(MLLAMA_ERR_FILE, "%s: tensor '%s' has type %s, which is not supported there", file->path, t->name,
                         ggml_type_name(t->type));
        return false;
    }
    if (f->part == PART_VISION && kind == WEIGHT_MATRIX && !is_float(t->type) && !f->allow_quantized_vision) {
        f->status = fail(MLLAMA_ERR_FILE,
                         "%s: tensor '%s' of the vision encoder is quantized (%s), which gives wrong captions; "
                         "use an F16, BF16 or F32 projector, or allow_quantized_vision=True",
                         file->path, t->name, ggml_type_name(t->type));
        return false;
    }
    return true;
}

// The one place where a tensor of the model is asked for. `gate` takes the number of a WEIGHT_GATE.
static void want(finder * f, weight_kind kind, ggml_backend_dev_t device, struct ggml_tensor ** tensor, float * gate,
                 const int64_t ne[4], const char * name) {
    if (f->status != MLLAMA_OK) {
        return;
    }
    gguf_file *                file;
    const struct ggml_tensor * t = gguf_file_tensor(f->file, name, &file);
    if (!t) {
        f->status = fail(MLLAMA_ERR_FILE, "%s: tensor '%s' is missing", f->file->path, name);
        return;
    }
    if (!check_shape(f, file, t, ne) || !check_type(f, file, t, kind)) {
        return;
    }
    if (kind == WEIGHT_GATE) {
        unsigned char raw[4];
        f->status = gguf_file_read(file, t, 0, raw, ggml_type_size(t->type));
        if (f->status != MLLAMA_OK) {
            return;
        }
        if (t->type == GGML_TYPE_F32) {
            memcpy(gate, raw, sizeof(*gate));
        } else if (t->type == GGML_TYPE_F16) {
            ggml_fp16_t half;
            memcpy(&half, raw, sizeof(half));
            *gate = ggml_fp16_to_fp32(half);
        } else {
            ggml_bf16_t half;
            memcpy(&half, raw, sizeof(half));
            *gate = ggml_bf16_to_fp32(half);
        }
        if (!isfinite(*gate)) {
            f->status = fail(MLLAMA_ERR_FILE, "%s: gate '%s' is not a finite number", file->path, name);
            return;
        }
    }
    add_weight(f, (weight) { .file = file, .source = t, .tensor = tensor, .device = device, .kind = kind, .part = f->part });
}

static void matrix(finder * f, ggml_backend_dev_t device, struct ggml_tensor ** tensor, int64_t n_in, int64_t n_out,
                   const char * format, ...) __attribute__((format(printf, 6, 7)));
static void matrix(finder * f, ggml_backend_dev_t device, struct ggml_tensor ** tensor, int64_t n_in, int64_t n_out,
                   const char * format, ...) {
    char    name[GGML_MAX_NAME];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof(name), format, args);
    va_end(args);
    want(f, WEIGHT_MATRIX, device, tensor, NULL, (int64_t[]) { n_in, n_out, 1, 1 }, name);
}

static void vector(finder * f, ggml_backend_dev_t device, struct ggml_tensor ** tensor, int64_t n, const char * format, ...)
    __attribute__((format(printf, 5, 6)));
static void vector(finder * f, ggml_backend_dev_t device, struct ggml_tensor ** tensor, int64_t n, const char * format, ...) {
    char    name[GGML_MAX_NAME];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof(name), format, args);
    va_end(args);
    want(f, WEIGHT_VECTOR, device, tensor, NULL, (int64_t[]) { n, 1, 1, 1 }, name);
}

static void gate(finder * f, float * value, const char * format, ...) __attribute__((format(printf, 3, 4)));
static void gate(finder * f, float * value, const char * format, ...) {
    char    name[GGML_MAX_NAME];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof(name), format, args);
    va_end(args);
    want(f, WEIGHT_GATE, NULL, NULL, value, (int64_t[]) { 1, 1, 1, 1 }, name);
}

// A file with more layers than its keys say is not read by half.
static void no_layer(finder * f, const char * prefix, int32_t il, const char * norm) {
    char name[GGML_MAX_NAME];
    snprintf(name, sizeof(name), "%s.%d.%s.weight", prefix, il, norm);
    if (f->status == MLLAMA_OK && gguf_file_tensor(f->file, name, NULL)) {
        f->status = fail(MLLAMA_ERR_FILE, "%s: tensor '%s' is beyond the %d layers that the keys name", f->file->path, name, il);
    }
}

// The norm of the heads of cross-attention q or k, in the order that the rows of q and k have in the file.
static void cross_norm(finder * f, ggml_backend_dev_t device, struct ggml_tensor ** tensor, const char * format, int32_t il) {
    const int32_t n = f->model->hp.pub.head_dim;
    vector(f, device, tensor, n, format, il);
    if (f->status == MLLAMA_OK && f->model->layout.permute_cross_norms) {
        weight_list * list = f->model->weights;
        list->items[list->n - 1].permuted = true;
        if (n % 2 != 0) {
            f->status = fail(MLLAMA_ERR_FILE, "%s: attention heads of %d values, which cannot be in pairs", f->file->path, n);
        }
    }
}

static void find_text_layer(finder * f, int32_t il) {
    const mllama_hparams * p   = &f->model->hp.pub;
    text_layer *           l   = &f->model->layers[il];
    const int64_t          n_q = (int64_t) p->head_dim * p->n_head, n_kv = (int64_t) p->head_dim * p->n_head_kv;
    ggml_backend_dev_t     dev = f->model->plan.layers[il];

    l->is_cross = hparams_is_cross(&f->model->hp, il);
    f->part     = l->is_cross ? PART_CROSS : PART_TEXT;
    vector(f, dev, &l->attn_norm, p->n_embd, "blk.%d.attn_norm.weight", il);
    if (l->is_cross) {
        matrix(f, dev, &l->q, p->n_embd, n_q, "blk.%d.cross_attn_q_proj.weight", il);
        matrix(f, dev, &l->k, p->n_embd, n_kv, "blk.%d.cross_attn_k_proj.weight", il);
        matrix(f, dev, &l->v, p->n_embd, n_kv, "blk.%d.cross_attn_v_proj.weight", il);
        matrix(f, dev, &l->o, n_q, p->n_embd, "blk.%d.cross_attn_o_proj.weight", il);
        cross_norm(f, dev, &l->q_norm, "blk.%d.cross_attn_q_norm.weight", il);
        cross_norm(f, dev, &l->k_norm, "blk.%d.cross_attn_k_norm.weight", il);
        gate(f, &l->attn_gate, "blk.%d.cross_attn_attn_gate", il);
        gate(f, &l->mlp_gate, "blk.%d.cross_attn_mlp_gate", il);
        l->attn_gate = tanhf(l->attn_gate); // raw in the file
        l->mlp_gate  = tanhf(l->mlp_gate);
    } else {
        matrix(f, dev, &l->q, p->n_embd, n_q, "blk.%d.attn_q.weight", il);
        matrix(f, dev, &l->k, p->n_embd, n_kv, "blk.%d.attn_k.weight", il);
        matrix(f, dev, &l->v, p->n_embd, n_kv, "blk.%d.attn_v.weight", il);
        matrix(f, dev, &l->o, n_q, p->n_embd, "blk.%d.attn_output.weight", il);
        // An offloaded layer has its own copy: with a weight of another device ggml cuts the graph in two.
        if (dev != f->model->plan.cpu && gguf_file_tensor(f->file, "rope_freqs.weight", NULL)) {
            vector(f, dev, &l->rope_freqs, p->rope_dim / 2, "rope_freqs.weight");
        }
    }
    vector(f, dev, &l->ffn_norm, p->n_embd, "blk.%d.ffn_norm.weight", il);
    matrix(f, dev, &l->ffn_gate, p->n_embd, p->n_ff, "blk.%d.ffn_gate.weight", il);
    matrix(f, dev, &l->ffn_up, p->n_embd, p->n_ff, "blk.%d.ffn_up.weight", il);
    matrix(f, dev, &l->ffn_down, p->n_ff, p->n_embd, "blk.%d.ffn_down.weight", il);
}

static void find_text(finder * f) {
    mllama_model *         m   = f->model;
    const mllama_hparams * p   = &m->hp.pub;
    ggml_backend_dev_t     cpu = m->plan.cpu, last = m->plan.layers[p->n_layer];

    // The table has a row for the image token and padding beyond the vocabulary; how many, the file says.
    const struct ggml_tensor * embd = gguf_file_tensor(f->file, "token_embd.weight", NULL);
    const int64_t              rows = embd ? embd->ne[1] : p->vocab_size;
    matrix(f, cpu, &m->token_embd, p->n_embd, rows, "token_embd.weight");
    if (f->status == MLLAMA_OK && (rows < p->vocab_size || rows > INT32_MAX || p->image_token_id >= rows)) {
        f->status = fail(MLLAMA_ERR_FILE, "%s: tensor 'token_embd.weight' has %lld rows, too few for %d tokens and image token %d",
                         f->file->path, (long long) rows, p->vocab_size, p->image_token_id);
    }
    m->hp.pub.n_token_embd = (int32_t) rows;
    if (gguf_file_tensor(f->file, "rope_freqs.weight", NULL)) {
        vector(f, cpu, &m->rope_freqs, p->rope_dim / 2, "rope_freqs.weight");
    }
    for (int32_t il = 0; il < p->n_layer; il++) {
        find_text_layer(f, il);
    }
    f->part = PART_TEXT;
    no_layer(f, "blk", p->n_layer, "attn_norm");
    vector(f, last, &m->output_norm, p->n_embd, "output_norm.weight");
    matrix(f, last, &m->output, p->n_embd, p->vocab_size, "output.weight");
}

static void find_vision_layer(finder * f, vision_layer * l, const char * prefix, int32_t il, bool is_global) {
    const mllama_hparams * p   = &f->model->hp.pub;
    const int64_t          n   = p->vision_embd;
    ggml_backend_dev_t     dev = f->model->plan.vision;
    const layout *         lay = &f->model->layout;
    const char *           attn_norm = layout_vision_name(lay, VISION_ATTN_NORM);
    const char *           attn_out  = layout_vision_name(lay, VISION_ATTN_OUT);
    const char *           ffn_norm  = layout_vision_name(lay, VISION_FFN_NORM);
    const char *           fc1       = layout_vision_name(lay, VISION_FC1);
    const char *           fc2       = layout_vision_name(lay, VISION_FC2);

    vector(f, dev, &l->attn_norm, n, "%s.%d.%s.weight", prefix, il, attn_norm);
    vector(f, dev, &l->attn_norm_b, n, "%s.%d.%s.bias", prefix, il, attn_norm);
    matrix(f, dev, &l->q, n, n, "%s.%d.attn_q.weight", prefix, il);
    matrix(f, dev, &l->k, n, n, "%s.%d.attn_k.weight", prefix, il);
    matrix(f, dev, &l->v, n, n, "%s.%d.attn_v.weight", prefix, il);
    matrix(f, dev, &l->o, n, n, "%s.%d.%s.weight", prefix, il, attn_out);
    vector(f, dev, &l->ffn_norm, n, "%s.%d.%s.weight", prefix, il, ffn_norm);
    vector(f, dev, &l->ffn_norm_b, n, "%s.%d.%s.bias", prefix, il, ffn_norm);
    matrix(f, dev, &l->fc1, n, p->vision_ff, "%s.%d.%s.weight", prefix, il, fc1);
    vector(f, dev, &l->fc1_b, p->vision_ff, "%s.%d.%s.bias", prefix, il, fc1);
    matrix(f, dev, &l->fc2, p->vision_ff, n, "%s.%d.%s.weight", prefix, il, fc2);
    vector(f, dev, &l->fc2_b, n, "%s.%d.%s.bias", prefix, il, fc2);
    l->attn_gate = l->ffn_gate = 1.0f;
    if (is_global) {
        gate(f, &l->attn_gate, "%s.%d.attn_gate", prefix, il);
        gate(f, &l->ffn_gate, "%s.%d.ffn_gate", prefix, il);
    }
}

static void find_vision(finder * f) {
    vision_weights *       v     = &f->model->vision;
    const mllama_hparams * p     = &f->model->hp.pub;
    const int64_t          n     = p->vision_embd, tiles = p->max_tiles, ids = p->n_aspect_ratios + 1;
    ggml_backend_dev_t     dev   = f->model->plan.vision;

    vector(f, dev, &v->class_embd, n, "v.class_embd");
    want(f, WEIGHT_MATRIX, dev, &v->patch_embd, NULL, (int64_t[]) { p->patch_size, p->patch_size, 3, n }, "v.patch_embd.weight");
    want(f, WEIGHT_VECTOR, dev, &v->position_embd, NULL, (int64_t[]) { n, p->n_positions, 1, 1 }, "v.position_embd.weight");
    want(f, WEIGHT_TABLE, dev, &v->tile_position_embd, NULL, (int64_t[]) { n * p->n_positions * tiles, ids, 1, 1 },
         "v.tile_position_embd.weight");
    want(f, WEIGHT_TABLE, dev, &v->pre_tile_embd, NULL, (int64_t[]) { n * tiles, ids, 1, 1 }, "v.pre_tile_position_embd.weight");
    want(f, WEIGHT_TABLE, dev, &v->post_tile_embd, NULL, (int64_t[]) { n * tiles, ids, 1, 1 }, "v.post_tile_position_embd.weight");
    gate(f, &v->position_gate, "v.position_embd.gate");
    gate(f, &v->tile_position_gate, "v.tile_position_embd.gate");
    gate(f, &v->pre_tile_gate, "v.pre_tile_position_embd.gate");
    gate(f, &v->post_tile_gate, "v.post_tile_position_embd.gate");
    vector(f, dev, &v->pre_ln, n, "v.pre_ln.weight");
    vector(f, dev, &v->pre_ln_b, n, "v.pre_ln.bias");
    vector(f, dev, &v->post_ln, n, "v.post_ln.weight");
    vector(f, dev, &v->post_ln_b, n, "v.post_ln.bias");
    for (int32_t il = 0; il < p->n_vision_layer; il++) {
        find_vision_layer(f, &v->local[il], "v.blk", il, false);
    }
    for (int32_t il = 0; il < p->n_vision_global_layer; il++) {
        find_vision_layer(f, &v->global[il], "v.global.blk", il, true);
    }
    const char * norm = layout_vision_name(&f->model->layout, VISION_ATTN_NORM);
    no_layer(f, "v.blk", p->n_vision_layer, norm);
    no_layer(f, "v.global.blk", p->n_vision_global_layer, norm);
    matrix(f, dev, &v->projector, n * (1 + p->n_intermediate), p->n_embd, "mm.0.weight");
    vector(f, dev, &v->projector_b, p->n_embd, "mm.0.bias");
}

mllama_status weights_find(mllama_model * model, bool allow_quantized_vision) {
    const mllama_hparams * p = &model->hp.pub;
    model->weights = calloc(1, sizeof(*model->weights));
    model->layers  = calloc((size_t) p->n_layer, sizeof(*model->layers));
    if (!model->weights || !model->layers) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    finder f = { .model = model, .file = model->text_file };
    find_text(&f);
    if (f.status == MLLAMA_OK && model->vision_file) {
        model->vision.local  = calloc((size_t) p->n_vision_layer, sizeof(vision_layer));
        model->vision.global = calloc((size_t) p->n_vision_global_layer + 1, sizeof(vision_layer));
        if (!model->vision.local || !model->vision.global) {
            return fail(MLLAMA_ERR_MEMORY, "out of memory");
        }
        f.file                   = model->vision_file;
        f.part                   = PART_VISION;
        f.allow_quantized_vision = allow_quantized_vision;
        find_vision(&f);
    }
    return f.status;
}

// ---- loading ------------------------------------------------------------------------------------------------------

enum { MAX_STAGING = 16 << 20 }; // bytes on the way from the file to a device

static bool needs_conversion(const weight * w) {
    return w->kind == WEIGHT_VECTOR && w->source->type != GGML_TYPE_F32;
}

// As a Llama converter orders the rows of a head for interleaved RoPE: i and i + n/2 become 2i and 2i + 1.
static void permute(const float * halves, float * pairs, int64_t n) {
    for (int64_t i = 0; i < n / 2; i++) {
        pairs[2 * i]     = halves[i];
        pairs[2 * i + 1] = halves[i + n / 2];
    }
}

// Of text alone: what the encoder makes of a picture is kept for years, and must not depend on a setting.
static ggml_backend_buffer_type_t repacked_type(const mllama_model * model, const weight * w, const mllama_model_params * params) {
    if (!params->repack || w->device != model->plan.cpu || w->kind != WEIGHT_MATRIX || w->part == PART_VISION || w->tensor == &model->token_embd) {
        return NULL;
    }
    return repack_choose(model->plan.cpu, params->repack_layouts ? params->repack_layouts : "CPU_REPACK", w->source);
}

static bool can_map(const mllama_model * model, const weight * w, const mllama_model_params * params) {
    // ggml's kernels want 32-byte alignment, which a file may not give
    return params->use_mmap && w->device == model->plan.cpu && !needs_conversion(w) && !w->permuted && !w->repacked &&
           gguf_file_position(w->file, w->source) % 32 == 0;
}

typedef struct loader {
    mllama_model *              model;
    const mllama_model_params * params;
    int64_t                     done, total;
    size_t                      n_staging, n_floats;
    char *                      staging; // n_staging bytes
    float *                     floats;  // n_floats bytes, for conversions
} loader;

static mllama_status report(loader * ld, int64_t bytes) {
    if (ld->model->no_alloc) {
        return MLLAMA_OK;
    }
    ld->done += bytes;
    if (ld->params->progress) {
        ld->params->progress(MLLAMA_PHASE_LOAD, ld->done, ld->total, ld->params->user_data);
    }
    if (ld->params->abort && ld->params->abort(ld->params->user_data)) {
        return fail(MLLAMA_ERR_ABORTED, "loading was stopped");
    }
    return MLLAMA_OK;
}

// Products with quantized weights hide such values: in the factors of a norm before them, or in weights on a device. So
// they are remembered from here on. Not in tables: a row counts where it is looked up, and reaches the results. Mapped
// matrices are not read here: graph_watch_factor sees what is computed with them.
static void note_damage(mllama_model * model, const weight * w, const void * data, size_t n_bytes) {
    const bool is_table = w->kind == WEIGHT_TABLE || w->tensor == &model->token_embd;
    if (!is_table && !model->damage[w->part] && !finite_bytes(w->source->type, data, n_bytes)) {
        model->damage[w->part] = w->source->name;
    }
}

static mllama_status upload(loader * ld, const weight * w, struct ggml_tensor * tensor) {
    const size_t n_bytes = ggml_nbytes(w->source);
    const size_t item    = ggml_type_size(w->source->type);
    const size_t most    = w->repacked || ld->n_staging < MAX_STAGING ? ld->n_staging : MAX_STAGING;
    const size_t n_piece = most - most % item;
    for (size_t at = 0; at < n_bytes;) {
        const size_t n = n_bytes - at < n_piece ? n_bytes - at : n_piece;
        TRY(gguf_file_read(w->file, w->source, at, ld->staging, n));
        note_damage(ld->model, w, ld->staging, n);
        if (needs_conversion(w) || w->permuted) {
            const int64_t count = (int64_t) (n / item);
            if (w->source->type == GGML_TYPE_F32) {
                memcpy(ld->floats, ld->staging, n);
            } else {
                ggml_get_type_traits(w->source->type)->to_float(ld->staging, ld->floats, count);
            }
            if (w->permuted) { // the values of one head: the whole tensor
                permute(ld->floats, (float *) ld->staging, count);
                memcpy(ld->floats, ld->staging, (size_t) count * sizeof(float));
            }
            TRY(guard_set(tensor, ld->floats, at / item * sizeof(float), (size_t) count * sizeof(float)));
        } else {
            TRY(guard_set(tensor, ld->staging, at, n));
        }
        at += n;
        TRY(report(ld, (int64_t) n));
    }
    return MLLAMA_OK;
}

static mllama_status new_context(weight_list * list, ggml_backend_dev_t device, bool mapped, struct ggml_context ** ctx) {
    weight_buffer * buffers = realloc(list->buffers, ((size_t) list->n_buffers + 1) * sizeof(*buffers));
    if (!buffers) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    list->buffers = buffers;
    struct ggml_init_params params = { .mem_size = ggml_tensor_overhead() * (size_t) (list->n + 1), .no_alloc = true };
    *ctx = ggml_init(params);
    if (!*ctx) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    list->buffers[list->n_buffers++] = (weight_buffer) { .context = *ctx, .device = device, .mapped = mapped };
    return MLLAMA_OK;
}

static struct ggml_tensor * new_tensor(struct ggml_context * ctx, const weight * w) {
    const enum ggml_type type = w->kind == WEIGHT_VECTOR ? GGML_TYPE_F32 : w->source->type;
    struct ggml_tensor * t    = ggml_new_tensor(ctx, type, 4, w->source->ne);
    ggml_set_name(t, w->source->name);
    *w->tensor = t;
    return t;
}

// The tensors of a file that stay in its mapping.
static mllama_status load_mapped(loader * ld, gguf_file * file) {
    weight_list *         list     = ld->model->weights;
    const bool            no_alloc = ld->model->no_alloc;
    struct ggml_context * ctx      = NULL;
    for (int32_t i = 0; i < list->n; i++) {
        const weight * w = &list->items[i];
        if (!w->tensor || w->file != file || !can_map(ld->model, w, ld->params)) {
            continue;
        }
        if (!ctx) {
            if (!file->map && !no_alloc) {
                TRY(gguf_file_map(file));
            }
            TRY(new_context(list, w->device, true, &ctx));
            ggml_backend_buffer_t buffer = NULL;
            if (no_alloc) {
                TRY(guard_alloc_buffer(ggml_backend_cpu_buffer_type(), 0, &buffer));
            } else {
                TRY(guard_wrap_memory(file->map, file->size, &buffer));
            }
            if (!buffer) {
                return fail(MLLAMA_ERR_MEMORY, "%s: out of memory", file->path);
            }
            ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
            list->buffers[list->n_buffers - 1].buffer = buffer;
        }
        struct ggml_tensor * t = new_tensor(ctx, w);
        weight_buffer * place = &list->buffers[list->n_buffers - 1];
        place->size += ggml_nbytes(t);
        if (no_alloc) {
            t->buffer = place->buffer;
        } else {
            TRY(guard_place_tensor(place->buffer, t, (char *) file->map + gguf_file_position(file, w->source)));
        }
        if (w->kind == WEIGHT_VECTOR && !no_alloc && (w->part != PART_VISION || ld->params->allow_quantized_vision)) {
            note_damage(ld->model, w, t->data, ggml_nbytes(t));
        }
        TRY(report(ld, (int64_t) ggml_nbytes(t)));
    }
    return MLLAMA_OK;
}

static bool is_copied(const loader * ld, const weight * w, ggml_backend_dev_t device, ggml_backend_buffer_type_t repacked) {
    return w->tensor && w->device == device && w->repacked == repacked && !can_map(ld->model, w, ld->params);
}

// The tensors that are copied to a buffer of the device, or to one of these layouts of the CPU.
static mllama_status load_copied(loader * ld, ggml_backend_dev_t device, ggml_backend_buffer_type_t repacked) {
    weight_list *         list = ld->model->weights;
    struct ggml_context * ctx  = NULL;
    uint64_t              size = 0;
    for (int32_t i = 0; i < list->n; i++) {
        const weight * w = &list->items[i];
        if (!is_copied(ld, w, device, repacked)) {
            continue;
        }
        if (!ctx) {
            TRY(new_context(list, device, false, &ctx));
        }
        size += ggml_nbytes(new_tensor(ctx, w));
    }
    if (!ctx) {
        return MLLAMA_OK;
    }
    weight_buffer *            place = &list->buffers[list->n_buffers - 1];
    ggml_backend_buffer_type_t type  = repacked;
    if (!type) {
        TRY(guard_buffer_type(device, &type));
    }
    TRY(memory_alloc(ctx, type, ld->model->no_alloc, &place->buffer, &place->size));
    if (!place->buffer) {
        return fail(MLLAMA_ERR_MEMORY, "device %s has no room for %llu MiB of weights; %s", device_label(device),
                    (unsigned long long) (size >> 20), repacked ? "load them without repack" : "offload fewer layers");
    }
    ggml_backend_buffer_set_usage(place->buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    for (int32_t i = 0; i < list->n; i++) {
        const weight * w = &list->items[i];
        if (!ld->model->no_alloc && is_copied(ld, w, device, repacked)) {
            TRY(upload(ld, w, *w->tensor));
        }
    }
    return MLLAMA_OK;
}

static mllama_status load_all(loader * ld) {
    mllama_model * model = ld->model;
    for (int32_t i = 0; i < model->weights->n; i++) {
        if (model->weights->items[i].tensor) {
            ld->total += (int64_t) ggml_nbytes(model->weights->items[i].source);
        }
    }
    for (int32_t i = 0; i < gguf_file_n_parts(model->text_file); i++) {
        TRY(load_mapped(ld, gguf_file_part(model->text_file, i)));
    }
    if (model->vision_file && model->vision_file != model->text_file) {
        for (int32_t i = 0; i < gguf_file_n_parts(model->vision_file); i++) {
            TRY(load_mapped(ld, gguf_file_part(model->vision_file, i)));
        }
    }
    TRY(load_copied(ld, model->plan.cpu, NULL));
    for (ggml_backend_buffer_type_t * type = repack_layouts(model->plan.cpu); type && *type; type++) {
        TRY(load_copied(ld, model->plan.cpu, *type));
    }
    for (int32_t i = 0; i < model->plan.n_gpus; i++) {
        TRY(load_copied(ld, model->plan.gpus[i], NULL));
    }
    return MLLAMA_OK;
}

static size_t larger(size_t a, size_t b) {
    return a > b ? a : b;
}

mllama_status weights_load(mllama_model * model, const mllama_model_params * params) {
    loader ld = { .model = model, .params = params, .n_staging = 4, .n_floats = 4 };
    for (int32_t i = 0; i < model->weights->n; i++) {
        weight * w = &model->weights->items[i];
        if (!w->tensor) {
            continue;
        }
        w->repacked = repacked_type(model, w, params);
        if (can_map(model, w, params)) {
            continue;
        }
        const size_t n = w->permuted ? (size_t) ggml_nelements(w->source) * sizeof(float) : ggml_nbytes(w->source);
        const size_t n_piece = n > MAX_STAGING && !w->repacked ? MAX_STAGING : n; // ggml repacks whole tensors only
        ld.n_staging = larger(ld.n_staging, n_piece);
        if (needs_conversion(w) || w->permuted) {
            ld.n_floats = larger(ld.n_floats, n_piece / 2 * sizeof(float)); // 2-byte types are the smallest that are converted
        }
    }
    model->weights->staging = ld.n_staging + ld.n_floats;
    if (model->no_alloc) {
        return load_all(&ld);
    }
    ld.staging = malloc(ld.n_staging);
    ld.floats  = malloc(ld.n_floats);
    mllama_status status = ld.staging && ld.floats ? load_all(&ld) : fail(MLLAMA_ERR_MEMORY, "out of memory");
    free(ld.staging);
    free(ld.floats);
    return status;
}

void weights_free(weight_list * list) {
    if (!list) {
        return;
    }
    for (int32_t i = 0; i < list->n_buffers; i++) {
        guard_buffer_free(list->buffers[i].buffer);
        ggml_free(list->buffers[i].context);
    }
    free(list->buffers);
    free(list->items);
    free(list);
}

void weights_memory(const weight_list * list, ggml_backend_dev_t device, mllama_memory * memory) {
    for (int32_t i = 0; i < list->n_buffers; i++) {
        const weight_buffer * b = &list->buffers[i];
        if (b->device == device) {
            *(b->mapped ? &memory->mapped : &memory->weights) += b->size;
        }
    }
    memory->staging = device_is_cpu(device) ? list->staging : 0;
}

int32_t weights_count(const weight_list * list) {
    return list->n;
}

mllama_status weights_info(const weight_list * list, int32_t index, mllama_tensor_info * info) {
    if (index < 0 || index >= list->n) {
        return fail(MLLAMA_ERR_ARGUMENT, "no tensor %d; there are %d", index, list->n);
    }
    const weight * w = &list->items[index];
    info->name      = w->source->name;
    info->type      = ggml_type_name(w->source->type);
    memcpy(info->ne, w->source->ne, sizeof(info->ne));
    info->n_bytes   = ggml_nbytes(w->source);
    info->device    = w->device ? device_name(w->device) : "CPU";
    info->is_vision = w->part == PART_VISION;
    info->layout    = w->repacked ? guard_layout_name(w->repacked) : "";
    return MLLAMA_OK;
}
