// Products with Q4_K and Q6_K
#include "check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = 256, Q4_K_SIZE = 144, Q6_K_SIZE = 210 };

typedef struct shape {
    enum ggml_type type;
    int64_t        n_in, n_out, n;
    size_t         shift;
    int            n_threads;
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

// Weight i is d * scale * q - dmin * min. `size`: that of the two terms
static double q4_k_weight(const uint8_t * b, int i, double * size) {
    const int       group = i / 32;
    const uint8_t * s     = b + 4;
    const int       scale = group < 4 ? s[group] & 63 : (s[group + 4] & 15) | (s[group - 4] >> 6) << 4;
    const int       least = group < 4 ? s[group + 4] & 63 : s[group + 4] >> 4 | (s[group] >> 6) << 4;
    const uint8_t   byte  = b[16 + i / 64 * 32 + i % 32];
    const double    above = half_at(b) * scale * (i % 64 < 32 ? byte & 15 : byte >> 4);
    const double    below = half_at(b + 2) * least;
    *size = fabs(above) + fabs(below);
    return above - below;
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

static struct ggml_tensor * make_weight(const shape * c) {
    struct ggml_tensor * w    = tensor_new(c->type, c->n_in, c->n_out, 0, 2 * c->shift);
    const size_t         size = c->type == GGML_TYPE_Q4_K ? Q4_K_SIZE : Q6_K_SIZE;
    for (int64_t row = 0; row < c->n_out; row++) {
        for (int64_t i = 0; i < c->n_in / BLOCK; i++) {
            uint8_t * b = (uint8_t *) tensor_row(w, row) + (size_t) i * size;
            for (size_t j = 0; j < size; j++) {
                b[j] = (uint8_t) chance_below(256);
            }
            const double d = 0.01 * chance();
            if (c->type == GGML_TYPE_Q4_K) {
                put_half(b, d);
                put_half(b + 2, 0.05 * chance());
            } else {
                put_half(b + 208, row % 7 == 3 ? 0x1p-20 * d : d); // there also one below the normal range of F16
            }
        }
    }
    return w;
}

// ---- columns ------------------------------------------------------------------------------------------------------

// A column's values lie so near to steps of its rounding, largest/127 for each block, that there is one right result;
// `rounded` gets it. Some blocks are all 0, or have one value.
static void make_column(float * x, int64_t n, double * rounded) {
    for (int64_t block = 0; block < n; block += BLOCK) {
        const int64_t kind = chance_below(8), most = block + chance_below(BLOCK);
        const double  step = ldexp(1.0 + 0.3 * chance(), (int) chance_below(12) - 6);
        for (int64_t i = block; i < block + BLOCK; i++) {
            const double q = i == most ? (chance() < 0 ? -127.0 : 127.0) : floor(127.0 * chance() + 0.5);
            const bool   empty = kind == 0 || (kind == 1 && i != most);
            rounded[i] = empty ? 0.0 : q * step;
            x[i]       = empty ? 0.0f : (float) (step * (i == most ? q : q + (fabs(q) < 127 ? 0.4 * chance() : 0.0)));
        }
    }
}

// ---- cases --------------------------------------------------------------------------------------------------------

static void check(const cpu_kernel * kernel, const shape * c) {
    const bool q4 = c->type == GGML_TYPE_Q4_K;
    case_begin("%s, %d -> %d of %d columns, shift %d, %d threads", q4 ? "Q4_K" : "Q6_K", (int) c->n_in, (int) c->n_out,
               (int) c->n, (int) c->shift, c->n_threads);
    struct ggml_tensor * w       = make_weight(c);
    struct ggml_tensor * x       = tensor_new(GGML_TYPE_F32, c->n_in, c->n, 4 * (size_t) (c->n % 3), 4 * c->shift);
    double *             rounded = doubles_new(c->n_in * c->n);
    for (int64_t i = 0; i < c->n; i++) {
        make_column(tensor_row(x, i), c->n_in, rounded + i * c->n_in);
    }
    expect_true(cpu_product_supported(kernel, w), "there is no product of this type");
    cpu_product a = { .kernel = kernel };
    node_layout(0, 4 * c->shift);
    struct ggml_tensor * columns = cpu_quantize_node(NULL, kernel, x);
    struct ggml_tensor * out     = cpu_product_node(NULL, &a, w, columns, c->n);
    run(out, c->n_threads, c->n_threads > 2);

    double * weights = doubles_new(2 * c->n_in), * sizes = weights + c->n_in;
    for (int64_t row = 0; row < c->n_out; row++) {
        for (int64_t i = 0; i < c->n_in; i++) {
            const uint8_t * b = (const uint8_t *) tensor_row(w, row) + i / BLOCK * (q4 ? Q4_K_SIZE : Q6_K_SIZE);
            weights[i] = (q4 ? q4_k_weight : q6_k_weight)(b, (int) (i % BLOCK), &sizes[i]);
        }
        for (int64_t column = 0; column < c->n; column++) {
            double sum = 0.0, size = 0.0;
            for (int64_t i = 0; i < c->n_in; i++) {
                sum += weights[i] * rounded[column * c->n_in + i];
                size += sizes[i] * fabs(rounded[column * c->n_in + i]);
            }
            // Sums of whole numbers are exact; groups of 16 or 32 are then summed in F32. 4: the factors' products
            const double bound = (sum_error(c->n_in / 16) + 4 * U_F32) * size;
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
        { 256, 3, 200 },
    };
    for (size_t i = 0; s->quantized && i < 2 * sizeof(sizes) / sizeof(sizes[0]); i++) {
        const int64_t * size = sizes[i / 2];
        check(s->kernel, &(shape) {
            .type = i % 2 ? GGML_TYPE_Q6_K : GGML_TYPE_Q4_K, .n_in = size[0], .n_out = size[1], .n = size[2],
            .shift = i / 2 % 5, .n_threads = 1 + (int) (i / 2 % 3),
        });
    }
}
