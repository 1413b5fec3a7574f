// The text decoder as a ggml graph.
#pragma once

#include "caches.h"
#include "graphs/graph.h"
#include "model/model.h"

// Some tokens of one sequence, next to each other, that see the same images
typedef struct text_item {
    const kv_cache *   cache;      // of the sequence
    uint64_t           generation; // of its memory
    const image_slot * slot;       // NULL: no image
    uint64_t           slot_generation;
    int64_t            n_tokens;
    int64_t            n_kv;       // rows of the self-attention cache that are looked at
    int64_t            n_rows;     // rows of the slot that are seen; 0: no image
    int32_t            logits;     // mllama_logits
} text_item;

// Columns of logits of n_tokens tokens. mode: mllama_logits
static inline int64_t text_n_logits(int32_t mode, int64_t n_tokens) {
    return mode == MLLAMA_LOGITS_ALL ? n_tokens : mode == MLLAMA_LOGITS_LAST ? 1 : 0;
}

// What a decode graph was built for; a graph serves every later call of the same shape. Items that see images come
// first, those that see the same rows next to each other.
typedef struct text_shape {
    int32_t           n_items;
    const text_item * items;
} text_shape;

typedef struct text_graph {
    graph                g;
    int32_t              n_items;
    text_item *          items;     // as in the shape
    int64_t              n_tokens;  // of all items
    struct ggml_tensor * tokens;    // input  I32 [n_tokens]
    struct ggml_tensor * positions; // input  I32 [n_tokens]
    struct ggml_tensor * cells;     // input  I64 [n_tokens]: rows of its self-attention cache that each token writes
    struct ggml_tensor * mask;      // input  F16, for each item [n_kv, n_tokens] one after the other
    // Of each item, its part of these two. All layers share the tensors, because each is copied to a device by itself.
    struct ggml_tensor ** item_cells, ** item_masks;
    struct ggml_tensor * wanted;    // input  I32: the columns of text_graph_columns. NULL: one item, or all columns
    struct ggml_tensor * logits;    // output F32 [vocab_size, n_logits], in the order of the items; NULL without
    int64_t              n_logits;
    // output F32 [n_embd, columns]: x in the columns of text_graph_columns, or with logits the input of their product
    struct ggml_tensor * last;
    cpu_cache_attention * attention; // [n_layer]
    cpu_cache_item *      cache_items; // [n_layer * n_items], of them
} text_graph;

mllama_status text_graph_build(const mllama_model * model, const text_shape * shape, const compute_env * env,
                               text_graph * graph);
void          text_graph_free(text_graph * graph);
size_t        text_graph_most_nodes(const mllama_hparams * p, int64_t n_tokens, int64_t n_items);
bool          text_graph_serves(const text_graph * graph, const text_shape * shape);
// The columns whose logits are wanted, in the order of the items, then the last column of each item without logits.
// columns: NULL, or room for as many as there are. Returns how many. The order of an item's own columns stays.
int64_t       text_graph_columns(const text_shape * shape, int32_t * columns);
