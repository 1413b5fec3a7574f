// Tiles of AMX, of 16 rows of 64 bytes, and the vectors of 16 floats that go with them.
//
// The operations are inline assembly. GCC's intrinsic for the configuration does not tell the compiler that its memory
// is read: GCC 12 drops the stores to a configuration on the stack, and the processor finds an empty one. So here
// configurations are constants in static memory, each operation is volatile, so that their order stays, and each that
// reads or writes memory says so. Compilers use no tiles of their own, so none needs to be named as changed.
//
// A tile's number is a digit in the source. AT&T's order of operands is the reverse of the manual's:
// TDPBF16PS sums, rows, columns is written "tdpbf16ps columns, rows, sums".
//
// With MLLAMA_AMX_EMULATED the same names are plain C that checks their use, see native/tests/kernels. With
// MLLAMA_AMX_TRAPPED too, tiles are as here, and only the vectors are plain C.
#pragma once

#define LANES 16
#include "kernels/simd_types.h"

// As the processor reads it: the sizes of each tile
typedef struct amx_tiles {
    uint8_t  palette, start_row, reserved[14];
    uint16_t row_bytes[16]; // of which 8 exist
    uint8_t  rows[16];
} __attribute__((aligned(64))) amx_tiles;
_Static_assert(sizeof(amx_tiles) == 64, "the processor reads 64 bytes");

typedef int16_t vs __attribute__((vector_size(64)));

enum { TILE = 16 }; // rows; and in a row: sums, pairs of BF16 or fours of 8 bits

// A list of configurations, by a number of rows or of what is in a row
#define ONE_TO_16(t) \
    t(1), t(2), t(3), t(4), t(5), t(6), t(7), t(8), t(9), t(10), t(11), t(12), t(13), t(14), t(15), t(16)

#if !defined(MLLAMA_AMX_EMULATED) || defined(MLLAMA_AMX_TRAPPED)
// Before all others. All tiles become 0.
#define AMX_CONFIGURE(tiles) __asm__ volatile("ldtilecfg %0" : : "m"(*(tiles)) : "memory")
// After the last one: so long as tiles are in use, each switch of tasks saves them.
#define AMX_RELEASE() __asm__ volatile("tilerelease" : : : "memory")
#define AMX_ZERO(t) __asm__ volatile("tilezero %%tmm" #t : :)
// Rows `stride` bytes apart; 0: the same row for all
#define AMX_LOAD(t, from, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t : : "r"(from), "r"((int64_t) (stride)) : "memory")
#define AMX_STORE(t, to, stride) \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" : : "r"(to), "r"((int64_t) (stride)) : "memory")
// sums[i][j] += rows[i][k] columns[k][j] for all k, pairs of BF16
#define AMX_MULTIPLY_BF16(sums, rows, columns) \
    __asm__ volatile("tdpbf16ps %%tmm" #columns ", %%tmm" #rows ", %%tmm" #sums : :)
// The same for fours of 8 bits, signed ones in rows, and signed or unsigned ones in columns; sums of 32 bits
#define AMX_MULTIPLY_INT8(sums, rows, columns) \
    __asm__ volatile("tdpbssd %%tmm" #columns ", %%tmm" #rows ", %%tmm" #sums : :)
#define AMX_MULTIPLY_UINT8(sums, rows, columns) \
    __asm__ volatile("tdpbsud %%tmm" #columns ", %%tmm" #rows ", %%tmm" #sums : :)
#endif

#ifdef MLLAMA_AMX_EMULATED
#include "amx_emulated.h"
#else
#include <immintrin.h>

INLINE vf vmax(vf a, vf b) {
    return _mm512_max_ps(a, b);
}

INLINE vf widen(const ggml_fp16_t * p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p));
}

#ifdef __AVX512BW__
// Sums of two products each of 8 bits, unsigned in a and signed in b, that fit 16 bits
INLINE vs multiply_bytes(vw a, vw b) {
    return (vs) _mm512_maddubs_epi16((__m512i) a, (__m512i) b);
}
#endif

#ifdef __AVX512VNNI__
// sums + the two products of 16 bits, signed, in each lane
INLINE vi add_products(vi sums, vw a, vw b) {
    return (vi) _mm512_dpwssd_epi32((__m512i) sums, (__m512i) a, (__m512i) b);
}
#endif

#ifdef __AVX512BF16__
// 32 values become 16 pairs
INLINE void narrow_two(vf a, vf b, bf16_pair * to) {
    _mm512_storeu_si512(to, (__m512i) _mm512_cvtne2ps_pbh(b, a));
}
#endif
#endif
