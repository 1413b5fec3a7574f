// libmllama: Llama 3.2 Vision ("mllama") inference over ggml.
//
// Usage:
//
//     mllama_model_params mp = mllama_model_default_params();
//     mllama_model * model = NULL;
//     if (mllama_model_load("text.gguf", "mmproj.gguf", &mp, &model) != MLLAMA_OK) die(mllama_last_error());
//
//     mllama_context_params cp = mllama_context_default_params();
//     mllama_context * ctx = NULL;
//     mllama_context_new(model, &cp, &ctx);
//
//     mllama_encode(ctx, pixels, n_tiles, aspect_ratio_id, states);                     // image -> states
//     mllama_image_fill(ctx, 1, &states_ptr, &n_tiles, &slot);                          // states -> a slot
//     mllama_decode(ctx, tokens, n_tokens, slot, 1, MLLAMA_LOGITS_LAST, logits, cap);   // tokens -> logits
//
// Every function that can fail returns a status. mllama_last_error() has the message, in the same thread. A model is
// read-only and may be shared by contexts of several threads; a context belongs to one thread at a time. This header is
// also what Python reads (cffi, ABI mode): plain C declarations only; lines that start with '#' are skipped.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)

typedef enum mllama_status {
    MLLAMA_OK               =  0,
    MLLAMA_ERR_ARGUMENT     = -1, // the caller's mistake: an argument out of range
    MLLAMA_ERR_FILE         = -2, // a model file cannot be read or is damaged
    MLLAMA_ERR_MEMORY       = -3, // host or device memory
    MLLAMA_ERR_BACKEND      = -4, // a device failed, or ggml does not match
    MLLAMA_ERR_CONTEXT_FULL = -5, // the tokens do not fit n_ctx
    MLLAMA_ERR_ABORTED      = -6, // the abort callback returned true; the context stays usable
} mllama_status;

typedef struct mllama_model   mllama_model;
typedef struct mllama_context mllama_context;

// ---- library ------------------------------------------------------------------------------------------------------

// Message of the last error of the calling thread. Valid until the next call of this thread that fails.
const char * mllama_last_error(void);
const char * mllama_version(void);
const char * mllama_ggml_version_built(void);  // the ggml that this library was compiled against
const char * mllama_ggml_version_loaded(void); // the ggml that the process has loaded

// level: ggml_log_level (1 debug, 2 info, 3 warn, 4 error, 5 continued line), or 6 for a warning of this library, which
// a user should see. text is valid during the call only.
typedef void (*mllama_log_callback)(int32_t level, const char * text, void * user_data);
void mllama_log_set(mllama_log_callback callback, void * user_data); // NULL: stderr, warnings and errors

// ---- devices ------------------------------------------------------------------------------------------------------

typedef enum mllama_device_type {
    MLLAMA_DEVICE_CPU = 0,
    MLLAMA_DEVICE_GPU = 1,
    MLLAMA_DEVICE_IGPU = 2,
    MLLAMA_DEVICE_ACCEL = 3, // helps the CPU (BLAS, AMX)
} mllama_device_type;

typedef struct mllama_device_info {
    const char * name;         // as ggml names it: "CPU", "CUDA0", "Metal"; "device3" where its backend fails to tell
    const char * description;
    int32_t      type;         // mllama_device_type
    uint64_t     memory_free;  // bytes; 0 where that is unknown
    uint64_t     memory_total; // bytes
} mllama_device_info;

int32_t       mllama_device_count(void);
mllama_status mllama_device_get(int32_t index, mllama_device_info * info);
// Starts the device and stops it again, unless that went well before. MLLAMA_ERR_BACKEND: it cannot be used;
// mllama_last_error() has the reason. mllama_model_load leaves such a device out, or fails where the caller names it.
mllama_status mllama_device_start(int32_t index);

// ggml's RPC backend: devices of other processes. It has no authentication, and ends the process when a worker
// vanishes.
bool          mllama_rpc_available(void); // whether the loaded ggml was built with it
// Adds the devices of a worker, "host:port", IPv4. Their type is GPU. Adding a worker twice is fine.
mllama_status mllama_rpc_add(const char * endpoint);
// Serves these devices to one client after the other. Returns only on failure.
// cache_dir: a folder that keeps large weights for the next client, or NULL
mllama_status mllama_rpc_serve(const char * endpoint, const char * cache_dir, int32_t n_threads, int32_t n_devices,
                               const int32_t * devices);

// Called with ggml's last message right before ggml ends the process, on any thread. NULL: print it to stderr. It is
// the last resort: what a device's backend says in a call of this library is an error of that call.
typedef void (*mllama_fatal_callback)(const char * words);
void mllama_fatal_set(mllama_fatal_callback callback);

// ---- model --------------------------------------------------------------------------------------------------------

typedef enum mllama_phase {
    MLLAMA_PHASE_LOAD   = 0, // done/total in bytes
    MLLAMA_PHASE_ENCODE = 1, // done/total in graph nodes
    MLLAMA_PHASE_PROMPT = 2, // done/total in tokens
} mllama_phase;

typedef void (*mllama_progress_callback)(int32_t phase, int64_t done, int64_t total, void * user_data);
// Called on the calling thread at most every 50 ms while a function works; true stops it with MLLAMA_ERR_ABORTED.
typedef bool (*mllama_abort_callback)(void * user_data);

typedef struct mllama_model_params {
    int32_t         n_gpu_layers;  // the last N of block_count + 1 (the output counts as one); -1: all
    // index in mllama_device_get; -1: with the text's layers (the first GPU if any layer is offloaded); -2: CPU
    int32_t         vision_device;
    const int32_t * devices;       // device indices to offload to; NULL: every GPU, RPC workers first
    int32_t         n_devices;
    const float *   tensor_split;  // share of each device, missing ones 0; NULL: by free memory
    int32_t         n_tensor_split;
    int32_t         main_gpu;      // the one of these devices that takes everything; -1: all share
    bool            use_mmap;
    // copy text matrices to special layouts of the CPU: products may be faster, the load is slower, no mmap for them
    bool            repack;
    const char *    repack_layouts; // names, separated by commas; NULL: "CPU_REPACK". See mllama_repack_product
    bool            allow_quantized_vision;
    bool            check_only;    // read and validate everything, load no weights (mllama info)
    // allocate no memory: a context can then only mllama_reserve, and say how much memory it would need
    bool            no_alloc;
    mllama_progress_callback progress;
    mllama_abort_callback    abort;
    void *                   user_data;
} mllama_model_params;

typedef struct mllama_hparams {
    // text
    int32_t n_layer;
    int32_t n_ctx_train;
    int32_t n_embd;
    int32_t n_ff;
    int32_t n_head;
    int32_t n_head_kv;
    int32_t head_dim;
    int32_t rope_dim;
    float   rope_freq_base;
    float   rms_eps;
    int32_t vocab_size;     // logits a token
    int32_t n_token_embd;   // rows of the embedding; the image token has a row but no logit
    int32_t image_token_id;
    int32_t n_cross_layers;
    // vision; all 0 when the model has no projector
    int32_t n_vision_layer;
    int32_t n_vision_global_layer;
    int32_t vision_embd;
    int32_t vision_ff;
    int32_t vision_head;
    float   vision_eps;
    int32_t image_size;     // pixels, side of a tile
    int32_t patch_size;
    int32_t max_tiles;
    int32_t n_positions;        // P: patches + 1
    int32_t n_positions_padded; // PP: P rounded up to a multiple of 8
    int32_t n_aspect_ratios;    // aspect_ratio_id runs from 1 to this
    int32_t n_intermediate;
} mllama_hparams;

mllama_model_params mllama_model_default_params(void);

// mmproj_path: NULL when text_path holds both, or for text only. On success *model is the caller's.
mllama_status mllama_model_load(const char * text_path, const char * mmproj_path, const mllama_model_params * params,
                                mllama_model ** model);
// Free the contexts of the model first.
void                   mllama_model_free(mllama_model * model);
const mllama_hparams * mllama_model_hparams(const mllama_model * model);
// n_cross_layers layer indices, ascending.
const int32_t *        mllama_model_cross_layers(const mllama_model * model);
// How the tensors are named and spread over files: "canonical" (one file or two, written by our converter), "A" (two
// files of Ollama 0.4 to 0.6 and of the Hugging Face hub), "B" (one file of Ollama since 0.7), "text only", "unknown"
// (named as canonical).
const char *           mllama_model_layout(const mllama_model * model);
// The repairs and defaults of loading, one line for each index from 0. NULL beyond the last.
const char *           mllama_model_repair(const mllama_model * model, int32_t index);
uint64_t               mllama_model_size(const mllama_model * model); // bytes of all weights

typedef struct mllama_tensor_info {
    const char * name;     // as in the file
    const char * type;     // "f16", "q4_K", ...
    int64_t      ne[4];    // fastest first
    uint64_t     n_bytes;
    const char * device;   // where it was put
    bool         is_vision;
    const char * layout;   // that it was repacked to; "": none
} mllama_tensor_info;

int32_t       mllama_model_n_tensors(const mllama_model * model);
mllama_status mllama_model_tensor(const mllama_model * model, int32_t index, mllama_tensor_info * info);

// ---- context ------------------------------------------------------------------------------------------------------

typedef enum mllama_kv_type {
    MLLAMA_KV_F32  = 0,
    // V is stored in F32 with F16's values (at most 65504) on RPC workers and where the CPU uses ggml's kernel
    MLLAMA_KV_F16  = 1,
    MLLAMA_KV_Q8_0 = 8, // self-attention only; cross-attention then uses F16. V needs flash_attn
} mllama_kv_type;

typedef struct mllama_context_params {
    int32_t n_ctx;     // tokens; 0: what the model was trained with
    int32_t n_batch;   // most tokens in one step; of a single sequence at most n_ctx
    int32_t n_threads; // CPU threads, 512 at most; 0: one for each CPU
    int32_t type_k;    // mllama_kv_type
    int32_t type_v;
    bool    flash_attn;
    bool    exact;       // sums of products in F32 on GPUs too
    bool    offload_kqv; // true: cache and attention of a layer are on its device; false: on the CPU
    const char * cpu_kernel; // see "kernels of the CPU" below; NULL: from MLLAMA_CPU_KERNEL
    mllama_progress_callback progress;
    mllama_abort_callback    abort;
    void *                   user_data;
} mllama_context_params;

mllama_context_params mllama_context_default_params(void);
mllama_status mllama_context_new(const mllama_model * model, const mllama_context_params * params,
                                 mllama_context ** ctx);
void          mllama_context_free(mllama_context * ctx);
int32_t       mllama_n_ctx(const mllama_context * ctx);
// The CPU kernel of this context; "off" without flash_attn.
const char *  mllama_kernel_name(const mllama_context * ctx);
void          mllama_set_n_threads(mllama_context * ctx, int32_t n_threads);

// Memory of a model and its context on one device, in bytes. With no_alloc: the memory they would need.
typedef struct mllama_memory {
    const char * device;
    uint64_t     mapped;   // weights in pages of the file; the system may drop and read them again
    uint64_t     weights;  // weights copied into the device's memory
    uint64_t     self_kv;  // the self-attention cache
    uint64_t     cross_kv; // all filled image slots
    uint64_t     compute;  // compute buffers of the text; they grow with the largest batch and context so far
    uint64_t     vision;   // peak of encoding an image or filling a slot
    uint64_t     staging;  // host memory while weights are copied; freed before any cache is made
} mllama_memory;
int32_t       mllama_memory_count(const mllama_context * ctx); // devices; 0 is the CPU
mllama_status mllama_memory_usage(const mllama_context * ctx, int32_t index, mllama_memory * memory);

// Allocates the memory for a full context and one group of adjacent images, so that a device with too little memory
// fails now. The compute buffers of the text stay, the rest is freed. n_images 0: text only. With no_alloc it only
// measures, and counts the slot of these images as filled.
mllama_status mllama_reserve(mllama_context * ctx, int32_t n_images, const int32_t * n_tiles);
// With no_alloc: measures n_sequences sequences of n_ctx tokens beside the context's own, each with a slot of these
// images, and steps of mllama_decode_many: n_batch tokens of one of them, and one token of each with a piece of n_piece
// tokens of the last one's prompt.
mllama_status mllama_reserve_many(mllama_context * ctx, int32_t n_sequences, int32_t n_ctx, int32_t n_piece,
                                  int32_t n_images, const int32_t * n_tiles);

// Encodes an image.
//   pixels  [n_tiles, 3, image_size, image_size] float32, normalised, the used tiles only
//   states  [n_tiles, n_positions, n_embd] float32, written
// MLLAMA_ERR_FILE: the model is damaged, because the states are not finite.
mllama_status mllama_encode(mllama_context * ctx, const float * pixels, int32_t n_tiles, int32_t aspect_ratio_id,
                            float * states);

// Fills a new slot of the cross-attention cache with one image, or with several that stand side by side in the prompt.
// The text after them sees all of them. states[i] is [n_tiles[i], n_positions, n_embd]. NULL: mllama_image_set must
// bring all rows of that image before they are used. *slot: the number of the slot, >= 0. MLLAMA_ERR_FILE: the model is
// damaged, because the keys or values are not finite.
mllama_status mllama_image_fill(mllama_context * ctx, int32_t n_images, const float * const * states,
                                const int32_t * n_tiles, int32_t * slot);
mllama_status mllama_image_free(mllama_context * ctx, int32_t slot);

// Size in bytes of an image of n_tiles tiles, in the form of mllama_image_get, if a slot can map it from a file. This
// is possible where the whole slot is in the memory of this process. Otherwise 0.
uint64_t mllama_image_mapped_size(const mllama_context * ctx, int32_t n_tiles);
// Fills a new slot with one image whose bytes are in a file from `offset`, a multiple of 64. The file is mapped until
// the slot is freed. Until then it may be removed but must not be changed.
mllama_status mllama_image_map(mllama_context * ctx, int32_t n_tiles, const char * path, uint64_t offset,
                               int32_t * slot);

// The keys and values of one image in a slot, to keep them and put them into another slot. The order of the bytes is
// our own. It depends on the cache types and on the devices of the layers, but not on the slot or its other images.
mllama_status mllama_image_size(const mllama_context * ctx, int32_t slot, int32_t image, uint64_t * n_bytes);
// Copies n_bytes starting at offset. Pieces of a few MiB are large enough for full speed.
mllama_status mllama_image_get(mllama_context * ctx, int32_t slot, int32_t image, uint64_t offset, uint64_t n_bytes,
                               void * data);
mllama_status mllama_image_set(mllama_context * ctx, int32_t slot, int32_t image, uint64_t offset, uint64_t n_bytes,
                               const void * data);

typedef enum mllama_logits {
    MLLAMA_LOGITS_NONE = 0,
    MLLAMA_LOGITS_LAST = 1,
    MLLAMA_LOGITS_ALL  = 2,
} mllama_logits;

// Appends tokens to the conversation. All of them see the first n_visible images of the slot. slot -1: no image yet;
// the cross-attention layers are left out. logits: [1 or n_tokens, vocab_size] float32, or NULL with
// MLLAMA_LOGITS_NONE. logits_capacity: its size in floats. After an error the cache is unchanged. But after
// MLLAMA_ERR_FILE it has no tokens: the model is damaged, because the results are not finite.
mllama_status mllama_decode(mllama_context * ctx, const int32_t * tokens, int32_t n_tokens, int32_t slot,
                            int32_t n_visible, int32_t logits_mode, float * logits, int64_t logits_capacity);

int32_t       mllama_n_past(const mllama_context * ctx);                    // tokens in the self-attention cache
mllama_status mllama_truncate(mllama_context * ctx, int32_t n_past);        // keep the first n_past tokens
void          mllama_clear(mllama_context * ctx);                           // forget tokens and images

// The keys and values of the first n_tokens tokens in the self-attention cache, for another context with the same
// settings: their size, a copy, and the way back, which replaces all tokens of the context. MLLAMA_ERR_FILE: they are
// not finite, so the model is damaged. After that, and after any error of mllama_prefix_kv_set, the context has no
// tokens.
uint64_t      mllama_prefix_kv_size(const mllama_context * ctx, int32_t n_tokens);
mllama_status mllama_prefix_kv_get(mllama_context * ctx, int32_t n_tokens, uint64_t n_bytes, void * data);
mllama_status mllama_prefix_kv_set(mllama_context * ctx, int32_t n_tokens, uint64_t n_bytes, const void * data);

// ---- several sequences --------------------------------------------------------------------------------------------

// A context has sequence 0, which the functions above are about. More sequences are conversations of their own that
// share its weights, buffers and image slots. Their caches grow as they need.
// n_ctx: most tokens; 0: as the context. *sequence: its number, > 0.
mllama_status mllama_sequence_new(mllama_context * ctx, int32_t n_ctx, int32_t * sequence);
mllama_status mllama_sequence_free(mllama_context * ctx, int32_t sequence);
int32_t       mllama_sequence_n_past(const mllama_context * ctx, int32_t sequence); // -1: there is none
mllama_status mllama_sequence_truncate(mllama_context * ctx, int32_t sequence, int32_t n_past);
mllama_status mllama_sequence_prefix_kv_get(mllama_context * ctx, int32_t sequence, int32_t n_tokens, uint64_t n_bytes,
                                  void * data);
mllama_status mllama_sequence_prefix_kv_set(mllama_context * ctx, int32_t sequence, int32_t n_tokens, uint64_t n_bytes,
                                  const void * data);

// Tokens of one sequence, as for mllama_decode
typedef struct mllama_item {
    int32_t         sequence;
    const int32_t * tokens;
    int32_t         n_tokens;
    int32_t         slot, n_visible;
    int32_t         logits_mode;     // mllama_logits
    float *         logits;
    int64_t         logits_capacity;
    int32_t         status;          // set, if the call returns MLLAMA_OK: this item's own, see mllama_decode_many
} mllama_item;

// Appends tokens to several sequences in one step, which reads the weights once. No sequence is in two items; all items
// together have at most n_batch tokens. After an error no sequence has changed. An item whose results are not finite
// has status MLLAMA_ERR_FILE, with the words of mllama_last_error(); its sequence is then empty, the others continued.
mllama_status mllama_decode_many(mllama_context * ctx, int32_t n_items, mllama_item * items);

// Reports every named intermediate tensor right after it is computed. The first call has data NULL; return true to get
// the values. They come in a second call as float32 (ne: shape, fastest first), whose result is ignored.
typedef bool (*mllama_tap_callback)(const char * name, const int64_t * ne, const float * data, void * user_data);
void mllama_set_tap(mllama_context * ctx, mllama_tap_callback callback, void * user_data); // NULL: off

// ---- tokens that are allowed --------------------------------------------------------------------------------------

// A mask has a bit for each token, the lowest bit of a word first; n_words words. Tokens beyond it are not allowed, and
// those without a logit are passed over. Safe from any number of threads.
//
// The allowed token with the greatest logit, the first of equal ones; -1: there is none. NaN counts as -infinity.
int64_t mllama_likeliest(const float * logits, int64_t n_logits, const uint32_t * bits, int64_t n_words);

typedef struct mllama_candidate { // llama.cpp's llama_token_data
    int32_t token;
    float   logit;
    float   p;
} mllama_candidate;

// All allowed tokens in ascending order, with p 0. candidates has room for n_logits of them. Returns how many they are.
int64_t mllama_candidates(const float * logits, int64_t n_logits, const uint32_t * bits, int64_t n_words,
                          mllama_candidate * candidates);

// ---- quantizing ---------------------------------------------------------------------------------------------------

// Converts n_rows rows of n_per_row values between two ggml types. src_type: any type that ggml can read as numbers;
// dst_type: F32, F16, BF16, Q4_0, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K or Q6_K; the blocks of both must divide n_per_row. src
// and dst hold n_rows rows of ggml's size for their type, src aligned for its values. MLLAMA_ERR_FILE: a value that is
// not finite, or too large for dst_type; the contents of dst are then undefined. Safe from any number of threads.
mllama_status mllama_quantize_rows(int32_t src_type, const void * src, int32_t dst_type, void * dst, int64_t n_rows,
                                   int64_t n_per_row);

// ---- layouts of the CPU -------------------------------------------------------------------------------------------

// ggml's layouts of weights for faster products on this CPU, by index from 0. NULL beyond the last. "AMX" ends the
// process where the compiler of ggml has left out its set-up: try every layout except "CPU_REPACK" in another process
// before it is used.
const char *  mllama_repack_layout(int32_t index);
// One product, for such a trial: y [n_columns, n_out] = x [n_columns, n_in] times w [n_out, n_in]. w becomes a matrix
// of a ggml type in that layout (NULL: the plain one). MLLAMA_ERR_ARGUMENT: the layout has no products of this type and
// size.
mllama_status mllama_repack_product(const char * layout, int32_t type, const float * w, const float * x, float * y,
                                    int32_t n_in, int32_t n_out, int32_t n_columns, int32_t n_threads);

// ---- kernels of the CPU -------------------------------------------------------------------------------------------

// This library has its own CPU kernels for the vision encoder (attention, linear layers, GELU) and for the text
// (attention over F32 and F16 caches, products with quantized weights). They need flash_attn. mllama_context_new
// chooses one for the life of the context: from mllama_context_params.cpu_kernel, else from the environment variable
// MLLAMA_CPU_KERNEL, else the best of the processor, as far as known without a trial. Names: "amx",
// "avx512bf16", "avx512", "avx2"; on ARM "neonbf16", "neon"; everywhere "portable", and "off" for ggml's operations
// alone.
//
// A kernel is put together of parts, each with a table of functions. A name may change some of them:
// "avx2,quantized=ggml". Without a name before them they change the best kernel.
//     attention    of the encoder, in F32
//     linear       layers of the encoder, with factors in F32
//     bf16         both of these for BF16 weights; "f32" widens the weights instead
//     cache        the text's attention
//     quantized    products with weights of Q4_K, Q5_K and Q6_K
//     quantized32  products with weights of Q8_0 and Q4_0
//     f16          "bf16" rounds F16 weights of the encoder to BF16, for the part bf16; without a table there it is
//                  "f32"
// "ggml" stands for ggml's own operations.
//
// The kernel that the environment chooses now; NULL: no such kernel.
const char *  mllama_cpu_kernel(void);
// The shortest name of the kernel with this name; NULL: no such kernel, see mllama_last_error.
const char *  mllama_cpu_kernel_named(const char * name);
// The table of that kernel's part; NULL: no such kernel or part.
const char *  mllama_cpu_kernel_uses(const char * name, int32_t part);
// The names of all parts, by index from 0. NULL beyond the last.
const char *  mllama_cpu_part(int32_t part);
// The tables that this processor can use for a part, the best first, as far as known without a trial. NULL beyond the
// last.
const char *  mllama_cpu_table(int32_t part, int32_t index);

typedef struct mllama_cpu_trial {
    double seconds; // that a fixed piece of work takes, at least
    double error;   // the largest of a value, beside the usual size of the results
    bool   right;   // whether rounding explains it
} mllama_cpu_trial;

// Tries a part of a kernel on shapes of the 11B model, for about so many seconds. check: find the error too, which
// takes some milliseconds. MLLAMA_ERR_ARGUMENT: no such kernel or part, or attention of ggml. A table that does not
// work here may end the process: try each in another process.
mllama_status mllama_cpu_try(const char * kernel, int32_t part, int32_t n_threads, double seconds, bool check,
                             mllama_cpu_trial * result);
mllama_status mllama_erf(const float * x, float * y, int64_t n);           // as in GELU, for tests

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif
