// Vectors of 16 bytes, which every processor has.
#define LANES 4
#define ROWS 6
#if defined(__aarch64__)
#define VECTORS 4
#else
#define VECTORS 2
#endif
#include "kernels/simd_types.h"

INLINE vf vmax(vf a, vf b) {
    return vmax4(a, b);
}

// Through the exponents. What is not finite has the highest one in both types.
INLINE vf widen(const ggml_fp16_t * p) {
    vf x;
    for (int i = 0; i < LANES; i++) {
        union { uint32_t u; float f; } a = { .u = (uint32_t) (p[i] & 0x7fff) << 13 }, b;
        b.f = a.f * 0x1p112f;
        b.u |= (uint32_t) (p[i] & 0x8000) << 16;
        b.u |= (p[i] & 0x7c00) == 0x7c00 ? 0x7f800000u : 0;
        x[i] = b.f;
    }
    return x;
}

INLINE v4f totals(vf a, vf b, vf c, vf d) {
    return (v4f) {
        a[0] + a[1] + a[2] + a[3], b[0] + b[1] + b[2] + b[3], c[0] + c[1] + c[2] + c[3], d[0] + d[1] + d[2] + d[3],
    };
}

#include "kernels/simd_f32.h"

#include "kernels/simd_block.h"
#include "kernels/simd_rows.h"

const cpu_f32 cpu_f32_portable = {
    .lanes       = LANES,
    .width       = WIDTH,
    .multiplies  = false, // ggml's products are faster
    .attend      = attend,
    .attend_rows = attend_rows,
    .linear      = linear,
    .bias_gelu   = bias_gelu,
    .erf_array   = erf_array,
};
