// What the files of a context share: its parts, and the running of graphs on them.
#pragma once

#include "graphs/text_graph.h"

enum {
    MAX_BACKENDS  = MAX_DEVICES + 4,
    KV_STEP       = 256, // the attended part of a cache grows in such steps, so that a graph serves many tokens
    MAX_SEQUENCES = 256,
    MAX_BATCH     = 8192, // tokens of a step; ggml's lists for its graph take 6 GB at the shape of the 11B model
};

// The tokens of one conversation
typedef struct sequence {
    bool     used;
    kv_cache cache;      // for n_rows tokens
    uint64_t generation; // of the cache's memory
    int32_t  n_rows;
    int32_t  n_ctx;      // most tokens
    int32_t  n_past;     // tokens in the cache
} sequence;

struct mllama_context {
    const mllama_model *  model;
    mllama_context_params params;
    int32_t               n_step;                     // most tokens of all sequences in one step
    compute_env           env;
    kv_types              types, cross_types;         // of the caches for self- and cross-attention

    ggml_backend_t        backends[MAX_BACKENDS];     // the CPU is the last
    int32_t               n_backends;
    ggml_backend_sched_t  sched;                      // for text graphs; keeps the last one allocated
    size_t                sched_nodes;                // most nodes of its graphs
    text_graph            text;

    sequence              own;                        // number 0, always there, with room for n_ctx tokens
    sequence **           more;                       // numbers 1 to n_more, which grow
    int32_t               n_more;
    image_slot *          slots;                      // of all sequences
    int32_t               n_slots;
    uint64_t              generation;

    // bytes on the CPU, then on each of model->plan.gpus
    uint64_t              compute[MAX_DEVICES + 1];   // of sched, whose buffers never shrink
    uint64_t              vision[MAX_DEVICES + 1];    // the most so far

    ggml_backend_buffer_t patches;                    // of an image, from where a GPU reads fast; NULL: not used yet

    // of the call that runs
    bool                  aborted;
    int64_t               looked_at;                  // when the abort callback was last asked, microseconds
    int32_t               phase;
    int64_t               nodes_done, nodes_total;    // progress of an encode

    mllama_tap_callback   tap;
    void *                tap_user_data;
    float *               tap_values;
    size_t                tap_capacity;
    mllama_status         tap_status;                 // of the call that runs: a tensor that could not be read
};

// ---- running graphs (compute.c) -----------------------------------------------------------------------------------

bool          context_look(void * ctx);         // whether to stop; for our kernels, on the calling thread
bool          context_should_abort(void * ctx); // the same for ggml's CPU backend, which asks before every node
void          context_begin(mllama_context * ctx, int32_t phase); // before a call that computes
void          context_report(const mllama_context * ctx, int32_t phase, int64_t done, int64_t total);
mllama_status context_new_sched(mllama_context * ctx, size_t n_nodes, ggml_backend_sched_t * sched);
// most: raised to what the buffers take. Without memory nothing but that is done. *sched becomes NULL when a device
// throws.
mllama_status context_alloc(const mllama_context * ctx, ggml_backend_sched_t * sched, struct ggml_cgraph * gf,
                            uint64_t * most, const char * what, const char * remedy);
mllama_status context_compute(mllama_context * ctx, ggml_backend_sched_t sched, struct ggml_cgraph * gf,
                              const char * what);
// The same, for results that go to `to` afterwards: while a GPU computes, this memory gets its pages.
mllama_status context_compute_for(mllama_context * ctx, ggml_backend_sched_t sched, struct ggml_cgraph * gf,
                                  const char * what, void * to, size_t size);
mllama_status context_check_memory(const mllama_context * ctx); // that the model was not opened for measuring only
// The error about results that are not finite. doing: as in "the results of DOING"; weight: one that is not finite
// itself, or NULL
mllama_status context_not_finite(const gguf_file * file, const char * doing, const char * weight);
bool          context_has_slot(const mllama_context * ctx, int32_t slot);

// ---- images (images.c) --------------------------------------------------------------------------------------------

// pixels NULL: only the buffers are made, for any image with n_tiles.
mllama_status context_encode(mllama_context * ctx, const float * pixels, int32_t n_tiles, int32_t aspect_ratio_id,
                             float * states);
// states NULL: only the buffers are made.
mllama_status context_fill_rows(mllama_context * ctx, const image_slot * slot, int64_t first, int64_t n_rows,
                                const float * states);
mllama_status context_check_images(const mllama_context * ctx, int32_t n_images, const int32_t * n_tiles);
// Without rows yet; context_free_slot gives it back.
mllama_status context_new_slot(mllama_context * ctx, int32_t * index);
void          context_free_slot(mllama_context * ctx, image_slot * slot);

// Rows of a cache for n_tokens tokens. What is attended is rounded up, so the cache is too.
static inline int32_t context_rows(int32_t n_tokens) {
    return (n_tokens + KV_STEP - 1) / KV_STEP * KV_STEP;
}

// ---- sequences (sequence.c) ---------------------------------------------------------------------------------------

mllama_status sequence_init(mllama_context * ctx, sequence * s, int32_t n_ctx, int32_t n_tokens);
void          sequence_end(sequence * s);
// One more, with room for n_tokens tokens; 0: for n_ctx.
mllama_status sequence_new(mllama_context * ctx, int32_t n_ctx, int32_t n_tokens, int32_t * number);
// Room for n_tokens tokens. The text graph does not outlive a cache's memory.
mllama_status sequence_grow(mllama_context * ctx, sequence * s, int32_t n_tokens);
mllama_status sequence_find(const mllama_context * ctx, int32_t number, sequence ** s);

// ---- text (decode.c) ----------------------------------------------------------------------------------------------

// n_end: tokens of the sequence after these ones
text_item context_item(const mllama_context * ctx, const sequence * s, int32_t n_tokens, int32_t n_end, int32_t slot,
                       int32_t n_visible, int32_t logits);
// Makes ctx->text an allocated graph of this shape; most tokens find it there already.
mllama_status context_prepare(mllama_context * ctx, const text_shape * shape);
// Forgets a sequence whose results are not finite, and says so.
mllama_status sequence_not_finite(mllama_context * ctx, sequence * s, const char * doing);
