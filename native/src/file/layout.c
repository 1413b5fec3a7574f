#include "file/layout.h"

#include <stdarg.h>
#include <stdio.h>

// Written by our converter and by no other.
static const char CONVERTER_KEY[] = "mllama.converter";

// "v.blk.N." comes before, ".weight" or ".bias" after. attn_q, attn_k and attn_v have one name everywhere.
static const char * const VISION_NAMES[][3] = {
    //                    canonical, B   A           A without the swap
    [VISION_ATTN_NORM] = { "attn_norm",   "ln1",      "ln1"      },
    [VISION_ATTN_OUT]  = { "attn_output", "attn_out", "attn_out" },
    [VISION_FFN_NORM]  = { "ffn_norm",    "ln2",      "ln2"      },
    [VISION_FC1]       = { "ffn_up",      "ffn_down", "ffn_up"   },
    [VISION_FC2]       = { "ffn_down",    "ffn_up",   "ffn_down" },
};

// Keys that a file may lack because they have one right value; hparams.c takes it.
static const struct { const char * key, * value; } ONE_RIGHT_VALUE[] = {
    { "mllama.vision.num_channels", "3" },
    { "mllama.vision.attention.layer_norm_epsilon", "1e-05" },
};

static void repair(layout * l, const char * format, ...) __attribute__((format(printf, 2, 3)));
static void repair(layout * l, const char * format, ...) {
    if (l->n_repairs == MAX_REPAIRS) {
        return;
    }
    va_list args;
    va_start(args, format);
    vsnprintf(l->repairs[l->n_repairs++], sizeof(l->repairs[0]), format, args);
    va_end(args);
}

// In A ffn_up is usually fc2, [n_ff, n_embd]; a file that has it right is seen by its shape.
static bool is_swapped(gguf_file * vision) {
    const struct ggml_tensor * up = gguf_file_tensor(vision, "v.blk.0.ffn_up.weight", NULL);
    return !up || up->ne[0] >= up->ne[1];
}

mllama_status layout_recognise(gguf_file * text, gguf_file * vision, layout * out) {
    *out = (layout) { .name = "text only" };
    const bool one_file = gguf_file_has_vision(text);
    const bool ours     = gguf_file_has(text, CONVERTER_KEY);
    const bool a_names  = vision && gguf_file_tensor(vision, "v.blk.0.ln1.weight", NULL);

    if (vision == text && a_names) {
        return fail(MLLAMA_ERR_FILE,
                    "%s: text and vision in one file, with the names of a separate projector ('v.blk.0.ln1.weight'): "
                    "no known program writes that",
                    text->path);
    }
    if (vision) {
        out->name = a_names                                ? "A"
                  : gguf_file_has(vision, CONVERTER_KEY)   ? "canonical"
                  : vision == text                         ? "B"
                                                           : "unknown"; // named as canonical, by whatever wrote it
    }
    // The text of such a file is what it is, even with another projector or none.
    if (one_file && !ours) {
        out->permute_cross_norms = true;
        repair(out, "cross_attn_q_norm and cross_attn_k_norm are brought into the order that the file's converter gave "
                    "to the rows "
                    "of q and k alone");
    }
    if (a_names) {
        out->naming = is_swapped(vision) ? NAMES_A : NAMES_A_PLAIN_FFN;
        if (out->naming == NAMES_A) {
            repair(out, "ffn_up and ffn_down of the vision layers are swapped in the file, as their shapes show");
        }
    }
    for (size_t i = 0; vision && i < sizeof(ONE_RIGHT_VALUE) / sizeof(ONE_RIGHT_VALUE[0]); i++) {
        if (!gguf_file_has(vision, ONE_RIGHT_VALUE[i].key)) {
            repair(out, "key '%s' is missing: %s", ONE_RIGHT_VALUE[i].key, ONE_RIGHT_VALUE[i].value);
        }
    }
    return MLLAMA_OK;
}

const char * layout_vision_name(const layout * l, vision_tensor tensor) {
    return VISION_NAMES[tensor][l->naming];
}
