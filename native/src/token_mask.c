#include "mllama.h"

#include <math.h>
#include <string.h>

enum {
    WORD    = 32,   // tokens whose bits are one word
    STRETCH = 1024, // tokens after which the likeliest of them are compared
};

static const uint32_t MINUS_INFINITY = 0xff800000; // its bits

// Whether the word has fewer than five bits.
static bool is_few(uint32_t word) {
    for (int i = 0; i < 4; i++) {
        word &= word - 1; // without its lowest bit, if it has one
    }
    return word == 0;
}

static bool has(const uint32_t * bits, int64_t token) {
    return bits[token / WORD] >> (token % WORD) & 1;
}

// best[i] = the greater of best[i] and logit i of a word, if the word has its bit. The bits are constants and the
// elements have nothing to do with each other: a compiler can do several of them in one instruction, without leave to
// change the order of anything. A comparison with NaN is false.
static void take_greater(float * restrict best, const float * restrict logits, uint32_t word) {
    static const uint32_t BIT[WORD] = {
        1u << 0,  1u << 1,  1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,  1u << 7,
        1u << 8,  1u << 9,  1u << 10, 1u << 11, 1u << 12, 1u << 13, 1u << 14, 1u << 15,
        1u << 16, 1u << 17, 1u << 18, 1u << 19, 1u << 20, 1u << 21, 1u << 22, 1u << 23,
        1u << 24, 1u << 25, 1u << 26, 1u << 27, 1u << 28, 1u << 29, 1u << 30, 1u << 31,
    };
    uint32_t chosen[WORD];
    float    some[WORD];
    memcpy(chosen, logits, sizeof(chosen));
    for (int i = 0; i < WORD; i++) {
        const uint32_t all = -(uint32_t) ((word & BIT[i]) != 0);
        chosen[i] = (chosen[i] & all) | (MINUS_INFINITY & ~all);
    }
    memcpy(some, chosen, sizeof(some));
    for (int i = 0; i < WORD; i++) {
        best[i] = some[i] > best[i] ? some[i] : best[i];
    }
}

// The same for a word with all bits, and for one with few.
static void take_greater_of_all(float * restrict best, const float * restrict logits) {
    for (int i = 0; i < WORD; i++) {
        best[i] = logits[i] > best[i] ? logits[i] : best[i];
    }
}

static void take_greater_of_few(float * best, const float * logits, uint32_t word) {
    for (; word; word &= word - 1) {
        const float logit = logits[__builtin_ctz(word)];
        best[0] = logit > best[0] ? logit : best[0];
    }
}

// The greatest logit of the tokens [first, end) with a bit; -INFINITY: there is none
static float greatest(const float * logits, const uint32_t * bits, int64_t first, int64_t end) {
    float best[WORD];
    for (int i = 0; i < WORD; i++) {
        best[i] = -INFINITY;
    }
    int64_t token = first;
    for (; token + WORD <= end; token += WORD) {
        const uint32_t word = bits[token / WORD];
        if (word == UINT32_MAX) {
            take_greater_of_all(best, logits + token);
        } else if (is_few(word)) {
            take_greater_of_few(best, logits + token, word);
        } else {
            take_greater(best, logits + token, word);
        }
    }
    for (; token < end; token++) {
        if (has(bits, token) && logits[token] > best[0]) {
            best[0] = logits[token];
        }
    }
    for (int i = 1; i < WORD; i++) {
        best[0] = best[i] > best[0] ? best[i] : best[0];
    }
    return best[0];
}

int64_t mllama_likeliest(const float * logits, int64_t n_logits, const uint32_t * bits, int64_t n_words) {
    const int64_t n = n_logits / WORD < n_words ? n_logits : n_words * WORD;
    float   best = -INFINITY;
    int64_t at = 0;
    for (int64_t first = 0; first < n; first += STRETCH) {
        const float one = greatest(logits, bits, first, first + STRETCH < n ? first + STRETCH : n);
        if (one > best) {
            best = one;
            at = first;
        }
    }
    // Where no logit is above -INFINITY every token with a bit is as likely as any other.
    for (int64_t token = at; token < n; token++) {
        if (has(bits, token) && (logits[token] == best || best == -INFINITY)) {
            return token;
        }
    }
    return -1;
}

int64_t mllama_candidates(const float * logits, int64_t n_logits, const uint32_t * bits, int64_t n_words,
                          mllama_candidate * candidates) {
    const int64_t n = n_logits / WORD < n_words ? n_logits : n_words * WORD;
    int64_t found = 0;
    for (int64_t first = 0; first < n; first += WORD) {
        uint32_t word = bits[first / WORD];
        if (n - first < WORD) {
            word &= (1u << (n - first)) - 1;
        }
        if (is_few(word)) {
            for (; word; word &= word - 1) {
                const int64_t token = first + __builtin_ctz(word);
                candidates[found++] = (mllama_candidate) { (int32_t) token, logits[token], 0.0f };
            }
            continue;
        }
        // Each is written, and the next one over it if it has no bit: there is room, and no branch to be guessed.
        for (int64_t token = first; word; token++, word >>= 1) {
            candidates[found] = (mllama_candidate) { (int32_t) token, logits[token], 0.0f };
            found += word & 1;
        }
    }
    return found;
}
