// What the files of CPU code share.
#pragma once

#include <stdint.h>

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

static inline int64_t round_up(int64_t n, int64_t to) {
    return (n + to - 1) / to * to;
}
