// Products of the text model's quantized weights on the CPU, faster than ggml's, as custom operations of the graphs: Q4_K and
// Q6_K in memory, as the file has them, with AVX512-VNNI. Columns are rounded to 8 bits, 256 values at a time, as ggml does.
#pragma once

#include "kernels/cpu_kernels.h"

// What one product needs while its graph lives. It is computed at most once at a time.
typedef struct cpu_product {
    bool      (* stop)(void *); // asked on the calling thread; true: leave, the result does not matter
    void *       stop_data;
    atomic_llong next;          // task to be done
    atomic_bool  stopped;
} cpu_product;

bool                 cpu_product_supported(const cpu_kernel * kernel, const struct ggml_tensor * weight);
// x [n_in, n] in contiguous rows -> rounded, for cpu_product_node alone
struct ggml_tensor * cpu_quantize_node(struct ggml_context * ctx, struct ggml_tensor * x);
// weight [n_in, n_out], x [n_in, n] from cpu_quantize_node -> W x [n_out, n]. `a` must live as long as the graph.
struct ggml_tensor * cpu_product_node(struct ggml_context * ctx, cpu_product * a, struct ggml_tensor * weight,
                                      struct ggml_tensor * quantized, int64_t n);
void                 cpu_product_reset(cpu_product * a); // before each time that the graph is computed
