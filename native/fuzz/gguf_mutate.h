// GGUF files taken apart, changed and put together again, so that changes get past the first checks of a reader.
#pragma once

#include <stddef.h>
#include <stdint.h>

typedef struct bytes {
    uint8_t * data;
    size_t    n;
} bytes;

// All random numbers of a run come from its seed.
uint64_t random_next(void);
uint64_t random_below(uint64_t n); // 0 <= result < n; 0 for n = 0
void     random_seed(uint64_t seed);

// Memory of one input: everything that mutate() allocates is gone at the next arena_reset().
void arena_reset(void);

// Words that are put in place of names of keys and tensors. The text must stay.
void dictionary_add(const char * word, size_t n);
void dictionary_learn(bytes file); // all names in a file

// A changed copy of `file`: keys, tensor table and data as structures, or bytes where it cannot be taken apart.
bytes mutate(bytes file);
