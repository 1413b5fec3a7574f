// The few functions of ggml, guard.h and devices.h that the kernels' files call, for a program without ggml: so it can
// be built for a processor that is only emulated here. A node is computed when run() asks for it.
#pragma once

#include "kernels/kernel.h"

// Memory whose last byte lies `shift` bytes before a page that cannot be touched. The shift and the space before the
// memory hold a pattern. All places are freed by places_end().
void * place(size_t size, size_t shift);
// Whether the pattern is everywhere as it was. Frees all places and tensors.
bool   places_end(void);

enum { UNWRITTEN = 0xff }; // in every byte of new memory: floats that are not numbers

// A tensor of these rows, with `gap` bytes from the end of a row to the next one. Its memory is UNWRITTEN.
struct ggml_tensor * tensor_new(enum ggml_type type, int64_t n, int64_t n_rows, size_t gap, size_t shift);
void *               tensor_row(const struct ggml_tensor * t, int64_t row);
bool                 tensor_gaps_whole(const struct ggml_tensor * t);

// The gap between rows and the shift of the nodes that are made from now on. Nodes whose rows must lie one after the
// other are not made with a gap.
void node_layout(size_t gap, size_t shift);

// Computes a node and those that it is made from, with this number of threads, one after the other.
void run(struct ggml_tensor * node, int n_threads, bool last_thread_first);

float to_float_f16(ggml_fp16_t x);
ggml_fp16_t to_f16(float x); // rounds to the nearest
