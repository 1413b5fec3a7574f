// The tables of functions that this library has for the architecture. This file is compiled for every processor of the
// architecture: it finds out which instructions there are.
#include "devices.h"
#include "guard.h"
#include "kernels/kernel.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif
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

#ifdef MLLAMA_AVXVNNI
static bool has_avxvnni(void) { // nor does GCC 12 know this one
    unsigned int eax, ebx, ecx, edx;
    return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}
#endif

static bool has_avx512(void) {
    return __builtin_cpu_supports("avx512f");
}

static bool has_avx512vnni(void) {
    return has_avx512() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni");
}

static bool has_vnni_32(void) { // a single column is AVX2's
    return has_avx512vnni() && has_avx2();
}

#ifdef MLLAMA_AVX512BF16
static bool has_avx512bf16(void) {
    return has_avx512() && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16");
}

#ifdef MLLAMA_AMX
static bool has_amx(void) { // the system is asked last, and remembers it
    return has_avx512bf16() && has_avx512vnni() && has_avx2() && amx_supported();
}
#endif
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
#endif

// The best first, as far as known before a trial
static const cpu_table F32_TABLES[] = {
#if defined(__x86_64__)
    { .name = "avx512", .supported = has_avx512, .f32 = &cpu_f32_avx512 },
    { .name = "avx2", .supported = has_avx2, .f32 = &cpu_f32_avx2 },
#endif
#ifdef MLLAMA_NEON
    { .name = "neon", .supported = always, .f32 = &cpu_f32_neon },
#endif
    { .name = "portable", .supported = always, .f32 = &cpu_f32_portable },
    { .name = "ggml", .supported = always },
    { .name = NULL },
};

static const cpu_table BF16_TABLES[] = {
#ifdef MLLAMA_AMX
    { .name = "amx", .supported = has_amx, .bf16 = &cpu_bf16_amx },
#endif
#ifdef MLLAMA_AVX512BF16
    { .name = "avx512bf16", .supported = has_avx512bf16, .bf16 = &cpu_bf16_avx512bf16 },
#endif
#ifdef MLLAMA_NEON
    { .name = "neonbf16", .supported = has_bf16, .bf16 = &cpu_bf16_neon },
#endif
    { .name = "f32", .supported = always },
    { .name = "ggml", .supported = always },
    { .name = NULL },
};

static const cpu_table QUANTIZED_TABLES[] = {
#ifdef MLLAMA_AMX
    { .name = "amx", .supported = has_amx, .quantized = &cpu_quantized_amx },
#endif
#if defined(__x86_64__)
    { .name = "vnni", .supported = has_avx512vnni, .quantized = &cpu_quantized_vnni },
#ifdef MLLAMA_AVXVNNI
    { .name = "avxvnni", .supported = has_avxvnni, .quantized = &cpu_quantized_avxvnni },
#endif
    { .name = "avx2", .supported = has_avx2, .quantized = &cpu_quantized_avx2 },
#endif
#ifdef MLLAMA_NEON
    { .name = "neoni8mm", .supported = has_i8mm, .quantized = &cpu_quantized_neoni8mm },
    { .name = "neondot", .supported = has_dot, .quantized = &cpu_quantized_neondot },
#endif
    { .name = "ggml", .supported = always },
    { .name = NULL },
};

static const cpu_table QUANTIZED_32_TABLES[] = {
#ifdef MLLAMA_AMX
    { .name = "amx", .supported = has_amx, .quantized = &cpu_quantized_amx_32 },
#endif
#if defined(__x86_64__)
    { .name = "vnni", .supported = has_vnni_32, .quantized = &cpu_quantized_vnni_32 },
#ifdef MLLAMA_AVXVNNI
    { .name = "avxvnni", .supported = has_avxvnni, .quantized = &cpu_quantized_avxvnni_32 },
#endif
    { .name = "avx2", .supported = has_avx2, .quantized = &cpu_quantized_avx2_32 },
#endif
    { .name = "ggml", .supported = always },
    { .name = NULL },
};

static const cpu_table F16_TABLES[] = {
    { .name = "f32", .supported = always },
    { .name = "bf16", .supported = always },
    { .name = NULL },
};

static const struct {
    const char *      name;
    const cpu_table * tables;
} PARTS[CPU_PARTS] = {
    [CPU_ATTENTION]    = { "attention", F32_TABLES },
    [CPU_LINEAR]       = { "linear", F32_TABLES },
    [CPU_BF16]         = { "bf16", BF16_TABLES },
    [CPU_CACHE]        = { "cache", F32_TABLES },
    [CPU_QUANTIZED]    = { "quantized", QUANTIZED_TABLES },
    [CPU_QUANTIZED_32] = { "quantized32", QUANTIZED_32_TABLES },
    [CPU_F16]          = { "f16", F16_TABLES },
};

const char * cpu_part_name(cpu_part part) {
    return PARTS[part].name;
}

const cpu_table * cpu_tables(cpu_part part) {
    return PARTS[part].tables;
}

// ggml is faster than tables that do not multiply.
static bool fits(cpu_part part, const cpu_table * table) {
    return part != CPU_LINEAR || !table->f32 || table->f32->multiplies;
}

const cpu_table * cpu_table_at(cpu_part part, int32_t index) {
    for (const cpu_table * t = cpu_tables(part); t->name; t++) {
        if (fits(part, t) && t->supported() && index-- == 0) {
            return t;
        }
    }
    return NULL;
}

const cpu_table * cpu_table_named(cpu_part part, const char * name, size_t length) {
    for (const cpu_table * t = cpu_tables(part); t->name; t++) {
        if (strlen(t->name) == length && strncmp(t->name, name, length) == 0 && fits(part, t)) {
            return t;
        }
    }
    return NULL;
}

bool cpu_ggml_has_bf16(void) {
#ifdef MLLAMA_AVX512BF16
    if (!has_avx512bf16()) {
        return false;
    }
#endif
    void * get = NULL;
    if (devices_init() != MLLAMA_OK || !devices_cpu() ||
        guard_function(devices_cpu(), "ggml_backend_get_features", &get) != MLLAMA_OK || !get) {
        return false;
    }
    const ggml_backend_reg_t      reg = ggml_backend_dev_backend_reg(devices_cpu());
    struct ggml_backend_feature * f   = ((ggml_backend_get_features_t) get)(reg);
    for (; f && f->name; f++) {
        if (strcmp(f->name, "AVX512_BF16") == 0) {
            return strcmp(f->value, "1") == 0;
        }
    }
    return false;
}
