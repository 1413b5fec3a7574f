// Values that are neither infinite nor NaN. A damaged or badly quantized model has or computes others, and what would
// be sampled from them or kept of them is worth nothing.
#pragma once

#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Whether all n values are finite. The question is put to their bits, so no compiler flag can take it away.
bool finite_f32(const float * x, int64_t n);
bool finite_f16(const ggml_fp16_t * x, int64_t n);
// The same for whole blocks of a ggml type, n_bytes of them. In a quantized type the scales are looked at: the rest
// may be anything. Types without scales in F16 count as finite.
bool finite_bytes(enum ggml_type type, const void * data, size_t n_bytes);
