// Rows of quantized weights for tiles of 8 bits, see amxint8.c and amxint8_32.c
#pragma once

#include "kernels/amx.h"

enum {
    ROW  = 64, // bytes of a tile's row
    LINE = 64,
};
_Static_assert(ROW == 4 * TILE, "a row of a tile is four weights of each row of a panel");

typedef int32_t  v8i __attribute__((vector_size(32)));
typedef uint32_t tile_sums[TILE][TILE];

INLINE v4i four_dwords(const char * p) {
    v4i x;
    memcpy(&x, p, sizeof(x));
    return x;
}

INLINE vw join(v4i a, v4i b, v4i c, v4i d) {
    const v8i ab = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
    const v8i cd = __builtin_shufflevector(c, d, 0, 1, 2, 3, 4, 5, 6, 7);
    return (vw) __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

// out[i] = dword i of the 16 bytes at `at` of each row's block
INLINE void transpose(const char * const * rows, size_t at, vw * out) {
    vw v[4];
    UNROLL for (int i = 0; i < 4; i++) { // rows i, 4 + i, 8 + i, 12 + i
        v[i] = join(four_dwords(rows[i] + at), four_dwords(rows[4 + i] + at), four_dwords(rows[8 + i] + at),
                    four_dwords(rows[12 + i] + at));
    }
#define LOW_OF(a, b) \
    __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define HIGH_OF(a, b) \
    __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define LOW_PAIRS_OF(a, b) \
    __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define HIGH_PAIRS_OF(a, b) \
    __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
    const vw a = LOW_OF(v[0], v[1]), b = HIGH_OF(v[0], v[1]), c = LOW_OF(v[2], v[3]), d = HIGH_OF(v[2], v[3]);
    out[0] = LOW_PAIRS_OF(a, c);
    out[1] = HIGH_PAIRS_OF(a, c);
    out[2] = LOW_PAIRS_OF(b, d);
    out[3] = HIGH_PAIRS_OF(b, d);
#undef LOW_OF
#undef HIGH_OF
#undef LOW_PAIRS_OF
#undef HIGH_PAIRS_OF
}

static void fetch(const char * p, int64_t n) {
    for (int64_t i = 0; i < n; i += LINE) {
        __builtin_prefetch(p + i, 0, 2);
    }
}
