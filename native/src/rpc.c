// Devices of other processes, by ggml's RPC backend.
#include "devices.h"
#include "guard.h"

#include "ggml.h"

static mllama_status no_rpc(void) {
    return fail(
        MLLAMA_ERR_BACKEND,
        "the installed llama-cpp-python has no RPC; run: CMAKE_ARGS=\"-DGGML_RPC=ON\" pip install --force-reinstall "
        "--no-deps --no-cache-dir --no-binary llama-cpp-python llama-cpp-python==" MLLAMA_LLAMA_CPP_VERSION);
}

static mllama_status find_function(const char * name, void ** function) {
    TRY(devices_init());
    TRY(guard_rpc_function(name, function));
    return *function ? MLLAMA_OK : no_rpc();
}

bool mllama_rpc_available(void) {
    void * function = NULL;
    return find_function("ggml_backend_rpc_add_server", &function) == MLLAMA_OK;
}

mllama_status mllama_rpc_add(const char * endpoint) {
    void * function = NULL;
    bool   found    = false;
    TRY(find_function("ggml_backend_rpc_add_server", &function));
    TRY(guard_rpc_add((rpc_add_server_fn) function, endpoint, &found));
    return found ? MLLAMA_OK : fail(MLLAMA_ERR_BACKEND, "worker %s has no devices", endpoint);
}

mllama_status mllama_rpc_serve(const char * endpoint, const char * cache_dir, int32_t n_threads, int32_t n_devices,
                               const int32_t * devices) {
    void * function = NULL;
    TRY(find_function("ggml_backend_rpc_start_server", &function));
    if (n_devices < 1 || n_devices > MAX_DEVICES) {
        return fail(MLLAMA_ERR_ARGUMENT, "%d devices to serve; 1 to %d are possible", n_devices, MAX_DEVICES);
    }
    if (n_threads > GGML_MAX_N_THREADS) {
        return fail(MLLAMA_ERR_ARGUMENT, "%d threads to serve with; at most %d are possible", n_threads,
                    GGML_MAX_N_THREADS);
    }
    ggml_backend_dev_t served[MAX_DEVICES];
    for (int32_t i = 0; i < n_devices; i++) {
        served[i] = devices_get(devices[i]);
        if (!served[i]) {
            return fail(MLLAMA_ERR_ARGUMENT, "no device %d to serve; there are %d", devices[i], devices_count());
        }
        TRY(device_start(served[i]));
    }
    TRY(guard_rpc_serve((rpc_start_server_fn) function, endpoint, cache_dir, n_threads > 0 ? n_threads : 1, n_devices,
                        served));
    return fail(MLLAMA_ERR_BACKEND, "the worker at %s stopped; is the port in use?", endpoint);
}
