// Comparing with a reference in double precision, and what the tests share.
//
// A bound says how far a right kernel may be from the exact result, value by value. In a sum of n products, each
// rounded by at most u of its size, errors have random signs: they grow as sqrt(n) u times the sum of the products'
// sizes (Higham and Mary, "A new approach to probabilistic rounding error analysis"). SAFE times that is never seen,
// whatever the order of the sum. A value too many, one too few, or one of too few bits is beyond it.
#pragma once

#include "standin.h"

#define SAFE 6.0
#define U_F32  0x1p-24 // half of the last bit of 1.0 in F32
#define U_BF16 0x1p-8 // the same of BF16
#define EXP2_ERROR 3e-7 // relative, of simd_math.h
#define EXP2_ERROR_BF16 1e-4 // the same of weights that are rounded to BF16
#define ERF_ERROR  5e-7 // absolute

static inline double sum_error(int64_t n) {
    return SAFE * __builtin_sqrt((double) n) * U_F32;
}

// ---- input --------------------------------------------------------------------------------------------------------

void   chance_begin(uint64_t seed);
double chance(void);                        // from -1 to 1
int64_t chance_below(int64_t n);
// Fills all values with random ones up to `most`, as the type has them.
void   fill(struct ggml_tensor * t, double most);
// A copy of all values of F32, F16 or BF16, rows one after the other; the caller frees it.
double * doubles_of(const struct ggml_tensor * t);
double * doubles_new(int64_t n);

// ---- cases --------------------------------------------------------------------------------------------------------

// Begins a case; the words are printed if it fails.
void case_begin(const char * format, ...) __attribute__((format(printf, 1, 2)));
void expect(double got, double wanted, double bound);
void expect_true(bool ok, const char * words);
// Ends it: memory around all tensors must be as it was.
void case_end(void);

// What is tested of a kernel: those tables of it that no kernel before it has
typedef struct subject {
    const cpu_kernel * kernel;
    bool               f32, bf16, quantized, quantized_32;
} subject;

// The tables of AMX over tiles in plain C, on every processor: see amx_emulated.h.
extern const cpu_bf16      cpu_bf16_amx_emulated;
extern const cpu_quantized cpu_quantized_amx_emulated, cpu_quantized_amx_32_emulated;
bool amx_emulated_in_use(void);
// The same with the processor's own instructions, see amx_trapped.c
extern const cpu_bf16      cpu_bf16_amx_trapped;
extern const cpu_quantized cpu_quantized_amx_trapped, cpu_quantized_amx_32_trapped;
// Takes over the signal that an unknown instruction raises.
void amx_trap(void (* otherwise)(int signal));
#ifdef MLLAMA_AVXVNNI
extern const cpu_quantized cpu_quantized_avxvnni_standin, cpu_quantized_avxvnni_32_standin; // avxvnni_standin.c
#endif

void test_attention(const subject * s);
void test_cache_attention(const subject * s);
void test_linear(const subject * s);
void test_products(const subject * s);
void test_elementwise(const subject * s);
void test_names(void); // of kernels, by parts
