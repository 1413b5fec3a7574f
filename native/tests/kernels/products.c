// Products with quantized weights
#include "check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = 256 };

typedef struct shape {
    int     form; // of FORMS
    int64_t n_in, n_out, n;
    size_t  shift;
    int     n_threads;
    bool    extreme; // weights and values as large as they can be
} shape;

// ---- weights: from bytes, as docs/formats.md has them, apart from the kernels' own structs --------------------------

static double half_at(const uint8_t * p) {
    ggml_fp16_t x;
    memcpy(&x, p, sizeof(x));
    return to_float_f16(x);
}

static void put_half(uint8_t * p, double x) {
    const ggml_fp16_t half = to_f16((float) x);
    memcpy(p, &half, sizeof(half));
}

// Weight i is d * scale * q - dmin * min, with q of its byte and `more`. `size`: that of the two terms
static double with_mins(const uint8_t * b, int i, uint8_t byte, int more, double * size) {
    const int       group = i / 32;
    const uint8_t * s     = b + 4;
    const int       scale = group < 4 ? s[group] & 63 : (s[group + 4] & 15) | (s[group - 4] >> 6) << 4;
    const int       least = group < 4 ? s[group + 4] & 63 : s[group + 4] >> 4 | (s[group] >> 6) << 4;
    const double    above = half_at(b) * scale * ((i % 64 < 32 ? byte & 15 : byte >> 4) + more);
    const double    below = half_at(b + 2) * least;
    *size = fabs(above) + fabs(below);
    return above - below;
}

static double q4_k_weight(const uint8_t * b, int i, double * size) {
    return with_mins(b, i, b[16 + i / 64 * 32 + i % 32], 0, size);
}

static double q5_k_weight(const uint8_t * b, int i, double * size) {
    return with_mins(b, i, b[48 + i / 64 * 32 + i % 32], b[16 + i % 32] >> (i / 32) & 1 ? 16 : 0, size);
}

static double q6_k_weight(const uint8_t * b, int i, double * size) {
    const int     part = i / 128, in = i % 128, quarter = in / 32, at = in % 32;
    const uint8_t low  = b[64 * part + quarter % 2 * 32 + at];
    const int     high = b[128 + 32 * part + at] >> (2 * quarter) & 3;
    const int     q    = (quarter < 2 ? low & 15 : low >> 4) | high << 4;
    const double  d    = half_at(b + 208) * (int8_t) b[192 + i / 16];
    *size = fabs(d) * (q + 32); // q and 32 may be multiplied one by one
    return d * (q - 32);
}

static double q8_0_weight(const uint8_t * b, int i, double * size) {
    const double d = half_at(b) * (int8_t) b[2 + i];
    *size = fabs(d);
    return d;
}

static double q4_0_weight(const uint8_t * b, int i, double * size) {
    const uint8_t byte = b[2 + i % 16];
    const double  d    = half_at(b) * ((i < 16 ? byte & 15 : byte >> 4) - 8);
    *size = fabs(d);
    return d;
}

static const struct {
    const char *   name;
    enum ggml_type type;
    int            values; // of a column, with a factor of their own; and weights in a block
    size_t         size;   // bytes of a block
    int            d;      // where its factor is
    double      (* weight)(const uint8_t * block, int i, double * size);
} FORMS[] = {
    { "Q4_K", GGML_TYPE_Q4_K, 256, 144, 0, q4_k_weight },
    { "Q5_K", GGML_TYPE_Q5_K, 256, 176, 0, q5_k_weight },
    { "Q6_K", GGML_TYPE_Q6_K, 256, 210, 208, q6_k_weight },
    { "Q8_0", GGML_TYPE_Q8_0, 32, 34, 0, q8_0_weight },
    { "Q4_0", GGML_TYPE_Q4_0, 32, 18, 0, q4_0_weight },
};
enum { N_FORMS = sizeof(FORMS) / sizeof(FORMS[0]) };

static struct ggml_tensor * make_weight(const shape * c) {
    const enum ggml_type type = FORMS[c->form].type;
    struct ggml_tensor * w    = tensor_new(type, c->n_in, c->n_out, 0, 2 * c->shift);
    const size_t         size = FORMS[c->form].size;
    for (int64_t row = 0; row < c->n_out; row++) {
        for (int64_t i = 0; i < c->n_in / FORMS[c->form].values; i++) {
            uint8_t * b = (uint8_t *) tensor_row(w, row) + (size_t) i * size;
            for (size_t j = 0; j < size; j++) {
                b[j] = c->extreme ? (row % 2 ? 0xff : 0x80) : (uint8_t) chance_below(256);
            }
            const double d     = 0.01 * chance();
            const bool   small = type == GGML_TYPE_Q6_K && row % 7 == 3; // also below the normal range of F16
            put_half(b + FORMS[c->form].d, small ? 0x1p-20 * d : d);
            if (type == GGML_TYPE_Q4_K || type == GGML_TYPE_Q5_K) {
                put_half(b + 2, 0.05 * chance());
            }
            for (int j = 0; c->extreme && type == GGML_TYPE_Q6_K && j < 16; j++) {
                b[192 + j] = row % 3 ? 0x80 : 0x7f;
            }
        }
    }
    return w;
}

// ---- columns ------------------------------------------------------------------------------------------------------

// A column's values lie so near to steps of its rounding, largest/127 for each `size` values, that there is one right
// result; `rounded` gets it. Some blocks are all 0, or have one value. Extreme: all are the largest or its negative.
static void make_column(float * x, int64_t n, int size, bool extreme, double * rounded) {
    for (int64_t block = 0; block < n; block += size) {
        const int64_t kind = extreme ? 2 : chance_below(8), most = block + chance_below(size);
        const double  step = ldexp(1.0 + 0.3 * chance(), (int) chance_below(12) - 6), all = chance() < 0 ? -127 : 127;
        for (int64_t i = block; i < block + size; i++) {
            const double any = extreme ? all : floor(127.0 * chance() + 0.5);
            const double q   = i == most ? (extreme ? all : chance() < 0 ? -127.0 : 127.0) : any;
            const bool   empty = kind == 0 || (kind == 1 && i != most);
            rounded[i] = empty ? 0.0 : q * step;
            x[i]       = empty ? 0.0f : (float) (step * (i == most ? q : q + (fabs(q) < 127 ? 0.4 * chance() : 0.0)));
        }
    }
}

// ---- cases --------------------------------------------------------------------------------------------------------

static void check(const cpu_kernel * kernel, const shape * c) {
    const int    values = FORMS[c->form].values;
    const size_t size   = FORMS[c->form].size;
    if (FORMS[c->form].type == GGML_TYPE_Q8_0 && c->n > kernel->quantized_32->q8_0_columns) {
        return; // ggml's
    }
    case_begin("%s, %d -> %d of %d columns, shift %d, %d threads%s", FORMS[c->form].name, (int) c->n_in, (int) c->n_out,
               (int) c->n, (int) c->shift, c->n_threads, c->extreme ? ", extreme" : "");
    struct ggml_tensor * w       = make_weight(c);
    struct ggml_tensor * x       = tensor_new(GGML_TYPE_F32, c->n_in, c->n, 4 * (size_t) (c->n % 3), 4 * c->shift);
    double *             rounded = doubles_new(c->n_in * c->n);
    for (int64_t i = 0; i < c->n; i++) {
        make_column(tensor_row(x, i), c->n_in, values, c->extreme, rounded + i * c->n_in);
    }
    cpu_product a = { .with = cpu_product_with(kernel, w, c->n) };
    expect_true(a.with, "there is no product of this type");
    if (!a.with) {
        free(rounded);
        case_end();
        return;
    }
    node_layout(0, 4 * c->shift);
    struct ggml_tensor * columns = cpu_quantize_node(NULL, a.with, x);
    struct ggml_tensor * out     = cpu_product_node(NULL, &a, w, columns, c->n);
    run(out, c->n_threads, c->n_threads > 2);

    double * weights = doubles_new(2 * c->n_in), * sizes = weights + c->n_in;
    for (int64_t row = 0; row < c->n_out; row++) {
        for (int64_t i = 0; i < c->n_in; i++) {
            const uint8_t * b = (const uint8_t *) tensor_row(w, row) + (size_t) (i / values) * size;
            weights[i] = FORMS[c->form].weight(b, (int) (i % values), &sizes[i]);
        }
        for (int64_t column = 0; column < c->n; column++) {
            double sum = 0.0, most = 0.0;
            for (int64_t i = 0; i < c->n_in; i++) {
                sum += weights[i] * rounded[column * c->n_in + i];
                most += sizes[i] * fabs(rounded[column * c->n_in + i]);
            }
            // Sums of whole numbers are exact; groups of 16 or 32 are then summed in F32. 4: the factors' products
            const double bound = (sum_error(c->n_in / 16) + 4 * U_F32) * most;
            expect(((const float *) tensor_row(out, column))[row], sum, bound);
        }
    }
    free(weights);
    free(rounded);
    case_end();
}

void test_products(const subject * s) {
    static const int64_t sizes[][3] = { // n_in, n_out, columns
        { 256, 1, 1 }, { 256, 1, 2 }, { 512, 5, 1 }, { 1280, 33, 1 }, { 768, 130, 1 }, { 512, 31, 3 }, { 256, 16, 4 },
        { 768, 17, 5 }, { 256, 37, 6 }, { 512, 65, 7 }, { 256, 33, 8 }, { 256, 19, 13 }, { 512, 34, 97 },
        { 256, 3, 200 }, { 256, 33, 271 },
    };
    for (int form = 0; form < N_FORMS; form++) {
        if (!(FORMS[form].values == BLOCK ? s->quantized : s->quantized_32)) {
            continue;
        }
        for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
            check(s->kernel, &(shape) { .form = form, .n_in = sizes[i][0], .n_out = sizes[i][1], .n = sizes[i][2],
                                        .shift = i % 5, .n_threads = 1 + (int) (i % 3) });
        }
        for (int64_t n = 1; n < 10; n++) { // sums that must not overflow
            check(s->kernel, &(shape) { .form = form, .n_in = 1024, .n_out = 12, .n = n, .n_threads = 1,
                                        .extreme = true });
        }
    }
}
