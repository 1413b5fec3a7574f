// Which kernel a context uses: by its name, or part by part.
#include "kernels/kernel.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The tables of a kernel by their names. NULL of bf16: ggml's where it has instructions for BF16, else F32 factors.
// Those that are not in this build do not count.
typedef struct named {
    const char * name, * f32, * bf16, * quantized, * quantized_32;
} named;

// The best first. Several may have the same name: the first of them that is supported counts.
static const named NAMED[] = {
    { "amx", "avx512", "amx", "amx", "amx" },
    { "avx512bf16", "avx512", "avx512bf16", "vnni", "vnni" },
    { "avx512bf16", "avx512", "avx512bf16", "avx2", "avx2" },
    { "avx512", "avx512", NULL, "vnni", "vnni" },
    { "avx512", "avx512", NULL, "avx2", "avx2" },
    { "avx2", "avx2", NULL, "avxvnni", "avxvnni" },
    { "avx2", "avx2", NULL, "avx2", "avx2" },
    { "neonbf16", "neon", "neonbf16", "neoni8mm", "ggml" },
    { "neonbf16", "neon", "neonbf16", "neondot", "ggml" },
    { "neon", "neon", NULL, "neoni8mm", "ggml" },
    { "neon", "neon", NULL, "neondot", "ggml" },
    { "neon", "neon", NULL, "ggml", "ggml" },
    { "portable", "portable", NULL, "ggml", "ggml" },
};
enum { N_NAMED = sizeof(NAMED) / sizeof(NAMED[0]) };

// ---- kernels by name ----------------------------------------------------------------------------------------------

// What the tables of an entry can be used for
typedef enum use { NOT_BUILT, NOT_HERE, USABLE } use;

static use tables_of(const named * entry, const cpu_table * parts[CPU_PARTS]) {
    use found = USABLE;
    for (cpu_part part = 0; part < CPU_PARTS; part++) {
        const char * name = part == CPU_BF16           ? entry->bf16
                            : part == CPU_QUANTIZED    ? entry->quantized
                            : part == CPU_QUANTIZED_32 ? entry->quantized_32
                            : part == CPU_F16          ? "f32"
                                                       : entry->f32;
        if (!name) {
            name = cpu_ggml_has_bf16() ? "ggml" : "f32";
        }
        if (part == CPU_LINEAR && strcmp(name, "portable") == 0) {
            name = "ggml"; // is faster
        }
        parts[part] = cpu_table_named(part, name, strlen(name));
        const use it = !parts[part] ? NOT_BUILT : !parts[part]->supported() ? NOT_HERE : USABLE;
        found = it < found ? it : found;
    }
    return found;
}

// The first entry of this name that the processor supports. name NULL: of any.
static use find(const char * name, size_t length, const cpu_table * parts[CPU_PARTS]) {
    use best = NOT_BUILT;
    for (int i = 0; i < N_NAMED && best < USABLE; i++) {
        if (!name || (strlen(NAMED[i].name) == length && strncmp(NAMED[i].name, name, length) == 0)) {
            const cpu_table * tables[CPU_PARTS];
            const use         found = tables_of(&NAMED[i], tables);
            if (found > best) {
                best = found;
                memcpy(parts, tables, sizeof(tables));
            }
        }
    }
    return best;
}

// Names that are in this build, each once: "a, b, c"
static const char * all_names(char * out, size_t size) {
    const cpu_table * parts[CPU_PARTS];
    const char *      last = "";
    int               n    = 0;
    out[0] = '\0';
    for (int i = 0; i < N_NAMED; i++) {
        if (strcmp(NAMED[i].name, last) != 0 && tables_of(&NAMED[i], parts) != NOT_BUILT) {
            last = NAMED[i].name;
            n += snprintf(out + n, size - (size_t) n, "%s%s", n ? ", " : "", last);
        }
    }
    return out;
}

// ---- kernels that exist -------------------------------------------------------------------------------------------

static _Atomic(cpu_kernel *) first; // all kernels so far; they live as long as the process

static int n_different(const cpu_table * const a[CPU_PARTS], const cpu_table * const b[CPU_PARTS]) {
    int n = 0;
    for (cpu_part part = 0; part < CPU_PARTS; part++) {
        n += a[part] != b[part];
    }
    return n;
}

// The nearest name of the list, then the parts that are different
static void set_name(cpu_kernel * kernel) {
    const cpu_table * parts[CPU_PARTS], * nearest[CPU_PARTS];
    const char *      name = NULL;
    int               least = CPU_PARTS + 1;
    for (int i = 0; i < N_NAMED; i++) {
        if (find(NAMED[i].name, strlen(NAMED[i].name), parts) == USABLE) {
            const int n = n_different(parts, kernel->parts);
            if (n < least) {
                least = n;
                name  = NAMED[i].name;
                memcpy(nearest, parts, sizeof(nearest));
            }
        }
    }
    int n = snprintf(kernel->name, sizeof(kernel->name), "%s", name); // "portable" is supported everywhere
    for (cpu_part part = 0; part < CPU_PARTS; part++) {
        if (nearest[part] != kernel->parts[part]) {
            n += snprintf(kernel->name + n, sizeof(kernel->name) - (size_t) n, ",%s=%s", cpu_part_name(part),
                          kernel->parts[part]->name);
        }
    }
}

static mllama_status keep(const cpu_table * parts[CPU_PARTS], const cpu_kernel ** kernel) {
    if (!parts[CPU_BF16]->bf16) { // nothing computes with weights in BF16
        parts[CPU_F16] = cpu_tables(CPU_F16);
    }
    for (const cpu_kernel * k = atomic_load(&first); k; k = k->next) {
        if (n_different(k->parts, parts) == 0) {
            *kernel = k;
            return MLLAMA_OK;
        }
    }
    cpu_kernel * made = malloc(sizeof(*made));
    if (!made) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    *made = (cpu_kernel) {
        .attention = parts[CPU_ATTENTION]->f32, .linear = parts[CPU_LINEAR]->f32, .cache = parts[CPU_CACHE]->f32,
        .bf16 = parts[CPU_BF16]->bf16, .bf16_by_ggml = strcmp(parts[CPU_BF16]->name, "ggml") == 0,
        .f16_as_bf16 = parts[CPU_F16] != cpu_tables(CPU_F16), .quantized = parts[CPU_QUANTIZED]->quantized,
        .quantized_32 = parts[CPU_QUANTIZED_32]->quantized,
    };
    memcpy(made->parts, parts, sizeof(made->parts));
    made->f32 = made->linear ? made->linear : made->attention ? made->attention : made->cache;
    made->f32 = made->f32 ? made->f32 : &cpu_f32_portable;
    set_name(made);
    made->next = atomic_load(&first);
    while (!atomic_compare_exchange_weak(&first, &made->next, made)) {}
    *kernel = made;
    return MLLAMA_OK;
}

// ---- choosing -----------------------------------------------------------------------------------------------------

enum { NAMES_SIZE = 200 };

// "part=table"; the words are not ended by a 0 byte. by: where they are from
static mllama_status change_part(const char * word, size_t length, const char * by,
                                 const cpu_table * parts[CPU_PARTS]) {
    const char * equals = memchr(word, '=', length);
    const size_t n      = (size_t) (equals - word);
    cpu_part     part   = 0;
    while (part < CPU_PARTS && (strlen(cpu_part_name(part)) != n || strncmp(cpu_part_name(part), word, n) != 0)) {
        part++;
    }
    if (part == CPU_PARTS) {
        return fail(MLLAMA_ERR_ARGUMENT, "%s has '%.*s': the parts are attention, linear, bf16, cache, quantized, "
                    "quantized32 and f16", by, (int) length, word);
    }
    const cpu_table * table = cpu_table_named(part, equals + 1, length - n - 1);
    if (table && table->supported()) {
        parts[part] = table;
        return MLLAMA_OK;
    }
    char names[NAMES_SIZE];
    int  at = 0;
    for (int32_t i = 0; (table = cpu_table_at(part, i)) != NULL; i++) {
        at += snprintf(names + at, sizeof(names) - (size_t) at, "%s%s", i ? ", " : "", table->name);
    }
    return fail(MLLAMA_ERR_ARGUMENT, "%s has '%.*s': here the part %s can be %s", by, (int) length, word,
                cpu_part_name(part), names);
}

// All words after the first are parts, and the first may be one.
static mllama_status read_words(const char * words, const char * by, const cpu_table * parts[CPU_PARTS]) {
    size_t length = strcspn(words, ",");
    if (memchr(words, '=', length)) {
        find(NULL, 0, parts);
        length = 0;
    } else {
        const use found = find(words, length, parts);
        char      names[NAMES_SIZE];
        if (found == NOT_HERE) {
            return fail(MLLAMA_ERR_ARGUMENT, "%s is %.*s, which this processor does not have; unset it", by,
                        (int) length, words);
        }
        if (found == NOT_BUILT) {
            return fail(MLLAMA_ERR_ARGUMENT, "%s is '%s'; it can be %s or off, or have parts as in "
                        "'portable,quantized=ggml'", by, words, all_names(names, sizeof(names)));
        }
        words += length + (words[length] == ',');
    }
    for (; *words; words += length + (words[length] == ',')) {
        length = strcspn(words, ",");
        if (!memchr(words, '=', length)) {
            return fail(MLLAMA_ERR_ARGUMENT, "%s has '%.*s' after the first word; it must be a part, as in "
                        "'quantized=ggml'", by, (int) length, words);
        }
        TRY(change_part(words, length, by, parts));
    }
    return MLLAMA_OK;
}

mllama_status cpu_kernel_choose(const char * name, const cpu_kernel ** kernel) {
    const bool        given  = name && *name;
    const char *      wanted = given ? name : getenv("MLLAMA_CPU_KERNEL");
    const cpu_table * parts[CPU_PARTS];
    *kernel = NULL;
    if (wanted && strcmp(wanted, "off") == 0) {
        return MLLAMA_OK;
    }
    if (wanted && *wanted) {
        TRY(read_words(wanted, given ? "cpu_kernel" : "MLLAMA_CPU_KERNEL", parts));
    } else {
        find(NULL, 0, parts);
    }
    return keep(parts, kernel);
}

const char * cpu_kernel_at(int32_t index, const cpu_kernel ** kernel) {
    const cpu_table * parts[CPU_PARTS];
    *kernel = NULL;
    for (int i = 0; i < N_NAMED; i++) {
        const use found = tables_of(&NAMED[i], parts);
        if (found != NOT_BUILT && index-- == 0) {
            return found == NOT_HERE || keep(parts, kernel) == MLLAMA_OK ? NAMED[i].name : NULL;
        }
    }
    return NULL;
}

const char * cpu_kernel_name(const cpu_kernel * kernel) {
    return kernel ? kernel->name : "off";
}

bool cpu_in_bf16(const cpu_kernel * kernel, enum ggml_type weights) {
    return kernel && kernel->bf16 && (weights == GGML_TYPE_BF16 || (weights == GGML_TYPE_F16 && kernel->f16_as_bf16));
}

bool cpu_kernel_has_head_dim(int64_t head_dim) {
    return head_dim % 8 == 0 && head_dim >= 8 && head_dim <= MAX_HEAD_DIM;
}

// ---- public -------------------------------------------------------------------------------------------------------

const char * mllama_cpu_kernel(void) {
    return mllama_cpu_kernel_named(NULL);
}

const char * mllama_cpu_kernel_named(const char * name) {
    const cpu_kernel * kernel = NULL;
    return cpu_kernel_choose(name, &kernel) == MLLAMA_OK ? cpu_kernel_name(kernel) : NULL;
}

const char * mllama_cpu_part(int32_t part) {
    return part >= 0 && part < CPU_PARTS ? cpu_part_name((cpu_part) part) : NULL;
}

const char * mllama_cpu_table(int32_t part, int32_t index) {
    const cpu_table * table = part >= 0 && part < CPU_PARTS ? cpu_table_at((cpu_part) part, index) : NULL;
    return table ? table->name : NULL;
}

const char * mllama_cpu_kernel_uses(const char * name, int32_t part) {
    const cpu_kernel * kernel = NULL;
    if (part < 0 || part >= CPU_PARTS || cpu_kernel_choose(name, &kernel) != MLLAMA_OK) {
        return NULL;
    }
    return kernel ? kernel->parts[part]->name : "ggml";
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
