// GELU with a bias, and erf
#include "check.h"

#include <math.h>
#include <stdlib.h>

static void check_gelu(const cpu_kernel * kernel, int64_t n, int64_t n_rows, size_t shift) {
    case_begin("GELU of %d columns of %d, shift %d", (int) n_rows, (int) n, (int) shift);
    struct ggml_tensor * x    = tensor_new(GGML_TYPE_F32, n, n_rows, 4 * shift, 4 * shift);
    struct ggml_tensor * bias = tensor_new(GGML_TYPE_F32, n, 1, 0, 4 * shift);
    fill(x, 6.0);
    fill(bias, 2.0);
    double * was = doubles_of(x), * added = doubles_of(bias);
    run(cpu_bias_gelu_node(NULL, kernel, x, bias), 2, false);
    for (int64_t row = 0; row < n_rows; row++) {
        for (int64_t i = 0; i < n; i++) {
            const double v = was[row * n + i] + added[i], size = fabs(was[row * n + i]) + fabs(added[i]);
            const float  got = ((const float *) tensor_row(x, row))[i];
            expect(got, 0.5 * v * (1.0 + erf(v * M_SQRT1_2)), size * (ERF_ERROR + 6 * U_F32));
        }
    }
    free(was);
    free(added);
    expect_true(tensor_gaps_whole(x), "a gap between rows was written");
    case_end();
}

static void check_erf(const cpu_kernel * kernel, int64_t n, size_t shift) {
    case_begin("erf of %d values, shift %d", (int) n, (int) shift);
    struct ggml_tensor * x = tensor_new(GGML_TYPE_F32, n, 1, 0, 4 * shift);
    struct ggml_tensor * y = tensor_new(GGML_TYPE_F32, n, 1, 0, 4 * (shift + 1));
    fill(x, 5.0);
    kernel->f32->erf_array(x->data, y->data, n);
    for (int64_t i = 0; i < n; i++) {
        expect(((float *) y->data)[i], erf(((float *) x->data)[i]), ERF_ERROR);
    }
    case_end();
}

void test_elementwise(const subject * s) {
    for (int64_t n = 1; s->f32 && n < 70; n += 3) {
        check_gelu(s->kernel, n, 1 + n % 4, (size_t) (n % 5));
        check_erf(s->kernel, n, (size_t) (n % 5));
    }
    if (s->f32) {
        check_erf(s->kernel, 10001, 1);
    }
}
