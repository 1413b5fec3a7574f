// The error of the calling thread, and the log.
#pragma once

#include "mllama.h"

#ifdef __cplusplus
extern "C" {
#endif

// Formats the words of mllama_last_error() and returns the status, so that callers can `return fail(...)`.
mllama_status fail(mllama_status status, const char * format, ...) __attribute__((format(printf, 2, 3)));

// Makes ggml's log lines go through this library's callback. Safe to call often.
void log_install(void);

// Last error line that ggml logged on this thread since log_forget(), or "".
const char * log_last_error(void);
void         log_forget(void);

void log_warn(const char * format, ...) __attribute__((format(printf, 1, 2)));

// return on failure
#define TRY(expr)                             \
    do {                                      \
        const mllama_status try_ = (expr);    \
        if (try_ != MLLAMA_OK) return try_;   \
    } while (0)

#ifdef __cplusplus
}
#endif
