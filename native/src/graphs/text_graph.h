// The text decoder, and the filling of the cross-attention cache, as ggml graphs.
#pragma once

#include "caches.h"
#include "graphs/graph.h"
#include "model/model.h"

// What a decode graph was built for; a graph serves every later call of the same shape.
typedef struct text_shape {
    int64_t  n_tokens;
    int64_t  n_kv;       // rows of the self-attention cache that are looked at
    int64_t  n_rows;     // rows of the slot that are seen; 0: no image
    int32_t  slot;
    uint64_t generation; // of the slot
    int32_t  logits;     // mllama_logits
} text_shape;

typedef struct text_graph {
    graph                g;
    text_shape           shape;
    struct ggml_tensor * tokens;    // input  I32 [n_tokens]
    struct ggml_tensor * positions; // input  I32 [n_tokens]
    struct ggml_tensor * cells;     // input  I64 [n_tokens]: rows of the self-attention cache to write
    struct ggml_tensor * mask;      // input  F16 [n_kv, n_tokens]
    struct ggml_tensor * logits;    // output F32 [vocab_size, 1 or n_tokens], NULL without logits
    // output F32 [n_embd, columns]: x, or with logits the input of their product, one column for each of them
    struct ggml_tensor * last;
    cpu_cache_attention * attention; // [n_layer]
    cpu_cache_item *      items;     // of them
} text_graph;

// slot: NULL when shape->n_rows is 0
mllama_status text_graph_build(const mllama_model * model, const kv_cache * cache, const image_slot * slot,
                               const text_shape * shape, const compute_env * env, text_graph * graph);
void          text_graph_free(text_graph * graph);

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
