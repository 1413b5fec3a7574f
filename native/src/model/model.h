// The weights of a model by their role, wherever they live.
#pragma once

#include "device_plan.h"
#include "file/hparams.h"
#include "file/layout.h"

// Beside each role its name in a file of ours. Files of others call some vision tensors otherwise, see layout.c.
typedef struct text_layer {      // blk.N. and:
    bool                 is_cross;
    struct ggml_tensor * attn_norm;  // attn_norm.weight
    struct ggml_tensor * q;          // attn_q.weight         cross-attention: cross_attn_q_proj.weight
    struct ggml_tensor * k;          // attn_k.weight                          cross_attn_k_proj.weight
    struct ggml_tensor * v;          // attn_v.weight                          cross_attn_v_proj.weight
    struct ggml_tensor * o;          // attn_output.weight                     cross_attn_o_proj.weight
    struct ggml_tensor * rope_freqs; // rope_freqs.weight of the model, for offloaded self-attention layers
    // cross-attention only
    struct ggml_tensor * q_norm;     // cross_attn_q_norm.weight
    struct ggml_tensor * k_norm;     // cross_attn_k_norm.weight
    float                attn_gate;  // cross_attn_attn_gate, tanh already applied
    float                mlp_gate;   // cross_attn_mlp_gate, tanh already applied
    // all
    struct ggml_tensor * ffn_norm;   // ffn_norm.weight
    struct ggml_tensor * ffn_gate;   // ffn_gate.weight
    struct ggml_tensor * ffn_up;     // ffn_up.weight
    struct ggml_tensor * ffn_down;   // ffn_down.weight
} text_layer;

typedef struct vision_layer {    // v.blk.N. (local) or v.global.blk.N. (global) and:
    struct ggml_tensor * attn_norm;  // attn_norm.weight
    struct ggml_tensor * attn_norm_b; // attn_norm.bias
    struct ggml_tensor * q;          // attn_q.weight
    struct ggml_tensor * k;          // attn_k.weight
    struct ggml_tensor * v;          // attn_v.weight
    struct ggml_tensor * o;          // attn_output.weight
    struct ggml_tensor * ffn_norm;   // ffn_norm.weight
    struct ggml_tensor * ffn_norm_b; // ffn_norm.bias
    struct ggml_tensor * fc1;        // ffn_up.weight
    struct ggml_tensor * fc1_b;      // ffn_up.bias
    struct ggml_tensor * fc2;        // ffn_down.weight
    struct ggml_tensor * fc2_b;      // ffn_down.bias
    float                attn_gate;  // attn_gate of global layers, 1 in local ones
    float                ffn_gate;   // ffn_gate, the same
} vision_layer;

typedef struct vision_weights {
    struct ggml_tensor * class_embd;         // v.class_embd
    struct ggml_tensor * patch_embd;         // v.patch_embd.weight
    struct ggml_tensor * position_embd;      // v.position_embd.weight
    float                position_gate;      // v.position_embd.gate: 1 - tanh(g)
    struct ggml_tensor * tile_position_embd; // v.tile_position_embd.weight
    float                tile_position_gate; // v.tile_position_embd.gate: tanh(g), as the two below
    struct ggml_tensor * pre_tile_embd;      // v.pre_tile_position_embd.weight
    float                pre_tile_gate;      // v.pre_tile_position_embd.gate
    struct ggml_tensor * post_tile_embd;     // v.post_tile_position_embd.weight
    float                post_tile_gate;     // v.post_tile_position_embd.gate
    struct ggml_tensor * pre_ln;             // v.pre_ln.weight
    struct ggml_tensor * pre_ln_b;           // v.pre_ln.bias
    struct ggml_tensor * post_ln;            // v.post_ln.weight
    struct ggml_tensor * post_ln_b;          // v.post_ln.bias
    vision_layer *       local;
    vision_layer *       global;
    struct ggml_tensor * projector;          // mm.0.weight
    struct ggml_tensor * projector_b;        // mm.0.bias
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
    struct ggml_tensor * token_embd;  // token_embd.weight
    struct ggml_tensor * rope_freqs;  // rope_freqs.weight; NULL: no scaling
    struct ggml_tensor * output_norm; // output_norm.weight
    struct ggml_tensor * output;      // output.weight
    text_layer *         layers;
    vision_weights       vision;
    weight_list *        weights;
    // the name of a weight that is not finite, as far as loading has looked, or NULL
    const char *         damage[N_PARTS];
    bool                 no_alloc;    // nothing has memory: mllama_model_params.no_alloc
};
