// The shape of a model, read once from the keys of its files. Everything else asks this, never the file.
#pragma once

#include "file/gguf_file.h"

typedef struct hparams {
    mllama_hparams pub;
    int32_t *      cross_layers;        // [pub.n_cross_layers], ascending
    int32_t *      intermediate_layers; // [pub.n_intermediate]: the INPUT of these local layers goes to the projector
} hparams;

mllama_status hparams_read_text(const gguf_file * file, hparams * hp);
mllama_status hparams_read_vision(const gguf_file * file, hparams * hp);
void          hparams_free(hparams * hp);

static inline bool hparams_is_cross(const hparams * hp, int32_t layer) {
    for (int32_t i = 0; i < hp->pub.n_cross_layers; i++) {
        if (hp->cross_layers[i] == layer) return true;
    }
    return false;
}

static inline bool hparams_has_vision(const hparams * hp) {
    return hp->pub.n_positions > 0;
}
