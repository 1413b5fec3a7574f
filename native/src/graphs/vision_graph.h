// The vision encoder and the projector as one ggml graph.
#pragma once

#include "graphs/vision_attention.h"
#include "model/model.h"

typedef struct vision_graph {
    graph                g;
    struct ggml_tensor * patches;         // input  F32 [patch * patch * 3, patches a tile, n_tiles]; unused tiles are 0
    struct ggml_tensor * aspect_ratio_id; // input  I32 [1]
    struct ggml_tensor * states;          // output F32 [n_embd, P * n_tiles]
    int32_t              n_tiles;         // that are computed: those used, and the unused ones or, if they are alike,
                                          // one of them
    vision_attention     attention;
    cpu_attention *      attentions;      // one for each layer, where our own kernel computes them
    cpu_linear *         linears;         // the same for linear layers, as they come
} vision_graph;

// aspect_ratio_id: 0 for a graph that no image of n_used tiles exceeds. env->kernel: for an encoder on the CPU.
mllama_status vision_graph_build(const mllama_model * model, int32_t n_used, int32_t aspect_ratio_id,
                                 const compute_env * env, vision_graph * graph);
// Sets the inputs, once the graph has memory. patches: as vision_patches makes them
mllama_status vision_graph_set(const vision_graph * graph, const float * patches, int32_t aspect_ratio_id);
void          vision_graph_free(vision_graph * graph);

// pixels [n_used, 3, size, size] -> patches as vision_graph.patches has them for n_tiles, zeros after the used tiles.
void vision_patches(const mllama_hparams * p, const float * pixels, int32_t n_used, int32_t n_tiles, float * patches);
