// The encoder's attention
#include "check.h"

#include <math.h>
#include <stdlib.h>

typedef struct shape {
    int64_t n_head, head_dim, n_real, n_all, n_queries;
    int64_t repeated[2][2];
    float   repeats;
    double  steep; // scores are so much larger
    size_t  gap, shift;
    int     n_threads;
} shape;

// Of the keys that a query sees: how often each counts
static double times_counted(const shape * c, int64_t key) {
    for (int i = 0; i < 2; i++) {
        if (key >= c->repeated[i][0] && key < c->repeated[i][1]) {
            return c->repeats;
        }
    }
    return 1.0;
}

// The scores of a query against the keys, 1/sqrt(head_dim) of the products; returns the bound of their errors.
static double scores(const shape * c, bool bf16, const double * q, const double * k, int64_t n_keys, double * s) {
    const double scale = 1.0 / sqrt((double) c->head_dim);
    double       most  = 0.0;
    for (int64_t j = 0; j < n_keys; j++) {
        double sum = 0.0, sizes = 0.0, squares = 0.0;
        for (int64_t i = 0; i < c->head_dim; i++) {
            const double x = q[i] * k[j * c->n_head * c->head_dim + i];
            sum += x;
            sizes += fabs(x);
            squares += x * x;
        }
        s[j] = sum * scale;
        // 4: the scale, its product, and the distance to the largest score are rounded
        const double of_f32  = (sum_error(c->head_dim) + 4 * U_F32) * sizes;
        const double of_bf16 = bf16 ? SAFE * 2 * U_BF16 * sqrt(squares) : 0.0;
        most = fmax(most, scale * (of_f32 + of_bf16));
    }
    return most;
}

static void check_query(const shape * c, bool bf16, double * const qkv[3], const struct ggml_tensor * out,
                        int64_t query, int64_t head, double * s) {
    const int64_t  n_embd = c->n_head * c->head_dim, at = head * c->head_dim;
    const int64_t  n_keys = query < c->n_real ? c->n_all : c->n_real;
    const double * v      = qkv[2] + at;
    const double   error  = scores(c, bf16, qkv[0] + query * n_embd + at, qkv[1] + at, n_keys, s);
    double        top    = -INFINITY, total = 0.0;
    for (int64_t j = 0; j < n_keys; j++) {
        top = fmax(top, s[j]);
    }
    for (int64_t j = 0; j < n_keys; j++) {
        s[j] = exp(s[j] - top) * times_counted(c, j);
        total += s[j];
    }
    // Errors of scores have nothing to do with each other, nor has rounding to BF16; sums are scaled at each block.
    const double alone   = expm1(error) + (bf16 ? SAFE * 2 * U_BF16 : 0.0);
    const double of_exp2 = (double) (2 + n_keys / KEYS) * EXP2_ERROR + (bf16 ? EXP2_ERROR_BF16 : 0.0);
    const double in_sums = 2 * (of_exp2 + sum_error(n_keys));
    for (int64_t i = 0; i < c->head_dim; i++) {
        double sum = 0.0, sizes = 0.0, squares = 0.0;
        for (int64_t j = 0; j < n_keys; j++) {
            const double x = s[j] * v[j * n_embd + i];
            sum += x;
            sizes += fabs(x);
        }
        for (int64_t j = 0; j < n_keys; j++) { // what a weight moves: its value's distance from the result
            const double x = s[j] * (fabs(v[j * n_embd + i]) + fabs(sum / total));
            squares += x * x;
        }
        const double bound = (alone * sqrt(squares) + in_sums * sizes) / total;
        expect(((const float *) tensor_row(out, query))[at + i], sum / total, bound);
    }
}

static void check(const cpu_kernel * kernel, bool bf16, const shape * c) {
    case_begin("attention%s, %d heads of %d, %d of %d keys, %d queries, gap %d, shift %d, %d threads",
               bf16 ? " in BF16" : "", (int) c->n_head, (int) c->head_dim, (int) c->n_real, (int) c->n_all,
               (int) c->n_queries, (int) c->gap, (int) c->shift, c->n_threads);
    const int64_t        n_embd = c->n_head * c->head_dim;
    struct ggml_tensor * qkv[3];
    for (int i = 0; i < 3; i++) {
        qkv[i] = tensor_new(GGML_TYPE_F32, n_embd, i == 0 ? c->n_queries : c->n_all, c->gap, c->shift);
        fill(qkv[i], i == 0 ? c->steep : 2.0);
    }
    cpu_attention a = {
        .kernel   = kernel,
        .n_head   = c->n_head,
        .head_dim = c->head_dim,
        .n_real   = c->n_real,
        .n_all    = c->n_all,
        .repeated = { { c->repeated[0][0], c->repeated[0][1] }, { c->repeated[1][0], c->repeated[1][1] } },
        .repeats  = c->repeats,
        .bf16     = bf16,
    };
    node_layout(0, c->shift);
    struct ggml_tensor * out = cpu_attention_node(NULL, &a, qkv[0], qkv[1], qkv[2]);
    out->nb[1] += c->gap;
    run(out, c->n_threads, c->n_threads > 2);

    double * s = doubles_new(c->n_all), * exact[] = { doubles_of(qkv[0]), doubles_of(qkv[1]), doubles_of(qkv[2]) };
    for (int64_t query = 0; query < c->n_queries; query++) {
        for (int64_t head = 0; head < c->n_head; head++) {
            check_query(c, bf16, exact, out, query, head, s);
        }
    }
    free(s);
    for (int i = 0; i < 3; i++) {
        free(exact[i]);
    }
    expect_true(tensor_gaps_whole(out), "a gap between rows was written");
    case_end();
}

static void check_all(const cpu_kernel * kernel, bool bf16) {
    for (int64_t dim = 8; dim <= MAX_HEAD_DIM; dim += 8) { // each size; odd numbers of rows, another layout each time
        check(kernel, bf16, &(shape) {
            .n_head = 1 + dim / 8 % 3, .head_dim = dim, .n_real = 13 + dim / 8, .n_all = 41 + dim / 4,
            .n_queries = 41 + dim / 4, .repeats = 1.0f, .steep = 2.0, .gap = 4 * (size_t) (dim / 8 % 4),
            .shift = 4 * (size_t) (dim / 8 % 5), .n_threads = 1 + (int) (dim / 8 % 3),
        });
    }
    static const int64_t dims[] = { 64, 80, 128 }, counts[][2] = { // real keys, all of them
        { 1, 1 }, { 1, 2 }, { 3, 3 }, { 47, 48 }, { 48, 49 }, { 49, 129 }, { 130, 133 }, { 9, 259 },
    };
    for (size_t i = 0; i < sizeof(dims) / sizeof(dims[0]); i++) {
        for (size_t j = 0; j < sizeof(counts) / sizeof(counts[0]); j++) {
            const int64_t real = counts[j][0], all = counts[j][1];
            check(kernel, bf16, &(shape) {
                .n_head = 1, .head_dim = dims[i], .n_real = real, .n_all = all, .n_queries = j % 2 ? real : all,
                .repeats = 1.0f, .steep = j % 3 ? 2.0 : 20.0, .gap = 4 * (j % 3), .shift = 4 * (j % 4), .n_threads = 2,
            });
        }
    }
    check(kernel, bf16, &(shape) { // keys that stand for many
        .n_head = 2, .head_dim = 80, .n_real = 37, .n_all = 90, .n_queries = 90,
        .repeated = { { 5, 17 }, { 60, 71 } }, .repeats = 3.0f, .steep = 2.0, .shift = 4, .n_threads = 3,
    });
}

void test_attention(const subject * s) {
    if (s->f32) {
        check_all(s->kernel, false);
    }
    if (s->bf16) {
        check_all(s->kernel, true);
    }
}
