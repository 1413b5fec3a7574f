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
//     mllama_encode(ctx, pixels, n_tiles, aspect_ratio_id, states);                     // picture -> states
//     mllama_image_fill(ctx, 1, &states_ptr, &n_tiles, &slot);                          // states -> cross-attention cache
//     mllama_decode(ctx, tokens, n_tokens, slot, 1, MLLAMA_LOGITS_LAST, logits, cap);   // tokens -> logits
//
// Every function that can fail returns a status; the words are in mllama_last_error() of the same thread.
// A model is read-only and may be shared by contexts of several threads; a context belongs to one thread at a time.
// This header is also what Python reads (cffi, ABI mode): plain C declarations only; lines that start with '#' are skipped.
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
    MLLAMA_ERR_FILE         = -2, // a model file that cannot be read or is not right
    MLLAMA_ERR_MEMORY       = -3, // host or device memory
    MLLAMA_ERR_BACKEND      = -4, // a device failed, or ggml does not match
    MLLAMA_ERR_CONTEXT_FULL = -5, // the tokens do not fit n_ctx
    MLLAMA_ERR_ABORTED      = -6, // the abort callback said so; the context stays usable
} mllama_status;

typedef struct mllama_model   mllama_model;
typedef struct mllama_context mllama_context;

// ---- library ------------------------------------------------------------------------------------------------------

// Words of the last error of the calling thread; valid until its next failing call.
const char * mllama_last_error(void);
const char * mllama_version(void);
const char * mllama_ggml_version_built(void);  // the ggml that this library was compiled against
const char * mllama_ggml_version_loaded(void); // the ggml that the process has loaded

// level: ggml_log_level (1 debug, 2 info, 3 warn, 4 error, 5 continued line). text is valid during the call only.
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
    const char * name;         // as ggml names it: "CPU", "CUDA0", "Metal"
    const char * description;
    int32_t      type;         // mllama_device_type
    uint64_t     memory_free;  // bytes
    uint64_t     memory_total; // bytes
} mllama_device_info;

int32_t       mllama_device_count(void);
mllama_status mllama_device_get(int32_t index, mllama_device_info * info);

// ggml's RPC backend: devices of other processes. It has no authentication, and ends the process when a worker vanishes.
bool          mllama_rpc_available(void); // whether the loaded ggml was built with it
// Adds the devices of a worker, "host:port", IPv4. Their type is GPU. Adding a worker twice is fine.
mllama_status mllama_rpc_add(const char * endpoint);
// Serves these devices to one client after the other; returns only on failure. cache_dir: NULL, or a folder in which large
// weights are kept for the next client.
mllama_status mllama_rpc_serve(const char * endpoint, const char * cache_dir, int32_t n_threads, int32_t n_devices,
                               const int32_t * devices);

// Called with ggml's last words on whatever thread, right before ggml ends the process. NULL: to stderr.
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
    int32_t         vision_device; // index in mllama_device_get; -1: with the text's layers (first GPU if any is offloaded); -2: CPU
    const int32_t * devices;       // device indices to offload to; NULL: every GPU, RPC workers first
    int32_t         n_devices;
    const float *   tensor_split;  // share of each device, missing ones 0; NULL: by free memory
    int32_t         n_tensor_split;
    int32_t         main_gpu;      // which of these devices takes everything alone; -1: all of them share
    bool            use_mmap;
    bool            repack;        // copy text matrices to the CPU's own layouts: faster products, a slower load, no mmap for them
    const char *    repack_layouts; // which of them, with commas in between; NULL: "CPU_REPACK". See mllama_repack_product
    bool            allow_quantized_vision;
    bool            check_only;    // read and validate everything, load no weights (mllama info)
    bool            no_alloc;      // give everything its place but no memory: contexts can only mllama_reserve and say what it would be
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
    int32_t n_token_embd;   // rows of the embedding: the image token has one, and no logit
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
// Contexts made from the model must be freed first.
void                   mllama_model_free(mllama_model * model);
const mllama_hparams * mllama_model_hparams(const mllama_model * model);
// n_cross_layers layer indices, ascending.
const int32_t *        mllama_model_cross_layers(const mllama_model * model);
// How the tensors are named and spread over files: "canonical" (one file or two, written by our converter), "A" (two files of
// Ollama 0.4 to 0.6 and of the Hugging Face hub), "B" (one file of Ollama since 0.7), "text only", "unknown" (named as canonical).
const char *           mllama_model_layout(const mllama_model * model);
// What loading puts right or fills in, one line for each index from 0; NULL beyond the last.
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
    MLLAMA_KV_F16  = 1, // V lies in F32, with F16's values (at most 65504), on RPC workers and where the CPU computes with ggml's kernel
    MLLAMA_KV_Q8_0 = 8, // self-attention only; cross-attention then uses F16. V needs flash_attn
} mllama_kv_type;

typedef struct mllama_context_params {
    int32_t n_ctx;     // tokens; 0: what the model was trained with
    int32_t n_batch;   // most tokens computed at once
    int32_t n_threads; // CPU threads, 512 at most; 0: one for each CPU
    int32_t type_k;    // mllama_kv_type
    int32_t type_v;
    bool    flash_attn;
    bool    offload_kqv; // a layer's cache and attention are where the layer is; false: on the CPU
    const char * cpu_kernel; // see "kernels of the CPU" below; NULL: as MLLAMA_CPU_KERNEL says
    mllama_progress_callback progress;
    mllama_abort_callback    abort;
    void *                   user_data;
} mllama_context_params;

mllama_context_params mllama_context_default_params(void);
mllama_status mllama_context_new(const mllama_model * model, const mllama_context_params * params, mllama_context ** ctx);
void          mllama_context_free(mllama_context * ctx);
int32_t       mllama_n_ctx(const mllama_context * ctx);
const char *  mllama_kernel_name(const mllama_context * ctx); // that this context uses on the CPU; "off" without flash_attn
void          mllama_set_n_threads(mllama_context * ctx, int32_t n_threads);

// What a model and its context hold on one device, in bytes; with no_alloc, what they would hold.
typedef struct mllama_memory {
    const char * device;
    uint64_t     mapped;   // weights read in place from the file's pages, which the system may drop and read again
    uint64_t     weights;  // weights copied into the device's memory
    uint64_t     self_kv;  // the self-attention cache
    uint64_t     cross_kv; // all filled image slots
    uint64_t     compute;  // the text compute buffers, which grow with the largest batch and context so far
    uint64_t     vision;   // the most that encoding an image, or filling its slot, has taken while it ran
    uint64_t     staging;  // the host's memory while weights are copied, before any cache exists
} mllama_memory;
int32_t       mllama_memory_count(const mllama_context * ctx); // devices; 0 is the CPU
mllama_status mllama_memory_usage(const mllama_context * ctx, int32_t index, mllama_memory * memory);

// Allocates what a full context and one group of adjacent images need at most: the text compute buffers stay, the rest is
// given back, so that a device with too little memory says so now. n_images 0: text only. With no_alloc it only measures, and
// the slot of these images counts as filled.
mllama_status mllama_reserve(mllama_context * ctx, int32_t n_images, const int32_t * n_tiles);

// Picture -> cross_attention_states.
//   pixels  [n_tiles, 3, image_size, image_size] float32, normalised; only the used tiles
//   states  [n_tiles, n_positions, n_embd] float32, written
mllama_status mllama_encode(mllama_context * ctx, const float * pixels, int32_t n_tiles, int32_t aspect_ratio_id,
                            float * states);

// Fills a new slot of the cross-attention cache with one image, or with several directly adjacent ones, which later text
// sees together. states[i] is [n_tiles[i], n_positions, n_embd], or NULL: the rows of that image are not to be used until
// mllama_image_set has brought all of them. *slot >= 0 names it from then on.
mllama_status mllama_image_fill(mllama_context * ctx, int32_t n_images, const float * const * states,
                                const int32_t * n_tiles, int32_t * slot);
mllama_status mllama_image_free(mllama_context * ctx, int32_t slot);

// The bytes of one image with so many tiles, as mllama_image_get gives them, if a slot can have them from a file: where all of it is
// in the memory of this process. Else 0.
uint64_t mllama_image_mapped_size(const mllama_context * ctx, int32_t n_tiles);
// As mllama_image_fill, of one image whose bytes are in a file from `offset`, a multiple of 64. The file is mapped until the slot is
// freed: it may be removed meanwhile, but not changed.
mllama_status mllama_image_map(mllama_context * ctx, int32_t n_tiles, const char * path, uint64_t offset, int32_t * slot);

// What a slot holds of one of its images, to be kept and put into another slot: bytes in an order of our own, which depends
// on the cache types and on the devices that the layers are on, but neither on the slot nor on the other images in it.
mllama_status mllama_image_size(const mllama_context * ctx, int32_t slot, int32_t image, uint64_t * n_bytes);
// Copies n_bytes of them, the first offset left out; a few MiB at a time are fast enough.
mllama_status mllama_image_get(mllama_context * ctx, int32_t slot, int32_t image, uint64_t offset, uint64_t n_bytes, void * data);
mllama_status mllama_image_set(mllama_context * ctx, int32_t slot, int32_t image, uint64_t offset, uint64_t n_bytes,
                               const void * data);

typedef enum mllama_logits {
    MLLAMA_LOGITS_NONE = 0,
    MLLAMA_LOGITS_LAST = 1,
    MLLAMA_LOGITS_ALL  = 2,
} mllama_logits;

// Appends tokens to the conversation. All of them see the first n_visible images of the slot; slot -1: no image yet,
// the cross-attention layers are left out. logits: [1 or n_tokens, vocab_size] float32, or NULL with MLLAMA_LOGITS_NONE.
// logits_capacity is its size in floats. After an error the cache holds what it held before the call.
mllama_status mllama_decode(mllama_context * ctx, const int32_t * tokens, int32_t n_tokens, int32_t slot,
                            int32_t n_visible, int32_t logits_mode, float * logits, int64_t logits_capacity);

int32_t       mllama_n_past(const mllama_context * ctx);                    // tokens in the self-attention cache
mllama_status mllama_truncate(mllama_context * ctx, int32_t n_past);        // keep the first n_past tokens
void          mllama_clear(mllama_context * ctx);                           // forget tokens and images

// What the first n_tokens tokens left in the self-attention cache, for another context of the same settings: bytes, reading, and
// putting it in place of all tokens that are there.
uint64_t      mllama_past_size(const mllama_context * ctx, int32_t n_tokens);
mllama_status mllama_past_get(const mllama_context * ctx, int32_t n_tokens, uint64_t n_bytes, void * data);
mllama_status mllama_past_set(mllama_context * ctx, int32_t n_tokens, uint64_t n_bytes, const void * data);

// Shows any named intermediate tensor as float32 right after it is computed. Called first with data NULL: true asks for
// the values, which then come in a second call (ne: shape, fastest first), whose result is ignored.
typedef bool (*mllama_tap_callback)(const char * name, const int64_t * ne, const float * data, void * user_data);
void mllama_set_tap(mllama_context * ctx, mllama_tap_callback callback, void * user_data); // NULL: off

// ---- quantizing ---------------------------------------------------------------------------------------------------

// Converts n_rows rows of n_per_row values between two ggml types. src_type: any type that ggml can read as numbers;
// dst_type: F32, F16, BF16, Q4_0, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K or Q6_K; the blocks of both must divide n_per_row. src and
// dst hold n_rows rows of ggml's size for their type, src aligned for its values. MLLAMA_ERR_FILE: a value that is not
// finite, or too large for dst_type; dst then holds nothing of use. Safe from any number of threads.
mllama_status mllama_quantize_rows(int32_t src_type, const void * src, int32_t dst_type, void * dst, int64_t n_rows,
                                   int64_t n_per_row);

// ---- layouts of the CPU -------------------------------------------------------------------------------------------

// ggml's layouts of weights for faster products on this CPU, by index from 0; NULL beyond the last. "AMX" ends the process where
// the compiler of ggml has left out its set-up: try a layout other than "CPU_REPACK" in a process of its own before it is used.
const char *  mllama_repack_layout(int32_t index);
// One product, for such a trial: y [n_columns, n_out] of x [n_columns, n_in] and w [n_out, n_in], which becomes a matrix of a
// ggml type in that layout (NULL: the plain one). MLLAMA_ERR_ARGUMENT: the layout has no products of this type and size.
mllama_status mllama_repack_product(const char * layout, int32_t type, const float * w, const float * x, float * y, int32_t n_in,
                                    int32_t n_out, int32_t n_columns, int32_t n_threads);

// ---- kernels of the CPU -------------------------------------------------------------------------------------------

// This library has its own kernels for the CPU: the vision encoder's attention, linear layers and GELU, the text's attention to F32 and
// F16 caches, and its products with Q4_K and Q6_K weights. They need flash_attn. mllama_context_new chooses one for the life of the
// context: the one that mllama_context_params.cpu_kernel names, else the environment variable MLLAMA_CPU_KERNEL, else the best of the
// processor. Names: "avx512bf16", "avx512", "avx2", "portable", or "off" for ggml's operations alone.
const char *  mllama_cpu_kernel(void);                                     // what the environment gives now; NULL: no such kernel
mllama_status mllama_erf(const float * x, float * y, int64_t n);           // what GELU uses, for tests

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif
