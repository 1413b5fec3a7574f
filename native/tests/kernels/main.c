// Holds every kernel of every instruction set that this processor has against a reference in double precision.
#include "check.h"

#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// ---- input --------------------------------------------------------------------------------------------------------

static uint64_t state;

void chance_begin(uint64_t seed) {
    state = seed * 0x9e3779b97f4a7c15u + 1;
}

static uint64_t chance_bits(void) { // xorshift64*
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545f4914f6cdd1du;
}

double chance(void) {
    return (double) (chance_bits() >> 11) * 0x1p-52 - 1.0;
}

int64_t chance_below(int64_t n) {
    return (int64_t) ((chance_bits() >> 33) % (uint64_t) n);
}

void fill(struct ggml_tensor * t, double most) {
    for (int64_t row = 0; row < t->ne[1]; row++) {
        void * out = tensor_row(t, row);
        for (int64_t i = 0; i < t->ne[0]; i++) {
            const float x = (float) (most * chance());
            switch (t->type) {
                case GGML_TYPE_F16:  ((ggml_fp16_t *) out)[i] = to_f16(x); break;
                case GGML_TYPE_BF16: ggml_fp32_to_bf16_row(&x, (ggml_bf16_t *) out + i, 1); break;
                default:             ((float *) out)[i] = x; break;
            }
        }
    }
}

double * doubles_new(int64_t n) {
    double * x = malloc(sizeof(double) * (size_t) n);
    if (!x) {
        abort();
    }
    return x;
}

double * doubles_of(const struct ggml_tensor * t) {
    double * out = doubles_new(t->ne[0] * t->ne[1]);
    for (int64_t row = 0; row < t->ne[1]; row++) {
        const void *    in    = tensor_row(t, row);
        ggml_to_float_t widen = ggml_get_type_traits(t->type)->to_float;
        for (int64_t i = 0; i < t->ne[0]; i++) {
            float x;
            if (widen) {
                widen((const char *) in + (size_t) i * t->nb[0], &x, 1);
            } else {
                x = ((const float *) in)[i];
            }
            out[row * t->ne[0] + i] = x;
        }
    }
    return out;
}

// ---- cases --------------------------------------------------------------------------------------------------------

enum { MAX_SHOWN = 20 };

static const char * kernel_name;
static char         words[200];
static bool         case_failed;
static int          n_cases, n_failed;
static double       worst; // part of a bound that was reached

void case_begin(const char * format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(words, sizeof(words), format, args);
    va_end(args);
    case_failed = false;
    n_cases++;
    chance_begin((uint64_t) n_cases);
}

// The first failure of each case is shown.
static void failed(const char * what) {
    if (!case_failed && n_failed++ < MAX_SHOWN) {
        printf("FAILED %s: %s: %s\n", kernel_name, words, what);
    }
    case_failed = true;
}

void expect(double got, double wanted, double bound) {
    const double error = fabs(got - wanted);
    if (error <= bound) { // not so if it is not a number
        worst = bound > 0 && error / bound > worst ? error / bound : worst;
        return;
    }
    char what[120];
    snprintf(what, sizeof(what), "%.9g, not %.9g; the bound is %.3g", got, wanted, bound);
    failed(what);
}

void expect_true(bool ok, const char * what) {
    if (!ok) {
        failed(what);
    }
}

void case_end(void) {
    expect_true(places_end(), "memory outside of a tensor was written");
    expect_true(!amx_emulated_in_use(), "tiles were not released");
}

// A read or write past the end of a tensor
static void on_signal(int signal) {
    const char * parts[] = { "FAILED ", kernel_name, ": ", words, ": stopped by a signal\n" };
    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
        if (write(STDOUT_FILENO, parts[i], strlen(parts[i])) < 0) {
            break;
        }
    }
    _exit(128 + signal);
}

// ---- kernels ------------------------------------------------------------------------------------------------------

static const struct {
    const char * name;
    void (* test)(const subject * s);
} TESTS[] = {
    { "attention", test_attention },
    { "attention to a cache", test_cache_attention },
    { "linear layers", test_linear },
    { "quantized products", test_products },
    { "GELU and erf", test_elementwise },
};

static subject subject_of(int32_t index, const cpu_kernel * kernel) {
    subject s = { kernel, true, kernel->bf16, kernel->quantized, kernel->quantized_32 };
    for (int32_t i = 0; i < index; i++) {
        const cpu_kernel * before;
        if (cpu_kernel_at(i, &before) && before) {
            s.f32 &= before->f32 != kernel->f32;
            s.bf16 &= before->bf16 != kernel->bf16;
            s.quantized &= before->quantized != kernel->quantized;
            s.quantized_32 &= before->quantized_32 != kernel->quantized_32;
        }
    }
    return s;
}

static void test_kernel(const subject * s) {
    kernel_name = cpu_kernel_name(s->kernel);
    printf("%s:%s%s%s%s\n", kernel_name, s->f32 ? " F32" : "", s->bf16 ? " BF16" : "",
           s->quantized ? " Q4_K, Q5_K, Q6_K" : "", s->quantized_32 ? " Q8_0, Q4_0" : "");
    for (size_t i = 0; i < sizeof(TESTS) / sizeof(TESTS[0]); i++) {
        const int before = n_cases;
        worst = 0.0;
        TESTS[i].test(s);
        if (n_cases > before) {
            printf("  %-22s %4d cases, errors up to %.2f of their bound\n", TESTS[i].name, n_cases - before, worst);
        }
        fflush(stdout);
    }
}

// Instructions that this processor may lack, by others in their place
static void test_standins(void) {
#ifdef MLLAMA_AVXVNNI
    const cpu_kernel avxvnni = { .name = "AVX-VNNI by other instructions", .quantized = &cpu_quantized_avxvnni_standin,
                                 .quantized_32 = &cpu_quantized_avxvnni_32_standin };
    if (cpu_table_named(CPU_QUANTIZED, "avx2", strlen("avx2"))->supported()) {
        test_kernel(&(subject) { .kernel = &avxvnni, .quantized = true, .quantized_32 = true });
    }
#endif
}

int main(void) {
    signal(SIGSEGV, on_signal);
    signal(SIGBUS, on_signal);
    signal(SIGILL, on_signal);
    const cpu_kernel * kernel;
    const char *       name;
    for (int32_t i = 0; (name = cpu_kernel_at(i, &kernel)) != NULL; i++) {
        if (!kernel) {
            printf("%s: not on this processor\n", name);
            continue;
        }
        const subject s = subject_of(i, kernel);
        if (s.f32 || s.bf16 || s.quantized || s.quantized_32) {
            test_kernel(&s);
        }
    }
    test_standins();
    kernel_name = "names";
    test_names();
    const cpu_kernel emulated = {
        .name = "amx, emulated", .attention = &cpu_f32_portable, .f32 = &cpu_f32_portable,
        .bf16 = &cpu_bf16_amx_emulated, .quantized = &cpu_quantized_amx_emulated,
        .quantized_32 = &cpu_quantized_amx_32_emulated,
    };
    test_kernel(&(subject) { .kernel = &emulated, .bf16 = true, .quantized = true, .quantized_32 = true });
#ifdef MLLAMA_AMX
    amx_trap(on_signal);
    cpu_kernel trapped = emulated;
    trapped.bf16         = &cpu_bf16_amx_trapped;
    trapped.quantized    = &cpu_quantized_amx_trapped;
    trapped.quantized_32 = &cpu_quantized_amx_32_trapped;
    snprintf(trapped.name, sizeof(trapped.name), "amx, trapped");
    test_kernel(&(subject) { .kernel = &trapped, .bf16 = true, .quantized = true, .quantized_32 = true });
#endif
    printf("%d cases, %d failed\n", n_cases, n_failed);
    return n_failed || n_cases == 0;
}
