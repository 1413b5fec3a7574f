// Which kernel a context uses. This file is compiled for every processor of the architecture: it finds out which
// instructions there are.
#include "kernels/kernel.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <stdlib.h>
#include <string.h>

static bool always(void) {
    return true;
}

#if defined(__x86_64__)
// Clang's __builtin_cpu_supports does not know it. With "avx2" the system saves the registers that it uses.
static bool has_f16c(void) {
    unsigned int eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

static bool has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

static bool has_avx512(void) {
    return __builtin_cpu_supports("avx512f");
}

static bool has_avx512vnni(void) {
    return has_avx512() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni");
}

#ifdef MLLAMA_AVX512BF16
static bool has_avx512bf16(void) {
    return has_avx512() && __builtin_cpu_supports("avx512bf16");
}

static bool has_avx512bf16vnni(void) {
    return has_avx512bf16() && has_avx512vnni();
}
#endif
#endif

// The best first. Several may have the same name: the first of them that is supported counts.
static const cpu_kernel KERNELS[] = {
#if defined(__x86_64__)
#ifdef MLLAMA_AVX512BF16
    { .name = "avx512bf16", .supported = has_avx512bf16vnni, .f32 = &cpu_f32_avx512, .bf16 = &cpu_bf16_avx512bf16,
      .quantized = &cpu_quantized_vnni },
    { .name = "avx512bf16", .supported = has_avx512bf16, .f32 = &cpu_f32_avx512, .bf16 = &cpu_bf16_avx512bf16 },
#endif
    { .name = "avx512", .supported = has_avx512vnni, .f32 = &cpu_f32_avx512, .quantized = &cpu_quantized_vnni },
    { .name = "avx512", .supported = has_avx512, .f32 = &cpu_f32_avx512 },
    { .name = "avx2", .supported = has_avx2, .f32 = &cpu_f32_avx2 },
#endif
    { .name = "portable", .supported = always, .f32 = &cpu_f32_portable },
};
enum { N_KERNELS = sizeof(KERNELS) / sizeof(KERNELS[0]) };

mllama_status cpu_kernel_choose(const char * name, const cpu_kernel ** kernel) {
    const bool   given  = name && *name;
    const char * wanted = given ? name : getenv("MLLAMA_CPU_KERNEL");
    const char * by     = given ? "cpu_kernel" : "MLLAMA_CPU_KERNEL";
    const bool   any    = !wanted || !*wanted;
    bool         known  = false;
    *kernel = NULL;
    if (!any && strcmp(wanted, "off") == 0) {
        return MLLAMA_OK;
    }
    for (int i = 0; i < N_KERNELS; i++) {
        if (any || strcmp(wanted, KERNELS[i].name) == 0) {
            known = true;
            if (KERNELS[i].supported()) {
                *kernel = &KERNELS[i];
                return MLLAMA_OK;
            }
        }
    }
    if (known) {
        return fail(MLLAMA_ERR_ARGUMENT, "%s is %s, which this processor does not have; unset it", by, wanted);
    }
    return fail(MLLAMA_ERR_ARGUMENT, "%s is '%s'; it can be avx512bf16, avx512, avx2, portable or off", by, wanted);
}

const cpu_kernel * cpu_kernel_at(int32_t index) {
    return index >= 0 && index < N_KERNELS ? &KERNELS[index] : NULL;
}

const char * cpu_kernel_name(const cpu_kernel * kernel) {
    return kernel ? kernel->name : "off";
}

bool cpu_kernel_has_bf16(const cpu_kernel * kernel) {
    return kernel && kernel->bf16;
}

bool cpu_kernel_has_head_dim(int64_t head_dim) {
    return head_dim % 8 == 0 && head_dim >= 8 && head_dim <= MAX_HEAD_DIM;
}

// ---- public -------------------------------------------------------------------------------------------------------

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
    kernel->f32->erf_array(x, y, n);
    return MLLAMA_OK;
}
