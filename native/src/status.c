#include "status.h"

#include "ggml.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char last_error[1024];
static _Thread_local char last_ggml_error[512];

static pthread_mutex_t     log_mutex = PTHREAD_MUTEX_INITIALIZER;
static mllama_log_callback log_callback;
static void *              log_user_data;
static bool                log_installed;

const char * mllama_last_error(void) {
    return last_error;
}

mllama_status fail(mllama_status status, const char * format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(last_error, sizeof(last_error), format, args);
    va_end(args);
    return status;
}

enum { LOG_OWN_WARNING = 6 }; // beside ggml's levels

static void log_emit(int32_t level, const char * text) {
    pthread_mutex_lock(&log_mutex);
    const mllama_log_callback callback  = log_callback;
    void * const              user_data = log_user_data;
    pthread_mutex_unlock(&log_mutex);
    if (callback) {
        callback(level, text, user_data);
    } else if (level == GGML_LOG_LEVEL_WARN || level == GGML_LOG_LEVEL_ERROR || level == LOG_OWN_WARNING) {
        fputs(text, stderr);
    }
}

static void ggml_sink(enum ggml_log_level level, const char * text, void * user_data) {
    (void) user_data;
    if (level == GGML_LOG_LEVEL_ERROR && *text != ' ') { // a backend's further lines begin with spaces
        snprintf(last_ggml_error, sizeof(last_ggml_error), "%s", text);
        last_ggml_error[strcspn(last_ggml_error, "\n")] = '\0';
    }
    log_emit((int32_t) level, text);
}

void log_install(void) {
    pthread_mutex_lock(&log_mutex);
    if (!log_installed) {
        log_installed = true;
        ggml_log_set(ggml_sink, NULL);
    }
    pthread_mutex_unlock(&log_mutex);
}

void mllama_log_set(mllama_log_callback callback, void * user_data) {
    pthread_mutex_lock(&log_mutex);
    log_callback  = callback;
    log_user_data = user_data;
    log_installed = true;
    ggml_log_set(ggml_sink, NULL); // again: another library in the process may have set its own since
    pthread_mutex_unlock(&log_mutex);
}

const char * log_last_error(void) {
    return last_ggml_error;
}

void log_forget(void) {
    last_ggml_error[0] = '\0';
}

void log_warn(const char * format, ...) {
    char    text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof(text) - 1, format, args);
    va_end(args);
    strcat(text, "\n");
    log_emit(LOG_OWN_WARNING, text);
}
