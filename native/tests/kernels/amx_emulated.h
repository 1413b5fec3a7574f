// The tiles of AMX in plain C, for kernels that are built with MLLAMA_AMX_EMULATED, see kernels/amx.h. An operation
// that the processor would refuse ends the test.
#pragma once

#ifndef MLLAMA_AMX_TRAPPED
#define AMX_CONFIGURE(tiles) amx_emulated_configure(tiles)
#define AMX_RELEASE() amx_emulated_release()
#define AMX_ZERO(t) amx_emulated_zero(t)
#define AMX_LOAD(t, from, stride) amx_emulated_load(t, from, stride)
#define AMX_STORE(t, to, stride) amx_emulated_store(t, to, stride)
#define AMX_MULTIPLY_BF16(sums, rows, columns) amx_emulated_multiply_bf16(sums, rows, columns)
#define AMX_MULTIPLY_INT8(sums, rows, columns) amx_emulated_multiply_int8(sums, rows, columns, true)
#define AMX_MULTIPLY_UINT8(sums, rows, columns) amx_emulated_multiply_int8(sums, rows, columns, false)
#endif

void amx_emulated_configure(const amx_tiles * tiles);
void amx_emulated_release(void);
void amx_emulated_zero(int t);
void amx_emulated_load(int t, const void * from, int64_t stride);
void amx_emulated_store(int t, void * to, int64_t stride);
void amx_emulated_multiply_bf16(int sums, int rows, int columns);
void amx_emulated_multiply_int8(int sums, int rows, int columns, bool columns_signed);

// What AVX-512 gives beside them
void amx_emulated_widen(const ggml_fp16_t * from, float * to); // 16 values
void amx_emulated_narrow(const float * from, bf16_pair * to);  // 32 values
void amx_emulated_multiply_bytes(const uint8_t * a, const int8_t * b, int16_t * out); // 64 each, and 32
void amx_emulated_add_products(int32_t * sums, const int16_t * a, const int16_t * b);  // 16, and 32 each
void amx_emulated_quantize(const float * x, int64_t n, void * out);
void amx_emulated_multiply_column(const struct ggml_tensor * w, const void * x, int64_t first, int64_t end,
                                  int64_t then, float * out);
void amx_emulated_quantize_32(const float * x, int64_t n, void * out);
void amx_emulated_multiply_column_32(const struct ggml_tensor * w, const void * x, int64_t first, int64_t end,
                                     int64_t then, float * out);

INLINE vf vmax(vf a, vf b) {
    const vi mask = a > b;
    return (vf) (((vi) a & mask) | ((vi) b & ~mask));
}

INLINE vf widen(const ggml_fp16_t * p) {
    vf x;
    amx_emulated_widen(p, (float *) &x);
    return x;
}

INLINE vs multiply_bytes(vw a, vw b) {
    vs out;
    amx_emulated_multiply_bytes((const uint8_t *) &a, (const int8_t *) &b, (int16_t *) &out);
    return out;
}

INLINE vi add_products(vi sums, vw a, vw b) {
    amx_emulated_add_products((int32_t *) &sums, (const int16_t *) &a, (const int16_t *) &b);
    return sums;
}

INLINE void narrow_two(vf a, vf b, bf16_pair * to) {
    float both[2 * LANES];
    STORE(both, a);
    STORE(both + LANES, b);
    amx_emulated_narrow(both, to);
}
