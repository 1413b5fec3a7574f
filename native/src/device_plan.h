// Which part of a model goes to which device.
#pragma once

#include "devices.h"

typedef struct device_plan {
    ggml_backend_dev_t   cpu;
    ggml_backend_dev_t   gpus[MAX_DEVICES]; // those that layers or vision go to, each once
    int32_t              n_gpus;
    ggml_backend_dev_t * layers;            // [n_layer + 1], the last for the output
    ggml_backend_dev_t   vision;
} device_plan;

// n_layer counts the text layers, without the output. Devices that something goes to are started once, so that one that
// cannot be used is left out, or refused where the caller names it.
mllama_status device_plan_make(const mllama_model_params * params, int32_t n_layer, device_plan * plan);
void          device_plan_free(device_plan * plan);
