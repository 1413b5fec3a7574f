// Kernels by name and by parts
#include "check.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void expect_name(const char * name, const char * shortest) {
    const cpu_kernel * kernel = NULL, * again = NULL;
    case_begin("'%s'", name);
    expect_true(cpu_kernel_choose(name, &kernel) == MLLAMA_OK, "it was refused");
    expect_true(strcmp(cpu_kernel_name(kernel), shortest) == 0, cpu_kernel_name(kernel));
    expect_true(cpu_kernel_choose(shortest, &again) == MLLAMA_OK && again == kernel, "its name gives another kernel");
    case_end();
}

static void expect_refused(const char * name, const char * words) {
    const cpu_kernel * kernel = NULL;
    case_begin("'%s'", name);
    expect_true(cpu_kernel_choose(name, &kernel) == MLLAMA_ERR_ARGUMENT && !kernel, "it was taken");
    expect_true(strstr(mllama_last_error(), words) != NULL, mllama_last_error());
    case_end();
}

// Every table of every part, alone in another kernel: it is what computes then, and has a name of its own.
static void test_tables(const char * base) {
    const cpu_kernel * plain = NULL;
    if (cpu_kernel_choose(base, &plain) != MLLAMA_OK) {
        return; // of another processor
    }
    for (cpu_part part = 0; part < CPU_PARTS; part++) {
        const cpu_table * table;
        for (int32_t i = 0; (table = cpu_table_at(part, i)) != NULL; i++) {
            char               name[100];
            const cpu_kernel * kernel = NULL;
            snprintf(name, sizeof(name), "%s,%s=%s", base, cpu_part_name(part), table->name);
            case_begin("'%s'", name);
            expect_true(cpu_kernel_choose(name, &kernel) == MLLAMA_OK, "it was refused");
            if (part == CPU_F16 && !kernel->bf16) {
                expect_true(kernel == plain, "there is nothing that could compute in BF16");
                case_end();
                continue;
            }
            expect_true(kernel->parts[part] == table, "another table was taken");
            expect_true(part != CPU_F16 || cpu_in_bf16(kernel, GGML_TYPE_F16) == (i == 1), "F16 is not obeyed");
            expect_true(cpu_in_bf16(kernel, GGML_TYPE_BF16) == (kernel->bf16 != NULL), "BF16 in another type");
            expect_true(!cpu_in_bf16(kernel, GGML_TYPE_F32), "F32 is rounded");
            for (cpu_part other = 0; other < CPU_PARTS; other++) {
                expect_true(other == part || kernel->parts[other] == plain->parts[other], "another part has changed");
            }
            expect_true((plain->parts[part] == table) == (kernel == plain), "a kernel is there twice");
            expect_true((kernel == plain) == (strcmp(kernel->name, plain->name) == 0), "two have one name");
            const cpu_f32 * f32[] = {
                [CPU_ATTENTION] = kernel->attention, [CPU_LINEAR] = kernel->linear, [CPU_BF16] = NULL,
                [CPU_CACHE] = kernel->cache, [CPU_QUANTIZED] = NULL, [CPU_QUANTIZED_32] = NULL,
                [CPU_F16] = NULL,
            };
            expect_true(f32[part] == table->f32, "the table is not in its place");
            expect_true(part != CPU_BF16 || kernel->bf16 == table->bf16, "the table for BF16 is not in its place");
            expect_true(part != CPU_QUANTIZED || kernel->quantized == table->quantized,
                        "the table for quantized weights is not in its place");
            expect_true(part != CPU_QUANTIZED_32 || kernel->quantized_32 == table->quantized,
                        "the table for blocks of 32 weights is not in its place");
            expect_true(kernel->f32 != NULL, "nothing computes GELU");
            case_end();
        }
    }
}

void test_names(void) {
    unsetenv("MLLAMA_CPU_KERNEL");
    const cpu_kernel * kernel;
    const char *       name;
    for (int32_t i = 0; (name = cpu_kernel_at(i, &kernel)) != NULL; i++) {
        if (kernel) {
            test_tables(name);
        }
    }
    expect_name("off", "off");
    expect_name("portable", "portable");
    expect_name("portable,quantized=ggml", "portable");
    expect_name("portable,cache=ggml,cache=portable,", "portable");
    expect_name("portable,cache=ggml", "portable,cache=ggml");
    expect_name("portable,quantized=ggml,linear=ggml,attention=ggml", "portable,attention=ggml");
    expect_refused("abacus", "is 'abacus'; it can be ");
    expect_refused("abacus", "portable or off");
    expect_refused("Portable", "is 'Portable'");
    expect_refused("port", "is 'port'");
    expect_refused(",", "is ','");
    expect_refused("abacus,quantized=ggml", "is 'abacus");
    expect_refused("off,quantized=ggml", "is 'off");
    expect_refused("portable,off", "has 'off' after the first word");
    expect_refused("portable,abacus=ggml",
                   "the parts are attention, linear, bf16, cache, quantized, quantized32 and f16");
    expect_refused("portable,=ggml", "has '=ggml': the parts are");
    expect_refused("bf=f32", "has 'bf=f32': the parts are");
    expect_refused("bf16=abacus", "here the part bf16 can be ");
    expect_refused("bf16=", "f32, ggml");
    expect_name("portable,f16=bf16", "portable");
    expect_refused("portable,f16=ggml", "here the part f16 can be f32, bf16");
    expect_refused("portable,linear=portable", "here the part linear can be ");
    expect_refused("portable,cache=f32", "portable, ggml");
    expect_refused("portable,quantized=ggml=ggml", "here the part quantized can be ");
    // Without a name the best one is changed, as it is without a trial.
    setenv("MLLAMA_CPU_KERNEL", "cache=ggml", 1);
    case_begin("MLLAMA_CPU_KERNEL=cache=ggml");
    expect_true(cpu_kernel_choose(NULL, &kernel) == MLLAMA_OK && !kernel->cache, "it was not obeyed");
    expect_true(cpu_kernel_choose("portable", &kernel) == MLLAMA_OK && kernel->cache, "it was obeyed beside a name");
    setenv("MLLAMA_CPU_KERNEL", "", 1);
    expect_true(cpu_kernel_choose("", &kernel) == MLLAMA_OK, "nothing was chosen");
    unsetenv("MLLAMA_CPU_KERNEL");
    case_end();
}
