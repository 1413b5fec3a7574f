// Which kernel a context uses. This file is compiled for every processor of the architecture: it finds out which
// instructions there are.
#include "kernels/kernel.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#include <stdio.h>
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

#ifdef MLLAMA_NEON
// Instructions beyond those that every such processor has: by the bit of the kernel's words about it, or Apple's name.
typedef enum extension { SDOT, SMMLA, BFMMLA } extension;

static bool has(extension e) {
#if defined(__linux__)
    static const struct {
        unsigned long type, bit;
    } bits[] = { [SDOT] = { AT_HWCAP, 20 }, [SMMLA] = { AT_HWCAP2, 13 }, [BFMMLA] = { AT_HWCAP2, 14 } };
    return getauxval(bits[e].type) >> bits[e].bit & 1;
#elif defined(__APPLE__)
    static const char * const names[] = {
        [SDOT] = "hw.optional.arm.FEAT_DotProd", [SMMLA] = "hw.optional.arm.FEAT_I8MM",
        [BFMMLA] = "hw.optional.arm.FEAT_BF16",
    };
    int    value = 0;
    size_t size  = sizeof(value);
    return sysctlbyname(names[e], &value, &size, NULL, 0) == 0 && value;
#else
    (void) e;
    return false;
#endif
}

static bool has_dot(void) {
    return has(SDOT);
}

static bool has_i8mm(void) {
    return has(SDOT) && has(SMMLA);
}

static bool has_bf16(void) {
    return has(BFMMLA);
}

static bool has_bf16_dot(void) {
    return has_bf16() && has_dot();
}

static bool has_bf16_i8mm(void) {
    return has_bf16() && has_i8mm();
}
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
#ifdef MLLAMA_NEON
    { .name = "neonbf16", .supported = has_bf16_i8mm, .f32 = &cpu_f32_neon, .bf16 = &cpu_bf16_neon,
      .quantized = &cpu_quantized_neoni8mm },
    { .name = "neonbf16", .supported = has_bf16_dot, .f32 = &cpu_f32_neon, .bf16 = &cpu_bf16_neon,
      .quantized = &cpu_quantized_neondot },
    { .name = "neon", .supported = has_i8mm, .f32 = &cpu_f32_neon, .quantized = &cpu_quantized_neoni8mm },
    { .name = "neon", .supported = has_dot, .f32 = &cpu_f32_neon, .quantized = &cpu_quantized_neondot },
    { .name = "neon", .supported = always, .f32 = &cpu_f32_neon },
#endif
    { .name = "portable", .supported = always, .f32 = &cpu_f32_portable },
};
enum { N_KERNELS = sizeof(KERNELS) / sizeof(KERNELS[0]) };

// Separated by commas, each once
static const char * all_names(char * out, size_t size) {
    int n = 0;
    for (int i = 0; i < N_KERNELS; i++) {
        if (i == 0 || strcmp(KERNELS[i].name, KERNELS[i - 1].name) != 0) {
            n += snprintf(out + n, size - (size_t) n, "%s%s", i ? ", " : "", KERNELS[i].name);
        }
    }
    return out;
}

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
    char names[100];
    if (known) {
        return fail(MLLAMA_ERR_ARGUMENT, "%s is %s, which this processor does not have; unset it", by, wanted);
    }
    return fail(MLLAMA_ERR_ARGUMENT, "%s is '%s'; it can be %s or off", by, wanted, all_names(names, sizeof(names)));
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
