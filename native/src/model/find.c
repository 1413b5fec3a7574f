// Which tensors a model must have. Their names stand beside their roles in model.h.
#include "model/weight_list.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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
            f->status = fail(MLLAMA_ERR_FILE, "%s: tensor '%s' is %s, expected %s from the keys", file->path, t->name,
                             is, must);
            return false;
        }
    }
    return true;
}

static bool check_type(finder * f, const gguf_file * file, const struct ggml_tensor * t, weight_kind kind) {
    const bool ok = kind == WEIGHT_MATRIX ? is_multipliable(t->type) : is_float(t->type);
    if (!ok) {
        f->status = fail(MLLAMA_ERR_FILE, "%s: tensor '%s' has type %s, which is not supported there", file->path,
                         t->name, ggml_type_name(t->type));
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
    add_weight(
        f, (weight){ .file = file, .source = t, .tensor = tensor, .device = device, .kind = kind, .part = f->part });
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

static void vector(finder * f, ggml_backend_dev_t device, struct ggml_tensor ** tensor, int64_t n, const char * format,
                   ...) __attribute__((format(printf, 5, 6)));
static void vector(finder * f, ggml_backend_dev_t device, struct ggml_tensor ** tensor, int64_t n, const char * format,
                   ...) {
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
        f->status = fail(MLLAMA_ERR_FILE, "%s: tensor '%s' is beyond the %d layers that the keys name", f->file->path,
                         name, il);
    }
}

// The norm of the heads of cross-attention q or k, in the order that the rows of q and k have in the file.
static void cross_norm(finder * f, ggml_backend_dev_t device, struct ggml_tensor ** tensor, const char * format,
                       int32_t il) {
    const int32_t n = f->model->hp.pub.head_dim;
    vector(f, device, tensor, n, format, il);
    if (f->status == MLLAMA_OK && f->model->layout.permute_cross_norms) {
        weight_list * list = f->model->weights;
        list->items[list->n - 1].permuted = true;
        if (n % 2 != 0) {
            f->status = fail(MLLAMA_ERR_FILE, "%s: attention heads of %d values, which cannot be in pairs",
                             f->file->path, n);
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
        f->status = fail(MLLAMA_ERR_FILE,
                         "%s: tensor 'token_embd.weight' has %lld rows, too few for %d tokens and image token %d",
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
    want(f, WEIGHT_MATRIX, dev, &v->patch_embd, NULL, (int64_t[]){ p->patch_size, p->patch_size, 3, n },
         "v.patch_embd.weight");
    want(f, WEIGHT_VECTOR, dev, &v->position_embd, NULL, (int64_t[]){ n, p->n_positions, 1, 1 },
         "v.position_embd.weight");
    want(f, WEIGHT_TABLE, dev, &v->tile_position_embd, NULL, (int64_t[]) { n * p->n_positions * tiles, ids, 1, 1 },
         "v.tile_position_embd.weight");
    want(f, WEIGHT_TABLE, dev, &v->pre_tile_embd, NULL, (int64_t[]){ n * tiles, ids, 1, 1 },
         "v.pre_tile_position_embd.weight");
    want(f, WEIGHT_TABLE, dev, &v->post_tile_embd, NULL, (int64_t[]){ n * tiles, ids, 1, 1 },
         "v.post_tile_position_embd.weight");
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
