#include "device_plan.h"

#include "guard.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// Devices to offload to, in the order of tensor_split and main_gpu
typedef struct gpu_list {
    ggml_backend_dev_t devices[MAX_DEVICES];
    double             shares[MAX_DEVICES]; // of tensor_split; 1 without
    int32_t            n;
} gpu_list;

static mllama_status add_gpu(int32_t index, gpu_list * gpus) {
    const ggml_backend_dev_t device = devices_get(index);
    if (!device) {
        return fail(MLLAMA_ERR_ARGUMENT, "no device %d to offload to; there are %d", index, devices_count());
    }
    if (!device_is_gpu(device)) {
        return fail(MLLAMA_ERR_ARGUMENT, "device %s is not a GPU: nothing can be offloaded to it", device_name(device));
    }
    for (int32_t i = 0; i < gpus->n; i++) {
        if (gpus->devices[i] == device) {
            return fail(MLLAMA_ERR_ARGUMENT, "device %s is named twice among the devices", device_name(device));
        }
    }
    if (gpus->n == MAX_DEVICES) {
        return fail(MLLAMA_ERR_ARGUMENT, "more than %d devices to offload to", MAX_DEVICES);
    }
    gpus->devices[gpus->n++] = device;
    return MLLAMA_OK;
}

static mllama_status read_shares(const mllama_model_params * params, gpu_list * gpus) {
    if (params->tensor_split && params->n_tensor_split > gpus->n) {
        return fail(MLLAMA_ERR_ARGUMENT, "tensor_split has %d shares for %d devices", params->n_tensor_split, gpus->n);
    }
    double sum = 0.0;
    for (int32_t d = 0; d < gpus->n; d++) {
        double share = 1.0;
        if (params->tensor_split) {
            share = d < params->n_tensor_split ? (double) params->tensor_split[d] : 0.0;
        }
        if (!(share >= 0.0) || isinf(share)) {
            return fail(MLLAMA_ERR_ARGUMENT, "tensor_split[%d] is %g; a share is a number of at least 0", d, share);
        }
        sum += gpus->shares[d] = share;
    }
    return params->tensor_split && sum == 0.0 ? fail(MLLAMA_ERR_ARGUMENT, "tensor_split gives no device a share")
                                              : MLLAMA_OK;
}

// All that may be used. Workers come first, as in llama.cpp.
static mllama_status list_gpus(const mllama_model_params * params, gpu_list * gpus) {
    gpus->n = 0;
    for (int32_t i = 0; params->devices && i < params->n_devices; i++) {
        TRY(add_gpu(params->devices[i], gpus));
    }
    for (int32_t remote = 1; !params->devices && remote >= 0; remote--) {
        for (int32_t i = 0; i < devices_count(); i++) {
            const ggml_backend_dev_t device = devices_get(i);
            if (device_is_gpu(device) && device_is_rpc(device) == (remote == 1)) {
                TRY(add_gpu(i, gpus));
            }
        }
    }
    TRY(read_shares(params, gpus));
    if (params->main_gpu < 0) {
        return MLLAMA_OK;
    }
    if (params->main_gpu >= gpus->n) {
        return fail(MLLAMA_ERR_ARGUMENT, "main_gpu is %d; there are %d devices to offload to, counted from 0",
                    params->main_gpu, gpus->n);
    }
    if (params->tensor_split) {
        return fail(MLLAMA_ERR_ARGUMENT,
                    "main_gpu and tensor_split exclude each other: one device takes all, or they share");
    }
    gpus->devices[0] = gpus->devices[params->main_gpu];
    gpus->n          = 1;
    return MLLAMA_OK;
}

// Leaves out the devices that cannot be started. One that the caller has chosen is missed.
static mllama_status keep_working(const mllama_model_params * params, gpu_list * gpus) {
    int32_t n = 0;
    for (int32_t d = 0; d < gpus->n; d++) {
        const mllama_status status = device_start(gpus->devices[d]);
        if (status != MLLAMA_OK && (params->devices || params->main_gpu >= 0)) {
            return status;
        }
        if (status != MLLAMA_OK) {
            log_warn("nothing is offloaded to it: %s", mllama_last_error());
            continue;
        }
        gpus->devices[n]  = gpus->devices[d];
        gpus->shares[n++] = gpus->shares[d];
    }
    gpus->n = n;
    return MLLAMA_OK;
}

// sums[d]: the shares of the devices up to and including d
static mllama_status add_up_shares(const mllama_model_params * params, const gpu_list * gpus, double * sums) {
    double sum = 0.0;
    for (int32_t d = 0; d < gpus->n; d++) {
        size_t free_bytes = 0, total_bytes = 0;
        if (!params->tensor_split) {
            TRY(guard_memory(gpus->devices[d], &free_bytes, &total_bytes));
        }
        sums[d] = sum += params->tensor_split ? gpus->shares[d] : (double) free_bytes;
    }
    for (int32_t d = 0; d < gpus->n && sum == 0.0; d++) {
        sums[d] = d + 1.0; // devices that do not say how much memory they have
    }
    return MLLAMA_OK;
}

static mllama_status use(device_plan * plan, ggml_backend_dev_t device) {
    if (device == plan->cpu) {
        return MLLAMA_OK;
    }
    for (int32_t i = 0; i < plan->n_gpus; i++) {
        if (plan->gpus[i] == device) return MLLAMA_OK;
    }
    if (plan->n_gpus == MAX_DEVICES) { // layers on all of them, and the encoder on another
        return fail(MLLAMA_ERR_ARGUMENT, "more than %d devices for one model", MAX_DEVICES);
    }
    plan->gpus[plan->n_gpus++] = device;
    return MLLAMA_OK;
}

static mllama_status place_layers(const mllama_model_params * params, int32_t n_layer, device_plan * plan) {
    gpu_list gpus;
    TRY(list_gpus(params, &gpus));

    int32_t n_offload = params->n_gpu_layers < 0 ? n_layer + 1 : params->n_gpu_layers;
    if (n_offload > n_layer + 1) {
        n_offload = n_layer + 1;
    }
    if (n_offload > 0) {
        TRY(keep_working(params, &gpus));
        if (gpus.n == 0) {
            log_warn("n_gpu_layers is %d, but ggml has no usable GPU device here: everything runs on the CPU",
                     params->n_gpu_layers);
            n_offload = 0;
        }
    }
    double sums[MAX_DEVICES];
    if (n_offload > 0) {
        TRY(add_up_shares(params, &gpus, sums));
    }
    // Layer i of the n offloaded ones goes to the first device whose sum exceeds i/n of all.
    for (int32_t i = 0; i <= n_layer; i++) {
        const int32_t offloaded = i - (n_layer + 1 - n_offload);
        plan->layers[i] = plan->cpu;
        if (offloaded < 0) {
            continue;
        }
        int32_t d = 0;
        while (d < gpus.n - 1 && !(sums[d] > sums[gpus.n - 1] * offloaded / n_offload)) {
            d++;
        }
        plan->layers[i] = gpus.devices[d];
        TRY(use(plan, gpus.devices[d]));
    }
    return MLLAMA_OK;
}

static mllama_status place_vision(const mllama_model_params * params, device_plan * plan) {
    plan->vision = plan->cpu;
    if (params->vision_device == -1 && plan->n_gpus > 0) {
        plan->vision = plan->gpus[0]; // the first that has layers
    } else if (params->vision_device >= 0) {
        plan->vision = devices_get(params->vision_device);
        if (!plan->vision) {
            return fail(MLLAMA_ERR_ARGUMENT, "no device %d for the vision encoder; there are %d", params->vision_device,
                        devices_count());
        }
        if (device_is_accel(plan->vision)) {
            plan->vision = plan->cpu; // weights stay with the CPU, which such a device helps
        }
        TRY(device_start(plan->vision));
    }
    return use(plan, plan->vision);
}

mllama_status device_plan_make(const mllama_model_params * params, int32_t n_layer, device_plan * plan) {
    memset(plan, 0, sizeof(*plan));
    plan->cpu    = devices_cpu();
    plan->layers = calloc((size_t) n_layer + 1, sizeof(*plan->layers));
    if (!plan->layers) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    TRY(place_layers(params, n_layer, plan));
    return place_vision(params, plan);
}

void device_plan_free(device_plan * plan) {
    free(plan->layers);
    plan->layers = NULL;
}
