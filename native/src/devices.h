// What ggml can compute on, and which part of a model goes where.
#pragma once

#include "status.h"

#include "ggml-backend.h"

enum { MAX_DEVICES = 16 };

typedef struct device_plan {
    ggml_backend_dev_t   cpu;
    ggml_backend_dev_t   gpus[MAX_DEVICES]; // those that layers or vision go to, each once
    int32_t              n_gpus;
    ggml_backend_dev_t * layers;            // [n_layer + 1], the last for the output
    ggml_backend_dev_t   vision;
} device_plan;

// Loads ggml's backends once and checks that this ggml is the one compiled against.
mllama_status devices_init(void);
// n_layer counts the text layers, without the output.
mllama_status device_plan_make(const mllama_model_params * params, int32_t n_layer, device_plan * plan);
void          device_plan_free(device_plan * plan);
// Name for messages; that of a remote device tells its worker.
const char *  device_label(ggml_backend_dev_t device);
bool          device_is_rpc(ggml_backend_dev_t device);
// Device types that take part in computing with the CPU (BLAS, AMX).
bool          device_is_accel(ggml_backend_dev_t device);
