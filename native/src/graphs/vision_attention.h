// The encoder's attention by ggml's operations: on GPUs and workers, and on the CPU without our own kernels.
#pragma once

#include "graphs/graph.h"

// Which keys the queries of one kind see. row holds 0 for a key, log(n) for a key that counts n times, minus infinity
// for one that is not seen.
typedef struct key_mask {
    struct ggml_tensor * row;  // input F32 [n_kv]; NULL: there is no such mask
    struct ggml_tensor * mask; // F16 [n_kv, rows], all alike
    int64_t              n_keys;
} key_mask;

// The tokens in their order (see vision_graph.c), and what the layers share where keys have masks
typedef struct vision_attention {
    int64_t              n_real, n_all;
    int64_t              repeated[2][2]; // [from, to): rows of the unused tile that stands for several
    int64_t              times;          // so many tiles it stands for
    int64_t              n_head;
    key_mask             real, pads;     // for the two kinds of queries; made with the first layer that uses them
    struct ggml_tensor * k, * v;         // F16 [n_embd, n_kv], each layer's in its turn; rows without a key are 0
    struct ggml_tensor * rows;           // input I64 [n_all]: 0, 1, ...
    struct ggml_tensor * one;            // input F32 [1]
    bool                 no_masks;       // the device has no attention with them
} vision_attention;

// q, k, v [n_embd, n_all], or q [n_embd, n_real] -> as q
struct ggml_tensor * vision_attention_node(graph * g, vision_attention * a, struct ggml_tensor * q,
                                           struct ggml_tensor * k, struct ggml_tensor * v);
// Sets the inputs, once the graph has memory.
mllama_status vision_attention_set(const vision_attention * a);
