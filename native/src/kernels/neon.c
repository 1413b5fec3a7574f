// ARM's 64-bit vectors (NEON), which every processor of that architecture has
#define LANES 4
#define ROWS 6
#define VECTORS 4
#include "kernels/simd_types.h"

#include <arm_neon.h>

INLINE vf vmax(vf a, vf b) {
    return vbslq_f32(vcgtq_f32(a, b), a, b); // vmaxq_f32 gives what is not a number
}

INLINE vf widen(const ggml_fp16_t * p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}

INLINE v4f totals(vf a, vf b, vf c, vf d) {
    return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
}

#include "kernels/simd_f32.h"

#include "kernels/simd_block.h"
#include "kernels/simd_rows.h"

const cpu_f32 cpu_f32_neon = {
    .lanes       = LANES,
    .width       = WIDTH,
    .multiplies  = true,
    .attend      = attend,
    .attend_rows = attend_rows,
    .linear      = linear,
    .bias_gelu   = bias_gelu,
    .erf_array   = erf_array,
};
