#include "kernels/cpu_common.h"
#include "kernels/cpu_kernels.h"
#include "mllama.h"

#include "ggml-backend.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_HEAD_DIM = 128,
    QUERIES      = 48,  // in one block; its scores and sums stay in the second-level cache
    KEYS         = 128,
    GROUP        = 4,   // queries that go over the rows of a cache together
    ROWS_AT_ONCE = 16,  // of values; rows lie kilobytes apart, and the first-level cache has few places for them
    ROWS_TOGETHER = 32, // of a cache, where all heads go over them before the next ones
    SPLIT_KEYS   = 256, // rows that one thread takes where there are few queries
    FEW_TOKENS   = 4,
    COLUMNS      = 96,  // of x, in one task of a linear layer
    DEPTH        = 640, // factors of each in one pass
    MAX_WIDTH    = 32,  // of a panel
};
static const float NO_KEY = -1e30f; // score of a row that only fills a panel

// The first in the low half
typedef uint32_t bf16_pair __attribute__((may_alias));

typedef struct attend_args {
    const float * q;
    size_t        q_stride, out_stride; // bytes
    int64_t       n;                    // queries
    int64_t       head_dim;
    float         scale;
    const float * k;                    // panels of keys: [width] added to the scores, then [head_dim][width], or of pairs half as many
    const float * v;                    // [n_keys][head_dim rounded up to whole vectors], or pairs of two keys
    int64_t       n_keys;
    float *       out;
} attend_args;

typedef struct linear_args {
    const float * x;                    // [n][n_in] in rows of x_stride bytes
    size_t        x_stride;
    int64_t       n, n_in, n_out;
    const float * w;                    // panels of outputs: [width] to begin with, then [n_in][width], or pairs
    float *       out;                  // [n][n_out] in rows of out_stride values
    int64_t       out_stride;
} linear_args;

// Queries of some heads of K and V over rows of their cache
typedef struct rows_args {
    const float *       q;        // query i of head h is head h * group + i % group of token i / group
    size_t              q_stride; // bytes from token to token
    int64_t             n_heads;
    int64_t             n, group; // queries of each head
    int64_t             head_dim;
    float               scale;
    const char *        k, * v;
    const char *        k_then, * v_then;   // what will be read after these: fetched meanwhile
    bool                fetched;            // and so were these
    size_t              k_stride, v_stride; // bytes from row to row
    bool                k_half, v_half;     // F16, else F32
    int64_t             n_keys;
    const ggml_fp16_t * mask;     // a row for each token: 0, or -inf for a key that it does not see; or NULL
    size_t              mask_stride;
    float *             part;     // [n_heads][n][2 + head_dim]: largest score, sum, sums of values; NULL: the result goes to out
    float *             out;      // as q
    size_t              out_stride;
} rows_args;

#define KERNEL(name) name##_portable
#define TARGET
#define LANES 4
#if defined(__aarch64__)
#define ROWS 6
#define VECTORS 4
#else
#define ROWS 6
#define VECTORS 2
#endif
typedef float   v4f __attribute__((vector_size(16)));
typedef int32_t v4i __attribute__((vector_size(16)));
static inline v4f max4(v4f a, v4f b) {
    const v4i mask = a > b;
    return (v4f) (((v4i) a & mask) | ((v4i) b & ~mask));
}
#define VMAX(a, b) max4(a, b)
// Through the exponents: a number that is not finite becomes a large one.
static inline v4f widen4(const ggml_fp16_t * p) {
    v4f x;
    for (int i = 0; i < 4; i++) {
        union { uint32_t u; float f; } a = { .u = (uint32_t) (p[i] & 0x7fff) << 13 }, b;
        b.f = a.f * 0x1p112f;
        b.u |= (uint32_t) (p[i] & 0x8000) << 16;
        x[i] = b.f;
    }
    return x;
}
#define WIDEN(p) widen4(p)
static inline v4f totals4(v4f a, v4f b, v4f c, v4f d) {
    return (v4f) { a[0] + a[1] + a[2] + a[3], b[0] + b[1] + b[2] + b[3], c[0] + c[1] + c[2] + c[3], d[0] + d[1] + d[2] + d[3] };
}
#define TOTALS(a, b, c, d) totals4(a, b, c, d)
#include "kernels/cpu_kernels_simd.h"

static bool always(void) {
    return true;
}

#if defined(__x86_64__)
#include <immintrin.h>

#define KERNEL(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#define ROWS 6
#define VECTORS 2
#define VMAX(a, b) _mm256_max_ps(a, b)
#define WIDEN(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (p)))
__attribute__((target("avx2"))) static inline __m128 totals8(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}
#define TOTALS(a, b, c, d) totals8(a, b, c, d)
#include "kernels/cpu_kernels_simd.h"

#define KERNEL(name) name##_avx512
#define TARGET __attribute__((target("avx512f")))
#define LANES 16
#define ROWS 12
#define VECTORS 2
#define VMAX(a, b) _mm512_max_ps(a, b)
#define WIDEN(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) (p)))
__attribute__((target("avx512f"))) static inline __m128 totals16(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512  ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); // a, b, a, b in every quarter
    const __m512  cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512  sums = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee)); // a, b, c, d in every quarter
    const __m256  half = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(sums), 1)));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#define TOTALS(a, b, c, d) totals16(a, b, c, d)
#include "kernels/cpu_kernels_simd.h"

#if defined(__clang__) || __GNUC__ >= 10 // older compilers do not know the instructions
#define WITH_BF16
#define KERNEL(name) name##_avx512bf16
#define TARGET __attribute__((target("avx512f,avx512bf16")))
#define LANES 16
#define ROWS 12
#define VECTORS 2
#define VMAX(a, b) _mm512_max_ps(a, b)
#define PAIRS 1
#define MULTIPLY_ADD(sum, a, p) \
    ((vf) _mm512_dpbf16_ps((__m512) (sum), (__m512bh) _mm512_set1_epi32((int) (a)), (__m512bh) _mm512_loadu_si512(p)))
#define NARROW(p, q) \
    _mm512_storeu_si512(q, (__m512i) _mm512_cvtne2ps_pbh(_mm512_loadu_ps((p) + 16), _mm512_loadu_ps(p)))
#include "kernels/cpu_kernels_simd.h"
#endif

static bool has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

static bool has_avx512(void) {
    return __builtin_cpu_supports("avx512f");
}

#ifdef WITH_BF16
static bool has_avx512bf16(void) {
    return has_avx512() && __builtin_cpu_supports("avx512bf16");
}
#endif
#endif

struct cpu_kernel {
    const char * name;
    bool      (* supported)(void);
    int64_t      lanes;
    int64_t      width; // keys in a panel
    bool         multiplies; // linear layers too: with vectors of 4, ggml's are the better ones
    void      (* attend)(const attend_args * args);
    void      (* attend_rows)(const rows_args * args);
    void      (* linear)(const linear_args * args);
    void      (* bias_gelu)(float * x, const float * bias, int64_t n);
    void      (* erf_array)(const float * x, float * y, int64_t n);
    void      (* attend_bf16)(const attend_args * args); // factors rounded to BF16, products and sums in F32; or NULL
    void      (* linear_bf16)(const linear_args * args);
};

static const cpu_kernel KERNELS[] = { // the best first
#if defined(__x86_64__)
#ifdef WITH_BF16
    { "avx512bf16", has_avx512bf16, 16, WIDTH_avx512, true, attend_avx512, attend_rows_avx512, linear_avx512, bias_gelu_avx512,
      erf_array_avx512, attend_avx512bf16, linear_avx512bf16 },
#endif
    { "avx512", has_avx512, 16, WIDTH_avx512, true, attend_avx512, attend_rows_avx512, linear_avx512, bias_gelu_avx512, erf_array_avx512, NULL, NULL },
    { "avx2", has_avx2, 8, WIDTH_avx2, true, attend_avx2, attend_rows_avx2, linear_avx2, bias_gelu_avx2, erf_array_avx2, NULL, NULL },
#endif
    { "portable", always, 4, WIDTH_portable, false, attend_portable, attend_rows_portable, linear_portable, bias_gelu_portable, erf_array_portable, NULL,
      NULL },
};
enum { N_KERNELS = sizeof(KERNELS) / sizeof(KERNELS[0]) };

mllama_status cpu_kernel_choose(const char * name, const cpu_kernel ** kernel) {
    const bool   given  = name && *name;
    const char * wanted = given ? name : getenv("MLLAMA_CPU_KERNEL");
    const char * by     = given ? "cpu_kernel" : "MLLAMA_CPU_KERNEL";
    *kernel = NULL;
    if (wanted && strcmp(wanted, "off") == 0) {
        return MLLAMA_OK;
    }
    for (int i = 0; i < N_KERNELS; i++) {
        if (wanted && *wanted ? strcmp(wanted, KERNELS[i].name) == 0 : KERNELS[i].supported()) {
            if (!KERNELS[i].supported()) {
                return fail(MLLAMA_ERR_ARGUMENT, "%s is %s, which this processor does not have; unset it", by, wanted);
            }
            *kernel = &KERNELS[i];
            return MLLAMA_OK;
        }
    }
    return fail(MLLAMA_ERR_ARGUMENT, "%s is '%s'; it can be avx512bf16, avx512, avx2, portable or off", by, wanted);
}

const char * cpu_kernel_name(const cpu_kernel * kernel) {
    return kernel ? kernel->name : "off";
}

int64_t cpu_kernel_lanes(const cpu_kernel * kernel) {
    return kernel->lanes;
}

bool cpu_kernel_has_bf16(const cpu_kernel * kernel) {
    return kernel && kernel->attend_bf16;
}

bool cpu_kernel_has_head_dim(int64_t head_dim) {
    return head_dim % 8 == 0 && head_dim >= 8 && head_dim <= MAX_HEAD_DIM;
}

// ---- attention ----------------------------------------------------------------------------------------------------

// Real keys fill their panels first, so that a query can stop after them.
static int64_t padded_keys(const cpu_attention * a, bool only_real) {
    const int64_t width = a->kernel->width;
    return round_up(a->n_real, width) + (only_real ? 0 : round_up(a->n_all - a->n_real, width));
}

static int64_t value_size(const cpu_attention * a) {
    return round_up(a->head_dim, a->kernel->lanes);
}

static int64_t per_factor(bool bf16) {
    return bf16 ? 2 : 1;
}

// In floats; pairs take the place of one
static int64_t packed_keys_size(const cpu_attention * a) {
    return padded_keys(a, false) * (1 + a->head_dim / per_factor(a->bf16));
}

static int64_t packed_head_size(const cpu_attention * a) {
    return packed_keys_size(a) + padded_keys(a, false) * value_size(a) / per_factor(a->bf16);
}

static const float * row_of(const struct ggml_tensor * t, int64_t row, int64_t head, int64_t head_dim) {
    return (const float *) ((const char *) t->data + (size_t) row * t->nb[1]) + head * head_dim;
}

// What is added to the scores of a key: they are exponents of 2, so this makes it count several times.
static float key_bonus(const cpu_attention * a, int64_t row) {
    for (int i = 0; i < 2; i++) {
        if (row >= a->repeated[i][0] && row < a->repeated[i][1]) {
            return log2f(a->repeats);
        }
    }
    return 0.0f;
}

// One panel of one head: k and v of `width` keys from row `first` on, of which those below `end` exist
static void pack_panel(const cpu_attention * a, const struct ggml_tensor * k, const struct ggml_tensor * v, int64_t head, int64_t first,
                       int64_t end, float * k_out, float * v_out) {
    const int64_t width = a->kernel->width, dim = a->head_dim, v_size = value_size(a);
    for (int64_t j = 0; j < width; j++) {
        k_out[j] = first + j < end ? key_bonus(a, first + j) : NO_KEY;
    }
    k_out += width;
    memset(v_out, 0, sizeof(float) * (size_t) (width * v_size / per_factor(a->bf16)));
    for (int64_t j = 0; j < width; j++) {
        if (first + j >= end) {
            for (int64_t i = 0; i < dim / per_factor(a->bf16); i++) {
                k_out[i * width + j] = 0.0f;
            }
            continue;
        }
        const float * k_row = row_of(k, first + j, head, dim), * v_row = row_of(v, first + j, head, dim);
        if (!a->bf16) {
            for (int64_t i = 0; i < dim; i++) {
                k_out[i * width + j] = k_row[i];
            }
            memcpy(v_out + j * v_size, v_row, sizeof(float) * (size_t) dim);
            continue;
        }
        ggml_bf16_t row[MAX_HEAD_DIM];
        ggml_fp32_to_bf16_row(k_row, row, dim);
        for (int64_t i = 0; i < dim / 2; i++) {
            memcpy(k_out + i * width + j, row + 2 * i, sizeof(bf16_pair));
        }
        ggml_fp32_to_bf16_row(v_row, row, dim);
        for (int64_t i = 0; i < dim; i++) {
            ((ggml_bf16_t *) v_out)[2 * (j / 2 * v_size + i) + j % 2] = row[i];
        }
    }
}

// dst [packed_head_size, n_head] from k and v
static void pack(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    const cpu_attention * a      = userdata;
    const int64_t         width  = a->kernel->width, n_keys = padded_keys(a, false), n_first = padded_keys(a, true);
    const int64_t         panels = n_keys / width, n = panels * a->n_head;
    for (int64_t i = n * ith / nth; i < n * (ith + 1) / nth; i++) {
        const int64_t head = i / panels, at = i % panels * width;
        float *       k_out = (float *) dst->data + head * packed_head_size(a);
        float *       v_out = k_out + packed_keys_size(a);
        const bool    real  = at < n_first;
        pack_panel(a, dst->src[0], dst->src[1], head, real ? at : a->n_real + at - n_first, real ? a->n_real : a->n_all,
                   k_out + at * (1 + a->head_dim / per_factor(a->bf16)), v_out + at * value_size(a) / per_factor(a->bf16));
    }
}

static void attend_block(const cpu_attention * a, struct ggml_tensor * dst, int64_t head, int64_t first, int64_t end, bool only_real) {
    const struct ggml_tensor * q = dst->src[0];
    const float *              k = (const float *) dst->src[1]->data + head * packed_head_size(a);
    const attend_args          args = {
        .q          = row_of(q, first, head, a->head_dim),
        .q_stride   = q->nb[1],
        .out_stride = dst->nb[1],
        .n          = end - first,
        .head_dim   = a->head_dim,
        .scale      = 1.44269504f / sqrtf((float) a->head_dim), // log2(e): scores are exponents of 2
        .k          = k,
        .v          = k + packed_keys_size(a),
        .n_keys     = padded_keys(a, only_real),
        .out        = (float *) ((char *) dst->data + (size_t) first * dst->nb[1]) + head * a->head_dim,
    };
    (a->bf16 ? a->kernel->attend_bf16 : a->kernel->attend)(&args);
}

static void attend(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    cpu_attention * a       = userdata;
    const int64_t   n_real  = dst->ne[1] < a->n_real ? dst->ne[1] : a->n_real, n_pad = dst->ne[1] - n_real;
    const int64_t   blocks_real = (n_real + QUERIES - 1) / QUERIES, blocks = blocks_real + (n_pad + QUERIES - 1) / QUERIES;
    const int64_t   n       = blocks * a->n_head;
    (void) nth;
    for (;;) {
        if (ith == 0 && a->stop && a->stop(a->stop_data)) {
            atomic_store(&a->stopped, true);
        }
        const int64_t i = atomic_fetch_add(&a->next, 1);
        if (i >= n || atomic_load(&a->stopped)) {
            return;
        }
        const int64_t head = i / blocks, block = i % blocks;
        if (block < blocks_real) {
            const int64_t first = block * QUERIES;
            attend_block(a, dst, head, first, first + QUERIES < n_real ? first + QUERIES : n_real, false);
        } else {
            const int64_t first = n_real + (block - blocks_real) * QUERIES;
            attend_block(a, dst, head, first, first + QUERIES < dst->ne[1] ? first + QUERIES : dst->ne[1], true);
        }
    }
}

struct ggml_tensor * cpu_attention_node(struct ggml_context * ctx, cpu_attention * a, struct ggml_tensor * q, struct ggml_tensor * k,
                                        struct ggml_tensor * v) {
    struct ggml_tensor * packed = ggml_custom_4d(ctx, GGML_TYPE_F32, packed_head_size(a), a->n_head, 1, 1,
                                                 (struct ggml_tensor *[]) { k, v }, 2, pack, GGML_N_TASKS_MAX, a);
    return ggml_custom_4d(ctx, GGML_TYPE_F32, q->ne[0], q->ne[1], 1, 1, (struct ggml_tensor *[]) { q, packed }, 2, attend,
                          GGML_N_TASKS_MAX, a);
}

// ---- attention to a cache -----------------------------------------------------------------------------------------

static bool is_float(enum ggml_type type) {
    return type == GGML_TYPE_F16 || type == GGML_TYPE_F32;
}

static bool is_in_memory(const struct ggml_tensor * t) {
    return t->buffer && ggml_backend_buffer_is_host(t->buffer);
}

// Queries of one token that share a head of K and V
static int64_t group_size(const cpu_cache_attention * a) {
    return a->n_head / a->n_head_kv;
}

bool cpu_cache_attention_has(const cpu_cache_attention * a, enum ggml_type k, enum ggml_type v) {
    return a->kernel && cpu_kernel_has_head_dim(a->head_dim) && group_size(a) <= QUERIES && is_float(k) && is_float(v);
}

bool cpu_cache_attention_fits(const cpu_cache_attention * a, const struct ggml_tensor * k, const struct ggml_tensor * v) {
    return cpu_cache_attention_has(a, k->type, v->type) && is_in_memory(k) && is_in_memory(v);
}

static int64_t block_tokens(const cpu_cache_attention * a) {
    return QUERIES / group_size(a);
}

static int64_t n_blocks(const cpu_cache_attention * a, int64_t n_tokens) {
    return (n_tokens + block_tokens(a) - 1) / block_tokens(a);
}

static int64_t part_size(const cpu_cache_attention * a) {
    return 2 + a->head_dim;
}

// Heads of K and V that go over rows together, so that these are read from memory one after the other: all or one
static int64_t heads_together(const cpu_cache_attention * a, int64_t n_tokens) {
    return n_tokens <= FEW_TOKENS && a->n_head_kv * round_up(n_tokens * group_size(a), GROUP) <= QUERIES ? a->n_head_kv : 1;
}

// What one thread does at a time: a block of queries of some heads over the rows [first, end)
typedef struct cache_task {
    int64_t head, n_heads, block, split, first, end;
} cache_task;

static int64_t n_tasks(const cpu_cache_attention * a, int64_t n_tokens) {
    return a->n_head_kv / heads_together(a, n_tokens) * n_blocks(a, n_tokens) * a->n_splits;
}

static cache_task task_of(const cpu_cache_attention * a, int64_t n_tokens, int64_t i) {
    const int64_t heads = heads_together(a, n_tokens), parts = a->n_head_kv / heads, blocks = n_blocks(a, n_tokens);
    cache_task    t     = { .head = i % parts * heads, .n_heads = heads, .block = i / parts % blocks, .split = i / parts / blocks, .end = a->n_rows };
    if (a->n_splits > 1) {
        t.first = t.split * SPLIT_KEYS;
        t.end   = t.first + SPLIT_KEYS < a->n_rows ? t.first + SPLIT_KEYS : a->n_rows;
    }
    return t;
}

// The first row of a task, in its heads
static const char * rows_of(const struct ggml_tensor * cache, const cpu_cache_attention * a, cache_task t) {
    return (const char *) cache->data + (size_t) t.first * cache->nb[1] + (size_t) (t.head * a->head_dim) * cache->nb[0];
}

// `then` comes after it, and its first rows are there already if it came after another.
static void attend_cache_task(const cpu_cache_attention * a, struct ggml_tensor * dst, cache_task t, cache_task then, bool fetched) {
    const struct ggml_tensor * q = dst->src[0], * k = dst->src[1], * v = dst->src[2], * mask = dst->src[3];
    const int64_t   token = t.block * block_tokens(a), left = q->ne[1] - token;
    const int64_t   n     = (left < block_tokens(a) ? left : block_tokens(a)) * group_size(a);
    const size_t    at    = (size_t) (t.head * group_size(a) * a->head_dim) * sizeof(float); // in a row of q and of dst
    float *         part  = (float *) ((char *) dst->data + (size_t) (t.split * a->n_head_kv + t.head) * dst->nb[3] + (size_t) token * dst->nb[2]);
    const rows_args args  = {
        .q           = (const float *) ((const char *) q->data + (size_t) token * q->nb[1] + at),
        .q_stride    = q->nb[1],
        .n_heads     = t.n_heads,
        .n           = n,
        .group       = group_size(a),
        .head_dim    = a->head_dim,
        .scale       = 1.44269504f / sqrtf((float) a->head_dim), // log2(e): scores are exponents of 2
        .k           = rows_of(k, a, t),
        .v           = rows_of(v, a, t),
        .k_then      = rows_of(k, a, then),
        .v_then      = rows_of(v, a, then),
        .fetched     = fetched,
        .k_stride    = k->nb[1],
        .v_stride    = v->nb[1],
        .k_half      = k->type == GGML_TYPE_F16,
        .v_half      = v->type == GGML_TYPE_F16,
        .n_keys      = t.end - t.first,
        .mask        = mask ? (const ggml_fp16_t *) ((const char *) mask->data + (size_t) token * mask->nb[1]) + t.first : NULL,
        .mask_stride = mask ? mask->nb[1] : 0,
        .part        = a->n_splits > 1 ? part : NULL,
        .out         = (float *) ((char *) dst->data + (size_t) token * dst->nb[1] + at),
        .out_stride  = dst->nb[1],
    };
    a->kernel->attend_rows(&args);
}

// dst: as q, or with splits [part_size, group, n_tokens, n_head_kv * n_splits]
static void attend_cache(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    cpu_cache_attention * a        = userdata;
    const int64_t         n_tokens = dst->src[0]->ne[1], n = n_tasks(a, n_tokens);
    bool                  fetched  = false;
    (void) nth;
    for (int64_t i = atomic_fetch_add(&a->next, 1), then; i < n; i = then, fetched = true) {
        if (ith == 0 && a->stop && a->stop(a->stop_data)) {
            atomic_store(&a->stopped, true);
        }
        if (atomic_load(&a->stopped)) {
            return;
        }
        then = atomic_fetch_add(&a->next, 1);
        attend_cache_task(a, dst, task_of(a, n_tokens, i), task_of(a, n_tokens, then < n ? then : i), fetched);
    }
}

// dst [n_embd, n_tokens] from the parts of all splits
static void join_splits(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    const cpu_cache_attention * a     = userdata;
    const struct ggml_tensor *  parts = dst->src[0];
    const int64_t               n     = dst->ne[1] * a->n_head;
    for (int64_t i = n * ith / nth; i < n * (ith + 1) / nth; i++) {
        const int64_t token = i / a->n_head, head = i % a->n_head, group = group_size(a);
        const char *  first = (const char *) parts->data + (size_t) (head / group) * parts->nb[3] + (size_t) token * parts->nb[2] +
                             (size_t) (head % group) * parts->nb[1];
        const size_t  step = parts->nb[3] * (size_t) a->n_head_kv;
        float *       out  = (float *) ((char *) dst->data + (size_t) token * dst->nb[1]) + head * a->head_dim;
        float         top  = NO_KEY, sum = 0.0f;
        for (int64_t s = 0; s < a->n_splits; s++) {
            top = fmaxf(top, *(const float *) (first + (size_t) s * step));
        }
        memset(out, 0, sizeof(float) * (size_t) a->head_dim);
        for (int64_t s = 0; s < a->n_splits; s++) {
            const float * part   = (const float *) (first + (size_t) s * step);
            const float   factor = exp2f(part[0] - top);
            sum += factor * part[1];
            for (int64_t j = 0; j < a->head_dim; j++) {
                out[j] += factor * part[2 + j];
            }
        }
        for (int64_t j = 0; j < a->head_dim; j++) {
            out[j] /= sum;
        }
    }
}

struct ggml_tensor * cpu_cache_attention_node(struct ggml_context * ctx, cpu_cache_attention * a, struct ggml_tensor * q,
                                              struct ggml_tensor * k, struct ggml_tensor * v, struct ggml_tensor * mask) {
    const int64_t n = q->ne[1];
    a->n_splits = n <= FEW_TOKENS ? (a->n_rows + SPLIT_KEYS - 1) / SPLIT_KEYS : 1;
    struct ggml_tensor * src[] = { q, k, v, mask };
    if (a->n_splits == 1) {
        return ggml_custom_4d(ctx, GGML_TYPE_F32, q->ne[0], n, 1, 1, src, mask ? 4 : 3, attend_cache, GGML_N_TASKS_MAX, a);
    }
    struct ggml_tensor * parts = ggml_custom_4d(ctx, GGML_TYPE_F32, part_size(a), group_size(a), n, a->n_head_kv * a->n_splits, src,
                                                mask ? 4 : 3, attend_cache, GGML_N_TASKS_MAX, a);
    return ggml_custom_4d(ctx, GGML_TYPE_F32, q->ne[0], n, 1, 1, (struct ggml_tensor *[]) { parts }, 1, join_splits, GGML_N_TASKS_MAX, a);
}

void cpu_cache_attention_reset(cpu_cache_attention * a) {
    atomic_store(&a->next, 0);
    atomic_store(&a->stopped, false);
}

// ---- linear layers ------------------------------------------------------------------------------------------------

enum { PIECE = 64 }; // values of a row that are widened at a time

// Whether ggml's CPU backend was built with these instructions, and the processor has them
static bool ggml_has(const char * name) {
    const ggml_backend_dev_t            cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    const ggml_backend_reg_t            reg = ggml_backend_dev_backend_reg(cpu);
    const ggml_backend_get_features_t   get = (ggml_backend_get_features_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_get_features");
    for (struct ggml_backend_feature * f = get ? get(reg) : NULL; f && f->name; f++) {
        if (strcmp(f->name, name) == 0) {
            return strcmp(f->value, "1") == 0;
        }
    }
    return false;
}

// Whether factors are rounded to BF16, as the weights are already
static bool in_bf16(const cpu_kernel * kernel, const struct ggml_tensor * weight) {
    return kernel->linear_bf16 && weight->type == GGML_TYPE_BF16 && weight->ne[0] % 2 == 0;
}

bool cpu_linear_supported(const cpu_kernel * kernel, const struct ggml_tensor * weight) {
    const ggml_backend_buffer_t buffer = weight->view_src ? weight->view_src->buffer : weight->buffer;
    if (!kernel || !kernel->multiplies || !buffer || !ggml_backend_buffer_is_host(buffer)) {
        return false;
    }
    switch (weight->type) {
        case GGML_TYPE_BF16: return in_bf16(kernel, weight) || !ggml_has("AVX512_BF16");
        case GGML_TYPE_F16:
        case GGML_TYPE_F32:  return true;
        default:             return false;
    }
}

// out [n_in][width] from `width` rows of the weight, from row `first` on; those that do not exist are 0
static void pack_floats(const struct ggml_tensor * w, int64_t first, int64_t width, float * out) {
    const int64_t         n_in  = w->ne[0];
    const ggml_to_float_t widen = ggml_get_type_traits(w->type)->to_float;
    const size_t          item  = ggml_type_size(w->type);
    float                 rows[MAX_WIDTH][PIECE];
    for (int64_t at = 0; at < n_in; at += PIECE) {
        const int64_t n = n_in - at < PIECE ? n_in - at : PIECE;
        for (int64_t j = 0; j < width; j++) {
            const int64_t row = first + j;
            const char *  in  = (const char *) w->data + (size_t) row * w->nb[1] + (size_t) at * item;
            if (row >= w->ne[1]) {
                memset(rows[j], 0, sizeof(rows[j]));
            } else if (widen) {
                widen(in, rows[j], n);
            } else {
                memcpy(rows[j], in, (size_t) n * sizeof(float));
            }
        }
        for (int64_t i = 0; i < n; i++, out += width) {
            for (int64_t j = 0; j < width; j++) {
                out[j] = rows[j][i];
            }
        }
    }
}

// The same of BF16 as it is: [n_in / 2][width] pairs
static void pack_pairs(const struct ggml_tensor * w, int64_t first, int64_t width, float * out) {
    static const bf16_pair zero = 0;
    for (int64_t i = 0; i < w->ne[0] / 2; i++, out += width) {
        for (int64_t j = 0; j < width; j++) {
            const char * in = (const char *) w->data + (size_t) (first + j) * w->nb[1] + (size_t) i * sizeof(bf16_pair);
            memcpy(out + j, first + j < w->ne[1] ? (const void *) in : &zero, sizeof(bf16_pair));
        }
    }
}

// dst [width * (1 + n_in or, of pairs, n_in / 2), panels] from the weight and, as what the sums begin with, the bias
static void pack_weight(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    const cpu_linear *         a      = userdata;
    const struct ggml_tensor * w      = dst->src[0];
    const struct ggml_tensor * bias   = dst->src[1];
    const int64_t              width  = a->kernel->width, n_out = w->ne[1];
    for (int64_t p = dst->ne[1] * ith / nth; p < dst->ne[1] * (ith + 1) / nth; p++) {
        float * out = (float *) ((char *) dst->data + (size_t) p * dst->nb[1]);
        for (int64_t j = 0; j < width; j++) {
            const int64_t row = p * width + j;
            out[j] = bias && row < n_out ? ((const float *) bias->data)[row] : 0.0f;
        }
        if (a->bf16) {
            pack_pairs(w, p * width, width, out + width);
        } else {
            pack_floats(w, p * width, width, out + width);
        }
    }
}

// out [n][n_out] = W x + b or gelu of it, for n rows of x
static void multiply_rows(const cpu_linear * a, const float * x, size_t x_stride, int64_t n, const struct ggml_tensor * packed, float * out) {
    const linear_args args = {
        .x = x, .x_stride = x_stride, .n = n, .n_in = a->n_in, .n_out = a->n_out, .w = packed->data, .out = out, .out_stride = a->n_out,
    };
    (a->bf16 ? a->kernel->linear_bf16 : a->kernel->linear)(&args);
    for (int64_t i = 0; a->gelu && i < n; i++) {
        a->kernel->bias_gelu(out + i * a->n_out, NULL, a->n_out);
    }
}

// One linear layer, or two: then a block's values between them stay in the thread's row of dst->src[3].
static void multiply(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    cpu_linear *               a = userdata;
    const struct ggml_tensor * x = dst->src[0];
    const int64_t              n = x->ne[1], share = n / (4 * nth); // small enough that all threads end together
    const int64_t              step = share < QUERIES ? QUERIES : share > COLUMNS ? COLUMNS : share / QUERIES * QUERIES;
    if (a->then && ith >= dst->src[3]->ne[1]) {
        return;
    }
    for (;;) {
        if (ith == 0 && a->stop && a->stop(a->stop_data)) {
            atomic_store(&a->stopped, true);
        }
        const int64_t first = atomic_fetch_add(&a->next, step);
        if (first >= n || atomic_load(&a->stopped)) {
            return;
        }
        const int64_t some = n - first < step ? n - first : step;
        const float * in   = (const float *) ((const char *) x->data + (size_t) first * x->nb[1]);
        float *       out  = (float *) ((char *) dst->data + (size_t) first * dst->nb[1]);
        if (a->then) {
            float * between = (float *) ((char *) dst->src[3]->data + (size_t) ith * dst->src[3]->nb[1]);
            multiply_rows(a, in, x->nb[1], some, dst->src[1], between);
            multiply_rows(a->then, between, sizeof(float) * (size_t) a->n_out, some, dst->src[2], out);
        } else {
            multiply_rows(a, in, x->nb[1], some, dst->src[1], out);
        }
    }
}

static struct ggml_tensor * pack_node(struct ggml_context * ctx, cpu_linear * a, struct ggml_tensor * weight, struct ggml_tensor * bias) {
    const int64_t width = a->kernel->width;
    a->bf16  = in_bf16(a->kernel, weight);
    a->n_in  = weight->ne[0];
    a->n_out = weight->ne[1];
    return ggml_custom_4d(ctx, GGML_TYPE_F32, width * (1 + a->n_in / per_factor(a->bf16)), round_up(a->n_out, width) / width, 1, 1,
                          (struct ggml_tensor *[]) { weight, bias }, bias ? 2 : 1, pack_weight, GGML_N_TASKS_MAX, a);
}

struct ggml_tensor * cpu_linear_node(struct ggml_context * ctx, cpu_linear * a, struct ggml_tensor * weight, struct ggml_tensor * bias,
                                     struct ggml_tensor * x) {
    struct ggml_tensor * src[] = { x, pack_node(ctx, a, weight, bias) };
    return ggml_custom_4d(ctx, GGML_TYPE_F32, a->n_out, x->ne[1], 1, 1, src, 2, multiply, GGML_N_TASKS_MAX, a);
}

static void nothing(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) dst, (void) ith, (void) nth, (void) userdata;
}

struct ggml_tensor * cpu_mlp_node(struct ggml_context * ctx, cpu_linear * a, struct ggml_tensor * fc1, struct ggml_tensor * fc1_b,
                                  cpu_linear * b, struct ggml_tensor * fc2, struct ggml_tensor * fc2_b, struct ggml_tensor * x,
                                  int64_t n_threads) {
    a->gelu = true;
    a->then = b;
    struct ggml_tensor * between = ggml_custom_4d(ctx, GGML_TYPE_F32, COLUMNS * fc1->ne[1], n_threads, 1, 1, NULL, 0, nothing, 1, NULL);
    struct ggml_tensor * src[]   = { x, pack_node(ctx, a, fc1, fc1_b), pack_node(ctx, b, fc2, fc2_b), between };
    return ggml_custom_4d(ctx, GGML_TYPE_F32, b->n_out, x->ne[1], 1, 1, src, 4, multiply, GGML_N_TASKS_MAX, a);
}

// ---- rows of the intermediate outputs -----------------------------------------------------------------------------

static void interleave(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    const int64_t n_values = dst->src[0]->ne[0], n = dst->ne[0] / n_values - 1;
    (void) userdata;
    for (int64_t row = dst->ne[1] * ith / nth; row < dst->ne[1] * (ith + 1) / nth; row++) {
        float * out = (float *) ((char *) dst->data + (size_t) row * dst->nb[1]);
        memcpy(out, (const char *) dst->src[0]->data + (size_t) row * dst->src[0]->nb[1], (size_t) n_values * sizeof(float));
        out += n_values;
        for (int64_t i = 0; i < n; i++) {
            const float * in = (const float *) ((const char *) dst->src[1 + i]->data + (size_t) row * dst->src[1 + i]->nb[1]);
            for (int64_t j = 0; j < n_values; j++) {
                out[j * n + i] = in[j];
            }
        }
    }
}

struct ggml_tensor * cpu_interleave_node(struct ggml_context * ctx, struct ggml_tensor ** tensors, int64_t n) {
    return ggml_custom_4d(ctx, GGML_TYPE_F32, n * tensors[0]->ne[0], tensors[0]->ne[1], 1, 1, tensors, (int) n, interleave,
                          GGML_N_TASKS_MAX, NULL);
}

// ---- bias and GELU ------------------------------------------------------------------------------------------------

static void bias_gelu(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    const cpu_kernel * kernel = userdata;
    const int64_t      n      = dst->ne[1];
    for (int64_t i = n * ith / nth; i < n * (ith + 1) / nth; i++) {
        kernel->bias_gelu((float *) ((char *) dst->data + (size_t) i * dst->nb[1]), dst->src[1]->data, dst->ne[0]);
    }
}

struct ggml_tensor * cpu_bias_gelu_node(struct ggml_context * ctx, const cpu_kernel * kernel, struct ggml_tensor * x,
                                        struct ggml_tensor * bias) {
    return ggml_custom_inplace(ctx, x, (struct ggml_tensor *[]) { bias }, 1, bias_gelu, GGML_N_TASKS_MAX, (void *) (uintptr_t) kernel);
}

// ---- for tests ----------------------------------------------------------------------------------------------------

const char * mllama_cpu_kernel(void) {
    const cpu_kernel * kernel = NULL;
    return cpu_kernel_choose(NULL, &kernel) == MLLAMA_OK ? cpu_kernel_name(kernel) : NULL;
}

mllama_status mllama_erf(const float * x, float * y, int64_t n) {
    const cpu_kernel * kernel = NULL;
    TRY(cpu_kernel_choose(NULL, &kernel));
    if (!kernel || !x || !y || n < 0) {
        return fail(MLLAMA_ERR_ARGUMENT, "mllama_erf: no kernel or no array");
    }
    kernel->erf_array(x, y, n);
    return MLLAMA_OK;
}
