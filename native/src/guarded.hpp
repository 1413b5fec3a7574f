// For guard.cpp alone: runs what may throw, and turns an exception into a status and words that name the device. A call
// in which ggml wants to end the process throws too.
#pragma once

#include "guard.h"

#include "devices.h"

#include "ggml-alloc.h"

#include <atomic>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cxxabi.h>
#include <exception>
#include <new>
#include <stdexcept>

namespace {

// The words of an exception as one line that fits an error message
struct words {
    char text[400];

    explicit words(const char * what) {
        std::snprintf(text, sizeof(text), "%s", what && *what ? what : "no reason given");
        for (char * c = text; *c; c++) {
            if (std::iscntrl((unsigned char) *c)) *c = c[1] ? ' ' : '\0';
        }
    }

    // Drivers' exceptions have one type for all reasons.
    bool of_memory() const {
        return std::strstr(text, "OutOfDeviceMemory") || std::strstr(text, "OutOfHostMemory") ||
               std::strstr(text, "ut of memory") || std::strstr(text, "mem_buffer != NULL"); // of ggml_init
    }
};

// How many guarded calls this thread is in
thread_local int depth;

struct inside {
    inside() { depth++; }
    ~inside() { depth--; }
    inside(const inside &) = delete;
    inside & operator=(const inside &) = delete;
};

std::atomic<mllama_fatal_callback> fatal_callback;

// For ggml_set_abort_callback. ggml ends the process where an assertion fails, and CUDA does so at every error of its
// driver, one of memory too. In a guarded call that becomes an exception, which passes through C functions: all our
// platforms have unwind tables for them. Not so for two backends: the CPU's other threads would wait for this one for
// ever, and a lost worker needs a new process, because ggml connects to each only once (backend/isolated.py).
void on_fatal(const char * text) {
    if (depth > 0 && !std::strstr(text, "ggml-cpu") && !std::strstr(text, "ggml-rpc")) {
        const char * slash  = std::strrchr(text, '/');
        const char * reason = slash ? slash + 1 : text; // file:line: message
        const char * logged = log_last_error();         // has the driver's words
        const char * colon  = std::strstr(reason, ": ");
        const size_t common = colon ? std::strlen(colon + 2) : 0;
        throw std::runtime_error(common && !std::strncmp(logged, colon + 2, common) ? logged : reason);
    }
    const mllama_fatal_callback callback = fatal_callback;
    if (callback) {
        callback(text);
    } else {
        std::fprintf(stderr, "%s\n", text);
    }
}

// Runs call(), and answers an exception by describe(words, of_memory). Forced unwinding must continue, so none of these
// functions is noexcept: it ends a thread, as Python does with a daemon thread that is in a callback when the
// interpreter finalizes.
template <class Call, class Describe> mllama_status guarded(Call && call, Describe && describe) {
    try {
        const inside here;
        call();
        return MLLAMA_OK;
#ifdef __GLIBCXX__
    } catch (const abi::__forced_unwind &) {
        throw;
#endif
    } catch (const std::bad_alloc &) {
        return describe("out of memory", true);
    } catch (const std::exception & e) {
        const words w(e.what());
        return describe(w.text, w.of_memory());
    } catch (...) {
        return describe("an unknown exception", false);
    }
}

mllama_status say(const char * where, const char * what, bool of_memory) {
    return fail(of_memory ? MLLAMA_ERR_MEMORY : MLLAMA_ERR_BACKEND, "%s: %s", where, what);
}

// doing: as in "device X failed while DOING"
template <class Call> mllama_status on_device(ggml_backend_dev_t device, const char * doing, Call && call) {
    return guarded(call, [&](const char * what, bool of_memory) {
        char where[400];
        std::snprintf(where, sizeof(where), "device %s failed while %s", device ? device_label(device) : "CPU", doing);
        return say(where, what, of_memory);
    });
}

template <class Call> mllama_status in_type(ggml_backend_buffer_type_t type, const char * doing, Call && call) {
    return on_device(ggml_backend_buft_get_device(type), doing, call);
}

ggml_backend_dev_t device_of(const ggml_tensor * t) {
    const ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    return buffer ? ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer)) : nullptr;
}

// For what cannot fail: an object that is given back
template <class Call> void freeing(Call && call) {
    guarded(call, [](const char * what, bool) {
        log_warn("a device failed while memory was given back: %s", what);
        return MLLAMA_ERR_BACKEND;
    });
}

// Whether a backend still does the simplest things: takes two numbers, adds them, gives the sum back
bool answers(ggml_backend_t backend) {
    bool                  ok     = false;
    ggml_backend_buffer_t buffer = nullptr;
    ggml_context *        ctx    = nullptr;
    if (guard_context(8 * ggml_tensor_overhead() + ggml_graph_overhead(), &ctx) != MLLAMA_OK) {
        return true; // who knows
    }
    const auto add = [&] {
        const float   numbers[64] = { 1.0f };
        float         sum         = 0.0f;
        ggml_tensor * x = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 64), * y = ggml_add(ctx, x, x);
        ggml_cgraph * gf = ggml_new_graph(ctx);
        ggml_build_forward_expand(gf, y);
        ggml_backend_synchronize(backend);
        buffer = ggml_backend_dev_supports_op(ggml_backend_get_device(backend), y)
                     ? ggml_backend_alloc_ctx_tensors(ctx, backend)
                     : nullptr;
        if (buffer && ggml_backend_supports_buft(backend, ggml_backend_buffer_get_type(buffer))) {
            ggml_backend_buffer_is_host(buffer);
            ggml_backend_buffer_reset(buffer);
            ggml_backend_tensor_set(x, numbers, 0, sizeof(numbers));
            const bool computed = ggml_backend_graph_compute(backend, gf) == GGML_STATUS_SUCCESS;
            ggml_backend_tensor_get(y, &sum, 0, sizeof(sum));
            ok = computed && sum == 2.0f;
        }
    };
    guarded(add, [](const char *, bool) { return MLLAMA_ERR_BACKEND; });
    freeing([&] { ggml_backend_buffer_free(buffer); });
    ggml_free(ctx);
    return ok;
}

// An exception of a graph that is spread over devices does not tell which of them it is from. Names the ones that do
// not answer any more, or else all that it can be from.
void name_suspects(const ggml_backend_t * backends, int n, char * names, size_t size) {
    bool found = false;
    std::snprintf(names, size, "CPU");
    for (int i = 0, listed = 0; i < n; i++) {
        const ggml_backend_dev_t device = ggml_backend_get_device(backends[i]);
        if (device_is_rpc(device) || device_is_cpu(device)) {
            continue; // the one ends the process instead, the other has no exceptions
        }
        const bool silent = !answers(backends[i]);
        if (silent && !found) {
            found = true;
            listed = 0;
        }
        if (silent || !found) {
            const size_t used = listed ? std::strlen(names) : 0;
            std::snprintf(names + used, size - used, "%s%s", listed ? " or " : "", device_label(device));
            listed++;
        }
    }
}

template <class Call>
mllama_status on_backends(const ggml_backend_t * backends, int n, const char * doing, Call && call) {
    return guarded(call, [&](const char * what, bool of_memory) {
        char names[300], where[400];
        name_suspects(backends, n, names, sizeof(names));
        std::snprintf(where, sizeof(where), "device %s failed while %s", names, doing);
        return say(where, what, of_memory);
    });
}

template <class Call> mllama_status in_sched(ggml_backend_sched_t sched, const char * doing, Call && call) {
    ggml_backend_t backends[64];
    int            n = 0;
    for (; n < ggml_backend_sched_get_n_backends(sched) && n < 64; n++) {
        backends[n] = ggml_backend_sched_get_backend(sched, n);
    }
    return on_backends(backends, n, doing, call);
}

template <class Call> mllama_status in_registry(Call && call) {
    return guarded(call, [](const char * what, bool of_memory) {
        return say("ggml cannot register the devices of this machine", what, of_memory);
    });
}

template <class Call> mllama_status with_worker(const char * endpoint, const char * state, Call && call) {
    return guarded(call, [&](const char * what, bool of_memory) {
        char where[300];
        std::snprintf(where, sizeof(where), "worker %s %s", endpoint, state);
        return say(where, what, of_memory);
    });
}

} // namespace
