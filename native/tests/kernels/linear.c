// Linear layers and MLPs of the encoder
#include "check.h"

#include <math.h>
#include <stdlib.h>

typedef struct shape {
    enum ggml_type type;
    int64_t        n_in, n_out, n;
    bool           biased;
    size_t         gap, shift;
    int            n_threads;
} shape;

// y [n_out] = W x + bias (NULL: none) for x [n_in] whose values are wrong by up to `error` each (NULL: by nothing), and
// how much y may be wrong. rounded: how many factors of a product the kernel rounds to BF16.
static void multiply(const double * w, const double * bias, int64_t n_in, int64_t n_out, const double * x,
                     const double * error, int rounded, double * y, double * y_error) {
    for (int64_t j = 0; j < n_out; j++) {
        const double first = bias ? bias[j] : 0.0;
        double       sum = first, sizes = fabs(first), squares = 0.0, given = 0.0;
        for (int64_t i = 0; i < n_in; i++) {
            const double factor = w[j * n_in + i], one = factor * x[i];
            sum += one;
            sizes += fabs(one);
            squares += one * one;
            given += error ? fabs(factor) * error[i] : 0.0;
        }
        y[j]       = sum;
        y_error[j] = sum_error(n_in + 1) * sizes + given + rounded * SAFE * U_BF16 * sqrt(squares);
    }
}

static struct ggml_tensor * new_tensor(enum ggml_type type, int64_t n, int64_t n_rows, const shape * c, double most) {
    const size_t item = ggml_type_size(type);
    struct ggml_tensor * t = tensor_new(type, n, n_rows, c->gap * item, c->shift * item);
    fill(t, most);
    return t;
}

static void check_row(const struct ggml_tensor * out, int64_t row, const double * y, const double * error) {
    for (int64_t j = 0; j < out->ne[0]; j++) {
        expect(((const float *) tensor_row(out, row))[j], y[j], error[j]);
    }
}

static const char * type_name(enum ggml_type type) {
    return type == GGML_TYPE_F16 ? "F16" : type == GGML_TYPE_BF16 ? "BF16" : "F32";
}

static int n_rounded(const cpu_linear * a, enum ggml_type weights) {
    return !a->bf16 ? 0 : weights == GGML_TYPE_BF16 ? 1 : 2;
}

static void check_linear(const cpu_kernel * kernel, const shape * c) {
    case_begin("%s, %d -> %d of %d columns,%s gap %d, shift %d, %d threads", type_name(c->type), (int) c->n_in,
               (int) c->n_out, (int) c->n, c->biased ? " bias," : "", (int) c->gap, (int) c->shift, c->n_threads);
    struct ggml_tensor * w    = new_tensor(c->type, c->n_in, c->n_out, c, 1.0);
    struct ggml_tensor * bias = c->biased ? new_tensor(GGML_TYPE_F32, c->n_out, 1, c, 10.0) : NULL;
    struct ggml_tensor * x    = new_tensor(GGML_TYPE_F32, c->n_in, c->n, c, 3.0);
    cpu_linear           a    = { .kernel = kernel };
    node_layout(0, 4 * c->shift);
    struct ggml_tensor * out = cpu_linear_node(NULL, &a, w, bias, x);
    run(out, c->n_threads, c->n_threads > 2);
    // The same with space between the rows of the result, which a node has not
    struct ggml_tensor * apart = tensor_new(GGML_TYPE_F32, c->n_out, c->n, 4 * 3, 4 * c->shift);
    const int64_t        most  = a.bf16 ? kernel->bf16->columns : COLUMNS;
    for (int64_t row = 0; row < c->n; row += most) {
        const linear_args args = {
            .x = tensor_row(x, row), .x_stride = x->nb[1], .n = c->n - row < most ? c->n - row : most,
            .n_in = c->n_in, .n_out = c->n_out, .w = out->src[1]->data, .out = tensor_row(apart, row),
            .out_stride = c->n_out + 3,
        };
        (a.bf16 ? kernel->bf16->linear : kernel->linear->linear)(&args);
    }
    double * exact[] = { doubles_of(w), bias ? doubles_of(bias) : NULL, doubles_of(x) };
    double * y       = doubles_new(2 * c->n_out);
    for (int64_t row = 0; row < c->n; row++) {
        multiply(exact[0], exact[1], c->n_in, c->n_out, exact[2] + row * c->n_in, NULL, n_rounded(&a, c->type), y,
                 y + c->n_out);
        check_row(out, row, y, y + c->n_out);
        check_row(apart, row, y, y + c->n_out);
    }
    for (int i = 0; i < 3; i++) {
        free(exact[i]);
    }
    free(y);
    expect_true(tensor_gaps_whole(apart), "a gap between rows was written");
    case_end();
}

// c->n_out: of the second layer
static void check_mlp(const cpu_kernel * kernel, const shape * c, int64_t n_between) {
    case_begin("MLP of %s, %d -> %d -> %d of %d columns, shift %d, %d threads", type_name(c->type), (int) c->n_in,
               (int) n_between, (int) c->n_out, (int) c->n, (int) c->shift, c->n_threads);
    struct ggml_tensor * w1 = new_tensor(c->type, c->n_in, n_between, c, 0.3);
    struct ggml_tensor * b1 = new_tensor(GGML_TYPE_F32, n_between, 1, c, 1.0);
    struct ggml_tensor * w2 = new_tensor(c->type, n_between, c->n_out, c, 0.3);
    struct ggml_tensor * b2 = new_tensor(GGML_TYPE_F32, c->n_out, 1, c, 1.0);
    struct ggml_tensor * x  = new_tensor(GGML_TYPE_F32, c->n_in, c->n, c, 1.0);
    cpu_linear           a  = { .kernel = kernel }, b = { .kernel = kernel };
    node_layout(0, 4 * c->shift);
    struct ggml_tensor * out = cpu_mlp_node(NULL, &a, w1, b1, &b, w2, b2, x, c->n_threads);
    run(out, c->n_threads, c->n_threads > 2);

    double * exact[] = { doubles_of(w1), doubles_of(b1), doubles_of(w2), doubles_of(b2), doubles_of(x) };
    double * h = doubles_new(2 * n_between), * h_error = h + n_between;
    double * y = doubles_new(2 * c->n_out), * y_error = y + c->n_out;
    for (int64_t row = 0; row < c->n; row++) {
        multiply(exact[0], exact[1], c->n_in, n_between, exact[4] + row * c->n_in, NULL, n_rounded(&a, c->type), h,
                 h_error);
        for (int64_t i = 0; i < n_between; i++) { // GELU: nowhere steeper than 1.13
            h_error[i] = 1.13 * h_error[i] + fabs(h[i]) * (ERF_ERROR + 4 * U_F32);
            h[i] *= 0.5 * (1.0 + erf(h[i] * M_SQRT1_2));
        }
        multiply(exact[2], exact[3], n_between, c->n_out, h, h_error, n_rounded(&b, c->type), y, y_error);
        check_row(out, row, y, y_error);
    }
    for (int i = 0; i < 5; i++) {
        free(exact[i]);
    }
    free(h);
    free(y);
    case_end();
}

static void check_type(const cpu_kernel * kernel, enum ggml_type type) {
    static const int64_t sizes[][3] = { // n_in, n_out, columns
        { 2, 1, 1 }, { 6, 3, 2 }, { 8, 7, 5 }, { 64, 65, 13 }, { 66, 33, 49 }, { 62, 31, 97 }, { 642, 17, 7 },
        { 1290, 34, 3 }, { 1280, 64, 12 }, { 1922, 9, 1 }, { 128, 96, 200 }, { 1290, 65, 48 },
    };
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        const shape c = {
            .type = type, .n_in = sizes[i][0], .n_out = sizes[i][1], .n = sizes[i][2], .biased = i % 3 != 1,
            .gap = i % 3, .shift = i % 5, .n_threads = 1 + (int) (i % 3),
        };
        check_linear(kernel, &c);
    }
    if (!cpu_in_bf16(kernel, type)) { // there pairs of values; an odd number is multiplied in F32
        check_linear(kernel, &(shape) { .type = type, .n_in = 641, .n_out = 35, .n = 19, .shift = 1, .n_threads = 1 });
        check_linear(kernel, &(shape) { .type = type, .n_in = 1, .n_out = 2, .n = 3, .shift = 3, .n_threads = 2 });
    }
    check_mlp(kernel, &(shape) { .type = type, .n_in = 40, .n_out = 38, .n = 101, .shift = 1, .n_threads = 3 }, 70);
    check_mlp(kernel, &(shape) { .type = type, .n_in = 64, .n_out = 5, .n = 1, .shift = 2, .n_threads = 2 }, 34);
}

void test_linear(const subject * s) {
    if (s->f32) {
        cpu_kernel f32 = *s->kernel;
        f32.linear = f32.f32;   // of "portable" too, which leaves linear layers to ggml
        f32.bf16   = NULL;      // so that BF16 weights are widened
        check_type(&f32, GGML_TYPE_F32);
        check_type(&f32, GGML_TYPE_F16);
        check_type(&f32, GGML_TYPE_BF16);
        check_linear(&f32, &(shape) { .type = GGML_TYPE_BF16, .n_in = 13, .n_out = 5, .n = 9, .n_threads = 1 });
    }
    if (s->bf16) {
        cpu_kernel rounds = *s->kernel;
        rounds.f16_as_bf16 = true;
        check_type(&rounds, GGML_TYPE_BF16);
        check_type(&rounds, GGML_TYPE_F16);
    }
}
