#include "devices.h"

#include "ggml.h"

#include <pthread.h>
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

bool device_is_accel(ggml_backend_dev_t device) {
    return ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_ACCEL;
}

static bool is_gpu(ggml_backend_dev_t device) {
    const enum ggml_backend_dev_type type = ggml_backend_dev_type(device);
    return type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU;
}

static mllama_status list_gpus(const mllama_model_params * params, ggml_backend_dev_t * gpus, int32_t * n) {
    *n = 0;
    if (params->devices) {
        for (int32_t i = 0; i < params->n_devices; i++) {
            const int32_t index = params->devices[i];
            if (index < 0 || (size_t) index >= ggml_backend_dev_count() || *n == MAX_DEVICES) {
                return fail(MLLAMA_ERR_ARGUMENT, "no device %d to offload to; there are %zu", index, ggml_backend_dev_count());
            }
            gpus[(*n)++] = ggml_backend_dev_get((size_t) index);
        }
        return MLLAMA_OK;
    }
    for (size_t i = 0; i < ggml_backend_dev_count() && *n < MAX_DEVICES; i++) {
        if (is_gpu(ggml_backend_dev_get(i))) {
            gpus[(*n)++] = ggml_backend_dev_get(i);
        }
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

    // Shares of the devices, summed up: layer i of the offloaded ones goes to the first device whose sum exceeds i/n.
    double share[MAX_DEVICES], sum = 0.0;
    for (int32_t d = 0; d < n_gpus; d++) {
        size_t free_bytes = 0, total_bytes = 0;
        if (!params->tensor_split) {
            ggml_backend_dev_memory(gpus[d], &free_bytes, &total_bytes);
        }
        const double part = params->tensor_split ? (double) params->tensor_split[d] : (double) free_bytes;
        if (!(part >= 0.0)) {
            return fail(MLLAMA_ERR_ARGUMENT, "tensor_split[%d] is %g; shares must not be negative", d, part);
        }
        sum += part;
        share[d] = sum;
    }
    for (int32_t i = 0; i <= n_layer; i++) {
        const int32_t offloaded = i - (n_layer + 1 - n_offload);
        plan->layers[i] = plan->cpu;
        if (offloaded < 0) {
            continue;
        }
        int32_t d = 0;
        while (d < n_gpus - 1 && !(share[d] > sum * offloaded / n_offload)) {
            d++;
        }
        plan->layers[i] = gpus[d];
        plan_use(plan, gpus[d]);
    }

    plan->vision = plan->cpu;
    if (params->vision_device == -1 && n_offload > 0) {
        plan->vision = gpus[0];
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
