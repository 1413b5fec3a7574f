// Vectors of LANES floats, which the including file defines, as GCC's and Clang's vector extension has them. The first
// of the headers from which a file of an instruction set is put together:
//
//     simd_types.h   the vectors. After it the file defines the operations that the compiler's vectors lack:
//                        vf  vmax(vf a, vf b)                  larger of each lane; b where either is not a number
//                        vf  widen(const ggml_fp16_t * p)      LANES F16 numbers in memory as floats
//                        v4f totals(vf a, vf b, vf c, vf d)    the sums of four vectors
//     simd_math.h    2^x, erf, GELU, the tops of softmax; needs vmax
//     simd_f32.h     factors of F32 for simd_block.h; weights of softmax as such; arrays of erf and GELU
//     simd_bf16.h    factors of BF16 instead, and weights as such; needs narrow_two
//     simd_block.h   attention and linear layers over packed blocks; needs ROWS and VECTORS, the rows and vectors of
//                    the block of sums that is kept in registers, and multiply_add, which simd_f32.h defines:
//                        vf multiply_add(vf sum, factor a, const factor * p)    sum + a times LANES factors in memory
//                    With OWN_PRODUCTS the file defines product and accumulate instead.
//     simd_rows.h    attention to rows of a cache; needs widen and totals
//
// All functions are static: each file is compiled with the instructions that it may use.
#pragma once

#include "kernels/kernel.h"

#include <string.h>

typedef float    v4f __attribute__((vector_size(16)));
typedef int32_t  v4i __attribute__((vector_size(16)));
typedef float    vf __attribute__((vector_size(4 * LANES)));
typedef int32_t  vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vw __attribute__((vector_size(4 * LANES)));
typedef float    vu __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); // in memory

#define LOAD(p)     (*(const vu *) (p))
#define STORE(p, x) (*(vu *) (p) = (x))

INLINE v4f vmax4(v4f a, v4f b) {
    const v4i mask = a > b;
    return (v4f) (((v4i) a & mask) | ((v4i) b & ~mask));
}
