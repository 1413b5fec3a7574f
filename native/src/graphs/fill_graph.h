// The filling of the cross-attention cache as a ggml graph.
#pragma once

#include "caches.h"
#include "graphs/graph.h"
#include "model/model.h"

typedef struct fill_graph {
    graph                g;
    struct ggml_tensor * states; // input F32 [n_embd, n_rows]
    // output F32 [1]: 0, or NaN if rows that are not in host memory are not finite. NULL: all are in host memory
    struct ggml_tensor * zero;
} fill_graph;

// Writes k and v of every cross-attention layer for n_rows rows of states, at row `first` of the slot.
mllama_status fill_graph_build(const mllama_model * model, const image_slot * slot, int64_t first, int64_t n_rows,
                               const compute_env * env, fill_graph * graph);
void          fill_graph_free(fill_graph * graph);
