#include "devices.h"

#include "ggml.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static pthread_once_t backends_once = PTHREAD_ONCE_INIT;

static void load_backends(void) {
    log_install();
    ggml_time_init();
    if (ggml_backend_dev_count() == 0) { // a ggml whose backends are libraries of their own
        ggml_backend_load_all();
    }
}

const char * mllama_version(void) {
    return MLLAMA_VERSION;
}

const char * mllama_ggml_version_built(void) {
    return MLLAMA_GGML_VERSION;
}

const char * mllama_ggml_version_loaded(void) {
    return ggml_version();
}

mllama_status devices_init(void) {
    if (strcmp(ggml_version(), MLLAMA_GGML_VERSION) != 0) {
        return fail(MLLAMA_ERR_BACKEND, "compiled for ggml %s, but ggml %s is loaded; reinstall mllama_gguf", MLLAMA_GGML_VERSION,
                    ggml_version());
    }
    pthread_once(&backends_once, load_backends);
    if (!ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU)) {
        return fail(MLLAMA_ERR_BACKEND, "ggml has no CPU backend; reinstall llama-cpp-python");
    }
    return MLLAMA_OK;
}

int32_t mllama_device_count(void) {
    return devices_init() == MLLAMA_OK ? (int32_t) ggml_backend_dev_count() : 0;
}

mllama_status mllama_device_get(int32_t index, mllama_device_info * info) {
    TRY(devices_init());
    if (index < 0 || (size_t) index >= ggml_backend_dev_count()) {
        return fail(MLLAMA_ERR_ARGUMENT, "no device %d; there are %zu", index, ggml_backend_dev_count());
    }
    const ggml_backend_dev_t device = ggml_backend_dev_get((size_t) index);
    size_t                   free_bytes = 0, total_bytes = 0;
    ggml_backend_dev_memory(device, &free_bytes, &total_bytes);
    info->name         = ggml_backend_dev_name(device);
    info->description  = ggml_backend_dev_description(device);
    info->type         = (int32_t) ggml_backend_dev_type(device);
    info->memory_free  = free_bytes;
    info->memory_total = total_bytes;
    return MLLAMA_OK;
}

// ---- remote devices -----------------------------------------------------------------------------------------------

// As declared in ggml-rpc.h. Looked up by name, so that neither header nor library is needed where ggml has no RPC.
typedef ggml_backend_reg_t (*rpc_add_server_fn)(const char * endpoint);
typedef void (*rpc_start_server_fn)(const char * endpoint, const char * cache_dir, size_t n_threads, size_t n_devices,
                                    ggml_backend_dev_t * devices);

static void * rpc_function(const char * name) {
    const ggml_backend_reg_t reg = ggml_backend_reg_by_name("RPC");
    return reg ? ggml_backend_reg_get_proc_address(reg, name) : NULL;
}

static mllama_status no_rpc(void) {
    return fail(MLLAMA_ERR_BACKEND, "the installed llama-cpp-python has no RPC; run: CMAKE_ARGS=\"-DGGML_RPC=ON\" pip install "
                                    "--force-reinstall --no-deps --no-cache-dir --no-binary llama-cpp-python llama-cpp-python==" MLLAMA_LLAMA_CPP_VERSION);
}

bool mllama_rpc_available(void) {
    return devices_init() == MLLAMA_OK && rpc_function("ggml_backend_rpc_add_server") != NULL;
}

mllama_status mllama_rpc_add(const char * endpoint) {
    TRY(devices_init());
    const rpc_add_server_fn add_server = (rpc_add_server_fn) rpc_function("ggml_backend_rpc_add_server");
    if (!add_server) {
        return no_rpc();
    }
    const ggml_backend_reg_t reg = add_server(endpoint);
    if (!reg) {
        return fail(MLLAMA_ERR_BACKEND, "worker %s has no devices", endpoint);
    }
    for (size_t i = 0; i < ggml_backend_reg_dev_count(reg); i++) {
        if (ggml_backend_dev_by_name(ggml_backend_dev_name(ggml_backend_reg_dev_get(reg, i)))) {
            return MLLAMA_OK; // added before
        }
    }
    ggml_backend_register(reg);
    return MLLAMA_OK;
}

mllama_status mllama_rpc_serve(const char * endpoint, const char * cache_dir, int32_t n_threads, int32_t n_devices,
                               const int32_t * devices) {
    TRY(devices_init());
    const rpc_start_server_fn start_server = (rpc_start_server_fn) rpc_function("ggml_backend_rpc_start_server");
    if (!start_server) {
        return no_rpc();
    }
    if (n_devices < 1 || n_devices > MAX_DEVICES) {
        return fail(MLLAMA_ERR_ARGUMENT, "%d devices to serve; 1 to %d are possible", n_devices, MAX_DEVICES);
    }
    if (n_threads > GGML_MAX_N_THREADS) {
        return fail(MLLAMA_ERR_ARGUMENT, "%d threads to serve with; at most %d are possible", n_threads, GGML_MAX_N_THREADS);
    }
    ggml_backend_dev_t served[MAX_DEVICES];
    for (int32_t i = 0; i < n_devices; i++) {
        if (devices[i] < 0 || (size_t) devices[i] >= ggml_backend_dev_count()) {
            return fail(MLLAMA_ERR_ARGUMENT, "no device %d to serve; there are %zu", devices[i], ggml_backend_dev_count());
        }
        served[i] = ggml_backend_dev_get((size_t) devices[i]);
    }
    start_server(endpoint, cache_dir, (size_t) (n_threads > 0 ? n_threads : 1), (size_t) n_devices, served);
    return fail(MLLAMA_ERR_BACKEND, "the worker at %s stopped; is the port in use?", endpoint);
}

void mllama_fatal_set(mllama_fatal_callback callback) {
    ggml_set_abort_callback(callback);
}

bool device_is_rpc(ggml_backend_dev_t device) {
    return strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(device)), "RPC") == 0;
}

const char * device_label(ggml_backend_dev_t device) {
    static _Thread_local char label[256];
    if (!device_is_rpc(device)) {
        return ggml_backend_dev_name(device);
    }
    snprintf(label, sizeof(label), "%s (worker %s)", ggml_backend_dev_name(device), ggml_backend_dev_description(device));
    return label;
}

// ---- the plan -----------------------------------------------------------------------------------------------------

bool device_is_accel(ggml_backend_dev_t device) {
    return ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_ACCEL;
}

static bool is_gpu(ggml_backend_dev_t device) {
    const enum ggml_backend_dev_type type = ggml_backend_dev_type(device);
    return type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU;
}

static mllama_status add_gpu(int32_t index, ggml_backend_dev_t * gpus, int32_t * n) {
    if (index < 0 || (size_t) index >= ggml_backend_dev_count()) {
        return fail(MLLAMA_ERR_ARGUMENT, "no device %d to offload to; there are %zu", index, ggml_backend_dev_count());
    }
    const ggml_backend_dev_t device = ggml_backend_dev_get((size_t) index);
    if (!is_gpu(device)) {
        return fail(MLLAMA_ERR_ARGUMENT, "device %s is no GPU: nothing can be offloaded to it", ggml_backend_dev_name(device));
    }
    for (int32_t i = 0; i < *n; i++) {
        if (gpus[i] == device) {
            return fail(MLLAMA_ERR_ARGUMENT, "device %s is named twice among the devices", ggml_backend_dev_name(device));
        }
    }
    if (*n == MAX_DEVICES) {
        return fail(MLLAMA_ERR_ARGUMENT, "more than %d devices to offload to", MAX_DEVICES);
    }
    gpus[(*n)++] = device;
    return MLLAMA_OK;
}

// The devices to offload to, in the order of tensor_split and main_gpu. Workers come first, as in llama.cpp.
static mllama_status list_gpus(const mllama_model_params * params, ggml_backend_dev_t * gpus, int32_t * n) {
    *n = 0;
    for (int32_t i = 0; params->devices && i < params->n_devices; i++) {
        TRY(add_gpu(params->devices[i], gpus, n));
    }
    for (int32_t remote = 1; !params->devices && remote >= 0; remote--) {
        for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
            const ggml_backend_dev_t device = ggml_backend_dev_get(i);
            if (is_gpu(device) && device_is_rpc(device) == (remote == 1)) {
                TRY(add_gpu((int32_t) i, gpus, n));
            }
        }
    }
    if (params->main_gpu >= 0) {
        if (params->main_gpu >= *n) {
            return fail(MLLAMA_ERR_ARGUMENT, "main_gpu is %d; there are %d devices to offload to, counted from 0", params->main_gpu, *n);
        }
        if (params->tensor_split) {
            return fail(MLLAMA_ERR_ARGUMENT, "main_gpu and tensor_split exclude each other: one device takes all, or they share");
        }
        gpus[0] = gpus[params->main_gpu];
        *n      = 1;
    }
    return MLLAMA_OK;
}

// sums[d]: the shares of the devices up to and including d
static mllama_status add_up_shares(const mllama_model_params * params, const ggml_backend_dev_t * gpus, int32_t n_gpus, double * sums) {
    if (params->tensor_split && params->n_tensor_split > n_gpus) {
        return fail(MLLAMA_ERR_ARGUMENT, "tensor_split has %d shares for %d devices", params->n_tensor_split, n_gpus);
    }
    double sum = 0.0;
    for (int32_t d = 0; d < n_gpus; d++) {
        size_t free_bytes = 0, total_bytes = 0;
        double share      = d < params->n_tensor_split ? (double) params->tensor_split[d] : 0.0;
        if (!params->tensor_split) {
            ggml_backend_dev_memory(gpus[d], &free_bytes, &total_bytes);
            share = (double) free_bytes;
        }
        if (!(share >= 0.0) || isinf(share)) {
            return fail(MLLAMA_ERR_ARGUMENT, "tensor_split[%d] is %g; a share is a number of at least 0", d, share);
        }
        sums[d] = sum += share;
    }
    if (params->tensor_split && sum == 0.0) {
        return fail(MLLAMA_ERR_ARGUMENT, "tensor_split gives no device a share");
    }
    for (int32_t d = 0; d < n_gpus && sum == 0.0; d++) {
        sums[d] = d + 1.0; // devices that do not say how much memory they have
    }
    return MLLAMA_OK;
}

static void plan_use(device_plan * plan, ggml_backend_dev_t device) {
    if (device == plan->cpu) {
        return;
    }
    for (int32_t i = 0; i < plan->n_gpus; i++) {
        if (plan->gpus[i] == device) return;
    }
    plan->gpus[plan->n_gpus++] = device;
}

mllama_status device_plan_make(const mllama_model_params * params, int32_t n_layer, device_plan * plan) {
    memset(plan, 0, sizeof(*plan));
    plan->cpu    = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    plan->layers = calloc((size_t) n_layer + 1, sizeof(*plan->layers));
    if (!plan->layers) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }

    ggml_backend_dev_t gpus[MAX_DEVICES];
    int32_t            n_gpus;
    TRY(list_gpus(params, gpus, &n_gpus));

    int32_t n_offload = params->n_gpu_layers < 0 ? n_layer + 1 : params->n_gpu_layers;
    if (n_offload > n_layer + 1) {
        n_offload = n_layer + 1;
    }
    if (n_offload > 0 && n_gpus == 0) {
        log_warn("n_gpu_layers is %d, but ggml has no GPU device here: everything runs on the CPU", params->n_gpu_layers);
        n_offload = 0;
    }

    double sums[MAX_DEVICES];
    TRY(add_up_shares(params, gpus, n_gpus, sums));
    // Layer i of the n offloaded ones goes to the first device whose sum exceeds i/n of all.
    for (int32_t i = 0; i <= n_layer; i++) {
        const int32_t offloaded = i - (n_layer + 1 - n_offload);
        plan->layers[i] = plan->cpu;
        if (offloaded < 0) {
            continue;
        }
        int32_t d = 0;
        while (d < n_gpus - 1 && !(sums[d] > sums[n_gpus - 1] * offloaded / n_offload)) {
            d++;
        }
        plan->layers[i] = gpus[d];
        plan_use(plan, gpus[d]);
    }

    plan->vision = plan->cpu;
    if (params->vision_device == -1 && n_offload > 0) {
        plan->vision = plan->gpus[0]; // the first that has layers
    } else if (params->vision_device >= 0) {
        if ((size_t) params->vision_device >= ggml_backend_dev_count()) {
            return fail(MLLAMA_ERR_ARGUMENT, "no device %d for the vision encoder; there are %zu", params->vision_device,
                        ggml_backend_dev_count());
        }
        plan->vision = ggml_backend_dev_get((size_t) params->vision_device);
        if (device_is_accel(plan->vision)) {
            plan->vision = plan->cpu; // weights stay with the CPU, which such a device helps
        }
    }
    plan_use(plan, plan->vision);
    return MLLAMA_OK;
}

void device_plan_free(device_plan * plan) {
    free(plan->layers);
    plan->layers = NULL;
}
