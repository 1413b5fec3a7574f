// The text's attention to rows of a cache
#include "check.h"

#include <math.h>
#include <stdlib.h>

enum { MAX_ITEMS = 3 };

typedef struct shape {
    int64_t        n_head, n_head_kv, head_dim;
    enum ggml_type k, v;
    int            n_items;
    int64_t        columns[MAX_ITEMS], rows[MAX_ITEMS];
    bool           masked;
    size_t         gap, shift;
    int            n_threads;
} shape;

// One head of one column: q and out [head_dim], k and v [n_head_kv * head_dim, n_rows]; s: space for n_rows values
static void check_head(const shape * c, const double * q, const double * k, const double * v, int64_t n_rows,
                       const ggml_fp16_t * mask, const float * out, double * s) {
    const int64_t dim = c->head_dim, step = c->n_head_kv * dim;
    const double  scale = 1.0 / sqrt((double) dim);
    double        top = -INFINITY, total = 0.0, error = 0.0;
    for (int64_t j = 0; j < n_rows; j++) {
        double sum = 0.0, sizes = 0.0;
        for (int64_t i = 0; i < dim; i++) {
            const double x = q[i] * k[j * step + i];
            sum += x;
            sizes += fabs(x);
        }
        s[j]  = mask && mask[j] ? -INFINITY : sum * scale;
        top   = fmax(top, s[j]);
        error = fmax(error, (sum_error(dim) + 4 * U_F32) * sizes * scale);
    }
    for (int64_t j = 0; j < n_rows; j++) {
        s[j] = exp(s[j] - top);
        total += s[j];
    }
    // Errors of scores have nothing to do with each other; sums are scaled every 32 rows, and where parts are joined.
    const double steps = 3.0 + (double) n_rows / 32.0;
    const double alone = expm1(error), in_sums = 2 * (steps * EXP2_ERROR + sum_error(n_rows));
    for (int64_t i = 0; i < dim; i++) {
        double sum = 0.0, sizes = 0.0, squares = 0.0;
        for (int64_t j = 0; j < n_rows; j++) {
            const double x = s[j] * v[j * step + i];
            sum += x;
            sizes += fabs(x);
        }
        for (int64_t j = 0; j < n_rows; j++) { // what a weight moves: its value's distance from the result
            const double x = s[j] * (fabs(v[j * step + i]) + fabs(sum / total));
            squares += x * x;
        }
        const double bound = (alone * sqrt(squares) + in_sums * sizes) / total;
        expect(out[i], sum / total, bound);
    }
}

// As in a prompt: the last columns see all rows; beside that some rows are hidden from all, in the middle and at the
// end.
static void make_mask(const cpu_cache_item * item, ggml_fp16_t * mask) {
    const int64_t hidden = chance_below(item->n_rows), end = item->n_rows - item->n_rows / 5;
    for (int64_t i = 0; i < item->n_columns; i++) {
        const int64_t seen = item->n_rows - (item->n_columns - 1 - i) % item->n_rows;
        for (int64_t j = 0; j < item->n_rows; j++) {
            const bool hides = j > 0 && (j >= seen || j >= end || (j > hidden / 2 && j < hidden));
            mask[i * item->n_rows + j] = to_f16(hides ? -INFINITY : 0.0f);
        }
    }
}

static void check(const cpu_kernel * kernel, const shape * c) {
    case_begin("cache, %d heads of %d on %d, %s and %s, %d items, %d columns, %d rows,%s gap %d, shift %d, %d threads",
               (int) c->n_head, (int) c->head_dim, (int) c->n_head_kv, c->k == GGML_TYPE_F16 ? "F16" : "F32",
               c->v == GGML_TYPE_F16 ? "F16" : "F32", c->n_items, (int) c->columns[0], (int) c->rows[0],
               c->masked ? " mask," : "", (int) c->gap, (int) c->shift, c->n_threads);
    cpu_cache_item items[MAX_ITEMS];
    int64_t        n = 0, n_mask = 0;
    for (int i = 0; i < c->n_items; i++) {
        struct ggml_tensor * kv[2];
        for (int j = 0; j < 2; j++) {
            const enum ggml_type type = j ? c->v : c->k;
            kv[j] = tensor_new(type, c->head_dim * c->n_head_kv, c->rows[i], c->gap * ggml_type_size(type),
                               c->shift * ggml_type_size(type));
            fill(kv[j], 2.0);
        }
        items[i] = (cpu_cache_item) {
            .k = kv[0], .v = kv[1], .column = n, .n_columns = c->columns[i], .n_rows = c->rows[i],
            .mask = c->masked ? n_mask : -1,
        };
        n += c->columns[i];
        n_mask += c->columns[i] * c->rows[i];
    }
    struct ggml_tensor * q = tensor_new(GGML_TYPE_F32, c->n_head * c->head_dim, n, 4 * c->gap, 4 * c->shift);
    fill(q, 2.0);
    struct ggml_tensor * mask = NULL;
    if (c->masked) {
        mask = tensor_new(GGML_TYPE_F16, n_mask, 1, 0, 2 * c->shift);
        for (int i = 0; i < c->n_items; i++) {
            make_mask(&items[i], (ggml_fp16_t *) mask->data + items[i].mask);
        }
    }
    cpu_cache_attention a = {
        .kernel = kernel, .n_head = c->n_head, .n_head_kv = c->n_head_kv, .head_dim = c->head_dim, .items = items,
        .n_items = c->n_items, .many = c->n_items > 1,
    };
    expect_true(cpu_cache_attention_fits(&a), "there is no node for this");
    node_layout(0, 4 * c->shift);
    struct ggml_tensor * out = cpu_cache_attention_node(NULL, &a, q, mask);
    out->nb[1] += 4 * c->gap;
    run(out, c->n_threads, c->n_threads > 2);

    double * exact = doubles_of(q);
    for (int i = 0; i < c->n_items; i++) {
        const cpu_cache_item * item = &items[i];
        double *               k = doubles_of(item->k), * v = doubles_of(item->v), * s = doubles_new(item->n_rows);
        for (int64_t row = 0; row < item->n_columns * c->n_head; row++) {
            const int64_t       column = row / c->n_head, head = row % c->n_head;
            const int64_t       at = head * c->head_dim, in = head / (c->n_head / c->n_head_kv) * c->head_dim;
            const int64_t       hides = item->mask + column * item->n_rows;
            const ggml_fp16_t * seen = mask ? (const ggml_fp16_t *) mask->data + hides : NULL;
            const float *       got  = (const float *) tensor_row(out, item->column + column) + at;
            check_head(c, exact + (item->column + column) * q->ne[0] + at, k + in, v + in, item->n_rows, seen, got, s);
        }
        free(k);
        free(v);
        free(s);
    }
    free(exact);
    expect_true(tensor_gaps_whole(out), "a gap between rows was written");
    case_end();
}

void test_cache_attention(const subject * s) {
    static const enum ggml_type types[][2] = {
        { GGML_TYPE_F16, GGML_TYPE_F16 }, { GGML_TYPE_F32, GGML_TYPE_F32 },
        { GGML_TYPE_F16, GGML_TYPE_F32 }, { GGML_TYPE_F32, GGML_TYPE_F16 },
    };
    static const int64_t dims[] = { 64, 80, 128 }, counts[][2] = { // columns, rows
        { 1, 1 }, { 1, 31 }, { 1, 33 }, { 1, 300 }, { 2, 257 }, { 3, 5 }, { 4, 129 }, { 5, 65 }, { 17, 40 },
        { 50, 130 },
    };
    if (!s->f32) {
        return;
    }
    for (int64_t dim = 8; dim <= MAX_HEAD_DIM; dim += 8) { // each size, alone and in a prompt
        for (int64_t columns = 1; columns < 9; columns += 6) {
            check(s->kernel, &(shape) {
                .n_head = 6, .n_head_kv = dim / 8 % 2 ? 2 : 3, .head_dim = dim, .k = types[dim / 8 % 4][0],
                .v = types[dim / 8 % 4][1], .n_items = 1, .columns = { columns }, .rows = { 37 + dim / 8 },
                .gap = (size_t) (dim / 8 % 3), .shift = (size_t) (dim / 8 % 5), .n_threads = 2,
            });
        }
    }
    for (size_t i = 0; i < sizeof(dims) / sizeof(dims[0]); i++) {
        for (size_t j = 0; j < sizeof(counts) / sizeof(counts[0]); j++) {
            check(s->kernel, &(shape) {
                .n_head = 4, .n_head_kv = j % 3 ? 1 : 2, .head_dim = dims[i], .k = types[(i + j) % 4][0],
                .v = types[(i + j) % 4][1], .n_items = 1, .columns = { counts[j][0] }, .rows = { counts[j][1] },
                .masked = (i + j) % 2, .gap = j % 3, .shift = (i + j) % 5, .n_threads = 1 + (int) (j % 3),
            });
        }
        check(s->kernel, &(shape) { // three sequences, each with its own cache
            .n_head = 6, .n_head_kv = 2, .head_dim = dims[i], .k = types[i][0], .v = types[i][1], .n_items = 3,
            .columns = { 1, 3, 2 }, .rows = { 270, 9, 530 }, .masked = i % 2, .gap = 1, .shift = 1, .n_threads = 3,
        });
    }
}
