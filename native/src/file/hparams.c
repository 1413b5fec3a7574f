#include "file/hparams.h"

#include <stdlib.h>
#include <string.h>

// Bounds that no model of this architecture comes near; they keep every later product far from overflow.
enum {
    MAX_LAYERS  = 1024,
    MAX_HEADS   = 4096,
    MAX_WIDTH   = 1 << 18,
    MAX_FF      = 1 << 20,
    MAX_VOCAB   = 1 << 24,
    MAX_CONTEXT = 1 << 24,
    MAX_TILES   = 64,
    MAX_PIXELS  = 1 << 13,
};

static mllama_status check_architecture(const gguf_file * file) {
    const char * architecture;
    TRY(gguf_file_string(file, "general.architecture", &architecture));
    if (strcmp(architecture, "mllama") != 0) {
        return fail(MLLAMA_ERR_FILE, "%s: architecture is '%.64s', expected 'mllama' (Llama 3.2 Vision)", file->path,
                    architecture);
    }
    return MLLAMA_OK;
}

// A key of our converter's, else wherever the token list has it, else right after the vocabulary.
static mllama_status find_image_token(const gguf_file * file, mllama_hparams * p) {
    p->image_token_id = p->vocab_size;
    if (gguf_file_has(file, "mllama.image_token_id")) {
        return gguf_file_int(file, "mllama.image_token_id", 0, MAX_VOCAB, &p->image_token_id);
    }
    const int64_t id = gguf_find_key(file->gguf, "tokenizer.ggml.tokens");
    if (id < 0) {
        return MLLAMA_OK;
    }
    if (gguf_get_kv_type(file->gguf, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(file->gguf, id) != GGUF_TYPE_STRING) {
        return fail(MLLAMA_ERR_FILE, "%s: key 'tokenizer.ggml.tokens' must be an array of strings", file->path);
    }
    const size_t n = gguf_get_arr_n(file->gguf, id);
    for (size_t i = n; i-- > 0;) {
        if (strcmp(gguf_get_arr_str(file->gguf, id, i), "<|image|>") == 0) {
            p->image_token_id = (int32_t) i;
            break;
        }
    }
    return MLLAMA_OK;
}

mllama_status hparams_read_text(const gguf_file * file, hparams * hp) {
    mllama_hparams * p = &hp->pub;
    TRY(check_architecture(file));
    TRY(gguf_file_int(file, "mllama.block_count", 1, MAX_LAYERS, &p->n_layer));
    TRY(gguf_file_int(file, "mllama.context_length", 1, MAX_CONTEXT, &p->n_ctx_train));
    TRY(gguf_file_int(file, "mllama.embedding_length", 1, MAX_WIDTH, &p->n_embd));
    TRY(gguf_file_int(file, "mllama.feed_forward_length", 1, MAX_FF, &p->n_ff));
    TRY(gguf_file_int(file, "mllama.attention.head_count", 1, MAX_HEADS, &p->n_head));
    TRY(gguf_file_int_or(file, "mllama.attention.head_count_kv", 1, MAX_HEADS, p->n_head, &p->n_head_kv));
    TRY(gguf_file_int(file, "mllama.vocab_size", 1, MAX_VOCAB, &p->vocab_size));
    TRY(gguf_file_float_or(file, "mllama.attention.layer_norm_rms_epsilon", 0.0f, 1.0f, 1e-5f, &p->rms_eps));
    TRY(gguf_file_float_or(file, "mllama.rope.freq_base", 1.0f, 1e12f, 500000.0f, &p->rope_freq_base));

    if (p->n_head % p->n_head_kv != 0) {
        return fail(MLLAMA_ERR_FILE, "%s: %d attention heads cannot share %d key/value heads", file->path, p->n_head,
                    p->n_head_kv);
    }
    if (gguf_file_has(file, "mllama.attention.key_length")) {
        int32_t value_length;
        TRY(gguf_file_int(file, "mllama.attention.key_length", 2, MAX_WIDTH, &p->head_dim));
        TRY(gguf_file_int_or(file, "mllama.attention.value_length", 2, MAX_WIDTH, p->head_dim, &value_length));
        if (value_length != p->head_dim) {
            return fail(MLLAMA_ERR_FILE, "%s: keys of %d and values of %d are not supported", file->path, p->head_dim,
                        value_length);
        }
    } else if (p->n_embd % p->n_head == 0) {
        p->head_dim = p->n_embd / p->n_head;
    } else {
        return fail(MLLAMA_ERR_FILE, "%s: embedding_length %d is not a multiple of head_count %d", file->path,
                    p->n_embd, p->n_head);
    }
    TRY(gguf_file_int_or(file, "mllama.rope.dimension_count", 2, p->head_dim, p->head_dim, &p->rope_dim));
    if (p->rope_dim % 2 != 0 || (int64_t) p->head_dim * p->n_head > MAX_FF) {
        return fail(MLLAMA_ERR_FILE, "%s: %d heads of %d values, %d of them rotated, are not supported", file->path,
                    p->n_head, p->head_dim, p->rope_dim);
    }

    TRY(gguf_file_ints(file, "mllama.attention.cross_attention_layers", &hp->cross_layers, &p->n_cross_layers));
    for (int32_t i = 0; i < p->n_cross_layers; i++) {
        const int32_t layer = hp->cross_layers[i];
        if (layer < 0 || layer >= p->n_layer || (i > 0 && layer <= hp->cross_layers[i - 1])) {
            return fail(MLLAMA_ERR_FILE,
                        "%s: cross_attention_layers names layer %d out of order or of a model with %d layers",
                        file->path, layer, p->n_layer);
        }
    }
    return find_image_token(file, p);
}

// Tile grids (rows, columns) of at most max_tiles tiles.
static int32_t count_grids(int32_t max_tiles) {
    int32_t n = 0;
    for (int32_t rows = 1; rows <= max_tiles; rows++) {
        n += max_tiles / rows;
    }
    return n;
}

mllama_status hparams_read_vision(const gguf_file * file, hparams * hp) {
    mllama_hparams * p = &hp->pub;
    int32_t          channels, projection_dim;
    TRY(check_architecture(file));
    TRY(gguf_file_int(file, "mllama.vision.block_count", 1, MAX_LAYERS, &p->n_vision_layer));
    TRY(gguf_file_int(file, "mllama.vision.global.block_count", 0, MAX_LAYERS, &p->n_vision_global_layer));
    TRY(gguf_file_int(file, "mllama.vision.embedding_length", 1, MAX_WIDTH, &p->vision_embd));
    TRY(gguf_file_int(file, "mllama.vision.feed_forward_length", 1, MAX_FF, &p->vision_ff));
    TRY(gguf_file_int(file, "mllama.vision.attention.head_count", 1, MAX_HEADS, &p->vision_head));
    TRY(gguf_file_float_or(file, "mllama.vision.attention.layer_norm_epsilon", 0.0f, 1.0f, 1e-5f, &p->vision_eps));
    TRY(gguf_file_int(file, "mllama.vision.image_size", 1, MAX_PIXELS, &p->image_size));
    TRY(gguf_file_int(file, "mllama.vision.patch_size", 1, p->image_size, &p->patch_size));
    TRY(gguf_file_int(file, "mllama.vision.max_num_tiles", 1, MAX_TILES, &p->max_tiles));
    TRY(gguf_file_int_or(file, "mllama.vision.num_channels", 3, 3, 3, &channels));
    TRY(gguf_file_int_or(file, "mllama.vision.projection_dim", 1, MAX_WIDTH, p->n_embd, &projection_dim));

    if (p->vision_embd % p->vision_head != 0) {
        return fail(MLLAMA_ERR_FILE, "%s: vision embedding_length %d is not a multiple of head_count %d", file->path,
                    p->vision_embd, p->vision_head);
    }
    if (p->image_size % p->patch_size != 0) {
        return fail(MLLAMA_ERR_FILE, "%s: image_size %d is not a multiple of patch_size %d", file->path, p->image_size,
                    p->patch_size);
    }
    if (projection_dim != p->n_embd) {
        return fail(MLLAMA_ERR_FILE,
                    "%s: the projector gives %d values, the text model takes %d; they are not of one model", file->path,
                    projection_dim, p->n_embd);
    }
    if (p->n_cross_layers == 0) {
        return fail(MLLAMA_ERR_FILE, "%s: a projector, but the text model has no cross-attention layers", file->path);
    }
    if (!gguf_file_has(file, "mllama.vision.intermediate_layers_indices")) {
        return fail(MLLAMA_ERR_FILE, "%s: key 'mllama.vision.intermediate_layers_indices' is missing", file->path);
    }
    TRY(gguf_file_ints(file, "mllama.vision.intermediate_layers_indices", &hp->intermediate_layers,
                       &p->n_intermediate));
    for (int32_t i = 0; i < p->n_intermediate; i++) {
        const int32_t layer = hp->intermediate_layers[i];
        if (layer < 0 || layer >= p->n_vision_layer) {
            return fail(MLLAMA_ERR_FILE, "%s: intermediate_layers_indices names layer %d of an encoder with %d layers",
                        file->path, layer, p->n_vision_layer);
        }
    }
    const int32_t side    = p->image_size / p->patch_size;
    p->n_aspect_ratios    = count_grids(p->max_tiles);
    p->n_positions        = side * side + 1;
    p->n_positions_padded = (p->n_positions + 7) / 8 * 8;
    return MLLAMA_OK;
}

void hparams_free(hparams * hp) {
    free(hp->cross_layers);
    free(hp->intermediate_layers);
}
