// Which of the known layouts the files of a model have: what that calls the tensors, and what is wrong in it.
#pragma once

#include "file/gguf_file.h"

// The tensors of a vision layer that files call differently.
typedef enum vision_tensor {
    VISION_ATTN_NORM,
    VISION_ATTN_OUT,
    VISION_FFN_NORM,
    VISION_FC1, // wide: n_embd -> n_ff
    VISION_FC2,
} vision_tensor;

typedef enum vision_naming {
    NAMES_CANONICAL, // B too
    NAMES_A,
    NAMES_A_PLAIN_FFN,
} vision_naming;

enum { MAX_REPAIRS = 8 };

typedef struct layout {
    const char *  name; // see mllama_model_layout
    vision_naming naming;
    bool          permute_cross_norms; // B: rows of cross-attention q and k are in RoPE order, their norms are not
    char          repairs[MAX_REPAIRS][160];
    int32_t       n_repairs;
} layout;

// vision: the file that holds the vision tensors (may be text), or NULL.
mllama_status layout_recognise(gguf_file * text, gguf_file * vision, layout * out);
const char *  layout_vision_name(const layout * layout, vision_tensor tensor);
