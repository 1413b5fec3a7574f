// The weights of K-quants, a block of each row of a panel, in lanes. The file that includes this one defines before it
//
//     panel
//     void transpose(const char * const * rows, size_t at, vw * out)    dword i of the 16 bytes at `at` of each row
//     void store_step(panel * p, int group, int i, vw w)                weights 32 group + 4 i and the next three
#pragma once

#include "kernels/k_panels.h"

// Of Q4_K or, `five`, of Q5_K
INLINE void unpack_four_or_five_bits(const bool five, const char * const * rows, panel * p) {
    const size_t at = five ? offsetof(q5_k_block, q) : offsetof(q4_k_block, q);
    UNROLL for (int half = 0; half < 2; half++) { // 16 of the 32 bytes of two groups
        vw high[4];
        if (five) {
            transpose(rows, offsetof(q5_k_block, high) + (size_t) (16 * half), high);
        }
        UNROLL for (int j = 0; j < 8; j += 2) {
            vw w[4];
            transpose(rows, at + (size_t) (16 * j + 16 * half), w);
            UNROLL for (int i = 0; i < 4; i++) {
                UNROLL for (int k = j; k < j + 2; k++) {
                    store_step(p, k, 4 * half + i, five ? q5_k_weights(w[i], high[i], k) : q4_k_weights(w[i], k));
                }
            }
        }
    }
}

// Of Q6_K
INLINE void unpack_six_bits(const char * const * rows, panel * p) {
    for (int half = 0; half < 2; half++) {
        UNROLL for (int j = 0; j < 2; j++) { // 16 bytes each
            const size_t at = offsetof(q6_k_block, low) + (size_t) (64 * half + 16 * j);
            vw           a[4], b[4], high[4];
            transpose(rows, at, a);
            transpose(rows, at + 32, b);
            transpose(rows, offsetof(q6_k_block, high) + (size_t) (32 * half + 16 * j), high);
            UNROLL for (int i = 0; i < 4; i++) {
                UNROLL for (int k = 0; k < 4; k++) {
                    store_step(p, 4 * half + k, 4 * j + i, q6_k_weights(a[i], b[i], high[i], k));
                }
            }
        }
    }
}
