// The weights of a model by their role, wherever they live.
#pragma once

#include "device_plan.h"
#include "file/hparams.h"
#include "file/layout.h"

typedef struct text_layer {
    bool                 is_cross;
    struct ggml_tensor * attn_norm;
    struct ggml_tensor * q;
    struct ggml_tensor * k;
    struct ggml_tensor * v;
    struct ggml_tensor * o;
    struct ggml_tensor * rope_freqs; // of offloaded self-attention layers
    struct ggml_tensor * q_norm;    // cross-attention only, as are those down to mlp_gate
    struct ggml_tensor * k_norm;
    float                attn_gate; // tanh already applied
    float                mlp_gate;
    struct ggml_tensor * ffn_norm;
    struct ggml_tensor * ffn_gate;
    struct ggml_tensor * ffn_up;
    struct ggml_tensor * ffn_down;
} text_layer;

typedef struct vision_layer {
    struct ggml_tensor * attn_norm, * attn_norm_b;
    struct ggml_tensor * q;
    struct ggml_tensor * k;
    struct ggml_tensor * v;
    struct ggml_tensor * o;
    struct ggml_tensor * ffn_norm, * ffn_norm_b;
    struct ggml_tensor * fc1, * fc1_b;
    struct ggml_tensor * fc2, * fc2_b;
    float                attn_gate; // global layers; 1 in local ones
    float                ffn_gate;
} vision_layer;

typedef struct vision_weights {
    struct ggml_tensor * class_embd;
    struct ggml_tensor * patch_embd;
    struct ggml_tensor * position_embd;
    float                position_gate;      // 1 - tanh(g)
    struct ggml_tensor * tile_position_embd;
    float                tile_position_gate; // tanh(g), as the two below
    struct ggml_tensor * pre_tile_embd;
    float                pre_tile_gate;
    struct ggml_tensor * post_tile_embd;
    float                post_tile_gate;
    struct ggml_tensor * pre_ln, * pre_ln_b;
    struct ggml_tensor * post_ln, * post_ln_b;
    vision_layer *       local;
    vision_layer *       global;
    struct ggml_tensor * projector, * projector_b;
} vision_weights;

typedef struct weight_list weight_list; // weights.h

typedef enum model_part {
    PART_TEXT,  // without the next
    PART_CROSS, // cross-attention layers, which compute only where an image is seen
    PART_VISION,
    N_PARTS,
} model_part;

struct mllama_model {
    hparams              hp;
    layout               layout;
    device_plan          plan;
    gguf_file *          text_file;
    gguf_file *          vision_file; // == text_file in a one-file model, NULL without vision
    struct ggml_tensor * token_embd;
    struct ggml_tensor * rope_freqs;  // may be NULL: no scaling
    struct ggml_tensor * output_norm;
    struct ggml_tensor * output;
    text_layer *         layers;
    vision_weights       vision;
    weight_list *        weights;
    const char *         damage[N_PARTS]; // the name of a weight that is not finite, as far as loading has looked, or NULL
    bool                 no_alloc;    // nothing has memory: mllama_model_params.no_alloc
};
