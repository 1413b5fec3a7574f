// Several columns times rows that are unpacked block by block. The file that includes this one defines before it
//
//     PANEL, PANELS       rows of a panel; panels that are multiplied together
//     TASK_COLUMNS        the most columns
//     LINE                bytes
//     panel, q8_column    a block of a panel's rows, and of a column
//     fetch(p, n)         n bytes to the second-level cache
#pragma once

#include "kernels/kernel.h"

#include <string.h>

typedef struct form {
    size_t size; // bytes of 256 weights
    void (* unpack)(const char * const * rows, panel * p);
    // sums[c] += the panels' block times that of column c; columns lie n blocks apart. Meanwhile a piece of memory is
    // fetched for each part of the columns.
    void (* multiply)(const panel * p, const q8_column * x, int64_t n, int64_t n_columns, const char * fetched,
                      int64_t piece, float (*sums)[PANELS * PANEL]);
} form;

// The panels of a task, with the columns in so many parts. Meanwhile the rows from `then` on are fetched from memory.
static void multiply_panels(const form * f, const struct ggml_tensor * w, const q8_column * x, int64_t n_columns,
                            int64_t n_parts, int64_t first, int64_t then, float * out) {
    const int64_t n = w->ne[0] / QUANT_BLOCK;
    panel         panels[PANELS];
    float         sums[TASK_COLUMNS][PANELS * PANEL] __attribute__((aligned(64)));
    const char *  rows[PANELS * PANEL];
    for (int64_t i = 0; i < PANELS * PANEL; i++) { // the last row for those that do not exist
        rows[i] = (const char *) w->data + (size_t) (first + i < w->ne[1] ? first + i : w->ne[1] - 1) * w->nb[1];
    }
    memset(sums, 0, sizeof(sums[0]) * (size_t) n_columns);
    const char *  fetched = (const char *) w->data + (size_t) then * w->nb[1];
    const int64_t piece   = round_up(PANELS * PANEL * (int64_t) f->size / (PANELS + n_parts), LINE);
    for (int64_t block = 0; block < n; block++) {
        for (int k = 0; k < PANELS; k++, fetched += piece) {
            fetch(fetched, piece);
            f->unpack(rows + PANEL * k, &panels[k]);
        }
        f->multiply(panels, x + block, n, n_columns, fetched, piece, sums);
        fetched += n_parts * piece;
        for (int i = 0; i < PANELS * PANEL; i++) {
            rows[i] += f->size;
        }
    }
    const int64_t left = w->ne[1] - first < PANELS * PANEL ? w->ne[1] - first : PANELS * PANEL;
    for (int64_t c = 0; c < n_columns; c++) {
        memcpy(out + c * w->ne[1] + first, sums[c], (size_t) left * sizeof(float));
    }
}

// For a table that leaves to another one how columns are rounded, and a single column
#define COLUMNS_OF(table)                                                                                      \
    static void quantize(const float * x, int64_t n, void * to) {                                              \
        table.quantize(x, n, to);                                                                              \
    }                                                                                                          \
    static void multiply_column(const struct ggml_tensor * w, const void * x, int64_t first, int64_t end,      \
                                int64_t then, float * out) {                                                   \
        table.multiply_column(w, x, first, end, then, out);                                                    \
    }
