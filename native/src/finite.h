// Values that are neither infinite nor NaN. A damaged or badly quantized model computes others, and what would be
// sampled from them or kept of them is worth nothing.
#pragma once

#include "model/model.h"

// Whether all n values are finite. The question is put to their bits, so no compiler flag can take it away.
bool finite_f32(const float * x, int64_t n);
bool finite_f16(const ggml_fp16_t * x, int64_t n);
// The same of n_bytes of a type that caches have: F32, F16 or Q8_0.
bool finite_bytes(enum ggml_type type, const void * data, size_t n_bytes);

// The error about results that are not finite. doing: as in "the results of DOING"
mllama_status finite_fail(const gguf_file * file, const char * doing);
