// Weights of K-quants in panels: four of each row in a lane of 32 bits, as all rows' blocks come when they are
// transposed. The file that includes this one defines before it
//
//     vw    a vector of uint32_t
#pragma once

#include "kernels/k_quants.h"

// The same four bytes in all lanes
INLINE vw bytes(uint32_t four) {
    return (vw) { 0 } + four;
}

// Of group 2 j or 2 j + 1 of Q4_K, from the bytes from 32 j on
INLINE vw q4_k_weights(vw q, const int group) {
    return (group % 2 ? q >> 4 : q) & bytes(0x0f0f0f0f);
}

// The same of Q5_K, with the bits above them
INLINE vw q5_k_weights(vw q, vw high, const int group) {
    const vw above = group <= 4 ? high << (4 - group) : high >> (group - 4);
    return q4_k_weights(q, group) | (above & bytes(0x10101010));
}

// Of group 4 h + s of Q6_K: from the low bytes 64 h + i, and 32 further on, and from the high ones
INLINE vw q6_k_weights(vw low, vw further, vw high, const int s) {
    const vw lower = s % 2 ? further : low;
    const vw upper = s < 2 ? high << (4 - 2 * s) : high >> (2 * s - 4);
    return ((s < 2 ? lower : lower >> 4) & bytes(0x0f0f0f0f)) | (upper & bytes(0x30303030));
}

// The first 16 bytes of blocks of Q4_K or Q5_K: d and dmin, scales and mins
typedef struct k_head {
    vw factors;            // d, and dmin in the upper half
    vw scales[2], mins[2]; // bytes, 0 to 3 and 4 to 7
} k_head;

INLINE k_head k_head_of(const vw * dwords) {
    const vw six = bytes(0x3f3f3f3f), low = bytes(0x0f0f0f0f), top = bytes(0x30303030);
    return (k_head) {
        dwords[0],
        { dwords[1] & six, (dwords[3] & low) | (dwords[1] >> 2 & top) },
        { dwords[2] & six, (dwords[3] >> 4 & low) | (dwords[2] >> 2 & top) },
    };
}

// Byte i
INLINE vw byte_at(const vw * dwords, const int i) {
    return dwords[i / 4] >> (8 * (i % 4)) & 0xff;
}

// Bytes 2 i and 2 i + 1, of 16 bits each
INLINE vw pair_at(const vw * dwords, const int i) {
    const vw two = dwords[i / 2] >> (16 * (i % 2));
    return (two & 0xff) | (two << 8 & 0xff0000);
}
