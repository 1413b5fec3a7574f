// The one C++ file of the library: it catches what ggml's backends throw. See guard.h.
#include "guarded.hpp"

// ---- devices ------------------------------------------------------------------------------------------------------

static mllama_status count_devices(int32_t * n) {
    return in_registry([&] {
        if (ggml_backend_dev_count() == 0) { // a ggml whose backends are libraries of their own
            ggml_backend_load_all();
        }
        *n = (int32_t) ggml_backend_dev_count();
    });
}

// ggml looks at GGML_BACKEND_PATH only where all of its backends are libraries of their own.
static void load_named_backend(int32_t * n) {
    static bool tried;
    const char * path = std::getenv("GGML_BACKEND_PATH");
    if (tried || !path || !*path) {
        return;
    }
    tried = true;
    log_forget();
    ggml_backend_reg_t  registry = nullptr;
    const mllama_status status   = in_registry([&] {
        registry = ggml_backend_load(path);
        *n       = (int32_t) ggml_backend_dev_count();
    });
    if (status != MLLAMA_OK || !registry) {
        log_warn("GGML_BACKEND_PATH: %s: no backend for ggml %s: %s", path, ggml_version(),
                 status != MLLAMA_OK ? mllama_last_error() : log_last_error());
    }
}

static mllama_status count_all_devices(int32_t * n) {
    static const char * const no_vulkan = "GGML_DISABLE_VULKAN"; // ggml reads this before it registers Vulkan's devices
    *n = 0;
    if (count_devices(n) == MLLAMA_OK) {
        return MLLAMA_OK;
    }
    if (std::getenv(no_vulkan)) {
        return MLLAMA_ERR_BACKEND;
    }
    // An exception there leaves no device at all, the CPU neither. ggml registers again at the next call.
    char reason[400];
    std::snprintf(reason, sizeof(reason), "%s", mllama_last_error());
    setenv(no_vulkan, "1", 1);
    const mllama_status status = count_devices(n);
    if (status == MLLAMA_OK) {
        log_warn("%s; without Vulkan it can", reason);
    } else {
        unsetenv(no_vulkan);
    }
    return status;
}

// A backend that was built in, but finds no device: its driver is missing, or the machine has no such device. RPC has
// none before a worker is added.
static void tell_idle_backends() {
    static bool told;
    if (told) {
        return;
    }
    told = true;
    (void) in_registry([&] {
        for (size_t i = 0; i < ggml_backend_reg_count(); i++) {
            const ggml_backend_reg_t registry = ggml_backend_reg_get(i);
            if (ggml_backend_reg_dev_count(registry) > 0) {
                continue;
            }
            const char * name = ggml_backend_reg_name(registry);
            if (std::strcmp(name, "RPC") != 0) {
                log_warn("ggml's %s backend finds no device here, so nothing runs on it; is its driver installed?",
                         name);
            }
        }
    });
}

void mllama_fatal_set(mllama_fatal_callback callback) {
    fatal_callback = callback;
    ggml_set_abort_callback(on_fatal);
}

mllama_status guard_count_devices(int32_t * n) {
    ggml_set_abort_callback(on_fatal);
    TRY(count_all_devices(n));
    load_named_backend(n);
    tell_idle_backends();
    return MLLAMA_OK;
}

mllama_status guard_device(int32_t index, ggml_backend_dev_t * device) {
    return in_registry([&] { *device = ggml_backend_dev_get((size_t) index); });
}

mllama_status guard_name(ggml_backend_dev_t device, const char ** name) {
    return on_device(device, "telling its name", [&] { *name = ggml_backend_dev_name(device); });
}

mllama_status guard_description(ggml_backend_dev_t device, const char ** description) {
    return on_device(device, "telling its description", [&] { *description = ggml_backend_dev_description(device); });
}

mllama_status guard_type(ggml_backend_dev_t device, enum ggml_backend_dev_type * type) {
    return on_device(device, "telling its type", [&] { *type = ggml_backend_dev_type(device); });
}

mllama_status guard_registry_name(ggml_backend_dev_t device, const char ** name) {
    return on_device(device, "telling its backend",
                     [&] { *name = ggml_backend_reg_name(ggml_backend_dev_backend_reg(device)); });
}

mllama_status guard_memory(ggml_backend_dev_t device, size_t * free_bytes, size_t * total_bytes) {
    *free_bytes = *total_bytes = 0;
    return on_device(device, "telling its memory", [&] { ggml_backend_dev_memory(device, free_bytes, total_bytes); });
}

mllama_status guard_start(ggml_backend_dev_t device, ggml_backend_t * backend) {
    *backend = nullptr;
    return on_device(device, "starting", [&] { *backend = ggml_backend_dev_init(device, nullptr); });
}

mllama_status guard_buffer_type(ggml_backend_dev_t device, ggml_backend_buffer_type_t * type) {
    *type = nullptr;
    return on_device(device, "telling its kind of memory", [&] { *type = ggml_backend_dev_buffer_type(device); });
}

mllama_status guard_host_buffer_type(ggml_backend_dev_t device, ggml_backend_buffer_type_t * type) {
    *type = nullptr;
    return on_device(device, "telling its kind of memory", [&] { *type = ggml_backend_dev_host_buffer_type(device); });
}

mllama_status guard_supports_op(ggml_backend_dev_t device, const struct ggml_tensor * op, bool * ok) {
    *ok = false;
    return on_device(device, "telling what it computes", [&] { *ok = ggml_backend_dev_supports_op(device, op); });
}

mllama_status guard_function(ggml_backend_dev_t device, const char * name, void ** function) {
    *function = nullptr;
    return on_device(device, "telling its functions", [&] {
        *function = ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), name);
    });
}

const char * guard_layout_name(ggml_backend_buffer_type_t type) {
    const char * name = "";
    in_type(type, "telling its kind of memory", [&] { name = ggml_backend_buft_name(type); });
    return name;
}

void guard_backend_free(ggml_backend_t backend) {
    freeing([&] { ggml_backend_free(backend); });
}

// ---- RPC ----------------------------------------------------------------------------------------------------------

mllama_status guard_rpc_function(const char * name, void ** function) {
    *function = nullptr;
    return in_registry([&] {
        const ggml_backend_reg_t reg = ggml_backend_reg_by_name("RPC");
        *function = reg ? ggml_backend_reg_get_proc_address(reg, name) : nullptr;
    });
}

mllama_status guard_rpc_add(rpc_add_server_fn add_server, const char * endpoint, bool * found) {
    *found = false;
    const auto call = [&] {
        const ggml_backend_reg_t reg = add_server(endpoint);
        *found = reg != nullptr;
        for (size_t i = 0; reg && i < ggml_backend_reg_dev_count(reg); i++) {
            if (ggml_backend_dev_by_name(ggml_backend_dev_name(ggml_backend_reg_dev_get(reg, i)))) {
                return; // added before
            }
        }
        if (reg) {
            ggml_backend_register(reg);
        }
    };
    return with_worker(endpoint, "cannot be added", call);
}

mllama_status guard_rpc_serve(rpc_start_server_fn start_server, const char * endpoint, const char * cache_dir,
                              int32_t n_threads, int32_t n_devices, ggml_backend_dev_t * devices) {
    const auto call = [&] { start_server(endpoint, cache_dir, (size_t) n_threads, (size_t) n_devices, devices); };
    return with_worker(endpoint, "stopped", call);
}

// ---- buffers and tensors ------------------------------------------------------------------------------------------

mllama_status guard_alloc_tensors(struct ggml_context * ctx, ggml_backend_buffer_type_t type,
                                  ggml_backend_buffer_t * buffer) {
    *buffer = nullptr;
    return in_type(type, "allocating memory", [&] { *buffer = ggml_backend_alloc_ctx_tensors_from_buft(ctx, type); });
}

mllama_status guard_measure_tensors(struct ggml_context * ctx, ggml_backend_buffer_type_t type, uint64_t * size) {
    *size = 0;
    return in_type(type, "measuring memory", [&] { *size = ggml_backend_alloc_ctx_tensors_from_buft_size(ctx, type); });
}

mllama_status guard_alloc_buffer(ggml_backend_buffer_type_t type, size_t size, ggml_backend_buffer_t * buffer) {
    *buffer = nullptr;
    return in_type(type, "allocating memory", [&] { *buffer = ggml_backend_buft_alloc_buffer(type, size); });
}

mllama_status guard_wrap_memory(void * data, size_t size, ggml_backend_buffer_t * buffer) {
    *buffer = nullptr;
    return on_device(nullptr, "using memory in place", [&] { *buffer = ggml_backend_cpu_buffer_from_ptr(data, size); });
}

mllama_status guard_place_tensor(ggml_backend_buffer_t buffer, struct ggml_tensor * t, void * address) {
    enum ggml_status status = GGML_STATUS_FAILED;
    TRY(in_type(ggml_backend_buffer_get_type(buffer), "placing a tensor",
                [&] { status = ggml_backend_tensor_alloc(buffer, t, address); }));
    return status == GGML_STATUS_SUCCESS ? MLLAMA_OK
                                         : fail(MLLAMA_ERR_BACKEND, "tensor '%s' cannot be used in place", t->name);
}

mllama_status guard_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    return in_type(ggml_backend_buffer_get_type(buffer), "clearing memory",
                   [&] { ggml_backend_buffer_clear(buffer, value); });
}

mllama_status guard_set(struct ggml_tensor * t, const void * data, size_t offset, size_t size) {
    return on_device(device_of(t), "writing memory", [&] { ggml_backend_tensor_set(t, data, offset, size); });
}

mllama_status guard_get(const struct ggml_tensor * t, void * data, size_t offset, size_t size) {
    return on_device(device_of(t), "reading memory", [&] { ggml_backend_tensor_get(t, data, offset, size); });
}

bool guard_is_host(ggml_backend_buffer_t buffer) {
    bool is_host = false;
    in_type(ggml_backend_buffer_get_type(buffer), "telling its kind of memory",
            [&] { is_host = ggml_backend_buffer_is_host(buffer); });
    return is_host;
}

void guard_buffer_free(ggml_backend_buffer_t buffer) {
    freeing([&] { ggml_backend_buffer_free(buffer); });
}

mllama_status guard_context(size_t size, ggml_context ** ctx) {
    *ctx = nullptr;
    const mllama_status status = guarded([&] { *ctx = ggml_init({ size, nullptr, true }); },
                                         [](const char *, bool) { return MLLAMA_ERR_MEMORY; });
    return status == MLLAMA_OK && *ctx ? MLLAMA_OK
                                       : fail(MLLAMA_ERR_MEMORY, "out of memory: no %zu MiB for the list of tensors",
                                              size >> 20);
}

// ---- graphs -------------------------------------------------------------------------------------------------------

mllama_status guard_sched_new(ggml_backend_t * backends, int32_t n_backends, size_t n_nodes,
                              ggml_backend_sched_t * sched) {
    *sched = nullptr;
    return on_backends(backends, n_backends, "getting ready",
                       [&] { *sched = ggml_backend_sched_new(backends, nullptr, n_backends, n_nodes, false, false); });
}

mllama_status guard_sched_alloc(ggml_backend_sched_t * sched, struct ggml_cgraph * gf, bool place, bool * ok) {
    *ok = false;
    const mllama_status status = in_sched(*sched, "making room for a graph", [&] {
        *ok = place ? ggml_backend_sched_alloc_graph(*sched, gf) : ggml_backend_sched_reserve(*sched, gf);
    });
    if (status != MLLAMA_OK) {
        *sched = nullptr;
    }
    return status;
}

mllama_status guard_sched_measure(ggml_backend_sched_t * sched, struct ggml_cgraph * gf, size_t * sizes) {
    const mllama_status status = in_sched(*sched, "measuring a graph",
                                          [&] { ggml_backend_sched_reserve_size(*sched, gf, sizes); });
    if (status != MLLAMA_OK) {
        *sched = nullptr;
    }
    return status;
}

mllama_status guard_sched_begin(ggml_backend_sched_t sched, struct ggml_cgraph * gf, enum ggml_status * status) {
    *status = GGML_STATUS_FAILED;
    return in_sched(sched, "computing", [&] { *status = ggml_backend_sched_graph_compute_async(sched, gf); });
}

mllama_status guard_sched_wait(ggml_backend_sched_t sched) {
    return in_sched(sched, "computing", [&] { ggml_backend_sched_synchronize(sched); });
}

mllama_status guard_compute(ggml_backend_t backend, struct ggml_cgraph * gf, enum ggml_status * status) {
    *status = GGML_STATUS_FAILED;
    return on_device(ggml_backend_get_device(backend), "computing",
                     [&] { *status = ggml_backend_graph_compute(backend, gf); });
}

void guard_sched_free(ggml_backend_sched_t sched) {
    freeing([&] { ggml_backend_sched_free(sched); });
}

// ---- files --------------------------------------------------------------------------------------------------------

mllama_status guard_gguf_open(const char * path, struct gguf_context ** gguf) {
    *gguf = nullptr;
    const auto call = [&] { *gguf = gguf_init_from_file(path, { /* .no_alloc = */ true, /* .ctx = */ nullptr }); };
    return guarded(call, [&](const char * what, bool of_memory) {
        return fail(of_memory ? MLLAMA_ERR_MEMORY : MLLAMA_ERR_FILE, "%s: not a readable GGUF file: %s", path, what);
    });
}
